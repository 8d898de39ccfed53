"""Measuring the CPU, briefly, and keeping what was measured."""

import dataclasses
import itertools
import json
import math
import time

import pytest
import torch

from trainwright.plan import calibrate, composed, this_cpu
from trainwright.plan.devices import Curves, find
from trainwright.plan.timing import estimate
from trainwright.plan.work import Work

WAYS = ("forward", "backward")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "SIZES", {"float32": [16, 64], "bfloat16": [16, 64], "float16": [32]})
        patch.setattr(calibrate, "BYTES", [2**12, 2**16])
        patch.setattr(calibrate, "LENGTHS", [16, 64])
        patch.setattr(calibrate, "CONVOLUTIONS", ((4, 8), (8, 8)))
        patch.setattr(calibrate, "PATIENCE", 1e-4)
        patch.setattr(calibrate, "COLD", 2**17)
        patch.setattr(calibrate, "COLDER", 2**17)
        patch.setattr(calibrate, "CHAIN", 5)
        patch.setattr(composed, "ROWS", 32)
        patch.setattr(composed, "REPEATS", 2)
        yield


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = calibrate.measure()
    assert torch.equal(torch.get_rng_state(), before), "a run's random numbers go on as before"
    return found


def test_all_that_is_needed_is_measured(measured):
    assert set(measured.products) == {"float32", "bfloat16", "float16"}
    for sizes, rates in measured.products.values():
        assert [len(rates), len(rates[0]), len(rates[0][0])] == [len(sizes)] * 3
        assert all(rate > 0 and math.isfinite(rate) for plane in rates for line in plane for rate in line)
    kinds = ("elementwise", "dear", "copy", "pool", *(f"{kind}.{way}" for kind in ("attention", "convolution") for way in WAYS))
    assert {f"{kind}.{dtype}" for kind in kinds for dtype in ("float32", "bfloat16")} <= set(measured.rates)
    for sizes, rates in measured.rates.values():
        assert sizes == sorted(sizes)
        assert len(sizes) == len(rates) >= 2
        assert all(rate > 0 for rate in rates)
    assert 1e-8 < measured.overhead < 1e-3
    assert set(measured.together) <= {"float32", "bfloat16"}
    assert measured.together["float32"] > 0


def test_products_that_would_take_long_are_as_fast_as_smaller_ones(monkeypatch):
    """bfloat16 where the processor has no instructions for it: 2,048 FLOP/s here."""
    asked = []

    def seconds(dtype, m, n, k):
        asked.append((m, n, k))
        return 3 * 2 * m * n * k / (2048 if k == 1 else 1024)

    monkeypatch.setattr(calibrate, "_product", seconds)
    found = calibrate._products(torch.bfloat16, [1, 8, 64], 1.0)
    assert asked == [
        (1, 1, 1),
        (1, 1, 8),
        (1, 1, 64),
        (1, 8, 1),
        (1, 8, 8),
        (1, 64, 1),
        (8, 1, 1),
        (8, 1, 8),
        (8, 8, 1),
        (64, 1, 1),
    ]
    assert found[0][0] == [2048, 1024, 1024]
    assert found[0][1] == [2048, 1024, 1024]
    assert found[2][2] == [2048, 2048, 2048]


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setattr(calibrate, "_seconds", lambda call, *_, **__: (call(0), 2.0)[1])
    monkeypatch.setattr(calibrate, "SIZES", {"float32": [16, 32]})
    monkeypatch.setattr(calibrate, "LONG", 1000.0)
    monkeypatch.setattr(calibrate, "BYTES", [2**12])
    monkeypatch.setattr(calibrate, "LENGTHS", [16])
    monkeypatch.setattr(calibrate, "CONVOLUTIONS", ((4, 8),))
    found = calibrate.measure()
    assert found.products["float32"][1][1][0][1] == 3 * 2 * 32 * 16 * 32 / 2, "(m, n, k) in this order, three products"
    assert found.rates["elementwise.float32"] == ([2**12], [pytest.approx(2**12 / 2, rel=0.01)])
    assert found.rates["copy.bfloat16"][1] == [pytest.approx(2**12 / 2, rel=0.01)]
    small = 8 * 16 * 32 * 32 * (4 + 12 / 4)
    assert found.rates["pool.float32"] == ([small, 8 * small], [small / 2, 4 * small])
    pairs = 8 * 64 * 16 * 17 / 2
    assert found.rates["attention.forward.float32"] == ([4 * pairs], [2 * pairs])
    assert found.rates["attention.backward.float32"] == ([10 * pairs], [5 * pairs])
    flops, moved = 2 * 8 * 4 * 4 * 9 * 64, 4 * (8 * 4 * 64 * 2 + 4 * 4 * 9)
    assert found.rates["convolution.forward.float32"] == ([flops / moved], [flops / 2])
    both = 4 * (8 * 4 * 64 * 3 + 4 * 4 * 9 * 2)
    assert found.rates["convolution.backward.float32"] == ([2 * flops / both], [flops])


