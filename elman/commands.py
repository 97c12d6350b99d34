"""The small commands: what they show, and in which order."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from elman import __version__
from elman.cache import cache_folder
from elman.data import bytes as raw
from elman.data.hub import PREFIX, hub_texts
from elman.data.info import QUANTILES, describe
from elman.data.pack import PackSummary, check_out, find_files, pack_texts
from elman.data.pack import pack as pack_files
from elman.environment import driver_version, package_versions, resolve_device, supports_bf16, total_memory, why_no_cuda
from elman.errors import UsageError
from elman.evaluation.tasks import find_task, task_names
from elman.mixers import PATTERNS, mixer_names, parse_pattern, pattern_mixers
from elman.model import ModelConfig
from elman.ops import backend_status
from elman.sizing import SizeError, flops_per_token, num_params, size_model, state_size
from elman.text import one_line
from elman.units import format_bytes, format_count, parse_count


def export(run: Path, out: Path | None, console: Console) -> int:
    """Make a folder for transformers, and say how to load it."""
    from elman.export.huggingface import export as export_to_huggingface

    folder = export_to_huggingface(run, out, lambda line: console.print(one_line(line), soft_wrap=True))
    names = ", ".join(sorted(file.name for file in folder.iterdir()))
    console.print(one_line(f"exported to {folder}: {names}"), soft_wrap=True)
    call = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    console.print(one_line(f"load it: {call}"), soft_wrap=True)
    return 0


def sized_variants(params: int, depth: int) -> Iterator[tuple[str, str, ModelConfig | None]]:
    """Every variant and named pattern: its name, its equation, and the model of that size; None where no width fits."""
    for name in [*PATTERNS, *mixer_names()]:
        mixers = pattern_mixers(name)
        equation = mixers[0].equation if len(mixers) == 1 else f"layers of {PATTERNS[name]}"
        try:
            yield name, equation, size_model(mixers, params=params, depth=max(depth, len(mixers)))
        except SizeError:
            yield name, equation, None


def check(model: str, options: str, console: Console) -> int:
    """Print what a variant keeps to, and what not; 1 if there is any."""
    from elman.contract import CHECKS
    from elman.contract import check as check_contract

    names = parse_pattern(model)
    if len(names) > 1:
        raise UsageError(f"MODEL {model!r} is a pattern: check its variants one by one, {names[0]} first")
    (mixer,) = pattern_mixers(model)
    try:
        given = json.loads(options)
    except ValueError:
        given = None
    known = [entry.name for entry in dataclasses.fields(mixer) if entry.init]
    if not isinstance(given, dict) or not given.keys() <= set(known):
        told = ", ".join(known) or "none"
        raise UsageError(f"--options {options!r} is no JSON object of options of {mixer.name}, which are: {told}")
    mixer = dataclasses.replace(mixer, **given)
    broken = 0
    for each, wrong in check_contract(mixer):
        broken += wrong is not None
        console.print(f"{'ok' if wrong is None else 'WRONG':5}  {each.what}")
        if wrong is not None:
            console.print(one_line(f"       {wrong}"), soft_wrap=True)
    kept = f"all {len(CHECKS)}" if not broken else f"{len(CHECKS) - broken} of {len(CHECKS)}"
    console.print(
        one_line(f"{mixer.name} keeps to {kept}; in float64 on a CPU: a kernel of its own would not be tried")
    )
    return 1 if broken else 0


def models(params: str, depth: int, seq_len: int, console: Console) -> int:
    """Print every variant at one size."""
    target = parse_count(params, "--params")
    if depth < 1 or seq_len < 1:
        name, value = ("--depth", depth) if depth < 1 else ("--seq-len", seq_len)
        raise UsageError(f"{name} {value} is out of range: give a number of at least 1")
    table = Table(title=f"variants at --params {params} --depth {depth}", title_justify="left")
    for column in ("model", "equation"):
        table.add_column(column)
    for column in ("width", "parameters", "FLOPs/token", "state"):
        table.add_column(column, justify="right")
    for name, equation, config in sized_variants(target, depth):
        if config is None:
            table.add_row(name, equation, "-", "no width within 2%", "-", "-")
            continue
        counts = (num_params(config), flops_per_token(config, seq_len), state_size(config, seq_len))
        table.add_row(name, equation, str(config.dim), *(format_count(count) for count in counts))
    console.print(table)
    console.print("fla:NAME is the layer NAME of the package flash-linear-attention, such as fla:GatedDeltaNet.")
    console.print("FILE.py is a variant of your own: docs/add_a_variant.md.")
    console.print("FLOPs: forward, 2 a multiply-add; training costs 3 times that. State: numbers a sequence.")
    return 0


def tasks(length: int, console: Console) -> int:
    """Print every task."""
    if length < 1:
        raise UsageError(f"--length {length} is out of range: give a number of at least 1")
    table = Table(title=f"tasks at --length {length}", title_justify="left")
    for column in ("task", "what is asked", "source"):
        table.add_column(column, no_wrap=column == "task")
    for column in ("symbols", "shortest", "chance"):
        table.add_column(column, justify="right")
    for name in task_names():
        task = find_task(name)
        chance = f"{task.chance(length):.3f}" if length >= task.shortest else "-"
        table.add_row(name, task.asks, task.source, str(len(task.symbols)), str(task.shortest), chance)
    console.print(table)
    console.print("chance: what the best constant guess gets right. elman tasks NAME shows an example.")
    return 0


def show_task(name: str, length: int | None, seed: int, console: Console) -> int:
    """Print what a task is, and an example of it."""
    task = find_task(name)
    length = max(12, task.shortest) if length is None else length
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} is out of range: give a number of at least 0 and below 2^63")
    examples = task.examples(np.random.Generator(np.random.Philox(key=seed)), 1, length, "--length")
    console.print(Text(inspect.getdoc(sys.modules[type(task).__module__]) or ""), soft_wrap=True)
    console.print(
        Text(f"\nOf length {length}, where chance is {task.chance(length):.4f}:\n\n{task.draw(examples)}"),
        soft_wrap=True,
    )
    return 0


def doctor(console: Console) -> int:
    """Print what this machine can run."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column()
    table.add_row("elman", f"{__version__}, {Path(__file__).parent}")
    table.add_row("python", f"{sys.version.split()[0]}, {sys.executable}")
    table.add_row("packages", ", ".join(f"{n} {v or '(absent)'}" for n, v in package_versions().items()))
    cpu = torch.device("cpu")
    table.add_row("cpu", f"{os.cpu_count()} cores, {format_bytes(total_memory(cpu))}")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        precision = "bf16" if supports_bf16(device) else "no bf16, so trains in fp32"
        memory = format_bytes(total_memory(device))
        table.add_row(str(device), f"{name}, sm_{capability[0]}{capability[1]}, {memory}, {precision}")
    table.add_row(
        "gpu", f"driver {driver_version()}, CUDA {torch.version.cuda}" if devices else f"none: {why_no_cuda()}"
    )
    for backend, used, why in backend_status():
        table.add_row(f"backend {backend}", why if used else f"not used: {why}")
    table.add_row("cache", _cache_state())
    table.add_row("trains on", f"{resolve_device('auto')} by default")
    console.print(table)
    return 0


