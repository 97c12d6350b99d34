"""Differentiable recurrences. Nothing in here knows of language models."""

from elman.ops.backends import BACKENDS, backend_status
from elman.ops.recurrence import record_backends, recurrence

__all__ = ["BACKENDS", "backend_status", "record_backends", "recurrence"]