def test_of_two_rounds_the_faster_figure_counts():
    """Another's work only ever adds time; what the second round left out is as in the first."""
    one = Curves({"float32": ([1], [[[2.0]]]), "bfloat16": ([1], [[[1.0]]])}, {"a": ([1.0, 2.0], [3.0, 9.0])}, 0.5)
    other = Curves({"float32": ([1], [[[5.0]]])}, {"a": ([1.0, 2.0], [4.0, 8.0]), "b": ([1.0], [1.0])}, 0.4)
    found = calibrate._faster(one, other)
    assert found.products == {"float32": ([1], [[[5.0]]]), "bfloat16": ([1], [[[1.0]]])}
    assert found.rates == {"a": ([1.0, 2.0], [4.0, 9.0])}
    assert found.overhead == 0.4


def test_slow_convolutions_are_not_measured_at_each_size(monkeypatch):
    monkeypatch.setattr(calibrate, "_both", lambda call, inputs: pytest.fail("measured"))
    points = {"forward": [(1.0, 10.0)], "backward": [(1.0, 5.0)]}
    assert calibrate._as_before(points, 40.0, 80.0, 15.0) == (4.0, 16.0)
    assert calibrate._as_before(points, 40.0, 80.0, 16.0) is None
    assert calibrate._as_before({"forward": [], "backward": []}, 40.0, 80.0, 0.0) is None


def test_what_makes_a_convolutions_kernel_is_no_measurement(monkeypatch):
    """However long the first call takes, where there are instructions for the dtype."""
    asked = []
    monkeypatch.setattr(calibrate, "_both", lambda call, inputs, lasting, least: asked.append((lasting, least)) or (1e-3, 2e-3))
    dict(calibrate._convolutions({"float32": calibrate.LONG, "bfloat16": calibrate.BRIEF}))
    assert set(asked) == {(math.inf, 2), (calibrate.BRIEF, 2)}


def test_a_dtype_without_instructions_is_measured_briefly(monkeypatch):
    """It has a limit for each call, no second round and no whole step."""
    rounds = []
    once = calibrate._once
    monkeypatch.setattr(calibrate, "_soonest", lambda dtype: 5.0 if dtype is torch.bfloat16 else 1.0)
    monkeypatch.setattr(calibrate, "_once", lambda longest: rounds.append(longest) or once(longest))
    found = calibrate.measure()
    others = {"float32": calibrate.LONG, "float16": calibrate.LONG}
    assert rounds == [{**others, "bfloat16": calibrate.BRIEF}, others]
    assert found.together.keys() == {"float32"}


def test_tensors_of_one_use_share_memory():
    """What is taken in turn doesn't overlap, starts at whole cache lines, and no new pages are asked for the next time."""
    left = calibrate._copies("left", (3, 5), torch.bfloat16, 30, 100)
    assert [copy.shape for copy in left] == [(3, 5)] * 3
    starts = [copy.data_ptr() for copy in left]
    assert {later - earlier for earlier, later in itertools.pairwise(starts)} == {64}
    assert not any((start - starts[0]) % 64 for start in starts)
    assert calibrate._copies("left", (7,), torch.float32, 28, 28)[0].data_ptr() == starts[0]
    assert calibrate._copies("out", (7,), torch.float32, 28, 28)[0].data_ptr() != starts[0]
    assert torch.isfinite(torch.stack(left)).all()
    calibrate.measure()
    assert calibrate._kept == {}, "given back in the end"


def test_a_whole_step_is_held_against_its_operators(measured):
    """Of operators that are calibrated twice as fast a step takes twice as long; a step may take milliseconds."""
    step = composed.small_step(torch.float32)
    step()  # the first one also makes the optimizer's states
    device = calibrate.as_device(dataclasses.replace(measured, together={}, overhead=0.0))
    factor = composed.longer(step, 1.0, device)
    rates = {name: (sizes, [2 * rate for rate in found]) for name, (sizes, found) in measured.rates.items()}
    sizes, planes = measured.products["float32"]
    products = {"float32": (sizes, [[[2 * rate for rate in line] for line in plane] for plane in planes])}
    faster = dataclasses.replace(device, curves=Curves(products, rates, 0.0))
    assert composed.longer(step, 1.0, faster) == pytest.approx(2 * factor)
    assert composed.longer(step, 0.001, device) == pytest.approx(factor / 1000)


