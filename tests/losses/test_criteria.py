"""Losses of classes, masks and numbers against torch's, torchvision's and scikit-learn's: values, gradients, ragged splits."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from trainwright.losses import Criterion, make, task_for, wanted
from trainwright.losses.criteria import make as _same_make
from trainwright.recipe import InputError, Loss, Task

ABC = ("a", "b", "c")
CLASSES = Task("classes", 3, ABC)
TWO = Task("classes", 2, ("no", "yes"))
BINARY = Task("binary", 1, ("no", "yes"))
VALUES = Task("values", 2, ("x", "y"))
MASKS = Task("classes", 3, ABC, dense=True)
MASKS_OF_TWO = Task("classes", 2, ("no", "yes"), dense=True)
BINARY_MASKS = Task("binary", 1, ("no", "yes"), dense=True)
WEIGHTS = [0.5, 2.0, 1.25]


def section(**keys) -> Loss:
    return TypeAdapter(Loss).validate_python(keys)


CE, BCE, FOCAL, DICE = ({"name": name} for name in ("cross_entropy", "bce", "focal", "dice"))
SUM = {"name": "sum", "terms": [{"weight": 0.3, "loss": {**CE, "weights": WEIGHTS}}, {"weight": 2.0, "loss": DICE}]}
SUM_OF_TWO = {
    "name": "sum",
    "terms": [{"loss": {**BCE, "pos_weight": 3.0}}, {"weight": 0.5, "loss": {**FOCAL, "weights": [1, 4]}}],
}
CUSTOM = {"name": "custom", "function": "tests.losses.test_criteria:squared", "predicts": "classes", "options": {"power": 2.0}}
CASES = [
    *[(CE | options, task) for task in (CLASSES, MASKS) for options in (
        {}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"weights": WEIGHTS}, {"weights": "balanced"}, {"ignore_index": 1},
        {"label_smoothing": 0.1, "z_loss": 0.01, "weights": WEIGHTS, "ignore_index": 0},
        {"weights": "balanced", "ignore_index": 2},
    )],
    *[(BCE | options, task) for task in (BINARY, BINARY_MASKS) for options in (
        {}, {"pos_weight": 3.0}, {"pos_weight": "balanced"}, {"pos_weight": 0.5, "label_smoothing": 0.2},
    )],
    *[(FOCAL | options, task) for task in (CLASSES, MASKS) for options in (
        {}, {"gamma": 0.0, "weights": WEIGHTS}, {"gamma": 0.5, "weights": "balanced"},
    )],
    *[({"name": "mse"}, VALUES), ({"name": "l1"}, VALUES), ({"name": "huber", "delta": 0.3}, VALUES)],
    *[(DICE | options, task) for task in (MASKS, BINARY_MASKS, MASKS_OF_TWO) for options in (
        {}, {"smooth": 0.0}, {"background": False},
    )],
    (SUM, MASKS), (SUM_OF_TWO, BINARY), (CUSTOM, CLASSES), (CE | {"z_loss": 0.1, "weights": [1, 2]}, BINARY),
]  # fmt: skip


def squared(outputs, targets, power):
    return (outputs.softmax(1) - functional.one_hot(targets, outputs.shape[1])).abs().pow(power).sum(1)


def draw(task: Task, count=9, mixed=False, seed=0, dtype=torch.float64):
    """Outputs (differentiable) and targets of a task."""
    generator = torch.Generator().manual_seed(seed)
    places = (3, 4) if task.dense else ()
    outputs = torch.randn(count, task.outputs, *places, generator=generator, dtype=torch.float64) * 2
    classes = len(task.labels)
    if task.kind == "values":
        targets = torch.randn(count, task.outputs, generator=generator)
    elif mixed:
        targets = torch.rand(count, classes, *places, generator=generator).pow(3)
        targets = (targets / targets.sum(1, keepdim=True)).double()
    else:
        targets = torch.randint(0, classes, (count, *places), generator=generator)
        targets.view(-1)[:classes] = torch.arange(classes)
    return outputs.to(dtype).requires_grad_(), targets.to(torch.uint8) if task.dense and not mixed else targets


def mean(criterion: Criterion, outputs, targets):
    return (criterion.sums(outputs, targets) / criterion.counts(targets)).sum()


def same(section_, task, expected, mixed=False):
    """Value and gradient of the whole batch's mean loss are those of ``expected(outputs, targets)``."""
    outputs, targets = draw(task, mixed=mixed)
    train = None if mixed else targets
    mine = mean(make(section_, task, train), outputs, targets)
    theirs = expected(outputs, targets if mixed or task.kind == "values" else targets.long())
    torch.testing.assert_close(mine, theirs.to(mine))
    gradients = [torch.autograd.grad(loss, outputs)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_the_package_has_one_make():
    assert make is _same_make


@pytest.mark.parametrize(("keys", "task"), CASES)
@pytest.mark.parametrize("cuts", [[1, 9], [4, 5, 9]])
def test_however_it_is_cut_it_is_the_mean_of_the_whole(keys, task, cuts):
    outputs, targets = draw(task)
    criterion = make(section(**keys), task, targets)
    whole = mean(criterion, outputs, targets)
    counts = criterion.counts(targets)
    assert counts.dtype == torch.float64
    assert counts.shape == criterion.sums(outputs, targets).shape
    parts = [slice(start, stop) for start, stop in zip([0, *cuts], cuts, strict=False)]
    total = sum(criterion.counts(targets[part]) for part in parts)
    torch.testing.assert_close(total, counts)
    gradient = torch.zeros_like(outputs)
    found = 0.0
    for part in parts:  # as a step does it: backward of each micro-batch, divided by the counts of all
        loss = (criterion.sums(outputs[part], targets[part]) / total).sum()
        gradient += torch.autograd.grad(loss, outputs)[0]
        found += loss.item()
    assert found == pytest.approx(whole.item(), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, outputs)[0])


