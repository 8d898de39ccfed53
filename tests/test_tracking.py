"""metrics.jsonl and TensorBoard of a resumed run are those of an unbroken one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainwright.recipe import InputError
from trainwright.tracking import Tracker, environment, read_metrics


def measure(tracker: Tracker, first: int, last: int) -> None:
    """What a run logs: each step, and an evaluation after every fifth."""
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1 / (step + 1), "tokens": 1000 * step})
        if step % 5 == 0:
            tracker.log(step, {"loss": 2 / (step + 1)}, split="held_out")


def strict(line: str) -> Any:
    """As a reader that knows no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_lines_are_on_file_at_once_and_keep_integers_and_every_bit(tmp_path: Path) -> None:
    with Tracker(tmp_path / "new" / "run", tensorboard=False) as tracker:
        tracker.log(1, {"loss": 0.1 + 0.2, "tokens": 2**53 + 1})
        tracker.log(1, {"loss": torch.tensor(0.5), "f1": np.float32(0.25)}, split="held_out")
        lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [
        {"step": 1, "loss": 0.30000000000000004, "tokens": 2**53 + 1},
        {"step": 1, "split": "held_out", "loss": 0.5, "f1": 0.25},
    ]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {"loss": float("nan"), "grad_norm": float("-inf"), "learning_rate": 0.1})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.1, "non_finite": ["loss", "grad_norm"]}
    assert strict(line) == record
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]


def test_reserved_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        with pytest.raises(ValueError, match=r"\['split', 'step'\]"):
            tracker.log(1, {"step": 3, "split": 0.5})
        with pytest.raises(ValueError, match="could not convert"):
            tracker.log(1, {"loss": "high"})  # type: ignore[dict-item]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_has_the_same_scalars(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        measure(tracker, 1, 10)
    shown = scalars(tmp_path)
    assert set(shown) == {"train/loss", "train/tokens", "held_out/loss"}
    for tag, points in shown.items():
        split, name = tag.split("/")
        lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("split", "train") == split]
        assert [step for step, _ in points] == [line["step"] for line in lines]
        assert [value for _, value in points] == pytest.approx([line[name] for line in lines])


def test_tensorboard_is_imported_only_when_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {"loss": 1.0})
    with Tracker(tmp_path, tensorboard=True) as tracker, pytest.raises(ImportError):
        tracker.log(2, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("resumed_from", [-1, 0, 5, 7, 10])
def test_a_resumed_run_has_the_file_of_an_unbroken_one(tmp_path: Path, resumed_from: int) -> None:
    for name, steps in (("unbroken", [(0, 12)]), ("resumed", [(0, 10), (resumed_from + 1, 12)])):
        for first, last in steps:
            with Tracker(tmp_path / name, tensorboard=False) as tracker:
                tracker.truncate_after(first - 1)
                measure(tracker, first, last)
    assert (tmp_path / "resumed" / "metrics.jsonl").read_text() == (tmp_path / "unbroken" / "metrics.jsonl").read_text()
    assert os.listdir(tmp_path / "resumed") == ["metrics.jsonl"]


def test_tensorboard_forgets_the_steps_that_are_run_again(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        measure(tracker, 1, 10)
    with Tracker(tmp_path) as tracker:
        tracker.truncate_after(5)
        tracker.log(6, {"loss": 77.0})
        tracker.log(7, {"loss": 78.0})
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in scalars(tmp_path)["train/loss"]][-2:] == [77.0, 78.0]
    assert [step for step, _ in scalars(tmp_path)["held_out/loss"]] == [5]


def test_a_tracker_can_be_truncated_while_it_is_open(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        measure(tracker, 1, 4)
        tracker.truncate_after(2)
        measure(tracker, 3, 4)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4]


def test_a_file_cut_off_anywhere_is_read_resumed_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them take seconds
    path = tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, tensorboard=False) as tracker:
        measure(tracker, 4, 5)
    whole, records = path.read_bytes(), read_metrics(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert (kept := read_metrics(path)) == records[: len(kept)]
        assert len(kept) >= whole[:cut].count(b"\n")
        with Tracker(tmp_path, tensorboard=False) as tracker:  # goes on without knowing
            tracker.log(7, {"loss": 0.5})
        assert read_metrics(path) == [*kept, {"step": 7, "loss": 0.5}]
        path.write_bytes(whole[:cut])
        with Tracker(tmp_path, tensorboard=False) as tracker:
            tracker.truncate_after(3)
            measure(tracker, 4, 5)
        assert path.read_bytes() == whole


def test_blocks_of_zeros_that_a_power_cut_leaves_are_a_cut_off_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 4000)
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "7", "null", "{}", '{"step": "two"}', "\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n', encoding="latin-1")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        read_metrics(path)


def test_truncation_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        measure(tracker, 1, 10)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker(tmp_path).truncate_after(5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    Tracker(tmp_path).truncate_after(5)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 5]
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncating_where_nothing_was_logged(tmp_path: Path) -> None:
    Tracker(tmp_path).truncate_after(5)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_flush_brings_everything_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with Tracker(tmp_path) as tracker:
        tracker.flush()
        tracker.log(1, {"loss": 0.5})
        monkeypatch.setattr(os, "fsync", synced.append)
        tracker.flush()
        assert scalars(tmp_path) == {"train/loss": [(1, 0.5)]}
    assert synced


def test_environment_is_strict_json_without_paths() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["threads"] == torch.get_num_threads()
    assert {"transformers", "platform", "cpu"} <= facts.keys()
    text = json.dumps(facts, allow_nan=False)
    assert '"/' not in text
    assert str(Path.home()) not in text
