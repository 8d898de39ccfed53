"""Compiled blocks and loss give the gradients of plain ones; names stay."""

import pytest
import torch

from tests import tiny
from trainwright import build
from trainwright.adapt import lora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_is_plain(tmp_path, precision):
    torch._dynamo.reset()
    found = {}
    for choice in ("off", "on"):
        recipe = tiny.recipe(tmp_path, adapt__method="lora", adapt__rank=4, precision=precision, run__compile=choice)
        run = build.assemble(recipe)
        torch.manual_seed(0)
        for name, parameter in run.model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter.data, std=0.1)
        losses = [run.forward_backward(run.batch(step)).item() for step in (0, 1, 2)]  # other document counts each time
        found[choice] = losses, {n: p.grad for n, p in run.model.named_parameters() if lora.is_factor(n)}
    loose = 1e-5 if precision == "fp32" else 3e-2
    assert found["on"][0] == pytest.approx(found["off"][0], rel=loose)
    assert found["on"][1].keys() == found["off"][1].keys()
    for name, gradient in found["off"][1].items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(found["on"][1][name] / scale, gradient / scale, rtol=0, atol=10 * loose, msg=name)


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    run = build.assemble(tiny.recipe(tmp_path, run__compile="auto"))
    assert "no C++ compiler" in next(c.summary for c in run.changes if c.technique == "compile")
