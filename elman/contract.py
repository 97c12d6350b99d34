"""What every variant keeps to, whatever it computes: ``elman check``, and the tests of each one that ships.

All is tried in float64 on a CPU, in a small model of two layers whose weights are larger than at the start of training,
so that a wrong state shows.
"""

from __future__ import annotations

import copy
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from elman.mixers.base import MixerConfig, WeightInit
from elman.model import LanguageModel, ModelConfig, next_token_loss
from elman.sizing import flops_per_token, num_params, state_size

BATCH, STEPS, DIM, DEPTH = 3, 11, 16, 2
#: Larger than any rounding in float64, smaller than what a state is worth here.
_SEEN = 1e-3


class BrokenContractError(AssertionError):
    """In words, what a variant does not keep to, and most likely why."""


def require(holds: bool, complaint: str) -> None:
    """Raise it as a complaint unless it holds."""
    if not holds:
        raise BrokenContractError(complaint)


def build(*mixers: MixerConfig, dim: int = DIM, depth: int = DEPTH) -> LanguageModel:
    """A model with weights as large as after some training."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim, depth, mixers)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(seed: int = 1) -> Tensor:
    """(``BATCH``, ``STEPS``) bytes."""
    return torch.randint(256, (BATCH, STEPS), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _same(found: object, wanted: object, complaint: str) -> None:
    try:
        torch.testing.assert_close(found, wanted)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise BrokenContractError(f"{complaint} ({reason})") from None


def sees_no_future(mixer: MixerConfig) -> None:
    """No step depends on one after it."""
    model, text = build(mixer), tokens()
    whole, _ = model(text)
    for step in range(1, STEPS):
        other = torch.cat((text[:, :step], tokens(2)[:, step:]), dim=1)
        logits, _ = model(other)
        _same(
            logits[:, :step],
            whole[:, :step],
            f"steps before {step} depend on the tokens from {step} on: something looks ahead, such as a sum over time",
        )


def carries_its_state(mixer: MixerConfig) -> None:
    """Text read in chunks, the state handed on, is read as in one piece."""
    model, text = build(mixer), tokens()
    whole, last = model(text)
    for cuts in ((1,), (4, 5), tuple(range(1, STEPS))):
        state, pieces = None, []
        for start, end in itertools.pairwise((0, *cuts, STEPS)):
            logits, state = model(text[:, start:end], state)
            pieces.append(logits)
        where = f"cut before steps {', '.join(map(str, cuts))}, text is not read as in one piece"
        _same(torch.cat(pieces, dim=1), whole, f"{where}: the state is not used, or is not the last one")
        _same(state, last, f"{where}: the state that comes out is another")


def needs_its_state(mixer: MixerConfig) -> None:
    """What ``state_size`` counts matters, and nothing else is remembered."""
    model, text = build(mixer), tokens()
    whole, _ = model(text)
    cold, _ = model(text[:, 5:])
    remembers = mixer.state_size(DIM, STEPS) > 0
    matters = bool((whole[:, 5:] - cold).abs().max() > _SEEN)
    require(matters or not remembers, "state_size counts a state, but nothing depends on what was before")
    require(remembers or not matters, "state_size is 0, but what was before matters")


def heeds_resets(mixer: MixerConfig) -> None:
    """A row is read from a state at rest where ``reset`` says so, and rows do not mix."""
    model, text = build(mixer), tokens()
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[0, 4] = reset[1, 0] = reset[1, 7] = reset[2, STEPS - 1] = True
    _, warm = model(tokens(2))
    logits, _ = model(text, warm, reset)
    for row in range(BATCH):
        bounds = [0, *reset[row].nonzero().flatten().tolist(), STEPS]
        for start, end in itertools.pairwise(bounds):
            if start == end:
                continue
            at_rest = bool(reset[row, start])
            state = None if at_rest else tree_map(lambda leaf: leaf[row : row + 1], warm)  # noqa: B023
            expected, _ = model(text[row : row + 1, start:end], state)
            _same(
                logits[row : row + 1, start:end],
                expected,
                f"row {row} from step {start} to {end} is not what it is by itself: the state is not zeroed before a "
                f"step of reset, or rows of the batch mix",
            )


def counts_itself(mixer: MixerConfig) -> None:
    """The three formulas: parameters, FLOPs a token, numbers of the state."""
    for dim, depth in ((DIM, DEPTH), (40, 3)):
        config = ModelConfig(dim, depth, (mixer,))
        # In float64 and without fused attention, PyTorch's counter sees every product on a CPU.
        model = LanguageModel(config).double()
        _, state = model(tokens())
        # By the difference of two batches: what a call costs however many rows it has is left out.
        flops = _total_flops(model, 2 * BATCH) - _total_flops(model, BATCH)
        for name, counted, found in (
            ("num_params", num_params(config), sum(parameter.numel() for parameter in model.parameters())),
            ("flops_per_token", flops_per_token(config, STEPS) * BATCH * STEPS, flops),
            ("state_size", state_size(config, STEPS) * BATCH, sum(leaf.numel() for leaf in tree_leaves(state))),
        ):
            where = f"at width {dim} and depth {depth}, over {BATCH} rows of {STEPS} steps"
            require(counted == found, f"{name}: {where} the formulas count {counted:,}, but there are {found:,}")


def _total_flops(model: LanguageModel, batch: int) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens()[:1].expand(batch, STEPS))
    flops: int = counter.get_total_flops()
    return flops


def learns(mixer: MixerConfig) -> None:
    """Every parameter has a gradient."""
    model = build(mixer)
    logits, _ = model(tokens())
    torch.autograd.backward(next_token_loss(logits, tokens(3)))
    for name, parameter in model.named_parameters():
        require(parameter.grad is not None, f"{name} has no gradient: nothing is made of it")
        assert parameter.grad is not None
        require(0 < parameter.grad.abs().max().item() < math.inf, f"the gradient of {name} is 0, or not finite")


def draws_its_weights(mixer: MixerConfig) -> None:
    """Memory that nobody wrote to is filled with NaN here, else with whatever lay there: other runs, other weights."""
    for weight_init in typing.get_args(WeightInit):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            model = LanguageModel(ModelConfig(DIM, DEPTH, (mixer,)), weight_init)
        finally:
            torch.use_deterministic_algorithms(before)
        for name, tensor in model.state_dict().items():
            require(
                bool(tensor.isfinite().all()),
                f"with --weight-init {weight_init} {name} is not drawn: draw it in initialize, or where it is made",
            )


def bears_autocast(mixer: MixerConfig) -> None:
    """Under autocast it errs no more than with weights and arithmetic all in bf16."""
    model, text = build(mixer), tokens()
    exact, _ = model(text)
    plain, _ = copy.deepcopy(model).bfloat16()(text)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, _ = model.float()(text)
    require(
        autocast.dtype == torch.bfloat16, f"under autocast the logits are in {autocast.dtype}: cast your parameters"
    )
    ours, theirs = ((other.double() - exact).norm() for other in (autocast, plain))
    require(bool(0 < ours <= 1.5 * theirs), f"under bf16 autocast it errs by {ours:.3g}, all in bf16 by {theirs:.3g}")


@dataclass(frozen=True)
class Check:
    """One thing to keep to: what, in a few words, and the function that raises where a variant does not."""

    what: str
    run: Callable[[MixerConfig], None]

    def __str__(self) -> str:
        return self.run.__name__


CHECKS = (
    Check("no step sees what comes after it", sees_no_future),
    Check("chunks with the state carried equal one piece", carries_its_state),
    Check("the state matters, where there is one", needs_its_state),
    Check("resets equal separate sequences, and rows do not mix", heeds_resets),
    Check("parameters, FLOPs and state are counted", counts_itself),
    Check("every parameter learns", learns),
    Check("every weight is drawn", draws_its_weights),
    Check("bf16 autocast errs no more than bf16", bears_autocast),
)


def check(mixer: MixerConfig) -> Iterator[tuple[Check, str | None]]:
    """Every check, and what is wrong; None where nothing is. What a mixer itself raises is wrong too."""
    for each in CHECKS:
        try:
            each.run(mixer)
        except BrokenContractError as error:
            yield each, str(error)
        except Exception as error:
            yield each, f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            yield each, None
