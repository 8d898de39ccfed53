"""Metrics, exact over uneven batches and over ranks. They never drive updates."""
