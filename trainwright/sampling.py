"""Text from a decoder: how the next token is chosen, and the tokens that follow a prompt, over a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.models.decoder import Decoder, KVCache
from trainwright.recipe import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"--max-tokens {self.max_tokens}: give 1 or more")
        if self.temperature < 0:
            raise InputError(f"--temperature {self.temperature}: give 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k}: give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: give a fraction above 0 and up to 1")


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token (rows, 1) of logits (rows, vocabulary): the likeliest, or drawn from what top-k and top-p leave."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    ordered, order = probabilities.sort(-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k is not None:
        keep[:, sampling.top_k :] = False
    if sampling.top_p is not None:  # the token that crosses the threshold still belongs to the nucleus
        keep &= ordered.cumsum(-1) - ordered < sampling.top_p
    drawn = torch.multinomial(ordered * keep, 1, generator=generator)
    return order.gather(-1, drawn)


@torch.no_grad()  # NOTE: not inference_mode: what ZeRO 3 gathers meanwhile serves training afterwards
def tokens(
    model: Decoder,
    prompt: list[int],
    sampling: Sampling,
    *,
    stops: Collection[int],
    dtype: torch.dtype,
    context: Callable[[], AbstractContextManager[object]],
) -> Iterator[int]:
    """The tokens that follow the prompt, until a stop token, ``max_tokens``, or the model's length.

    Args:
        dtype: of the cache; what the projections give under ``context`` (autocast, or nothing).

    Raises:
        InputError: the prompt is empty or too long.
    """
    device = model.model.embed_tokens.weight.device
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1 or not prompt:
        raise InputError(
            f"the prompt has {len(prompt)} tokens; the model takes 1 to {model.config.max_position_embeddings - 1}"
        )
    new = min(sampling.max_tokens, room)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KVCache(model.config, 1, len(prompt) + new, dtype=dtype, device=device)
    following = torch.tensor([prompt], device=device)
    for _ in range(new):
        with context():
            logits = model.logits(model.extend(following, cache)[:, -1])
        following = pick(logits, sampling, generator)
        token = int(following)
        if token in stops:
            return
        yield token
