"""Recipes against Hugging Face Trainer and a plain PyTorch loop; each mistake made on purpose in our own run is found."""

from __future__ import annotations

import re

import pytest
import torch

from tests import small, tiny
from tests.models import test_gguf
from trainwright.losses import criteria
from trainwright.models import gguf
from trainwright.recipe import InputError, Task
from trainwright.recipe.file import parse
from trainwright.schedules import factor
from trainwright.verify import against, facts, hugging_face, plain_loop, techniques
from trainwright.verify.job import Job
from trainwright.verify.plain_losses import mean_loss
from trainwright.verify.running import Runner

TEXT = {
    "training__steps": 5, "training__batch_size": 4, "training__micro_batch_size": 1, "training__clip_norm": 0.5,
    "optimizer__weight_decay": 0.1, "parallel__data": 1,
}  # fmt: skip
LORA = {"adapt": {"method": "lora", "rank": 4, "dropout": 0.1, "scaling": "rslora"}, "schedule__warmup": 2}
MLP = {"parallel__data": 1, "training__micro_batch_size": 8, "training__ema": {"decay": 0.9}, "optimizer__weight_decay": 0.1}
RESNET = {
    "model": {"architecture": "resnet9", "options": {"stem": 4, "channels": [8, 8]}}, "parallel__data": 1,
    "training__micro_batch_size": 16, "data__augment": {"flip": 0.5}, "optimizer": {"name": "sgd", "learning_rate": 0.05},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One base and one file of data for all."""
    return tmp_path_factory.mktemp("against")


@pytest.fixture(scope="module")
def runner():
    with Runner() as made:
        yield made


def compared(recipe, kind, runner, prepare=None, steps=2):
    job = Job(recipe, steps=steps, prepare=prepare)
    known = facts.look(job)
    return against.compare(techniques.conditioned(job, known), known, runner, kind)


def lines(verdict):
    return {line.what: line for line in verdict.lines}


@pytest.mark.parametrize("kind", ["torch", "hf"])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_text_of_ragged_lengths_with_accumulation(changes, kind, place, runner):
    verdict = compared(tiny.recipe(place, **TEXT, **changes), kind, runner)
    assert verdict.good, verdict.failed
    found = lines(verdict)
    assert found["loss of step 1"].value > 0, "the other side computes by itself"
    assert found["gradients of step 1"].verdict == found["weights after step 2"].verdict == "within"
    assert found["living gradients"].verdict == "exact"
    if kind == "hf":
        assert found["saved model"].verdict == "within"
        assert found["saved model, read by transformers"].value < 1e-5
    else:
        assert found["held-out loss"].verdict == "within"
        assert "writes no such files" in found["saved model"].why


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_samples(name, tmp_path, runner):
    verdict = compared(small.recipe(tmp_path, **(MLP if name == "mlp" else RESNET)), "torch", runner)
    assert verdict.good, verdict.failed
    assert lines(verdict)["gradients of step 1"].verdict == "within"
    assert lines(verdict)["held-out loss"].value > 0
    assert ("averaged weights" in lines(verdict)) is (name == "mlp")


def test_float64_is_compared_to_its_last_digits(tmp_path, runner):
    verdict = compared(small.recipe(tmp_path, **MLP, precision="fp64"), "torch", runner)
    assert verdict.good, verdict.failed
    assert lines(verdict)["gradients of step 1"].bound == 1e-9


def test_bfloat16(place, runner):
    verdict = compared(tiny.recipe(place, **TEXT, **LORA, precision="bf16"), "hf", runner)
    assert verdict.good, verdict.failed
    assert lines(verdict)["gradients of step 1"].value > 1e-3


def off_in_float32(run):
    """As if a rounding had decided something."""
    if next(run.model.parameters()).dtype == torch.float32:
        _after(run, lambda: next(run.model.parameters()).grad.mul_(1.001))


def test_a_rounding_that_decided_something_is_no_fault(tmp_path, runner):
    verdict = compared(small.recipe(tmp_path, **MLP), "torch", runner, "tests.verify.test_against:off_in_float32")
    assert verdict.good
    assert "a rounding decided something in float32" in lines(verdict)["precision"].why


def test_several_processes(tmp_path, runner):
    recipe = small.recipe(tmp_path, **{**MLP, "parallel__data": 2, "parallel__zero": 2})
    assert compared(recipe, "torch", runner).good
    recipe = small.recipe(tmp_path, **{**MLP, "parallel__data": 2})
    broken = compared(recipe, "torch", runner, "tests.verify.test_against:halve_gradients")
    assert any(line.what == "gradients of step 1" and "half" in line.why for line in broken.failed)


@pytest.fixture(scope="module")
def gguf_recipe(place):
    """A base that llama.cpp would have written."""
    (place / "gguf").mkdir()
    sizes = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    test_gguf.write(place / "gguf" / "model.gguf", test_gguf.llama(**sizes))
    tiny.recipe(place)
    base = {"model__pretrained": str(place / "gguf" / "model.gguf"), "model__tokenizer": str(place / "base")}
    return tiny.recipe(place, **TEXT, **base)


def test_a_gguf_base_is_read_by_transformers(gguf_recipe, runner, monkeypatch):
    assert compared(gguf_recipe, "hf", runner).good
    monkeypatch.setattr(gguf, "deinterleaved", lambda weight, heads: weight)
    with Runner() as fresh:
        verdict = compared(gguf_recipe, "torch", fresh)
    start = lines(verdict)["weights before step 1"]
    assert start.verdict == "failed"
    assert all("q_proj" in name or "k_proj" in name for name in start.tensors)


def halve_gradients(run):
    """As if two ranks' gradients were averaged once too often."""
    _after(run, lambda: [p.grad.mul_(0.5) for p in run.model.parameters() if p.grad is not None])


def _after(run, change):
    forward_backward = run.forward_backward

    def changed(batches):
        loss = forward_backward(batches)
        change()
        return loss

    run.forward_backward = changed


def mean_of_means(run):
    """Each micro-batch's mean counts alike, however many labels it has."""
    forward_backward = run.forward_backward

    def changed(batches):
        total = 0.0
        for batch in batches:
            total = total + forward_backward([batch]) / len(batches)
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad /= len(batches)
        return total

    run.forward_backward = changed


def double_scale(run):
    for module in run.model.modules():
        if hasattr(module, "lora_A"):
            module.scale *= 2


def no_clip(run):
    run.clip = lambda: torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])


