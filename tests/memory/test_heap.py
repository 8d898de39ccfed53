"""The allocator of large CPU tensors: nothing overlaps, nothing more is held than the peak, and no bit of a run changes."""

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from tests import small
from trainwright import build, loop
from trainwright.memory import heap

CPU = torch.device("cpu")
LARGE = 256 * 2**10
PAGE = 4096
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the heap is for Linux")


@pytest.fixture(autouse=True)
def in_use() -> None:
    change = heap.use("auto", CPU)
    assert change is not None
    assert "holds no more" in change.summary


def block(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40 * LARGE // 16)), min_size=1, max_size=60))
def test_blocks_keep_their_values_and_no_more_is_held_than_the_peak(asked):
    """Six places, each given a new tensor again and again; by turns small ones, which the C library keeps."""
    held: dict[int, torch.Tensor] = {}
    before = heap.count()
    for number, (place, size) in enumerate(asked):
        held[place] = block(size, number % 251)
        found = heap.count()
        assert found.live - before.live == sum(-len(x) // PAGE * -PAGE for x in held.values() if len(x) >= LARGE)
        assert found.live + found.waiting <= found.peak
        values = {place: int(x[0]) for place, x in held.items()}
        assert all(bool((x == values[place]).all()) for place, x in held.items())
        assert values[place] == number % 251
        assert all(x.data_ptr() % 64 == 0 for x in held.values())
    held.clear()
    assert heap.count().live == before.live


def test_what_repeats_takes_nothing_more():
    sizes = [3 * LARGE, 17 * LARGE, LARGE, 9 * LARGE + 1, 2 * LARGE]

    def step() -> None:
        kept = [block(size) for size in sizes]
        del kept[1]
        kept += [block(7 * LARGE), block(5 * LARGE)]

    for _ in range(4):
        step()
    before = heap.count()
    step()
    assert heap.count() == before


def test_a_block_grows_where_none_is_large_enough():
    """In a process where nothing else waits: of the larger block only a half is new."""
    code = """
import torch
from trainwright.memory import heap
heap.use("auto", torch.device("cpu"))
first = torch.ones(2**22, dtype=torch.uint8)
del first
second = torch.full((2**23,), 3, dtype=torch.uint8)
assert second[0] == second[-1] == 3
print(*heap.count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heap.Count(*map(int, done.stdout.split())) == heap.Count(live=2**23, waiting=0, peak=2**23, taken=2**23)


def test_threads_have_blocks_of_their_own():
    wrong: list[int] = []

    def work(value: int) -> None:
        for turn in range(150):
            tensor = block(LARGE + (turn * 7919 * value) % (4 * LARGE), value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    before = heap.count().live
    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert heap.count().live == before


def test_a_tensor_may_be_freed_by_whom_did_not_make_it():
    tensors = [block(2 * LARGE) for _ in range(4)]
    before = heap.count().live
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert heap.count().live == before - 8 * LARGE


def test_storages_grow_and_are_cloned():
    tensor = block(LARGE, 5)
    tensor.untyped_storage().resize_(3 * LARGE)
    assert bool((tensor == 5).all())
    assert bool((tensor.clone() == 5).all())
    tensor.untyped_storage().resize_(0)


def test_the_profiler_sees_every_block():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        tensor = torch.empty(6 * LARGE, dtype=torch.uint8)
        del tensor
    events = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events == [6 * LARGE, -6 * LARGE]


def test_too_much_is_refused_as_before():
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate 1152921504606846976 bytes"):
        torch.empty(2**60, dtype=torch.uint8)
    assert heap.count().live + heap.count().waiting <= heap.count().peak


def test_empty_tensors():
    assert torch.empty(0).numel() == 0


def test_resident_memory_follows_the_peak():
    """A process whose tensors take turns: sizes that don't fit into each other's holes."""
    code = """
import sys, torch
from pathlib import Path
from trainwright.memory import heap
def status(field):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
heap.use(sys.argv[1], torch.device("cpu"))
torch.zeros(8).sum()
before = status("VmRSS")
kept = []
for turn in range(60):
    kept.append(torch.ones(2**18 + turn * 2**14))
    if len(kept) > 12:
        del kept[turn % 12]
print(status("VmHWM") - before, heap.count().peak)
"""
    done = subprocess.run([sys.executable, "-c", code, "auto"], capture_output=True, text=True, check=True)
    grown, peak = map(int, done.stdout.split())
    assert peak * 0.95 < grown < peak * 1.05 + 4 * 2**20


def test_a_fork_goes_on(tmp_path):
    code = """
import os, threading, torch
from trainwright.memory import heap
heap.use("auto", torch.device("cpu"))
torch.set_num_threads(1)
stop = False
def busy():
    while not stop:
        torch.empty(2**20)
thread = threading.Thread(target=busy); thread.start()
kept = torch.full((2**20,), 3.0)
for _ in range(50):
    child = os.fork()
    if child == 0:
        other = torch.full((2**20,), 4.0)
        os._exit(0 if bool((kept == 3).all()) and bool((other == 4).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True; thread.join()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def trained(tmp_path, allocator: str) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    model = {"architecture": "mlp", "options": {"hidden": [512, 512], "dropout": 0.1}}
    run = build.assemble(small.recipe(tmp_path, model=model, training__steps=4, run__allocator=allocator))
    return [step.loss for step in loop.train(run)], run.model.state_dict(), [change.technique for change in run.changes]


def test_no_bit_of_a_run_changes(tmp_path):
    """NOTE: the heap stays in use in this process; it is what the tensors hold that is compared, before and after it."""
    code = f"""
import sys, torch
sys.argv = ["", "system"]
from pathlib import Path
from tests.memory.test_heap import trained
losses, state, changes = trained(Path({str(tmp_path)!r}), "system")
from trainwright.memory import heap
assert heap.count() == heap.Count(0, 0, 0, 0) and "allocator" not in changes
from safetensors.torch import save_file
save_file({{**state, "losses": torch.tensor(losses, dtype=torch.float64)}}, {str(tmp_path / "system.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=250)
    from safetensors.torch import load_file

    expected = load_file(tmp_path / "system.safetensors")
    losses, state, changes = trained(tmp_path, "auto")
    assert "allocator" in changes
    assert losses == expected.pop("losses").tolist()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_without_a_compiler_the_systems_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(heap, "_begun", heap._begun.__wrapped__)
    change = heap.use("auto", CPU)
    assert change is not None
    assert change.summary.startswith("the system's: ")
    assert "/nonexistent" in change.summary


@pytest.mark.parametrize(("wished", "device"), [("system", "cpu"), ("auto", "meta"), ("auto", "cuda")])
def test_it_is_for_the_cpu_alone(wished, device):
    assert heap.use(wished, torch.device(device)) is None
