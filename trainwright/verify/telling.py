"""In words, how a tensor differs from what it should be."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

NAMED = {Fraction(1, 2): "is half of what it should be", Fraction(2): "is twice what it should be"}
CLOSE = 0.02  # relative: so near to a multiple it is one


def missing(mine: Tensor | None, truth: Tensor | None) -> str:
    """One side has none, or one of another shape."""
    if mine is None:
        return "is missing"
    if truth is None:
        return "should not be there"
    return f"has the shape {list(mine.shape)}, not {list(truth.shape)}"


def difference(mine: Tensor, truth: Tensor) -> str:
    """Of two tensors of one shape, in float64."""
    if mine.isnan().any():
        return "has values that are not numbers"
    if not mine.any():
        return "is zero"
    size = float(truth.norm())
    if not size:
        return "should be zero"
    ratio = float((mine * truth).sum()) / size**2
    rest = float((mine - ratio * truth).norm()) / size
    if rest < CLOSE and abs(ratio - 1) > CLOSE:
        return _multiple(ratio)
    if rest < CLOSE:
        return f"is off by {float((mine - truth).norm()) / size:.1e} of its size"
    return f"differs by {float((mine - truth).norm()) / size:.1%} of its size{_place(mine, truth)}"


def _multiple(ratio: float) -> str:
    near = Fraction(ratio).limit_denominator(16)
    if near and abs(ratio - near) < CLOSE * abs(near):
        return NAMED.get(near, f"is {near} of what it should be" if near < 1 else f"is {near} times what it should be")
    return f"is {ratio:.3g} times what it should be"


def _place(mine: Tensor, truth: Tensor) -> str:
    """Which rows, where it isn't all of them."""
    if mine.ndim < 2 or len(mine) < 2:
        return ""
    per_row = (mine - truth).flatten(1).norm(dim=1)
    wrong = (per_row > CLOSE * float(truth.flatten(1).norm(dim=1).max())).nonzero().flatten().tolist()
    if not 0 < len(wrong) < len(mine):
        return ""
    shown = ", ".join(map(str, wrong[:4])) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    return f", in row{'s' * (len(wrong) > 1)} {shown} of {len(mine)}"
