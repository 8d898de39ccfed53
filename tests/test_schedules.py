"""Schedules against transformers' and torch's own, and against their closed forms."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.optim import lr_scheduler
from transformers import get_scheduler

from trainwright import schedules
from trainwright.recipe import InputError, Schedule

PEAK = 2.0
NAMES = ["constant", "linear", "cosine", "cosine_restarts", "step", "exponential", "one_cycle", "inverse_sqrt"]


def section(name, **keys):
    return TypeAdapter(Schedule).validate_python({"name": name, **keys})


def ours(steps, name, **keys):
    factor = schedules.factor(section(name, **keys), steps)
    return [factor(step) for step in range(steps)]


def theirs(steps, make):
    """What a scheduler of torch's makes of the rate, as a multiple of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=PEAK)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / PEAK)
        optimizer.step()
        scheduler.step()
    return rates


def transformers(name, steps, warmup, **special):
    return theirs(
        steps,
        lambda optimizer: get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=special
        ),
    )


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "keys", "called", "special"),
    [
        ("constant", {}, "constant_with_warmup", {}),
        ("linear", {}, "linear", {}),
        ("cosine", {}, "cosine", {}),
        ("cosine", {"final": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("linear", {"final": 0.1}, "polynomial", {"lr_end": 0.1 * PEAK, "power": 1.0}),
        ("cosine_restarts", {"cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_restarts", {"cycles": 1}, "cosine", {}),
        ("inverse_sqrt", {}, "inverse_sqrt", {}),
    ],
)
@pytest.mark.parametrize("steps", [37, 60])
def test_transformers(name, keys, called, special, warmup, steps):
    """From the end of the warmup at the same step; in the warmup theirs is a step behind, since it starts at zero."""
    expected = transformers(called, steps, warmup, **special)
    found = ours(steps, name, warmup=warmup, **keys)
    assert found[:warmup] == pytest.approx(expected[1 : warmup + 1])
    assert found[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)


@pytest.mark.parametrize(("first", "growth", "cycles"), [(5, 2, 3), (4, 3, 3), (7, 1, 4), (1, 2, 5)])
def test_restarts_of_torch(first, growth, cycles):
    steps = first * sum(growth**k for k in range(cycles))
    found = ours(steps, "cosine_restarts", warmup=0, cycles=cycles, growth=float(growth), final=0.1)
    expected = theirs(
        steps, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=first, T_mult=growth, eta_min=0.1 * PEAK)
    )
    assert found == pytest.approx(expected)
    assert found.count(1.0) == cycles


@pytest.mark.parametrize("length", [7, 49])
def test_restarts_begin_without_rounding(length):
    """9/11 * 77 is above 63 in floating point: that cycle would begin a step late."""
    for cycles in range(1, 60):
        found = ours(cycles * length, "cosine_restarts", warmup=0, cycles=cycles)
        assert [step for step, factor in enumerate(found) if factor == 1.0] == list(range(0, cycles * length, length))


@pytest.mark.parametrize(
    ("steps", "milestones"), [(100, [0.5, 0.75]), (100, [10, 40, 41]), (9, [0.5]), (30, [0.1, 20]), (100, [0.29, 0.57])]
)
def test_milestones_of_torch(steps, milestones):
    places = [round(m * steps) if m < 1 else m for m in milestones]
    expected = theirs(steps, lambda o: lr_scheduler.MultiStepLR(o, places, gamma=0.3))
    found = ours(steps, "step", warmup=0, milestones=[float(m) for m in milestones], factor=0.3)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 10])
def test_exponential_of_torch(warmup):
    expected = theirs(50 - warmup, lambda o: lr_scheduler.ExponentialLR(o, gamma=0.01 ** (1 / (50 - warmup))))
    assert ours(50, "exponential", warmup=warmup, final=0.01)[warmup:] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [10, 15, 100])
@pytest.mark.parametrize("warmup", [0.3, 0.25, 0.47])
def test_one_cycle_of_torch(steps, warmup):
    keys = {"max_lr": PEAK, "total_steps": steps, "pct_start": warmup, "div_factor": 25, "final_div_factor": 1e3}
    expected = theirs(steps - 1, lambda o: lr_scheduler.OneCycleLR(o, **keys, cycle_momentum=False))
    found = ours(steps, "one_cycle", warmup=warmup, start=0.04, final=4e-5)
    assert found[:-1] == pytest.approx(expected)
    assert found[-1] == pytest.approx(4e-5)


