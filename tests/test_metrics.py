"""Metrics against scikit-learn's: on random and degenerate input, over uneven batches and two processes."""

from __future__ import annotations

import datetime
import itertools
import math
import multiprocessing
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn import metrics as sk
from torch import distributed

from trainwright.metrics.language import LANGUAGE_MODEL, language_model
from trainwright.metrics.meter import CONFUSION_AXES, Meter
from trainwright.metrics.names import check, defaults
from trainwright.recipe import InputError, RunError, Task

LABELS = ("a", "b", "c", "d")
CLASSES = Task("classes", 4, LABELS)
BINARY = Task("binary", 1, ("no", "yes"))
VALUES = Task("values", 3, ("x", "y", "z"))
MASKS = Task("classes", 4, LABELS, dense=True)
BINARY_MASKS = Task("binary", 1, ("no", "yes"), dense=True)
TASKS = {"classes": CLASSES, "binary": BINARY, "values": VALUES, "masks": MASKS, "binary masks": BINARY_MASKS}
AVERAGES = [f"{name}_{average}" for name in ("precision", "recall", "f1") for average in ("macro", "micro", "weighted")]
OF_ALL = ["accuracy", "precision", "recall", "f1", "auroc", "average_precision", "iou", "dice", "perplexity", *AVERAGES]
GATHERED = ["accuracy", "f1", "auroc", "calibration_error", "perplexity", "top_2", "mae", "rmse", "r2"]  # each kind of state
STOPS = [11, 0]  # how many of 21 samples the first of two ranks has
NAMES = {
    "classes": [*OF_ALL, "calibration_error", "top_1", "top_2", "top_3"],
    "binary": [*OF_ALL, "calibration_error"],
    "values": ["mae", "rmse", "r2"],
    "masks": [*OF_ALL, "top_2"],
    "binary masks": OF_ALL,
}


def measured(task, names, outputs, targets, sizes=None):
    """Over uneven batches."""
    meter = Meter(check(names, task), task)
    sizes = sizes or [5, 1, len(targets) - 6]
    for x, y in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        meter.update(x, y)
    return meter.compute()


def draw(task, count=21, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = (3, 2) if task.dense else ()
    outputs = torch.randn(count, task.outputs, *places, generator=generator) * 2
    if task.kind == "values":
        return outputs, outputs + torch.randn(count, task.outputs, generator=generator)
    return outputs, torch.randint(0, len(task.labels), (count, *places), generator=generator)


# The oracle: scikit-learn where it has the metric, else the definition in NumPy.


def oracle(name, task, outputs, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _oracle(name, task, outputs, targets)


def _oracle(name, task, outputs, targets):
    if task.kind == "values":
        functions = {"mae": sk.mean_absolute_error, "rmse": sk.root_mean_squared_error, "r2": sk.r2_score}
        return functions[name](targets.double(), outputs.double())
    one = task.kind == "binary"
    logits = outputs.movedim(1, -1).reshape(-1, task.outputs).double()
    true, classes = targets.flatten().numpy(), np.arange(len(task.labels))
    p = (torch.cat([1 - logits.sigmoid(), logits.sigmoid()], 1) if one else logits.softmax(1)).numpy()
    found = (logits[:, 0] > 0).long().numpy() if one else logits.numpy().argmax(1)
    base, _, average = name.partition("_")
    if name.startswith("top_"):
        return sk.top_k_accuracy_score(true, logits.numpy(), k=int(average), labels=classes)
    if name == "auroc":
        if len(set(true)) < len(classes):
            return math.nan  # scikit-learn gives nan or, for a single class, an error
        return sk.roc_auc_score(true, p[:, 1]) if one else sk.roc_auc_score(true, p, multi_class="ovr", labels=classes)
    if name == "average_precision":
        return sk.average_precision_score(*((true, p[:, 1]) if one else (np.eye(len(classes))[true], p)))
    if name == "calibration_error":
        return calibration(p[:, 1], true) if one else calibration(p.max(1), found == true)
    if name == "perplexity":
        both = torch.cat([torch.zeros_like(logits), logits], 1).numpy() if one else logits.numpy()
        return math.exp(-log_softmax(both, axis=1)[np.arange(len(true)), true].mean())
    if name == "accuracy":
        return sk.accuracy_score(true, found)
    functions = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score, "dice": sk.f1_score}
    options = {"average": average or ("binary" if one else "macro"), "zero_division": 0}
    return (sk.jaccard_score if base == "iou" else functions[base])(true, found, **options)


def calibration(confidence, right):
    """Guo et al. 2017, equation 3."""
    place = np.clip(np.ceil(confidence * 15) - 1, 0, 14)
    bins = [place == b for b in range(15) if (place == b).any()]
    return sum(b.mean() * abs(right[b].mean() - confidence[b].mean()) for b in bins)


def close(found, expected):
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-6, nan_ok=True)


