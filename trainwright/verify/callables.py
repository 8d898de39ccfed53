"""A proof of one's own technique: two functions that return a model after some steps must return the same model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from trainwright.recipe import InputError
from trainwright.verify import judging
from trainwright.verify.judging import FACTOR, FLOOR, Line, Rule
from trainwright.verify.proof import Verdict

Maker = Callable[[], nn.Module]
Precision = Literal["fp32", "bf16", "fp64"]
ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp64": 2.0**-53}
WRAPPERS = ("_orig_mod.", "module.")


@dataclass(frozen=True)
class Growth(Rule):
    """A bound without a float64 run.

    A sum of n rounded products is off by about sqrt(n) roundings of unit u, whatever its order (Higham and Mary 2019), and both
    models round. With n the longest side of any parameter,

        bound = 2 x factor x max(least, u sqrt(n))

    relative to the 2-norm of what is compared; factor and least are those of ``judging``.
    """

    longest: int = 1

    def bound(self, plain: float) -> float:
        return 2 * FACTOR[self.precision] * max(FLOOR[self.precision], ROUNDOFF[self.precision] * math.sqrt(self.longest))

    @property
    def why(self) -> str:
        return f"{self.precision} error growth of sums of {self.longest} terms; a precise run would give a narrower bound"


def prove(
    plain: Maker, technique: Maker, *, precise: Maker | None = None, start: Maker | None = None, precision: Precision = "fp32"
) -> Verdict:
    """Compare what a technique makes of a model with what plain training makes of it.

    Each function starts from the same weights, takes the same k steps on the same data, and returns the model. Compared are, by
    their names, all parameters, all buffers, and the gradients, where both models still have those of the last step.

    Args:
        plain: without the technique.
        technique: with it.
        precise: plain, in float64. What it gives is the truth then, and ``plain``'s distance from it the measure of the bound;
            without it the bound is ``Growth``'s, and ``plain`` is the truth.
        start: the model before the first step. With it, the distances of parameters are relative to how far they moved.
        precision: that of plain and technique.

    Returns:
        The lines, each with its distance and bound. A model of which nothing shows that it learned is a failure, too.

    Raises:
        InputError: a function returns no module, both return the same one, or one in a wrapper.
    """
    if precision not in ROUNDOFF:
        raise InputError(f"precision: found {precision!r}; give one of {', '.join(ROUNDOFF)}")
    models = {"plain": _made(plain, "plain"), "technique": _made(technique, "technique")}
    if precise is not None:
        models["precise"] = _made(precise, "precise")
    _check_apart(models)
    begin = _values(_made(start, "start")) if start else None
    truth = models.get("precise", models["plain"])
    rule = Rule(precision) if precise else Growth(precision, _longest(truth))
    sides = (models["technique"], models["plain"], truth)
    lines = [_weights(sides, rule, begin), _buffers(sides, rule), _gradients(sides, rule), _alive(sides, begin)]
    if any(line.verdict == "failed" for line in lines) and (fault := _restless(plain, models["plain"], rule)):
        lines.append(fault)
    return Verdict(tuple(lines))


def _made(function: Maker, name: str) -> nn.Module:
    model = function()
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}: it returned {type(model).__name__}; return the nn.Module after its steps")
    if not list(model.parameters()):
        raise InputError(f"{name}: the model that it returned has no parameters, so nothing can be compared")
    return model


def _check_apart(models: Mapping[str, nn.Module]) -> None:
    """No two are one, and none is in a wrapper."""
    plain = dict(models["plain"].named_parameters())
    for name, model in models.items():
        if name != "plain" and any(p is plain.get(n) for n, p in model.named_parameters()):
            raise InputError(f"{name}: it returned plain's own parameters; begin with a copy.deepcopy of the first model")
        wrapper = _wrapper(model)
        if wrapper and wrapper != _wrapper(models["plain"]):
            raise InputError(f"{name}: every name begins with {wrapper}; return what is inside of that wrapper")


def _wrapper(model: nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    return next((wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in names)), "")


def _whole(tensor: Tensor) -> Tensor:
    """A DTensor as the whole that its parts make."""
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather else tensor).detach().cpu()


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p).clone() for name, p in model.named_parameters()}


def _longest(model: nn.Module) -> int:
    return max((max(p.shape, default=1) for p in model.parameters()), default=1)


Sides = tuple[nn.Module, nn.Module, nn.Module]  # technique, plain, truth


def _weights(sides: Sides, rule: Rule, begin: Mapping[str, Tensor] | None) -> Line:
    mine, plain, truth = (_values(model) for model in sides)
    scales = None if begin is None else {name: _moved(value, begin.get(name)) for name, value in truth.items()}
    return judging._tensors("parameters", mine, plain, truth, rule, scales)


def _moved(end: Tensor, begin: Tensor | None) -> float:
    """How far; at least a rounding of the size, and all of it where nothing is known of its start."""
    size = float(end.double().norm())
    if begin is None or begin.shape != end.shape:
        return size
    distance = float((end.double() - begin.double()).norm())
    return max(distance, size * ROUNDOFF["fp32"]) if distance else size


def _buffers(sides: Sides, rule: Rule) -> Line:
    mine, plain, truth = ({name: _whole(b) for name, b in model.named_buffers()} for model in sides)
    return judging._tensors("buffers", mine, plain, truth, rule)


def _left(model: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _gradients(sides: Sides, rule: Rule) -> Line:
    mine, plain, truth = (_left(model) for model in sides)
    if not mine or not truth:
        return Line("gradients of the last step", "skipped", why="not both models have any; leave out the last zero_grad()")
    return judging._tensors("gradients of the last step", mine, plain, truth, rule)


def _alive(sides: Sides, begin: Mapping[str, Tensor] | None) -> Line:
    """Two dead models agree, and prove nothing."""
    what = "living models"
    for name, model in zip(("technique", "plain"), sides[:2], strict=True):
        left = _left(model)
        if begin is None and not left:
            why = f"nothing shows that {name} learned: leave the gradients of the last step, or pass start"
            return Line(what, "failed", where=name, why=why)
        dead = [n for n, gradient in left.items() if not gradient.any()]
        if dead:
            why = f"{name}: the gradient of {dead[0]} is zero"
            return Line(what, "failed", where=dead[0], why=why, tensors=tuple(dead))
        if begin is None:
            continue
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        ends = _values(model)
        still = [n for n in learning if n in begin and bool((ends[n].double() == begin[n].double()).all())]
        if still or not learning:
            why = f"{name}: {still[0]} didn't move" if still else f"{name}: nothing learns, every parameter is frozen"
            return Line(what, "failed", where=(still or [name])[0], why=why, tensors=tuple(still))
    moved = "gradients are not zero" if begin is None else "what learns has moved"
    return Line(what, "exact", why=f"{moved}, in both models")


def _restless(plain: Maker, first: nn.Module, rule: Rule) -> Line | None:
    """A plain run that isn't the same twice is no measure; looked at only where something failed."""
    second = _made(plain, "plain")
    if any(p is q for p, q in zip(first.parameters(), second.parameters(), strict=False)):
        return None
    truth = _values(first)
    line = judging._tensors("plain, run twice", _values(second), truth, truth, rule)
    if line.verdict != "failed":
        return None
    why = f"plain doesn't return the same twice ({line.why}): seed the weights and the data in each function"
    return Line(line.what, "failed", line.value, line.bound, line.where, why, line.tensors)
