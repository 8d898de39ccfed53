"""Proof that a combination of techniques keeps the answer: ``command.verify`` for a recipe, ``prove`` for two callables."""

from trainwright.verify.callables import prove

__all__ = ["prove"]
