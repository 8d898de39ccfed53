"""How all pictures look: colours, sizes, names that fit, and files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, DPI = 8.0, 150  # inches and pixels an inch: 1200 pixels
# Ten colours that colour-blind people tell apart (Petroff 2021, "Accessible Color Sequences for Data Visualization").
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
BLUE, ORANGE, RED, GREY = COLOURS[0], COLOURS[1], COLOURS[2], "#b0b0b0"
SHARES = "Blues"  # the colour map of shares from 0 to 1
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it
    "font.size": 10,
    "text.usetex": False,
    "text.parse_math": False,  # $ in the name of a class is a dollar
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """The same look whatever the user's matplotlibrc says; all drawing and saving goes on inside."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # Names in scripts that the font doesn't have are shown as boxes.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font", category=UserWarning)
        yield


def figure(title: str, height: float = 6.0) -> Figure:
    """An empty figure under a title; ``height`` in inches."""
    made = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    made.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    return made


def panels(made: Figure, count: int, columns: int, square: bool = False) -> list[Axes]:
    """``count`` axes in rows of at most ``columns``."""
    across = min(columns, count)
    grid = made.subplots(-(-count // across), across, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.set_axis_off()
    if square:
        for axes in grid[:count]:
            axes.set_box_aspect(1)
    return list(grid[:count])


def save(made: Figure, path: Path) -> Path:
    """Write a PNG atomically."""
    return whole(path, lambda temporary: made.savefig(temporary, format="png"))


def whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` make a sibling of ``path``, and put it in its place when it is complete."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def short(text: str, length: int = 24) -> str:
    """A name on one line of at most so many characters; the middle is left out, since ends tell names apart."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    if len(plain) <= length:
        return plain
    tail = (length - 1) // 2
    return f"{plain[: length - 1 - tail]}…{plain[len(plain) - tail :]}"


def key(text: str, length: int = 24) -> str:
    """The same for a legend, which leaves out what begins with an underscore."""
    name = short(text, length)
    return f" {name}" if name.startswith("_") else name


def percent(share: float) -> str:
    """'97.3%'; what isn't all is never shown as all."""
    return f"{min(share, 0.999) if share < 1 else 1.0:.1%}"


def headline(metrics: Mapping[str, float], most: int = 5) -> str:
    """'accuracy 0.973   loss 0.0881'."""
    return "   ".join(f"{short(name)} {value:.4g}" for name, value in list(metrics.items())[:most])


def image(picture: Tensor) -> np.ndarray:
    """(channels, height, width) uint8 as (height, width, 3): one channel is grey, of more than three the first three count."""
    pixels = picture.numpy()
    chosen = pixels[:3] if len(pixels) >= 3 else pixels[[0, 0, 0]]
    return np.ascontiguousarray(chosen.transpose(1, 2, 0))


def palette(classes: int) -> np.ndarray:
    """A colour for each class of a mask, (classes, 3) uint8; class 0, mostly the background, is black.

    Beyond the ten colours that are easily told apart they come again, darker each time.
    """
    colours = np.array([to_rgb(colour) for colour in COLOURS])
    index = np.arange(max(classes - 1, 0))
    shades = 0.8 ** (index // len(COLOURS))
    found = colours[index % len(COLOURS)] * shades[:, None]
    return np.rint(np.concatenate([np.zeros((1, 3)), found])[:classes] * 255).astype(np.uint8)