BINNED = ("auroc", "average_precision")  # of masks


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
@pytest.mark.parametrize("seed", [0, 1])
def test_is_scikit_learns(kind, name, seed):
    task = TASKS[kind]
    outputs, targets = draw(task, seed=seed)
    found = measured(task, [name], outputs, targets)[name]
    expected = oracle(name, task, outputs, targets)
    if task.dense and name in BINNED:
        assert found == pytest.approx(expected, abs=0.01)
    else:
        close(found, expected)
    assert expected > 0


def degenerate(task, case):
    """Targets of one class, of two out of four, or predictions of one; scores with many ties; sure ones."""
    outputs, targets = draw(task)
    if case == "first class only":
        return outputs, torch.zeros_like(targets)
    if case == "last class only":
        return outputs, torch.full_like(targets, len(task.labels) - 1)
    if case == "a class missing":
        return outputs, targets.clamp(max=len(task.labels) - 2)
    if case == "a class never predicted":
        return outputs - 1e3 * (torch.arange(task.outputs) == 0).view(-1, *[1] * (outputs.ndim - 2)), targets
    if case == "ties":
        return outputs.round(), targets
    if case == "all equal":
        return torch.zeros_like(outputs), targets
    if case == "sure":
        return outputs * 30, targets
    assert case == "within 0 and 1"
    return outputs.sigmoid(), targets


CASES = [
    "first class only", "last class only", "a class missing", "a class never predicted", "ties", "all equal", "sure",
    "within 0 and 1",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["classes", "binary", "masks", "binary masks"])
def test_degenerate_input_is_as_in_scikit_learn(kind, case):
    task = TASKS[kind]
    outputs, targets = degenerate(task, case)
    names = [name for name in NAMES[kind] if not (task.dense and name in BINNED)]
    found = measured(task, names, outputs, targets)
    close(found, {name: oracle(name, task, outputs, targets) for name in names})


@pytest.mark.parametrize("case", CASES[:3])
@pytest.mark.parametrize("kind", ["masks", "binary masks"])
def test_curves_of_masks_are_undefined_where_the_exact_ones_are(kind, case):
    outputs, targets = degenerate(TASKS[kind], case)
    found = measured(TASKS[kind], list(BINNED), outputs, targets)
    assert math.isnan(found["auroc"])
    assert found["average_precision"] == pytest.approx(oracle("average_precision", TASKS[kind], outputs, targets), abs=0.01)


@pytest.mark.parametrize("kind", TASKS)
def test_without_samples_all_is_nan(kind):
    meter = Meter(NAMES[kind], TASKS[kind])
    assert meter.compute().keys() == set(NAMES[kind])
    assert all(math.isnan(value) for value in meter.compute().values())


@pytest.mark.parametrize("kind", TASKS)
def test_it_goes_on_after_computing(kind):
    task = TASKS[kind]
    outputs, targets = draw(task)
    meter = Meter(NAMES[kind], task)
    meter.compute()
    for part in (slice(0, 4), slice(4, 21)):
        meter.update(outputs[part], targets[part])
        found = meter.compute()
    close(found, measured(task, NAMES[kind], outputs, targets, sizes=[len(targets)]))


