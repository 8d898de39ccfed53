"""What the pictures show, read back from matplotlib's objects and held against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from trainwright.recipe import Task
from trainwright.report import classified, masked, mistakes, style, valued
from trainwright.report.scored import class_labels, likelihoods, score


@pytest.fixture(autouse=True)
def _style():
    with style.style():
        yield


def scored(classes=4, count=80, seed=0, binary=False, labels=()):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (count,), generator=generator)
    outputs = torch.randn(count, classes, generator=generator) + torch.eye(classes)[targets]
    if binary:
        outputs = outputs[:, 1:] - outputs[:, :1]
    task = Task("binary" if binary else "classes", outputs.shape[1], labels)
    return score(task, outputs, targets, [f"row {index}" for index in range(count)], "test"), outputs, targets


def texts(axes):
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}


def legend(figure):
    return dict(text.get_text().rsplit("  ", 1) for text in figure.axes[0].get_legend().get_texts() if "  " in text.get_text())


@pytest.mark.parametrize("classes", [2, 4, 10, 25])
def test_confusion_has_actual_rows_and_predicted_columns(classes):
    found, outputs, targets = scored(classes, 500)
    axes = classified.confusion(found).axes[0]
    theirs = confusion_matrix(targets, outputs.argmax(1))
    assert {place: int(text) for place, text in texts(axes).items()} == {
        place: count for place, count in np.ndenumerate(theirs) if count or classes <= 10
    }
    np.testing.assert_allclose(axes.images[0].get_array(), confusion_matrix(targets, outputs.argmax(1), normalize="true"))
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("actual", "predicted")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(name) for name in range(classes)]
    assert axes.yaxis_inverted(), "the first class is above"


def test_confusion_of_many_classes_has_no_numbers_and_fewer_names():
    axes = classified.confusion(scored(120)[0]).axes[0]
    assert not axes.texts
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [str(name) for name in range(0, 120, 3)]


def test_confusion_marks_classes_that_do_not_occur():
    found = score(Task("classes", 3), torch.eye(3), torch.tensor([0, 0, 1]), "abc", "test")
    axes = classified.confusion(found, "note").axes[0]
    assert axes.images[0].get_array().mask.tolist() == [[False] * 3, [False] * 3, [True] * 3]
    assert axes.get_title("left") == "note\nGrey rows: the class doesn't occur."


@pytest.mark.parametrize(
    ("draw", "rate"), [(classified.roc, roc_auc_score), (classified.precision_recall, average_precision_score)]
)
def test_areas_equal_scikit_learns(draw, rate):
    found, outputs, targets = scored(4)
    shown = legend(draw(found))
    for name in range(4):
        assert float(shown[str(name)]) == pytest.approx(rate(targets == name, outputs.softmax(1)[:, name]), abs=1e-4)
    if draw is classified.roc:
        expected = roc_auc_score(targets, outputs.double().softmax(1), multi_class="ovr", average="macro")
        assert float(shown["macro average"]) == pytest.approx(expected, abs=1e-4)
    else:
        expected = np.mean([rate(targets == name, outputs.softmax(1)[:, name]) for name in range(4)])
        assert float(shown["mean of 4 classes"]) == pytest.approx(expected, abs=1e-4)


def test_the_macro_average_has_the_mean_area():
    figure = classified.roc(scored(5, 300)[0])
    line = next(line for line in figure.axes[0].lines if line.get_label().startswith("macro average"))
    area = np.trapezoid(line.get_ydata(), line.get_xdata())
    assert area == pytest.approx(float(legend(figure)["macro average"]), abs=2e-3)
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (0, 0)


@pytest.mark.parametrize(
    ("draw", "rate"), [(classified.roc, roc_auc_score), (classified.precision_recall, average_precision_score)]
)
def test_binary_curves_are_of_the_second_class(draw, rate):
    found, outputs, targets = scored(2, binary=True, labels=("no", "yes"))
    figure = draw(found)
    assert float(legend(figure)["yes"]) == pytest.approx(rate(targets, outputs[:, 0]), abs=1e-4)
    assert figure.axes[0].get_title("left") == "yes is the positive class"


def test_the_hardest_of_many_classes_are_drawn():
    found, outputs, targets = scored(14, 400)
    areas = {name: roc_auc_score(targets == name, outputs.double().softmax(1)[:, name]) for name in range(14)}
    figure = classified.roc(found)
    assert set(legend(figure)) - {"macro average"} == set(map(str, sorted(areas, key=areas.get)[:10]))
    assert figure.axes[0].get_title("left") == "the 10 classes with the lowest AUROC of 14"
    lines = [line for line in figure.axes[0].lines if line.get_label() in [f"{n}  {a:.4f}" for n, a in areas.items()]]
    assert len({(to_hex(line.get_color())) for line in lines}) == 10


def test_classes_left_out_are_told():
    found = score(Task("classes", 4), torch.randn(20, 4), torch.arange(20) % 2, "a" * 20, "test")
    for draw in (classified.roc, classified.precision_recall):
        assert draw(found).axes[0].get_title("left") == "2 of 4 classes left out: they don't occur"


def test_saturated_logits_still_have_an_order():
    """Sigmoids in float32 would all be 1."""
    logits = torch.tensor([[20.0], [25.0], [30.0], [35.0]])
    found = score(Task("binary", 1), logits, torch.tensor([0, 0, 1, 1]), "abcd", "test")
    assert float(legend(classified.roc(found))["1"]) == 1.0


@pytest.mark.parametrize("binary", [False, True])
def test_calibration_error_equals_torchmetrics(binary):
    found, outputs, targets = scored(2 if binary else 5, 1000, binary=binary)
    if binary:
        theirs = binary_calibration_error(outputs[:, 0], targets, n_bins=15)
    else:
        theirs = multiclass_calibration_error(outputs, targets, num_classes=5, n_bins=15)
    chance = found.probabilities[:, 1] if binary else found.confidence
    share, mean, counts, error = classified.reliability(found.actual == 1 if binary else ~found.wrong, chance)
    assert error == pytest.approx(float(theirs), abs=1e-5)
    assert counts.sum() == 1000
    assert len(share) == len(mean) == (counts > 0).sum()
    assert f"{error:.4f}" in classified.calibration(found).get_suptitle()


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40))
def test_reliability_bins_are_those_of_the_counts(pairs):
    happened, chance = (np.array(column) for column in zip(*pairs, strict=True))
    share, mean, counts, error = classified.reliability(happened, chance)
    kept = counts[counts > 0]
    assert share @ kept == pytest.approx(happened.sum())
    assert mean @ kept == pytest.approx(chance.sum())
    assert 0 <= error <= 1


def test_mistakes_are_ordered_by_confidence():
    found, outputs, targets = scored(4)
    sure, said = outputs.softmax(1).max(1)
    order = mistakes.worst(found)
    assert set(order) == set((said != targets).nonzero().flatten().tolist())
    assert sure[order].tolist() == sorted(sure[order].tolist(), reverse=True)
    assert sure[mistakes.uncertain(found)].tolist() == sorted(sure.tolist())


def test_the_gallery_shows_each_sample_under_its_own_name():
    found, outputs, targets = scored(3, labels=("ant", "bee", "cat"))
    pictures = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(80, 1, 4, 4)
    figure = mistakes.gallery(found, mistakes.worst(found), "title", lambda ids: pictures[ids])
    sure, said = outputs.softmax(1).max(1)
    for axes in (axes for axes in figure.axes if axes.images):
        name, actual, predicted, probability = axes.get_title().splitlines()
        index = int(axes.images[0].get_array()[0, 0, 0])
        assert name == f"row {index}"
        assert actual == f"actual: {found.labels[targets[index]]}"
        assert predicted == f"predicted: {found.labels[said[index]]}"
        assert probability == f"probability: {sure[index]:.1%}"
    assert sum(bool(axes.images) for axes in figure.axes) == 20


def test_values_lie_where_they_are():
    actual, predicted = np.random.default_rng(0).normal(size=(2, 30, 2))
    for place, axes in enumerate(valued.against(predicted, actual, ["a", "b"], "test", "note").axes):
        diagonal, points = axes.lines
        np.testing.assert_array_equal(points.get_xdata(), actual[:, place])
        np.testing.assert_array_equal(points.get_ydata(), predicted[:, place])
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        expected = 1 - ((predicted - actual) ** 2).sum(0)[place] / ((actual - actual.mean(0)) ** 2).sum(0)[place]
        assert axes.get_title("left") == f"{'ab'[place]}   R² {expected:.3f}"
    for place, axes in enumerate(valued.residuals(predicted, actual, ["a", "b"], "test").axes):
        assert sum(bar.get_height() for bar in axes.patches) == 30
        off = (predicted - actual)[:, place]
        assert axes.get_legend().get_texts()[0].get_text() == f"mean {off.mean():.4g}"


def test_a_forecast_shows_the_end():
    actual = np.arange(700.0)[:, None]
    truth, said = valued.forecast(actual + 1, actual, ["a"], "test").axes[0].lines
    np.testing.assert_array_equal(truth.get_xdata(), np.arange(200, 700))
    np.testing.assert_array_equal(said.get_ydata() - truth.get_ydata(), np.ones(500))


def test_the_table_of_values_is_bounded(tmp_path):
    actual = np.random.default_rng(0).normal(size=(1500, 1))
    valued.table(actual + 1, actual, ["a"], [str(index) for index in range(1500)], tmp_path / "t.csv")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1001


def found_masks(classes=4, ignored=False):
    generator = torch.Generator().manual_seed(0)
    actual, predicted = torch.randint(0, classes, (2, 5, 6, 7), generator=generator).numpy()
    if ignored:
        actual[:, 0] = 255
    labels = tuple(map(str, range(classes + 1)))
    return masked.Masks(labels, predicted, actual, [f"row {index}" for index in range(5)], "test")


@pytest.mark.parametrize("ignored", [False, True])
def test_overlap_equals_scikit_learns(ignored):
    found = found_masks(ignored=ignored)
    kept = found.actual != 255
    theirs = jaccard_score(found.actual[kept], found.predicted[kept], average=None)
    np.testing.assert_allclose(masked.overlap(found), [*theirs, np.nan])
    figure = masked.bars(found)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(theirs)
    assert f"{theirs.mean():.4f}" in figure.get_suptitle()
    assert figure.axes[0].get_title("left") == "1 of 5 classes left out: neither actual nor predicted"


def test_masks_show_what_is_wrong_from_the_worst_to_the_best():
    found = found_masks(ignored=True)
    pictures = torch.zeros(5, 3, 6, 7, dtype=torch.uint8)
    axes = np.array(masked.samples(found, lambda ids: pictures[ids], "note").axes).reshape(-1, 4)
    colours = style.palette(5)
    red = [int(channel * 255) for channel in (0xBD / 255, 0x1F / 255, 0x01 / 255)]
    shares = []
    for row in axes:
        name, share = row[0].get_ylabel().splitlines()
        index = int(name.removeprefix("row "))
        _, actual, predicted, wrong = (panel.images[0].get_array() for panel in row)
        np.testing.assert_array_equal(actual[1:], colours[found.actual[index, 1:]])
        assert (actual[0] == masked.IGNORED).all()
        np.testing.assert_array_equal(predicted, colours[found.predicted[index]])
        expected = (found.actual[index] != found.predicted[index]) & (found.actual[index] != 255)
        np.testing.assert_array_equal((wrong == red).all(-1), expected)
        shares.append(expected[1:].mean())
        assert share == f"{shares[-1]:.1%} wrong"
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 5


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_images_of_any_channels(channels, shown):
    picture = torch.arange(channels, dtype=torch.uint8)[:, None, None].expand(channels, 4, 6)
    assert style.image(picture).shape == (4, 6, 3)
    assert style.image(picture)[0, 0].tolist() == shown


def test_colours_are_told_apart():
    colours = style.palette(31)
    assert len(np.unique(colours, axis=0)) == 31
    assert colours[0].tolist() == [0, 0, 0]
    assert style.palette(1).shape == (1, 3)


@given(st.text(max_size=60), st.integers(4, 30))
def test_short_names_fit_and_keep_their_ends(text, length):
    name = style.short(text, length)
    assert len(name) <= length
    assert name.isprintable()
    if len(text) > length and text.isprintable():
        assert name[0] == text[0]
        assert name[-1] == text[-1]


def test_what_is_not_all_is_not_shown_as_all():
    assert [style.percent(share) for share in (1.0, 0.99999, 0.973, 0.0)] == ["100.0%", "99.9%", "97.3%", "0.0%"]


def test_likelihoods_of_both_classes():
    logits = torch.tensor([[-800.0], [0.5], [800.0]])
    found = likelihoods(Task("binary", 1), logits)
    torch.testing.assert_close(found, torch.cat([torch.zeros(3, 1), logits], 1).double().softmax(1))
    assert class_labels(Task("binary", 1)) == ("0", "1")
    assert class_labels(Task("classes", 3, ("a", "b", "c"))) == ("a", "b", "c")
