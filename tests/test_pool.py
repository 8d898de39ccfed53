"""Processes that stay: they answer, they tell what went wrong, and they don't outlive who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from trainwright.launch.pool import Pool, RankError
from trainwright.recipe import InputError


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as found:
        yield found


def _sum(value: float) -> tuple[int, float]:
    total = torch.tensor([value * (1 + dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def _fails(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("what went wrong")
    dist.barrier()
    return 0


def _group() -> int:
    dist.new_group([0, 1])
    return len(dist.distributed_c10d._world.pg_map)


def test_groups_of_a_job_are_gone_with_it(pool):
    assert pool.run(_group) == pool.run(_group) == [2, 2]


def _group_that_refers_to_itself() -> int:
    holder: list[object] = [dist.new_group([0, 1])]
    holder.append(holder)
    return sum("gloo" in task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir())


def test_threads_of_a_jobs_groups_are_gone_with_it(pool):
    counts = [pool.run(_group_that_refers_to_itself) for _ in range(8)]
    # A group has three; those of the one before may not have ended yet.
    assert all(later - first < 7 for first, later in zip(counts[0], counts[-1], strict=True)), counts


def _refuses() -> None:
    raise InputError("not like this")


def test_a_refusal_by_all_keeps_the_processes(pool):
    before = pool.run(_process)
    with pytest.raises(RankError, match=r"rank [01]: InputError: not like this"):
        pool.run(_refuses)
    assert pool.run(_process) == before


def _dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _process() -> int:
    return os.getpid()


def _waits() -> None:
    time.sleep(60)


def test_answers_come_in_the_order_of_ranks_from_the_same_processes(pool):
    assert pool.run(_sum, 2.0) == [(0, 6.0), (1, 6.0)]
    assert pool.run(_process) == pool.run(_process)


def test_a_failure_names_the_rank_and_the_next_job_works(pool):
    before = pool.run(_process)
    with pytest.raises(RankError, match="rank 1: ValueError: what went wrong") as caught:
        pool.run(_fails, 1)
    assert (caught.value.rank, caught.value.kind, caught.value.message) == (1, "ValueError", "what went wrong")
    assert "_fails" in caught.value.trace
    assert pool.run(_process) != before


def test_a_process_that_is_gone_or_says_nothing(pool):
    with pytest.raises(RankError, match="rank 1: Killed: the process is gone"):
        pool.run(_dies)
    pool.run(_process)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] gave no answer in 1 s"):
        pool.run(_waits, timeout=1)


SCRIPT = """
import time
from pathlib import Path
from trainwright.launch.pool import Pool
from tests.test_pool import _process, _waits
if __name__ == "__main__":
    pool = Pool(1)
    print(pool.run(_process)[0], flush=True)
    pool.run(_waits)
"""


def test_they_end_with_who_started_them(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment, command = {**os.environ, "PYTHONPATH": os.getcwd()}, [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as job:
        worker = psutil.Process(int(job.stdout.readline()))
        job.kill()
    worker.wait(timeout=30)
    assert not psutil.pid_exists(worker.pid) or worker.status() == psutil.STATUS_ZOMBIE