def decay_everything(run):
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.1


def next_rate(run):
    rate = run.factor
    run.factor = lambda step: rate(step + 1)


def labels_at_their_tokens(run):
    batch = run.batch

    def changed(step):
        found = batch(step)
        for one in found:
            one.labels.copy_(one.labels.roll(1, 1))
        return found

    run.batch = changed


def random_b(run):
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if name.endswith("lora_B"):
                p.fill_(0.01)


def saves_halves(run):
    save = run.save

    def changed(folder):
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(0.5)
        save(folder)
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(2)

    run.save = changed


def fast_statistics(run):
    for module in run.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5


def no_average(run):
    run.extra._section = run.extra._section.model_copy(update={"warmup": False})


BROKEN = [
    ("hf", LORA, mean_of_means, "gradients of step 1"),
    ("torch", {}, mean_of_means, "loss of step 1"),
    ("torch", LORA, double_scale, "gradients of step 1"),
    ("torch", {}, no_clip, "weights after step 2"),
    ("torch", {}, next_rate, "learning rate"),
    ("torch", {}, labels_at_their_tokens, "rows of the data"),
    ("torch", LORA, random_b, "weights before step 1"),
    ("hf", {}, saves_halves, "saved model, read by transformers"),
    ("torch", {"samples": MLP}, halve_gradients, "gradient norm"),
    ("torch", {"samples": MLP}, decay_everything, "weights after step 2"),
    ("torch", {"samples": MLP}, no_average, "averaged weights"),
    ("torch", {"samples": RESNET}, fast_statistics, "weights after step 2"),
]


