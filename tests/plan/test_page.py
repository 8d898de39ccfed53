"""The page and the picture, read back: every combination is there, with its settings, and nothing is left to the markup."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from trainwright.plan import page
from trainwright.plan.pareto import ACCURACY, Choice, front
from trainwright.recipe import InputError
from trainwright.report import style

GIB = 2**30


def choice(gib, speed, accuracy="exact", fits=None, note="", **settings):
    return Choice({key: str(value) for key, value in settings.items()}, int(gib * GIB), 1 / speed, speed, accuracy, fits, note)


TRIED = [
    choice(4, 100, precision="fp32", checkpointing="none", fits=False),
    choice(2, 80, precision="fp32", checkpointing="full", fits=True),
    choice(2, 300, "bf16", precision="bf16", checkpointing="none", fits=True),
    choice(3, 200, "bf16", precision="bf16", checkpointing="<b>&", fits=True, note="slow & large"),
    choice(0.5, 350, "fewer trained parameters", precision="bf16", checkpointing="none", adapt="lora", fits=True),
]
MEASURED = [
    choice(2.1, 290, "bf16", precision="bf16", checkpointing="none"),
    choice(1, 50, precision="nobody", checkpointing="x"),
]


class Reader(HTMLParser):
    """Collects the cells of each table, the texts of the points, and what stands open at the end."""

    def __init__(self):
        super().__init__()
        self.tables, self.points, self.open, self.sources = [], {}, [], []
        self._point, self._inside = None, ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [value for key, value in attrs.items() if key in ("src", "href", "xlink:href") and value[0] != "#"]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "g" and attrs.get("id", "").startswith("point-"):
            self._point = attrs["id"]
        self._inside = tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self._inside == "title" and self._point:
            self.points[self._point] = data
            self._point = None


def read(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_every_point_tells_all_its_settings():
    reader = read(page.render(TRIED, "a <model>", "tokens"))
    assert set(reader.points) == {f"point-{index}" for index in range(len(TRIED))}
    for index, one in enumerate(TRIED):
        lines = reader.points[f"point-{index}"].split("\n")
        assert lines[: len(one.settings)] == [f"{key}: {value}" for key, value in one.settings.items()]
        assert one.accuracy in lines
    assert reader.points["point-0"].split("\n")[2:] == ["4.00 GiB, 100 tokens/s, 10 ms a step", "exact", "doesn't fit"]
    assert reader.points["point-3"].endswith("\nfits\nslow & large")


def test_the_tables_hold_the_front_and_all():
    reader = read(page.render(TRIED, "a model", "samples", MEASURED, 3 * GIB))
    best, compared, everything = reader.tables
    assert best[0] == ["memory", "samples/s", "a step", "accuracy", "fits", "precision", "checkpointing", "adapt", ""]
    assert [row[0] for row in best[1:]] == ["512.00 MiB", "2.00 GiB", "2.00 GiB", "4.00 GiB"]
    assert best[1][1:] == ["350", "2.86 ms", "fewer trained parameters", "yes", "bf16", "none", "lora", ""]
    assert len(everything) == len(TRIED) + 1
    assert everything[4][6] == "<b>&"
    assert compared[1] == ["2.10 GiB", "290", "3.45 ms", "-4.8%", "-3.3%", "precision bf16, checkpointing none"]
    assert compared[2][3:5] == ["", ""], "what nobody predicted"


def test_the_page_needs_nothing_else_and_is_the_same_every_time():
    text = page.render(TRIED, "a <model> & more", "tokens", MEASURED, 3 * GIB)
    assert read(text).sources == []
    assert not re.search(r"https?://(?!www\.w3\.org|matplotlib\.org|purl\.org|creativecommons)", text)
    assert "<h1>a &lt;model&gt; &amp; more</h1>" in text
    assert "the budget is 3.00 GiB" in html.unescape(text)
    assert text == page.render(TRIED, "a <model> & more", "tokens", MEASURED, 3 * GIB)
    assert "Measured" not in page.render(TRIED, "m", "tokens")


def drawn(*args):
    with style.style():
        return page.draw(*args).axes[0]


def points(axes):
    return {line.get_gid(): line for line in axes.lines if str(line.get_gid()).startswith("point-")}


def test_points_stand_where_they_belong():
    found = points(drawn(TRIED, "m", "tokens"))
    for index, one in enumerate(TRIED):
        line = found[f"point-{index}"]
        assert (line.get_xdata()[0], line.get_ydata()[0]) == (one.bytes / GIB, one.units_per_second)
        assert (line.get_markeredgecolor() == "black") == (one in front(TRIED))
        assert (line.get_markerfacecolor() == "white") == (one.fits is False)
    looks = {accuracy: (line.get_color(), line.get_marker()) for accuracy, line in zip(
        [one.accuracy for one in TRIED], found.values(), strict=True)}  # fmt: skip
    assert len(set(looks.values())) == 3
    assert set(page.LOOKS) == set(ACCURACY)


def test_what_was_measured_is_joined_to_what_was_predicted():
    axes = drawn(TRIED, "m", "tokens", MEASURED)
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [line.get_ydata()[0] for line in crosses] == [290, 50]
    joined = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_color() == "black"]
    assert [list(line.get_ydata()) for line in joined] == [[300, 290]]


def test_the_budget_is_a_line_and_is_seen():
    axes = drawn(TRIED, "m", "tokens", (), 8 * GIB)
    assert axes.get_xlim()[1] > 8
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert list(line.get_xdata()) == [8, 8]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["exact", "bf16", "fewer trained parameters", "doesn't fit", "budget 8.00 GiB"]


def test_a_wide_range_is_logarithmic_and_a_narrow_one_starts_at_zero():
    wide = drawn(TRIED, "m", "tokens")
    assert wide.get_xscale() == "log"
    assert wide.get_yscale() == "linear"
    narrow = drawn(TRIED[:3], "m", "tokens")
    assert narrow.get_xscale() == "linear"
    assert narrow.get_xlim()[0] == narrow.get_ylim()[0] == 0


@pytest.mark.parametrize("tried", [[], TRIED[:1]])
def test_few_points_are_no_error(tried, tmp_path):
    read(page.render(tried, "m", "tokens"))
    page.write_picture(tmp_path / "p.png", tried, "m", "tokens")


def test_files(tmp_path):
    picture = imread(page.write_picture(tmp_path / "a" / "p.png", TRIED, "a $model$", "tokens", MEASURED, 3 * GIB))
    assert picture.shape[1] == 1200
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20
    assert (tmp_path / "a" / "p.svg") == page.write_picture(tmp_path / "a" / "p.svg", TRIED, "m", "tokens")
    page.write_page(tmp_path / "b" / "p.html", TRIED, "m", "tokens")
    read((tmp_path / "b" / "p.html").read_text(encoding="utf-8"))
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["p.html", "p.png", "p.svg"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/p.html can't be written \(.+\); choose another place"):
        page.write_page(tmp_path / "file" / "p.html", TRIED, "m", "tokens")
    with pytest.raises(InputError, match=r"p.jpg: the picture is written as PNG or SVG; the name must end in .png or .svg"):
        page.write_picture(tmp_path / "p.jpg", TRIED, "m", "tokens")
