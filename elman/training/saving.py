"""Checkpoints written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from safetensors import SafetensorError

from elman.errors import TrainingError
from elman.training.distributed import Processes
from elman.training.run import RunFolder


class Saver:
    """Has one checkpoint at a time written by a thread.

    What goes wrong in writing is raised at the latest when the next one is to be written or the run ends. ``wait`` and
    ``check`` are called by all ranks, whether they write or not: where one cannot, all stop.
    """

    def __init__(self, run: RunFolder, processes: Processes) -> None:
        self._run = run
        self._processes = processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[object] | None = None
        self._step = 0

    def start(self, step: int, write: Callable[[], object]) -> None:
        """Have ``write`` called, which reads nothing that training changes; the checkpoint before is written."""
        assert self._writing is None
        self._step = step
        self._writing = self._thread.submit(write)

    def check(self) -> None:
        """Raise what ``wait`` would, if it is known already."""
        failed = self._writing is not None and self._writing.done() and self._writing.exception() is not None
        if any(self._processes.largest(float(failed))):
            self.wait()

    def wait(self) -> None:
        """Come back when everything is on the disk.

        Raises:
            TrainingError: it could not be written.
        """
        writing, self._writing = self._writing, None
        with self._processes.together():
            try:
                if writing is not None:
                    writing.result()
            except (OSError, RuntimeError, SafetensorError) as error:
                raise TrainingError(
                    f"the checkpoint of step {self._step} cannot be written to {self._run.checkpoints} ({error}); "
                    f"any before it is whole: once that is mended, go on with: elman train --resume {self._run.path}"
                ) from None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What is being written becomes whole even where the run ends by an error, which is then the one to tell of.
        self._thread.shutdown(wait=True)
