"""Metrics of a language model from (sum, count)."""

from __future__ import annotations

import math

LANGUAGE_MODEL = ("loss", "perplexity")
LARGEST = 700.0  # exp of more is no float


def language_model(total: float, count: int) -> dict[str, float]:
    """Mean loss in nats over ``count`` tokens, and the perplexity exp(loss)."""
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, LARGEST))}
