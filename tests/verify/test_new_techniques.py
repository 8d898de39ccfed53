"""What takes less memory, in proofs: right as it is, alone and in pairs; wrong in ways of its own, and then named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.mutants import catalogue, recipes
from tests.mutants.trying import Trials
from tests.verify.test_judging import made
from trainwright import widened
from trainwright.memory import four_bit
from trainwright.recipe import InputError
from trainwright.verify import command, facts, four_bits, judging, proof, sane, techniques
from trainwright.verify.command import Options
from trainwright.verify.job import Job
from trainwright.verify.running import Runner
from trainwright.verify.tracing import BEGIN, END, FIRST, LAST, STATE

FOUR = {"adapt": {"method": "lora", "rank": 4, "base": "4bit"}}
AT_ONCE = {"memory__optimizer_in_backward": True, "training__clip_norm": None}
EIGHT, DISK = {"memory__optimizer_states": "8bit"}, {"memory__optimizer_offload": "disk"}
PURE, FULL = {"precision": "pure_bf16"}, {"memory__checkpointing": "full"}
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "8-bit states, on the disk": ("full", {**EIGHT, **DISK}),
    "in the backward, on the disk": ("full", {**AT_ONCE, **DISK, "training__micro_batch_size": 8}),
    "in the backward, pure bf16, 8-bit states": ("full", {**AT_ONCE, **PURE, **EIGHT, "training__micro_batch_size": 8}),
    "in the backward, of an MLP": ("mlp", {**AT_ONCE, "training__micro_batch_size": 64}),
    "streamed, checkpointed": ("lora", {"memory__frozen": "stream", **FULL}),
    "streamed, pure bf16": ("lora", {"memory__frozen": "stream", **PURE}),
    "4 bits, bf16, on the disk": ("lora", {**FOUR, **DISK, "precision": "bf16"}),
    "float16, averaged": ("full", {"precision": "fp16", "training__ema": {"decay": 0.9}}),
    "float16, 4 bits": ("lora", {"precision": "fp16", **FOUR}),
    "pure bf16, averaged": ("mlp", {**PURE, "training__ema": {"decay": 0.9}}),
}
SLOW = {"optimizer": {"name": "adamw", "learning_rate": 1e-6}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("techniques")
    recipes.prepare(place)
    return place


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as found:
        yield found


def proved(runner: Runner, folder: Path, base: str, keys: dict[str, Any]) -> proof.Verdict:
    job = command.settled(recipes.make(base, folder, keys), Options())
    known = facts.look(job)
    return proof.Prover(runner, known).compare(techniques.conditioned(job, known))


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_verified(name, runner, folder):
    verdict = proved(runner, folder, *GOOD[name])
    assert verdict.good, verdict.failed
    verdicts = {line.what: line.verdict for line in verdict.lines}
    assert verdicts["resume"] == verdicts["living gradients"] == "exact"
    assert verdicts["gradients of step 1"] in ("exact", "within")
    assert verdicts["optimizer's states"] in ("exact", "within")
    bits = [line for line in verdict.lines if line.what.startswith("bits of")]
    assert all(line.verdict == "exact" for line in bits)
    assert bool(bits) == bool(
        {"disk", "backward", "streamed", "4 bits"} & set(name.replace(",", "").split()) or "4 bits" in name
    )
    assert ("states in 8 bits" in verdicts) == ("8-bit" in name)
    assert ("stochastic rounding" in verdicts) == ("pure" in name)


def test_tables_in_fewer_bits_are_another_operation(runner, tmp_path, monkeypatch):
    """Products with parts of them may have other last digits, so bits aren't compared; all else is."""
    monkeypatch.setattr(widened, "ROWS", 50)
    keys = {"adapt": {"method": "lora", "rank": 4}, "precision": "fp32", "memory__frozen": "stream"}
    recipe = tiny.recipe(tiny.in_bfloat16(tmp_path), **keys)
    job = command.settled(recipe, Options())
    known = facts.look(job)
    assert known.narrow
    verdict = proof.Prover(runner, known).compare(techniques.conditioned(job, known))
    assert verdict.good, verdict.failed
    assert not any(line.what.startswith("bits of") for line in verdict.lines)


def test_a_rate_at_which_bfloat16_weights_need_not_move(runner, folder):
    verdict = proved(runner, folder, "full", {**PURE, **SLOW})
    assert verdict.good, verdict.failed


def test_a_model_that_is_read_from_a_file_is_reduced_into_a_file(folder):
    recipe = recipes.make("lora", folder, {"memory__frozen": "stream"})
    report = command.verify(recipe, Options(layers=1))
    assert report.verdict.good, report.verdict.failed
    assert "1 of 2 layers" in report.reduced
    assert "written to a file" in report.reduced
    assert report.techniques[0].startswith("packing")
    assert "streamed weights (memory.frozen: stream)" in report.techniques


def test_what_is_held_alike_is_said(folder):
    job = Job(recipes.make("lora", folder, {**FOUR, "precision": "fp16"}))
    notes = " ".join(command.apart(job, facts.look(job)))
    assert "the loss scale begins at 1024" in notes
    assert "what rounding to them costs isn't judged" in notes


