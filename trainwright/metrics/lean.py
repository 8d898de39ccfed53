"""torchmetrics in a tenth of a second rather than in several: without packages that only others of its metrics need."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

UNNEEDED = {"matplotlib", "scipy", "torchvision", "transformers"}  # for metrics of pictures, speech and language, and to draw


@contextmanager
def lean() -> Iterator[None]:
    """While torchmetrics is imported in here, it takes ``UNNEEDED`` for not installed.

    NOTE: it imports all its metrics at once, and with them whatever these could use. Only the importer keeps what it got in
    here: who imports torchmetrics elsewhere gets all of it.
    """
    if "torchmetrics" in sys.modules:
        yield
        return
    from lightning_utilities.core import imports  # where torchmetrics asks what there is

    there = imports.RequirementCache.__bool__

    def needed(asked: imports.RequirementCache) -> bool:
        return _name(asked.requirement or asked.module or "") not in UNNEEDED and there(asked)

    def available(package: str) -> bool:
        return _name(package) not in UNNEEDED and installed(package)

    installed = imports.package_available
    with (
        mock.patch.object(imports.RequirementCache, "__bool__", needed),
        mock.patch.object(imports, "package_available", available),
    ):
        yield
    for module in [module for module in sys.modules if _name(module) == "torchmetrics"]:
        del sys.modules[module]


def _name(requirement: str) -> str:
    """Of the package: 'transformers>=4.4' is about transformers."""
    return re.split(r"[^\w-]", requirement)[0]
