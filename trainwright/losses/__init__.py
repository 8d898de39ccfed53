"""Losses as sums and what they are divided by, so that means are exact under accumulation and over any number of ranks."""

from trainwright.losses.criteria import Criterion, make, task_for, wanted
from trainwright.losses.tokens import Shard, logits_cross_entropy, split_softmax, token_cross_entropy

__all__ = ["Criterion", "Shard", "logits_cross_entropy", "make", "split_softmax", "task_for", "token_cross_entropy", "wanted"]