@pytest.mark.parametrize(("keys", "task"), CASES)
def test_gradcheck(keys, task):
    outputs, targets = draw(task, count=3)
    criterion = make(section(**keys), task, targets)
    assert torch.autograd.gradcheck(lambda x: criterion.sums(x, targets), outputs)


MIXED = [(keys, task) for keys, task in CASES if keys["name"] in ("cross_entropy", "bce", "focal", "sum") and task.labels]


@pytest.mark.parametrize(("keys", "task"), MIXED)
def test_mixed_targets_of_one_class_each_are_hard_ones(keys, task):
    """But for torch's definition with weights: it divides mixed targets by their number."""
    outputs, targets = draw(task)
    criterion = make(section(**keys), task, targets)
    one_hot = functional.one_hot(targets.long(), len(task.labels)).movedim(-1, 1).float()
    torch.testing.assert_close(criterion.sums(outputs, one_hot), criterion.sums(outputs, targets))
    if "weights" not in str(keys):
        torch.testing.assert_close(criterion.counts(one_hot), criterion.counts(targets))


@pytest.mark.parametrize(("keys", "task"), MIXED)
def test_gradcheck_of_mixed_targets(keys, task):
    outputs, hard = draw(task, count=3)
    _, targets = draw(task, count=3, mixed=True)
    criterion = make(section(**keys), task, hard)
    assert torch.autograd.gradcheck(lambda x: criterion.sums(x, targets), outputs)


@pytest.mark.parametrize("task", [CLASSES, MASKS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignored", [None, 2])
def test_cross_entropy_is_torchs(task, smoothing, weights, ignored):
    keys = {"label_smoothing": smoothing, "weights": weights, "ignore_index": ignored}
    options = {"label_smoothing": smoothing, "weight": None if weights is None else torch.tensor(weights, dtype=torch.float64)}
    hard = options if ignored is None else options | {"ignore_index": ignored}
    same(section(**CE, **keys), task, lambda x, y: functional.cross_entropy(x, y, **hard))
    if ignored is None:  # torch has no ignored class in mixed targets
        same(section(**CE, **keys), task, lambda x, y: functional.cross_entropy(x, y, **options), mixed=True)


def test_an_ignored_class_takes_its_share_of_mixed_targets():
    targets = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]], dtype=torch.float64)
    outputs = torch.randn(2, 3, dtype=torch.float64)
    criterion = make(section(**CE, ignore_index=2), CLASSES, None)
    log_p = outputs.log_softmax(1)
    assert criterion.counts(targets).tolist() == [1.25]
    assert criterion.sums(outputs, targets).item() == pytest.approx(-(0.25 * log_p[0, 0] + log_p[1, 1]).item())


