"""The command line: argv -> Recipe -> one call."""

from trainwright.cli import planning, proving, training, using
from trainwright.cli.base import Job, app

__all__ = ["Job", "app", "planning", "proving", "training", "using"]
