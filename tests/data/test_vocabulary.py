import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elman.data import vocabulary
from elman.data.bytes import Bytes
from elman.data.loading import Loader
from elman.data.sampling import DocumentSampler, Ring, Sampler, WindowSampler
from elman.data.vocabulary import BYTES, TiktokenVocabulary, open_vocabulary
from elman.errors import UsageError

from .tiny_encoding import constructor, tiktoken, tiny

__all__ = ["tiny"]

TINY = TiktokenVocabulary(tiktoken.Encoding(**constructor()))
TEXT = "".join(f"the quick fox {i} é {'日本' * (i % 5)} over the fence.\x1e" for i in range(400)).encode()


def array(text: bytes) -> Bytes:
    return np.frombuffer(text, dtype=np.uint8)


def decode(tokens: np.ndarray) -> bytes:
    return b"".join(TINY.pieces[token] for token in tokens)


def test_bytes_are_themselves() -> None:
    text = array(bytes(range(256)))
    assert BYTES.encode(text) is text
    assert BYTES.size == 256
    assert b"".join(BYTES.pieces) == bytes(text)
    assert open_vocabulary(None) is BYTES


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_every_text_comes_back_byte_for_byte(text: bytes) -> None:
    tokens = TINY.encode(array(text))
    assert decode(tokens) == text
    assert TINY.lengths[tokens].sum() == len(text)


def test_tokens_are_those_of_tiktoken_and_the_delimiter_stands_alone() -> None:
    assert TINY.encode(array(b"the fox over")).tolist() == TINY.encoding.encode_ordinary("the fox over")
    assert TINY.encode(array(b"fox.\x1ethe")).tolist() == [263, 255 - ord("."), 255 - 0x1E, 258]
    # Special tokens are text in a text.
    assert 300 not in TINY.encode(array(b"<|endoftext|>"))
    assert TINY.size == 304
    assert [i for i, piece in enumerate(TINY.pieces) if not piece] == list(range(270, 304))


def test_a_long_run_of_spaces_does_not_overflow() -> None:
    assert decode(TINY.encode(array(b" " * 1_500_000))) == b" " * 1_500_000


@pytest.mark.parametrize("kind", [WindowSampler, DocumentSampler])
def test_windows_of_tokens_are_runs_of_the_file(kind: type[Sampler]) -> None:
    one = kind(array(TEXT), 48, 8, 0, TINY)
    for step in range(20):
        tokens, reset, _ = one.batch(step)
        assert tokens.shape == (8, 49)
        for row, start in zip(tokens, one.starts(step), strict=True):
            text = decode(row)
            assert Ring(one.data).read(int(start), len(text)).tobytes() == text
            assert text[:1].decode("utf-8", "replace") != "\ufffd" or text[0] >= 0xC0
        if reset is not None:
            assert np.array_equal(reset[:, 1:], tokens[:, :-2] == TINY.delimiter)


def test_what_a_window_holds_does_not_depend_on_where_reading_stopped() -> None:
    one = WindowSampler(array(TEXT), 48, 8, 0, TINY)
    far = WindowSampler(array(TEXT), 480, 8, 0, TINY)
    for start in range(0, 4000, 97):
        start = TINY.first_start(one.data, start)
        near = one._read(Ring(one.data), start)
        assert np.array_equal(near, far._read(Ring(one.data), start)[:49])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    one = DocumentSampler(array(TEXT), 32, 4, 5, TINY)
    loader = Loader(one, workers)
    try:
        for step in (7, 7, 8, 9, 10, 11, 3, 4):
            tokens, reset, _ = loader.batch(step)
            expected = one.batch(step)
            assert np.array_equal(tokens.numpy(), expected.tokens)
            assert reset is not None
            assert np.array_equal(reset.numpy(), expected.reset)
    finally:
        loader.close()


def test_a_tokenizer_is_found_by_its_name(tiny: str) -> None:
    assert open_vocabulary(tiny).size == 304
    with pytest.raises(UsageError, match=r"--tokenizer 'p5' is unknown: choose one of tiktoken's, .*p50k_base"):
        open_vocabulary("p5")


def test_no_network_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UsageError, match=r"--tokenizer p50k_base cannot be loaded .*a network.*TIKTOKEN_CACHE_DIR"):
        open_vocabulary("p50k_base")


def test_a_missing_package_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    vocabulary._open_tiktoken.cache_clear()
    with pytest.raises(UsageError, match=r"--tokenizer gpt2 needs the package tiktoken .*: pip install tiktoken"):
        open_vocabulary("gpt2")


def test_an_encoding_without_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiktoken.Encoding(name="x", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    with pytest.raises(UsageError, match=r"--tokenizer r50k_base has no token for some bytes"):
        open_vocabulary("r50k_base")
