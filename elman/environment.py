"""What this machine is and can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import elman
from elman.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """``auto`` or a device's name to a device that is there.

    Raises:
        UsageError: no such device; the message tells what there is.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown: give cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise UsageError(f"--device {name}: {why_no_cuda()}; give --device cpu")
        if device.index is not None and device.index >= count:
            raise UsageError(f"--device {name}: this machine has {count} CUDA device(s), 0 to {count - 1}")
    elif device.type != "cpu":
        raise UsageError(f"--device {name!r} is not supported: give cpu, cuda, cuda:N or auto")
    return device


def why_no_cuda() -> str:
    """In words, why torch sees no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver was found"
    return "torch sees no CUDA device (is CUDA_VISIBLE_DEVICES empty, or the driver older than torch needs?)"


def supports_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The facts that a run's env.json records."""
    facts: dict[str, Any] = {
        "elman": elman.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "command": sys.argv,
        "device": str(device),
        "packages": package_versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that decide what a run computes; None where one is absent."""
    versions: dict[str, str | None] = {}
    for name in (
        *("torch", "numpy", "triton", "safetensors", "cuda-core", "tiktoken"),
        *("mamba-ssm", "causal-conv1d", "flash-linear-attention", "schedulefree"),
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit() -> str | None:
    """The commit of elman's own checkout, ``-dirty`` added where files differ from it; None if not a checkout."""
    root = Path(elman.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit and _output("git", "-C", str(root), "status", "--porcelain"):
        commit += "-dirty"
    return commit


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def total_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is the lack of memory of a GPU or a CPU."""
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch has held at most on a GPU, what the process has held at most on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
