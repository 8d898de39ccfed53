"""Images that need no download of ours: scikit-learn's digits, their strokes as masks, and where Debian keeps Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from trainwright.data.pictures import Pictures
from trainwright.recipe import InputError

NAMES = ("digits", "digit-strokes", "fashion-mnist")
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
STROKES_SIDE = 32
NOISE_SEED = 20


def digits() -> Pictures:
    """The 1797 handwritten digits of 8 x 8 pixels (Alpaydin & Kaynak 1998): 0 to 16 becomes 0 to 255."""
    images, classes = _digits()
    return Pictures(images, classes, _names("digits", len(images)), tuple(map(str, range(10))))


def digit_strokes() -> Pictures:
    """The same enlarged to 32 x 32 with noise; the mask tells the stroke (1) from the background (0)."""
    clean = np.stack([_enlarged(image) for image in _digits()[0]])
    noisy = np.clip(clean + _noise(clean.shape), 0, 255).round().astype(np.uint8)
    masks = (clean > 127).astype(np.uint8)
    return Pictures(noisy, masks, _names("digit-strokes", len(noisy)), ("background", "stroke"))


def fashion_folder() -> Path:
    """The folder with the IDX files of Fashion-MNIST (Xiao et al. 2017).

    Raises:
        InputError: the package is not installed.
    """
    if not FASHION_FOLDER.is_dir():
        raise InputError(
            f"data.source fashion-mnist: {FASHION_FOLDER} is not there; apt install dataset-fashion-mnist, "
            "or give a folder with its four IDX files as data.source"
        )
    return FASHION_FOLDER


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 and (1797,) int64."""
    from sklearn.datasets import load_digits  # not needed, and slow to import, for any other source

    found = load_digits()
    return np.round(found.images * 255 / 16).astype(np.uint8), found.target.astype(np.int64)


def _enlarged(image: np.ndarray) -> np.ndarray:
    side = (STROKES_SIDE, STROKES_SIDE)
    return np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR), dtype=np.float64)


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    """About normal, with mean 0 and deviation 25 of 255: sums of four bytes, of a stream that NumPy guarantees for good."""
    count = int(np.prod(shape))
    words = np.random.Philox(np.random.SeedSequence(NOISE_SEED)).random_raw(-(-count // 2))
    # Little-endian on every machine, so that the noise is the same everywhere.
    sums = words.astype("<u8").view(np.uint8).reshape(-1, 4).astype(np.int64).sum(1)[:count]
    return ((sums - 510) / 6).reshape(shape)


def _names(source: str, count: int) -> list[str]:
    return [f"{source}[{i}]" for i in range(count)]
