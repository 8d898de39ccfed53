"""resnet9 against the same layers called by hand."""

import pytest
import torch
from torch.nn import functional as F

from trainwright.models import catalogue
from trainwright.recipe import InputError, Task

TASK = Task("classes", 10, tuple("0123456789"))


def test_it_is_what_its_docstring_says():
    torch.manual_seed(0)
    model = catalogue.make("resnet9", {"stem": 4, "channels": [6, 8]}, (1, 12, 12), TASK)
    weights = dict(model.named_parameters())

    def convolved(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], padding=1)

    def normed(x, name):
        return F.relu(F.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True))

    x = torch.randn(5, 1, 12, 12)
    found = normed(convolved(x, "stem.0"), "stem.1")
    for stage in ("stages.0", "stages.1"):
        found = normed(F.max_pool2d(convolved(found, f"{stage}.down.0"), 2), f"{stage}.down.2")
        inner = normed(convolved(found, f"{stage}.residual.0"), f"{stage}.residual.1")
        found = found + normed(convolved(inner, f"{stage}.residual.3"), f"{stage}.residual.4")
    expected = 0.125 * found.amax((2, 3)) @ weights["head.weight"].T
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(model.blocks()) == 2


def test_too_small_images_are_refused():
    with pytest.raises(InputError, match=r"takes 8 pixels a side; these have 7x7"):
        catalogue.make("resnet9", {}, (1, 7, 7), TASK)
