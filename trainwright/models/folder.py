"""Hugging Face folders: reading their safetensors, one file or many, and writing folders that transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainwright.models.tensor_file import numbers, offsets, save_file
from trainwright.pieces import Piece
from trainwright.recipe import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Stream = Iterable[tuple[str, Tensor | None]]  # names with values, each once; None only at ranks that don't write
SINGLE = "model.safetensors"
ADAPTERS = ("adapter_model.safetensors", "delta.safetensors")
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that describe another file than the one written, or ask for code to be fetched and run.
DROPPED = {"torch_dtype", "quantization_config", "auto_map", "transformers_version", "_name_or_path"}
AT_ONCE = 2**26  # bytes of a tensor in memory that are read at once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FolderWeights:
    """The tensors of a folder's ``model.safetensors``, of the shards that its index names, or of one safetensors file.

    Raises:
        InputError: no weights, a missing shard, a tensor that the index promises and the shard lacks, a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.shown = str(folder)
        self._stored: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        for path, promised in weight_files(folder).items():
            entries = table(path)
            if missing := [name for name in promised or () if name not in entries]:
                raise InputError(f"{path}: has no {missing[0]!r}, but the index says so; download both again")
            self._stored |= {name: (path, *entries[name]) for name in promised or entries}

    def names(self) -> list[str]:
        """Names as they are stored."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype.

        Raises:
            InputError: a format such as 8-bit floats that needs scales to be understood.
        """
        path, _, kind = self._stored[name]
        if kind not in DTYPES:
            raise InputError(f"{path}: {name} is stored as {kind}, quantised; take the weights it was made from")
        return DTYPES[kind]

    def place(self, name: str) -> tuple[Path, int]:
        """Where the bytes of a tensor begin: a file, and the offset in it."""
        path = self._stored[name][0]
        if path not in self._offsets:
            self._offsets[path] = offsets(path)
        return path, self._offsets[path][name]

    def load(self, name: str, dtype: torch.dtype | None = None, piece: Piece | None = None) -> Tensor:
        """A new tensor in ``dtype`` (default: as stored) that shares nothing with the file; of it, only the piece is read."""
        box = piece or Piece.all_of(self.shape(name))
        assert box.shape == self.shape(name), f"{name}: {box} of {self.shape(name)}"
        out = torch.empty(box.size, dtype=dtype or self.dtype(name))
        if not box.numel:  # which safetensors can't slice
            return out
        if out.ndim == 0 or (box.whole and out.nbytes <= AT_ONCE):
            with opened(self._stored[name][0]) as file:
                return out.copy_(file.get_tensor(name))
        rows = max(1, AT_ONCE * box.size[0] // out.nbytes)
        for first in range(0, box.size[0], rows):
            part = box.narrow(0, first, min(rows, box.size[0] - first))
            # Opened anew for each part: closing unmaps the pages that were read, so that memory holds few of them twice.
            with opened(self._stored[name][0]) as file:
                out[first : first + rows].copy_(file.get_slice(name)[part.slices()])
        return out


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Each weight file of a folder with the names that the index promises; None where there is no index. A file is itself.

    Raises:
        InputError: neither file nor index, an index that can't be used, shards that are missing.
    """
    if folder.is_file():
        return {folder: None}
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: {what_is_missing(folder)}")
    promised: dict[Path, list[str]] = {}
    for name, file in read_json(folder / INDEX).get("weight_map", {}).items():
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX}: {file!r} is not a file of this folder")
        promised.setdefault(folder / file, []).append(name)
    if not promised:
        raise InputError(f"{folder / INDEX}: weight_map is missing or empty; download the index again")
    if missing := [path.name for path in promised if not path.is_file()]:
        raise InputError(f"{folder}: {len(missing)} of {len(promised)} shards are missing: {', '.join(missing)}")
    return dict(promised)


def what_is_missing(folder: Path) -> str:
    """Why a folder can't be read as a model, and what helps."""
    has = {path.name for path in folder.iterdir()}
    if has & {"adapter_config.json", "adapter_model.safetensors"}:
        return "a LoRA adapter, not a model; give its base as model.pretrained and this folder as adapt.start"
    if "delta.safetensors" in has:
        return "only the changed part of a model; give its base as model.pretrained and this folder as adapt.start"
    if any(name.endswith(".bin") for name in has):
        return (
            "holds only pickled weights (.bin), which are refused because loading them can run code; if you trust "
            "them, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
        )
    if files := sorted(name for name in has if name.endswith((".pt", ".pth"))):
        return f"no model folder; give the file itself: {files[0]}"
    wanted = [name for name in ("config.json", SINGLE) if name not in has]
    return f"no model folder; {' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} missing"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: it can't be read, or isn't a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a JSON object; download it again")
    return content


def opened(path: Path) -> Any:
    """An open safetensors file; its data is mapped, not read.

    Raises:
        InputError: it can't be read, or is truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {damage(path)} ({error})") from None


def damage(path: Path) -> str:
    """What is probably wrong with a file that isn't valid safetensors."""
    with path.open("rb") as file:
        pointer = file.read(8) == b"version "  # "version https://git-lfs.github.com/spec/v1"
    return "only a Git LFS pointer; run git lfs pull" if pointer else "truncated or damaged; download it again"


def table(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors' name of the dtype) for every tensor of a file."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def save_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast | None = None,
    shard_bytes: int = 5 * 10**9,
    stream: Stream | None = None,
) -> None:
    """Write a Llama model as a folder for ``AutoModelForCausalLM.from_pretrained``; all of it, or nothing.

    ``tensors`` have Hugging Face's names; each keeps its dtype. A tied head is not written twice. A model folder that
    exists is replaced once the new one is complete. An empty ``config`` means a user's module: only names and values.

    Args:
        stream: the tensors with their values, one in memory at a time; ``tensors`` then needs none (meta device).

    Raises:
        InputError: the folder exists and is no model; or the config ties a head that isn't equal to the embedding.
    """
    folder = Path(folder).resolve()  # a symbolic link keeps pointing to the model
    check_replaceable(folder)
    assert not config or all(tensor.numel() for tensor in tensors.values()), "weights not gathered"
    stream, kept = tensors.items() if stream is None else stream, dict(tensors)
    if config.get("tie_word_embeddings") and HEAD in tensors and EMBEDDING in tensors:
        stream, kept = without_tied_head(stream), {name: tensor for name, tensor in tensors.items() if name != HEAD}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_configs(temporary, config, kept.values())
        write_weights(temporary, kept, shard_bytes, stream)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Refuse to overwrite anything but an empty folder or a model folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give another folder to save to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds files that are no model and would be lost; give another folder to save to")


def without_tied_head(stream: Stream) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors without the head, which the config ties to the embedding; compared by hashes, for they come one by one."""
    values: set[bytes] = set()
    for name, tensor in stream:
        if name in (EMBEDDING, HEAD) and tensor is not None and not tensor.is_meta:
            values.add(hashlib.sha256(numbers(tensor)).digest())
        if len(values) > 1:
            raise InputError("the config ties head and embedding but their values differ; set tie_word_embeddings: false")
        if name != HEAD:
            yield name, tensor
        tensor = None  # else it would live until the next one is there


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int, stream: Stream | None = None) -> None:
    """One ``model.safetensors``, or numbered shards of at most ``shard_bytes`` (or one tensor) and their index.

    Args:
        stream: the tensors with their values, one in memory at a time; ``tensors`` then needs none (meta device).
    """
    shards = split(tensors, shard_bytes)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE]
    files = {folder / file: shard for file, shard in zip(names, shards, strict=True)}
    save_file(files, tensors, tensors.items() if stream is None else stream)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def split(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in their order, in portions of at most ``limit`` bytes; a larger tensor has one to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_configs(folder: Path, config: Mapping[str, Any], tensors: Iterable[Tensor]) -> None:
    """config.json, and generation_config.json with the token ids that are known."""
    # The widest dtype: transformers casts everything to this one, which must not round.
    kinds = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    plain = {key: value for key, value in config.items() if key not in DROPPED}
    plain["dtype"] = str(reduce(torch.promote_types, kinds)).removeprefix("torch.")
    if config and "architecture" not in config:  # which a model of the catalogue names, and a Llama doesn't
        plain |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    write_json(folder / "config.json", plain)
    if ids := {key: config[key] for key in IDS if config.get(key) is not None}:
        write_json(folder / "generation_config.json", ids)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def swap(temporary: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one, which comes back if that fails."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if not folder.exists():
        os.replace(temporary, folder)
        return
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
