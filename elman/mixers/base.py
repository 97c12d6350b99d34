"""What a variant is: a config that knows its counts, and the module that it builds.

A module says what its own parameters are by attributes, each a set of their names, where it is not plain to see:
``no_decay`` for what weight decay would spoil though it is no vector and no bias, ``no_matrix`` for what is no map
between units though it has two axes. Decays are in the first whatever their shape. ``lr_multiples`` maps names to what
their learning rate is a multiple of the others' by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from elman.errors import UsageError
from elman.options import check_types

#: Widths of heads and their like are multiples of this, which the hardware's fast kernels need.
_MULTIPLE = 8

#: How matrices start: ``normal``, N(0, 0.02²); ``fan_in``, N(0, 1 / inputs), but such as write to the residual stream
#: N(0, 0.02²); ``zero_out``, these 0, so that a model starts as its embedding.
WeightInit = Literal["normal", "fan_in", "zero_out"]

#: The largest ``bound``, beyond which a cell is linear in all but name.
LARGEST_BOUND = 1000.0

#: What a mixer carries from one chunk to the next: a pytree of tensors whose first axis is the batch. None: at rest.
State = Any


def check_bound(bound: float) -> None:
    """What ``--bound`` may be.

    Raises:
        UsageError: it is something else.
    """
    if not 0 < bound <= LARGEST_BOUND:
        raise UsageError(f"--bound {bound} is out of range: give a number above 0 and up to {LARGEST_BOUND:.0f}")


def round_width(width: float) -> int:
    """The nearest width, at least 1, that fast kernels take: a multiple of 8."""
    return max(1, round(width / _MULTIPLE)) * _MULTIPLE


def split_heads(width: float, head_width: int) -> tuple[int, int]:
    """Heads that share about ``width`` units evenly: how many, and how wide each.

    Of all even widths from half to one and a half times ``head_width`` whose heads make one that fast kernels take,
    the one nearest to ``width`` in all; of those, a width that fast kernels take, and the nearest to ``head_width``.
    """
    if width <= head_width:
        return 1, round_width(width)
    splits = [(round(width / each), each) for each in range(head_width // 4 * 2, head_width * 3 // 2 + 1, 2)]
    return min(
        ((heads, each) for heads, each in splits if heads * each % _MULTIPLE == 0),
        key=lambda split: (abs(split[0] * split[1] - width), split[1] % _MULTIPLE > 0, abs(split[1] - head_width)),
    )


class Mixer(nn.Module, ABC):
    """The part of a layer that mixes over time. Time-major inside: step t of every row lies together."""

    #: Names of the products that write to the residual stream.
    outputs: frozenset[str] = frozenset({"out_proj"})

    def initialize(self, weight_init: WeightInit = "normal") -> None:
        """Draw the weights anew: matrices as ``weight_init`` says, biases 0. A mixer with other wishes extends this."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name in self.outputs and weight_init == "zero_out":
                nn.init.zeros_(module.weight)
            else:
                plain = weight_init == "normal" or name in self.outputs
                nn.init.normal_(module.weight, std=0.02 if plain else module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def compiles(self) -> bool:
        """Whether ``torch.compile`` takes ``forward`` in one piece, whatever T; a layer it does not take runs plain."""
        return True

    @abstractmethod
    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        """Run T steps.

        Args:
            x: (T, B, D), normalised by the shell.
            state: what the last call returned, or None to start at rest.
            reset: (T, B) bool; where true, that row's state is zeroed before that step.

        Returns:
            y (T, B, D), to be added to the residual stream, and the state after the last step. Running a sequence in
            chunks with the state carried gives what running it in one piece gives.
        """

    def reserve(self, state: State, steps: int) -> State:
        """The same state in a form that goes on for ``steps`` steps at least in the memory that it has.

        ``forward`` may write to such a state in place, and then returns tensors of the same shapes, those that it wrote
        to among them: what a captured step needs, and what spares a large state a copy. Its length, where it has one,
        lies on the device. A state that has this form already, with room left or needing none, is returned itself.
        """
        return state


class FollowsWeights(nn.Module, ABC):
    """A module with buffers that are worked out of its weights, and that forward passes read but never change."""

    @abstractmethod
    def after_step(self) -> None:
        """Bring the buffers up to date; called after each step of the optimiser."""


@dataclass(frozen=True)
class MixerConfig(ABC):
    """The options of one variant, as on the command line, and its counts at a model width ``dim``.

    Counts are formulas, so that a size can be solved for without building a model; tests hold them against the module.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    #: A hash of its file's text, if that lies outside this package: see own.py.
    code: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_types(self)

    @abstractmethod
    def build(self, dim: int) -> Mixer | tuple[Mixer, ...]:
        """The module at width ``dim``; several where the layer is a chain of them, each between a norm and a sum.

        The norms behind the first are part of this config's ``num_params``.
        """

    def check_device(self, device: torch.device) -> None:  # noqa: B027
        """Training calls this before it starts on ``device``.

        Raises:
            UsageError: what would run there is not what the options ask for.
        """

    def check_resets(self, device: torch.device) -> None:  # noqa: B027
        """Training calls this too before it starts with documents told apart: with states and resets.

        Raises:
            UsageError: as ``check_device``.
        """

    def slow_option(self) -> str | None:
        """In a line with the cure, what was given that makes products slow on a GPU's tensor cores; None: nothing."""
        return None

    def pinned(self, dim: int) -> MixerConfig:
        """The same at width ``dim``, what it rounds there given as an option: so widths near it differ smoothly.

        A size that no width meets, because a large part comes or goes at once, is met by one of these.
        """
        return self

    @abstractmethod
    def num_params(self, dim: int) -> int:
        """Learned numbers."""

    @abstractmethod
    def flops_per_token(self, dim: int, seq_len: int) -> int:
        """FLOPs of the forward pass a token: 2 a multiply-add of every matrix product, pointwise work left out.

        So is what a call costs however many rows it has: the composing of weights.
        ``seq_len`` matters only where the work a token grows with the context, as in attention.
        """

    @abstractmethod
    def state_size(self, dim: int, seq_len: int) -> int:
        """Numbers carried from one step to the next, a sequence. ``seq_len``: as for ``flops_per_token``."""


@dataclass(frozen=True)
class RecurrentConfig(MixerConfig):
    """A variant with a recurrent matrix."""

    recurrent_lr: float = 1.0
    """Learning rate of W_h as a multiple of --lr. E1, E5 and E10 have learned more with 0.1, gated cells with 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recurrent_lr <= 100:
            raise UsageError(f"--recurrent-lr {self.recurrent_lr} is out of range: give a number from 0 to 100")


@dataclass(frozen=True)
class ExpandedConfig(MixerConfig):
    """A variant whose inner width may differ from the model's."""

    expansion: float = 1.0
    """Inner width as a multiple of the model width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.expansion <= 64:
            raise UsageError(f"--expansion {self.expansion} is out of range: give a number above 0 and up to 64")

    def inner_size(self, dim: int) -> int:
        """d, the number of recurrent units at model width ``dim``."""
        return max(1, round(self.expansion * dim))
