"""The final model as files, in the format of its method: a Hugging Face folder, a PEFT adapter, or a delta."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainwright.adapt import lora
from trainwright.adapt import partial as partial_tuning
from trainwright.built import Built
from trainwright.models import pretrained
from trainwright.models.folder import swap, write_json, write_weights
from trainwright.parallel import exchange
from trainwright.pieces import Held
from trainwright.recipe import Adapt, Lora, Partial, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_BYTES = 5 * 10**9
Stream = Iterable[tuple[str, Tensor | None]]


@dataclass(frozen=True)
class Beside:
    """What stands beside the tensors: config.json, the tokenizer, and other text files by name."""

    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def save_model(recipe: Recipe, built: Built, beside: Beside, held: Mapping[str, Held], folder: Path) -> None:
    """Write the model in the format of its method, at once or not at all. Every process calls it; the first one writes.

    Args:
        held: what this process has of the model.
    """
    chosen = {name: one for name, one in held.items() if _belongs(name, recipe.adapt, built.division.plain)}
    with exchange.collecting(chosen, built.device) as (blank, stream):
        if built.mesh.rank == 0:
            _write(recipe, built, beside, blank, stream, folder)


def _write(recipe: Recipe, built: Built, beside: Beside, blank: Mapping[str, Tensor], stream: Stream, folder: Path) -> None:
    section = recipe.adapt
    if not isinstance(section, Lora | Partial) and not beside.files:
        pretrained.save_folder(folder, blank, beside.config, beside.tokenizer, stream=stream)
        return
    base = {"base": recipe.model.pretrained or "", "base_hash": pretrained.fingerprint(built.source) if built.source else ""}
    with replacing(folder) as temporary:
        for name, text in beside.files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if isinstance(section, Lora):
            lora.save(dict(_values(stream)), section, temporary, **base)
        elif isinstance(section, Partial):
            partial_tuning.save(dict(_values(stream)), section, temporary, **base)
        else:
            write_json(temporary / "config.json", beside.config)
            write_weights(temporary, blank, SHARD_BYTES, stream)


def _belongs(name: str, section: Adapt, trained: Collection[str]) -> bool:
    """Whether a tensor is saved by the method."""
    if isinstance(section, Lora):
        return lora.is_factor(name)
    return not isinstance(section, Partial) or name in trained


def _values(stream: Stream) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        assert tensor is not None, "the first process gets every tensor"
        yield name, tensor


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the plain model's names, adapters merged into the weights they adapt."""
    state = {name: value for name, value in model.state_dict().items() if not lora.is_factor(name)}
    return {**state, **lora.merged_weights(model)}


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends well, and else vanishes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it the owner's alone
        swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
