"""Filling a model from stored weights: every name is matched, or named in the report or in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.pieces import Piece, local
from trainwright.recipe import InputError, nearest

DtypeRule = Callable[[str], torch.dtype] | torch.dtype | None
# Names that wrappers leave in state dicts: torch.compile, DistributedDataParallel, FSDP, checkpoint_wrapper.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OUTER_WRAPPER = "module"
# Old transformers stored the rotary frequencies; they follow from the config.
DERIVED = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
COUNTER = "num_batches_tracked"  # of BatchNorm; files of before PyTorch 0.4.1 have none
SHOWN = 5  # names listed before 'and N more'


class Weights(Protocol):
    """Stored tensors that are read one at a time."""

    shown: str

    def names(self) -> list[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the stored numbers, without reading them."""

    def load(self, name: str, dtype: torch.dtype | None = None, piece: Piece | None = None) -> Tensor:
        """A new CPU tensor in ``dtype``, by default the stored one: all of it, or one box."""


@dataclass(frozen=True)
class LoadReport:
    """What came of each name. ``new`` and ``reshaped`` ones are as they were, for the caller to initialise."""

    shown: str
    matched: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    notes: tuple[str, ...] = field(default=())

    @property
    def uninitialized(self) -> set[str]:
        """The model's names that still need values; of tied names the first one."""
        return {*self.new, *self.reshaped}

    def describe(self) -> str:
        """Lines for people: how many names matched, and every one that didn't."""
        total = len(self.matched) + len(self.uninitialized)
        lines = [f"{len(self.matched)} of {total} parameters and buffers come from {self.shown}"]
        lines += [f"new, to be initialised: {name}" for name in self.new]
        lines += [
            f"another shape, to be initialised: {name} is {list(stored)} in the file, {list(wanted)} in the model"
            for name, (stored, wanted) in self.reshaped.items()
        ]
        lines += [f"in the file but not in the model, left out: {name}" for name in self.unused]
        return "\n".join([*lines, *self.notes])


@dataclass
class Slot:
    """A parameter or buffer, its names in the model (several if it is tied), and the stored names that mean it.

    ``known``: what the plain model calls it; ``piece``: which box of the plain model's tensor it is, if not all.
    """

    names: list[str]
    tensor: Tensor
    stored: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    piece: Piece | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the plain model."""
        return self.piece.shape if self.piece else tuple(self.tensor.shape)

    def box(self) -> Piece | None:
        """What of the plain model's tensor this process holds the values of; None for all."""
        if not isinstance(self.tensor, DTensor):
            return self.piece
        box = self.piece or Piece.all_of(self.shape)
        [chunk] = self.tensor.__create_chunk_list__()
        for dim, (first, count) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            box = box.narrow(dim, first, count)
        return box


def load_into(
    model: nn.Module,
    weights: Weights,
    *,
    match: Literal["exact", "overlap"] = "exact",
    dtype: DtypeRule = None,
    device: torch.device | str = "cpu",
    ignore: Callable[[str], bool] = lambda name: False,
    pieces: Mapping[str, Piece] = MappingProxyType({}),
    aliases: Mapping[str, str] = MappingProxyType({}),
    absent: Callable[[str], bool] = lambda name: False,
    instead: Mapping[str, Callable[[Weights, str], None]] = MappingProxyType({}),
) -> LoadReport:
    """Give the model's parameters and persistent buffers the stored values, one at a time: memory holds one copy.

    The model may live on the meta device; parameters are replaced, so make optimizers and wrappers afterwards. Tied
    parameters stay tied. ``dtype`` (one, or a function of the name) applies to floating-point tensors; None keeps the
    model's own. Names that ``ignore`` accepts are not the file's (an adapter's) and are left alone. With ``overlap``,
    what the file lacks or has in another shape stays as it is, perhaps on the meta device, for the caller to fill.

    A DTensor's own part must be allocated; it is filled in place, in its dtype, and no other part is read.

    Args:
        pieces: the model's names whose tensors are boxes of the plain model's; the others are whole.
        aliases: the model's names that the plain model has another one for (a copy of a tied embedding).
        absent: which of the plain model's names other processes hold; the file's values for them are not for this one.
        instead: the model's names whose values aren't loaded, and what is called with the weights and the stored name.

    Raises:
        InputError: ``exact``: any name or shape that doesn't match, all of them named; but BatchNorm's counters may be missing.
            ``overlap``: nothing matches. Both: stored values that contradict the model's tying, or that are quantised.
    """
    slots = [slot for slot in slots_of(model, pieces, aliases) if not ignore(slot.name)]
    report = compare(slots, weights, never_stored(model), absent)
    check(report, match)
    matched = set(report.matched)
    with single_threaded():
        for slot in slots:
            if slot.name in matched and slot.name in instead:
                instead[slot.name](weights, slot.stored[0])
            elif slot.name in matched:
                place(model, slot, read(slot, weights, dtype_of(slot, dtype)), device)
    return report


