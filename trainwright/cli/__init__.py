"""The command line: argv -> Recipe -> one call."""

from trainwright.cli import training, using
from trainwright.cli.base import Job, app

__all__ = ["Job", "app", "training", "using"]
