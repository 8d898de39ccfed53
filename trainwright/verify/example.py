"""A user's own language model, as the matrix of combinations proves it: packed documents, parts that a pipeline can cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trainwright.models.contract import present


class Layer(nn.Module):
    """(rows, length, size) -> the same: each token with the one before it in its document, added to itself."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.here = nn.Linear(size, 2 * size)
        self.before = nn.Linear(size, 2 * size, bias=False)
        self.out = nn.Linear(2 * size, size)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        normed = self.norm(x)
        previous = pad(normed[:, :-1], (0, 0, 1, 0)) * (positions > 0)[..., None]
        return x + self.drop(self.out(torch.tanh(self.here(normed) + self.before(previous))))


class Example(nn.Module):
    """Packed tokens to logits; the arguments are those of ``Decoder.forward``."""

    def __init__(self, vocabulary: int, size: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(size, dropout) for _ in range(depth))
        self.head = nn.Linear(size, vocabulary)

    def blocks(self) -> list[nn.Module]:
        """The layers, in order."""
        return present(self.layers)

    def parts(self) -> dict[str, int]:
        """What a pipeline cuts between, as ``contract.Chain`` has it."""
        return {"embed": 0, **{f"layers.{place}": 1 for place in range(len(self.layers))}, "head": 1}

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, positions)
        logits: Tensor = self.head(x)
        return logits


def module(vocabulary: int = 320, size: int = 48, depth: int = 4, dropout: float = 0.0) -> nn.Module:
    """What ``model.architecture: trainwright.verify.example:module`` calls."""
    return Example(vocabulary, size, depth, dropout)
