"""What a sweep tries, and what is chosen by it."""

from pathlib import Path

from elman.studies.plan import job_state
from elman.studies.records import read_run
from elman.studies.report import make_report
from elman.studies.runner import chosen_settings, sweep_jobs
from elman.studies.study import SWEEP_SEED, Setting
from elman.training.run import RunFolder
from tests.studies.made import diverge
from tests.studies.toy import RUNS, Here, plan, run, study


def test_what_a_rate_is_chosen_by(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(seeds=(0,), runs=RUNS[:1]), tokens=256)
    assert chosen_settings(made) == {}
    first, second = sweep_jobs(made, made.accepted[0])
    assert first() == 0
    assert chosen_settings(made) == {}  # the other may be better
    assert second() == 0
    best = min((first, second), key=lambda job: read_run(job.folder).last_100)
    assert chosen_settings(made) == {"E1": Setting(best.config.lr)}
    # One whose steps had to be skipped is taken only where all had.
    summary = RunFolder(best.folder).read_json("summary.json")
    RunFolder(best.folder).write_json("summary.json", {**summary, "skipped_steps": 3})
    (other,) = {first.config.lr, second.config.lr} - {best.config.lr}
    assert chosen_settings(made) == {"E1": Setting(other)}
    # One that ended in steps without a number has been judged; one that was cut has not.
    (best.folder / "summary.json").unlink()
    assert chosen_settings(made) == {}
    diverge(RunFolder(best.folder))
    assert chosen_settings(made) == {"E1": Setting(other)}
    # Nor is it run again, which would end likewise.
    launcher = Here()
    assert run(made, launcher)[0] == 0
    assert launcher.ran == [f"E1, lr {other:g}, seed 0"]


def test_a_sweep_goes_on_beyond_an_end_while_the_best_is_there(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(seeds=(0,), runs=RUNS[:1], sweep={"warmup": (1, 2)}, sweep_beyond=2))
    code, said = run(made)
    assert code == 0, said
    losses = {
        (record.lr, record.config.warmup): record.last_100
        for record in map(read_run, (tmp_path / "toy" / "sweep").iterdir())
        if record.config is not None
    }
    declared = {(lr, warmup) for lr in (1e-3, 1e-2) for warmup in (1, 2)}
    expected = set(declared)
    for _ in range(2):
        lr, warmup = min(expected, key=lambda setting: losses[setting])
        rates = sorted({rate for rate, _ in expected})
        if lr in (rates[0], rates[-1]):
            expected.add((float(f"{lr * 10 if lr == rates[-1] else lr / 10:.3g}"), warmup))
    assert expected > declared  # of two rates the better one is at an end
    assert set(losses) == expected
    assert f"{len(expected) + 1} finished" in said
    best = min(losses, key=lambda setting: losses[setting])
    assert chosen_settings(made) == {"E1": Setting(best[0], (("warmup", best[1]),))}
    again = Here()
    code, said = run(made, again)
    assert (code, again.ran) == (0, [])


def test_a_failure_beyond_the_ends_leaves_the_choice_among_the_others(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(seeds=(0,), runs=RUNS[:1], sweep_beyond=1))
    beyond = [f"E1, lr {lr:g}, seed {SWEEP_SEED}" for lr in (1e-4, 0.1)]
    launcher = Here(fails=beyond)
    code, said = run(made, launcher)
    assert code == 1
    assert "failed: the machine burnt down" in said
    assert len(launcher.ran) == 4
    assert launcher.ran[2] in beyond
    (final,) = (tmp_path / "toy" / "runs").iterdir()
    assert read_run(final).lr in (1e-3, 1e-2)
    again = Here()
    code, said = run(made, again)
    assert code == 0, said
    assert again.ran[0] == launcher.ran[2]
    assert "sweep, beyond its rates: 1 to do" in said


def test_what_a_longer_sweep_finds_takes_the_place_of_what_was_run(tmp_path: Path, text: Path) -> None:
    short, long = (study(seeds=(0,), runs=RUNS[:1], sweep_beyond=beyond) for beyond in (0, 1))
    code, said = run(plan(tmp_path, text, short))
    assert code == 0, said
    (first,) = (tmp_path / "toy" / "runs").iterdir()
    best = read_run(first).lr
    made = plan(tmp_path, text, long)
    job = sweep_jobs(made, made.accepted[0])[-1]
    assert job_state(job)[0] == "new"
    assert job() == 0
    swept = {record.lr: record.last_100 for record in map(read_run, (tmp_path / "toy" / "sweep").iterdir())}
    assert swept[job.config.lr] < swept[best], "two steps do best at a rate that no long run would take"
    code, said = run(made)
    assert code == 0, said
    report = make_report([tmp_path / "toy"])
    (row,) = report.sections[0].tables[0].rows
    assert row[4] == f"{job.config.lr:g}" != f"{best:g}"
    assert any(first.name in name and why.startswith("superseded") for name, why in report.left_out)
    assert report.sweep is not None
    assert [row[1] for row in report.sweep.rows if row[-1] == "chosen"] == [f"{job.config.lr:g}"]
    code, said = run(plan(tmp_path, text, short))
    assert code == 0, said
    assert f"E1: an earlier sweep here had lr {job.config.lr:g}, which is better than what is chosen" in said


def test_what_a_sweep_chooses_beside_the_rate_is_what_is_run_and_told(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(seeds=(0,), sweep={"warmup": (1, 0.5), "weight_init": ("normal", "zero_out")}))
    code, said = run(made)
    assert code == 0, said
    assert "18 finished" in said
    assert len({job.folder for row in made.accepted for job in sweep_jobs(made, row)}) == 16
    chosen = chosen_settings(made)
    for path in (tmp_path / "toy" / "runs").iterdir():
        config = read_run(path).config
        assert config is not None
        assert made.study.setting_of(config) == chosen[read_run(path).label]
        name = path.name.partition("-tokens")[0]
        tried = [read_run(other) for other in (tmp_path / "toy" / "sweep").glob(f"{name}-*")]
        assert len(tried) == 8
        best = min(tried, key=lambda record: record.last_100).config
        assert best is not None
        assert (config.lr, config.warmup, config.weight_init) == (best.lr, best.warmup, best.weight_init)
    report = make_report([tmp_path / "toy"])
    assert report.sections[0].tables[0].columns[4:7] == ["lr", "--warmup", "--weight-init"]
    assert report.sweep is not None
    assert report.sweep.columns[1:4] == ["learning rate", "--warmup", "--weight-init"]
    told = {(row[0], *row[1:4]) for row in report.sweep.rows if row[-1] == "chosen"}
    assert told == {
        (label, f"{setting.lr:g}", *(str(value) for _, value in setting.options)) for label, setting in chosen.items()
    }
