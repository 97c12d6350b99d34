"""The optimisers and their learning rate.

adamw           Loshchilov and Hutter (2019), fused
schedulefree    AdamW that averages its weights instead of lowering its rate
muon            for matrices, AdamW for the rest; takes AdamW's rate and decay

Sources: A. Defazio et al., "The Road Less Scheduled" (2024); K. Jordan et al., "Muon: An optimizer for hidden layers in
neural networks" (2024); J. Liu et al., "Muon is Scalable for LLM Training" (2025), for the rate.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elman.errors import UsageError
from elman.training.config import RunConfig

_BETAS = (0.9, 0.95)
#: Of the peak: that of the first step of a warm-up that is a part of the run.
_FIRST_RATE = 0.01

#: A map between units; another weight, such as the embedding or a filter; or what does not decay.
Role = Literal["matrix", "weight", "plain"]


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """What each parameter is, by what its module declares of it (``elman.mixers.base`` tells how)."""
    return {
        f"{prefix}.{name}".lstrip("."): _role(module, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _role(module: nn.Module, name: str, parameter: nn.Parameter) -> Role:
    # A vector is a bias, a norm's gain or a decay; packages mark others as the last condition says.
    declared = name in getattr(module, "no_decay", ()) or getattr(parameter, "_no_weight_decay", False)
    if declared or parameter.ndim < 2 or name.startswith("bias"):
        return "plain"
    pointwise = isinstance(module, nn.Embedding) or name in getattr(module, "no_matrix", ())
    return "weight" if pointwise or parameter.ndim > 2 else "matrix"


def rate_multiples(model: nn.Module) -> dict[str, float]:
    """By what each parameter's learning rate is a multiple of the run's, as its module declares it, or 1."""
    return {
        f"{prefix}.{name}".lstrip("."): getattr(module, "lr_multiples", {}).get(name, 1.0)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


class Optimizer:
    """One of PyTorch's optimisers, or several that share the parameters: they step, are saved and are loaded as one."""

    def __init__(self, *parts: torch.optim.Optimizer, rate: Tensor | None = None) -> None:
        """Groups may have a ``multiple``, by which they take the rate.

        ``rate``: a scalar, the rate of all groups, on their device: for steps that a CUDA graph may hold.
        """
        self.parts = parts
        multiples = {group.get("multiple", 1.0) for group in self.param_groups}
        self._rates = None if rate is None else {multiple: rate.clone() for multiple in multiples}
        self._share_rates()
        #: Those that train on other weights than they evaluate; they are in training mode but for ``averaged``.
        self._averaging: list[Any] = [part for part in parts if hasattr(part, "train")]
        for part in self._averaging:
            part.train()

    def _share_rates(self) -> None:
        if self._rates is not None:
            for group in self.param_groups:
                group["lr"] = self._rates[group.get("multiple", 1.0)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, rate: float) -> None:
        """The rate of the next step."""
        if self._rates is not None:
            for multiple, shared in self._rates.items():
                shared.fill_(multiple * rate)
            return
        for group in self.param_groups:
            group["lr"] = group.get("multiple", 1.0) * rate

    def step(self, skip: Tensor) -> None:
        """Move the weights, or do nothing at all where ``skip`` (), a bool on their device, is true.

        Then weights and moments keep every bit, whatever the gradients are, and nobody waits for the device. Only the
        number of steps by which schedulefree corrects its moment and weighs its average goes on: the host keeps it, and
        hears of skipped steps too late.
        """
        for part in self.parts:
            if isinstance(part, torch.optim.AdamW):
                capturing = skip.is_cuda and torch.cuda.is_current_stream_capturing()
                for group in part.param_groups:
                    # Means nothing to the fused kernels; without it PyTorch refuses a capture, with it warns elsewhere.
                    group["capturable"] = capturing
                part.found_inf = skip.float()  # type: ignore[attr-defined]  # what its fused kernels skip by
                part.step()
            else:
                _step_unless(skip, part)

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the weights to evaluate, save and generate by; after it those of training, to the bit."""
        kept = [(parameter, parameter.detach().clone()) for parameter in self._averaged_parameters()]
        for part in self._averaging:
            part.eval()
        try:
            yield
        finally:
            for part in self._averaging:
                part.train()
            with torch.no_grad():
                # The way there and back is rounded.
                for parameter, before in kept:
                    parameter.copy_(before)

    def _averaged_parameters(self) -> list[Tensor]:
        return [parameter for part in self._averaging for group in part.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on to the bit, training's weights included where they are others."""
        weights = [parameter.detach().clone() for parameter in self._averaged_parameters()]
        parts = [part.state_dict() for part in self.parts]
        if self._rates is not None:
            # As if the host kept them, for a run may go on where there is no such device.
            for part in parts:
                for group in part["param_groups"]:
                    group["lr"] = self._rates[group.get("multiple", 1.0)].item()
        return {"parts": parts, "weights": weights}

    def load_state_dict(
        self, state: dict[str, Any], place: Callable[[Tensor, Tensor], Tensor] = lambda tensor, like: tensor
    ) -> None:
        """Go back to what ``state_dict`` returned, the model's weights being loaded already.

        ``place`` makes of a whole tensor what this rank has of it: as much as of the parameter, its second argument.
        """
        for part, saved in zip(self.parts, state["parts"], strict=True):
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            moments = {
                i: {k: place(v, parameters[i]) if isinstance(v, Tensor) else v for k, v in values.items()}
                for i, values in saved["state"].items()
            }
            part.load_state_dict({**saved, "state": moments})
        self._share_rates()
        with torch.no_grad():
            for parameter, saved in zip(self._averaged_parameters(), state["weights"], strict=True):
                parameter.copy_(place(saved, parameter))


