"""Decoding: one pass over a split in threads, and batches on demand in processes where a split doesn't fit in memory."""

from __future__ import annotations

from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainwright import forking
from trainwright.data import image_files, image_worker
from trainwright.data.image_files import Form, UnreadableImage
from trainwright.data.pictures import Pictures
from trainwright.recipe import RunError

AT_ONCE = 16  # images of one piece of work
AHEAD = 4  # prefetched batches that are kept
MOST_WORKERS = 8


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a pass over a split gave.

    kept    (n,) int64, the numbers of the readable images; the rest is about them
    damaged the names of the others
    images  (n, *form.shape) uint8, or None where they are not to stay in memory
    masks   (n, height, width) uint8, raw values; ``values`` (n, 256) bool says which of them occur before resizing; or None
    sums    (n, 2, channels) int64, see ``sums_of``
    """

    kept: np.ndarray
    damaged: list[str]
    images: np.ndarray | None
    masks: np.ndarray | None
    values: np.ndarray | None
    sums: np.ndarray


def decode_all(
    pictures: Pictures, form: Form, *, keep: bool, skip: bool, progress: Callable[[int], None], threads: int | None = None
) -> Decoded:
    """Decode every image, and mask, of a split once; ``progress`` gets how many more are done.

    Raises:
        InputError: an image has another size; or, if not ``skip``, one is damaged.
    """
    count = len(pictures)
    if isinstance(pictures.images, np.ndarray) and _is_of(pictures.images, form):
        progress(count)
        return _as_it_is(pictures, pictures.images)
    images = np.zeros((count, *form.shape), np.uint8) if keep else None
    masks = np.zeros((count, form.height, form.width), np.uint8) if pictures.masked else None
    values = np.zeros((count, 256), bool) if pictures.masked else None
    sums = np.zeros((count, 2, form.shape[0]), np.int64)

    def one(i: int) -> bool:
        try:
            image = _image(pictures, i)
            pixels = image_files.pixels(image, form, pictures.names[i])
            if masks is not None and values is not None:
                mask = _mask(pictures, i, image)
                values[i, np.unique(np.asarray(mask))] = True
                masks[i] = np.asarray(image_files.fitted(mask, form, pictures.names[i], Image.Resampling.NEAREST))
        except UnreadableImage:
            if skip:
                return False
            raise
        if images is not None:
            images[i] = pixels
        sums[i] = sums_of(pixels[None])[0]
        return True

    readable = np.array(_in_threads(one, count, threads or forking.cores(), progress), dtype=bool)
    kept = np.flatnonzero(readable)
    damaged = [pictures.names[i] for i in np.flatnonzero(~readable).tolist()]
    if not damaged:
        return Decoded(kept, damaged, images, masks, values, sums)
    images, masks, values = (None if array is None else array[kept] for array in (images, masks, values))
    return Decoded(kept, damaged, images, masks, values, sums[kept])


def sums_of(images: np.ndarray) -> np.ndarray:
    """Of (n, channels, height, width) uint8 the sums and the sums of squares of each channel, (n, 2, channels) int64."""
    squares = np.square(images, dtype=np.uint16)  # 255 * 255 fits
    return np.stack([images.sum((2, 3), dtype=np.int64), squares.sum((2, 3), dtype=np.int64)], axis=1)


def _is_of(images: np.ndarray, form: Form) -> bool:
    """Whether an array of images has the form already."""
    channels = images.shape[3] if images.ndim == 4 else 1
    return form.fit == "keep" and (channels, *images.shape[1:3]) == form.shape


def _as_it_is(pictures: Pictures, images: np.ndarray) -> Decoded:
    """An array of images needs no decoding: a thousand times faster than one by one."""
    arranged = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    sums = np.concatenate([sums_of(arranged[first : first + 256]) for first in range(0, len(arranged), 256)])
    masks = values = None
    if pictures.masked:
        masks = np.asarray(pictures.targets)
        values = np.stack([np.bincount(mask.ravel(), minlength=256) > 0 for mask in masks])
    return Decoded(np.arange(len(arranged)), [], arranged, masks, values, sums)


def _in_threads(one: Callable[[int], bool], count: int, threads: int, progress: Callable[[int], None]) -> list[bool]:
    """``one`` of each number, in order. Threads, because Pillow decodes and resizes without holding Python's lock."""

    def piece(first: int) -> list[bool]:
        return [one(i) for i in range(first, min(first + AT_ONCE, count))]

    done: list[bool] = []
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(piece, range(0, count, AT_ONCE)):
            done += part
            progress(len(part))
    return done