def test_z_loss_is_weighted_as_its_sample_is():
    def expected(x, y):
        w = torch.tensor(WEIGHTS, dtype=torch.float64)
        each = functional.cross_entropy(x, y, reduction="none") + 0.1 * x.logsumexp(1) ** 2
        kept = (y != 0) * w[y]
        return (each * kept).sum() / kept.sum()

    same(section(**CE, z_loss=0.1, weights=WEIGHTS, ignore_index=0), CLASSES, expected)


def test_cross_entropy_of_one_output_is_binary_cross_entropy():
    same(section(**CE), BINARY, lambda x, y: functional.binary_cross_entropy_with_logits(x[:, 0], y.double()))


@pytest.mark.parametrize("task", [BINARY, BINARY_MASKS])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("smoothing", "pos_weight"), [(0.0, None), (0.0, 3.0), (0.2, 0.5)])
def test_bce_is_torchs(task, mixed, smoothing, pos_weight):
    def expected(x, y):
        y = y[:, 1] if mixed else y.double()
        weight = None if pos_weight is None else torch.tensor(pos_weight)
        return functional.binary_cross_entropy_with_logits(x[:, 0], y * (1 - smoothing) + smoothing / 2, pos_weight=weight)

    same(section(**BCE, label_smoothing=smoothing, pos_weight=pos_weight), task, expected, mixed=mixed)


def test_bce_takes_mixed_targets_as_probabilities_of_class_1():
    outputs, _ = draw(BINARY)
    targets = torch.rand(9)
    criterion = make(section(**BCE), BINARY, None)
    expected = functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.double())
    torch.testing.assert_close(mean(criterion, outputs, targets), expected)
    torch.testing.assert_close(mean(criterion, outputs, torch.stack([1 - targets, targets], 1)), expected)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_is_torchvisions(gamma):
    def expected(x, y):
        return sigmoid_focal_loss(x[:, 0], y.double(), alpha=-1, gamma=gamma, reduction="mean")

    same(section(**FOCAL, gamma=gamma), BINARY, expected)

    def of_difference(x, y):
        return sigmoid_focal_loss(x[:, 1] - x[:, 0], y.double(), alpha=0.25, gamma=gamma, reduction="sum")

    outputs, targets = draw(TWO)
    criterion = make(section(**FOCAL, gamma=gamma, weights=[0.75, 0.25]), TWO, None)
    torch.testing.assert_close(criterion.sums(outputs, targets)[0], of_difference(outputs, targets))
    weight = torch.tensor([0.75, 0.25], dtype=torch.float64)[targets].sum()
    assert criterion.counts(targets).item() == weight


@pytest.mark.parametrize("task", [CLASSES, MASKS])
@pytest.mark.parametrize("mixed", [False, True])
def test_focal_without_focus_is_cross_entropy(task, mixed):
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    same(section(**FOCAL, gamma=0.0, weights=WEIGHTS), task, lambda x, y: functional.cross_entropy(x, y, weight), mixed=mixed)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_gradients_stay_finite_where_the_model_is_sure(gamma):
    outputs = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 0])
    make(section(**FOCAL, gamma=gamma), CLASSES, None).sums(outputs, targets).sum().backward()
    assert outputs.grad.isfinite().all()
    assert outputs.grad[1].abs().max() > 0


@pytest.mark.parametrize(
    ("keys", "function"),
    [
        ({"name": "mse"}, functional.mse_loss),
        ({"name": "l1"}, functional.l1_loss),
        ({"name": "huber", "delta": 0.3}, lambda x, y: functional.huber_loss(x, y, delta=0.3)),
    ],
)
def test_losses_of_numbers_are_torchs(keys, function):
    same(section(**keys), VALUES, lambda x, y: function(x, y.double()))


@pytest.mark.parametrize("task", [MASKS, MASKS_OF_TWO, BINARY_MASKS])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("background", [True, False])
def test_dice_is_its_formula(task, smooth, background):
    def expected(x, y):
        p = x.sigmoid() if task.outputs == 1 else x.softmax(1)
        found = []
        for image in range(len(x)):
            for label in range(task.outputs):
                if label == 0 and task.outputs > 2 and not background:
                    continue
                t = (y[image] == (1 if task.outputs == 1 else label)).double()
                q = p[image, label]
                found.append(1 - (2 * (q * t).sum() + smooth) / (q.sum() + t.sum() + smooth))
        return torch.stack(found).mean()

    same(section(**DICE, smooth=smooth, background=background), task, expected)


