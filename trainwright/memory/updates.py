"""Updates in portions: where an optimizer's states are kept, in how many bits, and when a gradient is used up.

For a portion of the numbers the states come, as float32, to where the update is computed; there one of torch's own optimizers
updates the parameters, or float32 copies of bfloat16 ones, which are rounded back stochastically; and the states go back to
where they are kept. That fits every optimizer that looks at each number alone.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from trainwright.memory import eight_bit, rounding, stores
from trainwright.memory.eight_bit import EightBit
from trainwright.memory.portions import Entry, Place, Slice, dense, flat, lend, portions, slices, states_of, whole, worth
from trainwright.memory.stores import Make
from trainwright.memory.update_rules import check_states
from trainwright.pieces import Later
from trainwright.recipe import Memory

Groups = list[dict[str, Any]]


class Updater:
    """An optimizer for ``loop.Updates``: torch's, on portions.

    Each of ``param_groups`` has ``update``, which update it is, from 0; the chance of stochastic rounding is a function of it.

    Args:
        groups: as ``optim.parameter_groups`` gives them, with names that ``places`` knows.
        make: torch's optimizer of groups; called with stand-ins for the parameters.
        seed: the run's.

    Raises:
        InputError: the optimizer has no states for a setting to work on, or some that don't suit it; no room for them.
    """

    def __init__(
        self,
        groups: Groups,
        make: Callable[[Groups], torch.optim.Optimizer],
        places: Mapping[str, Place],
        section: Memory,
        seed: int,
    ) -> None:
        self._make, self._section, self._seed = make, section, seed
        self._device: torch.device = groups[0]["params"][0].device
        self._worker = make([{**group, "params": [self._scratch(1)]} for group in groups])
        self.param_groups: Groups = [
            {**made, "params": group["params"], "update": 0}
            for made, group in zip(self._worker.param_groups, groups, strict=True)
        ]
        self._entries = {
            p: Entry(dense(p), places[name], number, torch.promote_types(p.dtype, torch.float32))
            for number, group in enumerate(groups)
            for name, p in zip(group["names"], group["params"], strict=True)
        }
        self._allocate(self._keys(groups[0]))
        self._hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._order: Sequence[nn.Parameter] = ()
        self._finite = True

    def _scratch(self, count: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(count, device=self._device))

    @torch.no_grad()
    def _keys(self, group: dict[str, Any]) -> list[str]:
        """The names of the states that have a number for each of a parameter, seen on one of two numbers."""
        probe = self._scratch(2)
        probe.grad = torch.ones_like(probe)
        worker = self._make([{**group, "params": [probe]}])
        worker.step()
        keys = [key for key, value in worker.state[probe].items() if isinstance(value, Tensor) and value.shape == probe.shape]
        check_states(self._section, type(worker).__name__, keys)
        return keys

    def _allocate(self, keys: Sequence[str]) -> None:
        """Memory for all states, whose values come with the first update."""
        small = self._section.optimizer_states == "8bit"
        make = self._store(keys)
        codes = {signed: eight_bit.code(signed, self._device) for signed in (True, False)} if small else {}
        for entry in self._entries.values():
            for key in keys:
                if small and worth(entry):
                    entry.states[key] = EightBit(entry.count, codes[key in eight_bit.SIGNED], make)
                else:
                    entry.states[key] = make(entry.count, entry.wide)

    def _store(self, keys: Sequence[str]) -> Make:
        section, device = self._section, self._device
        if section.optimizer_offload == "disk":
            real = not isinstance(next(iter(self._entries)), FakeTensor)
            return stores.File(section.folder, len(keys) * self._room(), device, real=real).make
        home = torch.device("cpu") if section.optimizer_offload == "cpu" else device
        return stores.in_memory(home, device)

    def _room(self) -> int:
        """Bytes that one state of all parameters takes."""
        small = self._section.optimizer_states == "8bit"
        return sum(
            eight_bit.room(entry.count) if small and worth(entry) else entry.count * entry.wide.itemsize
            for entry in self._entries.values()
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update all that have a gradient."""
        ready = [entry for p, entry in self._entries.items() if p.grad is not None and entry.count]
        for number in range(len(self.param_groups)):
            mine = [entry for entry in ready if entry.group == number]
            self._update([entry for entry in mine if entry.begun])
            self._update([entry for entry in mine if not entry.begun])
        for hook in list(self._hooks.values()):
            hook(self, (), {})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for p in self._entries:
            p.grad = None

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Have ``hook(self, args, kwargs)`` called after each step."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def _update(self, entries: Sequence[Entry]) -> None:
        """Of one group; all updated before, or none."""
        cut = list(portions(entries))
        for portion, following in zip(cut, [*cut[1:], []], strict=False):
            for piece in following:
                for state in piece.entry.states.values() if piece.entry.begun else []:
                    state.hint(piece.start, piece.count)
            self._update_portion(portion)

    def _update_portion(self, portion: list[Slice]) -> None:
        group = self.param_groups[portion[0].entry.group]
        lent = [lend(piece) for piece in portion]
        if portion[0].entry.begun:
            worker = self._worker
            worker.state = defaultdict(dict, zip(lent, map(states_of, portion), strict=True))
        else:
            worker = self._make([{**group, "params": lent}])  # some optimizers begin their states here
        worker.param_groups = [{**group, "params": lent}]
        worker.step()
        for piece, scratch in zip(portion, lent, strict=True):
            found = {key: value for key, value in worker.state[scratch].items() if isinstance(value, Tensor)}
            self._take_back(piece, scratch.detach(), found, group["update"])
            if piece.last:
                entry = piece.entry
                entry.numbers = {key: value for key, value in found.items() if key not in entry.states}
                entry.begun = True
        worker.state = defaultdict(dict)

    def _take_back(self, piece: Slice, values: Tensor, states: Mapping[str, Tensor], update: int) -> None:
        """Write what became of the numbers of a slice, and of their states, to where these are kept."""
        entry = piece.entry
        if entry.wide != entry.parameter.dtype:
            chance = rounding.key_of(self._seed, update, entry.place.name)
            bits = rounding.bits_of(chance, entry.parameter, entry.place.piece, piece.start, piece.count)
            rounding.round_(piece.of(entry.flat()), values, bits)
        for key, state in entry.states.items():
            state.write(piece.start, states[key])

    def in_backward(self, order: Sequence[nn.Parameter]) -> None:
        """From now on update and free each gradient as it arrives; a step then only calls the hooks.

        Args:
            order: of the parameters in the sum of their squares.
        """
        self._order = order
        for p in order:
            p.register_post_accumulate_grad_hook(self._arrived)

    @torch.no_grad()
    def _arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        assert parameter not in self._norms, "two backwards in a step"
        norm = self._norms[parameter] = norm_of([parameter.grad])[0]
        self._finite = self._finite and _is_finite(norm)
        if self._finite and parameter.numel():
            self._update([self._entries[parameter]])
        parameter.grad = None

    def backward(self, loss: Tensor, last: bool) -> None:
        """For ``loop.accumulate``: nothing is updated by a loss that isn't finite."""
        if _is_finite(loss.detach()):
            loss.backward()

    def norm(self) -> Tensor:
        """The 2-norm of all gradients that arrived since the last call, 0-dim; one that isn't finite ended the updates."""
        norms = [self._norms[p] for p in self._order if p in self._norms]
        self._norms.clear()
        self._finite = True
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self._device)

    def kept(self, parameter: nn.Parameter) -> dict[str, Tensor | Later]:
        """Its states by their keys, in its shape; nothing before its first update."""
        entry = self._entries[parameter]
        if not entry.begun:
            return {}
        shape = tuple(parameter.shape)
        return {
            **{key: Later(shape, entry.wide, partial(whole, entry, state)) for key, state in entry.states.items()},
            **entry.numbers,
        }

    @torch.no_grad()
    def keep(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
        """Set them to what ``kept`` gave, in any precision of these settings; nothing: as before the first update."""
        entry = self._entries[parameter]
        entry.begun = bool(values) and entry.count > 0
        if not entry.begun:
            return
        for key, state in entry.states.items():
            numbers = flat(torch.empty_like(parameter, dtype=entry.wide).copy_(values[key]))
            for piece in slices(entry):
                state.write(piece.start, piece.of(numbers))
        entry.numbers = {key: value.clone() for key, value in values.items() if key not in entry.states}

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Copies of all states, by the order of the parameters."""
        kept = (self.kept(p) for p in self._entries)
        return {n: {key: _made(value).clone() for key, value in found.items()} for n, found in enumerate(kept)}

    def load_state_dict(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Set them to what ``state_dict`` gave."""
        for number, p in enumerate(self._entries):
            self.keep(p, states[number])

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The memory that states take, for who counts it; those in a file take none."""
        return {
            p: {f"{key} {i}": t for key, state in entry.states.items() for i, t in enumerate(state.tensors())} | entry.numbers
            for p, entry in self._entries.items()
        }


def norm_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each, 0-dim float32 (or float64)."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return list(torch._foreach_norm(list(gradients), 2.0, dtype=dtype))


def _made(value: Tensor | Later) -> Tensor:
    return value.make() if isinstance(value, Later) else value


def _is_finite(number: Tensor) -> bool:
    return isinstance(number, FakeTensor) or bool(number.isfinite())
