"""Metrics from (sum, count): exact over uneven batches. Metrics never drive updates."""

from __future__ import annotations

import math


def language_model(total: float, count: int) -> dict[str, float]:
    """Mean loss in nats over ``count`` tokens, and the perplexity exp(loss)."""
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