@pytest.mark.parametrize(("kind", "changes", "prepare", "what"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_run_is_found(kind, changes, prepare, what, place, runner, tmp_path):
    recipe = small.recipe(tmp_path, **changes["samples"]) if "samples" in changes else tiny.recipe(place, **TEXT, **changes)
    verdict = compared(recipe, kind, runner, f"tests.verify.test_against:{prepare.__name__}")
    assert what in {line.what for line in verdict.failed}


def test_plain_names():
    assert plain_loop.plain_name("base_model.model.a.lora_B.default.weight") == "a.lora_B"
    assert plain_loop.plain_name("base_model.model.a.base_layer.weight") == "a.weight"


CLASSES = Task("classes", 3, ("a", "b", "c"))
LOSSES = [
    ({"name": "cross_entropy", "label_smoothing": 0.1, "z_loss": 0.01}, CLASSES),
    ({"name": "cross_entropy", "weights": [1.0, 2.0, 0.5], "z_loss": 0.01}, CLASSES),
    ({"name": "cross_entropy", "weights": "balanced"}, CLASSES),
    ({"name": "cross_entropy", "ignore_index": 1, "z_loss": 0.01}, Task("classes", 3, ("a", "b", "c"), ignored=1)),
    ({"name": "focal", "weights": "balanced", "gamma": 1.5}, CLASSES),
    ({"name": "bce", "pos_weight": "balanced", "label_smoothing": 0.1}, Task("binary", 1, ("no", "yes"))),
    ({"name": "mse"}, Task("values", 2)),
    ({"name": "l1"}, Task("values", 2)),
    ({"name": "huber", "delta": 0.3}, Task("values", 2)),
    ({"name": "sum", "terms": [{"loss": {"name": "mse"}, "weight": 2.0}, {"loss": {"name": "l1"}}]}, Task("values", 2)),
]


@pytest.mark.parametrize(("section", "task"), LOSSES, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_losses_written_anew_are_ours(section, task):
    loss = parse({**small.mapping(small.Path("x")), "loss": section}).loss
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(20, task.outputs, generator=random, dtype=torch.float64)
    classes = torch.randint(len(task.labels) or 2, (20,), generator=random)
    targets = torch.randn(20, 2, generator=random, dtype=torch.float64) if task.kind == "values" else classes
    ours = criteria.make(loss, task, targets)
    expected = (ours.sums(outputs, targets) / ours.counts(targets)).sum()
    torch.testing.assert_close(mean_loss(loss, len(task.labels), targets)(outputs, targets), expected)
    assert expected > 0


@pytest.mark.parametrize("warmup", [0, 2, 0.3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_rates_written_anew_are_ours(name, warmup):
    section = {"name": name, "warmup": warmup, **({} if name == "constant" else {"final": 0.1})}
    recipe = parse({**small.mapping(small.Path("x")), "schedule": section})
    ours, theirs = factor(recipe.schedule, 10), plain_loop.rates(recipe, 10)
    assert [theirs(step) for step in range(10)] == pytest.approx([ours(step) for step in range(10)], rel=1e-14)


REFUSED = [
    ("hf", {"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing: 0.1, but Trainer takes the mean of each micro-batch's"),
    ("hf", {"loss": {"z_loss": 0.1}}, "loss.z_loss: 0.1, but Trainer has none; use --against torch"),
    ("torch", {"schedule": {"name": "exponential"}}, "schedule.name: exponential isn't written anew in the external twin"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_what_has_no_twin_is_refused(kind, changes, message, place, runner):
    with pytest.raises(InputError, match=re.escape(message)):
        compared(tiny.recipe(place, **TEXT, **changes), kind, runner)


def test_trainer_has_no_samples(tmp_path, runner):
    with pytest.raises(InputError, match=r"data\.kind: images, for which Trainer has neither model nor data; use --against"):
        compared(small.recipe(tmp_path, **MLP), "hf", runner)


def test_extras_that_are_missing(monkeypatch):
    hugging_face.needs("torch", "peft")
    monkeypatch.setattr(hugging_face.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--against: accelerate and peft must be there for this recipe; install with: pip"):
        hugging_face.needs("accelerate", "peft")


@pytest.mark.parametrize("name", ["Bag", "Packed"])
def test_a_users_module_has_no_twin_in_transformers(name, place, runner):
    own = {"model": {"architecture": f"tests.userland:{name}", "tokenizer": str(place / "base")}}
    recipe = tiny.recipe(place, **{**TEXT, **own, "data__packing": name == "Packed"})
    with pytest.raises(InputError, match=rf"model\.architecture: transformers has no tests\.userland:{name}; use"):
        compared(recipe, "hf", runner)
    verdict = compared(recipe, "torch", runner)
    assert verdict.good, verdict.failed
