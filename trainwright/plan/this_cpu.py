"""This machine's CPU as a device: measured at first, then read from the user's cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from trainwright.plan import calibrate, composed
from trainwright.plan.devices import Curves, Device

logger = logging.getLogger(__name__)


def cpu(say: Callable[[str], None] = lambda text: None) -> Device:
    """This machine's CPU with the threads that torch has now, from the cache.

    If it isn't there, it is measured, in some five seconds, as ``say`` is told.
    """
    file = _file()
    if (curves := _read(file)) is None:
        say(f"measuring this CPU, once: some five seconds; if other work slows it down, delete {file} later")
        curves = _keep(file, calibrate.measure())
    return calibrate.as_device(curves)


def _file() -> Path:
    """In the user's cache, named by everything that the rates depend on."""
    packed = hasattr(torch.ops.trainwright, "packed_attention")
    source = hashlib.sha256(Path(calibrate.__file__).read_bytes() + Path(composed.__file__).read_bytes()).hexdigest()
    key = repr((source, _model(), os.cpu_count(), torch.__version__, torch.get_num_threads(), packed))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainwright"
    return folder / f"cpu_speed-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _model() -> str:
    """Of the CPU, with what it can compute."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(next((line for line in lines if line.startswith(word)), "") for word in ("model name", "flags", "Features"))


def _read(file: Path) -> Curves | None:
    """None where nothing has been kept, or it isn't whole."""
    try:
        kept = json.loads(file.read_text())
        pairs = [{name: (one, two) for name, (one, two) in kept[part].items()} for part in ("products", "rates")]
        together = {dtype: float(factor) for dtype, factor in kept["together"].items()}
        return Curves(pairs[0], pairs[1], float(kept["overhead"]), together)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(file: Path, curves: Curves) -> Curves:
    """Atomically; a cache that can't be written isn't needed."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dataclasses.asdict(curves)))
        os.replace(temporary, file)
    except OSError as error:
        logger.info("the speed of this CPU isn't kept: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return curves
