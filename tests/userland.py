"""Modules that a user might bring: with our decoder's interface, and the plainest kind."""

import torch
from torch import nn


class Bag(nn.Module):
    """Logits from tokens alone."""

    def __init__(self, size: int = 16, vocabulary: int = 320):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        self.mix = nn.GRU(size, size, batch_first=True)
        self.out = nn.Linear(size, vocabulary)

    def forward(self, tokens):
        return self.out(self.mix(self.embed(tokens))[0])


class Packed(nn.Module):
    """Hidden states of packed documents, with a head: each token sees itself alone."""

    def __init__(self, size: int = 64):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(320, size)
        self.mix = nn.Linear(size, size)

    def forward(self, tokens, positions, documents):
        return torch.tanh(self.mix(self.model.embed_tokens(tokens)))

    def head_weight(self):
        return self.model.embed_tokens.weight


def no_module():
    return 3