def _step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """For optimisers that know no skipping: a step from which all that it wrote is taken back.

    Gradients set to zero would not do: moments fade and weights decay all the same. The copies are made when the
    activations are gone, so they do not raise the peak of memory.
    """
    parameters = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    before = [(tensor, tensor.clone()) for tensor in (*parameters, *moments)]
    optimizer.step()
    for tensor, old in before:
        torch.where(skip, old, tensor, out=tensor)


def build_optimizer(model: nn.Module, config: RunConfig, roles: dict[str, Role] | None = None) -> Optimizer:
    """``config.optimizer`` for a model. Biases, norms and decays do not decay.

    ``roles`` are those of its parameters before ranks shared them, which leaves no marks on them.

    Raises:
        UsageError: it is not installed.
    """
    roles = parameter_roles(model) if roles is None else roles
    multiples = rate_multiples(model)

    def having(*wanted: Role) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if roles[name] in wanted]

    def group(weight_decay: float, *wanted: Role) -> list[dict[str, Any]]:
        """Those of these roles, those of one rate together."""
        found: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in model.named_parameters():
            if roles[name] in wanted:
                found.setdefault(multiples[name], []).append(parameter)
        return [
            {"params": parameters, "weight_decay": weight_decay, "multiple": multiple}
            for multiple, parameters in found.items()
        ]

    def groups(*decayed: Role) -> list[dict[str, Any]]:
        return [*group(config.weight_decay, *decayed), *group(0.0, "plain")]

    if config.optimizer == "schedulefree":
        optimizer = _schedule_free()(groups("matrix", "weight"), lr=config.lr, betas=_BETAS)
        for parameter in having("matrix", "weight", "plain"):
            # Made now, as its first step would: so that step can be taken back like any other.
            value = parameter.detach()
            optimizer.state[parameter] = {"z": value.clone(), "exp_avg_sq": torch.zeros_like(value)}
        return Optimizer(optimizer)
    if config.optimizer == "muon":
        muon = torch.optim.Muon(group(config.weight_decay, "matrix"), lr=config.lr, adjust_lr_fn="match_rms_adamw")
        for parameter in having("matrix"):
            muon.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter.detach())}
        return Optimizer(muon, torch.optim.AdamW(groups("weight"), lr=config.lr, betas=_BETAS, fused=True))
    adamw = torch.optim.AdamW(groups("matrix", "weight"), lr=config.lr, betas=_BETAS, fused=True)
    device = next(model.parameters()).device
    if device.type == "cpu" and config.graph != "on":
        return Optimizer(adamw)
    # Its kernel on a GPU takes no other type; on a CPU this one is what a Python number is.
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    return Optimizer(adamw, rate=torch.full((), config.lr, dtype=dtype, device=device))


def _schedule_free() -> Any:
    try:
        return importlib.import_module("schedulefree").AdamWScheduleFree
    except ImportError as error:
        raise UsageError(
            f"--optimizer schedulefree needs its package ({error}): pip install schedulefree, or give another"
        ) from None


def learning_rate(config: RunConfig, step: int, progress: float) -> float:
    """The rate of a step: a linear warm-up times a cosine, which falls from the first step on.

    So a run that ends by time, whose length in steps nobody knows, needs no memory of where its warm-up ended.

    Args:
        config: rate, warm-up and schedule.
        step: steps done before this one.
        progress: the part of the run that is done, 0 to 1, by steps or by time.
    """
    if 0 < config.warmup < 1:
        # What the first step is a part of is not known of a run that ends by time.
        warmup = min(1.0, max(progress / config.warmup, _FIRST_RATE))
    else:
        warmup = min(1.0, (step + 1) / (config.warmup + 1))
    decay = 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warmup * decay
