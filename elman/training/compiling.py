"""What a step needs of ``torch.compile``."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from elman.model import next_token_loss

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def compile_training(compile_layers: Callable[[Wrap], object]) -> Callable[..., Tensor]:
    """Have layers and loss compiled when they are first called in training; returns the loss.

    ``compile_layers`` is given what compiles a function, to run the layers by.
    """
    # Kernels chosen by timing would sum in another order in another process, and resuming would not be exact. Rows of
    # products padded to 128 bytes would be copied before each op of ours, and the bias not be fused.
    wanted = {"deterministic": True, "comprehensive_padding": False}
    options = {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}
    # Each kind of layer is a compilation of the same function: none of a long pattern's may be refused.
    torch._dynamo.config.recompile_limit = 64
    wrap = functools.partial(torch.compile, fullgraph=True, options=options)
    compile_layers(wrap)
    return wrap(next_token_loss)


@contextlib.contextmanager
def ignoring_compiler_warnings() -> Iterator[None]:
    """PyTorch's compiler warns of its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\b")
        yield


def first_line(error: Exception) -> str:
    """The cause of an error in one line, without torch.compile's wrapping."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
