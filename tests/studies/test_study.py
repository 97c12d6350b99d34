"""What a study may declare, what it holds equal, and the ones that ship."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from elman.errors import UsageError
from elman.sizing import flops_per_token, num_params
from elman.studies.find import find_study, study_names
from elman.studies.study import Budget, Run, Scale, Setting, Study, slug

TWO = (Run("a", "e1", depth=2), Run("b", "e15", depth=2))


def toy(**more: Any) -> Study:
    return Study(**{"name": "toy", "question": "Which?", "runs": TWO, "params": "100k", **more})


@pytest.mark.parametrize("scale", ["full", "tiny"])
@pytest.mark.parametrize("name", study_names())
def test_every_study_that_ships_is_of_the_sizes_that_it_says(name: str, scale: Any) -> None:
    study = find_study(name, Scale(scale))
    assert study.name == name
    assert study.question.endswith("?")
    for run in study.runs:
        target = study.target(run)
        assert target is not None
        assert abs(num_params(study.model(run)) - target) <= 0.02 * target
    assert len({slug(run.name) for run in study.runs}) == len(study.runs)
    budgets = [study.budget_of(kind) for kind in ("time", "tokens", "flops")]
    assert all(study.held_equal(budget) for budget in budgets)
    assert len(study.seeds) >= (3 if scale == "full" else 2)


def test_the_seeds_own_claims_are_in_the_catalogue() -> None:
    study = find_study("ladder_50m", Scale())
    shapes = {run.name: (study.model(run).dim, study.model(run).depth) for run in study.runs}
    assert shapes["E1 wide"] == (1280, 6)
    assert shapes["E5"] == (1536, 20)
    assert {run.model for run in study.runs} >= {"e1", "e10", "e5", "mamba2", "transformer"}
    with pytest.raises(UsageError, match=r"cannot be met within 2%"):
        study.model(Run("E1 of 52.7M", "e1", dim=1024, depth=10))
    low_rank = find_study("low_rank", Scale())
    run = low_rank.runs[0]
    assert low_rank.budget_of(low_rank.budget).end(low_rank.model(run), 512, 128)["steps"] == 2000


def test_warm_up_is_a_part_of_the_budget_where_a_study_says_nothing_of_it() -> None:
    study = toy()
    assert study.config(TWO[0], study.settings[0], 0, steps=1).warmup == 0.05
    assert "--warmup 0.05," in "\n".join(study.held_equal(study.budget_of("time")))
    study = toy(train={"warmup": 10})
    assert study.config(TWO[0], study.settings[0], 0, steps=1).warmup == 10


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no runs": ({"runs": ()}, "it has no runs"),
    "no question": ({"question": " "}, "question is ' '"),
    "a duplicate name": ({"runs": (TWO[0], TWO[0])}, "two of its runs are 'a'"),
    "names of one folder": (
        {"runs": (Run("E1 wide", "e1", depth=2), Run("e1-wide", "e1", depth=3))},
        "two of its runs are 'e1-wide'",
    ),
    "a name of nothing": ({"runs": lambda: (Run("//", "e1"),)}, "a run is named '//'"),
    "an unknown model": ({"runs": (Run("a", "e2"),)}, "'e2' is unknown"),
    "an unknown option": ({"runs": (Run("a", "e1", {"gaet": "hx"}),)}, "option 'gaet', that is unknown: .* gate"),
    "a wrong option": ({"runs": (Run("a", "e1", {"gate": "x"}),)}, "--gate 'x' is unknown"),
    "an option of nobody": ({"runs": (Run("a", "e0,e1", {"gate": "hx"}),)}, r"'gate', but its model is e0,e1: e0.gate"),
    "an unknown shared option": ({"train": {"batchsize": 4}}, "'batchsize', that is unknown: .* batch_size"),
    "a wrong shared option": ({"train": {"batch_size": 0}}, "--batch-size 0 is out of range"),
    "a batch of its own": (
        {"runs": (TWO[0], Run("b", "e1", depth=3, train={"batch_size": 8}))},
        "run 'b' differs in batch_size, which the study does not name among varies",
    ),
    "a size of its own": ({"runs": (TWO[0], Run("b", "e1", params="1m"))}, "run 'b' has a size of its own"),
    "no size": ({"params": None}, "run 'a' has no size"),
    "an unknown variation": ({"varies": ("bach_size",)}, "'bach_size', that is unknown: .* batch_size"),
    "no seeds": ({"seeds": ()}, "at least one of seeds"),
    "the sweep's seed": ({"seeds": (0, 1000)}, "seed 1000 is that of the sweep"),
    "a seed twice": ({"seeds": (1, 1)}, "two of its seeds are 1"),
    "a rate twice": ({"learning_rates": (1e-3, 1e-3)}, "two of its learning rates are 0.001"),
    "no rates": ({"learning_rates": ()}, "at least one of"),
    "a long sweep": ({"sweep_part": 2.0}, "sweep_part 2.0 is out of range"),
    "a sweep that ends before it begins": (
        {"sweep_beyond": -1},
        r"sweep_beyond -1 \(--sweep-beyond\) is out of range: give a number",
    ),
    "a sweep of one rate that goes on": (
        {"sweep_beyond": 1, "learning_rates": (1e-3,)},
        r"sweep_beyond 1 \(--sweep-beyond\) needs two learning rates",
    ),
    "an unknown option to sweep": ({"sweep": {"warmpu": (1, 2)}}, "'warmpu', that is unknown: .* warmup"),
    "an option that no sweep may choose": ({"sweep": {"batch_size": (1, 2)}}, "option to sweep, 'batch_size'"),
    "a wrong option to sweep": ({"sweep": {"warmup": (1, -1)}}, "--warmup -1 is out of range"),
    "a word to sweep": ({"sweep": {"warmup": (1, "long")}}, "--warmup 'long' is of the wrong type: give a number"),
    "a value to sweep twice": ({"sweep": {"warmup": (1, 1)}}, "two of its warmups are 1"),
    "nothing to sweep": ({"sweep": {"warmup": ()}}, "its sweep has no warmup to choose"),
    "a sweep of what it is about": (
        {"sweep": {"warmup": (1, 2)}, "varies": ("warmup",)},
        "it is about warmup, so its sweep",
    ),
    "memory of no number": ({"memory": "8g", "varies": ("batch_size",)}, "memory '8g' is out of range: give bytes"),
    "memory below 0": ({"memory": -1.0, "varies": ("batch_size",)}, "memory -1.0 is out of range: give bytes"),
    "notes of no text": ({"notes": (1,)}, r"notes \(1,\) are none: give a tuple of sentences"),
    "a note alone": ({"notes": "One."}, "notes 'One.' are none: give a tuple of sentences"),
    "a name that is a path": ({"name": "../mine"}, "study ../mine: .* give one without a /"),
    "memory of equal batches": ({"memory": 2**30}, "give batch_size among varies"),
    "a budget that it lacks": ({"budget": "flops"}, "declares no equal flops: say how much, such as --flops 1e17"),
    "a wrong time": ({"time_limit": "soon"}, "'soon' is no duration"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_study_is_named(name: str) -> None:
    given, message = MISTAKES[name]

    def make() -> Study:
        return toy(**{key: value() if callable(value) else value for key, value in given.items()})

    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(("best", "beyond"), [(1e-3, 2.5e-4), (4e-3, None), (6e-3, 9e-3)])
def test_what_comes_beyond_the_ends_of_a_sweep(best: float, beyond: float | None) -> None:
    """As far from the end as the end from its neighbour, by factors; what else was best stays."""
    options = (("warmup", 2),)
    expected = None if beyond is None else Setting(beyond, options)
    assert toy().setting_beyond(Setting(best, options), [4e-3, 1e-3, 6e-3, 1e-3]) == expected


def test_nothing_comes_beyond_what_is_a_rate_or_was_tried() -> None:
    assert toy().setting_beyond(Setting(50.0), [1e-3, 50.0]) is None
    assert toy().setting_beyond(Setting(1e-3), [1e-3, 1.0004e-3]) is None


def test_a_sweep_tries_every_value_with_every_rate() -> None:
    made = toy(learning_rates=(1e-3, 2e-3), sweep={"warmup": (1, 2), "weight_init": ("normal", "fan_in")})
    assert [str(setting) for setting in made.settings] == [
        f"lr {lr:g}, warmup {warmup}, weight_init {init}"
        for warmup in (1, 2)
        for init in ("normal", "fan_in")
        for lr in (1e-3, 2e-3)
    ]
    for setting in made.settings:
        assert made.setting_of(made.config(made.runs[0], setting, 0, steps=1)) == setting
    said = " | ".join(made.held_equal(Budget("time", 600)))
    assert "learning rate and --warmup and --weight-init: each run's own" in said
    assert "--warmup 1" not in said
    assert [str(setting) for setting in toy(learning_rates=(1e-3,)).settings] == ["lr 0.001"]


def test_what_is_held_equal_is_what_the_runs_are() -> None:
    said = " | ".join(toy(train={"batch_size": 8}).held_equal(Budget("time", 600)))
    assert "budget: 10m00s of training" in said
    assert "within 2% of 100k" in said
    assert "batch: 8 windows a step" in said
    varied = toy(runs=(TWO[0], dataclasses.replace(TWO[1], train={"batch_size": 8})), varies=("batch_size",))
    assert "batch" not in " | ".join(varied.held_equal(Budget("time", 600)))


def test_budgets_end_runs_alike() -> None:
    study = toy()
    model = study.model(TWO[0])
    assert Budget("time", 600).end(model, 64, 16) == {"time_limit": "600s", "steps": None}
    assert Budget("tokens", 1e6).end(model, 64, 16) == {"steps": 977, "time_limit": None}
    steps = Budget("flops", 1e12).end(model, 64, 16)["steps"]
    assert steps * 64 * 16 * 3 * flops_per_token(model, 64) == pytest.approx(1e12, rel=0.01)
    assert Budget("tokens", 1e6).part(0.25) == Budget("tokens", 250_000)
    for amount in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="give a positive time"):
            Budget("time", amount)


FILES = {
    "a typo": ("def study(scale)\n    pass\n", r"my.py, line 1: SyntaxError: expected ':'"),
    "an unknown name": ("from elman.studies import Stduy\n", r"my.py, line 1: ImportError: cannot import name 'Stduy'"),
    "an unknown argument": (
        "from elman.studies import Run, Study\n\ndef study(scale):\n    return Study(nmae='x')\n",
        r"my.py, line 4: TypeError: .*nmae",
    ),
    "a mistake of the study": (
        "from elman.studies import Run, Study\ndef study(scale):\n    return Study(name='x', question='y', runs=())\n",
        r"my.py: study x: it has no runs",
    ),
    "no function": ("x = 1\n", r"my.py: it has no function study\(scale\)"),
    "no study": ("def study(scale):\n    return 3\n", r"my.py: its study\(scale\) returns int"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, message = FILES[name]
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        find_study(str(tmp_path / "my.py"), Scale())


def test_studies_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "from elman.studies import Run, Study\n"
        "def study(scale):\n"
        "    return Study('mine', 'Which?', (Run('a', 'e1'),), params=scale('1m', '100k'))\n"
    )
    assert find_study(str(tmp_path / "my.py"), Scale("tiny")).params == "100k"
    assert find_study(str(tmp_path / "my.py"), Scale("full")).params == "1m"
    with pytest.raises(UsageError, match="'ladder_50' is unknown: did you mean ladder_50m"):
        find_study("ladder_50", Scale())
    with pytest.raises(UsageError, match="no such file"):
        find_study(str(tmp_path / "other.py"), Scale())
