"""Jobs of several processes may begin before they are asked for; equal jobs run once."""

from __future__ import annotations

import threading

import pytest

from tests import small
from trainwright.recipe import InputError
from trainwright.verify import tracing
from trainwright.verify.job import Job
from trainwright.verify.running import Runner


class _Watched(Runner):
    """Tells what ran, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[int, bool]] = []
        self.began, self.gate = threading.Event(), threading.Event()

    def alone(self, job, folder):
        self.ran.append((1, threading.current_thread() is threading.main_thread()))
        super().alone(job, folder)

    def together(self, pool, job, folder):
        self.began.set()
        self.gate.wait()
        self.ran.append((pool.count, threading.current_thread() is threading.main_thread()))
        super().together(pool, job, folder)


@pytest.fixture
def two(tmp_path) -> Job:
    return Job(small.recipe(tmp_path, parallel={"data": 2}), steps=2)


def test_a_job_that_began_goes_on_while_others_run_and_runs_once(two):
    with _Watched() as runner:
        runner.begin(two)
        assert runner.began.wait(60), "before anyone asks for it"
        runner.run(two.with_keys({"parallel.data": 1}))
        assert runner.ran == [(1, True)]
        runner.gate.set()
        first, again = runner.run(two), runner.run(two)
        runner.begin(two)
        assert first is again
        assert runner.ran == [(1, True), (2, False)]
        assert first.tensors(tracing.END)


def test_what_a_job_in_the_background_raises_is_raised_by_run(two):
    with _Watched() as runner:
        runner.gate.set()
        wrong = two.with_keys({"training.batch_size": 3})  # of which two processes can't have as much
        runner.begin(wrong)
        for _ in range(2):
            with pytest.raises(InputError):
                runner.run(wrong)


def test_jobs_that_nobody_asks_for_are_left(two):
    with _Watched() as runner:
        runner.gate.set()
        for steps in (2, 3, 4):
            runner.begin(two.but(steps=steps))
    assert len(runner.ran) < 3
