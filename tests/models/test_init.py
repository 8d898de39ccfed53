"""First values: exactly the named ones, by torch.nn.init with the same seed, and the same on every call."""

import math

import pytest
import torch
from torch import nn

from tests.models.test_catalogue import SMALL, made
from trainwright.models import catalogue, decoder
from trainwright.models.init import draw, initialize, seed_of
from trainwright.models.weights import allocate
from trainwright.recipe import Init, InputError

SCHEMES = ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal"]
NONLINEARITIES = ["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"]
LLAMA = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "attention_bias": True,
}  # fmt: skip


def empty(name, dtype=torch.float32, **options):
    """A model with memory, but without values."""
    with torch.device("meta"):
        usual, inputs, task = SMALL[name]
        model = catalogue.make(name, {**usual, **options}, inputs, task).to(dtype)
    return model, allocate(model, "cpu")


def filled(name, section, seed=0, **options):
    model, names = empty(name, **options)
    initialize(model, section, names, seed)
    return model


def torchs(scheme, weight, nonlinearity, name, seed=0):
    """The same by torch.nn.init."""
    torch.manual_seed(seed_of(seed, name))
    new, gain = torch.empty(weight.shape), nn.init.calculate_gain(nonlinearity)
    if scheme.startswith("xavier"):
        return getattr(nn.init, f"{scheme}_")(new, gain=gain)
    if scheme.startswith("kaiming"):
        return getattr(nn.init, f"{scheme}_")(new, a=0.01, nonlinearity=nonlinearity)
    return nn.init.orthogonal_(new, gain=gain)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_scheme_is_torchs_with_the_same_seed(scheme, nonlinearity):
    model = filled("cnn", Init(scheme=scheme, nonlinearity=nonlinearity), seed=3)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    assert {p.ndim for p in matrices.values()} == {2, 4}
    for name, weight in matrices.items():
        assert torch.equal(weight, torchs(scheme, weight, nonlinearity, name, seed=3)), name


@pytest.mark.parametrize(
    ("scheme", "std"),
    [
        ("xavier_uniform", 5 / 3 * math.sqrt(2 / 500)), ("xavier_normal", 5 / 3 * math.sqrt(2 / 500)),
        ("kaiming_uniform", 5 / 3 / math.sqrt(400)), ("kaiming_normal", 5 / 3 / math.sqrt(400)), ("orthogonal", 5 / 3 / 20),
    ],
)  # fmt: skip
def test_the_spread_is_that_of_the_papers(scheme, std):
    weight = torch.empty(100, 400)
    draw(weight, scheme, "tanh")
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 0.01 * std * 10


def test_a_type_has_its_own_scheme_and_the_rest_keeps_its_start():
    section = Init(linear="kaiming_uniform", conv="orthogonal")
    model, plain = filled("cnn", section), filled("cnn", Init())
    for name, value in model.state_dict().items():
        matrix = value.ndim > 1
        assert torch.equal(value, plain.state_dict()[name]) == (not matrix), name
    scheme = {2: "kaiming_uniform", 4: "orthogonal"}
    for name, value in model.named_parameters():
        if value.ndim > 1:
            assert torch.equal(value, torchs(scheme[value.ndim], value, "relu", name))


def test_default_for_a_type_leaves_it_out_of_the_scheme_for_all():
    model, plain = filled("cnn", Init(scheme="orthogonal", linear="default")), filled("cnn", Init())
    assert torch.equal(model.head.weight, plain.head.weight)
    assert not torch.equal(model.stages[0][0].weight, plain.stages[0][0].weight)


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn", "lstm", "gru", "unet"])
def test_the_own_start_is_the_layers_reset_with_its_seed(name):
    model = filled(name, Init(), seed=7)
    for prefix, layer in model.named_modules():
        if hasattr(layer, "reset_parameters"):
            before = [value.clone() for value in layer.state_dict().values()]
            torch.manual_seed(seed_of(7, prefix))
            layer.reset_parameters()
            for mine, theirs in zip(before, layer.state_dict().values(), strict=True):
                assert torch.equal(mine, theirs), prefix


@pytest.mark.parametrize("name", SMALL)
def test_every_name_gets_values_and_the_summary_says_which(name):
    model, names = empty(name)
    assert names == set(model.state_dict())
    change = initialize(model, Init(), names, 5)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert change.summary == "each layer's own; seed 5"
    assert change.technique == "init"
    assert change.names == tuple(model.state_dict())


def test_the_summary_in_words():
    def told(name, **section):
        model, names = empty(name)
        return initialize(model, Init(**section), names, 0).summary

    assert told("mlp", linear="kaiming_uniform") == "linear: kaiming_uniform (relu); others: the layer's own; seed 0"
    assert told("cnn", scheme="orthogonal", nonlinearity="tanh") == (
        "linear, conv: orthogonal (tanh); others: the layer's own; seed 0"
    )
    assert told("gru", recurrent="orthogonal", linear="xavier_normal") == (
        "linear: xavier_normal (relu); recurrent: orthogonal (relu); others: the layer's own; seed 0"
    )
    model, _ = empty("mlp")
    assert initialize(model, Init(), set(), 0).summary == "nothing to draw: every value is there already"


