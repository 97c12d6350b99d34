"""Where a step's time goes: a few steps under PyTorch's profiler, their kernels sorted by what they are for.

On a GPU the time is that of its kernels and copies, and *idle* that of none of them, which is the host's doing (the
profiler's own work on it included). On a CPU it is that of PyTorch's operators, each without those that it calls, and
*between operators* is Python; what a recurrence consists of there is counted as the operators that it consists of.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

#: Steps before those that count, the last of which runs under the profiler already, and those that count.
_WAIT, _WARM_UP, _STEPS = 9, 1, 3
#: Steps that a run takes before it is profiled, the profiled ones included.
PROFILED_AT = _WAIT + _WARM_UP + _STEPS

RECURRENCES = "recurrences and attention"
OTHER = "other"
#: Classes by patterns of their kernels' and operators' names, of which the first that is found counts.
_CLASSES: tuple[tuple[str, str], ...] = (
    (
        RECURRENCES,
        r"(persistent|wide|diagonal|low_rank|banks|scan|step|matrix)_(forward|backward)"
        r"|elman::(recurrence|matrix_recurrence|banks|linear_scan)|rnn"
        r"|lstm|gru(?!p)|chunk_|state_passing|causal_conv1d|flash|fmha|attention|selective",
    ),
    ("optimiser", r"multi_tensor|fused_?adam|_foreach|lpnorm|^Optimizer|amp_|linalg_vector_norm|::lerp"),
    (
        "products",
        r"gemm|gemv|nvjet|cutlass|xmma|wgmma|cublas|splitk|^dot_|aten::(mm|bmm|addmm|baddbmm|mv|dot|_scaled_mm)$",
    ),
    ("norms", r"norm_(forward|backward)|(rms|layer)_?norm|elman::add_norm"),
    ("loss and embedding", r"(?<!gated_)softmax|nll_loss|cross_entropy|embedding|index(ing)?_(select|put|backward)"),
    (
        "copies",
        r"^mem(cpy|set)|copy_kernel|fillfunctor|catarray|triton_poi_fused(_(to_copy|clone|cat|copy|t|transpose|permute|view"
        r"|slice|unsqueeze)|_)*\d*$|aten::(copy_|clone|cat|stack|fill_|zero_|_to_copy|contiguous)$",
    ),
    ("elementwise", r"elementwise|gated_softmax|short_conv|triton_|reduce_?kernel|aten::"),
)
_PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _CLASSES]


def classify(name: str) -> str:
    """What a kernel or an operator of this name is for."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), OTHER)


@dataclass(frozen=True)
class Share:
    """A part of a step: milliseconds and calls a step, and its part of the step's time."""

    name: str
    ms: float
    calls: float
    part: float


class Profile:
    """What the profiler saw of some steps."""

    def __init__(self, profiler: Any, steps: int) -> None:
        events = [event for event in profiler.events() if not _is_annotation(event)]
        on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
        #: Whether the times are a GPU's.
        self.on_gpu = bool(on_gpu)
        self.steps = steps
        spans = [(event.time_range.start, event.time_range.end) for event in on_gpu or events]
        window = max(end for _, end in spans) - min(start for start, _ in spans)
        named = [(event.name, event.time_range.elapsed_us() if self.on_gpu else event.self_cpu_time_total)
                 for event in on_gpu or events]  # fmt: skip
        busy = _union(spans) if self.on_gpu else sum(us for _, us in named)
        times: Counter[str] = Counter()
        for name, us in named:
            times[name] += us
        self._times, self._calls = times, Counter(name for name, _ in named)
        #: Of a step, idleness included.
        self.ms_per_step = window / steps / 1e3
        self._idle = max(0.0, window - busy) / steps / 1e3

    @property
    def kernels(self) -> list[dict[str, Any]]:
        """Name, calls and milliseconds a step of every kernel or operator, the longest first."""
        return [
            {
                "name": name[:120],
                "calls": round(self._calls[name] / self.steps, 2),
                "ms": round(us / self.steps / 1e3, 4),
            }
            for name, us in self._times.most_common()
        ]

    @property
    def shares(self) -> list[Share]:
        """The classes, the longest first, and at last the time of none."""
        ms: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for name, us in self._times.items():
            ms[classify(name)] += us / self.steps / 1e3  # type: ignore[assignment]
            calls[classify(name)] += self._calls[name]
        found = [
            Share(kind, value, calls[kind] / self.steps, value / self.ms_per_step) for kind, value in ms.most_common()
        ]
        rest = "idle" if self.on_gpu else "between operators"
        return [*found, Share(rest, self._idle, 0, self._idle / self.ms_per_step)]

    def table(self, title: str = "where a step's time goes") -> Table:
        """The classes, for a reader."""
        table = Table(title=f"{title}: {self.ms_per_step:.4g} ms", title_justify="left")
        for column in ("part", "ms a step", "share", "kernels" if self.on_gpu else "calls"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for share in self.shares:
            calls = f"{share.calls:,.0f}" if share.calls else ""
            table.add_row(share.name, f"{share.ms:.3g}", f"{share.part:.1%}", calls)
        return table


def _is_annotation(event: Any) -> bool:
    """Whether an event is no work of its own: a range that is marked for the reader of a trace."""
    marked: bool = getattr(event, "is_user_annotation", False) and event.device_type == DeviceType.CUDA
    return marked or str(event.name).startswith("ProfilerStep")


def _union(spans: list[tuple[float, float]]) -> float:
    """The length of time in which at least one of them goes on."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def profile_steps(step: Callable[[], object], device: torch.device, steps: int = _STEPS) -> Profile:
    """A profile of this many calls of ``step``, on a device that is warm; on a GPU without the host's side."""
    activities = _activities(device)[-1:]
    _finish_work(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        _finish_work(device)
    return Profile(profiler, steps)


def _finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def profiling(
    wanted: bool, device: torch.device, path: Path, show: Callable[[Profile | None], None]
) -> Iterator[Callable[[], None]]:
    """Profile some steps inside the ``with`` block, where that is wanted.

    Args:
        wanted: if not, nothing happens.
        device: of the steps.
        path: of the trace in Chrome's format, gzipped, which the browser shows at ui.perfetto.dev.
        show: is called with the profile as soon as it is there; with None at the end if the block was too short.

    Yields:
        What is to be called after each step.
    """
    if not wanted:
        yield lambda: None
        return
    done, shown = 0, False

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == _WAIT + _WARM_UP:
            _finish_work(device)  # of steps that do not count
        profiler.step()

    def ready(profiler: Any) -> None:
        nonlocal shown
        shown = True
        profiler.export_chrome_trace(str(path))
        show(Profile(profiler, _STEPS))

    profiler = torch.profiler.profile(
        activities=_activities(device),
        schedule=torch.profiler.schedule(wait=_WAIT, warmup=_WARM_UP, active=_STEPS, repeat=1),
        on_trace_ready=ready,
        acc_events=True,
    )
    with profiler:
        yield after_step
        if not shown:
            # What is stopped before its time would be written as if it were whole.
            profiler.on_trace_ready = None
    if not shown:
        show(None)
