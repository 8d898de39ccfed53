"""The pictures of schedules and of runs."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from tests import small
from trainwright import schedules
from trainwright.plot_schedule import plot_schedule
from trainwright.recipe import InputError
from trainwright.recipe.file import parse
from trainwright.report import curves


def recipe(**keys):
    return parse({"model": {"architecture": "mlp"}, "data": {"kind": "images", "source": "digits"}, **keys})


def lines(*given):
    return "".join(json.dumps(line) + "\n" for line in given)


def steps_of(count):
    return [{"step": s, "loss": 1 / s, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": 0.1} for s in range(1, count + 1)]


def width(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size[0]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = curves.save
    monkeypatch.setattr(curves, "save", lambda made, path: figures.append(made) or save(made, path))
    return figures


def test_every_step_of_a_short_run(tmp_path, drawn):
    settings = recipe(training={"steps": 50}, optimizer={"learning_rate": 0.3}, schedule={"name": "linear", "warmup": 5})
    result = plot_schedule(settings, None, tmp_path / "new" / "s.png")
    factor = schedules.factor(settings.schedule, 50)
    rates = [0.3 * factor(step) for step in range(50)]
    assert result == {"picture": str(tmp_path / "new" / "s.png"), "steps": 50, "peak": 0.3, "rates": rates}
    assert width(result["picture"]) == 1200
    assert os.listdir(tmp_path / "new") == ["s.png"]
    line = drawn[0].axes[0].lines[0]
    assert line.get_xdata().tolist() == list(range(1, 51))
    assert line.get_ydata().tolist() == rates
    json.dumps(result)


def test_a_thousand_points_of_a_long_run(tmp_path):
    result = plot_schedule(recipe(training={"steps": 123_457}), 7, tmp_path / "s.png")
    factor = schedules.factor(recipe().schedule, 123_457)
    assert result["steps"] == 123_457
    assert len(result["rates"]) == 1000
    assert result["rates"][0] == result["peak"] * factor(0)
    assert result["rates"][-1] == result["peak"] * factor(123_456)


def test_the_steps_may_be_given(tmp_path):
    assert len(plot_schedule(recipe(training={"epochs": 3}), 12, tmp_path / "s.png")["rates"]) == 12
    assert len(plot_schedule(recipe(), 1, tmp_path / "s.png")["rates"]) == 1


def test_epochs_become_steps(tmp_path):
    given = small.mapping(tmp_path, training={"epochs": 3, "batch_size": 32})
    assert plot_schedule(parse(given), None, tmp_path / "s.png")["steps"] == 3 * 7, "of 200 training samples"


@pytest.mark.parametrize(
    ("steps", "name", "message"),
    [
        (0, "s.png", "--steps: found 0; must be at least 1"),
        (9, "s.svg", "the name must end in .png"),
        (9, "file/s.png", r"can't be written \(.*\); choose another place"),
    ],
)
def test_what_is_refused(tmp_path, steps, name, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        plot_schedule(recipe(training={"epochs": 2}), steps, tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_a_run(tmp_path, drawn):
    """Loss with its smoothed line and the splits'; metrics by panels; a gap where a value was lost."""
    measured = [
        {"step": s, "split": "held_out", "loss": 0.5, "accuracy": 0.1 * s, "f1": 0.5, "rmse": 40.0 + s, "top_5": None}
        for s in (0, 6)
    ]
    lost = {"step": 13, "loss": None, "learning_rate": 0.1, "grad_norm": None, "non_finite": ["loss", "grad_norm"]}
    end = {"step": 13, "split": "test", "loss": 0.4, "accuracy": 0.9}
    (tmp_path / "metrics.jsonl").write_text(lines(*measured, *steps_of(12), lost, end) + '{"step": 14, "lo')
    out = curves.training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    assert width(out) == 1200
    panels = {axes.get_ylabel(): axes for axes in drawn[0].axes}
    assert list(panels) == ["loss", "share", "rmse", "learning rate", "gradient norm"]
    assert all(axes.get_xlabel() == "step" for axes in panels.values())
    found = {line.get_label(): line for line in panels["loss"].lines}
    assert list(found) == ["training, each step", "training, smoothed", "held-out", "test"]
    each = found["training, each step"]
    np.testing.assert_array_equal(each.get_xdata(), range(1, 14))
    np.testing.assert_array_equal(each.get_ydata(), [*(1 / s for s in range(1, 13)), np.nan])
    assert found["held-out"].get_xdata().tolist() == [0, 6]
    shares = {line.get_label(): line.get_ydata().tolist() for line in panels["share"].lines}
    assert shares["held-out accuracy"] == pytest.approx([0.0, 0.6])
    assert shares["test accuracy"] == [0.9]
    assert "held-out f1" in shares
    assert panels["rmse"].lines[0].get_ydata().tolist() == [40, 46]
    assert len({axes.get_xlim() for axes in panels.values()}) == 1


def test_the_smoothed_line_is_a_centred_mean():
    values = np.random.default_rng(0).normal(size=200)
    steps, smoothed = curves._smooth((np.arange(200.0), values))
    assert smoothed[50:150] == pytest.approx(np.convolve(values, np.ones(5) / 5, mode="same")[50:150])
    assert smoothed[0] == pytest.approx(values[:3].mean())
    values[100:103] = np.nan
    _, smoothed = curves._smooth((steps, values))
    assert smoothed[101] == pytest.approx(np.nanmean(values[99:104]))
    assert np.isnan(curves._smooth((steps[:3], np.full(3, np.nan)))[1]).all()


def test_a_long_run_is_thinned(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text(lines(*steps_of(9000)))
    curves.training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    line = drawn[0].axes[0].lines[0]
    assert len(line.get_xdata()) <= 4000
    assert line.get_xdata()[[0, -1]].tolist() == [1, 9000]
    assert drawn[0].axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    "text",
    [
        lines({"step": 0, "split": "held_out", "loss": 1.0}),
        lines({"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0}),
        lines({"step": 1, "loss": None, "learning_rate": 0.0, "grad_norm": None}),
        lines(*steps_of(2), *({"step": 2, "split": f"_$x$_{i}", "loss": 1.0, f"$m{i}": -5.0} for i in range(12))),
    ],
    ids=["only evaluated", "one step", "nothing finite", "many odd names"],
)
def test_runs_of_little_or_much(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert width(curves.training(tmp_path / "metrics.jsonl", tmp_path / "training.png")) == 1200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("", "no steps yet"),
        ('{"loss": 1}\n{"step": 1, "loss": 1.0}\n', "line 1 is not a JSON object with a step; mend or remove it"),
        ("[1]\n", "line 1 is not"),
    ],
)
def test_files_that_are_no_metrics(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        curves.training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
