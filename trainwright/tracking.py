"""What a run measured: metrics.jsonl, TensorBoard, and the environment it ran in.

    RUN/metrics.jsonl     {"step": 7, "loss": 1.93, ...}                          a line a step
                          {"step": 7, "split": "held_out", "loss": 2.05, ...}     a line an evaluation
    RUN/tensorboard/      the same numbers as train/loss, held_out/loss, ...

JSON has no NaN and no infinity: such a value is null, and the line names it under ``non_finite``.
Of several processes only rank 0 has a Tracker.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, SupportsFloat

import psutil
import torch

from trainwright.recipe import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Silence:
    """In the place of a Tracker where another process keeps the books."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def log(self, step: int, values: Mapping[str, SupportsFloat], split: str | None = None) -> None:
        """Not here."""

    def truncate_after(self, step: int) -> None:
        """Not here."""

    def flush(self) -> None:
        """Nothing to bring to the disk."""


_RESERVED = {"step", "split", "non_finite"}


class Tracker:
    """Appends measurements to the files of a run folder; use it as a context manager, or call ``close``.

    Nothing is opened before the first ``log``, so that a resumed run can call ``truncate_after`` first.
    """

    def __init__(self, run_folder: Path, tensorboard: bool = True) -> None:
        self._folder = run_folder
        self._path = run_folder / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._file: IO[str] | None = None
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: Mapping[str, SupportsFloat], split: str | None = None) -> None:
        """Append one line and flush it; ``split`` names the data of an evaluation and is None for a training step.

        Values are ints, floats, or anything else with ``item()`` (a 0-dim tensor). ValueError for a name that the lines
        use themselves.
        """
        if taken := _RESERVED & values.keys():
            raise ValueError(f"{sorted(taken)} can't name metrics: the lines of metrics.jsonl use these keys themselves")
        numbers = {name: _number(value) for name, value in values.items()}
        self._open().write(_line(step, split, numbers))
        if self._tensorboard:
            writer = self._open_writer()
            for name, number in numbers.items():
                writer.add_scalar(f"{split or 'train'}/{name}", number, step)

    def truncate_after(self, step: int) -> None:
        """Forget what was logged for later steps, and a line that was cut off; -1 forgets everything.

        Called by a run that resumes from the checkpoint of ``step``, so that its files become those of an unbroken run.
        """
        self.close()
        if self._path.exists():
            _keep(self._path, step)
        self._purge_step = step + 1

    def flush(self) -> None:
        """Bring all that was logged to the disk.

        Call it before a checkpoint is written: what the checkpoint covers is not measured again, so it must not get
        lost in a power cut that the checkpoint survives.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the files; a later ``log`` opens them again."""
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._file = self._writer = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> IO[str]:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _keep(self._path, None)  # else the first new line would be glued to one that was cut off
            self._file = self._path.open("a", encoding="utf-8", buffering=1)  # 1: flushed with each line
        return self._file

    def _open_writer(self) -> SummaryWriter:
        """TensorBoard's writer; one opened after ``truncate_after`` tells the readers to forget the later steps."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._purge_step)
            self._purge_step = None
        return self._writer


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in their order; a last one that was cut off is left out.

    InputError naming the line if any other isn't one of a run; FileNotFoundError if there is no file.
    """
    return [record for _, record in _records(path)]


def environment() -> dict[str, Any]:
    """What a run's numbers depend on besides its recipe, for environment.json: versions, processors, threads."""
    return {
        "trainwright": metadata.version("trainwright"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "safetensors": metadata.version("safetensors"),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def _number(value: Any) -> int | float:
    """A Python number: ints stay ints, so that counts of bytes and tokens stay exact."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, int) else float(value)


def _line(step: int, split: str | None, numbers: Mapping[str, int | float]) -> str:
    """One line of metrics.jsonl, strict JSON."""
    lost = [name for name, number in numbers.items() if not math.isfinite(number)]
    record: dict[str, Any] = {"step": step, **({"split": split} if split else {})}
    record |= {name: None if name in lost else number for name, number in numbers.items()}
    return json.dumps(record | ({"non_finite": lost} if lost else {}), allow_nan=False) + "\n"


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line, as bytes without its end and as what it says, but for a last one that was cut off."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is not None:
            yield line, record
        elif line.strip() and number < len(lines):  # what follows the last line end was cut off, or is empty
            raise InputError(f"{path}: line {number} is not a JSON object with a step; mend or remove it")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None if it holds none of ours."""
    try:
        record = json.loads(line)
    except ValueError:  # also what isn't UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _keep(path: Path, last_step: int | None) -> None:
    """Rewrite a metrics.jsonl, atomically, with the whole lines of steps up to ``last_step`` (None: of all steps)."""
    lines = [line for line, record in _records(path) if last_step is None or record["step"] <= last_step]
    text = b"".join(line + b"\n" for line in lines)
    if text == path.read_bytes():
        return
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cpu_model() -> str:
    """The processor's name as the system gives it, for Python knows it on few systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