def _image(pictures: Pictures, i: int) -> Image.Image:
    if isinstance(pictures.images, np.ndarray):
        return image_files.plain(Image.fromarray(pictures.images[i]))
    return image_files.opened(pictures.images[i])


def _mask(pictures: Pictures, i: int, image: Image.Image) -> Image.Image:
    if isinstance(pictures.targets, np.ndarray):
        return Image.fromarray(pictures.targets[i])
    return image_files.mask_of(pictures.targets[i], image, pictures.names[i])


class Workers:
    """Processes that decode; they start with the first work, and end with ``close`` or with this object."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, paths: Sequence[Path], form: Form) -> Future[np.ndarray]:
        """Start to decode; the result is (n, channels, height, width) uint8."""
        if self._pool is None:
            context = forking.context(image_worker.__name__)  # NOTE: no forks of this process: threads of torch may hold locks
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=image_worker.start)
        return self._pool.submit(image_worker.decode, paths, form)

    def close(self) -> None:
        """End the processes; later work starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


class LazyImages:
    """Image files as ``examples.Inputs``, decoded when they are asked for; the bits don't depend on the workers."""

    def __init__(self, files: Sequence[Path], form: Form, workers: Workers) -> None:
        self.files = files
        self.form = form
        self.workers = workers
        self._ahead: deque[dict[int, tuple[Future[np.ndarray], int]]] = deque(maxlen=AHEAD)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    def __len__(self) -> int:
        return len(self.files)

    def prefetch(self, ids: np.ndarray) -> None:
        """Start to decode what will be taken soon, in any portions; the latest few calls count. Without workers: nothing."""
        if self.workers.count:
            if len(self._ahead) == AHEAD:
                for future, _ in self._ahead.popleft().values():
                    future.cancel()
            self._ahead.append(self._submit(ids))

    def take(self, ids: np.ndarray) -> Tensor:
        """(len(ids), channels, height, width) uint8.

        Raises:
            InputError: a file has changed since it was looked at first, and can't be read.
            RunError: a worker was killed.
        """
        images = np.empty((len(ids), *self.shape), np.uint8)
        if not self.workers.count:
            for row, i in enumerate(ids):
                images[row] = image_files.decode(self.files[i], self.form)
            return torch.from_numpy(images)
        prefetched = ChainMap(*self._ahead)
        found = self._submit(np.array([i for i in ids.tolist() if i not in prefetched], dtype=np.int64))
        for row, i in enumerate(ids.tolist()):
            future, place = found.get(i) or prefetched[i]
            with _death_told(self.workers):
                images[row] = future.result()[place]
        return torch.from_numpy(images)

    def close(self) -> None:
        """End the workers."""
        self._ahead.clear()
        self.workers.close()

    def _submit(self, ids: np.ndarray) -> dict[int, tuple[Future[np.ndarray], int]]:
        """For each id the work that decodes it, and its row there."""
        pieces = max(-(-len(ids) // AT_ONCE), min(len(ids), self.workers.count))
        started: dict[int, tuple[Future[np.ndarray], int]] = {}
        for piece in np.array_split(ids, pieces) if pieces else ():
            with _death_told(self.workers):
                future = self.workers.submit([self.files[i] for i in piece], self.form)
            started |= {i: (future, place) for place, i in enumerate(piece.tolist())}
        return started


@contextmanager
def _death_told(workers: Workers) -> Iterator[None]:
    """A RunError in words where a worker was killed."""
    try:
        yield
    except BrokenProcessPool:
        workers.close()
        raise RunError(
            "a process that decodes images was ended, perhaps for want of memory; set data.workers to 0. (A script of your own "
            "must begin its work below if __name__ == '__main__':)"
        ) from None
