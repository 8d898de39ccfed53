"""The verb ``predict``: what a finished run's model says of new files, one record a sample as soon as it is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainwright import build
from trainwright.data import frames, image_files
from trainwright.data.examples import Kind
from trainwright.predictor import Predictor
from trainwright.recipe import InputError, RunError, Task, nearest
from trainwright.report import style
from trainwright.report.scored import class_labels, likelihoods

Record = dict[str, Any]
Named = tuple[str, Tensor]

TOP = 5  # classes of a record
UNSEEN = 0.0005  # probabilities below it would be shown as 0.0%
MASKS = "predictions"  # where masks go, in the folder of the run
TAKES: dict[Kind, tuple[str, Iterable[str]]] = {
    "images": ("images", (*sorted(image_files.SUFFIXES), ".npz")),
    "table": ("tables", frames.SUFFIXES),
    "series": ("tables in order of time", frames.SUFFIXES),
    "arrays": ("arrays", (".npz", ".npy")),
}


def predict(
    folder: Path,
    inputs: Sequence[Path],
    *,
    batch_size: int = 64,
    out: Path | None = None,
    emit: Callable[[Record], None] | None = None,
) -> dict[str, Any]:
    """Let a finished run's model judge files, and all files of its kind below folders.

    Args:
        emit: gets each record as soon as its batch is done; the result then doesn't hold them, so that inputs of any number
            fit in memory. None: the result holds them all.
        out: where the masks go, by default RUN/predictions.

    Returns:
        What ``--json`` prints: folder, count, and the records under predictions.

    Raises:
        InputError: nothing to predict, or files that aren't there, can't be read or are of another kind. RunError: the model
            gives values that aren't finite.
    """
    check(inputs)
    predictor = build.load_predictor(folder)
    files = find(inputs, predictor.preparation.kind)
    kept: list[Record] = []
    done = 0
    for record in records(predictor, files, batch_size, Masks(out or folder / MASKS, inputs, files)):
        done += 1
        (emit or kept.append)(record)
    return {"folder": str(folder), "count": done, **({} if emit else {"predictions": kept})}


def check(inputs: Sequence[Path]) -> None:
    """That there are inputs, and all of them exist.

    Raises:
        InputError: no, with the nearest name beside the first that doesn't.
    """
    if not inputs:
        raise InputError("give files or folders to predict, such as: trainwright predict RUN photo.png more-photos/")
    for path in inputs:
        if not path.exists():
            parent = path.parent
            beside = sorted(child.name for child in parent.iterdir()) if parent.is_dir() else []
            near = nearest(path.name, beside) if parent.is_dir() else f": neither does the folder {parent}"
            raise InputError(f"{path} doesn't exist{near}")


def find(inputs: Sequence[Path], kind: Kind) -> list[Path]:
    """The files to predict, each once: files as they are given, and below folders those of the kind, sorted.

    Raises:
        InputError: a file of another kind, or a folder without any of this one.
    """
    what, suffixes = TAKES[kind]
    takes = f"this run takes {what} ({' '.join(suffixes)})"
    found: dict[str, Path] = {}
    for path in inputs:
        files = [path]
        if path.is_dir():
            files = [file for file in image_files.walked(path) if file.suffix.lower() in suffixes]
            if not files:
                raise InputError(f"{path} holds nothing to predict: {takes}, and none is in that folder or below")
        elif path.suffix.lower() not in suffixes:
            raise InputError(f"{path} is {path.suffix.lower() or 'a file without a suffix'}, but {takes}")
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def records(predictor: Predictor, files: Sequence[Path], batch_size: int, masks: Masks) -> Iterator[Record]:
    """A record for each sample: input, and
    classes, binary: class, probability, top (at most five {class, probability}, the likeliest first);
    values: values {label: value}; masks: classes {label: share of the pixels}, mask (the path of a PNG).
    """
    assert batch_size > 0
    for batch in batched(predictor.read(files), batch_size):
        names = [name for name, _ in batch]
        outputs = predictor.outputs(torch.stack([sample for _, sample in batch]))
        finite = outputs.flatten(1).isfinite().all(1)
        if not finite.all():
            raise RunError(f"{names[int(finite.long().argmin())]}: the model gives values that aren't finite")
        yield from _described(predictor.task, names, outputs, masks)


def batched(samples: Iterator[Named], size: int) -> Iterator[list[Named]]:
    """Samples in lists of ``size``, the last one shorter; those before a bad one come before its error."""
    batch: list[Named] = []
    failure: InputError | None = None
    try:
        for sample in samples:
            batch.append(sample)
            if len(batch) == size:
                yield batch
                batch = []
    except InputError as error:
        failure = error
    if batch:
        yield batch
    if failure is not None:
        raise failure


def _described(task: Task, names: Sequence[str], outputs: Tensor, masks: Masks) -> Iterator[Record]:
    if task.dense:
        yield from (_mask(task, name, output, masks) for name, output in zip(names, outputs, strict=True))
    elif task.kind == "values":
        labels = task.labels if len(task.labels) == outputs.shape[1] else [f"value {i}" for i in range(outputs.shape[1])]
        for name, values in zip(names, outputs.tolist(), strict=True):
            yield {"input": name, "values": dict(zip(labels, values, strict=True))}
    else:
        labels = class_labels(task)
        for name, shares in zip(names, likelihoods(task, outputs), strict=True):
            values, places = shares.topk(min(TOP, len(shares)))
            top = [{"class": labels[i], "probability": p} for p, i in zip(values.tolist(), places.tolist(), strict=True)]
            yield {"input": name, **top[0], "top": top}


def _mask(task: Task, name: str, output: Tensor, masks: Masks) -> Record:
    """The record of one sample, outputs (outputs, height, width); its mask is written."""
    labels = class_labels(task)
    mask = (output[0] > 0).long() if task.kind == "binary" else output.argmax(0)
    counts = mask.flatten().bincount(minlength=len(labels)).tolist()
    shares = {label: count / mask.numel() for label, count in zip(labels, counts, strict=True)}
    return {"input": name, "classes": shares, "mask": str(masks.write(name, mask, len(labels)))}


class Masks:
    """Writes masks into a folder, in which the files below an input folder keep their places."""

    def __init__(self, out: Path, inputs: Sequence[Path], files: Iterable[Path]) -> None:
        self._out = out
        self._roots = [path for path in inputs if path.is_dir()]
        self._inputs = {os.path.realpath(file) for file in files}
        self._taken: set[Path] = set()

    def write(self, name: str, mask: Tensor, classes: int) -> Path:
        """Write classes (height, width) as a PNG with a palette, whose pixels are the classes' numbers.

        Raises:
            InputError: it can't be written, or would take the place of an input.
        """
        assert classes <= 256, "masks are bytes"
        picture = Image.fromarray(mask.to(torch.uint8).numpy())
        picture.putpalette(style.palette(classes).tobytes())
        path = self._place(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return style.whole(path, lambda temporary: picture.save(temporary, format="PNG"))
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror or error}); name another folder with --out") from None

    def _place(self, name: str) -> Path:
        """Where the mask of a sample goes; no two are the same."""
        given = Path(name)
        root = next((root for root in self._roots if given.is_relative_to(root) and ".." not in given.parts), given.parent)
        relative = given.relative_to(root)
        stem = relative.stem if relative.suffix.lower() in image_files.SUFFIXES else relative.name
        path = self._out / relative.with_name(f"{stem}.png")
        for number in count(2):
            if path not in self._taken:
                break
            path = path.with_name(f"{stem}-{number}.png")
        if os.path.realpath(path) in self._inputs:
            raise InputError(f"the mask of {name} would overwrite the input {path}; name another folder with --out")
        self._taken.add(path)
        return path


def render(record: Record) -> str:
    """A record on one line: 'cat.png  cat 97.3%  (dog 2.1%)', 'row 17  price 12.5', 'a.png  sky 80.0%  sea 20.0%  a.png'."""
    if "values" in record:
        said = [f"{label} {value:.6g}" for label, value in record["values"].items()]
    elif "mask" in record:
        shares = sorted(record["classes"].items(), key=lambda item: -item[1])
        said = [*(f"{label} {style.percent(share)}" for label, share in shares if share > 0), record["mask"]]
    else:
        first, *others = record["top"]
        said = [_likelihood(first), *(f"({_likelihood(other)})" for other in others[:1] if other["probability"] >= UNSEEN)]
    return _one_line("  ".join([record["input"], *said]))


def _likelihood(one: Record) -> str:
    return f"{one['class']} {style.percent(one['probability'])}"


def _one_line(text: str) -> str:
    """With line ends and whatever else no terminal should get (names of files may hold it) as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
