"""What several tasks share: an automaton reads letters drawn uniformly, and its state is asked for behind each.

With s_0 = 0 and letters x_1 ... x_T, independent and uniform, the label of step t is s_t = transitions[s_{t-1}, x_t].
All positions count, so that every prefix of an example is one too.
"""

from __future__ import annotations

from abc import ABC

import numpy as np

from elman.evaluation.tasks.base import Examples, IntArray, Task


class StateTracking(Task, ABC):
    """A task of this kind. Labels are symbols of their own, behind the letters.

    Attributes:
        transitions: (states, letters) int64, the next state.
    """

    def __init__(self, transitions: IntArray, letter_names: tuple[str, ...], state_names: tuple[str, ...]) -> None:
        assert transitions.shape == (len(state_names), len(letter_names))
        self.transitions = transitions
        self.symbols = (*letter_names, *state_names)

    def generate(self, generator: np.random.Generator, batch: int, length: int) -> Examples:
        count = self.transitions.shape[1]
        tokens = generator.integers(0, count, size=(batch, length))
        states = np.empty_like(tokens)
        state = np.zeros(batch, dtype=np.int64)
        for t in range(length):
            state = self.transitions[state, tokens[:, t]]
            states[:, t] = state
        return Examples(tokens, count + states, np.ones(tokens.shape, dtype=np.bool_))

    def chance(self, length: int) -> float:
        """That of the state which is visited most, exactly: by the automaton's Markov chain."""
        count, letter_count = self.transitions.shape
        step = np.zeros((count, count))
        np.add.at(step, (np.arange(count)[:, None], self.transitions), 1 / letter_count)
        distribution, visits = np.eye(count)[0], np.zeros(count)
        for _ in range(length):
            distribution = distribution @ step
            visits += distribution
        return float(visits.max() / length)
