"""Every generator against a slow, independent reading of what it wrote: labels, chance, lengths, seeds, drawings."""

import importlib
import inspect
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from elman.errors import UsageError
from elman.evaluation.tasks import Examples, Task, find_task, task_names

Words = Sequence[str]
#: Of the symbols of one example: what is to be answered at each, None where nothing is.
Answers = list[str | None]

NOISE = {"copying": "-", "selective_copying": ".-", "mqar": "-"}


def philox(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def parity(words: Words) -> Answers:
    return [("even", "odd")[words[: t + 1].count("1") % 2] for t in range(len(words))]


def modular(modulus: int) -> Callable[[Words], Answers]:
    return lambda words: [f"={sum(map(int, words[: t + 1])) % modulus}" for t in range(len(words))]


def permutations(words: Words) -> Answers:
    """By products of permutation matrices, M_g e_i = e_g(i)."""
    size = len(words[0])
    product, answers = np.eye(size, dtype=int), []
    for word in words:
        matrix = np.zeros((size, size), dtype=int)
        for i, image in enumerate(word):
            matrix[int(image), i] = 1
        product = matrix @ product
        answers.append("=" + "".join(str(product[:, i].argmax()) for i in range(size)))
    return answers


def automaton(words: Words) -> Answers:
    task = find_task("automaton")
    table = {
        (f"q{state}", letter): f"q{task.transitions[state, 'abcd'.index(letter)]}"  # type: ignore[attr-defined]
        for state in range(8)
        for letter in "abcd"
    }
    state, answers = "q0", []
    for word in words:
        state = table[state, word]
        answers.append(state)
    return answers


def dyck(words: Words) -> Answers:
    stack: list[str] = []
    answers = []
    for word in words:
        if word in "([":
            stack.append(word)
        else:
            assert stack.pop() + word in ("()", "[]")
        assert len(stack) <= 8
        answers.append(f"{stack[-1]}{len(stack)}" if stack else "0")
    return answers


def anbncn(words: Words) -> Answers:
    text = "".join(words)
    n = text.count("a")
    assert text.rstrip("$") == "a" * n + "b" * n + "c" * n
    assert n >= 2
    after = text + "$"
    asked = {last - back for last in (text.rindex("b"), text.rindex("c")) for back in (0, 1)}
    return [after[t + 1] if t in asked else None for t in range(len(text))]


def copying(words: Words) -> Answers:
    mark = words.index("|")
    said = [word for word in words[:mark] if word != "."]
    assert set(words[mark + 1 :]) == {"-"}
    answers: Answers = [None] * len(words)
    answers[mark + 1 : mark + 1 + len(said)] = said
    assert len(answers) == len(words)
    return answers


def induction_heads(words: Words) -> Answers:
    first, last = (t for t, word in enumerate(words) if word == "|")
    assert last == len(words) - 1
    return [None] * last + [words[first + 1]]


def mqar(words: Words) -> Answers:
    values: dict[str, str] = {}
    answers: Answers = []
    for t, word in enumerate(words):
        if word.startswith("k") and word in values:
            answers.append(values[word])
            continue
        if word.startswith("k"):
            values[word] = words[t + 1]
        answers.append(None)
    return answers


def listops(words: Words) -> Answers:
    """By Python's own parser and functions."""
    end = len(words) - words[::-1].index("]")
    assert set(words[end:]) <= {"-"}
    assert 2 * end >= len(words)
    code = "".join(
        f"({word[1:]}([" if word[0] == "[" else "]))," if word == "]" else f"{word}," for word in words[:end]
    )
    functions = {"MIN": min, "MAX": max, "MED": lambda of: int(statistics.median(of)), "SM": lambda of: sum(of) % 10}
    value = eval(code.rstrip(","), {"__builtins__": {}}, functions)
    return [*[None] * (end - 1), str(value), *[None] * (len(words) - end)]


EXPECTED: dict[str, Callable[[Words], Answers]] = {
    "parity": parity, "mod_3": modular(3), "mod_5": modular(5), "mod_7": modular(7), "s3": permutations,
    "s5": permutations, "automaton": automaton, "dyck_1": dyck, "dyck_2": dyck, "anbncn": anbncn, "copying": copying,
    "selective_copying": copying, "induction_heads": induction_heads, "mqar": mqar, "listops": listops,
}  # fmt: skip


def answers(task: Task, examples: Examples, row: int) -> Answers:
    pairs = zip(examples.targets[row], examples.mask[row], strict=True)
    return [task.symbols[target] if counts else None for target, counts in pairs]


def test_every_task_has_a_reading_of_its_own() -> None:
    assert list(EXPECTED) == task_names()
    for name in task_names():
        task = find_task(name)
        assert task.name == name
        assert len(set(task.symbols)) == len(task.symbols) <= task.vocab_size
        assert task.vocab_size % 8 == 0
        assert task.asks.endswith("?")
    assert len({find_task(name).fingerprint for name in task_names()}) == len(task_names())


@pytest.mark.parametrize("name", EXPECTED)
def test_labels_are_those_of_a_slow_reading(name: str) -> None:
    task = find_task(name)
    for length in (task.shortest, task.shortest + 1, 23, 64):
        examples = task.examples(philox(length), 40, length)
        assert all(part.shape == (40, length) for part in examples)
        assert examples.mask.dtype == np.bool_
        for row in range(40):
            words = [task.symbols[token] for token in examples.tokens[row]]
            assert answers(task, examples, row) == EXPECTED[name](words)
        # So that every rank's mean, and every part's, weighs alike.
        assert len(set(examples.mask.sum(axis=1).tolist())) == 1


@pytest.mark.parametrize("name", EXPECTED)
def test_the_drawing_in_the_docstring_is_an_example(name: str) -> None:
    doc = inspect.getdoc(importlib.import_module(type(find_task(name)).__module__))
    assert doc is not None
    lines = {line[4:9]: line[12:] for line in doc.splitlines() if line.startswith("    ")}
    # What stands far behind says what the example is of.
    words, labels = (re.split(r" {8,}", lines[head])[0].split() for head in ("input", "label"))
    expected = EXPECTED["mod_3" if name.startswith("mod") else "s3" if name == "s5" else name](words)
    assert [None if label == "." else label for label in labels] == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_guessing_reaches_the_chance_level_and_no_constant_guess_more(name: str) -> None:
    task = find_task(name)
    for length in (16, 40):
        examples = task.examples(philox(length + 1), 4000, length)
        found = Counter(examples.targets[examples.mask].tolist())
        best = max(found.values()) / found.total()
        # Positions of a row depend on each other: rows are the sample. The most frequent of V labels is above its mean.
        rows = (examples.targets == max(found, key=found.__getitem__)) & examples.mask
        error = (rows.sum(axis=1) / examples.mask.sum(axis=1)).std() / len(rows) ** 0.5
        assert abs(best - task.chance(length)) < 5 * error + 1e-9


@pytest.mark.parametrize("name", EXPECTED)
def test_examples_are_a_function_of_the_seed(name: str) -> None:
    task = find_task(name)
    one, same, other = (task.examples(philox(key), 8, 24) for key in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("name", EXPECTED)
def test_lengths_out_of_range_are_told(name: str) -> None:
    task = find_task(name)
    for length in (task.shortest - 1, 0, -3, 1 << 21):
        with pytest.raises(UsageError, match=rf"--train-length {length} is out of range for task {name}: give .* from"):
            task.examples(philox(0), 2, length, "--train-length")
    with pytest.raises(UsageError, match="batch 0 is out of range"):
        task.examples(philox(0), 0, 30)


def test_what_is_drawn_is_uniform_where_it_says_so() -> None:
    def even(values: Sequence[int], count: int) -> bool:
        found = np.bincount(values, minlength=count)
        expected = len(values) / count
        return len(found) == count and bool(
            (((found - expected) ** 2 / expected).sum()) < count + 6 * (2 * count) ** 0.5
        )

    rows = 6000
    parity_bits = find_task("parity").examples(philox(0), rows, 5).tokens
    assert even(parity_bits @ (1 << np.arange(5)), 32)
    heads = find_task("induction_heads").examples(philox(0), rows, 12)
    assert even(heads.tokens.argmax(axis=1), 10)  # the first mark
    assert even(heads.targets[:, -1], 16)
    n = (find_task("anbncn").examples(philox(0), rows, 60).tokens == 0).sum(axis=1)
    assert sorted(set(n.tolist())) == list(range(11, 21))
    assert even(n - 11, 10)
    selective = find_task("selective_copying").examples(philox(0), rows, 13)
    places = (selective.tokens[:, :8] < 8) @ (1 << np.arange(8))
    subsets = {sum(1 << i for i in four): k for k, four in enumerate(itertools.combinations(range(8), 4))}
    assert even([subsets[place] for place in places.tolist()], 70)
    queries = find_task("mqar").examples(philox(0), rows, 40)
    assert even(queries.targets[queries.mask] - 32, 32)
    # The first of 24 slots is taken by nearly all, the last by few.
    taken = queries.mask[:, 16:].mean(axis=0)
    assert taken[0] > 0.85
    assert 0.1 < taken[-1] < 0.3
    assert (np.diff(taken) < 0.02).all()


def test_listops_draws_its_grammar() -> None:
    task = find_task("listops")
    examples = task.examples(philox(4), 2000, 200)
    counts: Counter[str] = Counter()
    arguments: Counter[int] = Counter()
    deepest = 0
    for row in examples.tokens:
        open_arguments: list[int] = []
        for t, token in enumerate(row):
            word = task.symbols[token]
            # Far from the end nothing is cut, and nothing is drawn anew for it.
            if open_arguments and word != "]":
                open_arguments[-1] += 1
                if t < 60:
                    counts["operator" if word[0] == "[" else "digit"] += 1
            if word[0] == "[":
                open_arguments.append(0)
                counts[word] += 1
            elif word == "]":
                arguments[open_arguments.pop()] += 1
            deepest = max(deepest, len(open_arguments))
    assert sorted(arguments) == list(range(2, 11))
    assert deepest <= 10
    operators = [counts[word] for word in ("[MIN", "[MAX", "[MED", "[SM")]
    assert max(operators) < 1.1 * min(operators)
    # Those that are long enough have more operators than all have.
    assert 0.2 < counts["operator"] / (counts["operator"] + counts["digit"]) < 0.35


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parrity", "TASK 'parrity' is unknown: did you mean parity"),
        ("zzz", "did you mean parity or mod_3 .*elman tasks"),
    ],
)
def test_an_unknown_task_is_told_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_task(name)
