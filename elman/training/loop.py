"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from elman.data.bytes import open_bytes
from elman.data.loading import Loader
from elman.data.sampling import SAMPLERS
from elman.data.vocabulary import open_vocabulary
from elman.environment import is_out_of_memory, peak_memory, supports_bf16
from elman.errors import TrainingError, UsageError
from elman.evaluation.heldout import HeldoutLoss, HeldoutText, evaluate
from elman.generation import generate
from elman.mixers import State
from elman.model import LanguageModel, ModelConfig, next_token_loss
from elman.ops import record_backends
from elman.sizing import flops_per_token, num_params, state_size
from elman.text import readable
from elman.training.carry import Carry
from elman.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_sharded
from elman.training.checks import check_memory, check_mixers, rows_a_pass
from elman.training.config import TrainConfig
from elman.training.display import TrainingDisplay, print_summary, say
from elman.training.distributed import ALONE, Processes
from elman.training.optim import build_optimizer, learning_rate, parameter_roles
from elman.training.parallel import check_shareable, share_model
from elman.training.plot import plot_losses
from elman.training.run import RunFolder, load_newest, load_weights, newest_checkpoint
from elman.training.saving import Saver
from elman.training.stop import StopSignal
from elman.units import format_count

_SAMPLE_BYTES = 300