def test_dice_of_nothing_in_an_empty_mask_is_a_number():
    outputs = torch.full((2, 1, 3, 3), -1e4, requires_grad=True)
    found = make(section(**DICE, smooth=0.0), BINARY_MASKS, None).sums(outputs, torch.zeros(2, 3, 3, dtype=torch.uint8))
    found.sum().backward()
    assert found.isfinite().all()
    assert outputs.grad.isfinite().all()


def test_dice_of_hard_predictions_is_one_minus_f1():
    from sklearn.metrics import f1_score

    targets = torch.randint(0, 2, (1, 5, 5), generator=torch.Generator().manual_seed(1))
    found = torch.randint(0, 2, (1, 5, 5), generator=torch.Generator().manual_seed(2))
    outputs = (found.double() * 2 - 1)[:, None] * 100
    criterion = make(section(**DICE, smooth=0.0), BINARY_MASKS, None)
    assert mean(criterion, outputs, targets).item() == pytest.approx(1 - f1_score(targets.flatten(), found.flatten()))


def test_a_sum_is_the_weighted_sum_of_its_means():
    def expected(x, y):
        entropy = functional.cross_entropy(x, y, torch.tensor(WEIGHTS, dtype=torch.float64))
        return 0.3 * entropy + 2.0 * mean(make(section(**DICE), MASKS, None), x, y)

    same(section(**SUM), MASKS, expected)
    assert make(section(**SUM), MASKS, None).counts(draw(MASKS)[1]).shape == (2,)


@pytest.mark.parametrize("task", [CLASSES, MASKS])
@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_balanced_weights_are_scikit_learns(task, name):
    train = torch.tensor([0, 0, 0, 1, 2, 2, 0, 2, 1, 0, 0, 0])
    weights = compute_class_weight("balanced", classes=np.arange(3), y=train.numpy()).tolist()
    train = train.view(1, 3, 4).to(torch.uint8) if task.dense else train
    outputs, targets = draw(task)
    balanced, given_ = (make(section(name=name, weights=w), task, train) for w in ("balanced", weights))
    torch.testing.assert_close(balanced.sums(outputs, targets), given_.sums(outputs, targets))
    torch.testing.assert_close(balanced.counts(targets), given_.counts(targets))


def test_balanced_weights_leave_the_ignored_class_out():
    train = torch.tensor([0, 0, 0, 1, 2, 2])
    a, b = compute_class_weight("balanced", classes=np.arange(2), y=[0, 0, 0, 1])
    criterion = make(section(**CE, weights="balanced", ignore_index=2), CLASSES, train)
    assert criterion.counts(torch.tensor([0, 1, 1, 2])).item() == pytest.approx(a + 2 * b)
    without = make(section(**CE, weights="balanced", ignore_index=2), CLASSES, torch.tensor([0, 0, 0, 1]))
    assert without.counts(torch.tensor([0, 1])).item() == pytest.approx(a + b)


def test_balanced_positives_weigh_as_much_as_negatives():
    train = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    outputs, targets = draw(BINARY)
    balanced, given_ = (make(section(**BCE, pos_weight=w), BINARY, train) for w in ("balanced", 2.5))
    torch.testing.assert_close(balanced.sums(outputs, targets), given_.sums(outputs, targets))


@pytest.mark.parametrize(
    ("keys", "task", "words"),
    [
        (CE | {"weights": "balanced"}, CLASSES, ["loss.weights", "'c'", "training split", "give a list"]),
        (FOCAL | {"weights": "balanced"}, CLASSES, ["loss.weights", "'c'"]),
        (BCE | {"pos_weight": "balanced"}, BINARY, ["loss.pos_weight", "'yes'", "give a number"]),
    ],
)
def test_what_never_occurs_cannot_be_balanced(keys, task, words):
    train = torch.tensor([0, 1, 1]) if task is CLASSES else torch.tensor([0, 0])
    with pytest.raises(InputError) as caught:
        make(section(**keys), task, train)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("keys", "task"), CASES)
