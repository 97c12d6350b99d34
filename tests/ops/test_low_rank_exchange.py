"""The exchange of the low-rank kernels, as a model of its CTAs in random orders: nothing old is read, nobody waits for
ever.

A step of a tile has two products, so two rings of slots are used in turn (``cuda/low_rank.cuh``). What the model takes
from the GPU: stores of a CTA become visible in any order and as late as they like, but those to one word in their own,
and all those before a fence before it ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

EMPTY = -1
Word = tuple[str, int, int, int]  # ring, slot, tile, and the CTA that publishes it


class StaleError(Exception):
    """A reader took a value of another step for its own."""


class DeadlockError(Exception):
    """Nobody can go on."""


@dataclass
class Protocol:
    """The rules that keep it right; the tests break them one by one."""

    slots: int = 8
    fences: bool = True
    wiped_ranks: int = 2  # steps back, when the ranks of a step are published
    wiped_states: int = 1  # likewise, when the states after a step are


@dataclass
class Cta:
    """What its agents have done, and its stores that nobody sees yet, in order."""

    has_units: bool
    has_ranks: bool
    sums: dict[tuple[str, int, int], bool] = field(default_factory=dict)  # whether they have been taken
    arrived: set[int] = field(default_factory=set)  # at the ends of which steps
    fenced: set[int] = field(default_factory=set)
    stores: list[tuple[Word, int]] = field(default_factory=list)


class Group:
    """CTAs that share a batch; some have no units, some no ranks, none has neither."""

    def __init__(self, protocol: Protocol, tiles: int, steps: int, seed: int, lazy_wipes: bool) -> None:
        self.protocol, self.tiles, self.steps, self.lazy_wipes = protocol, tiles, steps, lazy_wipes
        self.random = random.Random(seed)
        self.memory: dict[Word, int] = {}
        self.ctas = [Cta(True, True), Cta(True, False), Cta(True, True), Cta(False, True)]

    def run(self) -> None:
        """All agents to their ends, in random order."""
        agents = [agent for index in range(len(self.ctas)) for agent in self.agents(index)]
        waits: dict[int, Callable[[], bool]] = {}
        while agents:
            ready = [agent for agent in agents if waits.get(id(agent), lambda: True)()]
            visible = [(cta, at) for cta in self.ctas for at in self.can_show(cta, eager=not ready)]
            if not ready and not visible:
                raise DeadlockError
            if visible and (not ready or self.random.random() < 0.5):
                cta, at = self.random.choice(visible)
                word, value = cta.stores.pop(at)
                self.memory[word] = value
                continue
            agent = self.random.choice(ready)
            try:
                waits[id(agent)] = next(agent)
            except StopIteration:
                agents.remove(agent)

    def can_show(self, cta: Cta, eager: bool) -> list[int]:
        """Which stores may become visible next. Lazy wipes come when they must: for a fence, or a store behind them."""
        first = {}
        for at, (word, _) in enumerate(cta.stores):
            first.setdefault(word, at)
        followed = {word for at, (word, _) in enumerate(cta.stores) if at > first[word]}
        return [
            at
            for word, at in first.items()
            if eager or not self.lazy_wipes or cta.stores[at][1] != EMPTY or word in followed
        ]

    def agents(self, index: int) -> list[Iterator[Callable[[], bool]]]:
        cta = self.ctas[index]
        found = [self.products(cta), self.fences(cta)]
        found += [self.cells(index, cta), self.ranks(index, cta)]
        return found

    def word(self, ring: str, step: int, tile: int, publisher: int) -> Word:
        return ring, step % self.protocol.slots, tile, publisher

    def products(self, cta: Cta) -> Iterator[Callable[[], bool]]:
        """Tiles go down and up by turns; ranks are asked for early, and states too where there are three tiles."""
        turns = [(step, tile) for step in range(self.steps) for tile in range(self.tiles)]
        behind = self.tiles // 2
        for turn in range(len(turns) + behind):
            up = turns[turn - behind] if turn >= behind else None
            if up is not None and behind > 0:
                self.ask("ranks", *up)
            if turn < len(turns):
                yield from self.receive(cta, "states", *turns[turn])
            if turn + 1 < len(turns) and self.tiles > behind + 1:
                self.ask("states", *turns[turn + 1])
            if up is not None:
                yield from self.receive(cta, "ranks", *up)

    def publishers(self, ring: str) -> list[int]:
        """In random order."""
        found = [n for n, cta in enumerate(self.ctas) if (cta.has_units if ring == "states" else cta.has_ranks)]
        return self.random.sample(found, len(found))

    def ask(self, ring: str, step: int, tile: int) -> None:
        """What is there already is taken for what was asked for."""
        for publisher in self.publishers(ring):
            self.check(ring, step, tile, publisher)

    def check(self, ring: str, step: int, tile: int, publisher: int) -> None:
        found = self.memory.get(self.word(ring, step, tile, publisher), EMPTY)
        if found not in (EMPTY, step):
            raise StaleError(f"{ring} of step {step}: found those of step {found}")

    def receive(self, cta: Cta, ring: str, step: int, tile: int) -> Iterator[Callable[[], bool]]:
        for publisher in self.publishers(ring):
            word = self.word(ring, step, tile, publisher)
            yield lambda word=word: self.memory.get(word, EMPTY) != EMPTY
            self.check(ring, step, tile, publisher)
        older = [key for key, taken in cta.sums.items() if key[0] == ring and not taken]
        if len(older) >= 2:  # two buffers of sums
            yield lambda: cta.sums[older[0]]
        cta.sums[ring, step, tile] = False

    def take(self, cta: Cta, ring: str, step: int, tile: int) -> Iterator[Callable[[], bool]]:
        yield lambda: (ring, step, tile) in cta.sums
        cta.sums[ring, step, tile] = True

    def finish_step(self, cta: Cta, step: int) -> Iterator[Callable[[], bool]]:
        """The cells pass a barrier with the warp that fences what they have done the step before."""
        cta.arrived.add(step)
        if step > 0:
            yield lambda: step - 1 in cta.fenced

    def fences(self, cta: Cta) -> Iterator[Callable[[], bool]]:
        for step in range(self.steps - 1):
            yield lambda step=step: step in cta.arrived
            yield from self.fence(cta)
            cta.fenced.add(step)

    def fence(self, cta: Cta) -> Iterator[Callable[[], bool]]:
        """All stores of the CTA that were before it become visible, in their order."""
        if self.protocol.fences:
            before = list(cta.stores)
            while any(store is other for store in before for other in cta.stores):
                word, value = cta.stores.pop(0)
                self.memory[word] = value
                yield lambda: True

    def cells(self, index: int, cta: Cta) -> Iterator[Callable[[], bool]]:
        if cta.has_units:
            cta.stores += [(self.word("states", 0, tile, index), 0) for tile in range(self.tiles)]
        for step in range(self.steps):
            for tile in range(self.tiles):
                yield from self.take(cta, "ranks", step, tile)
                if cta.has_units and step + 1 < self.steps:
                    cta.stores.append((self.word("states", step + 1, tile, index), step + 1))
                wiped = step - self.protocol.wiped_states
                if cta.has_units and wiped >= 0:
                    cta.stores.append((self.word("states", wiped, tile, index), EMPTY))
            yield from self.finish_step(cta, step)

    def ranks(self, index: int, cta: Cta) -> Iterator[Callable[[], bool]]:
        for step in range(self.steps):
            for tile in range(self.tiles):
                yield from self.take(cta, "states", step, tile)
                if cta.has_ranks:
                    cta.stores.append((self.word("ranks", step, tile, index), step))
                    wiped = step - self.protocol.wiped_ranks
                    if wiped >= 0:
                        cta.stores.append((self.word("ranks", wiped, tile, index), EMPTY))
            if step % 4 == 3:
                yield from self.fence(cta)


@pytest.mark.parametrize("lazy_wipes", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_every_step_is_read_once_it_is_there(tiles: int, lazy_wipes: bool) -> None:
    for seed in range(12):
        Group(Protocol(), tiles, 22, seed, lazy_wipes).run()


@pytest.mark.parametrize(
    "broken",
    [
        Protocol(slots=2),
        Protocol(fences=False),
        Protocol(wiped_ranks=0),
        Protocol(wiped_ranks=1),
        Protocol(wiped_states=0),
    ],
)
def test_a_broken_rule_is_found_out(broken: Protocol) -> None:
    for seed in range(200):
        try:
            Group(broken, 1 + seed // 2 % 3, 22, seed, lazy_wipes=seed % 2 == 0).run()
        except (StaleError, DeadlockError):
            return
    pytest.fail("nobody noticed")
