"""The final model as files, in the format of its method: a Hugging Face folder, a PEFT adapter, or a delta."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainwright.adapt import lora
from trainwright.adapt import partial as partial_tuning
from trainwright.models import pretrained
from trainwright.models.folder import swap, write_json, write_weights
from trainwright.recipe import Lora, Partial, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_BYTES = 5 * 10**9


def save_model(
    recipe: Recipe,
    model: nn.Module,
    config: dict[str, Any],
    source: pretrained.Source | None,
    tokenizer: PreTrainedTokenizerFast | None,
    folder: Path,
    files: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the model in the format of its method, at once or not at all.

    Args:
        config: what config.json says.
        files: other text files of the folder, by name.
    """
    section = recipe.adapt
    if not isinstance(section, Lora | Partial) and not files:
        pretrained.save_folder(folder, plain_tensors(model), config, tokenizer)
        return
    base, base_hash = recipe.model.pretrained or "", pretrained.fingerprint(source) if source else ""
    with replacing(folder) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if isinstance(section, Lora):
            lora.save(model, section, temporary, base=base, base_hash=base_hash)
        elif isinstance(section, Partial):
            partial_tuning.save(model, section, temporary, base=base, base_hash=base_hash)
        else:
            save_plain(model, config, temporary)


def save_plain(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """model.safetensors and config.json of a model that isn't a decoder."""
    write_json(folder / "config.json", config)
    write_weights(folder, plain_tensors(model), SHARD_BYTES)


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
