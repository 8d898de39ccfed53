"""IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist): the bytes 0 0, type, number of axes; sizes; numbers."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from trainwright.recipe import InputError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read(path: Path) -> np.ndarray:
    """The array in an IDX file, gzipped or not, in the machine's byte order.

    Raises:
        InputError: not IDX, shorter or longer than its head says, or not to be read; names the file and what was found.
    """
    content = _bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        found = content[:4].hex(" ") or "nothing"
        raise InputError(
            f"{path} is not an IDX file: it must begin with 00 00, a type (08 for bytes) and the axes; found {found}"
        )
    kind, axes = np.dtype(TYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise InputError(f"{path} is truncated: its head names {axes} axes, but the file ends after {len(content)} bytes")
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected, found_bytes = math.prod(shape) * kind.itemsize, len(content) - start
    if found_bytes != expected:
        fault = "is truncated" if found_bytes < expected else "is longer than its head says"
        sizes = " x ".join(map(str, shape))
        raise InputError(f"{path} {fault}: {sizes} of {kind.itemsize} bytes are {expected} bytes, found {found_bytes}")
    return np.frombuffer(content, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged or truncated gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from None
