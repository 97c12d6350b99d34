"""Differentiable recurrences. Nothing in here knows of language models."""

from elman.ops.recurrence import BACKENDS, record_backends, recurrence

__all__ = ["BACKENDS", "record_backends", "recurrence"]
