"""A pipeline gives the losses, gradients, weights and outputs of one process, whatever the schedule and the micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import ranks
from trainwright.adapt import lora
from trainwright.data.loader import TextBatch
from trainwright.loop import accumulate
from trainwright.losses import token_cross_entropy
from trainwright.models.cnn import Cnn, CnnOptions
from trainwright.models.decoder import Decoder, read_config
from trainwright.models.mlp import Mlp, MlpOptions
from trainwright.parallel import gradients, pipeline, pipeline_run, sharded
from trainwright.parallel.mesh import Axis, join
from trainwright.pieces import Piece
from trainwright.recipe import CrossEntropy, Lora, Parallel

ROWS, LENGTH, VOCABULARY, LAYERS = 2, 8, 24, 7
SCHEDULES = ("1f1b", "gpipe", "interleaved")
TUNES = ("full tied", "full untied", "lora tied", "partial untied", "top untied", "embedding tied")
LOSS = CrossEntropy(label_smoothing=0.1, z_loss=0.01)


def pipeline_axis() -> Axis:
    """All processes of the test, in one pipeline."""
    group = dist.group.WORLD
    assert group is not None
    return Axis(dist.get_world_size(), dist.get_rank(), group)


def decoder(tune: str = "full untied", dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> Decoder:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tune.endswith(" tied"),
    }  # fmt: skip
    model = Decoder(read_config(config)).to(dtype)
    if tune.startswith("lora"):
        lora.apply(model, Lora(method="lora", rank=2, alpha=4))
        for name, parameter in model.named_parameters():
            if lora.is_factor(name):
                nn.init.normal_(parameter, std=0.3)
        model.to(dtype)
    learning = {"partial": "model.layers.3.mlp", "top": "model.layers.6", "embedding": "model.embed_tokens"}.get(
        tune.split()[0]
    )
    if learning:
        model.requires_grad_(False)
        for name, parameter in named(model).items():
            if name.startswith(learning):
                parameter.requires_grad_(True)
    return model


def text(count: int, length: int = LENGTH) -> list[TextBatch]:
    """Micro-batches of packed documents; in each another number of positions is supervised."""
    draw = torch.Generator().manual_seed(3)
    batches = []
    for place in range(count):
        tokens = torch.randint(VOCABULARY, (ROWS, length), generator=draw)
        labels = torch.randint(VOCABULARY, (ROWS, length), generator=draw)
        labels.view(-1)[: -(2 + (place * 5) % 13)] = -100
        positions = torch.cat([torch.arange(3), torch.arange(length - 3)]).expand(ROWS, -1)
        documents = torch.tensor([0, 3, length, length + 3, 2 * length], dtype=torch.int32)
        batches.append(TextBatch(tokens, labels, positions, documents))
    return batches


class Case:
    """A kind of model with its forward, loss sums and counts."""

    def __init__(self, autocast: bool = False) -> None:
        self.autocast = autocast

    def context(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


class Text(Case):
    def forward(self, model: nn.Module, batch: TextBatch, x: Tensor | None) -> Tensor:
        with self.context():
            return model(batch.tokens if x is None else x, batch.positions, batch.documents)

    def sums_of(self, model: nn.Module) -> Callable[[Tensor, TextBatch], Tensor]:
        def sums(out: Tensor, batch: TextBatch) -> Tensor:
            with self.context():
                return token_cross_entropy(out, model.head_weight(), batch.labels, LOSS)[0]

        return sums

    def count(self, batch: TextBatch) -> int:
        return batch.supervised

    def shape(self, batch: TextBatch) -> Any:
        return tuple(batch.tokens.shape)


class Samples(Case):
    """A loss of two terms, with a count for each."""

    def forward(self, model: nn.Module, batch: Any, x: Tensor | None) -> Tensor:
        with self.context():
            return model(batch.inputs if x is None else x)

    def sums_of(self, model: nn.Module) -> Callable[[Tensor, Any], Tensor]:
        def sums(out: Tensor, batch: Any) -> Tensor:
            entropy = nn.functional.cross_entropy(out.double(), batch.targets, reduction="sum")
            return torch.stack([entropy, out.double().square().sum()])

        return sums

    def count(self, batch: Any) -> Tensor:
        return torch.tensor([len(batch.inputs), 10.0 * len(batch.inputs)])

    def shape(self, batch: Any) -> Any:
        return tuple(batch.inputs.shape)


def samples(sizes: Sequence[int], shape: tuple[int, ...] = (6,), dtype: torch.dtype = torch.float64) -> list[Any]:
    draw = torch.Generator().manual_seed(4)
    return [
        SimpleNamespace(
            inputs=torch.randn(size, *shape, generator=draw, dtype=torch.float64).to(dtype),
            targets=torch.randint(3, (size,), generator=draw),
        )
        for size in sizes
    ]


def mlp(dtype: torch.dtype = torch.float64) -> Mlp:
    torch.manual_seed(1)
    return Mlp(MlpOptions(hidden=[7, 9, 5, 8, 6, 7, 5], activation="tanh"), (6,), 3).to(dtype)


def make(model: nn.Module, case: Any, schedule: Any = "1f1b", **options: Any) -> pipeline_run.Pipe:
    axis = pipeline_axis()
    split = pipeline.apply(model, axis, schedule, **options)
    return pipeline_run.make(split, model, axis, case.forward, case.sums_of(model), case.shape, torch.device("cpu"))


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def check(whole: nn.Module, case: Any, steps: Sequence[Sequence[Any]], schedule: str, tolerance: float, **options: Any) -> set:
    """Steps of plain SGD by one process and by the pipeline; gives the names of the parameters that were compared.

    NOTE: not Adam, which hides a wrong scale of the gradients.
    """
    mine = copy.deepcopy(whole)
    pipe = make(mine, case, schedule, **options)
    sums = case.sums_of(whole)
    for batches in steps:
        expected = accumulate(lambda b: sums(case.forward(whole, b, None), b), case.count, batches)
        loss = pipe.forward_backward(batches, sum(case.count(batch) for batch in batches))
        pipe.finish()
        torch.testing.assert_close(loss, expected.double(), rtol=tolerance, atol=0)
        compare_gradients(mine, whole, tolerance)
        for model in (whole, mine):
            descend(model)
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(
            parameter, named(whole)[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return {pipe.split.copies.get(name, name) for name, _ in mine.named_parameters()}


def compare_gradients(mine: nn.Module, whole: nn.Module, tolerance: float) -> None:
    for name, parameter in mine.named_parameters():
        expected = named(whole)[name].grad
        if expected is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert expected.abs().max() > 0, f"{name} has a gradient of zero: nothing is compared"
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def descend(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.05 * parameter.grad
            parameter.grad = None


def covered(results: Sequence[set], model: nn.Module) -> None:
    """Each parameter was compared at one process at least."""
    assert set().union(*results) == {name for name, _ in model.named_parameters()}


def run_text(tune: str, schedule: str) -> set:
    return check(decoder(tune), Text(), [text(count) for count in (1, 2, 8, 4)], schedule, 1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tune", TUNES)
def test_a_decoder_learns_as_alone(tune: str, size: int, schedule: str) -> None:
    covered(ranks.run(size, run_text, tune, schedule), decoder(tune))


def run_single(schedule: str) -> set:
    return check(decoder("full tied", torch.float32), Text(), [text(4)] * 3, schedule, 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_single_precision(schedule: str) -> None:
    covered(ranks.run(2, run_single, schedule), decoder("full tied"))


def run_changing_counts(schedule: str) -> set:
    return check(decoder("full tied"), Text(), [text(n) for n in (3, 5, 6, 3, 7, 9, 5)], schedule, 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_micro_batches_may_change(size: int, schedule: str) -> None:
    covered(ranks.run(size, run_changing_counts, schedule), decoder("full tied"))


def run_mlp(schedule: str) -> set:
    steps = [samples(sizes) for sizes in ((4, 4, 4, 1), (3,), (2, 5, 0, 3, 1), (4, 4, 4, 4), (6, 1, 6, 6))]
    return check(mlp(), Samples(), steps, schedule, 1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [2, 4])
def test_samples_with_micro_batches_of_any_size(size: int, schedule: str) -> None:
    covered(ranks.run(size, run_mlp, schedule), mlp())


def cnn() -> Cnn:
    torch.manual_seed(2)
    return Cnn(CnnOptions(channels=[4, 6], norm="none", repeat=2, hidden=9), (3, 8, 8), 3).double()


def images(sizes: Sequence[int]) -> list[Any]:
    batches = samples(sizes, (3, 8, 8))
    for batch in batches:
        batch.inputs = batch.inputs.to(memory_format=torch.channels_last)
    return batches


def run_images() -> set:
    whole = cnn().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for batch, out in make(copy.deepcopy(whole), Samples()).outputs(images((3, 2))):
            torch.testing.assert_close(out, whole(batch.inputs))
    return check(whole, Samples(), [images((3, 3)), images((3, 3, 2))], "1f1b", 1e-10)


@pytest.mark.parametrize("size", [2, 4])
def test_images_in_any_memory_layout(size: int) -> None:
    covered(ranks.run(size, run_images), cnn())


def run_autocast(schedule: str) -> set:
    return check(decoder("full untied", torch.float32), Text(autocast=True), [text(4)] * 2, schedule, 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_under_autocast_hidden_states_travel_in_bfloat16(schedule: str) -> None:
    covered(ranks.run(2, run_autocast, schedule), decoder())


def run_evaluation(schedule: str, autocast: bool) -> int:
    whole, case = decoder("full tied", torch.float32), Text(autocast)
    mine = copy.deepcopy(whole)
    pipe = make(mine, case, schedule)
    assert not list(pipe.outputs([]))
    found = list(pipe.outputs([*text(5), *text(2, length=12)]))
    assert mine.training
    with torch.no_grad():
        for batch, out in found:
            expected = case.forward(whole, batch, None)
            assert out.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert torch.equal(out, expected)
    assert not any(out.requires_grad for _, out in found)
    return len(found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_are_those_of_one_process(schedule: str, autocast: bool) -> None:
    assert ranks.run(2, run_evaluation, schedule, autocast) == [0, 7]
    assert ranks.run(3, run_evaluation, schedule, autocast) == [0, 0, 7]


def run_evaluation_between_steps() -> None:
    """Dropout sleeps in it, and what training drew doesn't change."""
    torch.manual_seed(1)
    whole = Mlp(MlpOptions(hidden=[7, 9], dropout=0.5), (6,), 3).double()
    case, losses = Samples(), []
    for evaluates in (False, True):
        pipe = make(copy.deepcopy(whole), case)
        torch.manual_seed(dist.get_rank())
        for batches in (samples((4, 4)), samples((3, 3))):
            if evaluates:
                list(pipe.outputs(batches))
            losses.append(pipe.forward_backward(batches, 8.0).item())
    assert losses[:2] == losses[2:]


