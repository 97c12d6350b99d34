"""Streams of tokens: they read the whole file in order, and go on from their places to the token."""

from itertools import islice

import numpy as np
import pytest
import torch

from elman.data import streams
from elman.data.loading import Loader
from elman.data.sampling import Ring
from elman.data.streams import TokenStreams
from elman.errors import UsageError

from .test_vocabulary import TEXT, TINY, array, decode

#: With and without a delimiter at its end, and bytes that are no UTF-8, where characters seem to start nowhere.
TEXTS = [TEXT, TEXT[:-1], bytes([0xA0]) * 3000 + TEXT[:999]]


def streams_of(text: bytes = TEXT, batch_size: int = 6, seq_len: int = 32) -> TokenStreams:
    return TokenStreams(array(text), seq_len, batch_size, 0, TINY)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BLOCK", 201)


@pytest.mark.parametrize("text", TEXTS, ids=["ended", "not ended", "no UTF-8"])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_streams_read_the_file_round_and_round(text: bytes, batch_size: int) -> None:
    one = streams_of(text, batch_size)
    ring = Ring(one.data)
    steps = 2 * ring.size // batch_size // 32
    batches = [batch for batch, _ in islice(one.batches(0, one.first_places()), steps)]
    inputs = np.concatenate([batch.tokens[:, :-1] for batch in batches], axis=1)
    targets = np.concatenate([batch.tokens[:, 1:] for batch in batches], axis=1)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    resets = np.concatenate([batch.reset for batch in batches], axis=1)  # type: ignore[misc]
    assert resets[:, 0].all()
    assert np.array_equal(resets[:, 1:], inputs[:, :-1] == TINY.delimiter)
    starts = [one.edge(place) for place, _ in one.first_places()]
    assert np.abs(np.diff([*starts, ring.size]) - ring.size / batch_size).max() <= 4
    for row, start in zip(inputs, starts, strict=True):
        read = decode(row)
        assert len(read) > ring.size / batch_size
        assert ring.read(start, len(read)).tobytes() == read
    if text is TEXT:
        assert len(read) < 2.8 * inputs[-1].size + 300  # words are tokens, but for those at edges
        assert len(read) > 1.2 * inputs[-1].size


@pytest.mark.parametrize("workers", [0, 1, 2, 9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_neither_workers_nor_ranks_nor_a_stop_change_what_is_read(workers: int, world_size: int) -> None:
    one = streams_of()
    whole = [batch for batch, _ in islice(one.batches(0, one.first_places()), 20)]
    before = Loader(one)
    for step in range(9):
        before.batch(step)
    # A batch made ahead of its step, as a warm-up does, is no step.
    before.batch(9)
    places = before.places(9)
    assert places is not None
    after = [Loader(one, workers, rank, world_size) for rank in range(world_size)]
    try:
        for loader in after:
            loader.seek(9, places)
            assert torch.equal(loader.places(9), places.chunk(world_size)[after.index(loader)])  # type: ignore[arg-type]
        for step in (9, 9, 10, 11, 12, 13, 14):
            parts = [loader.batch(step) for loader in after]
            assert np.array_equal(torch.cat([part.tokens for part in parts]).numpy(), whole[step].tokens)
            assert np.array_equal(torch.cat([part.reset for part in parts]).numpy(), whole[step].reset)  # type: ignore[misc]
        # Taken up again after the workers have been ended.
        after[0].close()
        assert np.array_equal(after[0].batch(14)[0].numpy(), whole[14].tokens[: 6 // world_size])
    finally:
        for loader in after:
            loader.close()


def test_too_little_text_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"--batch-size 600 streams by --seq-len 32 tokens, .* has \d+ bytes, not 19200"
    ):
        streams_of(TEXT[:9000], 600)
