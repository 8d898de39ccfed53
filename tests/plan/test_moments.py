"""Which module a program is in, forward and backward."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.plan.moments import Moments


class Seen(TorchDispatchMode):
    def __init__(self, moments):
        super().__init__()
        self.moments, self.found = moments, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append((func._schema.name, *self.moments.now()))
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_name_the_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    moments = Moments()
    moments.name(model)
    moments.phase = "forward"
    with moments.following(), Seen(moments) as seen:
        out = model(torch.ones(5, 3))
        out.sum().backward()
    where = {}
    for name, phase, module in seen.found:
        where.setdefault((name, phase), []).append(module)
    assert where["aten::addmm", "forward"] == ["0", "1.1"]
    assert where["aten::tanh", "forward"] == ["1.0"]
    assert where["aten::tanh_backward", "backward"] == ["1.0"]
    assert where["aten::mm", "backward"] == ["1.1", "1.1", "0"], "the backward goes from the end to the beginning"
    assert moments.now() == ("forward", "")


def test_a_forward_that_fails_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(3, 4))
    moments = Moments()
    moments.name(model)
    with pytest.raises(RuntimeError), moments.following():
        model(torch.ones(5, 2))
    assert moments.now() == ("building", "")
    count = len(moments._firsts)
    model(torch.ones(5, 3))
    assert len(moments._firsts) == count, "nothing follows any more"
