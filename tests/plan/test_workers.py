"""Jobs of several processes: what each of them made is there, and open, for all of its jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from trainwright.plan import workers


@contextmanager
def making(start: int) -> Iterator[SimpleNamespace]:
    made = SimpleNamespace(start=start, open=True)
    try:
        yield made
    finally:
        made.open = False


def asked(made: SimpleNamespace, job: int) -> tuple[int, bool, int]:
    return made.start + job, made.open, os.getpid()


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_process_made_stays_open(count):
    with workers.crew(making, (10,), count) as run:
        answers = list(run(asked, [1, 2, 3]))
    assert [answer for answer, _, _ in answers] == [11, 12, 13]
    assert all(is_open for _, is_open, _ in answers)
    assert (os.getpid() in {pid for _, _, pid in answers}) == (count == 1)
