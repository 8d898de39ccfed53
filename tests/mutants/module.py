"""A user's own language model whose positions are absolute, so that it matters where they begin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Positional(nn.Module):
    """One head of causal attention inside documents, over learned embeddings of tokens and positions."""

    def __init__(self, size: int = 32, vocabulary: int = 320, length: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, size)
        self.place = nn.Embedding(length, size)
        self.projection = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, vocabulary)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        rows, length = tokens.shape
        x = self.token(tokens) + self.place(positions)
        q, k, v = self.projection(x).chunk(3, -1)
        owner = torch.searchsorted(documents, torch.arange(rows * length), right=True).view(rows, length)
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=(owner[:, :, None] == owner[:, None, :]) & earlier)
        return self.out(x + mixed)


def positional() -> nn.Module:
    """What a recipe names."""
    return Positional()
