"""Checkpoints: folders that are whole or absent, and are checked when they are read.

A checkpoint holds the weights (safetensors), the rest of the trainer's state (a tensors-only pickle, read with
``weights_only``), and a manifest with the size and SHA-256 of each file. Where ranks have shards of the model, so has
each a file of them, with the weights and all that the state has of their shapes. Reading one executes no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from elman.errors import UsageError
from elman.training.distributed import ALONE, Processes
from elman.training.parallel import Room

_FORMAT, _SHARDED = "elman-checkpoint-1", "elman-checkpoint-sharded-1"
_MODEL, _TRAINER, _MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"
# What reading a file of the right sum but the wrong content may raise.
_UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError)
# What the names of shards begin with.
_MODEL_PREFIX, _TRAINER_PREFIX = "model.", "trainer"
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

    def on_host(self) -> Checkpoint:
        """A copy in the host's memory, which training does not change."""
        on_gpu = False

        def copied(leaf: Any) -> Any:
            nonlocal on_gpu
            if not isinstance(leaf, Tensor):
                return leaf
            on_gpu = on_gpu or leaf.is_cuda
            # A GPU writes to pinned memory many times as fast; PyTorch keeps it for the next time.
            host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
            return host.copy_(leaf.detach(), non_blocking=True)

        copy = Checkpoint(self.step, tree_map(copied, dict(self.model)), tree_map(copied, self.trainer))
        if on_gpu:
            torch.cuda.synchronize()
        return copy


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write a checkpoint into ``folder`` under its step's name, then remove all but the newest ``keep``."""
    if (final := _final(folder, checkpoint.step)).exists():
        return final
    partial = _make_partial(folder)
    try:
        model = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.items()}
        safetensors.torch.save_file(model, partial / _MODEL)
        _save(checkpoint.trainer, partial / _TRAINER)
        files = {name: _fingerprint(partial / name) for name in (_MODEL, _TRAINER)}
        return _finish(partial, final, _FORMAT, files, keep)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_sharded(
    folder: Path, checkpoint: Checkpoint, processes: Processes, group: dist.ProcessGroup, keep: int = 2
) -> Callable[[], Path]:
    """The same where ranks have shards of it. Called by all of them, and so is what it returns, which may be elsewhere.

    Args:
        folder: one that all ranks see.
        checkpoint: its tensors may change once this returns.
        processes: all ranks.
        group: of their hosts, and for nothing else until what this returns has been called.
        keep: how many to keep.

    Returns:
        What ends the writing, by files and ``group`` alone: to be called by a thread.
    """
    from elman.training.sharded import take_shards, write_shards

    final = _final(folder, checkpoint.step)
    makes = processes.is_main and not final.exists()
    partial = processes.of_main(_make_partial(folder) if makes else None)
    if partial is None:
        return lambda: final
    trainer, moments = take_shards(checkpoint.trainer, _TRAINER_PREFIX)
    weights = {_MODEL_PREFIX + name: tensor for name, tensor in checkpoint.model.items()}
    finish_shards = write_shards(weights | moments, partial, group)
    trainer = Checkpoint(checkpoint.step, {}, trainer).on_host().trainer

    def finish() -> Path:
        try:
            # Then all ranks have written theirs, and each works out the sums of some.
            with _on_all(processes, group):
                finish_shards()
                if processes.is_main:
                    _save(trainer, partial / _TRAINER)
            names = sorted(path.name for path in partial.iterdir())
            files: dict[str, Any] = {}
            with _on_all(processes, group, files):
                files |= {name: _fingerprint(partial / name) for name in names[processes.rank :: processes.size]}
            with _on_all(processes, group):
                if processes.is_main:
                    _finish(partial, final, _SHARDED, files, keep)
        except BaseException:
            if processes.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    return finish


@contextlib.contextmanager
def _on_all(processes: Processes, group: dist.ProcessGroup, files: dict[str, Any] | None = None) -> Iterator[None]:
    """What is inside has been done by all ranks, or an error is raised on all; then ``files`` has all ranks' too."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    found: list[Any] = [None] * processes.size
    dist.all_gather_object(found, (None if error is None else str(error), files or {}), group=group)
    for message, theirs in found:
        if message is not None:
            raise error or OSError(message)
        if files is not None:
            files |= theirs


def _final(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _make_partial(folder: Path) -> Path:
    """A folder to write into, those that were left behind being removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial = folder / f".partial-{os.getpid()}"
    partial.mkdir()
    return partial