@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_of_bf16_on_a_wider_target_type(kind):
    """Outputs of any float type, masks of bytes."""
    task = TASKS[kind]
    outputs, targets = draw(task)
    outputs = outputs.bfloat16()
    bytes_ = targets if task.kind == "values" else targets.to(torch.uint8)
    expected = measured(task, NAMES[kind], outputs.float(), targets)
    close(measured(task, NAMES[kind], outputs, bytes_), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", TASKS)
def test_outputs_that_are_not_finite_end_the_run(kind, bad):
    outputs, targets = draw(TASKS[kind])
    outputs.view(-1)[-1] = bad
    with pytest.raises(RunError, match="not finite"):
        Meter(defaults(TASKS[kind]), TASKS[kind]).update(outputs, targets)


def test_scores_are_never_taken_for_probabilities():
    """Batches whose logits all lie within 0 and 1 count as the others do."""
    outputs = torch.tensor([[0.1], [0.9], [-3.0], [3.0]])
    targets = torch.tensor([0, 1, 1, 0])
    together = measured(BINARY, NAMES["binary"], outputs, targets, sizes=[4])
    close(measured(BINARY, NAMES["binary"], outputs, targets, sizes=[2, 2]), together)
    close(together, {name: oracle(name, BINARY, outputs, targets) for name in together})


def test_the_surest_are_in_the_last_bin():
    outputs = torch.tensor([[100.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, -1.0]])  # 1 and 0.96
    found = measured(CLASSES, ["calibration_error"], outputs, torch.tensor([1, 0]), sizes=[2])
    p = outputs.double().softmax(1).max(1).values.mean().item()
    assert 2 * p - 1 > 14 / 15
    assert found["calibration_error"] == pytest.approx(p - 0.5, rel=1e-6)


@pytest.mark.parametrize("kind", ["masks", "binary masks"])
def test_curves_of_large_masks_are_taken_in_portions(kind, monkeypatch):
    outputs, targets = draw(TASKS[kind])
    whole = measured(TASKS[kind], list(BINNED), outputs, targets)
    monkeypatch.setattr("trainwright.metrics.meter.AT_ONCE", 7)
    assert measured(TASKS[kind], list(BINNED), outputs, targets) == whole


@pytest.mark.parametrize("case", ["far from 0", "tiny", "constant", "constant and hit", "one sample", "one value"])
def test_degenerate_numbers_are_as_in_scikit_learn(case):
    outputs, targets = draw(VALUES)
    task, sizes = VALUES, None
    if case == "far from 0":
        outputs, targets = outputs + 1e5, targets + 1e5
    if case == "tiny":
        outputs, targets = outputs * 1e-5, targets * 1e-5
    if case.startswith("constant"):
        targets = torch.full_like(targets, 0.1)
        outputs = targets if case == "constant and hit" else outputs
    if case == "one sample":
        outputs, targets, sizes = outputs[:1], targets[:1], [1]
    if case == "one value":
        outputs, targets, task = outputs[:, :1], targets[:, :1], Task("values", 1, ("x",))
    found = measured(task, NAMES["values"], outputs, targets, sizes)
    expected = {name: oracle(name, task, outputs, targets) for name in found}
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("kind", ["classes", "binary", "masks", "binary masks"])
def test_confusion_has_a_row_for_each_actual_class(kind):
    task = TASKS[kind]
    outputs, targets = draw(task)
    meter = Meter([], task)
    assert meter.confusion() == np.zeros((len(task.labels),) * 2).tolist()
    meter.update(outputs[:8], targets[:8])
    meter.update(outputs[8:], targets[8:])
    found = (outputs[:, 0] > 0).long() if task.outputs == 1 else outputs.argmax(1)
    expected = sk.confusion_matrix(targets.flatten(), found.flatten(), labels=range(len(task.labels)))
    assert CONFUSION_AXES == ("actual", "predicted")
    assert meter.confusion() == expected.tolist()
    assert all(isinstance(cell, int) for row in meter.confusion() for cell in row)
    assert (expected != expected.T).any()


def test_numbers_have_no_confusion():
    assert Meter(["mae"], VALUES).confusion() is None


def test_sums_are_wide():
    """Float32 would lose the second batch."""
    meter = Meter(["mae"], Task("values", 1, ("x",)))
    for value in (2.0**25, 1.0):
        meter.update(torch.full((1, 1), value), torch.zeros(1, 1))
    assert meter.compute() == {"mae": (2**25 + 1) / 2}
    shares = measured(CLASSES, ["accuracy", "f1_micro", "top_2"], torch.eye(4)[[0, 0, 0]], torch.tensor([0, 1, 3]), [1, 2])
    assert shares == {"accuracy": 1 / 3, "f1_micro": 1 / 3, "top_2": 2 / 3}


# Names


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("classes", ["accuracy", "f1"]),
        ("binary", ["accuracy", "precision", "recall", "f1", "auroc"]),
        ("values", ["mae", "rmse", "r2"]),
        ("masks", ["iou", "dice", "accuracy"]),
        ("binary masks", ["iou", "dice", "accuracy"]),
    ],
)
def test_defaults(kind, expected):
    assert defaults(TASKS[kind]) == expected
    assert check(None, TASKS[kind]) == expected
    assert check(expected, TASKS[kind]) == expected