def _cache_state() -> str:
    folder = cache_folder()
    if folder is None:
        return "off, or no home folder; set ELMAN_CACHE to a folder to turn it on"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(existing, os.W_OK) and existing.is_dir():
        return f"{folder}"
    return f"{folder} cannot be written; set ELMAN_CACHE to a folder that can"


def pack(paths: list[Path], out: Path, field: str, split: str, skip_bad: bool, console: Console) -> int:
    """Pack with a progress bar, then tell what went in and what was left out."""
    if any(str(path).startswith(PREFIX) for path in paths):
        summary = _pack_data_set(paths, out, field, split, skip_bad, console)
    else:
        summary = _pack_files(paths, out, field, skip_bad, console)
    console.print(f"{one_line(str(out))}: {summary.documents:,} documents, {summary.bytes:,} bytes", soft_wrap=True)
    if summary.replaced:
        console.print(f"{summary.replaced:,} delimiter bytes (0x1e) inside texts became spaces")
    for reason, count in summary.skipped.items():
        console.print(f"left out: {count:,} {reason}")
    return 0


def _pack_data_set(
    paths: list[Path], out: Path, field: str, split: str, skip_bad: bool, console: Console
) -> PackSummary:
    if len(paths) > 1:
        raise UsageError(f"PATH {' '.join(map(str, paths))}: a data set is packed alone; name one {PREFIX}NAME")
    check_out(out)
    summary = PackSummary()
    texts = hub_texts(str(paths[0]), split, field, skip_bad, summary)
    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        pack_texts(progress.track(texts, description=f"packing rows of {paths[0]}", total=None), out, summary)
    return summary


def _pack_files(paths: list[Path], out: Path, field: str, skip_bad: bool, console: Console) -> PackSummary:
    files = find_files(paths)
    total = sum(file.stat().st_size for file in files)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"packing {len(files)} files", total=total)
        return pack_files(
            files,
            out,
            text_field=field,
            skip_bad=skip_bad,
            open_file=lambda file: progress.open(file, "rb", task_id=task, total=total),
        )


def info(file: Path, console: Console) -> int:
    """Read a raw file once and print what it holds."""
    data = raw.map_bytes(file, "FILE")
    parts = raw.split_tail(file, data)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading", total=len(data))
        facts = describe(data, lambda read: progress.advance(task, read))
    table = Table(title=one_line(str(file)), title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_row("size", f"{facts.size:,} bytes")
    table.add_row("documents", f"{facts.documents:,}{' (the last without a delimiter)' * facts.unterminated}")
    table.add_row("to train on", f"{len(parts.train):,} bytes")
    table.add_row("held out", f"{len(parts.heldout):,} bytes")
    for quantile, length in zip(QUANTILES, facts.length_quantiles, strict=True):
        name = {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(quantile, f"{quantile:.0%} quantile")
        table.add_row(f"document, {name}", f"{length:,} bytes")
    table.add_row("entropy of byte counts", f"{facts.entropy:.3f} bits/byte")
    console.print(table)
    histogram = Table(title="bytes", title_justify="left")
    for column in ("byte", "", "share"):
        histogram.add_column(column, justify="right" if column == "share" else "left")
    groups = [(f"0x{byte:02x}", _show(byte), int(facts.histogram[byte])) for byte in range(256)]
    groups.sort(key=lambda group: -group[2])
    shown = [group for group in groups[:20] if group[2]]
    others = [group for group in groups[20:] if group[2]]
    if others:
        shown.append((f"{len(others)} others", "", sum(group[2] for group in others)))
    largest = max(group[2] for group in shown)
    for code, character, count in shown:
        bar = "█" * round(30 * count / largest)
        histogram.add_row(f"{code} {character}".strip(), bar, f"{count / facts.size:.2%}")
    console.print(histogram)
    return 0


def _show(byte: int) -> str:
    if byte == 32:
        return "space"
    return repr(chr(byte)).strip("'") if byte < 127 else ""