def test_half_precision_is_computed_in_float32(keys, task):
    outputs, targets = draw(task, dtype=torch.bfloat16)
    criterion = make(section(**keys), task, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion.sums(outputs, targets)
    assert found.dtype == torch.float32
    exact = criterion.sums(outputs.double(), targets)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert outputs.grad.dtype == torch.bfloat16
    assert outputs.grad.abs().max() > 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.floats(0, 0.9),
    st.lists(st.just(0.0) | st.floats(1e-3, 5), min_size=3, max_size=3),
    st.sampled_from([None, 0, 1, 2]),
)
def test_cross_entropy_sums_and_counts_are_torchs(labels, smoothing, weights, ignored):
    if not any(weights):
        weights[0] = 1.0
    targets = torch.tensor(labels)
    outputs = torch.randn(len(labels), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(len(labels)))
    criterion = make(section(**CE, label_smoothing=smoothing, weights=weights, ignore_index=ignored), CLASSES, None)
    options = {"weight": torch.tensor(weights, dtype=torch.float64), "label_smoothing": smoothing}
    expected = functional.cross_entropy(outputs, targets, **options, ignore_index=-100 if ignored is None else ignored)
    if criterion.counts(targets).item() == 0:  # every target is ignored, or has the weight 0
        assert not expected.isfinite()
    else:
        torch.testing.assert_close(mean(criterion, outputs, targets), expected)


def test_a_batch_of_ignored_targets_adds_nothing():
    criterion = make(section(**CE, ignore_index=1), CLASSES, None)
    targets = torch.tensor([1, 1])
    assert criterion.sums(torch.randn(2, 3), targets).tolist() == [0.0]
    assert criterion.counts(targets).tolist() == [0.0]


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (CLASSES, (9, 4)), (CLASSES, (9,)), (CLASSES, (8, 3)), (BINARY, (9,)), (BINARY, (9, 2)), (VALUES, (9, 1)),
        (VALUES, (9,)), (MASKS, (9, 3)), (MASKS, (9, 3, 4, 3)), (BINARY_MASKS, (9, 3, 4)),
    ],
)  # fmt: skip
def test_outputs_of_another_shape_are_refused(task, shape):
    loss = {"classes": CE, "binary": BCE, "values": {"name": "mse"}}[task.kind]
    _, targets = draw(task)
    with pytest.raises(InputError) as caught:
        make(section(**loss), task, None).sums(torch.randn(shape), targets)
    expected = (9, task.outputs, 3, 4) if task.dense else (9, task.outputs)
    assert str(shape) in str(caught.value)
    assert str(expected) in str(caught.value)


# Tasks


