"""What is to be learned, as models, losses and metrics have to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    """The targets of some data under some loss.

    kind     classes: targets (n,) int64, outputs (n, classes) logits; mixed targets are (n, classes) probabilities.
             binary: targets (n,) int64 of 0 and 1, outputs (n, 1), the logit of class 1.
             values: targets and outputs (n, outputs) float32.
    outputs  how many numbers the model gives for a sample, or for a pixel where ``dense``
    labels   names of the classes, or of the values
    ignored  the class that counts neither in the loss nor in metrics
    dense    a target for each pixel: targets (n, height, width), outputs (n, outputs, height, width); not for values
    """

    kind: Literal["classes", "binary", "values"]
    outputs: int
    labels: tuple[str, ...] = ()
    dense: bool = False
    ignored: int | None = None