def compare(slots: list[Slot], weights: Weights, notes: list[str], absent: Callable[[str], bool]) -> LoadReport:
    """What will come of each name; fills the slots' ``stored``."""
    unused, more = assign(slots, weights.names(), weights.shown, absent)
    matched, new, reshaped = [], [], {}
    for slot in slots:
        if not slot.stored:
            new.append(slot.name)
        elif (stored := weights.shape(slot.stored[0])) != slot.shape:
            reshaped[slot.name] = (stored, slot.shape)
        else:
            matched.append(slot.name)
    return LoadReport(weights.shown, tuple(matched), tuple(new), tuple(unused), reshaped, (*more, *notes))


def slots_of(
    model: nn.Module,
    pieces: Mapping[str, Piece] = MappingProxyType({}),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> list[Slot]:
    """The model's parameters and persistent buffers in their order, each once."""
    slots: dict[int, Slot] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        slot = slots.setdefault(id(tensor), Slot([], tensor))
        slot.names.append(name)
        slot.known += [name, aliases[name]] if name in aliases else [name]
        slot.piece = slot.piece or pieces.get(name)
        assert slot.piece is None or slot.piece.size == tuple(tensor.shape), f"{name}: {list(tensor.shape)} as {slot.piece}"
    return list(slots.values())


def never_stored(model: nn.Module) -> list[str]:
    """A note for each buffer on the meta device that state dicts leave out: the caller has to compute it."""
    stored = model.state_dict(keep_vars=True)
    names = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]
    return [f"never stored, still without values: {name}" for name in names]


