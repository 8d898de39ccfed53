"""What runs in a process that decodes images. Nothing of torch is imported here: it would take each process a second."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainwright.data import image_files
from trainwright.data.image_files import Form


def start() -> None:
    """Leave Ctrl-C to the parent, and don't outlive it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def decode(paths: Sequence[Path], form: Form) -> np.ndarray:
    """(n, channels, height, width) uint8."""
    return np.stack([image_files.decode(path, form) for path in paths])
