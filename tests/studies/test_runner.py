"""Plans and their running: a run is known by what it computes, so what is done stays and what was cut goes on."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elman.cli import main
from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.model import ModelConfig
from elman.studies import child
from elman.studies.commands import report_command
from elman.studies.job import TrainJob
from elman.studies.launch import Job, LocalLauncher, SubmititLauncher, gpu_slots
from elman.studies.memory import largest_batch, measured_memory, most_memory
from elman.studies.options import RunStudy
from elman.studies.plan import Plan, identity, job_state, seal, slow_path
from elman.studies.records import read_run
from elman.studies.runner import chosen_settings, show_plan
from elman.studies.study import SWEEP_SEED, Budget, Run, Scale, Setting
from elman.training.config import TrainConfig
from elman.training.run import RunFolder
from tests.studies.echo import Echo
from tests.studies.toy import RUNS, Here, plan, run, study


def test_a_study_is_swept_run_skipped_and_reported(tmp_path: Path, text: Path) -> None:
    launcher = Here()
    code, said = run(plan(tmp_path, text), launcher)
    assert code == 0, said
    assert len(launcher.ran) == 8
    chosen = chosen_settings(plan(tmp_path, text))
    for path in (tmp_path / "toy" / "sweep").iterdir():
        record = read_run(path)
        assert record.problems == []
        assert record.seed == SWEEP_SEED
        assert not (path / "checkpoints").exists()
        assert record.summary["steps"] == 2
        better = [read_run(other) for other in path.parent.iterdir()]
        best = min((r for r in better if r.label == record.label), key=lambda r: r.last_100)
        assert chosen[record.label] == Setting(best.lr)
    finals = [read_run(path) for path in (tmp_path / "toy" / "runs").iterdir()]
    assert sorted((r.label, r.seed, r.summary["steps"]) for r in finals) == [
        ("E1", 0, 8), ("E1", 1, 8), ("soft sign", 0, 8), ("soft sign", 1, 8),
    ]  # fmt: skip
    assert all((r.path / "checkpoints").is_dir() for r in finals)
    again = Here()
    code, said = run(plan(tmp_path, text), again)
    assert (code, again.ran) == (0, [])
    assert "0 finished, 8 were done before" in said
    assert main(["study", "report", "activation", "--folder", str(tmp_path / "toy")]) == 0
    page = (tmp_path / "toy" / "report" / "report.html").read_text()
    assert "Which?" in page
    assert "soft sign" in page


def test_a_run_that_was_cut_goes_on_and_one_that_was_edited_is_left_alone(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,)))
    jobs = made.final_jobs({"E1": Setting(1e-3), "soft sign": Setting(1e-3)})
    assert run(made)[0] == 0
    losses = {row["step"]: row["loss"] for row in RunFolder(jobs[0].folder).read_metrics() if "loss" in row}
    # As a kill leaves it: no summary, and its checkpoint older than its last metrics.
    (jobs[0].folder / "summary.json").unlink()
    assert job_state(jobs[0])[0] == "cut"
    edited = RunFolder(jobs[1].folder)
    config = edited.read_json("config.json")
    config["train"]["lr"] = 5.0
    edited.write_json("config.json", config)
    launcher = Here()
    code, said = run(made, launcher)
    assert code == 1
    assert launcher.ran == ["E1, lr 0.001, seed 0"]
    assert "soft sign, lr 0.001, seed 0 is left alone: its config.json says lr 5.0, and it was begun with 0.001" in said
    assert job_state(jobs[0])[0] == "done"
    after = {row["step"]: row["loss"] for row in RunFolder(jobs[0].folder).read_metrics() if "loss" in row}
    assert after == losses


@pytest.mark.parametrize(
    ("spoil", "state"),
    [
        (lambda path: (path / "config.json").unlink(), "damaged"),
        (lambda path: (path / "config.json").write_text("{"), "damaged"),
        (lambda path: (path / "summary.json").write_text("{"), "damaged"),
        (lambda path: (path / "study.json").unlink(), "damaged"),
        (lambda path: [inside.unlink() for inside in path.iterdir() if inside.is_file()], "damaged"),
    ],
)
def test_damaged_folders_are_never_written_to(spoil: Any, state: str, tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]), tokens=64)
    (job,) = made.final_jobs({"E1": Setting(1e-3)})
    assert job_state(job) == ("new", "")
    assert job() == 0
    spoil(job.folder)
    found, why = job_state(job)
    assert found == state
    assert str(job.folder) in why
    launcher = Here()
    assert run(made, launcher)[0] == 1
    assert launcher.ran == []


def test_a_run_of_an_elman_that_knew_of_fewer_options_is_done(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]), tokens=64)
    (job,) = made.final_jobs({"E1": Setting(1e-3)})
    assert job() == 0
    run = RunFolder(job.folder)
    facts, config = run.read_json("study.json"), run.read_json("config.json")
    for train in (facts["settings"]["train"], config["train"]):
        del train["max_skipped"]
    facts["seal"] = seal(facts)
    run.write_json("study.json", facts)
    run.write_json("config.json", config)
    assert job_state(job) == ("done", "")
    config["train"]["lr"] = facts["settings"]["train"]["lr"] = 5.0
    facts["seal"] = seal(facts)
    run.write_json("study.json", facts)
    run.write_json("config.json", config)
    assert "whose folder was renamed" in job_state(job)[1]


def test_a_run_of_the_same_work_for_another_study_is_told_as_that(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]), tokens=64)
    (job,) = made.final_jobs({"E1": Setting(1e-3)})
    assert job() == 0
    facts = {**job.facts, "target_params": 5}
    state, why = job_state(replace(job, facts=facts))
    assert state == "damaged"
    assert "it was begun for target_params None, and the study has 5 now: give the study another --folder" in why


def test_a_run_that_another_process_writes_is_left_to_it(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]), tokens=64)
    (job,) = made.final_jobs({"E1": Setting(1e-3)})
    assert job() == 0
    (job.folder / "summary.json").unlink()
    with RunFolder(job.folder).lock():
        assert job_state(job)[0] == "busy"


def test_the_failure_of_one_is_told_and_the_others_go_on(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,)))
    code, said = run(made, Here(fails=["E1, lr 0.001, seed 0"]))
    assert code == 1
    assert "E1, lr 0.001, seed 0: failed: the machine burnt down" in said
    assert "1 finished" in said


def test_a_run_off_its_size_is_refused_and_the_others_go_on(tmp_path: Path, text: Path) -> None:
    runs = (Run("right", "e1", depth=1, params="10k"), Run("wrong", "e1", dim=16, depth=1, params="10k"))
    made = plan(tmp_path, text, study(runs=runs, varies=("params",), learning_rates=(1e-3,), seeds=(0,)), tokens=64)
    launcher = Here()
    code, said = run(made, launcher)
    assert code == 1
    assert launcher.ran == ["right, lr 0.001, seed 0"]
    assert "wrong is refused: --params 10K cannot be met within 2%" in said
    assert main(["report", str(tmp_path / "toy"), "--out", str(tmp_path / "out")]) == 0
    assert "wrong | refused" in (tmp_path / "out" / "report.md").read_text()


def test_a_rival_on_a_slow_path_is_refused() -> None:
    gpu = torch.device("cuda")
    slow = ModelConfig(32, 1, (mixer_config("mamba2")(kernels="torch"),))  # type: ignore[call-arg]
    assert "slow path" in str(slow_path(slow, gpu))
    assert slow_path(slow, torch.device("cpu")) is None
    assert slow_path(ModelConfig(32, 1, (mixer_config("e1")(),)), gpu) is None
    if torch.cuda.is_available():
        return
    # Here the official kernels are absent, and so would the rival's speed be.
    assert "fused kernels do not run here" in str(slow_path(ModelConfig(32, 1, (mixer_config("mamba2")(),)), gpu))


def test_a_run_is_known_by_what_it_computes(text: Path) -> None:
    config = TrainConfig(data=text, dim=16, depth=1, steps=3)
    model = ModelConfig(16, 1, (mixer_config("e1")(),))
    known = identity(config, model, "x")
    for name, value in {"device": "cpu", "save_every": 7, "out": Path("a"), "data": Path("b"), "wandb": "p"}.items():
        assert identity(replace(config, **{name: value}), model, "x") == known  # type: ignore[arg-type]
    others = [identity(config, model, "y"), identity(config, ModelConfig(17, 1, model.mixers), "x")]
    others += [identity(config, ModelConfig(16, 1, (mixer_config("e1")(gate="hx"),)), "x")]  # type: ignore[call-arg]
    for name, value in {"seed": 1, "lr": 2e-3, "steps": 4, "batch_size": 8, "compile": "off", "heldout": 0.1}.items():
        others.append(identity(replace(config, **{name: value}), model, "x"))  # type: ignore[arg-type]
    assert known not in others
    assert len(set(others)) == len(others)


def test_memory_is_told_and_batches_are_found(tmp_path: Path, text: Path) -> None:
    model = ModelConfig(64, 3, (mixer_config("e1")(),))
    told = most_memory(model, 16, 32, bf16=False)
    config = TrainConfig(data=text, dim=64, depth=3, seq_len=32, batch_size=16, steps=1, device="cpu", eval_bytes="200")
    measured = measured_memory(config, model)
    assert told == pytest.approx(measured, rel=0.1)
    more = measured_memory(replace(config, batch_size=24), model)
    memory = (measured + more) / 2
    assert largest_batch(config, model, memory) == 16
    with pytest.raises(UsageError, match="8 windows need"):
        largest_batch(config, model, 1000)


def test_equal_memory_means_each_its_own_batch(tmp_path: Path, text: Path) -> None:
    runs = (Run("small", "e1", dim=8, depth=1), Run("large", "e1", dim=32, depth=1))
    made = study(runs=runs, memory=4_000_000, varies=("batch_size",), learning_rates=(1e-3,), seeds=(0,))
    code, said = run(plan(tmp_path, text, made, tokens=2048))
    assert code == 0, said
    batches = {r.label: r.summary["batch_size"] for r in map(read_run, (tmp_path / "toy" / "runs").iterdir())}
    assert batches["small"] > batches["large"] >= 8
    again = Here()
    assert run(plan(tmp_path, text, made, tokens=2048), again)[0] == 0
    assert again.ran == []


def test_a_dry_run_shows_the_plan_and_trains_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (["structures"], ["ladder_50m", "--flops", "1e12"]):
        assert (
            main(["study", "run", *argv, "--scale", "tiny", "--data", str(text), "--device", "cpu", "--dry-run"]) == 0
        )
        shown = capsys.readouterr().out
        assert re.search(r"0/2", shown)
        assert "≤" in shown
        assert "about" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_knows_what_was_measured(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]))
    assert run(made)[0] == 0
    out = io.StringIO()
    show_plan(made, 1, "cpu", Console(file=out, width=200))
    assert "~" not in out.getvalue().split("held equal")[0]
    assert "1/1" in out.getvalue()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["study", "run", "ladder_5m"], "STUDY 'ladder_5m' is unknown: did you mean ladder_50m"),
        (
            ["study", "run", "activation", "--only", "tnah"],
            "--only 'tnah' is no run of activation: choose among tanh, soft",
        ),
        (["study", "run", "activation", "--tokens", "many"], "--tokens 'many' is no count"),
        (["study", "run", "activation", "--time-limit", "soon"], "--time-limit 'soon' is no duration"),
        (["study", "run", "activation", "--flops", "-1"], "a budget of -1.0 flops is none"),
        (["study", "run", "activation", "--tokens", "1m", "--time-limit", "1m"], "give the one amount"),
        (["study", "run", "activation", "--equal", "time", "--tokens", "1m"], "--tokens beside --equal time: give"),
        (["study", "run", "activation", "--jobs", "0", "--dry-run"], "--jobs 0 is out of range"),
        (["study", "run", "activation", "--data", "nowhere", "--dry-run"], "--data .*nowhere: no such file"),
        (["study", "run", "activation", "--seeds", "1", "1"], "two of its seeds are 1"),
        (["study", "run", "activation", "--slurm", "x=1", "--launcher", "local"], "--slurm is of no use"),
        (["study", "run", "activation", "--launcher", "slurm"], "there is no sbatch here"),
        (["study", "run", "activation", "--launcher", "slurm", "--slurm", "x"], "--slurm 'x' has no value"),
        (["study", "report", "activation"], "there is no folder runs/activation: run it first"),
        (["study", "show", "nowhere.py"], "no such file"),
    ],
)
def test_a_mistake_is_one_clear_line(
    argv: list[str], message: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if argv[1] == "run" and "--data" not in argv:
        argv = [*argv, "--data", str(text)]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_studies_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "list"]) == 0
    assert "ladder_50m" in capsys.readouterr().out
    assert main(["study", "show", "activation", "--scale", "tiny"]) == 0
    shown = capsys.readouterr().out
    for words in ("Does softsign", "batch: 16 windows a step", "softsign", "197,248"):
        assert words in shown


def test_slots_are_the_gpus_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_slots(0, None) == [None]
    assert gpu_slots(0, 3) == [None] * 3
    assert gpu_slots(4, None) == ["0", "1", "2", "3"]
    assert gpu_slots(4, 2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert gpu_slots(2, None) == ["3", "GPU-abc"]
    with pytest.raises(UsageError, match="--jobs 3: this machine has 2 GPU"):
        gpu_slots(2, 3)
    assert gpu_slots(2, 3, shared=True) == ["3", "GPU-abc", "3"]


def test_local_jobs_have_a_gpu_each_and_tell_how_they_ended(tmp_path: Path) -> None:
    ended: dict[str, tuple[int, str]] = {}
    jobs = [Echo(f"job{i}", tmp_path, code=i, seconds=2.0) for i in range(2)]
    jobs.append(Echo("killed", tmp_path, code=-signal.SIGKILL))
    launcher = LocalLauncher(["0", "5"], tmp_path / "logs")
    launcher.run(jobs, lambda job, code, line: ended.update({job.name: (code, line)}))
    assert ended.pop("killed") == (-signal.SIGKILL, "killed by SIGKILL")
    gpus = {name: json.loads((tmp_path / name).read_text())[0] for name in ended}
    assert set(gpus.values()) == {"0", "5"}
    assert ended == {f"job{i}": (i, f"job{i} saw {gpus[f'job{i}']}") for i in range(2)}
    assert [path.suffix for path in (tmp_path / "logs").iterdir()] == [".log"] * 3


def test_what_another_process_asks_of_the_same_job_is_left_to_it(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for pid in ("", f".{os.getpid() + 1}"):
        (logs / f"job{pid}.job").write_bytes(b"of another process")
    ended: list[int] = []
    LocalLauncher([None], logs).run([Echo("job", tmp_path)], lambda job, code, line: ended.append(code))
    assert ended == [0]
    assert [path.read_bytes() for path in logs.glob("*.job")] == [b"of another process"] * 2


def test_the_command_for_the_report_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    options = RunStudy("my study.py", folder=tmp_path / "a folder")
    words = shlex.split(report_command(options))
    assert words == ["elman", "study", "report", "my study.py", "--folder", str(tmp_path / "a folder")]


def test_a_process_that_is_kept_takes_one_job_after_another(tmp_path: Path) -> None:
    ended: dict[str, tuple[int, str]] = {}
    names = ["a", "b", "killed", "c", "broken"]
    jobs = [Echo(name, tmp_path / ("nowhere" if name == "broken" else "")) for name in names]
    jobs[1].code, jobs[2].code = 3, -signal.SIGKILL
    launcher = LocalLauncher(["0"], tmp_path / "logs", keep=True)
    launcher.run(jobs, lambda job, code, line: ended.update({job.name: (code, line)}))
    pids = {name: json.loads((tmp_path / name).read_text())[3] for name in "abc"}
    # What ends the process ends no other job; and none stays where there is nothing left to do.
    assert pids["a"] == pids["b"] != pids["c"]
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert ended["a"] == (0, "a saw 0")
    assert ended["b"] == (3, "b saw 0")
    assert ended["killed"] == (-signal.SIGKILL, "killed by SIGKILL")
    assert ended["broken"][0] == 1
    assert "FileNotFoundError" in ended["broken"][1]
    assert (tmp_path / "logs" / "a.log").read_text() == "a saw 0\n\n"


@pytest.mark.parametrize(("left", "clean"), [(0, True), (1 << 20, True), (600 << 20, False)])
def test_a_process_with_memory_left_on_the_device_says_so(
    left: int, clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    names = ("empty_cache", "reset_peak_memory_stats")
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        memory_allocated=lambda: left,
        **{name: functools.partial(said.append, name) for name in names},
    )
    compiler = types.SimpleNamespace(reset=lambda: said.append("reset"))
    workspaces = types.SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: said.append("workspaces"))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda, compiler=compiler, _C=workspaces))
    monkeypatch.setitem(sys.modules, "torch._dynamo", types.ModuleType("torch._dynamo"))
    assert child._forget() is clean
    assert said == ["reset", "workspaces", *names]
    cuda.is_initialized = lambda: False
    assert child._forget() is True
    assert len(said) == 4


def test_a_process_that_is_not_clean_takes_no_other_job(tmp_path: Path) -> None:
    ended: dict[str, tuple[int, str]] = {}
    jobs = [Echo("a", tmp_path, dirty=True), Echo("b", tmp_path), Echo("c", tmp_path)]
    launcher = LocalLauncher(["0"], tmp_path / "logs", keep=True)
    launcher.run(jobs, lambda job, code, line: ended.update({job.name: (code, line)}))
    pids = {name: json.loads((tmp_path / name).read_text())[3] for name in "abc"}
    assert pids["a"] != pids["b"] == pids["c"]
    assert [code for code, _ in ended.values()] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_compiled_runs_of_one_process_are_as_runs_of_their_own(tmp_path: Path, text: Path) -> None:
    runs = tuple(Run(name, name, dim=256, depth=2) for name in ("e1", "transformer"))
    losses: list[dict[str, Any]] = []
    for keep in (True, False):
        made = plan(tmp_path / str(keep), text, study(learning_rates=(1e-3,), seeds=(0, 1), runs=runs), tokens=4096)
        launcher = LocalLauncher(["0"], tmp_path / str(keep) / "logs", keep=keep)
        pids: set[int | None] = set()

        def done(
            job: Job, code: int, line: str, launcher: LocalLauncher = launcher, pids: set[int | None] = pids
        ) -> None:
            assert code == 0, line
            process = launcher.slots[0].process
            pids.add(None if process is None else process.pid)

        launcher.run(replace(made, device="cuda").final_jobs({run.name: Setting(1e-3) for run in runs}), done)
        # Where a process is kept, it was found clean after each, and so is the same one.
        assert len(pids) == 1
        assert (pids != {None}) is keep
        records = [read_run(path) for path in (tmp_path / str(keep) / "toy" / "runs").iterdir()]
        losses.append({record.path.name: [row["loss"] for row in record.rows if "lr" in row] for record in records})
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # submitit's debug executor leaves its logs open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_study_runs_through_submitit(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]), tokens=128)
    launcher = SubmititLauncher(tmp_path / "logs", 5, {}, cluster="debug")
    code, said = run(made, launcher)
    assert code == 0, said
    (path,) = (tmp_path / "toy" / "runs").iterdir()
    assert read_run(path).problems == []
    with pytest.raises(UsageError, match="--slurm nonsense"):
        SubmititLauncher(tmp_path / "logs", 5, {"nonsense": 1}, cluster="debug")


def test_jobs_run_in_processes_of_submitit(tmp_path: Path) -> None:
    ended: dict[str, tuple[int, str]] = {}
    launcher = SubmititLauncher(tmp_path / "logs", 5, {}, cluster="local")
    jobs = [Echo("good", tmp_path), Echo("bad", tmp_path, code=3), Echo("broken", tmp_path / "nowhere")]
    launcher.run(jobs, lambda job, code, line: ended.update({job.name: (code, line)}))
    assert (ended["good"][0], ended["bad"][0], ended["broken"][0]) == (0, 3, 1)
    assert ended["bad"][1].startswith("bad saw")
    assert "FileNotFoundError" in ended["broken"][1]


def test_jobs_are_given_to_slurm_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, does in (("sbatch", f'cp "$1" {tmp_path}/batch; echo Submitted batch job 12'), ("srun", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launcher = SubmititLauncher(tmp_path / "logs", 40, {"slurm_partition": "gpu", "cpus_per_task": 4}, jobs=2)
    launcher.executor.submit(Echo("job", tmp_path))
    batch = (tmp_path / "batch").read_text()
    for line in ("partition=gpu", "time=40", "gpus-per-node=1", "cpus-per-task=4"):
        assert f"#SBATCH --{line}\n" in batch
    with pytest.raises(UsageError, match="--slurm slurm_partitoin"):
        SubmititLauncher(tmp_path / "logs", 40, {"slurm_partitoin": "gpu"})


def test_a_job_that_a_cluster_takes_back_is_queued_again(tmp_path: Path, text: Path) -> None:
    made = plan(tmp_path, text, study(learning_rates=(1e-3,), seeds=(0,), runs=RUNS[:1]), tokens=128)
    (job,) = made.final_jobs({"E1": Setting(1e-3)})
    again = job.checkpoint()
    assert isinstance(again.function, TrainJob)
    assert again.function == job


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_stops_the_study_and_saves_its_run(tmp_path: Path, text: Path) -> None:
    file = tmp_path / "my.py"
    file.write_text(
        "from elman.studies import Run, Study\n"
        "def study(scale):\n"
        "    return Study('mine', 'Which?', (Run('E1', 'e1', dim=16, depth=1),), seeds=(0,), learning_rates=(1e-3,),\n"
        "        train={'batch_size': 4, 'seq_len': 16, 'eval_bytes': '200'})\n"
    )
    command = [sys.executable, "-m", "elman", "study", "run", str(file), "--data", str(text), "--device", "cpu"]
    command += ["--folder", str(tmp_path / "mine"), "--tokens"]
    # In a shell's background it would inherit that SIGINT is ignored; a group of its own goes with it if it fails.
    process = subprocess.Popen([*command, "1b"], start_new_session=True, preexec_fn=_hear_interrupts)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("mine/runs/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (cut,) = (tmp_path / "mine" / "runs").iterdir()
    assert list((cut / "checkpoints").iterdir())
    record = read_run(cut)
    assert "did not reach its end" in record.problems[0]
    assert record.facts["run"] == "E1"


@pytest.mark.gpu
def test_a_study_runs_on_a_gpu_and_finds_its_batch_there(tmp_path: Path, text: Path) -> None:
    made = study(memory=2**30, varies=("batch_size",), learning_rates=(1e-3,), seeds=(0,))
    made = replace(made, runs=tuple(replace(run, dim=128, depth=2) for run in made.runs))
    there = Plan(made, Scale(), Budget("tokens", 500_000), tmp_path / "toy", text, "cuda")
    code, said = run(there, LocalLauncher(gpu_slots(torch.cuda.device_count(), 1), tmp_path / "logs"))
    assert code == 0, said
    records = [read_run(path) for path in (tmp_path / "toy" / "runs").iterdir()]
    assert len(records) == 2
    for record in records:
        assert record.problems == []
        assert record.device == torch.cuda.get_device_name()
        assert record.summary["peak_memory_bytes"] <= 1.05 * 2**30
