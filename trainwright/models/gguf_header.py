"""The metadata and tensor table of a GGUF file; whatever is wrong with a file becomes an InputError."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from trainwright.recipe import InputError

LONG = 1024  # metadata arrays above this are vocabularies
DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error)


class Header(GGUFReader):
    """gguf's reader that steps over the vocabulary, which it would read in seconds, one array object per token."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack("<IQ", self.data[orig_offs : orig_offs + 12].tobytes())
        if count <= LONG:
            return super()._get_field_parts(orig_offs, raw_type)
        return self._skipped(orig_offs + 12, GGUFValueType(kind), count) - orig_offs, [], [], [GGUFValueType.ARRAY]

    def _skipped(self, offset: int, kind: GGUFValueType, count: int) -> int:
        """The offset just behind an array of ``count`` items that starts at ``offset``."""
        if kind != GGUFValueType.STRING:
            return offset + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        data = memoryview(self.data)  # type: ignore[arg-type]  # numpy arrays are buffers
        for _ in range(count):
            offset += 8 + struct.unpack_from("<Q", data, offset)[0]
        return offset


def read_header(path: Path) -> Header:
    """The metadata and the tensor table of a GGUF file.

    Raises:
        InputError: it can't be read, isn't GGUF, or is truncated or damaged.
    """
    check_magic(path)
    try:
        with np.errstate(over="ignore"):
            reader = Header(path, "c")  # copy on write: torch warns of arrays that can't be written
    except DAMAGE as error:
        if "GGMLQuantizationType" in str(error):
            raise InputError(f"{path}: a quantisation unknown to gguf ({error}); use F16, Q8_0 or Q4_K") from None
        raise InputError(f"{path}: the file is truncated or damaged; download or copy it again") from None
    return reader


def check_magic(path: Path) -> None:
    """Refuse what isn't GGUF by its first eight bytes: magic and version."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    if start[:4] == b"vers":  # "version https://git-lfs.github.com/spec/v1"
        raise InputError(f"{path}: only a Git LFS pointer; fetch the file itself with git lfs pull")
    if start[:4] != b"GGUF" or len(start) < 8:
        raise InputError(f"{path}: not a GGUF file (it starts with {start[:4]!r})")
    version = struct.unpack("<I", start[4:])[0]
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} or big-endian; convert it to version 3, little-endian")
