"""Wrong images, tables and settings through the command line: exit code 2, one clear message, nothing half-written."""

import gzip
import struct

import numpy as np
import pytest
import yaml

from tests import small
from trainwright.__main__ import run


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with good and bad data, and a good recipe."""
    monkeypatch.chdir(tmp_path)
    small.image_folder(tmp_path / "pictures")
    small.image_folder(tmp_path / "damaged")
    (tmp_path / "damaged/class1/3.png").write_bytes((tmp_path / "damaged/class1/3.png").read_bytes()[:120])
    small.image_folder(tmp_path / "single", classes=1)
    small.image_folder(tmp_path / "hollow")
    (tmp_path / "hollow/class9").mkdir()
    (tmp_path / "nothing").mkdir()
    magic = tmp_path / "magic"
    magic.mkdir()
    pixels, labels = np.zeros((20, 6, 6), np.uint8), np.arange(20, dtype=np.uint8) % 4
    (magic / "train-images-idx3-ubyte").write_bytes(b"\x00\x01" + idx(pixels)[2:])
    (magic / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    np.savez(tmp_path / "labels.npz", images=np.zeros((9, 6, 6), np.uint8), labels=np.array([0, 1, -3] * 3))
    rows = "".join(f"{20 + i},{'a' if i % 2 else 'b'},{i * 1.5}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text("age,group,score\n" + rows)
    (tmp_path / "bad.csv").write_text("age,group,score\n" + rows.replace("27,", "old,"))
    mapping = small.mapping(tmp_path, data={"kind": "images", "source": "pictures"}, training__batch_size=8, run__folder="out")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(mapping))
    return tmp_path


def refused(capsys, *arguments):
    """The message of a refusal."""
    code = run(["train", "good.yaml", *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("trainwright: error:") == 1
    return captured.err


TABLE = ["data={kind: table, source: rows.csv, target: score}", "loss.name=mse"]
CASES = {
    "no such folder": (["data.source=picturse"], ["picturse", "pictures"]),
    "empty folder": (["data.source=nothing"], ["nothing"]),
    "empty class": (["data.source=hollow"], ["class9"]),
    "one class": (["data.source=single"], ["single class"]),
    "truncated image": (["data.source=damaged"], ["3.png", "skip"]),
    "wrong magic": (["data.source=magic"], ["train-images-idx3-ubyte", "magic"]),
    "labels out of range": (["data.source=labels.npz"], ["labels.npz", "-3"]),
    "missing column": ([TABLE[0].replace("target: score", "target: scor"), TABLE[1]], ["scor", "score", "age"]),
    "bad cell": ([TABLE[0].replace("rows", "bad"), TABLE[1]], ["bad.csv", "9", "age", "old"]),
    "a size that the head can't take": (["model={architecture: vgg16}"], ["224", "any"]),
    "a metric that doesn't fit": (["metrics=[rmse]"], ["rmse", "accuracy"]),
    "unknown metric": (["metrics=[acuracy]"], ["acuracy", "accuracy"]),
    "unknown torch optimizer": (["optimizer={name: torch, type: NAdamm}"], ["NAdamm", "NAdam"]),
    "unknown optimizer argument": (["optimizer={name: torch, type: NAdam, arguments: {bettas: 1}}"], ["bettas", "betas"]),
    "no direction": (["evaluation={every: 2, best: {metric: accuracy}}"], ["direction", "minimize"]),
    "best of what isn't measured": (
        ["evaluation={every: 2, best: {metric: auroc, direction: maximize}}"],
        ["evaluation.best.metric", "auroc", "metrics"],
    ),
    "a loss for numbers": (["loss.name=mse"], ["classes", "cross_entropy"]),
    "too many classes for bce": (["loss.name=bce"], ["bce", "class0"]),
    "weights of another length": (["loss.weights=[1, 2]"], ["weights", "3"]),
    "a decoder for images": (["model.architecture=decoder"], ["decoder", "images"]),
    "unknown architecture": (["model.architecture=resnet19"], ["resnet19", "resnet18"]),
    "unknown option": (["model.options={hiden: [3]}"], ["hiden", "hidden"]),
    "an option of the wrong type": (["model.options={hidden: many}"], ["hidden", "many"]),
    "a batch larger than a split": (["training={epochs: 1, steps: 2}"], ["epochs or steps"]),
    "colours of gray": (["data={kind: images, source: digits, augment: {saturation: 0.5}}"], ["saturation"]),
    "an init without effect": (["model.init={recurrent: orthogonal}"], ["recurrent"]),
    "a milestone out of range": (["schedule={name: step, milestones: [99]}"], ["99"]),
    "freezing what isn't there": (["adapt={method: full, freeze: [layrs.*]}"], ["layrs", "layers"]),
    "no such weights": (["model.pretrained=resnet.pth"], ["resnet.pth"]),
    "samples of text": (["evaluation.samples=3"], ["samples"]),
    "stop without evaluations": (
        ["evaluation={stop: {metric: loss, direction: minimize}}"],
        ["evaluation.every"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(place, capsys, case):
    overrides, said = CASES[case]
    message = refused(capsys, *overrides)
    assert all(word in message for word in said), message
    assert not (place / "out").exists(), "nothing half-written"


def test_damaged_images_are_skipped_if_asked(place, capsys):
    assert run(["train", "good.yaml", "data.source=damaged", "data.unreadable=skip", "data.held_out=null"]) == 0
    assert "3.png" in capsys.readouterr().err


def test_predict_refuses(place, capsys):
    assert run(["train", "good.yaml"]) == 0
    capsys.readouterr()
    for arguments, said in (
        (["out", "pictures/class0/00.png"], "0.png"),
        (["out", "rows.csv"], ".png"),
        (["outt", "pictures"], "out"),
        (["out", "damaged/class1/3.png"], "3.png"),
    ):
        assert run(["predict", *arguments]) == 2
        message = capsys.readouterr().err
        assert said in message
        assert "Traceback" not in message


def test_predict_streams_a_folder(place, capsys):
    import json

    assert run(["train", "good.yaml"]) == 0
    capsys.readouterr()
    assert run(["predict", "out", "pictures"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24
    assert run(["predict", "out", "pictures/class0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["count"] == 8
    assert {record["class"] for record in document["predictions"]} <= {"class0", "class1", "class2"}
