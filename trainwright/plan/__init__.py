"""What a run will take and how long, before it starts."""