@pytest.mark.parametrize(("keys", "words"), [(EIGHT, "optimizer_states: 8bit"), (PURE, "precision: pure_bf16")], ids=str)
def test_roundings_that_no_other_makes(keys, words, folder):
    with pytest.raises(InputError, match=rf"{words} rounds updates.*plain PyTorch loop doesn't.*without --against, or with"):
        command.verify(recipes.make("full", folder, keys), Options(against="torch", reduce=False))


def test_against_a_plain_loop(folder):
    report = command.verify(recipes.make("lora", folder, FOUR), Options(against="torch", steps=2))
    assert report.verdict.good, report.verdict.failed


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> Iterator[Trials]:
    with Trials(tmp_path_factory.mktemp("mutants"), {}) as found:
        yield found


@pytest.mark.parametrize(
    "name",
    [
        "stochastic rounding always rounds down",
        "8-bit states with the scale of a neighbour",
        "two codes of NF4 exchanged",
        "update in the backward with the rate of the step before",
    ],
)
def test_a_mutant_is_caught_and_named(name, trials):
    [result] = trials.all([catalogue.named(name)])
    assert result.healthy, "flagged without the bug"
    assert result.caught
    assert result.rightly, result


def test_nf4_by_its_paper_is_ours_to_the_bit():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    assert torch.equal(four_bits.values(), torch.tensor(four_bit.CODE))
    assert torch.equal(
        four_bits.rounded(weight), four_bit.dequantize("nf4", four_bit.quantize(weight), (48, 64), torch.float32)
    )


def rounded(folder: Path, seed: int, how: str) -> judging.Line:
    """50,000 weights of about 0.05 that move by 1e-4 in a step, rounded to bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    begin = (torch.randn(50_000, generator=draw) / 20).bfloat16()
    ends = begin.double() + 1e-4 * torch.randn(50_000, generator=draw, dtype=torch.float64)
    bits = {"chance": torch.randint(0, 2**16, (50_000,), generator=draw), "towards zero": 0, "away": 2**16 - 1}.get(how)
    near = ends.float()
    end = near.bfloat16() if bits is None else ((near.view(torch.int32) + bits) >> 16).to(torch.int16).view(torch.bfloat16)
    if how == "up":
        end = torch.where(end.double() < ends, torch.nextafter(end, torch.tensor(torch.inf).bfloat16()), end)
    run = made(folder / f"{how}{seed}", begin={"a": begin}, end={"a": end})
    truth = made(folder / f"truth{seed}", begin={"a": begin.double()}, end={"a": ends})
    [line] = sane.unbiased(run, truth)
    return line


@pytest.mark.parametrize("seed", range(8))
def test_rounding_by_chance_has_no_bias(seed, tmp_path):
    assert rounded(tmp_path, seed, "chance").verdict == "exact"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("towards zero", r"away from or towards zero: by -0"),
        ("away", r"towards zero: by \+0"),
        ("nearest", r"against the update: by -1\.0"),
        ("up", r"up or down: by \+0"),
    ],
)
def test_other_roundings_have_one(how, words, tmp_path):
    line = rounded(tmp_path, 0, how)
    assert line.verdict == "failed"
    assert re.search(words, line.why), line.why


def insane(tmp_path: Path, precision: str = "fp32", **changes: Any) -> list[judging.Line]:
    plain, truth = made(tmp_path / "plain", 1), made(tmp_path / "truth", noise=0.0)
    return sane.check(judging.Trace(**{**vars(plain), **changes}), truth, precision, eight_bits=True)


def test_a_plain_run_that_is_no_measure(tmp_path):
    assert not insane(tmp_path)
    [line] = insane(tmp_path, skipped=["", "the gradient overflowed"])
    assert line.why == "step 2 was left out (the gradient overflowed); take precision: bf16"
    [line] = insane(tmp_path, "fp16", norms=[1024.0, 900.0])
    assert (line.verdict, line.where) == ("failed", "gradient norm")
    [line] = insane(tmp_path, losses=[2.2, 1.5])
    assert line.where == "loss"
    assert not insane(tmp_path, losses=[2.02, 1.5]), "states in 8 bits move the loss"


@pytest.mark.parametrize(("noise", "verdict"), [(0.02, "within"), (0.3, "failed")])
def test_states_in_8_bits(noise, verdict, tmp_path):
    states = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = made(tmp_path / "plain", state={"a.exp_avg": states * (1 + noise), "a.step": torch.tensor(3.0)})
    truth = made(tmp_path / "truth", noise=0.0, state={"a.exp_avg": states, "a.step": torch.tensor(3.0)})
    [line] = sane.check(plain, truth, "fp32", eight_bits=True)
    assert (line.what, line.verdict, line.where) == ("states in 8 bits", verdict, "exp_avg")


def test_states_are_judged(tmp_path):
    states = {"a.exp_avg": torch.randn(8), "b.exp_avg": torch.randn(8) * 1e-9}
    wrong, noise = {**states, "a.exp_avg": states["a.exp_avg"] * 1.01}, {**states, "b.exp_avg": states["b.exp_avg"] * 1.01}
    for found, verdict in ((wrong, "failed"), (noise, "within")):
        run, plain, truth = (made(tmp_path / name, state=one) for name, one in (("r", found), ("p", states), ("t", states)))
        [line] = [line for line in judging.judge(run, plain, truth, "fp32") if line.what == "optimizer's states"]
        assert line.verdict == verdict
    assert {BEGIN, END, FIRST, LAST, STATE} == {"begin", "end", "first gradient", "last gradient", "state"}
