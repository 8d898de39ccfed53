"""Proofs of tests run in processes that are there at once; that of a finished run in processes as users have them."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(scope="session", autouse=True)
def _processes_at_once() -> Iterator[None]:
    from tests import ranks
    from trainwright.verify import running

    with mock.patch.object(running, "Pool", ranks.ForkedPool):
        yield
