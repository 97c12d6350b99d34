"""The model's state from one step to the next."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from elman.mixers import State
from elman.training.distributed import ALONE, Processes


class Carry:
    """A state for each part of a rank's rows, detached. Where nothing is carried, every state is None: at rest.

    A state is a pytree of tensors whose first axis is the part's rows.
    """

    def __init__(self, parts: int, rest: State = None, processes: Processes = ALONE) -> None:
        """``rest``: any state of one part, as the model returns it, where states are carried; else None."""
        self._processes = processes
        self.active = rest is not None
        # Tensors of its own for each part, which may be written in place.
        self.states: list[State] = [
            _own(tree_map(torch.zeros_like, rest)) if self.active else None for _ in range(parts)
        ]

    def put(self, part: int, state: State) -> None:
        """Keep what the model returned for a part."""
        if self.active:
            self.states[part] = _own(state)

    def undo(self, skip: Tensor, before: list[State]) -> None:
        """Go back to the states ``before`` where ``skip`` (), a bool on their device, is true, and wait for nobody."""
        if self.active:
            self.states = [
                tree_map(lambda now, old: torch.where(skip, old, now), state, old)
                for state, old in zip(self.states, before, strict=True)
            ]

    def settle(self, places: list[State]) -> None:
        """Move the states into the tensors of ``places``, earlier ones, where a captured step finds them again."""
        if self.active:
            tree_map(lambda place, now: place.copy_(now), places, self.states)
            self.states = places

    def whole(self) -> State:
        """The state of the whole batch, for a checkpoint: all ranks' rows one behind the other."""
        if not self.active:
            return None
        return self._processes.rows(tree_map(lambda *parts: torch.cat(parts), *self.states))

    def restore(self, state: State) -> None:
        """Go back to what ``whole`` gave, be it for another number of ranks or parts."""
        if self.active:
            for part, there in enumerate(self.states):
                place = self._processes.rank * len(self.states) + part
                self.states[part] = tree_map(lambda now, saved, place=place: _rows(saved, now, place), there, state)


def _own(state: State) -> State:
    """Without history and, so that compiled code meets one layout alone, a copy in order."""
    return tree_map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), state)


def _rows(saved: Tensor, now: Tensor, place: int) -> Tensor:
    return saved[place * len(now) : (place + 1) * len(now)].to(now.device, copy=True)
