"""What a variant is: a config that knows its counts, and the module that it builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from elman.options import check_choices

#: What a mixer carries from one chunk to the next: a pytree of tensors whose first axis is the batch. None: at rest.
State = Any


class Mixer(nn.Module, ABC):
    """The part of a layer that mixes over time. Time-major inside: step t of every row lies together.

    Attributes:
        compiles: whether ``torch.compile`` takes it in one piece, however long the sequence.
    """

    compiles: ClassVar[bool] = True

    def initialize(self) -> None:
        """Draw the weights anew: matrices N(0, 0.02), biases 0. A mixer with other wishes extends this."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

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

    def __post_init__(self) -> None:
        check_choices(self)

    @abstractmethod
    def build(self, dim: int) -> Mixer:
        """The module at width ``dim``."""

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