def assign(
    slots: Iterable[Slot], stored: Iterable[str], shown: str, absent: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Note in each slot the stored names that mean it; returns those that mean none, and what people should know.

    Names of what other processes hold are neither.

    Raises:
        InputError: two stored names mean the same one of the model.
    """
    known = {name: slot for slot in slots for name in slot.known}
    unused: list[str] = []
    notes: list[str] = []
    renamed: list[str] = []
    taken: dict[str, str] = {}
    for name in stored:
        target = next((candidate for candidate in meanings(name) if candidate in known), None)
        if target is None:
            if name.endswith(DERIVED):
                notes.append(f"left out because it follows from the config: {name}")
            elif not any(absent(candidate) for candidate in meanings(name)):
                unused.append(name)
            continue
        if target in taken:
            raise InputError(f"{shown}: {taken[target]!r} and {name!r} both mean {target!r}; keep one of them")
        taken[target] = name
        known[target].stored.append(name)
        if name != target:
            renamed.append(f"{name} -> {target}")
    if renamed:
        notes.append(f"{len(renamed)} names differ by a wrapper's prefix, as {renamed[0]}")
    return unused, notes


def meanings(name: str) -> Iterator[str]:
    """What a stored name may be called in the model: itself, without wrappers, or in a language model's body."""
    yield name
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    yield ".".join(parts)
    while parts and parts[0] == OUTER_WRAPPER:
        parts = parts[1:]
    yield ".".join(parts)
    yield ".".join(["model", *parts])


def check(report: LoadReport, match: Literal["exact", "overlap"]) -> None:
    """Raise the InputError that the mode asks for, with every fault."""
    if match == "overlap":
        if not report.matched:
            raise InputError(
                f"{report.shown}: nothing matches the model; its names look like {listed(report.unused[:1])}, "
                f"the model's like {listed(sorted(report.uninitialized)[:1])}"
            )
        return
    faults = [
        f"{name} is {list(stored)} in the file but {list(wanted)} in the model"
        for name, (stored, wanted) in report.reshaped.items()
    ]
    if missing := [name for name in report.new if name.rpartition(".")[2] != COUNTER]:
        hint = tied_hint(report) or nearest(missing[0], report.unused)
        faults.append(f"missing in the file: {listed(missing)}{hint}")
    if report.unused:
        faults.append(f"not in the model: {listed(report.unused)}")
    if faults:
        advice = "model.match: overlap copies what fits and initialises the rest"
        raise InputError("\n  ".join([f"{report.shown} doesn't fit the model:", *faults, advice]))


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def tied_hint(report: LoadReport) -> str:
    return " (head tied to the embedding? set tie_word_embeddings: true)" if report.new == ("lm_head.weight",) else ""


def dtype_of(slot: Slot, rule: DtypeRule) -> torch.dtype:
    if rule is None or isinstance(slot.tensor, DTensor) or not slot.tensor.is_floating_point():
        return slot.tensor.dtype
    return rule if isinstance(rule, torch.dtype) else rule(slot.name)


def read(slot: Slot, weights: Weights, dtype: torch.dtype) -> Tensor:
    """The slot's values in ``dtype``, those that this process holds.

    Raises:
        InputError: integers for a floating-point parameter (quantised without saying so), or tied names that differ.
    """
    first, *others = slot.stored
    stored, wanted = weights.dtype(first), slot.tensor.dtype
    if stored.is_floating_point != wanted.is_floating_point:
        raise InputError(f"{weights.shown}: {first} is stored as {stored}, the model has {wanted}; take unquantised weights")
    box = slot.box()
    for other in others:
        if not torch.equal(load(weights, first, box), load(weights, other, box)):
            raise InputError(
                f"{weights.shown}: {first} and {other} differ, but the model ties them; set tie_word_embeddings: false"
            )
    return load(weights, first, box, dtype)


def load(weights: Weights, name: str, box: Piece | None, dtype: torch.dtype | None = None) -> Tensor:
    """One box of a stored tensor; weights that nobody divides needn't know of boxes."""
    return weights.load(name, dtype) if box is None else weights.load(name, dtype, box)


def place(model: nn.Module, slot: Slot, value: Tensor, device: torch.device | str) -> None:
    """Put one tensor under all of the slot's names; of a DTensor, whose wrapper knows it, change the numbers only."""
    if isinstance(slot.tensor, DTensor):
        assert not slot.tensor.is_meta, f"{slot.name}: its part has no memory yet"
        local(slot.tensor).copy_(value)
        return
    value = value.to(device)
    if isinstance(slot.tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=slot.tensor.requires_grad)
    for name in slot.names:  # the same object under each: what was tied stays tied
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)


def blank(model: nn.Module) -> set[str]:
    """The parameters and persistent buffers that have no values yet, being on the meta device; of tied names the first."""
    return {slot.name for slot in slots_of(model) if slot.tensor.is_meta}


def allocate(model: nn.Module, device: torch.device | str) -> set[str]:
    """Memory for the parameters and persistent buffers still on the meta device; their names, of tied ones the first.

    DTensors are left alone: only what made them (``fully_shard``) knows how their parts lie in memory.
    Floating-point ones are NaN until the caller gives them values: what is forgotten must not look like a weight.
    """
    unmade = [slot for slot in slots_of(model) if slot.tensor.is_meta and not isinstance(slot.tensor, DTensor)]
    for slot in unmade:
        filler = torch.nan if slot.tensor.is_floating_point() else 0
        place(model, slot, torch.full(slot.tensor.shape, filler, dtype=slot.tensor.dtype, device=device), device)
    return {slot.name for slot in unmade}


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for torch: on a busy machine, waking others for short copies takes longer than the copies."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