def test_evaluation_disturbs_no_training() -> None:
    ranks.run(2, run_evaluation_between_steps)


def run_tied(schedule: str) -> tuple[bytes, ...]:
    mine = decoder("full tied", torch.float32)
    pipe = make(mine, Text(), schedule)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.01)
    start = mine.get_parameter(pipe.split.shared[0].name).detach().clone()
    for _ in range(5):
        pipe.forward_backward(text(4), 30)
        pipe.finish()
        optimizer.step()
        optimizer.zero_grad()
    (end,) = pipe.split.shared
    tied = mine.get_parameter(end.name).detach()
    assert (tied - start).abs().min() > 0
    return (tied.numpy().tobytes(),)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tied_ends_stay_equal_in_every_bit(schedule: str) -> None:
    first, last = ranks.run(2, run_tied, schedule)
    assert first == last


def run_parts_of_tied() -> None:
    """Where the optimizer holds parts (ZeRO), those are summed."""
    mine = decoder("full tied")
    pipe = make(mine, Text())
    (end,) = pipe.split.shared
    part = nn.Parameter(mine.get_parameter(end.name).detach()[:3])
    part.grad = torch.full_like(part, 1.0 + dist.get_rank())
    pipe.finish([(end.name, part)])
    assert part.grad.eq(3.0).all()
    assert mine.get_parameter(end.name).grad is None


