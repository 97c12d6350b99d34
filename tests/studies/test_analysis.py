"""Statistics against what textbooks and the numbers themselves say; and verdicts that claim no more."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from elman.studies.analysis import compare, differences, group, holm, power_law, sweep_remarks, verdict
from elman.studies.records import Record, read_run
from elman.training.run import RunFolder
from tests.studies.made import diverge, make_run, make_study


def records(folder: Path) -> list[Record]:
    return [read_run(path) for path in sorted((folder / "runs").iterdir())]


def verdict_of(folder: Path) -> str:
    (comparison,) = compare(records(folder))
    return "\n".join(verdict(comparison))


def test_welch_is_welch(tmp_path: Path) -> None:
    a, b = [2.00, 2.02, 2.05], [2.10, 2.20, 2.15]
    (found,) = differences(group(records(make_study(tmp_path, {"a": a, "b": b}))))
    assert found.nats == pytest.approx(sum(b) / 3 - sum(a) / 3)

    def square(x: list[float]) -> float:
        mean = sum(x) / 3
        return sum((v - mean) ** 2 for v in x) / 2 / 3

    t = found.nats / math.sqrt(square(a) + square(b))
    degrees = (square(a) + square(b)) ** 2 / (square(a) ** 2 / 2 + square(b) ** 2 / 2)
    # p by drawing t of so many degrees: nothing of scipy.
    drawn = random.Random(0)
    draws = [drawn.gauss(0, 1) / math.sqrt(drawn.gammavariate(degrees / 2, 2) / degrees) for _ in range(100_000)]
    assert found.p == pytest.approx(sum(abs(x) >= t for x in draws) / len(draws), abs=0.003)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.nats < found.high


def test_holm_on_numbers_worked_out_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.4]) == [pytest.approx(0.8), None, pytest.approx(0.8)]
    assert holm([]) == []


def test_a_power_law_is_found_again() -> None:
    law = power_law("e1", [(n, 7.0 * n**-0.12) for n in (5e7, 1e8, 2e8, 4e8)])
    assert law is not None
    assert (law.b, law.a, law.sizes) == (pytest.approx(0.12), pytest.approx(7.0), 4)
    assert law.error < 1e-6
    assert power_law("e1", [(5e7, 2.0), (5e7, 2.1), (1e8, 1.9)]) is None


def test_seeds_that_miss_a_line_alike_make_it_no_surer() -> None:
    points = [(5e7, 2.0), (1e8, 1.9), (2e8, 1.7)]
    one, three = power_law("e1", points), power_law("e1", points * 3)
    assert one is not None
    assert three is not None
    assert (three.b, three.error, three.sizes) == (pytest.approx(one.b), pytest.approx(one.error), 3)


def test_a_difference_beyond_the_seeds_is_claimed(tmp_path: Path) -> None:
    said = verdict_of(make_study(tmp_path, {"a": [2.0, 2.01, 2.02], "b": [2.5, 2.51, 2.53]}))
    assert "the lowest held-out loss is that of a: 2.0100 nats" in said
    assert "More than chance between seeds can explain, it is below b (0.5033 nats behind, 95% interval" in said
    assert "equal tokens; it says nothing of equal wall-clock" in said


def test_a_difference_within_the_seeds_is_not(tmp_path: Path) -> None:
    said = verdict_of(make_study(tmp_path, {"a": [2.0, 2.3, 2.2], "b": [2.1, 2.4, 2.2]}))
    assert "do not tell it apart from b" in said
    assert "More than chance" not in said


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    said = verdict_of(make_study(tmp_path, {"a": [2.0], "b": [3.0]}))
    assert "no test can say whether other seeds would agree" in said
    assert "More than chance" not in said


def test_seeds_that_all_give_the_same_are_not_tested(tmp_path: Path) -> None:
    (comparison,) = compare(records(make_study(tmp_path, {"a": [2.0, 2.0], "b": [3.0, 3.0]})))
    (found,) = comparison.differences()
    assert (found.p, found.significant) == (None, False)


def test_many_pairs_need_more_than_few(tmp_path: Path) -> None:
    losses = {"a": [2.00, 2.02], "b": [2.08, 2.10]}
    few = compare(records(make_study(tmp_path / "few", losses)))[0].differences()
    many = compare(records(make_study(tmp_path / "many", {**losses, "c": [3.0, 3.3], "d": [4.0, 4.3]})))[0]
    pair = next(d for d in many.differences() if (d.better.label, d.worse.label) == ("a", "b"))
    assert few[0].significant
    assert pair.p == few[0].p
    assert not pair.significant


def test_unequal_devices_are_not_ranked_by_wall_clock(tmp_path: Path) -> None:
    budget = {"budget": {"kind": "time", "amount": 12.8}}
    make_run(tmp_path / "runs" / "1", "a", heldout=2.0, **budget)
    make_run(tmp_path / "runs" / "2", "b", heldout=3.0, session={"gpu": "NVIDIA L4"}, **budget)
    said = verdict_of(tmp_path)
    assert "No ranking: the runs had equal wall-clock on unequal devices" in said
    assert "lowest" not in said


def test_compiled_and_plain_runs_are_not_ranked_by_wall_clock(tmp_path: Path) -> None:
    for kind, amount in (("time", 12.8), ("tokens", 12_800)):
        folder = tmp_path / kind
        for name, compiled in (("a", True), ("b", False)):
            session = {"compiled": compiled}
            make_run(folder / "runs" / name, name, session=session, budget={"kind": kind, "amount": amount})
    assert "torch.compile sped up some runs and not others (b)" in verdict_of(tmp_path / "time")
    assert "torch.compile did not run for all of them" in verdict_of(tmp_path / "tokens")
    assert "lowest held-out loss" in verdict_of(tmp_path / "tokens")


CAVEATS: dict[str, tuple[dict[str, Any], str]] = {
    "another commit": ({"session": {"git_commit": "def"}}, "of several commits of elman (abc, def)"),
    "another torch": ({"session": {"packages": {"torch": "2.9"}}}, "of several versions of torch (2.13.0, 2.9)"),
    "another device": ({"session": {"gpu": "NVIDIA L4"}}, "their speeds do not compare"),
    "a CPU": ({"session": {"gpu": None, "device": "cpu"}}, "The runs are of a CPU"),
    "another size": ({"dim": 24}, "The runs are of unequal size"),
    "another speed": ({"speed": 500.0, "label": "a", "seed": 1}, "not equally fast: a (× 2.00)"),
    "a long warm-up": ({"train": {"warmup": 80}}, "for long beside the steps of b (40% of its steps)"),
    "other windows": (
        {"train": {"seq_len": 32}, "varies": ["seq_len"]},
        "unequal context in the held-out text as well",
    ),
    "other options": (
        {"train": {"optimizer": "muon", "weight_decay": 0.0}},
        "differ in --optimizer (adamw, muon) and --weight-decay (0.0, 0.1)",
    ),
    "other tokens": ({"train": {"tokenizer": "gpt2"}}, "Their tokens are not alike (bytes, gpt2)"),
    "a budget that was not met": ({"steps": 100}, "The budget was not met by b."),
}


@pytest.mark.parametrize("name", CAVEATS)
def test_what_weakens_a_comparison_is_said(name: str, tmp_path: Path) -> None:
    given, message = CAVEATS[name]
    make_run(tmp_path / "runs" / "1", "a")
    make_run(tmp_path / "runs" / "2", **{"label": "b", "heldout": 2.1, **given})
    assert message in verdict_of(tmp_path)
    make_run(tmp_path / "other" / "runs" / "1", "a")
    make_run(tmp_path / "other" / "runs" / "2", "b")
    assert message not in verdict_of(tmp_path / "other")


def test_options_that_a_study_is_about_are_no_surprise(tmp_path: Path) -> None:
    for name, optimizer, more in (("a", "adamw", {}), ("b", "muon", {"varies": ["optimizer"]})):
        make_run(tmp_path / "runs" / name, name, train={"optimizer": optimizer}, **more)
    assert "--optimizer" not in verdict_of(tmp_path)


def test_runs_that_diverged_are_told_beside_the_mean_of_the_others(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"a": [2.0, 2.1, 2.2], "b": [2.1, 2.2], "c": [2.3]})
    for name in ("a-seed1", "a-seed2", "c-seed0"):
        run = RunFolder(study / "runs" / name)
        diverge(run, 10 if name != "a-seed2" else 9)
    said = verdict_of(study)
    assert "Runs that diverged are left out, of a (1 of 2) and c (1 of 1)" in said


def test_runs_that_diverged_are_told_where_they_would_have_been(tmp_path: Path) -> None:
    for text in ("one", "two"):
        for seed in (0, 1):
            run = make_run(tmp_path / "runs" / f"{text}-{seed}", "a", seed=seed, fingerprint=text)
            if (text, seed) == ("two", 1):
                diverge(run)
    found = [comparison.diverged for comparison in compare(records(tmp_path))]
    assert found == [{}, {"a": 1}]


def test_runs_of_unequal_budgets_and_texts_are_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "1", "a")
    make_run(tmp_path / "runs" / "2", "a", budget={"kind": "tokens", "amount": 99})
    make_run(tmp_path / "runs" / "3", None)
    make_run(tmp_path / "runs" / "4", "b", role="sweep")
    assert [len(comparison.groups) for comparison in compare(records(tmp_path))] == [1, 1, 1]


def test_texts_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    def comparisons(name: str, *texts: tuple[str, str | None]) -> list[int]:
        for seed, (path, fingerprint) in enumerate(texts):
            train = {"data": Path(path)}
            make_run(tmp_path / name / "runs" / str(seed), None, seed=seed, train=train, session={"data": fingerprint})
        return [sum(len(group.records) for group in each.groups) for each in compare(records(tmp_path / name))]

    assert comparisons("one text at two places", ("/a", "x"), ("/b", "x")) == [2]
    assert comparisons("two texts at one place", ("/a", "x"), ("/a", "y")) == [1, 1]
    assert comparisons("older runs, of which the place is known", ("/a", None), ("/a", None), ("/b", None)) == [2, 1]


def test_a_rate_at_the_end_of_the_sweep_is_remarked(tmp_path: Path) -> None:
    sweep = [read_run(make_run(tmp_path / str(lr), "a", lr=lr, role="sweep").path) for lr in (1e-3, 3e-3, 1e-2)]
    edge = read_run(make_run(tmp_path / "edge", "a", lr=1e-2).path)
    inside = read_run(make_run(tmp_path / "inside", "a", lr=3e-3).path)
    (line,) = sweep_remarks(sweep, [edge])
    assert "0.01 is the highest that was tried" in line
    assert sweep_remarks(sweep, [inside]) == []


def test_a_sweep_of_short_runs_is_remarked(tmp_path: Path) -> None:
    chosen = read_run(make_run(tmp_path / "final", "a", lr=3e-3).path)
    for part, told in ((1.0, False), (0.25, True)):
        sweep = [
            read_run(make_run(tmp_path / f"{lr}-{part}", "a", lr=lr, role="sweep", sweep_part=part).path)
            for lr in (1e-3, 3e-3, 1e-2)
        ]
        lines = sweep_remarks(sweep, [chosen])
        assert len(lines) == told
        assert all("The sweep's runs had 25% of the budget" in line for line in lines)


def test_a_warm_up_that_is_a_part_of_the_run_is_not_long(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "1", "a", train={"warmup": 0.05})
    make_run(tmp_path / "runs" / "2", "b", heldout=2.1, train={"warmup": 0.4})
    assert "for long beside the steps of b (40% of its steps)," in verdict_of(tmp_path)


def test_a_warm_up_that_the_sweep_chose_is_remarked_only_at_its_end(tmp_path: Path) -> None:
    def read(name: str, warmup: float, **more: Any) -> Record:
        facts = {"sweep": {"warmup": [0.1, 0.4, 0.6]}, **more}
        return read_run(make_run(tmp_path / name, "a", train={"warmup": warmup}, **facts).path)

    sweep = [read(str(warmup), warmup, role="sweep") for warmup in (0.1, 0.4, 0.6)]
    assert sweep_remarks(sweep, [read("runs/inside", 0.4)]) == []
    (line,) = sweep_remarks(sweep, [read("edge", 0.6)])
    assert line == "a: --warmup 0.6 is the highest that was tried; one beyond it may be better."
    assert "for long beside the steps" not in verdict_of(tmp_path)


def test_a_sweep_that_was_mostly_warm_up_is_remarked(tmp_path: Path) -> None:
    chosen = read_run(make_run(tmp_path / "final", "a", lr=3e-3).path)
    for warmup, told in ((100, False), (101, True), (500, True)):
        sweep = [
            read_run(make_run(tmp_path / f"{lr}-{warmup}", "a", lr=lr, role="sweep", train={"warmup": warmup}).path)
            for lr in (1e-3, 3e-3, 1e-2)
        ]
        lines = sweep_remarks(sweep, [chosen])
        assert len(lines) == told
        assert all(f"a: warm-up was {min(100, warmup / 2):.0f}% of the sweep's steps" in line for line in lines)
