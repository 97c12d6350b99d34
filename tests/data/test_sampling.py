from typing import Any

import numpy as np
import pytest

from elman.data.bytes import Bytes
from elman.data.sampling import SAMPLERS, DocumentSampler, Ring, Sampler, StreamSampler, WindowSampler
from elman.errors import UsageError


def letters(text: str) -> Bytes:
    """``|`` stands for the delimiter."""
    return np.frombuffer(text.replace("|", "\x1e").encode(), dtype=np.uint8)


def shown(row: np.ndarray) -> str:
    return row.astype(np.uint8).tobytes().decode().replace("\x1e", "|")


#: Documents of 0 to 60 bytes.
DOCUMENTS = letters("".join("abcdefghij"[i % 10] * (i * 7 % 61) + "|" for i in range(60)))


def sampler(kind: type[Sampler] = WindowSampler, **changes: Any) -> Sampler:
    values = {"data": np.arange(1000, dtype=np.int64).astype(np.uint8), "seq_len": 16, "batch_size": 8, "seed": 3}
    return kind(**{**values, **changes})


def test_batches_depend_on_seed_and_step_alone() -> None:
    one = sampler()
    later = [one.batch(step).tokens for step in range(10)]
    assert np.array_equal(sampler().batch(7).tokens, later[7])
    assert not np.array_equal(later[6], later[7])
    assert not np.array_equal(sampler(seed=4).batch(7).tokens, later[7])


@pytest.mark.parametrize("kind", SAMPLERS.values())
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_out_the_same_batch(kind: type[Sampler], world_size: int) -> None:
    one = sampler(kind, data=DOCUMENTS)
    for step in (0, 5, 200):
        whole = one.batch(step)
        parts = [sampler(kind, data=DOCUMENTS).batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        if kind is WindowSampler:
            assert whole.reset is None
        else:
            assert np.array_equal(np.concatenate([part.reset for part in parts]), whole.reset)  # type: ignore[arg-type]


def test_windows_are_runs_of_the_file_and_reach_both_ends() -> None:
    data = np.arange(40, dtype=np.uint8)
    data[[0x1E, 39]] = 39, 0x1E
    windows = np.concatenate([sampler(data=data).batch(step).tokens for step in range(200)])
    assert windows.shape == (1600, 17)
    places = np.argsort(data)[windows]
    assert (np.diff(places, axis=1) == 1).all()
    assert places.min() == 0
    assert places.max() == 39


def test_a_file_of_exactly_one_window() -> None:
    assert np.array_equal(sampler(data=np.arange(17, dtype=np.uint8)).batch(0).tokens[3], np.arange(17))


def test_a_ring_goes_round_and_tells_the_end_from_the_start() -> None:
    assert shown(Ring(letters("ab|c|")).read(3, 12)) == "c|ab|c|ab|c|"
    assert shown(Ring(letters("ab|c")).read(3, 12)) == "c|ab|c|ab|c|"
    assert shown(Ring(letters("ab|c")).read(-1, 2)) == "|a"
    assert shown(Ring(letters("ab|c")).read(4, 1)) == "|"
    assert shown(Ring(letters("ab|c")).read(9, 2)) == "|a"


@pytest.mark.parametrize("kind", [DocumentSampler, StreamSampler])
def test_resets_are_where_documents_start(kind: type[Sampler]) -> None:
    one = sampler(kind, data=DOCUMENTS, seq_len=40)
    for step in range(1, 40):
        tokens, reset, _ = one.batch(step)
        assert reset is not None
        for row, marks, start in zip(tokens, reset, one.starts(step), strict=True):
            before = DOCUMENTS[start - 1]
            assert marks.tolist() == [before == 0x1E, *(row[:-2] == 0x1E)]


def test_rows_of_documents_start_with_one_or_in_the_middle_of_a_long_one() -> None:
    one = sampler(DocumentSampler, data=letters("abc|" * 10 + "l" * 500 + "|" + "xyz|" * 10))
    read = np.zeros(len(one.data), dtype=int)
    for step in range(300):
        tokens = one.batch(step).tokens
        for row, start in zip(tokens, one.starts(step), strict=True):
            text = shown(row)
            assert text == shown(Ring(one.data).read(int(start), 17))
            assert text.startswith(("abc|", "xyz|")) or text[0] in "l|"
            read[start : start + 17] += 1
    assert read.min() > 0


@pytest.mark.parametrize(("size", "batch_size", "seq_len"), [(960, 8, 24), (960, 8, 16), (1009, 7, 12), (101, 10, 10)])
@pytest.mark.parametrize("end", ["|", "e"])
def test_streams_read_every_byte_once_an_epoch(size: int, batch_size: int, seq_len: int, end: str) -> None:
    """Bytes are told apart by pairs of them, and by where streams say that they are."""
    rng = np.random.default_rng(0)
    data = rng.integers(0x20, 0x7F, size).astype(np.uint8)
    data[-1] = letters(end)[0]
    one = sampler(StreamSampler, data=data, batch_size=batch_size, seq_len=seq_len)
    ring = Ring(data)
    steps = -(-ring.size // seq_len)
    streams = np.concatenate([one.batch(step).tokens[:, :-1] for step in range(steps)], axis=1)
    targets = np.concatenate([one.batch(step).tokens[:, 1:] for step in range(steps)], axis=1)
    assert np.array_equal(streams[:, 1:], targets[:, :-1])
    first = one.starts(0)
    assert (np.abs(np.diff([*first, ring.size]) - ring.size / batch_size) < 1).all()
    for stream, start in zip(streams, first, strict=True):
        assert np.array_equal(stream, ring.read(int(start), len(stream)))
    # An epoch: each stream reads its own part and no more.
    epoch = np.concatenate([stream[:part] for stream, part in zip(streams, np.diff([*first, ring.size]), strict=True)])
    assert np.array_equal(epoch, ring.read(0, ring.size))
    if size % batch_size == 0 and end == "|":
        # The next: the part of the next stream.
        part = size // batch_size
        second = np.concatenate([stream[part : 2 * part] for stream in streams])
        assert np.array_equal(second, ring.read(part, size))


def test_streams_start_at_rest_and_then_only_where_documents_do() -> None:
    one = sampler(StreamSampler, data=letters("abcdefghijklmno|qrstuvwxyzABCDEF"), batch_size=4, seq_len=4)
    resets = [one.batch(step).reset.astype(int).tolist() for step in range(9)]  # type: ignore[union-attr]
    assert resets[0] == [[1, 0, 0, 0]] * 4
    assert resets[1] == [[0] * 4] * 4
    # The file has no delimiter at its end, so one is read there: the last stream comes round a byte later.
    assert shown(one.batch(2).tokens[3]) == "|abcd"
    assert resets[2] == [[0] * 4, [1, 0, 0, 0], [0] * 4, [0, 1, 0, 0]]
    assert shown(one.batch(3).tokens[0]) == "mno|q"
    assert resets[3] == [[0] * 4] * 4
    assert resets[4][0] == [1, 0, 0, 0]


def test_too_little_data_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"--sampling tbptt .*--batch-size 8 streams .* has 100 bytes, not 128: give a smaller"
    ):
        sampler(StreamSampler, data=letters("x" * 100))
    for kind in SAMPLERS.values():
        with pytest.raises(UsageError, match=r"--seq-len 16 needs windows of 17 bytes.* has 9 bytes"):
            sampler(kind, data=letters("x" * 9))