@pytest.mark.parametrize("section", [Init(), Init(scheme="orthogonal")], ids=["own", "scheme"])
@pytest.mark.parametrize("name", ["cnn", "gru", "resnet18"])
def test_values_depend_on_the_seed_alone_and_the_global_generator_is_left_alone(name, section):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = filled(name, section).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = filled(name, section).state_dict(), filled(name, section, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    differs = {key for key in first if not torch.equal(first[key], other[key])}
    assert {key for key in first if first[key].ndim > 1} <= differs


def test_no_two_layers_start_alike():
    model = filled("mlp", Init(), hidden=[9, 9, 9])
    assert not torch.equal(model.layers[1][0].weight, model.layers[2][0].weight)
    model = filled("mlp", Init(scheme="xavier_normal"), hidden=[9, 9, 9])
    assert not torch.equal(model.layers[1][0].weight, model.layers[2][0].weight)


@pytest.mark.parametrize("section", [Init(), Init(scheme="kaiming_normal")], ids=["own", "scheme"])
def test_only_the_named_ones_change_and_they_are_those_of_a_whole_start(section):
    whole, (model, _) = filled("resnet18", section), empty("resnet18")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(3)
        for name in ("fc.weight", "layer1.0.bn1.running_mean"):
            model.state_dict()[name].fill_(torch.nan)
    names = {"fc.weight", "layer1.0.bn1.running_mean", "bn1.num_batches_tracked"}
    change = initialize(model, section, names, 0)
    assert set(change.names) == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name] if name in names else torch.full_like(value, 3)), name


def test_a_second_call_gives_the_same():
    model, names = empty("cnn")
    for section in (Init(), Init(scheme="xavier_uniform")):
        initialize(model, section, names, 0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        initialize(model, section, names, 0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("section", [Init(), Init(scheme="orthogonal"), Init(scheme="xavier_uniform")], ids=lambda s: s.scheme)
@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_half_precision_is_the_rounded_full_one(name, section):
    wide, (narrow, names) = filled(name, section), empty(name, torch.bfloat16)
    initialize(narrow, section, names, 0)
    for key, value in narrow.state_dict().items():
        assert torch.equal(value, wide.state_dict()[key].to(value.dtype)), key


@pytest.mark.parametrize(("name", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_orthogonal_is_per_gate(name, gates):
    options = {"hidden": 6, "bidirectional": True, "layers": 2}
    model = filled(name, Init(recurrent="orthogonal", nonlinearity="linear"), **options)
    seen = 0
    for key, weight in model.recurrent.named_parameters():
        if key.startswith("weight_"):
            for gate in weight.view(gates, 6, -1):
                small = min(gate.shape)
                product = gate @ gate.T if gate.shape[0] == small else gate.T @ gate
                torch.testing.assert_close(product, torch.eye(small), atol=1e-5, rtol=0)
                seen += 1
        else:
            assert torch.equal(weight, filled(name, Init(), **options).recurrent.get_parameter(key))
    assert seen == gates * 8


@pytest.mark.parametrize(
    ("name", "section", "words"),
    [
        ("mlp", {"recurrent": "orthogonal"}, ["model.init.recurrent has no effect", "it has linear"]),
        ("resnet18", {"embedding": "default"}, ["model.init.embedding has no effect", "it has linear, conv"]),
        ("gru", {"conv": "xavier_uniform"}, ["model.init.conv has no effect", "it has linear, recurrent"]),
    ],
)
def test_a_type_that_the_model_lacks(name, section, words):
    model, names = empty(name)
    for asked in (names, set()):
        with pytest.raises(InputError) as caught:
            initialize(model, Init(**section), asked, 0)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_keeps_its_own_start_but_for_the_scheme(tied):
    def started():
        with torch.device("meta"):
            model = decoder.Decoder(decoder.read_config({**LLAMA, "tie_word_embeddings": tied}))
        names = allocate(model, "cpu")
        return model, names

    plain, names = started()
    initialize(plain, Init(), names, 0)
    for name, value in plain.named_parameters():
        if value.ndim == 1:
            assert value.unique().tolist() == [float(name.endswith("norm.weight"))], name
        else:
            assert value.std().item() == pytest.approx(plain.config.initializer_range, rel=0.1), name
    model, names = started()
    initialize(model, Init(linear="xavier_uniform", embedding="orthogonal"), names, 0)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            assert torch.equal(value, plain.get_parameter(name)), name
        else:
            scheme = "orthogonal" if "embed" in name else "xavier_uniform"
            assert torch.equal(value, torchs(scheme, value, "relu", name)), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_padding_stays_zero_and_other_weights_are_no_matrices():
    model = nn.ModuleDict({"e": nn.Embedding(7, 3, padding_idx=2), "n": nn.LayerNorm(3)})
    initialize(model, Init(scheme="xavier_normal"), set(model.state_dict()), 0)
    assert model["e"].weight[2].abs().max() == 0
    assert (model["e"].weight.abs().sum(1) == 0).sum() == 1
    assert (model["n"].weight == 1).all()


def test_what_has_no_start_of_its_own_is_a_bug():
    model = nn.Module()
    model.scale = nn.Parameter(torch.full((3,), torch.nan))
    with pytest.raises(AssertionError, match="scale"):
        initialize(model, Init(), {"scale"}, 0)
    with pytest.raises(AssertionError, match="no part"):
        initialize(made("mlp"), Init(), {"nothing"}, 0)