def test_one_cycle_counts_its_rise_in_steps_too():
    found = ours(10, "one_cycle", warmup=4)
    assert found == pytest.approx(ours(10, "one_cycle", warmup=0.4))
    assert found[3] == 1.0
    assert ours(10, "one_cycle", warmup=0)[0] == 1.0


def test_closed_forms():
    assert ours(9, "constant", warmup=0) == [1.0] * 9
    found = schedules.factor(section("cosine", warmup=0.2, final=0.1), 10)
    assert [found(0), found(1), found(2)] == [0.5, 1.0, 1.0]
    assert found(6) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert found(10) == pytest.approx(0.1)
    assert ours(10, "linear", warmup=0, final=0.5) == pytest.approx([1 - 0.05 * step for step in range(10)])
    assert ours(10, "exponential", warmup=2, final=0.01)[6] == pytest.approx(0.1)
    assert ours(100, "inverse_sqrt", warmup=4)[16] == 0.5
    assert ours(4, "step", milestones=[0.5, 0.75], warmup=0) == pytest.approx([1, 1, 0.1, 0.01])
    assert ours(6, "cosine_restarts", cycles=2, growth=2.0, warmup=0) == pytest.approx(
        [1, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    )


@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(8, 300),
    warmup=st.one_of(st.integers(0, 3), st.floats(0, 0.4)),
    order=st.randoms(use_true_random=False),
)
def test_any_schedule_is_a_function_of_the_step(name, steps, warmup, order):
    keys = {"cycles": 1} if name == "cosine_restarts" else {}
    factor = schedules.factor(section(name, warmup=float(warmup), **keys), steps)
    forwards = [factor(step) for step in range(steps)]
    mixed = order.sample(range(steps), steps)
    assert [factor(step) for step in mixed] == [forwards[step] for step in mixed]
    assert all(0 < value <= 1 for value in forwards)
    count = round(warmup * steps) if warmup < 1 else int(warmup)
    if name != "one_cycle":
        assert forwards[:count] == pytest.approx([(step + 1) / count for step in range(count)])
        assert forwards[max(0, count - 1)] == 1.0
        assert sorted(forwards[count:], reverse=True) == forwards[count:]
    else:
        top = forwards.index(max(forwards))
        assert forwards[: top + 1] == sorted(forwards[: top + 1])
        assert forwards[top:] == sorted(forwards[top:], reverse=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps(name, steps):
    keys = {"cycles": 1} if name == "cosine_restarts" else {}
    assert ours(steps, name, **keys)[0] > 0


@pytest.mark.parametrize(
    ("steps", "keys", "message"),
    [
        (10, {"name": "cosine", "warmup": 10}, "schedule.warmup: 10 warmup steps, but the run has only 10; make it less"),
        (10, {"name": "one_cycle", "warmup": 0.99}, "schedule.warmup: 10 warmup steps"),
        (10, {"name": "step", "milestones": [5.0, 5.0]}, "schedule.milestones: 5, 5 of 10 steps are not in ascending order"),
        (10, {"name": "step", "milestones": [0.9, 5.0]}, "schedule.milestones: 0.9, 5 of 10 steps are not in ascending order"),
        (10, {"name": "step", "milestones": [4.0, 10.0]}, "10 is never reached, since the run has only 10 steps"),
        (10, {"name": "step", "milestones": [0.2], "warmup": 3}, "0.2 lies in the warmup, which has 3 of the 10 steps"),
        (10, {"name": "cosine_restarts", "cycles": 11, "warmup": 0}, "the first of 11 cycles would be shorter than a step"),
        (10, {"name": "cosine_restarts", "cycles": 9**9, "warmup": 0}, "lower cycles or growth"),
        (10, {"name": "cosine_restarts", "cycles": 4, "growth": 1e300, "warmup": 0}, "growth is 1e+300"),
        (10, {"name": "cosine_restarts", "cycles": 4, "growth": 2.0, "warmup": 0}, "10 steps follow the warmup"),
    ],
)
def test_what_is_refused(steps, keys, message):
    with pytest.raises(InputError) as error:
        ours(steps, **keys)
    assert message in str(error.value)


def test_no_torch_is_needed():
    code = "import sys, trainwright.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
