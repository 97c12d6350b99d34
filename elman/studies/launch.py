"""Where jobs run: in processes of their own on this machine, one a GPU; or on a cluster, through submitit."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from elman.errors import UsageError
from elman.studies.child import CLEAN

#: Seconds that a run which is told to stop has for its checkpoint.
_SECONDS_TO_STOP = 60


class Job(Protocol):
    """What can be launched: it is pickled, called elsewhere, and returns an exit code."""

    @property
    def label(self) -> str:
        """For people."""

    @property
    def name(self) -> str:
        """For files."""

    def __call__(self) -> int: ...


#: Told of a job's end: its exit code, and the last line that it printed.
Done = Callable[[Any, int, str], None]


class Launcher(ABC):
    """Runs jobs, and tells of each as it ends."""

    #: Jobs at a time, as far as that is known.
    jobs = 1

    @abstractmethod
    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run them all; ``done`` is called here, in the order in which they end."""


class _Slot:
    """A place for a job, and the process that stays there to take one job after another, if any does."""

    def __init__(self, visible: str | None) -> None:
        self.visible = visible
        self.process: subprocess.Popen[str] | None = None


class LocalLauncher(Launcher):
    """A process a job, on the slots given; or with ``keep`` a process a slot, which starts and tunes kernels once.

    One that cannot free all that its job took on the device is not kept.

    A slot is the value of CUDA_VISIBLE_DEVICES for its jobs, so that a job sees one GPU; or None, and it sees what
    there is. Where this process is told to stop, so are the jobs, and they save.
    """

    def __init__(self, slots: Sequence[str | None], logs: Path, keep: bool = False) -> None:
        self.slots = [_Slot(visible) for visible in slots]
        self.jobs = len(self.slots)
        self.logs = logs
        self.keep = keep
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self.slots:
            free.put(slot)
        try:
            with ThreadPoolExecutor(len(self.slots)) as pool:
                tasks = {pool.submit(self._run_one, job, free): job for job in jobs}
                try:
                    for task in as_completed(tasks):
                        outcome = task.result()
                        if outcome is not None:
                            done(tasks[task], *outcome)
                except BaseException:
                    self._stop()
                    raise
        finally:
            for slot in self.slots:
                self._dismiss(slot)

    def _run_one(self, job: Job, free: queue.SimpleQueue[_Slot]) -> tuple[int, str] | None:
        slot = free.get()
        try:
            # The request is this process's own: another may run the same study.
            request, log = self.logs / f"{job.name}.{os.getpid()}.job", self.logs / f"{job.name}.log"
            request.write_bytes(pickle.dumps(job))
            with self._lock:
                if self._stopping:
                    return None
                process = slot.process or self._start(slot)
                assert process.stdin is not None
                assert process.stdout is not None
                # One that was killed in between says so below.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(f"{request.absolute()}\n{log.absolute()}\n")
                    process.stdin.flush()
            told = process.stdout.readline().split()
            if told[1:] != [CLEAN] or not self.keep or self._stopping:
                self._dismiss(slot)
            code = int(told[0]) if told else process.returncode
            request.unlink(missing_ok=True)
            # A process that was killed, as one that takes all memory is, had no time to say so.
            killed = f"killed by {signal.Signals(-code).name}" if code < 0 else None
            return code, killed or last_line(log)
        finally:
            free.put(slot)

    def _start(self, slot: _Slot) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if slot.visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.visible
        # Each would start as many compilers, and as many threads for its products, as there are cores.
        threads = str(max(1, len(os.sched_getaffinity(0)) // len(self.slots)))
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", threads)
        if self.keep:
            environment.setdefault("OMP_NUM_THREADS", threads)
        # A session of its own: who presses Ctrl-C stops this process, and it the jobs, once.
        slot.process = subprocess.Popen(
            [sys.executable, "-m", "elman.studies.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self._running.add(slot.process)
        return slot.process

    def _dismiss(self, slot: _Slot) -> None:
        """Let a slot's process end, once it has no job any more, and wait for it."""
        process, slot.process = slot.process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()
        with self._lock:
            self._running.discard(process)

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()


class SubmititLauncher(Launcher):
    """Jobs of a Slurm cluster, or of submitit's own executors, by https://github.com/facebookincubator/submitit.

    A job whose machine is taken back is queued again, and goes on from its newest checkpoint.
    """

    def __init__(
        self, logs: Path, minutes: float, parameters: dict[str, Any], cluster: str = "slurm", jobs: int | None = None
    ) -> None:
        """Make one.

        Args:
            logs: where submitit keeps its files.
            minutes: that a job may take.
            parameters: of ``AutoExecutor.update_parameters``, such as ``slurm_partition``.
            cluster: ``slurm``; ``local`` and ``debug`` are submitit's processes here and this process itself.
            jobs: at most so many at a time; as many as the cluster gives if absent.
        """
        try:
            import submitit
        except ImportError:
            raise UsageError("--launcher slurm needs the package submitit: pip install submitit") from None
        self.jobs = jobs or 1
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise UsageError("--launcher slurm: there is no sbatch here: run it on a machine of the cluster")
        logs.mkdir(parents=True, exist_ok=True)
        self.executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        own: dict[str, Any] = {"timeout_min": max(1, round(minutes)), "name": "elman"}
        if cluster == "slurm":
            own |= {"gpus_per_node": 1, "cpus_per_task": 8, "tasks_per_node": 1, "nodes": 1}
            own |= {} if jobs is None else {"slurm_array_parallelism": jobs}
        try:
            self.executor.update_parameters(**{**own, **parameters})
        except (TypeError, ValueError, NameError) as error:
            raise UsageError(f"--slurm {' '.join(parameters)}: {error}") from None

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        from submitit.helpers import as_completed

        with self.executor.batch():
            submitted = [self.executor.submit(job) for job in jobs]
        waiting = dict(zip(submitted, jobs, strict=True))
        try:
            for task in as_completed(submitted, poll_frequency=1):
                try:
                    code, line = int(task.result()), _last_line_of(task.stdout() or "")
                except Exception as error:
                    # The job's own errors are codes: this is the cluster's, or a defect, and a traceback is in it.
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    named = [
                        line.strip() for line in lines if re.match(r"\s*[\w.]+(Error|Exception|Interrupt)\b", line)
                    ]
                    code, line = 1, (named or lines)[-1]
                done(waiting[task], code, line)
        except BaseException:
            for task in submitted:
                with contextlib.suppress(Exception):
                    task.cancel(check=False)
            raise


def gpu_slots(count: int, jobs: int | None, shared: bool = False) -> list[str | None]:
    """A slot a GPU that this process sees, at most ``jobs``; one slot without a GPU, where runs would share the cores.

    Args:
        count: GPUs that are seen.
        jobs: as asked for.
        shared: whether several jobs may share a GPU.
    """
    if count == 0:
        return [None] * (jobs or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if not visible else [name.strip() for name in visible.split(",")][:count]
    if jobs is not None and jobs > len(names):
        if shared:
            return [names[i % len(names)] for i in range(jobs)]
        raise UsageError(
            f"--jobs {jobs}: this machine has {len(names)} GPU(s), and runs that share one are no measure of speed: "
            f"give at most {len(names)}"
        )
    return list(names[:jobs])


def last_line(log: Path) -> str:
    """The last that a job printed, which tells why it failed."""
    return _last_line_of(log.read_text(encoding="utf-8", errors="replace"))


def _last_line_of(text: str) -> str:
    # submitit tells what it does in the same file.
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("submitit ")]
    return lines[-1] if lines else "it ended without a word"
