"""Differentiable recurrences. Nothing in here knows of language models."""

from elman.ops.recurrence import BACKENDS, recurrence

__all__ = ["BACKENDS", "recurrence"]
