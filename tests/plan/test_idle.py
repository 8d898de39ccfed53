"""Options without effect: each rule by a recipe to which it applies, and one to which it doesn't."""

from types import SimpleNamespace

import pytest
import torch

from trainwright import schedules
from trainwright.losses import criteria
from trainwright.plan import idle
from trainwright.recipe import Task
from trainwright.recipe.file import parse

TEXT = {"model": {"pretrained": "folder"}, "data": {"source": "pairs.jsonl"}, "training": {"steps": 10}}
IMAGES = {"model": {"architecture": "cnn"}, "data": {"kind": "images", "source": "folder"}, "training": {"steps": 10}}
STEPS = {"training.steps": 10}
EVALUATED = {"evaluation.every": 2, "evaluation.stop": {"metric": "loss", "direction": "minimize", "patience": 5}}
# The recipe, what makes a key idle, the key, and what of it lets it have its effect.
CASES = [
    (TEXT, {"model": {"options": {"hidden_size": 8}, "tokenizer": "x", "match": "overlap"}}, "model.match",
     {"model.pretrained": "folder"}),
    (TEXT, {"model.init": {"linear": "orthogonal"}}, "model.init", {"model.match": "overlap"}),
    (IMAGES, {"model.init": {"nonlinearity": "tanh"}}, "model.init.nonlinearity", {"model.init.conv": "xavier_normal"}),
    (TEXT, {"adapt": {"method": "lora", "rank": 1, "scaling": "rslora"}}, "adapt.scaling", {"adapt.rank": 2}),
    (IMAGES, {"loss": {"name": "cross_entropy", "weights": [2.0, 2.0]}}, "loss.weights", {"data.augment": {"mixup": 0.2}}),
    (IMAGES, {"data.workers": 2, "data.source": "digits"}, "data.workers", {"data.source": "folder"}),
    (IMAGES, {"data.workers": 2, "data.in_memory": "yes"}, "data.workers", {"data.in_memory": "no"}),
    (IMAGES, {"data.in_memory": "no", "data.source": "a.npz"}, "data.in_memory", {"data.source": "folder"}),
    (IMAGES, {"data.unreadable": "skip", "data.source": "digits"}, "data.unreadable", {"data.source": "folder"}),
    (TEXT, {"data.supervise": "all", "data.source": "a.txt"}, "data.supervise", {"data.source": "a.jsonl"}),
    (TEXT, {"optimizer": {"learning_rate": 0.5, "groups": [{"match": ["a"], "learning_rate": 0.1},
                                                            {"match": ["*"], "learning_rate": 0.2}]}},
     "optimizer.learning_rate", {"optimizer.groups": [{"match": ["a"]}, {"match": ["*"], "learning_rate": 0.2}]}),
    (TEXT, {"optimizer": {"weight_decay": 0.5, "groups": [{"match": ["*"], "weight_decay": 0.2}]}}, "optimizer.weight_decay",
     {"optimizer.groups": [{"match": ["a*"], "weight_decay": 0.2}]}),
    (TEXT, {"schedule": {"name": "cosine_restarts", "cycles": 1, "growth": 2.0}}, "schedule.growth", {"schedule.cycles": 2}),
    (TEXT, {"schedule": {"name": "linear", "final": 1.0}}, "schedule.final", {"schedule.final": 0.5}),
    (TEXT, {"schedule": {"name": "linear", "warmup": 0.04}}, "schedule.warmup", {"training.steps": 100}),
    (TEXT, {"parallel": {"pipeline": 2, "schedule": "gpipe"}}, "parallel.schedule", {"parallel.schedule": "interleaved"}),
    (TEXT, {"memory.optimizer_offload": "cpu"}, "memory.optimizer_offload", {"memory.optimizer_offload": "disk"}),
    (TEXT, {"training.micro_batch_size": 8}, "training.micro_batch_size", None),
    (TEXT, {"data.held_out": None, "evaluation.before": False}, "evaluation.before", {"data.held_out": 0.1}),
    (TEXT, {"data.held_out": None, "evaluation.samples": 3}, "evaluation.samples", {"data.held_out": 0.1}),
    (TEXT, {"evaluation.every": 10}, "evaluation.every", {"evaluation.every": 9}),
    (TEXT, {"training": {"epochs": 1.0}, "evaluation.every": "epoch"}, "evaluation.every", {"training.epochs": 2.0}),
    (TEXT, EVALUATED, "evaluation.stop", {"training.steps": 11}),
    (TEXT, {"checkpoint.every": 10}, "checkpoint.every", {"checkpoint.every": 9}),
    (TEXT, {"checkpoint": {"every": None, "keep": 5}}, "checkpoint.keep", {"checkpoint.every": 3}),
]  # fmt: skip


def made(base, *changes):
    mapping = {key: dict(value) for key, value in base.items()}
    for key, value in (pair for change in changes for pair in change.items()):
        *path, last = key.split(".")
        section = mapping
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return parse(mapping)


def told(recipe, micro_batches=1):
    found = idle.options(recipe, SimpleNamespace(micro_batches=micro_batches), on_cpu=True)
    return {line.partition(":")[0]: line for line in found}


@pytest.mark.parametrize(("base", "idles", "key", "wakes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_without_effect_is_told_and_only_then(base, idles, key, wakes):
    lines = told(made(base, idles))
    assert key in lines
    assert "; " in lines[key]
    assert key not in (told(made(base, idles, wakes)) if wakes else told(made(base, idles), micro_batches=2))


def test_there_is_a_case_for_each_rule():
    assert {rule.key for rule in idle.RULES} == {key for *_, key, _ in CASES}


def test_what_a_recipe_does_not_say_is_not_told():
    assert told(made(TEXT)) == told(made(IMAGES, {"data.source": "digits"})) == {}


def test_an_accelerators_states_do_go_to_the_cpu():
    recipe = made(TEXT, {"memory.optimizer_offload": "cpu"})
    assert idle.options(recipe, SimpleNamespace(micro_batches=1)) == []


def test_what_the_rules_say_of_other_modules_is_so():
    level = made(TEXT, {"schedule": {"name": "linear", "final": 1.0}}).schedule
    constant = made(TEXT, {"schedule": {"name": "constant"}}).schedule
    assert [schedules.factor(level, 50)(step) for step in range(50)] == [schedules.factor(constant, 50)(s) for s in range(50)]
    short = made(TEXT, {"schedule": {"name": "linear", "warmup": 0.04}}).schedule
    assert schedules.factor(short, 10)(0) == 1
    logits, targets, losses = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0]), []
    for weights in (None, [3.0, 3.0]):
        section = made(IMAGES, {"loss": {"name": "cross_entropy", "weights": weights}}).loss
        loss = criteria.make(section, Task("classes", 2, ("a", "b")), targets)
        losses.append(loss.sums(logits, targets) / loss.counts(targets))
    torch.testing.assert_close(*losses)
