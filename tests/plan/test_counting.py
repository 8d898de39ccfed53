"""Operations and messages against published counts and formulas."""

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from trainwright.memory import selective
from trainwright.models import catalogue
from trainwright.plan.counting import PRODUCTS, Counts
from trainwright.plan.kernels import HEAVY
from trainwright.plan.rehearsal import rehearse
from trainwright.recipe import Task

WEIGHTS = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
}


class Counting(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.counts.count(func, args, kwargs or {}, result, "forward")
        return result


def total(works, *kinds):
    return sum(work.flops * work.calls for work in works if work.kind in kinds)


@pytest.mark.parametrize("name", WEIGHTS)
def test_published_parameters_and_operations(name):
    """torchvision publishes multiplications, which are two operations each."""
    published = WEIGHTS[name].meta
    counts = Counts()
    with FakeTensorMode():
        model = catalogue.make(name, {}, (3, 224, 224), Task("classes", 1000))
        with Counting(counts):
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == published["num_params"]
    found = total(counts.all_works(), "convolution", "product") / 2e9
    assert found == pytest.approx(published["_ops"], abs=1e-3)
    assert not counts.unknown


def test_a_decoder_takes_six_operations_a_parameter_and_token(tmp_path):
    """Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1: C = 6 N, N without embeddings; the head is a
    product here, too, of the supervised positions alone."""
    found = rehearse(tiny.recipe(tmp_path, data__supervise="all", memory={"checkpointing": "none"}, training__batch_size=4))
    hidden, middle, kv, layers, vocabulary = 64, 96, 32, 2, 320
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * middle)
    works = [work for work in found.counts.all_works() if work.kind == "product"]
    blocks = sum(w.flops * w.calls for w in works if vocabulary not in w.shape and w.shape[2:] != (hidden, vocabulary))
    assert blocks == 6 * matrices * 4 * 64
    heads = [w for w in works if vocabulary in w.shape]
    assert 0 < sum(w.flops * w.calls for w in heads) <= 6 * hidden * vocabulary * 4 * 64


def test_micro_batches_that_are_left_out_count(tmp_path):
    once = rehearse(tiny.recipe(tmp_path, training={"steps": 2, "batch_size": 8, "micro_batch_size": 1}))
    assert once.micro_batches == 8
    forwards = [w for w in once.counts.all_works() if w.phase == "forward" and w.kind == "product" and 320 not in w.shape]
    assert {work.calls % 8 for work in forwards} == {0}


def test_attention_counts_pairs_and_not_squares():
    counts = Counts()
    counts.pairs = 10
    q, k, v = (torch.zeros(1, 2, 4, 8) for _ in range(3))
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    result = operator(q, k, v, 0.0, True)
    counts.count(operator, (q, k, v, 0.0, True), {}, result, "forward")
    [work] = counts.all_works()
    assert (work.kind, work.flops) == ("attention", 4 * 2 * 8 * (4 * 4 // 2))


def test_what_is_unknown_is_told():
    @torch.library.custom_op("planning::own", mutates_args=())
    def own(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    counts, x = Counts(), torch.ones(3)
    counts.count(torch.ops.planning.own.default, (x,), {}, x, "forward")
    counts.count(torch.ops.aten.add.Tensor, (x, x), {}, x, "forward")
    assert dict(counts.unknown) == {"planning.own": 1}
    assert {work.operator: work.bytes for work in counts.all_works()} == {"planning.own": 24, "aten.add": 36}


def test_products_are_one_list():
    assert selective.PRODUCTS.keys() == {f"aten::{name}" for name in PRODUCTS}
    assert HEAVY > PRODUCTS
    assert all(hasattr(torch.ops.aten, name) for name in HEAVY)