def fault(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


def custom(predicts):
    return {**CUSTOM, "predicts": predicts}


def summed(*terms):
    return {"name": "sum", "terms": [{"loss": term} for term in terms]}


@pytest.mark.parametrize(
    ("keys", "labels", "dense", "expected"),
    [
        (CE, ABC, False, CLASSES),
        (CE, ABC, True, MASKS),
        (CE, ("no", "yes"), False, TWO),
        (FOCAL, ("no", "yes"), False, TWO),
        (BCE, ("no", "yes"), False, BINARY),
        (BCE, ("no", "yes"), True, BINARY_MASKS),
        (DICE, ("no", "yes"), True, BINARY_MASKS),
        (DICE, ABC, True, MASKS),
        (summed(DICE, DICE), ("no", "yes"), True, BINARY_MASKS),
        (summed(CE, DICE), ("no", "yes"), True, MASKS_OF_TWO),
        (summed(DICE, BCE), ("no", "yes"), True, BINARY_MASKS),
        (summed(CE, BCE), ("no", "yes"), False, BINARY),
        (custom("classes"), ("no", "yes"), False, TWO),
        (custom("binary"), ("no", "yes"), False, BINARY),
        (custom("binary"), ("no", "yes"), True, BINARY_MASKS),
        (custom("masks"), ABC, True, MASKS),
        (CE | {"weights": WEIGHTS, "ignore_index": 2}, ABC, False, replace(CLASSES, ignored=2)),
    ],
)
def test_tasks_of_classes(keys, labels, dense, expected):
    assert wanted(section(**keys)) == "classes"
    assert task_for(section(**keys), "classes", labels, dense, 0) == expected


@pytest.mark.parametrize(
    "keys", [{"name": "mse"}, {"name": "l1"}, {"name": "huber"}, custom("values"), summed({"name": "mse"}, {"name": "l1"})]
)
def test_tasks_of_values(keys):
    assert wanted(section(**keys)) == "values"
    assert task_for(section(**keys), "values", ("x", "y"), False, 2) == VALUES


@pytest.mark.parametrize(
    ("keys", "target", "labels", "dense", "words"),
    [
        ({"name": "mse"}, "classes", ABC, False, ["mse is of numbers", "'a', 'b', 'c'", "use cross_entropy"]),
        (CE, "values", ("x",), False, ["cross_entropy is of classes", "use mse"]),
        (BCE, "classes", ABC, False, ["bce is of two classes", "3: 'a', 'b', 'c'", "use cross_entropy"]),
        (custom("binary"), "classes", ABC, False, ["custom is of two classes"]),
        (CE, "classes", ("only",), False, ["a single class ('only'); nothing to learn"]),
        (CE | {"ignore_index": 1}, "classes", ("a", "b"), False, ["a single class ('a')", "ignore_index"]),
        (CE | {"ignore_index": 3}, "classes", ABC, False, ["loss.ignore_index: found 3", "0 to 2"]),
        (CE | {"ignore_index": -100}, "classes", ABC, True, ["loss.ignore_index: found -100", "0 to 2"]),
        (CE | {"weights": [1.0, 2.0]}, "classes", ABC, False, ["loss.weights: found 2", "3 classes", "'a', 'b', 'c'"]),
        (FOCAL | {"weights": [1.0] * 4}, "classes", ABC, False, ["loss.weights: found 4", "3 classes"]),
        (CE | {"weights": [0.0] * 3}, "classes", ABC, False, ["loss.weights: all are 0"]),
        (summed(CE, CE | {"weights": [1.0]}), "classes", ABC, False, ["loss.weights: found 1"]),
        (DICE, "classes", ABC, False, ["dice compares masks"]),
        (custom("masks"), "classes", ABC, False, ["loss.predicts: found 'masks'", "set classes or binary"]),
        (custom("classes"), "classes", ABC, True, ["loss.predicts: found 'classes'", "set masks"]),
        (summed(BCE, custom("classes")), "classes", ("a", "b"), False, ["loss.terms: bce needs", "custom"]),
        (summed(CE, {"name": "l1"}), "classes", ABC, False, ["loss.terms: cross_entropy is of classes", "l1 is of numbers"]),
        (BCE, "classes", tuple(map(str, range(30))), False, ["30: '0'", "... (30)"]),
    ],
)  # fmt: skip
def test_what_does_not_fit(keys, target, labels, dense, words):
    found = fault(task_for, section(**keys), target, labels, dense, 1)
    assert all(word in found for word in words), found


# Losses of one's own


def test_a_custom_loss_is_a_mean_over_samples():
    same(section(**CUSTOM), CLASSES, lambda x, y: squared(x, y, 2.0).mean())


def test_a_custom_loss_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_loss_of_criteria.py").write_text(
        "def absolute(outputs, targets):\n    return (outputs - targets).abs().sum(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    keys = {"name": "custom", "function": "my_loss_of_criteria:absolute", "predicts": "values"}
    same(section(**keys), VALUES, lambda x, y: (x - y).abs().sum(1).mean())
    assert sys.path == before


def returns_nothing(outputs, targets):
    return None


def returns_mean(outputs, targets):
    return outputs.mean()


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("squared", {}, ["loss.function: found 'squared'", "module:function"]),
        (":squared", {}, ["module:function"]),
        ("no_such_module_here:f", {}, ["loss.function", "no_such_module_here", "start in the folder"]),
        ("tests.losses.test_criteria:squard", {}, ["no function 'squard'", "did you mean 'squared'"]),
        ("tests.losses.test_criteria:ABC", {}, ["no function 'ABC'"]),
        ("tests.losses.test_criteria:squared", {}, ["loss.options don't fit", "power", "outputs, targets"]),
        ("tests.losses.test_criteria:squared", {"power": 1.0, "x": 2}, ["loss.options don't fit", "'x'"]),
        ("tests.losses.test_criteria:returns_nothing", {}, ["returned NoneType for 9 samples", "(9,)"]),
        ("tests.losses.test_criteria:returns_mean", {}, ["returned shape () for 9 samples", "(9,)"]),
    ],
)
def test_wrong_custom_losses(function, options, words):
    outputs, targets = draw(CLASSES)
    keys = {"name": "custom", "function": function, "predicts": "classes", "options": options}
    found = fault(lambda: make(section(**keys), CLASSES, None).sums(outputs, targets))
    assert all(word in found for word in words), found
