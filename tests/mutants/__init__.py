"""Silent bugs that are seeded on purpose, which ``verify`` must catch and ``bisect`` must name."""