def test_tied_parts() -> None:
    ranks.run(2, run_parts_of_tied)


def run_from_meta(tune: str) -> set:
    whole, case = decoder(tune), Text()
    with torch.device("meta"):
        mine = copy.deepcopy(whole).to("meta")
    mine.tie()
    pipe = make(mine, case)
    empty = {name for name, parameter in mine.named_parameters() if parameter.is_meta}
    assert empty == {name for name, _ in mine.named_parameters()}
    mine.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            parameter.copy_(named(whole)[name] if name not in pipe.split.copies else torch.zeros(()))
    pipeline.align_copies_(pipe.split, pipe.axis, mine)
    batches = text(4)
    sums = case.sums_of(whole)
    accumulate(lambda b: sums(case.forward(whole, b, None), b), case.count, batches)
    pipe.forward_backward(batches, sum(map(case.count, batches)))
    pipe.finish()
    compare_gradients(mine, whole, 1e-11)
    return {pipe.split.copies.get(name, name) for name in empty}


@pytest.mark.parametrize("tune", ["full tied", "full untied"])
def test_only_the_own_stages_are_ever_made(tune: str) -> None:
    found = ranks.run(2, run_from_meta, tune)
    covered(found, decoder(tune))
    assert len(found[0] & found[1]) == (tune == "full tied")


