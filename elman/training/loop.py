"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from elman.data.loading import Loader, TensorBatch
from elman.environment import is_out_of_memory, peak_memory, supports_bf16
from elman.errors import TrainingError, UsageError
from elman.mixers import State
from elman.model import LanguageModel, ModelConfig, next_token_loss
from elman.ops import choosing_for_graphs, record_backends
from elman.training.carry import Carry
from elman.training.checkpoint import Checkpoint, save_checkpoint, save_sharded
from elman.training.checks import check_counts, check_memory, check_mixers, rows_a_pass
from elman.training.compiling import compile_training, first_line, ignoring_compiler_warnings
from elman.training.config import RunConfig
from elman.training.display import TrainingDisplay, say, show_profile
from elman.training.distributed import ALONE, Processes
from elman.training.finish import finish
from elman.training.float8 import check_float8, use_float8
from elman.training.graph import make_graph
from elman.training.metrics import PendingRow, PendingRows
from elman.training.mfu import Utilisation
from elman.training.optim import build_optimizer, learning_rate, parameter_roles
from elman.training.parallel import check_shareable, share_model
from elman.training.profile import profiling
from elman.training.run import RunFolder, load_newest, load_weights, newest_checkpoint
from elman.training.saving import Saver
from elman.training.source import Outcome, open_source
from elman.training.statistics import LayerStatistics
from elman.training.stop import StopSignal
from elman.training.tracking import check_trackers, open_metrics


