"""What a person reads: all parts with their sums, the peak in the timeline, what a step waits for."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trainwright.plan import show
from trainwright.plan.devices import find
from trainwright.plan.pareto import Choice
from trainwright.plan.report import PARTS, Memory, Plan
from trainwright.plan.timing import estimate
from trainwright.plan.work import Message, Work

MIB = 2**20
PARTS_OF_IT = dict(zip(PARTS, (400, 200, 800, 500, 90, 58), strict=True))
TIMELINE = [("forward", (300 + 10 * i) * MIB) for i in range(50)] + [("backward", (2048 - 20 * i) * MIB) for i in range(50)]
TIMELINE += [("optimizer", 1500 * MIB)]


def plan(**changes):
    works = [
        Work("aten.mm", "product", "bfloat16", 2 * 4096**3, 6 * 4096**2, (1, 4096, 4096, 4096), "forward", 10),
        Work("fused", "elementwise", "bfloat16", 1, 10**9, (1,), "backward", 10),
    ]
    messages = [Message("all_reduce", 10**9, 8, 1, 1, True), Message("all_gather", 10**8, 8, 1, 1, False)]
    memory = Memory(2048 * MIB, {name: part * MIB for name, part in PARTS_OF_IT.items()}, "layers.3.mlp", "backward", TIMELINE)
    return Plan(
        **{"memory": memory, "works": works, "messages": messages, "timing": estimate(works, messages, find("h100")), **changes}
    )


def printed(function, *args, width=140):
    out = Console(file=io.StringIO(), width=width)
    function(*args, console=out)
    return out.file.getvalue()


def test_memory_by_part_and_over_the_step():
    text = printed(show.show, plan())
    assert "peak 2.00 GiB: backward in layers.3.mlp" in text
    for name, part in PARTS_OF_IT.items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert f"{part:.2f} MiB" in line
        assert f"{part / 2048:.1%}" in line
        assert line.count("█") == pytest.approx(40 * part / 2048, abs=1)
    rows = [line for line in text.splitlines() if "█" in line]
    assert max(line.count("█") for line in rows) == 40, "the peak is the longest bar"
    assert [word for word in ("forward", "backward", "optimizer") if text.count(f" {word} ") or f"\n{word}" in text]


def test_time_by_phase_and_bound():
    found = plan()
    text = printed(show.show, found)
    assert f"a step takes {show.seconds(found.timing.seconds)}; what binds: memory bandwidth" in text
    assert "messages that nothing hides" in text
    assert "waiting in the pipeline" not in text
    assert f"messages: {show.size(found.timing.sent)} sent in" in text
    kinds = next(line for line in text.splitlines() if line.startswith("operators: "))
    assert kinds.index("elementwise") < kinds.index("product"), "the longest first"
    assert "TFLOP/s" in text
    alone = plan(messages=[], timing=estimate(found.works, [], find("h100")))
    assert "messages" not in printed(show.show, alone)


def test_what_it_could_not_know_is_said():
    text = printed(show.show, plan(notes=["an [odd] note"], unknown={"mine.op": 1200}, idle=["memory.every: 2"]))
    assert "note: an [odd] note" in text
    assert "operators whose cost isn't known: mine.op (1,200 calls)" in text
    assert "without effect here: memory.every: 2" in text


def test_a_budget_is_compared():
    assert "peak 2.00 GiB, 200% of the budget of 1.00 GiB" in printed(show.show, plan(), 1024 * MIB)
    assert "peak 2.00 GiB, 50% of the budget of 4.00 GiB" in printed(show.show, plan(), 4096 * MIB)


def test_nothing_at_all_is_no_error():
    nothing = Plan(Memory(0, {}, "", "forward", []), [], [], estimate([], [], find("h100")))
    assert "peak 0 B: forward" in printed(show.show, nothing)
    assert nothing.as_json()["flops"] == 0


def test_parts_of_another_name_are_shown_too():
    memory = Memory(10, {"parameters": 4, "the rest": 6}, "", "loss", [])
    assert "the rest" in printed(show.show, plan(memory=memory))


timelines = st.lists(st.tuples(st.sampled_from(["forward", "backward", "optimizer"]), st.integers(0, 100)), max_size=60)


@given(timelines, st.integers(1, 30))
def test_a_thinned_timeline_keeps_the_peak_and_all_moments(timeline, rows):
    found = show.thinned(timeline, rows)

    def moments(line):
        return [name for place, (name, _) in enumerate(line) if place == 0 or line[place - 1][0] != name]

    assert moments(found) == moments(timeline)
    assert len(found) <= rows + len(moments(timeline))
    assert max((live for _, live in found), default=0) == max((live for _, live in timeline), default=0)
    if len(timeline) <= rows:
        assert found == timeline


def test_the_front_as_a_table():
    one = Choice({"precision": "bf16", "zero": "3"}, 3 * 2**30, 0.5, 12_345.6, "bf16", True, "[slow]")
    other = Choice({"precision": "bf16", "zero": "0"}, 5 * 2**30, 0.25, 24_000.0, "bf16", False)
    text = printed(show.show_front, [one, other], 40, "tokens", 4 * 2**30)
    assert "2 of 40 combinations" in text
    assert "the budget is 4.00 GiB" in text
    assert "all of them: precision bf16" in text
    first, second = (line for line in text.splitlines() if "GiB  " in line)
    assert first.split() == ["3.00", "GiB", "12,346", "500", "ms", "bf16", "yes", "zero", "3", "([slow])"]
    assert second.split()[-3:] == ["no", "zero", "0"]
    alone = printed(show.show_front, [one], 1, "tokens")
    assert "precision bf16, zero 3 ([slow])" in alone


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 * 2**30, "3.00 GiB"), (2**62, "4096.00 PiB")]
)
def test_sizes(count, text):
    assert show.size(count) == text


@pytest.mark.parametrize(("value", "text"), [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (0, "0 us")])
def test_seconds(value, text):
    assert show.seconds(value) == text


def test_plain_values():
    found = plan(notes=["n"], unknown={"a": 1}, idle=["b"]).as_json()
    assert json.loads(json.dumps(found))["memory"]["parts"]["activations"] == 500 * MIB
    assert found["flops"] == 20 * 4096**3 + 10
    assert found["bytes_moved"] == 10 * (6 * 4096**2 + 10**9)
    assert found["bytes_sent"] == round(2 * 7 / 8 * 10**9 + 7 / 8 * 10**8)
    assert found["operators"] == 20
    assert (found["notes"], found["unknown"], found["idle"]) == (["n"], {"a": 1}, ["b"])
    assert found["messages"][1]["kind"] == "all_gather"
