"""The command line: argv -> Recipe -> one call."""

from trainwright.cli import proving, training, using
from trainwright.cli.base import Job, app

__all__ = ["Job", "app", "proving", "training", "using"]
