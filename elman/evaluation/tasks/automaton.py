"""A random finite automaton: the state that the letters so far lead to.

    input   d  d  b  a  c  b  b  d  b  d  d  b
    label   q1 q4 q2 q4 q3 q7 q6 q2 q4 q1 q4 q2

The automaton has 8 states, 4 letters and start state 0, and is always the same one: its transitions were drawn
independently and uniformly, once, anew until every state led to every other. Letters are independent and uniform; the
label is the state behind each. Guessing the state that is visited most gets 0.188 at T = 40, worked out exactly from
the Markov chain. A random letter merges states, so what was read long ago is mostly forgotten: this is easier than a
group.

Source: B. Liu et al., "Transformers Learn Shortcuts to Automata" (2023), for automata as a test of sequence models.
"""

from __future__ import annotations

import numpy as np

from elman.evaluation.tasks.base import IntArray, letters
from elman.evaluation.tasks.state_tracking import StateTracking

_STATES, _LETTERS, _SEED = 8, 4, 0


def _draw_transitions() -> IntArray:
    generator = np.random.Generator(np.random.Philox(key=_SEED))
    while True:
        transitions = generator.integers(0, _STATES, size=(_STATES, _LETTERS))
        reaches = np.eye(_STATES, dtype=np.int64)
        np.add.at(reaches, (np.arange(_STATES)[:, None], transitions), 1)
        if (np.linalg.matrix_power(reaches, _STATES) > 0).all():
            return transitions


class Automaton(StateTracking):
    """See the top of this file. Symbols: a to d; labels: q0 to q7."""

    name = "automaton"
    asks = "which state do the letters so far lead a random automaton to?"
    source = "Liu et al. (2023)"

    def __init__(self) -> None:
        super().__init__(_draw_transitions(), letters(_LETTERS), tuple(f"q{state}" for state in range(_STATES)))
