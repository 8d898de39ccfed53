"""The global norm against torch's on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import ranks
from trainwright.parallel import mesh as meshes
from trainwright.parallel.mesh import Mesh
from trainwright.parallel.norm import Gradient, clip_, global_norm
from trainwright.recipe import Parallel

BOTH = frozenset({"data", "tensor"})
SPLITS = [frozenset(), frozenset({"data"}), frozenset({"tensor"}), BOTH]


def whole(stage: int, split: frozenset[str], dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter's gradient, of a pipeline stage."""
    generator = torch.Generator().manual_seed(10 * stage + SPLITS.index(split))
    return torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype)


def gradients(mesh: Mesh) -> list[Gradient]:
    """One of each kind, some empty, and one that stands at two pipeline stages; the last stage has fewer."""
    result = []
    for split in SPLITS if mesh.pipeline.index == 0 else SPLITS[1:2]:
        value = whole(mesh.pipeline.index, split, torch.bfloat16 if split == BOTH else torch.float32)
        if "data" in split:
            value = value.tensor_split(mesh.data.size, 0)[mesh.data.index]
        if "tensor" in split:
            value = value.tensor_split(mesh.tensor.size, 1)[mesh.tensor.index]
        result.append(Gradient(value.clone(), split))
    result.append(Gradient(torch.full((3,), 2.0), counts=mesh.pipeline.index == 0))
    first = mesh.data.index == 0
    return [*result, Gradient(torch.full((4,), 3.0) if first else torch.zeros(0), frozenset({"data"}))]


def everything(pipeline: int) -> list[Tensor]:
    wholes = [whole(0, split, torch.bfloat16 if split == BOTH else torch.float32) for split in SPLITS]
    later = [whole(stage, SPLITS[1]) for stage in range(1, pipeline)]
    return [t.double() for t in [*wholes, *later, torch.full((3,), 2.0), *[torch.full((4,), 3.0)] * pipeline]]


def measure(data: int, tensor: int, pipeline: int, largest: float | None) -> tuple[float, float, list[float]]:
    mesh = meshes.join(Parallel(data=data, tensor=tensor, pipeline=pipeline), torch.device("cpu"))
    found = gradients(mesh)
    greatest = global_norm(found, mesh, math.inf).item()
    norm = clip_(found, mesh, largest)
    assert norm.dtype == torch.float32
    assert norm.ndim == 0
    every = [torch.zeros_like(norm) for _ in range(dist.get_world_size())]
    dist.all_gather(every, norm)
    assert all(torch.equal(norm, other) for other in every), "the norm differs in its bits"
    return norm.item(), greatest, [global_norm(found, mesh).item(), norm.item()]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1)])
def test_every_number_counts_once(sizes: tuple[int, int, int]) -> None:
    expected = everything(sizes[2])
    norm = torch.nn.utils.get_total_norm(expected).item()
    for found, greatest, (after, before) in ranks.run(math.prod(sizes), measure, *sizes, 1.5):
        assert found == pytest.approx(norm, rel=1e-6)
        assert greatest == pytest.approx(max(t.abs().max().item() for t in expected), rel=1e-6)
        assert before == found
        assert after == pytest.approx(1.5, rel=2e-3)  # bfloat16 is scaled in bfloat16


def test_small_gradients_are_left_alone() -> None:
    for found, _, (after, _) in ranks.run(2, measure, 2, 1, 1, 1e6):
        assert after == found
    for found, _, (after, _) in ranks.run(2, measure, 2, 1, 1, None):
        assert after == found


def odd(value: float) -> tuple[float, float]:
    mesh = meshes.join(Parallel(), torch.device("cpu"))
    tensors = [torch.tensor([value if mesh.rank == 1 else 1.0])]
    found = [Gradient(t, frozenset({"data"})) for t in tensors]
    return global_norm(found, mesh).item(), global_norm(found, mesh, math.inf).item()


def test_what_isnt_finite_is_seen_everywhere() -> None:
    for norm, greatest in ranks.run(2, odd, math.nan):
        assert math.isnan(norm)
        assert math.isnan(greatest)
    for norm, greatest in ranks.run(2, odd, math.inf):
        assert norm == greatest == math.inf


def test_alone_it_is_torchs_to_the_bit() -> None:
    tensors = [torch.randn(7, 3), torch.randn(5), torch.randn(())]
    found = [Gradient(t.clone()) for t in tensors]
    assert torch.equal(global_norm(found, Mesh()), torch.nn.utils.get_total_norm(tensors))
    parameters = [torch.nn.Parameter(t) for t in tensors]
    for p, t in zip(parameters, tensors, strict=True):
        p.grad = t.clone()
    norm = clip_(found, Mesh(), 0.5)
    torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
    assert all(torch.equal(p.grad, g.tensor) for p, g in zip(parameters, found, strict=True))


def none_here() -> float:
    mesh = meshes.join(Parallel(), torch.device("cpu"))
    found = [Gradient(torch.full((2,), 3.0, dtype=torch.float64), frozenset({"data"}))] if mesh.rank else []
    return global_norm(found, mesh).item()


def test_a_process_may_have_no_gradients() -> None:
    assert ranks.run(2, none_here) == [pytest.approx(math.sqrt(18))] * 2