def test_the_faster_of_two_turns_counts_for_the_whole_step_too(monkeypatch):
    """They are some seconds apart, as those of the operators are."""
    turns = iter([4.0, 4.0, 3.0, 5.0])
    monkeypatch.setattr(calibrate, "SIZES", {"float32": [16, 64], "bfloat16": [16, 64]})
    monkeypatch.setattr(calibrate, "_soonest", lambda dtype: 1.0)
    monkeypatch.setattr(composed, "fastest", lambda step: next(turns))
    monkeypatch.setattr(composed, "longer", lambda step, seconds, device: seconds)
    assert calibrate.measure().together == {"float32": 3.0, "bfloat16": 4.0}


def test_the_step_is_that_of_gated_perceptrons():
    with composed._Counting() as counting:
        composed.small_step(torch.float32)()
    products = [work for work in counting.counts.all_works() if work.kind == "product"]
    forward = 3 * 2 * composed.ROWS * composed.WIDTH * composed.INNER
    assert sum(work.flops * work.calls for work in products) == 3 * composed.BLOCKS * forward, "and twice that backward"


def test_bytes_that_an_element_moves(monkeypatch):
    moved = {}
    monkeypatch.setattr(
        calibrate, "_bandwidth", lambda kind, dtype, to, count, each: moved.setdefault((kind, dtype), each) and 1.0
    )
    dict(calibrate._elementwise())
    assert moved == {
        ("elementwise", torch.float32): 12, ("dear", torch.float32): 8, ("copy", torch.float32): 6,
        ("elementwise", torch.bfloat16): 6, ("dear", torch.bfloat16): 4, ("copy", torch.bfloat16): 6,
    }  # fmt: skip


def test_the_quick_calls_count(monkeypatch):
    monkeypatch.setattr(calibrate, "PATIENCE", 0.04)
    waits = iter([0.03, 0.02, 0.0, *[0.02] * 9])
    assert calibrate._seconds(lambda _: time.sleep(next(waits)), lasting=1.0) < 0.01
    turns = []
    monkeypatch.setattr(calibrate, "PATIENCE", 0.0)
    calibrate._seconds(turns.append)
    assert turns == [0, 1], "what takes some time is measured once, after a first time that doesn't count"
    calibrate._seconds(turns.append, lasting=0.0)
    assert turns == [0, 1, 0], "what takes long, at its first time"


def test_our_kernel_is_measured_where_it_is_loaded():
    cpu_attention = pytest.importorskip("trainwright.models.cpu_attention")
    found = dict(calibrate._packed({"float32": math.inf, "bfloat16": math.inf}))
    assert set(found) == (
        {f"packed.{way}.{dtype}" for way in WAYS for dtype in ("float32", "bfloat16")} if cpu_attention.available() else set()
    )


def test_the_second_time_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    first = find("cpu", said.append)
    monkeypatch.setattr(calibrate, "measure", lambda: pytest.fail("measured again"))
    assert find("CPU", said.append) == first
    assert first.curves == find("cpu").curves
    assert first.name == "cpu"
    assert first.flops["float32"] == max(r for plane in first.curves.products["float32"][1] for line in plane for r in line)
    (kept,) = (tmp_path / "trainwright").glob("cpu_speed-*")
    assert json.loads(kept.read_text())["overhead"] == first.curves.overhead
    (told,) = said
    assert "measuring this CPU" in told
    assert str(kept) in told


def test_another_number_of_threads_is_measured_anew(monkeypatch, tmp_path, measured):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(calibrate, "measure", lambda: calls.append(1) or measured)
    for threads in (1, 3, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert this_cpu.cpu().units == threads
    assert len(calls) == 2


@pytest.mark.parametrize("spoiled", ["", "{}", '{"products": 1, "rates": {}, "overhead": 1}', "[1]", '{"overhead": null}'])
def test_a_spoiled_cache_is_measured_again(monkeypatch, tmp_path, measured, spoiled):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda: measured)
    file = this_cpu._file()
    file.parent.mkdir()
    file.write_text(spoiled)
    assert this_cpu.cpu().curves == measured
    assert this_cpu._read(file) == measured


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, measured):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "measure", lambda: measured)
    assert this_cpu.cpu().curves == measured


def test_a_measured_size_is_predicted_as_measured(monkeypatch, tmp_path, measured):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda: measured)
    flops = 2 * 64 * 64 * 16
    one = Work("aten.mm", "product", "bfloat16", flops, 1, (1, 64, 64, 16), "forward", 5)
    found = estimate([one], [], this_cpu.cpu())
    rate = measured.products["bfloat16"][1][1][1][0]
    together = measured.together.get("bfloat16", measured.together["float32"])
    assert found.seconds == pytest.approx(5 * (together * flops / rate + measured.overhead))
