"""Models whose matrix products processes share, against the same model in one process: losses, every gradient, every weight."""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import ranks
from trainwright import losses
from trainwright.adapt import lora, norms
from trainwright.adapt import partial as partial_tuning
from trainwright.models.contract import Stretch, TensorPlan
from trainwright.models.decoder import Decoder, KVCache, read_config
from trainwright.models.mlp import Mlp, MlpOptions
from trainwright.models.resnet import ResNet, ResnetOptions
from trainwright.models.vgg import Vgg16, VggOptions
from trainwright.parallel import tensor
from trainwright.parallel.mesh import Axis
from trainwright.pieces import Piece
from trainwright.recipe import CrossEntropy, InputError, Lora, Partial

CONFIG = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip
NINE = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}  # as SmolLM2 has them
ROWS, LENGTH, STEPS = 2, 12, 3


@dataclass(frozen=True)
class Case:
    """A model, what of it learns, and how it is shared."""

    config: dict = field(default_factory=dict)
    adapt: Lora | Partial | None = None
    dtype: torch.dtype = torch.float64
    sequence: bool = False
    section: CrossEntropy = field(default_factory=CrossEntropy)
    optimizer: str = "adamw"


def axis() -> Axis:
    return Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def decoder(case: Case, device: str = "cpu") -> Decoder:
    """The whole model of a case, with random values everywhere: LoRA's factors, norms and biases too."""
    with torch.device(device):
        model = Decoder(read_config({**CONFIG, **case.config}))
    if isinstance(case.adapt, Lora):
        lora.apply(model, case.adapt)
    elif isinstance(case.adapt, Partial):
        partial_tuning.apply(model, case.adapt)
    model.to(case.dtype)
    return model if device == "meta" else randomise(model)


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2, generator=generator)
            if p.ndim == 1:
                p.add_(1.0)
    return model


def tokens(vocabulary: int, step: int = 0) -> tuple[torch.Tensor, ...]:
    """Packed rows: documents of several lengths, and labels for most positions."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.3] = -100
    documents = torch.tensor([0, 5, 12, 13, 24], dtype=torch.int32)
    lengths = documents.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths]).view(ROWS, LENGTH)
    return ids, positions, documents, labels


def shard_of(sharding: tensor.Sharding | None) -> losses.Shard | None:
    if sharding is None or sharding.head is None:
        return None
    return losses.Shard(sharding.head.start[0], sharding.head.shape[0], dist.group.WORLD)


def train_decoder(model, case: Case, sharding=None):
    """(losses, gradients of each step, the weights in the end)."""

    def objective(step):
        ids, positions, documents, labels = tokens(model.config.vocab_size, step)
        hidden = model(ids, positions, documents)
        return losses.token_cross_entropy(hidden, model.head_weight(), labels, case.section, shard=shard_of(sharding))[0]

    return train(model, objective, case.optimizer, sharding)


def train(model, objective, optimizer="adamw", sharding=None):
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kind = {"adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, eps=1e-6), "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-3)}
    stepper = kind[optimizer](list(learning.values()))
    values, gradients = [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = objective(step)
        loss.backward()
        if sharding is not None:
            tensor.sum_partial([learning[name].grad for name in sharding.partial], axis())
        values.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in learning.items()})
        stepper.step()
        stepper.zero_grad()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return values, gradients, {name: value.detach() for name, value in state.items()}


def compare(whole, shared, sharding, tolerance):
    """Everything of a shared model against its piece of the single process's; the names whose gradient isn't all zero.

    ``tolerance`` is relative to the largest number of a tensor. (A bias before BatchNorm has no gradient but rounding.)
    """
    torch.testing.assert_close(torch.tensor(shared[0]), torch.tensor(whole[0]), rtol=tolerance, atol=0.0)
    steps = [*zip(whole[1], shared[1], strict=True), (whole[2], shared[2])]
    for theirs, ours in steps:
        assert theirs.keys() == ours.keys()
        for name, expected in theirs.items():
            piece = sharding.pieces.get(name) or Piece.all_of(tuple(expected.shape))
            error, largest = (ours[name] - piece.of(expected)).abs().max(), expected.abs().max()
            assert ours[name].dtype == expected.dtype
            assert error <= tolerance * largest + 1e-13, f"{name} is {error} off, of {largest}"
    return {name for name, gradient in whole[1][0].items() if gradient.abs().max() > 0}


def replicas_agree(state, sharding):
    """Whether what is whole is the same, bit by bit, on every process."""
    for name, value in state.items():
        if name not in sharding.pieces:
            others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(others, value.contiguous())
            assert all(torch.equal(other, value) for other in others), name


def check_decoder(case: Case):
    """In each process: the shared decoder does what the whole one does. Gives the sharding, without its group."""
    whole, model = decoder(case), decoder(case)
    sharding = tensor.apply(model, axis(), sequence=case.sequence)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    shared = train_decoder(model, case, sharding)
    moving = compare(train_decoder(whole, case), shared, sharding, 1e-10 if case.dtype == torch.float64 else 1e-5)
    replicas_agree(shared[2], sharding)
    assert moving == {name for name, p in whole.named_parameters() if p.requires_grad}
    return sharding


def tiles(shardings):
    """That the pieces of all processes make the whole, once."""
    for name, first in shardings[0].pieces.items():
        cover = torch.zeros(first.shape, dtype=torch.int64)
        for sharding in shardings:
            cover[sharding.pieces[name].slices()] += 1
        assert (cover == 1).all(), name


LORA = {"method": "lora", "rank": 3, "alpha": 6.0, "targets": "all-linear"}
BIASES = {"attention_bias": True, "mlp_bias": True}
ADAPT = {
    "full": None,
    "lora": Lora(**LORA),
    "dropout": Lora(**{**LORA, "dropout": 0.1}),
    "some": Lora(**{**LORA, "targets": ["v_proj", "down_proj", "lm_head"], "dropout": 0.1}),
    "norms": Partial(method="partial", train=["*norm.weight", "*bias", "lm_head.weight"]),
    "last": Partial(method="partial", train=["model.layers.1.*"]),
}


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("size", [2, 4])
def test_decoder(size, adapt, tied, sequence):
    config = {**BIASES, "tie_word_embeddings": tied}
    if tied and adapt == "norms":
        pytest.skip("a tied head has no name of its own")
    tiles(ranks.run(size, check_decoder, Case(config, ADAPT[adapt], sequence=sequence)))


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("adapt", ["full", "dropout"])
def test_decoder_in_float32(adapt, sequence):
    section = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)
    case = Case({}, ADAPT[adapt], torch.float32, sequence, section, "sgd")
    ranks.run(2, check_decoder, case)


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("adapt", ["full", "dropout"])
def test_nine_heads_on_three(adapt, sequence):
    """As SmolLM2: 9 heads, 3 KV heads; its vocabulary needn't divide."""
    tiles(ranks.run(3, check_decoder, Case({**NINE, "tie_word_embeddings": True}, ADAPT[adapt], sequence=sequence)))


