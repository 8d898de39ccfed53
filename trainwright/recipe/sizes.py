"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def bytes_of(text: str | int | float) -> int:
    """'24GiB', '3.5 GB' (1000**3), '450MiB', '2g' (1024**3) or a number of bytes.

    Raises:
        ValueError: it is no size.
    """
    found = _FORM.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{text!r} is no size; write it like 24GiB, 3.5GB or 450MiB")
    number, letter, binary = float(found[1]), found[2].upper(), found[3]
    decimal = letter and not binary and str(text).strip().upper().endswith("B")
    size = int(number * (1000 if decimal else 1024) ** ("KMGT".index(letter) + 1 if letter else 0))
    if not 0 < size < 10**18:
        raise ValueError(f"{text!r} is no size of a memory; write it like 24GiB")
    return size