def run_without_objects(schedule: str) -> None:
    for name in ("send_object_list", "recv_object_list", "broadcast_object_list", "all_gather_object"):
        setattr(dist, name, forbidden)
    try:
        check(decoder(), Text(), [text(2), text(4)], schedule, 1e-10)
    finally:
        for name in ("send_object_list", "recv_object_list", "broadcast_object_list", "all_gather_object"):
            setattr(dist, name, getattr(dist.distributed_c10d, name))


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("a pickle was sent")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_pickled(schedule: str) -> None:
    ranks.run(2, run_without_objects, schedule)


def run_programs(schedule: str) -> list[str]:
    pipe = make(decoder(), Text(), schedule)
    names = []
    for count in (4, 4, 1, 5, 4, 2, 8, 6, 7):
        pipe.forward_backward(text(count), 1.0)
        names.append(type(list(pipe._programs.values())[-1]).__name__)
        assert len(pipe._programs) <= pipeline_run.PROGRAMS
    return names


def test_the_schedules_are_those_of_torch() -> None:
    assert set(ranks.run(2, run_programs, "gpipe")[0]) == {"ScheduleGPipe"}
    assert ranks.run(2, run_programs, "1f1b")[0].count("Schedule1F1B") == 8
    mixed = ranks.run(2, run_programs, "interleaved")[1]
    assert {"ScheduleInterleaved1F1B", "ScheduleLoopedBFS"} == set(mixed)


def run_products(stage: int, schedule: str, tune: str) -> set:
    """Two pipelines of two processes share the data: each has half of the rows of every micro-batch."""
    mesh = join(Parallel(pipeline=2, data=2), torch.device("cpu"))
    whole, case = decoder(tune), Text()
    mine = copy.deepcopy(whole)
    split = pipeline.apply(mine, mesh.pipeline, schedule)
    assert mesh.devices is not None
    if stage == 3:
        sharing = sharded.shard(mine, mesh.devices, mine.blocks(), torch.device("cpu"))
    else:
        sharing = gradients.share(mine, mesh.data, stage, mine.blocks())
    device = torch.device("cpu")
    pipe = pipeline_run.make(split, mine, mesh.pipeline, case.forward, case.sums_of(mine), case.shape, device, sharing.portion)
    optimizer = torch.optim.SGD([p for _, p in sharing.named], lr=0.05)
    names = set()
    for count in (4, 3):
        batches = text(count)
        sums = case.sums_of(whole)
        accumulate(lambda b, sums=sums: sums(case.forward(whole, b, None), b), case.count, batches)
        pipe.forward_backward([half(b, mesh.data.index) for b in batches], sum(map(case.count, batches)))
        sharing.finish()
        pipe.finish(sharing.named)
        for name, part in sharing.named:
            expected = named(whole)[name].grad
            assert expected is not None
            assert part.grad is not None, name
            piece = sharing.piece(name, Piece.all_of(tuple(expected.shape)))
            torch.testing.assert_close(part.grad, piece.of(expected), rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            names.add(split.copies.get(name, name))
        optimizer.step()
        optimizer.zero_grad()
        sharing.updated()
        descend(whole)
    return names


def half(batch: TextBatch, index: int) -> TextBatch:
    documents = torch.tensor([0, 3, LENGTH], dtype=torch.int32)
    row = slice(index, index + 1)
    return TextBatch(batch.tokens[row], batch.labels[row], batch.positions[row], documents)


@pytest.mark.parametrize("tune", ["full tied", "lora tied"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pipelines_share_data_at_every_stage_of_zero(stage: int, schedule: str, tune: str) -> None:
    learning = {name for name, p in decoder(tune).named_parameters() if p.requires_grad}
    assert set().union(*ranks.run(4, run_products, stage, schedule, tune)) == learning
