"""Writing: by steps plain and captured, of one text and several, from prompts in one piece and in many."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from elman import generation
from elman.capture import CudaRecorder
from elman.data.bytes import DELIMITER
from elman.data.vocabulary import ByteVocabulary
from elman.errors import UsageError
from elman.generation import Decoder, Sampling, as_bytes, generate
from elman.inference import freeze
from elman.mixers import mamba2, mixer_config
from elman.model import LanguageModel, ModelConfig
from tests.mixers.test_mamba2 import skip_without_float32
from tests.training.tape import TapeRecorder

GREEDY = Sampling(temperature=0)
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("e1", {"conv": 3}), ("e5", {}), ("e10", {}), ("matrix", {"conv": 3, "key_size": 8, "value_size": 8}),
    ("gru", {}), ("ladder_6", {}),
    ("mamba2", {"d_state": 8, "headdim": 8}), ("transformer", {"head_dim": 8}),
]  # fmt: skip
patterns = pytest.mark.parametrize(("name", "options"), PATTERNS, ids=[name for name, _ in PATTERNS])


def build(name: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(16, 2, (mixer_config(name)(**options),)))
    # As they start, mixers hardly matter to what is likeliest: a token by its own embedding.
    for parameter in model.layers.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return model.eval()


@torch.inference_mode()
def by_whole_texts(model: LanguageModel, prompt: bytes, count: int, delimiter: int | None = None) -> bytes:
    """The likeliest bytes, each found by running the whole text before it, reset where a document starts."""
    text = list(prompt or bytes([DELIMITER]))
    before = len(text)
    for _ in range(count):
        reset = torch.tensor([[i == 0 or text[i - 1] == delimiter for i in range(len(text))]])
        text.append(int(model(torch.tensor([text]), None, reset)[0][0, -1].argmax()))
    return bytes(text[before:])


def write(decoder: Decoder, count: int) -> list[bytes]:
    steps = list(itertools.islice(decoder.write(), count))
    return [b"".join(pieces) for pieces in zip(*steps, strict=True)]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    made: list[TapeRecorder] = []

    def make(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setattr(generation, "CudaRecorder", make)
    return made


@patterns
def test_steps_write_what_whole_texts_give(name: str, options: dict[str, Any], tape: list[TapeRecorder]) -> None:
    """Plainly, and by what was captured on the third step and replayed from then on."""
    model = build(name, **options)
    expected = by_whole_texts(model, b"some text", 8)
    assert len(set(expected)) > 2
    for graph in (False, True):
        decoder = Decoder(model, 1, GREEDY, graph=graph)
        decoder.read([as_bytes(b"some text")])
        assert write(decoder, 8) == [expected]
    assert (tape[0].plain, tape[0].recorded, tape[0].replayed) == (2, 1, 6)


def test_steps_that_cannot_be_captured_are_taken_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(TapeRecorder):
        def record(self, step: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(generation, "CudaRecorder", Refusing)
    for name in ("e1", "transformer"):
        model = build(name)
        decoder = Decoder(model, 1, GREEDY, graph=True)
        decoder.read([as_bytes(b"some text")])
        assert write(decoder, 8) == [by_whole_texts(model, b"some text", 8)]
        assert decoder.not_captured == "operation not permitted when stream is capturing"
        assert not decoder.captured


@patterns
def test_texts_of_unequal_prompts_are_those_of_one_at_a_time(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    prompts = [b"a longer one", b"", b"short"]
    decoder = Decoder(model, 3, GREEDY)
    decoder.read([as_bytes(prompt) for prompt in prompts])
    assert write(decoder, 6) == [by_whole_texts(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("name", ["e1", "transformer"])
def test_a_prompt_is_read_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    prompts = [b"a prompt of many pieces", b"and a shorter one", b"x"]
    expected = [by_whole_texts(model, prompt, 4) for prompt in prompts]
    monkeypatch.setattr(generation, "_PREFILL", 3)
    monkeypatch.setattr(generation, "_ENCODED", 5)
    several = Decoder(model, 3, GREEDY)
    several.read([as_bytes(prompt) for prompt in prompts])
    assert write(several, 4) == expected
    for prompt, text in zip(prompts, expected, strict=True):
        alone = Decoder(model, 1, GREEDY)
        alone.read([as_bytes(prompt)])
        assert write(alone, 4) == [text]


@pytest.mark.parametrize("name", ["e1", "transformer"])
@pytest.mark.parametrize("graph", [False, True])
def test_turns_go_on_from_where_the_text_is(name: str, graph: bool, tape: list[TapeRecorder]) -> None:
    model = build(name)
    decoder = Decoder(model, 1, GREEDY, graph=graph)
    text = b""
    for turn in (b"first", b" and second", b"", b"!"):
        decoder.read([as_bytes(turn)])
        text += turn
        (written,) = write(decoder, 5)
        assert written == by_whole_texts(model, text, 5)
        text += written


@pytest.mark.parametrize("name", ["e1", "transformer"])
@pytest.mark.parametrize("graph", [False, True])
def test_documents_reset_the_state_as_in_training(name: str, graph: bool, tape: list[TapeRecorder]) -> None:
    class Other(ByteVocabulary):
        pass

    model, prompt, vocabulary = build(name), b"one\x1etwo", Other()
    # A random model hardly ever writes a given byte: the delimiter is one that it writes.
    for vocabulary.delimiter in range(256):
        written = by_whole_texts(model, prompt, 8, vocabulary.delimiter)
        if vocabulary.delimiter in written[:4]:
            break
    assert written != by_whole_texts(model, prompt, 8)
    decoder = Decoder(model, 1, GREEDY, resets=True, graph=graph, vocabulary=vocabulary)
    decoder.read([as_bytes(prompt)])
    assert write(decoder, 8) == [written]


def test_attention_makes_room_and_captures_anew(tape: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_BLOCK", 4)
    model = build("transformer")
    decoder = Decoder(model, 1, GREEDY, graph=True)
    decoder.read([as_bytes(b"ab")])
    assert write(decoder, 20) == [by_whole_texts(model, b"ab", 20)]
    assert tape[0].recorded == 3  # room for 4 steps, for 8, for 16
    recurrent = Decoder(build("e1"), 1, GREEDY, graph=True)
    recurrent.read([as_bytes(b"ab")])
    sizes = []
    for _ in range(20):
        recurrent.step()
        sizes.append(sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(recurrent._state)))
    assert tape[1].recorded == 1
    assert len(set(sizes)) == 1


def test_what_a_row_draws_depends_on_the_seed_and_its_place_alone() -> None:
    model = build("e1")

    def drawn(rows: int, seed: int) -> list[bytes]:
        decoder = Decoder(model, rows, Sampling(temperature=1.5, top_p=1.0, seed=seed))
        decoder.read([as_bytes(b"x")] * rows)
        return write(decoder, 12)

    three = drawn(3, 1)
    assert len(set(three)) == 3
    assert drawn(2, 1) == three[:2]
    assert drawn(3, 2) != three
    assert bytes(generate(model, b"x", 12, temperature=1.5, top_p=1.0, seed=1)) == three[0]


def test_draws_follow_the_probabilities_of_what_is_kept() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(20_000, 4)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000, dtype=np.float32))
    for options, kept in (
        ({"top_p": 1.0}, [0, 1, 2, 3]), ({"top_p": 1.0, "top_k": 2}, [1, 2]), ({"top_p": 0.4}, [1]),
        ({"top_p": 0.7}, [1, 2]), ({"top_p": 0.9, "top_k": 1}, [1]),
    ):  # fmt: skip
        drawn = Sampling(temperature=2.0, **options).draw(logits, uniform)
        counts = torch.bincount(drawn, minlength=4) / len(drawn)
        expected = torch.zeros(4)
        expected[kept] = (logits[0, kept] / 2).softmax(0)
        assert (counts - expected).abs().max() < 0.015
    assert Sampling(temperature=0).draw(logits[:2], uniform[:2]).tolist() == [1, 1]
    # A number that rounding takes to the whole sum is no token beyond the last.
    assert int(Sampling(top_k=2).draw(logits[:1], torch.ones(1))) == 2


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-40, 1e-30])
def test_without_warmth_the_likeliest_is_drawn(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.9], [3.0, 0.0, -torch.inf, 2.0]])
    for number in (0.0, 0.5, 0.999):
        assert Sampling(temperature, top_p=1.0).draw(logits, torch.full((2,), number)).tolist() == [2, 0]


def test_numbers_without_text_are_never_drawn() -> None:
    class Half(type(generation.BYTES)):  # type: ignore[misc]
        @property
        def lengths(self) -> Any:
            return np.array([1] * 128 + [0] * 128)

    decoder = Decoder(build("e1"), 8, Sampling(temperature=5.0, top_p=1.0), vocabulary=Half())
    decoder.read([as_bytes(b"x")] * 8)
    assert max(Counter(b"".join(write(decoder, 20)))) < 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k 0 is out of range"),
        ({"top_p": 1.5}, "--top-p 1.5 is out of range"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"temperature": float("nan")}, "--temperature nan is out of range"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)
    with pytest.raises(UsageError, match="--bytes -1"):
        generate(build("e1"), b"", -1)
    with pytest.raises(TypeError, match="bytes-like object is required, not 'str'"):
        generate(build("e1"), "def ", 1)  # type: ignore[arg-type]


FROZEN: list[tuple[str, dict[str, Any]]] = [
    *PATTERNS,
    ("e1", {"structure": "low_rank", "constraint": "spectral_norm"}),
    ("e1", {"constraint": "scaled_orthogonal"}),
    ("e1", {"structure": "monarch"}),
    ("e1", {"structure": "sparse_low_rank"}),
    ("e1", {"structure": "random_projection"}),
]


@pytest.mark.parametrize(("name", "options"), FROZEN)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_model_gives_the_same_bits(name: str, options: dict[str, Any], dtype: torch.dtype | None) -> None:
    model, tokens = build(name, **options), torch.randint(256, (2, 7))
    with torch.inference_mode(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        expected, _ = model(tokens)
        found, _ = freeze(model, dtype)(tokens)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), [*PATTERNS, ("mamba2", {})])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_captured_steps_on_a_gpu_are_plain_ones(name: str, options: dict[str, Any], dtype: torch.dtype | None) -> None:
    if name == "mamba2" and dtype is None and mamba2.official()[0]:
        skip_without_float32()
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(128, 2, (mixer_config(name)(**options),))).cuda().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    freeze(model, dtype)
    texts, logits = [], []
    for graph in (False, True):
        decoder = Decoder(model, 3, GREEDY, dtype=dtype, graph=graph)
        assert isinstance(decoder._recorder, CudaRecorder) == graph
        decoder.read([as_bytes(b"several"), as_bytes(b"texts of"), as_bytes(b"")])
        texts.append(write(decoder, 40))
        logits.append(decoder._logits)
        assert (decoder._replay is not None) == graph
    # Other kernels may run in a graph, and a near tie be decided otherwise: then the texts part.
    same = [a == b for a, b in zip(*texts, strict=True)]
    assert sum(same) >= 2
    for row in np.flatnonzero(same):
        torch.testing.assert_close(logits[1][row], logits[0][row], rtol=0.05, atol=0.05)
