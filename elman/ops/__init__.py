"""Differentiable recurrences. Nothing in here knows of language models."""

from elman.ops.backends import BACKENDS, backend_status
from elman.ops.banks import banks
from elman.ops.matrix import matrix_recurrence
from elman.ops.norm import add_norm
from elman.ops.persistent import choosing_for_graphs
from elman.ops.recurrence import note_backend, note_recurrence, record_backends, recurrence, watch_recurrences
from elman.ops.scan import linear_scan
from elman.ops.short_conv import short_conv

__all__ = [
    "BACKENDS",
    "add_norm",
    "backend_status",
    "banks",
    "choosing_for_graphs",
    "linear_scan",
    "matrix_recurrence",
    "note_backend",
    "note_recurrence",
    "record_backends",
    "recurrence",
    "short_conv",
    "watch_recurrences",
]
