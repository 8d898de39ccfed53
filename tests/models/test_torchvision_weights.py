"""Weights in single files: PyTorch's own format and safetensors, as torchvision and training scripts write them."""

import json
import pickle
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from tests.models.test_catalogue import CLASSES, made
from trainwright.models import catalogue, user
from trainwright.models.init import initialize
from trainwright.models.pretrained import allocate, fingerprint, load_into, load_tokenizer, locate, open_weights, read_config
from trainwright.models.torchvision_weights import TorchWeights
from trainwright.recipe import Init, InputError, Task


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return torchvision.models.resnet18()


def ours(outputs=1000):
    with torch.device("meta"):
        return catalogue.make("resnet18", {}, (3, 224, 224), Task("classes", outputs))


def same(state, other):
    assert set(state) == set(other)
    assert all(torch.equal(value, other[name]) for name, value in state.items())


WRITERS = {
    "plain.pth": torch.save,
    "old.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "state_dict.pth": lambda state, path: torch.save({"state_dict": state, "epoch": 3, "note": "x"}, path),
    "model.pt": lambda state, path: torch.save({"model": state, "optimizer": {"lr": 0.1}}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{name}": value for name, value in state.items()}, path),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, path),
    "plain.safetensors": lambda state, path: save_file(dict(state), path),
}


@pytest.mark.parametrize("file", WRITERS)
def test_a_file_is_read(tmp_path, theirs, file):
    WRITERS[file](theirs.state_dict(), tmp_path / file)
    found = locate(str(tmp_path / file))
    assert read_config(found) == {}
    model = ours()
    weights = open_weights(found)
    assert not load_into(model, weights).uninitialized
    same(model.state_dict(), theirs.state_dict())
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})  # in place: nothing is the file's
    again = ours()
    load_into(again, weights)
    same(again.state_dict(), theirs.state_dict())


def test_dtypes(tmp_path):
    torch.save({"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.tensor(4)}, tmp_path / "x.pt")
    weights = TorchWeights(tmp_path / "x.pt")
    assert weights.names() == ["a", "b"]
    assert (weights.shape("a"), weights.shape("b")) == ((2, 3), ())
    assert (weights.dtype("a"), weights.dtype("b")) == (torch.bfloat16, torch.int64)
    assert (weights.load("a").dtype, weights.load("a", torch.float32).dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("file", ["plain.pth", "plain.safetensors"])
def test_another_number_of_classes_keeps_the_trunk(tmp_path, theirs, file):
    WRITERS[file](theirs.state_dict(), tmp_path / file)
    weights = open_weights(locate(str(tmp_path / file)))
    with pytest.raises(InputError, match=r"fc\.weight is \[1000, 512\] in the file but \[10, 512\].*(?s:.)*match: overlap"):
        load_into(ours(10), weights)
    model = ours(10)
    report = load_into(model, weights, match="overlap")
    assert report.uninitialized == {"fc.weight", "fc.bias"}
    assert len(report.matched) == len(theirs.state_dict()) - 2
    assert report.describe().count("to be initialised") == 2
    assert not report.unused
    new = allocate(model, "cpu")
    assert new == report.uninitialized
    initialize(model, Init(), new, 0)
    state = theirs.state_dict()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])} == new
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_old_files_without_counters(tmp_path, theirs):
    state = {name: value for name, value in theirs.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    model = ours()
    report = load_into(model, open_weights(locate(str(tmp_path / "old.pth"))))
    assert len(report.new) == 20
    assert all(name.endswith("num_batches_tracked") for name in report.new)
    names = allocate(model, "cpu")
    initialize(model, Init(), names, 0)
    assert all(int(value) == 0 for name, value in model.state_dict().items() if "num_batches" in name)
    same({n: v for n, v in model.state_dict().items() if n in state}, state)
    del state["bn1.running_mean"]
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(InputError, match=r"missing in the file: bn1\.running_mean\n"):
        load_into(ours(), open_weights(locate(str(tmp_path / "old.pth"))))


class Exploit:
    def __reduce__(self):
        return print, ("PWNED",)


def refused(path):
    with pytest.raises(InputError) as caught:
        open_weights(locate(str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: nn.Linear(2, 2), ["holds a torch.nn.modules.linear.Linear, not only tensors", "run code", "state_dict()"]),
        (lambda: {"state_dict": nn.Linear(2, 2)}, ["torch.nn.modules.linear.Linear"]),
        (lambda: {"x": Exploit()}, ["print, not only tensors"]),
        (lambda: [torch.ones(2)], ["holds a list", "a dict of names and tensors"]),
        (lambda: torch.ones(2), ["holds a Tensor"]),
        (lambda: {}, ["an empty dict"]),
        (lambda: {"state_dict": {}}, ["an empty dict under 'state_dict'"]),
        (lambda: {"weight": torch.ones(2), "epoch": 3}, ["'epoch' is of type int"]),
        (lambda: {"model": {"weight": torch.ones(2), "lr": "x"}}, ["'lr' under 'model' is of type str"]),
        (lambda: {3: torch.ones(2)}, ["3 is no name"]),
        (lambda: {"w": torch.eye(3).to_sparse()}, ["'w' is torch.sparse_coo, not dense"]),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")
def test_what_is_no_state_dict_is_refused(tmp_path, capfd, content, words, zipped):
    torch.save(content(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "x.pth")
    assert all(word in message for word in words), message
    assert "PWNED" not in capfd.readouterr().out


@pytest.mark.parametrize("data", [b"", b"abc", b"PK\x03\x04abc", b"x" * 5000, pickle.dumps({"a": 1})])
def test_damaged_files(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    assert "truncated or damaged" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.3, 0.9, -1])
def test_truncated_files(tmp_path, zipped, keep):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep > 0 else keep])
    assert "truncated or damaged" in refused(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*TorchScript.*:UserWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    assert "TorchScript" in refused(tmp_path / "x.pt")


def test_files_that_hold_no_model(tmp_path):
    (tmp_path / "x.onnx").touch()
    with pytest.raises(InputError, match=r"neither a folder nor a \.gguf, \.safetensors, \.pth, \.pt file"):
        locate(str(tmp_path / "x.onnx"))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match="LoRA adapter"):
        locate(str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "y").mkdir()
    torch.save({}, tmp_path / "y" / "x.pth")
    with pytest.raises(InputError, match=r"give the file itself: x\.pth"):
        locate(str(tmp_path / "y"))
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(locate(str(tmp_path / "y" / "x.pth")))


