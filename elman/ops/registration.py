"""How an op with a backward pass of its own becomes known to PyTorch's dispatcher, compiler and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from elman.errors import UsageError

Implementation = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """Makes ``torch.compile`` call a function while it traces, and take its result for a constant."""
    # What torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_opaque(name: str, implementation: Implementation, fake: Implementation) -> None:
    """Makes ``torch.ops.elman.NAME``, into which a compiler does not look; the arguments as in ``register``."""
    # Not torch.library.custom_op: its first call imports torch._dynamo, which takes seconds.
    torch.library.define(f"elman::{name}", torch.library.infer_schema(implementation, mutates_args=()))
    torch.library.impl(f"elman::{name}", "default", implementation)
    torch.library.register_fake(f"elman::{name}", fake)


def register(
    name: str,
    forward: tuple[Implementation, Implementation],
    backward: tuple[Implementation, Implementation],
    setup_context: Callable[..., None],
    differentiate: Callable[..., tuple[Any, ...]],
    cannot: str | None = None,
) -> None:
    """Makes ``torch.ops.elman.NAME`` and ``torch.ops.elman.NAME_backward``.

    Args:
        name: of the op.
        forward: what computes, typed as the op's schema shall be, and what only makes tensors like its results.
        backward: the same of the op NAME_backward.
        setup_context: as for ``torch.library.register_autograd``.
        differentiate: likewise; it calls the backward op.
        cannot: what a second differentiation is told, the cure included; None where ``differentiate`` allows it.
    """
    register_opaque(name, *forward)
    register_opaque(f"{name}_backward", *backward)
    torch.library.register_autograd(f"elman::{name}", differentiate, setup_context=setup_context)
    if cannot is None:
        return

    def refuse(ctx: Any, *gradients: Tensor | None) -> None:
        raise UsageError(cannot)

    torch.library.register_autograd(f"elman::{name}_backward", refuse)