class Trainer:
    """One run: the model, its optimiser, its place in the data and the state carried there, all in a checkpoint.

    Batches are a function of the step, so the place in the data is the step itself. Of several processes each has a
    trainer, and all do the same at the same time, each with its rows of the batch.
    """

    def __init__(
        self, config: RunConfig, model_config: ModelConfig, console: Console, processes: Processes = ALONE
    ) -> None:
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
            check_trackers(config)
            auto = "bf16" if supports_bf16(self.device) else "fp32"
            self.precision = auto if config.precision == "auto" else config.precision
            if self.precision == "fp8":
                check_float8(self.device, self.rows * config.seq_len)
            self.source = open_source(config)
            self.source.check_vocabulary(model_config.vocab_size)
            self.sampler = self.source.sampler
            check_mixers(model_config, config, self.sampler.resets, self.sampler.carries_state, self.device)
            self._loader = Loader(self.sampler, self.source.workers(self.device), processes.rank, processes.size)
            check_memory(model_config, self.device, processes)
            torch.manual_seed(config.seed)
            self.model = LanguageModel(model_config, config.weight_init).to(self.device)
            check_counts(model_config, self.model)
            if self.precision == "fp8":
                use_float8(self.model)
            roles = parameter_roles(self.model)
            check_shareable(self.model, processes)
        self.parallel = share_model(self.model, processes)
        self.optimizer = build_optimizer(self.model, config, roles)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        # Steps without an update, and how many of them came last; known as far as losses have been fetched.
        self.skipped, self.skipped_in_row = 0, 0
        self.carry = Carry(config.grad_accum, self._forward_zeros() if self.sampler.carries_state else None, processes)
        #: The checkpoint whose weights were the first ones, unless random ones were.
        self.started_from: str | None = None
        self.compiled = False
        self.graph = make_graph(config, self.device)
        self.start_up_seconds = 0.0
        self._loss = next_token_loss
        self.step = 0
        self.seconds = 0.0
        # Where this process took over: speed is shown for its own steps.
        self._first_step, self._first_second = 0, 0.0
        self.recent_losses: deque[float] = deque(maxlen=100)
        self.statistics = LayerStatistics(self.model, config.stats_every)
        self.utilisation = Utilisation(model_config, config.seq_len, self.device, self.precision, processes.size)
        self.fetch_every = 1 if self.device.type == "cpu" else 10
        self._pending = PendingRows()

    def start_from(self, run: RunFolder) -> None:
        """Take the weights of the newest whole checkpoint of another run, and nothing else of it.

        Raises:
            UsageError: there is none, every one is damaged, or it does not fit this model.
        """
        given: dict[str, Any] = {"processes": self.processes, "room": self.parallel.room, "with_trainer": False}
        found = load_newest(run, lambda line: say(self.console, line), **given)
        with self.processes.together():
            if found is None:
                raise UsageError(f"--start-from {run.path} has no checkpoint yet: let it train until its first save")
            path, checkpoint = found
            try:
                load_weights(self.model, checkpoint.model, path, self.parallel.place)
            except UsageError as error:
                raise UsageError(f"--start-from {run.path}: {error}, or drop what makes this model another") from None
            self.started_from = str(path.absolute())
        say(self.console, f"starting from the weights of {path}")

    def restore(self, run: RunFolder) -> None:
        """Go back to the run's newest whole checkpoint; to the start, where this already is, if it has none yet.

        Raises:
            UsageError: every checkpoint is damaged, or another model's or version's, or the data is not what the run
                began with.
        """
        given: dict[str, Any] = {"processes": self.processes, "room": self.parallel.room}
        found = load_newest(run, lambda line: say(self.console, line), set_aside=run.writes, **given)
        if found is None:
            return
        with self.processes.together():
            self._go_back_to(*found)
        rows = [row for row in run.read_metrics() if row["step"] <= self.step]
        self.recent_losses.extend(row["loss"] for row in rows if isinstance(row.get("loss"), float))

    def _go_back_to(self, path: Path, checkpoint: Checkpoint) -> None:
        assert checkpoint.trainer is not None
        if missing := self._state().keys() - checkpoint.trainer.keys():
            raise UsageError(
                f"{path} was written by another version of elman (it has no {', '.join(sorted(missing))}): "
                f"resume with that version, or start a new run; its weights can still be read, by elman generate"
            )
        self.source.check_fingerprint(checkpoint.trainer["data"])
        load_weights(self.model, checkpoint.model, path, self.parallel.place)
        self.optimizer.load_state_dict(checkpoint.trainer["optimizer"], self.parallel.place)
        self.scaler.load_state_dict(checkpoint.trainer["scaler"])
        self.skipped, self.skipped_in_row = checkpoint.trainer["skipped"]
        torch.set_rng_state(checkpoint.trainer["rng"])
        self.carry.restore(checkpoint.trainer["state"])
        self.seconds = checkpoint.trainer["seconds"]
        self.step = checkpoint.step
        if "places" in checkpoint.trainer:
            self._loader.seek(self.step, checkpoint.trainer["places"])
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
        with self._choices():
            self._prepare()
        if self.device.type == "cuda" and self.statistics.every:
            self._look()  # its few rows may take kernels of their own
        self.start_up_seconds = time.perf_counter() - started

    def _prepare(self) -> None:
        if self.will_compile:
            reason: str | None = None
            try:
                self._loss = compile_training(self.parallel.compile)
                with ignoring_compiler_warnings():
                    self._try_step()
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = first_line(error)
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

    def _choices(self) -> AbstractContextManager[None]:
        """Kernels are chosen for a graph where steps will be captured."""
        return contextlib.nullcontext() if self.graph is None else choosing_for_graphs()

    def backends(self, steps: int = 2) -> list[str]:
        """What runs each mixer of the model, at this run's batch size, found out by a plain forward pass.

        Of one step some models run otherwise, as in generation.
        """
        with record_backends() as backends, self._choices():
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
        shown = TrainingDisplay(self.console, self.source.unit)
        shows = open_metrics(run, self.config, self.step + 1)
        trace = run.path / "profile.json.gz"
        with (
            contextlib.closing(self._loader),
            shows as self.metrics,
            Saver(run, self.processes) as self._saver,
            StopSignal(self.processes) as stop,
            shown as display,
            profiling(
                self.config.profile and run.writes,
                self.device,
                trace,
                lambda found: show_profile(display, found, trace),
            ) as self._after_step,
        ):
            while self.progress < 1 and not stop:
                self._train_until_due(display, stop)
                if self.progress >= 1 or stop:
                    break
                if _due(self.step, self.config.eval_every):
                    self._evaluate(display, stop, final=False)
                if _due(self.step, self.config.save_every):
                    self._save()
                self.capture()
            self._save()
            outcome = None if stop else self._evaluate(display, stop, final=True)
            self._saver.wait()
            if outcome is None:
                return False
            finish(self, outcome, display)
        return True

    def _train_until_due(self, display: TrainingDisplay, stop: StopSignal) -> None:
        """Steps up to the next evaluation, save or end. Only these count as training time."""
        before, started = self.seconds, time.perf_counter()
        while True:
            rate, values = self._train_step()
            self._after_step()
            self.seconds = stop.agree(before + time.perf_counter() - started)
            self._pending.put({"step": self.step, "lr": rate, "seconds": self.seconds}, values)
            due = _due(self.step, self.config.eval_every) or _due(self.step, self.config.save_every)
            due = due or (self.graph is not None and self.graph.due)
            last = due or stop or self.progress >= 1
            if last or self.step % self.fetch_every == 0:
                taken = list(self._pending.take(everything=bool(last)))
                self.seconds = stop.agree(before + time.perf_counter() - started)
                self._report(taken, display)
                self.seconds = stop.agree(before + time.perf_counter() - started)
            if last:
                return

    def _train_step(self) -> tuple[float, torch.Tensor]:
        """One step of the optimiser, skipped where the loss or the gradient is not finite.

        Returns:
            The learning rate; and on the device, not waited for, (3,): loss, norm of the gradient, 1 if skipped. Where
            layers are looked at, their statistics follow.
        """
        rate = learning_rate(self.config, self.step, self.progress)
        self.optimizer.set_rate(rate)
        if self.graph is not None:
            self.graph.place(self._loader.batch(self.step))
        looks = self.statistics.due(self.step + 1)
        seen = self._look() if looks else None
        values = self._step_on_device(looks) if self.graph is None else self.graph(self._step_to_capture)
        self.step += 1
        return rate, values[:3] if seen is None else torch.cat((values, seen))

    def _step_to_capture(self) -> torch.Tensor:
        """A step that can be taken again on the same memory; whether layers are looked at, it cannot know."""
        before = list(self.carry.states)
        values = self._step_on_device(with_norms=self.config.stats_every > 0)
        self.carry.settle(before)
        return values

    def capture(self) -> None:
        """Capture a step, if that is wanted and it is time to; it is not taken, and its cost is no training time.

        Raises:
            TrainingError: ``--graph on``, and it cannot be done.
        """
        if self.graph is None or not self.graph.due:
            return
        started, before = time.perf_counter(), list(self.carry.states)
        try:
            self.graph.capture(self._step_to_capture)
        except Exception as error:
            reason = first_line(error)
            if self.config.graph == "on":
                raise TrainingError(f"a step cannot be captured here ({reason}): give --graph off") from error
            say(self.console, f"not captured, so slower: a CUDA graph cannot hold a step here ({reason})")
            self.graph, self.carry.states = None, before
            self.optimizer.zero_grad()
        self.start_up_seconds += time.perf_counter() - started

    def _step_on_device(self, with_norms: bool) -> torch.Tensor:
        """All of a step that its batch decides, in work for the device alone; gradients' norms by layer come last."""
        before = list(self.carry.states)
        loss = self._accumulate_gradients()
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        norms = self.statistics.gradient_norms() if with_norms else loss.new_empty(0)
        norm = self.parallel.clip_gradients(self.config.grad_clip or float("inf"))
        # The same on all ranks, and so is whether the step is skipped.
        loss, norm = self.processes.mean(torch.stack((loss, norm)))
        skip = ~(loss + norm).isfinite()
        self.optimizer.step(skip)
        self.carry.undo(skip, before)
        self.scaler.update()
        self.parallel.after_step()
        self.optimizer.zero_grad()
        return torch.cat((torch.stack((loss, norm, skip.float())), norms))

    def _batch(self) -> TensorBatch:
        """The batch of a step, on the device; that of steps to be captured lies where it was placed before."""
        if self.graph is not None and self.graph.batch is not None:
            return self.graph.batch
        return self._loader.batch(self.step).each(self._to_device)

    def _look(self) -> torch.Tensor:
        """The statistics of this step's batch, before the step."""
        batch = self._batch()
        first = batch.pairs()[0].chunk(self.config.grad_accum)[0]
        return self.statistics.look(first, self.carry.states[0], batch.reset, self.autocast)

    def _accumulate_gradients(self) -> torch.Tensor:
        """Both passes over this rank's rows of the step's batch, a part at a time; the loss is their mean."""
        batch = self._batch()
        inputs, targets = (rows.chunk(self.config.grad_accum) for rows in batch.pairs())
        resets = [None] * len(inputs) if batch.reset is None else batch.reset.chunk(self.config.grad_accum)
        loss = torch.zeros((), device=self.device)
        for i, part in enumerate(inputs):
            with self.parallel.part(last=i == len(inputs) - 1):
                with self.autocast():
                    logits, state = self.parallel.forward(part, self.carry.states[i], resets[i])
                self.carry.put(i, state)
                part_loss = self._loss(logits, targets[i]) / self.config.grad_accum
                self.scaler.scale(part_loss).backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()
        return loss

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _report(self, taken: list[PendingRow], display: TrainingDisplay) -> None:
        """What the device told of some steps, to metrics.jsonl and to the reader."""
        self._saver.check()
        rows = []
        for row, (loss, norm, skip, *seen) in taken:
            if seen:
                row["stats"] = self.statistics.as_row(seen)
            measured = {"loss": loss, "grad_norm": norm}
            row |= {name: value for name, value in measured.items() if math.isfinite(value)}
            row["tokens"] = row["step"] * self.tokens_per_step
            self.skipped_in_row = self.skipped_in_row + 1 if skip else 0
            if skip:
                self.skipped += 1
                row["skipped"] = self.skipped
                what = f"step {row['step']} is skipped: its loss is {loss}, its gradient's norm {norm}"
                display.say(f"{what} ({self.skipped} skipped so far)")
            rows.append(row)
            if self.skipped_in_row >= self.config.max_skipped:
                self.metrics.append(rows)
                self._saver.wait()
                complaint = (
                    f"{what}, and so were all of the last {self.skipped_in_row} (--max-skipped): start anew with a "
                    f"lower --lr (it was {self.config.lr}), a longer --warmup or a lower --grad-clip; "
                    f"the last good checkpoint is {newest_checkpoint(self.run) or 'none: nothing was saved yet'}"
                )
                raise self.processes.failure(TrainingError(complaint))
        if not rows:
            return
        done = rows[-1]["step"] - self._first_step
        speed = done * self.tokens_per_step / (self.seconds - self._first_second)
        mfu = self.utilisation.at(speed)
        rows[-1] |= {"tokens_per_second": speed, **({} if mfu is None else {"mfu": mfu})}
        self.metrics.append(rows)
        self.recent_losses.extend(row["loss"] for row in rows if "loss" in row)
        display.update(
            step=self.step,
            steps=self.config.steps,
            progress=self.progress,
            loss=loss,
            mean=self.last_100_loss,
            tokens_per_second=speed,
            mfu=mfu,
            seconds=self.seconds,
            memory=peak_memory(self.device),
        )

    def _evaluate(self, display: TrainingDisplay, stop: StopSignal, *, final: bool) -> Outcome | None:
        def stopped() -> bool:
            stop.agree()
            return bool(stop)

        with self.optimizer.averaged():
            outcome = self.source.evaluate(self, stopped, final=final)
        if outcome is not None:
            if not math.isfinite(outcome.loss):
                complaint = f"the {self.source.judge} is {outcome.loss} at step {self.step}: lower the --lr"
                raise self.processes.failure(TrainingError(complaint))
            self.metrics.append([{"step": self.step, "seconds": self.seconds, **outcome.row()}])
            display.say(f"step {self.step}  {outcome.line()}")
        return outcome

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        places = self._loader.places(self.step)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": (self.skipped, self.skipped_in_row),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "data": self.source.fingerprint,
            "state": self.carry.whole(),
            **({} if places is None else {"places": self.processes.rows(places)}),
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

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the forward pass."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    @property
    def tokens_per_step(self) -> int:
        """That a step reads."""
        return self.config.batch_size * self.config.seq_len

    @property
    def last_100_loss(self) -> float:
        """The mean; NaN before there is one."""
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else math.nan


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