@pytest.mark.parametrize("file", ["plain.pth", "old.pt", "plain.safetensors"])
def test_fingerprints(tmp_path, theirs, file):
    WRITERS[file](theirs.state_dict(), tmp_path / file)
    first = fingerprint(locate(str(tmp_path / file)))
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    moved = (tmp_path / file).rename(tmp_path / f"other{(tmp_path / file).suffix}")
    assert fingerprint(locate(str(moved))) == first
    data = bytearray(moved.read_bytes())
    data[len(data) // 2] ^= 1
    moved.write_bytes(data)
    assert fingerprint(locate(str(moved))) != first


def test_a_runs_own_folder(tmp_path):
    model = made("cnn")
    config = {"architecture": "cnn", "options": {}, "inputs": [3, 20, 24], "task": {"kind": "classes", "outputs": 5}}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = locate(str(tmp_path))
    assert found.kind == "folder"
    assert read_config(found) == config
    other = made("cnn", seed=1)
    assert not load_into(other, open_weights(found)).uninitialized
    same(other.state_dict(), model.state_dict())


def test_save_folder_does_not_call_them_llamas(tmp_path):
    from trainwright.models.pretrained import save_folder

    save_folder(tmp_path / "out", made("cnn").state_dict(), {"architecture": "cnn", "inputs": [3, 20, 24]})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architecture": "cnn", "inputs": [3, 20, 24], "dtype": "float32",
    }  # fmt: skip


# A user's function is told what the data asks for, where it wants to know


def plain(size=3):
    return nn.Linear(size, size)


def told(inputs, outputs, bias=True):
    return nn.Linear(inputs[0], outputs, bias=bias)


class Module(nn.Linear):
    def __init__(self, outputs, size=4):
        super().__init__(size, outputs)


def greedy(**options):
    assert set(options) == {"size"}
    return nn.Linear(options["size"], 1)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("plain", {}, (3, 3)), ("plain", {"size": 2}, (2, 2)), ("told", {}, (5, 7)), ("told", {"outputs": 2}, (2, 7)),
        ("told", {"inputs": [9], "bias": False}, (5, 9)), ("Module", {}, (5, 4)), ("greedy", {"size": 6}, (1, 6)),
    ],
)  # fmt: skip
def test_a_users_function_is_told_what_it_asks_for(name, options, shape):
    made = user.make(f"{__name__}:{name}", options, 0, inputs=(7,), outputs=5)
    assert made.weight.shape == shape


def test_a_users_function_of_text_is_told_nothing():
    assert user.make(f"{__name__}:plain", {}, 0).weight.shape == (3, 3)
    with pytest.raises(InputError, match=r"model\.options don't fit .*outputs"):
        user.make(f"{__name__}:Module", {}, 0)


def test_an_unknown_architecture_names_the_nearest():
    words = r"'resnet19' is unknown \(did you mean 'resnet\d+'\?\); give decoder, mlp.* or module:function"
    with pytest.raises(InputError, match=words):
        user.make("resnet19", {}, 0, inputs=(3, 8, 8), outputs=CLASSES.outputs)