def _finish(partial: Path, final: Path, form: str, files: dict[str, Any], keep: int) -> Path:
    """Add the manifest, have all of it on the disk, and only then give it its name."""
    manifest = {"format": form, "step": step_of(final), "files": files}
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    for name in (*files, _MANIFEST):
        # safetensors makes its file readable for its owner alone; a run is to be shared like any other file.
        (partial / name).chmod((partial / _MANIFEST).stat().st_mode)
        _sync(partial / name)
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)
    for old in list_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def _save(value: Any, path: Path) -> None:
    """``torch.save``. A file that cannot be written is an OSError, which PyTorch hides behind an error of its own."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Of a checkpoint's folder, by its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(
    path: Path, *, with_trainer: bool = True, processes: Processes = ALONE, room: Room | None = None
) -> Checkpoint:
    """Read a checkpoint, every byte checked first. Called by all ranks; the outcome is the same on each.

    The ranks of a machine share the checking. Each machine checks all, for it is what itself gets to see of the files
    that its ranks go by, and what it has checked it need not fetch again.

    Args:
        path: the checkpoint's folder, which all ranks see.
        with_trainer: read more than the weights.
        processes: all ranks that call this.
        room: of how they share the model: no more is read than goes into it, or than is copied of the other tensors,
            which lie in the files and are to be copied where they are kept. None: all tensors are whole, on the CPU.

    Raises:
        DamagedCheckpointError: missing, truncated, changed or foreign; the message says which file.
        UsageError: it may not be read, or is damaged to some machines and not to others.
    """
    machines = processes.gather(socket.gethostname())
    with _alike(path, processes, machines), _reading(path):
        form, files = _read_manifest(path)
        here = [rank for rank, machine in enumerate(machines) if machine == machines[processes.rank]]
        for name in sorted(files)[here.index(processes.rank) :: len(here)]:
            if _fingerprint(path / name) != files[name]:
                raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} was cut short or changed")
    with _alike(path, processes, machines), _reading(path):
        trainer = None
        if with_trainer:
            trainer = torch.load(path / _TRAINER, map_location="cpu", weights_only=True, mmap=room is not None)
        if form == _SHARDED:
            from elman.training.sharded import put_shards, read_shards

            weights = read_shards(path, _MODEL_PREFIX, room)
            model = {name.removeprefix(_MODEL_PREFIX): tensor for name, tensor in weights.items()}
            trainer = put_shards(trainer, read_shards(path, _TRAINER_PREFIX, room) if with_trainer else {})
        else:
            model = safetensors.torch.load_file(path / _MODEL)
        return Checkpoint(step_of(path), model, trainer)


def _read_manifest(path: Path) -> tuple[str, dict[str, Any]]:
    """The form of a checkpoint, and the fingerprints of the files that are read of it."""
    manifest = json.loads((path / _MANIFEST).read_text())
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form not in (_FORMAT, _SHARDED):
        raise DamagedCheckpointError(f"checkpoint {path} is damaged, or not one of elman's ({_FORMAT})")
    if manifest["step"] != step_of(path):
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {_MANIFEST} speaks of step {manifest['step']}")
    files = manifest["files"]
    if form == _FORMAT:
        return form, {name: files[name] for name in (_MODEL, _TRAINER)}
    for shard in path.glob("*.safetensors"):
        # All are read.
        if shard.name not in files:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {shard.name} is none of its files")
    return form, files


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What reading a checkpoint may raise, as ``load_checkpoint`` tells of it."""
    try:
        yield
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


@contextlib.contextmanager
def _alike(path: Path, processes: Processes, machines: list[str]) -> Iterator[None]:
    """What is inside has been done by all ranks, whose machines these are, or the checkpoint is damaged to all."""
    damage: str | None = None
    with processes.together():
        try:
            yield
        except DamagedCheckpointError as error:
            damage = str(error)
    found = {machine: why for machine, why in zip(machines, processes.gather(damage), strict=True) if why is not None}
    if found and found.keys() == set(machines):
        raise DamagedCheckpointError(next(iter(found.values())))
    for machine, why in found.items():
        # No checkpoint is passed over, and set aside, because some machine does not see the folder.
        complaint = f"on {machine} {why}, but not on all machines: have the run's folder be the same on each"
        raise processes.failure(UsageError(complaint))


def data_of(path: Path) -> str | None:
    """By which the data is known that a whole checkpoint's run learns from, nothing else of it being read."""
    trainer = torch.load(path / _TRAINER, map_location="cpu", weights_only=True, mmap=True)
    return trainer.get("data") if isinstance(trainer, dict) else None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