class Trainer:
    """One run: the model, its optimiser, its place in the data and the state carried there, all in a checkpoint.

    Batches are a function of the step, so the place in the data is the step itself. Of several processes each has a
    trainer, and all do the same at the same time, each with its rows of the batch.
    """

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, console: Console, processes: Processes = ALONE
    ) -> None:
        assert config.data is not None
        self.config = config
        self.model_config = model_config
        self.console = console
        self.processes = processes
        with processes.together():
            self.device = processes.device(config.device)
            #: Windows that a pass is over.
            self.rows = rows_a_pass(config, processes)
            for mixer in model_config.mixers:
                mixer.check_device(self.device)
            auto = "bf16" if supports_bf16(self.device) else "fp32"
            self.precision = auto if config.precision == "auto" else config.precision
            data = open_bytes(config.data, config.heldout)
            self.fingerprint = data.fingerprint()
            self.data = data
            self.vocabulary = open_vocabulary(config.tokenizer)
            if self.vocabulary.size != model_config.vocab_size:
                raise UsageError(
                    f"--tokenizer {config.tokenizer} has {self.vocabulary.size} tokens, but the model was made for "
                    f"{model_config.vocab_size}: install the tiktoken that the run began with, or start a new run"
                )
            self.sampler = SAMPLERS[config.sampling](
                data.train, config.seq_len, config.batch_size, config.seed, self.vocabulary
            )
            check_mixers(model_config, config, self.sampler.resets, self.sampler.carries_state, self.device)
            self.heldout = HeldoutText.cut(
                data.heldout, config.seq_len, config.eval_byte_count, self.vocabulary, self.sampler.resets
            )
            workers = config.workers if config.tokenizer is not None else 0
            self._loader = Loader(self.sampler, workers, processes.rank, processes.size)
            check_memory(model_config, self.device, processes)
            torch.manual_seed(config.seed)
            self.model = LanguageModel(model_config).to(self.device)
            roles = parameter_roles(self.model)
            check_shareable(self.model, processes)
        self.parallel = share_model(self.model, processes)
        self.optimizer = build_optimizer(self.model, config, roles)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        # Steps without an update, and how many of them came last; known as far as losses have been fetched.
        self.skipped, self.skipped_in_row = 0, 0
        self.carry = Carry(config.grad_accum, self._forward_zeros() if self.sampler.carries_state else None, processes)
        self.compiled = False
        self.start_up_seconds = 0.0
        self._loss = next_token_loss
        self.step = 0
        self.seconds = 0.0
        # Where this process took over: speed is shown for its own steps.
        self._first_step, self._first_second = 0, 0.0
        self.recent_losses: deque[float] = deque(maxlen=100)
        # Reading a loss from a GPU waits for it, so losses are fetched several at a time.
        self.fetch_every = 1 if self.device.type == "cpu" else 10
        self._pending: list[tuple[dict[str, Any], torch.Tensor]] = []

    def restore(self, run: RunFolder) -> None:
        """Go back to the run's newest whole checkpoint; to the start, where this already is, if it has none yet.

        Raises:
            UsageError: every checkpoint is damaged, or another model's or version's, or the data is not what the run
                began with.
        """
        found = None
        with self.processes.together():
            if self.processes.is_main:
                found = load_newest(run, lambda line: say(self.console, line), set_aside=True)
        path = self.processes.of_main(None if found is None else found[0])
        if path is None:
            return
        with self.processes.together():
            self._go_back_to(path, load_checkpoint(path) if found is None else found[1])
        rows = [row for row in run.read_metrics() if row["step"] <= self.step]
        self.recent_losses.extend(row["loss"] for row in rows if isinstance(row.get("loss"), float))

    def _go_back_to(self, path: Path, checkpoint: Checkpoint) -> None:
        assert checkpoint.trainer is not None
        if missing := self._state().keys() - checkpoint.trainer.keys():
            raise UsageError(
                f"{path} was written by another version of elman (it has no {', '.join(sorted(missing))}): "
                f"resume with that version, or start a new run; its weights can still be read, by elman generate"
            )
        if checkpoint.trainer["data"] != self.fingerprint:
            raise UsageError(
                f"--data {self.config.data} is not the file that the run began with: "
                f"name that file by --data, or start a new run"
            )
        load_weights(self.model, checkpoint.model, path, self.parallel.place)
        self.optimizer.load_state_dict(checkpoint.trainer["optimizer"], self.parallel.place)
        self.scaler.load_state_dict(checkpoint.trainer["scaler"])
        self.skipped, self.skipped_in_row = checkpoint.trainer["skipped"]
        torch.set_rng_state(checkpoint.trainer["rng"])
        self.carry.restore(checkpoint.trainer["state"])
        self.seconds = checkpoint.trainer["seconds"]
        self.step = checkpoint.step
        self._first_step, self._first_second = self.step, self.seconds

    @property
    def will_compile(self) -> bool:
        """Whether ``warm_up`` tries to."""
        return self.config.compile == "on" or (self.config.compile == "auto" and self.device.type == "cuda")

    def warm_up(self) -> None:
        """Compile all that a step needs, by a forward and a backward pass that leave no trace.

        Raises:
            UsageError: ``--compile on``, and it cannot be done.
        """
        started = time.perf_counter()
        if self.will_compile:
            reason: str | None = None
            try:
                self._compile()
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = _compiler_complaint(error)
            # Ranks are all compiled or none, so that they keep in step.
            reason = next((complaint for complaint in self.processes.gather(reason) if complaint is not None), None)
            if reason is not None and self.config.compile == "on":
                complaint = f"--compile on: torch.compile fails here ({reason}); give --compile off"
                raise self.processes.failure(UsageError(complaint))
            if reason is not None:
                say(self.console, f"not compiled, so slower: torch.compile fails here ({reason})")
                self.parallel.compile(lambda call: call)
                self._loss = next_token_loss
            self.compiled = reason is None
        if self.device.type == "cuda" and not self.compiled:
            self._try_step()
        self.start_up_seconds = time.perf_counter() - started

    def backends(self, steps: int = 1) -> list[str]:
        """What runs each mixer of the model, at this run's batch size, found out by a plain forward pass."""
        with record_backends() as backends:
            self._forward_zeros(steps)
        if self.compiled and self.device.type == "cpu":
            backends = ["loop" if backend == "reference" else backend for backend in backends]
        return backends

    def _forward_zeros(self, steps: int = 1) -> State:
        """The state after a plain forward pass of a part's rows, from rest."""
        tokens = torch.zeros(self.rows, steps, dtype=torch.long, device=self.device)
        self.model.eval()
        reset = torch.zeros_like(tokens, dtype=torch.bool) if self.sampler.resets else None
        with torch.no_grad(), self.autocast():
            _, state = self.model(tokens, None, reset)
        self.model.train()
        return state

    def _compile(self) -> None:
        # Kernels chosen by timing would sum in another order in another process, and resuming would not be exact.
        options = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else {}
        # Each kind of layer is a compilation of the same function: none of a long pattern's may be refused.
        torch._dynamo.config.recompile_limit = 64
        wrap = functools.partial(torch.compile, fullgraph=True, options=options)
        self.parallel.compile(wrap)
        self._loss = wrap(next_token_loss)
        with warnings.catch_warnings():
            # PyTorch's compiler warns of its own code.
            warnings.filterwarnings("ignore", module=r"torch\b")
            self._try_step()

    def _try_step(self) -> None:
        """A step up to its gradients, which are thrown away, and so is the state that it ends with."""
        before = list(self.carry.states)
        self.parallel.silent = True
        try:
            self._accumulate_gradients().item()
        finally:
            self.parallel.silent = False
            self.carry.states = before
            self.optimizer.zero_grad()

    @property
    def progress(self) -> float:
        """The part of the run that is done: of its steps or of its time, whichever is further."""
        by_steps = self.step / self.config.steps if self.config.steps else 0.0
        by_time = self.seconds / self.config.time_limit_s if self.config.time_limit_s else 0.0
        return max(by_steps, by_time)

    def train(self, run: RunFolder) -> bool:
        """Train to the end. Returns False if a signal ended it before, with everything saved.

        Raises:
            TrainingError: too many steps in a row had to be skipped, or a checkpoint cannot be written.
        """
        self.run = run
        shown = TrainingDisplay(self.console, self.vocabulary.unit)
        with (
            contextlib.closing(self._loader),
            Saver(run, self.processes) as self._saver,
            StopSignal(self.processes) as stop,
            shown as display,
        ):
            while self.progress < 1 and not stop:
                self._train_until_due(display, stop)
                if self.progress >= 1 or stop:
                    break
                if _due(self.step, self.config.eval_every):
                    self._evaluate(display, stop)
                if _due(self.step, self.config.save_every):
                    self._save()
            self._save()
            heldout = None if stop else self._evaluate(display, stop)
            self._saver.wait()
            if heldout is None:
                return False
            self._finish(heldout, display)
        return True

    def _train_until_due(self, display: TrainingDisplay, stop: StopSignal) -> None:
        """Steps up to the next evaluation, save or end. Only these count as training time."""
        before, started = self.seconds, time.perf_counter()
        while True:
            rate, values = self._train_step()
            self.seconds = stop.agree(before + time.perf_counter() - started)
            self._pending.append(({"step": self.step, "lr": rate, "seconds": self.seconds}, values))
            due = _due(self.step, self.config.eval_every) or _due(self.step, self.config.save_every)
            last = due or stop or self.progress >= 1
            if last or self.step % self.fetch_every == 0:
                self._fetch_losses(display)
                self.seconds = stop.agree(before + time.perf_counter() - started)
            if last:
                return

    def _train_step(self) -> tuple[float, torch.Tensor]:
        """One step of the optimiser, skipped where the loss or the gradient is not finite.

        Returns:
            The learning rate; and on the device, not waited for, (3,): loss, norm of the gradient, 1 if skipped.
        """
        rate = learning_rate(self.config, self.step, self.progress)
        self.optimizer.set_rate(rate)
        before = list(self.carry.states)
        loss = self._accumulate_gradients()
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        norm = self.parallel.clip_gradients(self.config.grad_clip or float("inf"))
        # The same on all ranks, and so is whether the step is skipped.
        loss, norm = self.processes.mean(torch.stack((loss, norm)))
        skip = ~(loss + norm).isfinite()
        self.optimizer.step(skip)
        self.carry.undo(skip, before)
        self.scaler.update()
        self.parallel.after_step()
        self.optimizer.zero_grad()
        self.step += 1
        return rate, torch.stack((loss, norm, skip.float()))

    def _accumulate_gradients(self) -> torch.Tensor:
        """Both passes over this rank's rows of the step's batch, a part at a time; the loss is their mean."""
        windows, reset = self._loader.batch(self.step)
        parts = self._to_device(windows).chunk(self.config.grad_accum)
        resets = [None] * len(parts) if reset is None else self._to_device(reset).chunk(self.config.grad_accum)
        loss = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            with self.parallel.part(last=i == len(parts) - 1):
                with self.autocast():
                    logits, state = self.parallel.forward(part[:, :-1], self.carry.states[i], resets[i])
                self.carry.put(i, state)
                part_loss = self._loss(logits, part[:, 1:]) / self.config.grad_accum
                self.scaler.scale(part_loss).backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()
        return loss

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _fetch_losses(self, display: TrainingDisplay) -> None:
        self._saver.check()
        if not self._pending:
            return
        values = torch.stack([values for _, values in self._pending]).tolist()
        rows = []
        for (row, _), (loss, norm, skip) in zip(self._pending, values, strict=True):
            measured = {"loss": loss, "grad_norm": norm}
            row |= {name: value for name, value in measured.items() if math.isfinite(value)}
            row["tokens"] = row["step"] * self._tokens_per_step
            self.skipped_in_row = self.skipped_in_row + 1 if skip else 0
            if skip:
                self.skipped += 1
                row["skipped"] = self.skipped
                what = f"step {row['step']} is skipped: its loss is {loss}, its gradient's norm {norm}"
                display.say(f"{what} ({self.skipped} skipped so far)")
            rows.append(row)
            if self.skipped_in_row >= self.config.max_skipped:
                self.run.append_metrics(rows)
                self._saver.wait()
                complaint = (
                    f"{what}, and so were all of the last {self.skipped_in_row} (--max-skipped): start anew with a "
                    f"lower --lr (it was {self.config.lr}), a longer --warmup or a lower --grad-clip; "
                    f"the last good checkpoint is {newest_checkpoint(self.run) or 'none: nothing was saved yet'}"
                )
                raise self.processes.failure(TrainingError(complaint))
        self._pending.clear()
        self.run.append_metrics(rows)
        self.recent_losses.extend(row["loss"] for row in rows if "loss" in row)
        display.update(
            step=self.step,
            steps=self.config.steps,
            progress=self.progress,
            loss=values[-1][0],
            mean=self._last_100_loss,
            tokens_per_second=(self.step - self._first_step)
            * self._tokens_per_step
            / (self.seconds - self._first_second),
            seconds=self.seconds,
            memory=peak_memory(self.device),
        )

    def _evaluate(self, display: TrainingDisplay, stop: StopSignal) -> HeldoutLoss | None:
        def stopped() -> bool:
            stop.agree()
            return bool(stop)

        with self.optimizer.averaged():
            heldout = evaluate(
                self.model,
                self.heldout,
                batch_size=self.rows,
                device=self.device,
                autocast=self.autocast,
                stop=stopped,
                rank=self.processes.rank,
                world_size=self.processes.size,
                total=self.processes.sum,
            )
        if heldout is not None:
            loss = heldout.nats_per_token
            if not math.isfinite(loss):
                complaint = f"the held-out loss is {loss} at step {self.step}: lower the --lr"
                raise self.processes.failure(TrainingError(complaint))
            row = {"heldout_loss": loss, "heldout_bits_per_byte": heldout.bits_per_byte}
            self.run.append_metrics([{"step": self.step, "seconds": self.seconds, **row}])
            display.say(
                f"step {self.step}  held-out loss {loss:.4f} nats/{self.vocabulary.unit}  "
                f"{heldout.bits_per_byte:.4f} bits/byte"
            )
        return heldout

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": (self.skipped, self.skipped_in_row),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "data": self.fingerprint,
            "state": self.carry.whole(),
        }

    def _save(self) -> None:
        """Copy all that a checkpoint holds, and have it written while training goes on."""
        self._saver.wait()
        trainer = self._state()
        folder = self.run.checkpoints
        with self.optimizer.averaged():
            checkpoint = Checkpoint(self.step, self.model.state_dict(), trainer)
            if self.processes.kind == "fsdp":
                write = save_sharded(folder, checkpoint, self.processes, self.processes.background)
            elif self.processes.is_main:
                write = functools.partial(save_checkpoint, folder, checkpoint.on_host())
            else:
                return
        self._saver.start(self.step, write)

    def _finish(self, heldout: HeldoutLoss, display: TrainingDisplay) -> None:
        """Sample, picture and, last of all, the summary: where it lies, the run is complete."""
        tokens = self.step * self._tokens_per_step
        summary = {
            "model": self.model_config.pattern,
            "params": num_params(self.model_config),
            "dim": self.model_config.dim,
            "depth": self.model_config.depth,
            "flops_per_token": flops_per_token(self.model_config, self.config.seq_len),
            "state_size": state_size(self.model_config, self.config.seq_len),
            "seq_len": self.config.seq_len,
            "batch_size": self.config.batch_size,
            "processes": self.processes.size,
            "parallel": self.processes.kind,
            "steps": self.step,
            "tokens": tokens,
            "compiled": self.compiled,
            "start_up_seconds": self.start_up_seconds,
            "train_seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "skipped_steps": self.skipped,
            "last_100_loss": self._last_100_loss,
            "unit": self.vocabulary.unit,
            "heldout": {
                **asdict(heldout),
                "nats_per_byte": heldout.nats_per_byte,
                "bits_per_byte": heldout.bits_per_byte,
            },
        }
        with self.optimizer.averaged():
            drawn = bytes(
                generate(
                    self.model.eval(),
                    b"",
                    _SAMPLE_BYTES,
                    seed=self.config.seed,
                    vocabulary=self.vocabulary,
                    resets=self.sampler.resets,
                )
            )
        sample = readable(drawn.decode("utf-8", "replace"))
        if not self.processes.is_main:
            return
        (self.run.path / "sample.txt").write_text(sample, encoding="utf-8")
        title = f"{self.model_config.pattern}, {format_count(num_params(self.model_config))} parameters"
        plot_losses(self.run.read_metrics(), title, self.run.path / "loss.png", self.vocabulary.unit)
        self.run.write_json("summary.json", summary)
        display.close()
        print_summary(self.console, summary, sample)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the forward pass."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    @property
    def _tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.seq_len

    @property
    def _last_100_loss(self) -> float:
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else math.nan


def _compiler_complaint(error: Exception) -> str:
    """The cause in one line, without torch.compile's wrapping."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