@pytest.mark.parametrize("kind", TASKS)
def test_all_that_fit_are_taken_in_their_order_and_once(kind):
    names = NAMES[kind][::-1]
    assert check(names + names[:2], TASKS[kind]) == names
    assert check([], TASKS[kind]) == []


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("acuracy", "classes", ["'acuracy' is unknown", "(did you mean 'accuracy'?)", "4 classes: accuracy, ", "top_K"]),
        ("top5", "classes", ["'top5' is unknown", "top_5"]),
        ("f1_micr", "classes", ["'f1_micr' is unknown", "'f1_micro'"]),
        ("auroc_macro", "classes", ["'auroc_macro' is unknown"]),
        ("top_0", "classes", ["'top_0' is unknown"]),
        ("top_4", "classes", ["'top_4' needs more than 4 classes, but there are 4"]),
        ("top_2", "binary", ["'top_2' doesn't fit two classes with one output", "auroc"]),
        ("accuracy", "values", ["'accuracy' doesn't fit numbers; what fits numbers: mae, rmse, r2"]),
        ("top_5", "values", ["'top_5' doesn't fit numbers"]),
        ("mae", "classes", ["'mae' doesn't fit 4 classes"]),
        ("rms", "values", ["'rms' is unknown (did you mean 'rmse'?)"]),
        ("calibration_error", "masks", ["'calibration_error' doesn't fit masks of 4 classes", "iou"]),
    ],
)
def test_wrong_names(name, kind, words):
    with pytest.raises(InputError) as caught:
        check([name], TASKS[kind])
    found = str(caught.value)
    assert all(word in found for word in ["metrics: ", *words]), found
    assert kind in ("classes", "masks") or "top_K" not in found


# Ranks


def measure_as_rank(rank, store, answers):
    torch.set_num_threads(1)  # the parent's threads aren't here
    limit = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    found = {}
    for (kind, task), stop in itertools.product(TASKS.items(), STOPS):
        outputs, targets = draw(task)
        part = slice(0, stop) if rank == 0 else slice(stop, 21)
        meter = Meter([name for name in NAMES[kind] if name in GATHERED], task, group=distributed.group.WORLD)
        for x, y in zip(outputs[part].split(4), targets[part].split(4), strict=True):
            if len(x):
                meter.update(x, y)
        found[f"{kind} {stop}"] = [meter.compute(), meter.confusion()]
    answers.put(found)
    distributed.destroy_process_group()


def test_two_ranks_measure_what_one_does(tmp_path):
    """Forked, since importing takes longer than measuring."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=measure_as_rank, args=(rank, tmp_path / "store", answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=90) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=30)
        assert rank.exitcode == 0
    for kind, task in TASKS.items():
        outputs, targets = draw(task)
        meter = Meter([name for name in NAMES[kind] if name in GATHERED], task)
        meter.update(outputs, targets)
        for answer in found:
            for stop in STOPS:
                metrics, confusion = answer[f"{kind} {stop}"]
                assert metrics == pytest.approx(meter.compute(), rel=1e-6)
                assert confusion == meter.confusion()


# Language models


def test_language_models():
    found = language_model(12.0, 4)
    assert tuple(found) == LANGUAGE_MODEL
    assert found == {"loss": 3.0, "perplexity": math.exp(3.0)}
    assert math.isfinite(language_model(1e6, 1)["perplexity"])


def test_torchmetrics_is_imported_without_what_only_others_of_its_metrics_need():
    """Which takes seconds; who imports it elsewhere, a module of the user's, gets all of it."""
    code = (
        "import sys, trainwright.metrics.meter\n"
        "print(sorted({'matplotlib', 'scipy', 'torchvision', 'transformers'} & set(sys.modules)))\n"
        "from torchmetrics.text import BERTScore\n"
        "print(BERTScore.__name__)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["[]", "BERTScore"]
