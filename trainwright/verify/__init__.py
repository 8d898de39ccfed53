"""Proof that a combination of techniques keeps the answer."""
