"""Differentiable recurrences. Nothing in here knows of language models."""

from elman.ops.backends import BACKENDS, backend_status
from elman.ops.banks import banks
from elman.ops.norm import add_norm
from elman.ops.recurrence import record_backends, recurrence

__all__ = ["BACKENDS", "add_norm", "backend_status", "banks", "record_backends", "recurrence"]
