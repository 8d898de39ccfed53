"""Processes of one run: ``start`` and ``agent`` start and watch them, each calls ``worker``; ``script`` is for clusters."""

from trainwright.launch.start import run
from trainwright.launch.worker import alive, disagreement, joined, log_to, processes, rank, restarted, restarts, tell

__all__ = ["alive", "disagreement", "joined", "log_to", "processes", "rank", "restarted", "restarts", "run", "tell"]