def names_of_partial(case: Case):
    return tensor.apply(decoder(case, "meta"), axis(), sequence=case.sequence).partial


def test_partial_gradients_are_named():
    """Norms' and row biases' only where the length is divided; of LoRA's factors those that aren't split."""
    assert ranks.run(2, names_of_partial, Case(BIASES))[0] == ()
    factors = ranks.run(2, names_of_partial, Case(BIASES, ADAPT["lora"], sequence=True))[0]
    assert Counter(".".join(name.split(".")[-2:]) for name in factors) == {
        "q_proj.lora_A": 2, "k_proj.lora_A": 2, "v_proj.lora_A": 2, "o_proj.lora_B": 2,
        "gate_proj.lora_A": 2, "up_proj.lora_A": 2, "down_proj.lora_B": 2,
    }  # fmt: skip
    learning = ranks.run(2, names_of_partial, Case(BIASES, sequence=True))[0]
    assert Counter(".".join(name.split(".")[-2:]) for name in learning) == {
        "input_layernorm.weight": 2, "post_attention_layernorm.weight": 2, "norm.weight": 1,
        "o_proj.bias": 2, "down_proj.bias": 2,
    }  # fmt: skip


def on_meta(case: Case):
    """A model on the meta device gets the same pieces, dtypes and flags, and takes the same values."""
    model, valued = decoder(case, "meta"), decoder(case)
    whole = {name: p.detach().clone() for name, p in valued.named_parameters()}
    ours, theirs = (tensor.apply(m, axis(), sequence=False) for m in (model, valued))
    assert (ours.pieces, ours.partial, ours.head) == (theirs.pieces, theirs.partial, theirs.head)
    others = dict(valued.named_parameters())
    for name, p in model.named_parameters():
        assert p.is_meta
        assert (p.shape, p.dtype, p.requires_grad) == (others[name].shape, others[name].dtype, others[name].requires_grad)
        assert p.is_contiguous()
        piece = ours.pieces.get(name) or Piece.all_of(tuple(p.shape))
        assert torch.equal(others[name], piece.of(whole[name])), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert model.model.layers[0].self_attn.kv_heads == 2
    assert model.model.layers[0].self_attn.q_proj.out_features == len(model.model.layers[0].self_attn.q_proj.weight)
    assert model.model.layers[0].mlp.down_proj.in_features == 18


