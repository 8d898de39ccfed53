"""Safetensors files tensor by tensor: the library's own writer wants all of a file's tensors in memory at once.

The format (github.com/huggingface/safetensors): the header's length as 8 bytes, the header as JSON, padded with spaces to a
multiple of 8, then the numbers of all tensors, little-endian and without gaps, those of wider dtypes first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# In the order of the library, by the width of their alignment: its files put the last ones first.
KINDS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


def save_file(
    files: Mapping[Path, list[str]], table: Mapping[str, Tensor], stream: Iterable[tuple[str, Tensor | None]]
) -> None:
    """Write tensors into files as they come; one is in memory at a time.

    Args:
        files: the names that each file holds.
        table: shape and dtype by name (tensors, also on the meta device).
        stream: all of them with their values, on any device, best in the order of the files.
    """
    places: dict[str, tuple[Path, int]] = {}
    for path, names in files.items():
        places |= {name: (path, offset) for name, offset in _begin(path, {name: table[name] for name in names}).items()}
    for name, tensor in stream:
        assert tensor is not None, f"{name}: only rank 0 gets what is to be written"
        _write(*places.pop(name), name, tensor, table[name])
        del tensor  # else it would live until the next one is there
    assert not places, f"{', '.join(places)} never came"


def _begin(path: Path, table: Mapping[str, Tensor]) -> dict[str, int]:
    """Write the header; where the bytes of each tensor begin."""
    order = list(KINDS)
    for name, tensor in table.items():
        if tensor.dtype not in KINDS:
            raise TypeError(f"safetensors can't hold {tensor.dtype}, the dtype of {name}")
    names = sorted(table, key=lambda name: (-order.index(table[name].dtype), name.encode()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in names:
        tensor = table[name]
        offsets[name], end = end, end + tensor.nbytes
        kind, shape = KINDS[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _write(path: Path, offset: int, name: str, tensor: Tensor, expected: Tensor) -> None:
    assert not tensor.is_meta, f"{name}: weights not gathered"
    found, wanted = (tensor.dtype, tensor.shape), (expected.dtype, expected.shape)
    assert found == wanted, f"{name}: {found} came, {wanted} was announced"
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(numbers(tensor))


def offsets(path: Path) -> dict[str, int]:
    """Where the bytes of each tensor begin in a whole file, from its start."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def numbers(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, in its own memory if they lie on the CPU without gaps."""
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data
