"""Recurrent networks on sequences (Elman 1990; LSTM, Hochreiter and Schmidhuber 1997; GRU, Cho et al. 2014)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from trainwright.recipe.base import Fraction, Positive, Section

KINDS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentOptions(Section):
    """``model.options`` of an rnn, lstm or gru."""

    hidden: Positive = Field(128, description="units of a layer, in each direction")
    layers: Positive = 1
    bidirectional: bool = False
    dropout: Fraction = Field(0.0, description="between the layers and before the head")


class Recurrent(nn.Module):
    """(n, time, features) -> (n, outputs): a linear head on the last layer's final state (both directions' if there are two).

    Images (n, channels, height, width) are read row by row: time is the height, the features are a row's channels and pixels.

    Args:
        name: rnn, lstm or gru.
    """

    def __init__(self, options: RecurrentOptions, inputs: tuple[int, ...], outputs: int, *, name: str) -> None:
        super().__init__()
        features = inputs[-1] * (inputs[0] if len(inputs) == 3 else 1)
        self.recurrent = KINDS[name](
            features,
            options.hidden,
            options.layers,
            batch_first=True,
            bidirectional=options.bidirectional,
            dropout=options.dropout if options.layers > 1 else 0.0,  # torch warns that one layer has no between
        )
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(options.hidden * (1 + options.bidirectional), outputs)

    def blocks(self) -> list[nn.Module]:
        """The recurrent network alone: its layers run as one operator."""
        return [self.recurrent]

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.transpose(1, 2).flatten(2)
        _, state = self.recurrent(x)
        last = state[0] if isinstance(state, tuple) else state  # an LSTM has a cell state, too
        directions = 1 + self.recurrent.bidirectional
        return self.head(self.dropout(torch.cat(list(last[-directions:]), dim=-1)))