@pytest.mark.parametrize("adapt", ["lora", "last", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_models_without_values(adapt, tied):
    ranks.run(2, on_meta, Case({**BIASES, "tie_word_embeddings": tied}, ADAPT[adapt]))


def extend(sequence: bool):
    """Scores of tokens that come piece by piece, and then training lengths again."""
    case = Case({"tie_word_embeddings": True}, ADAPT["some"], sequence=sequence)
    whole, model = decoder(case).eval(), decoder(case).eval()
    tensor.apply(model, axis(), sequence=sequence)
    ids, positions, documents, _ = tokens(37)
    with torch.no_grad():
        for one in (whole, model):
            one.cache = KVCache(one.config, ROWS, LENGTH, dtype=case.dtype, device=torch.device("cpu"))
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 12)):
            ours, theirs = (one.logits(one.extend(ids[:, first:last], one.cache)) for one in (model, whole))
            assert ours.shape == (ROWS, last - first, 37)
            torch.testing.assert_close(ours, theirs)
        assert model.cache.length == LENGTH
        torch.testing.assert_close(model(ids, positions, documents), whole(ids, positions, documents))
        torch.testing.assert_close(model.head_weight(), whole.head_weight().chunk(dist.get_world_size())[dist.get_rank()])


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_tokens_one_by_one(size, sequence):
    ranks.run(size, extend, sequence)


def through_logits(sequence: bool):
    """torch's own loss on the joined logits."""
    case = Case({**NINE, "tie_word_embeddings": True}, sequence=sequence)
    whole, model = decoder(case), decoder(case)
    sharding = tensor.apply(model, axis(), sequence=sequence)

    def objective(one, step):
        ids, positions, documents, labels = tokens(37, step)
        logits = one.logits(one(ids, positions, documents))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    results = [train(m, lambda step, m=m: objective(m, step), sharding=s) for m, s in ((whole, None), (model, sharding))]
    assert len(compare(*results, sharding, 1e-10)) == len(list(whole.parameters()))


@pytest.mark.parametrize("sequence", [False, True])
def test_logits_have_gradients_too(sequence):
    ranks.run(3, through_logits, sequence)


COLLECTIVES = ("all_reduce", "all_gather_single", "all_to_all_single")


def count(sequence: bool, layers: int):
    """How often each collective is called in a forward without loss, and in its backward; and what they carry."""
    model = decoder(Case({"num_hidden_layers": layers}, sequence=sequence, dtype=torch.float32))
    tensor.apply(model, axis(), sequence=sequence)
    called, found = [], []

    def spy(name):
        real = getattr(dist, name)

        def call(*args, **kwargs):
            called.append((name, max(x.numel() for x in args if isinstance(x, torch.Tensor)), args[0].dtype))
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    ids, positions, documents, _ = tokens(37)
    with spy(COLLECTIVES[0]), spy(COLLECTIVES[1]), spy(COLLECTIVES[2]):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(ids, positions, documents)
        found.append(Counter(called))
        called.clear()
        hidden.float().sum().backward()
        found.append(Counter(called))
    return found


def test_two_collectives_a_block_and_direction():
    """And one for the embedding forward, one for the hidden states backward; all of activations, in bfloat16."""
    size, dtype = ROWS * LENGTH * 32, torch.bfloat16
    for layers in (1, 3):
        forward, backward = ranks.run(2, count, False, layers)[1]
        assert forward == {("all_reduce", size, dtype): 2 * layers + 1}
        assert backward == {("all_reduce", size, dtype): 2 * layers + 1}
        forward, backward = ranks.run(2, count, True, layers)[1]
        each = {("all_gather_single", size, dtype): 2 * layers + 1, ("all_to_all_single", size, dtype): 2 * layers + 1}
        assert forward == each
        assert backward == each


def norms_length(sequence: bool):
    """What the norms of a block see."""
    model, seen = decoder(Case(sequence=sequence)), []
    tensor.apply(model, axis(), sequence=sequence)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    ids, positions, documents, _ = tokens(37)
    hidden = model(ids, positions, documents)
    return seen, hidden.shape[1]


