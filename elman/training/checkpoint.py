"""Checkpoints: folders that are whole or absent, and are checked when they are read.

A checkpoint holds the weights (safetensors), the rest of the trainer's state (a tensors-only pickle, read with
``weights_only``), and a manifest with the size and SHA-256 of both. Reading one executes no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from elman.errors import UsageError

_FORMAT = "elman-checkpoint-1"
_MODEL, _TRAINER, _MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"
# What reading a file of the right sum but the wrong content may raise.
_UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError)
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpointError(UsageError):
    """A checkpoint that is not as it was written; the one before it may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A step's state.

    Attributes:
        step: optimiser steps done.
        model: the model's ``state_dict``.
        trainer: what the trainer needs beyond that; None where only the weights were asked for.
    """

    step: int
    model: dict[str, Tensor]
    trainer: dict[str, Any] | None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write a checkpoint into ``folder`` under its step's name, then remove all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    final = folder / f"step-{checkpoint.step:08d}"
    if final.exists():
        return final
    partial = folder / f".partial-{os.getpid()}"
    partial.mkdir()
    try:
        model = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.items()}
        safetensors.torch.save_file(model, partial / _MODEL)
        torch.save(checkpoint.trainer, partial / _TRAINER)
        files = {name: _fingerprint(partial / name) for name in (_MODEL, _TRAINER)}
        manifest = {"format": _FORMAT, "step": checkpoint.step, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        # safetensors makes its file readable for its owner alone; a run is to be shared like any other file.
        (partial / _MODEL).chmod((partial / _MANIFEST).stat().st_mode)
        for name in (_MODEL, _TRAINER, _MANIFEST):
            _sync(partial / name)
        _sync(partial)
        partial.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path, *, with_trainer: bool = True) -> Checkpoint:
    """Read a checkpoint, every byte checked first.

    Raises:
        DamagedCheckpointError: missing, truncated, changed or foreign; the message says which file.
        UsageError: it may not be read.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged, or not one of elman's ({_FORMAT})")
        for name in (_MODEL, _TRAINER):
            if _fingerprint(path / name) != manifest["files"][name]:
                raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} was cut short or changed")
        model = safetensors.torch.load_file(path / _MODEL)
        trainer = torch.load(path / _TRAINER, map_location="cpu", weights_only=True) if with_trainer else None
        if manifest["step"] != _step(path):
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {_MANIFEST} speaks of step {manifest['step']}")
        return Checkpoint(_step(path), model, trainer)
    except PermissionError as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error.strerror}; check its permissions") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name if error.filename else "a file"
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {missing} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    except _UNREADABLE as error:
        if isinstance(error, UsageError):
            raise
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: it cannot be read ({error})") from None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
