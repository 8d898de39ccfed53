"""What users get wrong: modules that no technique can keep the answer of, and changes to a built run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.loop import Run


class _Classifier(nn.Module):
    def __init__(self, inputs: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs[0] * inputs[1] * inputs[2], 16)
        self.head = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(torch.tanh(self.hidden(x.flatten(1)))))

    def mixed(self, x: Tensor) -> Tensor:
        return x


class _Ordered(_Classifier):
    def mixed(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)[:, None]


class _Sociable(_Classifier):
    def mixed(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class _Noisy(_Classifier):
    def mixed(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class _Idle(_Classifier):
    def __init__(self, inputs: tuple[int, ...], outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.unused = nn.Linear(3, 3)


def healthy(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return _Classifier(inputs, outputs)


def ordered(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return _Ordered(inputs, outputs)


def sociable(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return _Sociable(inputs, outputs)


def noisy(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return _Noisy(inputs, outputs)


def idle(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    return _Idle(inputs, outputs)


def huge(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 200_000_000), nn.Linear(200_000_000, outputs))


@torch.no_grad()
def random_b(run: Run) -> None:
    """A custom start of LoRA's factors, as teaching material has it."""
    for name, parameter in run.model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(0, 0.02)


def halved_gradients(run: Run) -> None:
    """A technique of one's own that forgets a factor where several processes share the data."""
    before = run.forward_backward

    def wrong(batches):
        loss = before(batches)
        if len(run.share(0)) > 1:
            for held in run.gradients().values():
                held.tensor.div_(2)
        return loss

    run.forward_backward = wrong