def test_the_stream_has_a_part_of_the_length():
    assert ranks.run(4, norms_length, True) == [([LENGTH // 4], LENGTH)] * 4
    assert ranks.run(4, norms_length, False) == [([LENGTH], LENGTH)] * 4


def in_bfloat16(sequence: bool):
    """Mixed precision, frozen parameters stored low: as near to float64 as the single process is."""
    results = []
    for kind in ("exact", "whole", "shared"):
        model = decoder(Case({}, ADAPT["lora"], dtype=torch.float64 if kind == "exact" else torch.float32))
        if kind != "exact":
            for p in model.parameters():
                p.data = p.data if p.requires_grad else p.data.to(torch.bfloat16)
        sharding = tensor.apply(model, axis(), sequence=sequence) if kind == "shared" else None
        ids, positions, documents, labels = tokens(37)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
            hidden = model(ids, positions, documents)
            loss, _ = losses.token_cross_entropy(hidden, model.head_weight(), labels, CrossEntropy(), shard=shard_of(sharding))
        loss.backward()
        assert hidden.dtype == (torch.float64 if kind == "exact" else torch.bfloat16)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        if sharding is not None:
            tensor.sum_partial([gradients[name] for name in sharding.partial], axis())
        results.append((loss.item(), gradients))
    (exact, true), (plain, single), (ours, mine) = results
    assert abs(ours - exact) <= 2 * abs(plain - exact) + 2e-3 * exact
    for name, gradient in mine.items():
        piece = sharding.pieces.get(name) or Piece.all_of(tuple(gradient.shape))
        reference = piece.of(true[name])
        error = ((g.double() - reference).norm() for g in (gradient, piece.of(single[name])))
        assert next(error) <= 3 * next(error) + 0.02 * reference.norm(), name


@pytest.mark.parametrize("sequence", [False, True])
def test_mixed_precision(sequence):
    ranks.run(2, in_bfloat16, sequence)


def check_samples(model, make, inputs):
    """A model of samples, shared, against itself whole."""
    targets = torch.randint(0, 3, (len(inputs),), generator=torch.Generator().manual_seed(1))

    def objective(one, step):
        return nn.functional.cross_entropy(one(inputs * (1 + step)), targets, reduction="sum")

    whole = model
    model = make()
    model.load_state_dict(whole.state_dict())
    sharding = tensor.apply(model, axis(), sequence=True)  # no length to divide: it changes nothing
    results = [train(m, lambda step, m=m: objective(m, step), sharding=s) for m, s in ((whole, None), (model, sharding))]
    moving = compare(*results, sharding, 1e-10)
    replicas_agree(results[1][2], sharding)
    assert moving
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(inputs), whole.eval()(inputs))
    return sharding


def make_mlp(options: MlpOptions, adapt: Lora | None, frozen: bool):
    model = Mlp(options, (2, 5), 3).double()
    if adapt is not None:
        lora.apply(model, adapt, head=None)
        randomise(model.double())
    if frozen:
        model.layers[0].requires_grad_(False)
        norms.hold_frozen(model)
    return model


def check_mlp(options, adapt, frozen):
    torch.manual_seed(0)
    inputs = torch.randn(7, 2, 5, dtype=torch.float64)
    return check_samples(make_mlp(options, adapt, frozen), lambda: make_mlp(options, adapt, frozen), inputs)


@pytest.mark.parametrize("hidden", [[12], [8, 10], [8, 10, 4]])
@pytest.mark.parametrize("adapt", [None, Lora(**{**LORA, "dropout": 0.2})], ids=["full", "lora"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_mlp(hidden, adapt, norm):
    """Pairs, and an odd last layer, which stays whole; the masks of dropout are those of the whole width."""
    options = MlpOptions(hidden=hidden, dropout=0.4, norm=norm, activation="gelu")
    for size, frozen in ((2, False), (4, norm == "batch" and adapt is None)):
        shardings = ranks.run(size, check_mlp, options, adapt, frozen)
        tiles(shardings)
        names = set(shardings[0].pieces)
        assert ("head.weight" in names) == (len(hidden) % 2 == 1)
        assert ("layers.0.1.running_mean" in names) == (norm == "batch")
        assert "layers.0.0.weight" in names
        assert "layers.1.1.running_mean" not in names


def check_vgg():
    with mock.patch("trainwright.models.vgg.WIDE", 8), mock.patch("trainwright.models.vgg.STAGES", ((2,),) * 5):
        return _check_vgg()


def _check_vgg():
    def make():
        torch.manual_seed(0)
        return Vgg16(VggOptions(input="any", dropout=0.3), (1, 32, 32), 3, norm=True).double()

    return check_samples(make(), make, torch.randn(4, 1, 32, 32, dtype=torch.float64))


def test_vgg():
    shardings = ranks.run(2, check_vgg)
    tiles(shardings)
    assert set(shardings[0].pieces) == {"classifier.0.weight", "classifier.0.bias", "classifier.3.weight"}


class Foreign(nn.Module):
    """A user's module with a plan of its own."""

    def __init__(self):
        super().__init__()
        self.wide, self.act, self.narrow = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.narrow(self.act(self.wide(x)))

    def tensor_plan(self):
        return TensorPlan({"width": 6}, (Stretch(("wide",), "narrow", between=("act",)),))


def check_foreign():
    torch.manual_seed(0)
    return check_samples(Foreign().double(), lambda: Foreign().double(), torch.randn(7, 5, dtype=torch.float64))


def test_a_module_may_bring_its_plan():
    assert set(ranks.run(3, check_foreign)[0].pieces) == {"wide.weight", "wide.bias", "narrow.weight"}


def refusal(model, size):
    with pytest.raises(InputError) as caught:
        tensor.apply(model, Axis(size, 0), sequence=False)
    return str(caught.value)


def on_meta_device(**config):
    return decoder(Case(config), "meta")


def test_numbers_that_do_not_divide_are_refused():
    text = refusal(on_meta_device(**NINE), 2)
    assert text == (
        "parallel.tensor: 2 processes can't share this Decoder: num_key_value_heads 3 is not a multiple of 2; set it to 1 or 3"
    )
    text = refusal(on_meta_device(intermediate_size=38), 4)
    assert "intermediate_size 38 is not a multiple of 4; set it to 1 or 2" in text
    text = refusal(on_meta_device(num_key_value_heads=8, intermediate_size=40, vocab_size=9), 8)
    assert "the last would have none of the vocabulary's 9 rows; set it to 1 or 2" in text
    text = refusal(Mlp(MlpOptions(hidden=[9, 6, 8]), (4,), 2), 2)
    assert "Mlp: model.options.hidden[0] 9 is not a multiple of 2; set it to 1" in text


def test_models_that_cannot_be_shared_are_refused():
    text = refusal(ResNet(ResnetOptions(), (3, 32, 32), 2, name="resnet18"), 2)
    assert "ResNet has no tensor-parallel plan; set it to 1" in text
    assert "no two linear layers" in refusal(Mlp(MlpOptions(hidden=[]), (4,), 2), 2)
    assert "a LayerNorm between them" in refusal(Mlp(MlpOptions(hidden=[8, 8], norm="layer"), (4,), 2), 2)


def test_one_process_changes_nothing():
    model = on_meta_device()
    sharding = tensor.apply(model, Axis(), sequence=True)
    assert (sharding.pieces, sharding.partial, sharding.head) == ({}, (), None)
    assert type(model.model.norm).__name__ == "RMSNorm"


def test_which_lengths_can_be_divided():
    assert [tensor.fits(length, Axis(4)) for length in (4, 6, 1, 64)] == [True, False, False, True]


def sums(dtypes):
    """Gradients of several dtypes and layouts, summed where they are."""
    index = dist.get_rank() + 1
    gradients = [torch.full((2, 3), index, dtype=dtype) for dtype in dtypes] + [torch.arange(6.0).view(2, 3).T * index]
    before = [gradient.data_ptr() for gradient in gradients]
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spy:
        tensor.sum_partial(gradients, axis())
        tensor.sum_partial([], axis())
    assert [gradient.data_ptr() for gradient in gradients] == before
    return spy.call_count, [gradient.tolist() for gradient in gradients]


def test_sums_of_partial_gradients():
    calls, values = ranks.run(2, sums, [torch.float32, torch.bfloat16])[1]
    assert calls == 2
    assert values == [[[3.0] * 3] * 2] * 2 + [[[0.0, 9.0], [3.0, 12.0], [6.0, 15.0]]]


def compiled(sequence: bool):
    """Compiled blocks without a break; how many graphs there are."""
    torch.compiler.reset()
    case = Case({"num_hidden_layers": 4}, sequence=sequence)
    whole, model = decoder(case), decoder(case)
    sharding = tensor.apply(model, axis(), sequence=sequence)
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at .grad of what isn't a leaf
        shared = train_decoder(model, case, sharding)
    compare(train_decoder(whole, case), shared, sharding, 1e-10)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("sequence", [False, True])
def test_compiled_blocks_share_one_graph(sequence):
    assert ranks.run(2, compiled, sequence) == [1, 1]
