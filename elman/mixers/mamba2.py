"""Mamba2, by the official kernels, and in plain PyTorch where those cannot run.

    z, (x, B, C), dt = W_in u,   x, B, C = silu(conv(x, B, C)),   dt = softplus(dt + b)
    S_t = exp(-dt_t exp(A)) S_{t-1} + dt_t x_t B_tᵀ               one matrix (P, N) a head
    y_t = S_t C_t + D x_t
    out = W_out (norm(y * silu(z)))

Parameters have the names and shapes of ``mamba_ssm.Mamba2``, and start as its do, but the products as ``--weight-init``
says.
Source: Dao and Gu, "Transformers are SSMs" (2024), arXiv 2405.21060; the plain path is its chunked form, section 6.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import types
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers.base import Mixer, MixerConfig, State, split_heads
from elman.ops import note_backend
from elman.ops.registration import constant_when_traced
from elman.options import check_at_least

#: Steps that are one matrix product; the official default.
_CHUNK = 256
_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Mamba2 with one group: about 6 weights in units of D² at expand 2, and 2 N / D more."""

    name: ClassVar[str] = "mamba2"
    equation: ClassVar[str] = "S = exp(−dt A) S + dt x Bᵀ; y = S C + D x"

    d_state: int = 128
    """N, columns of a head's state."""
    headdim: int = 64
    """P, rows of a head's state, about: the heads share the inner width evenly."""
    expand: float = 2.0
    """Inner width as a multiple of the model width."""
    d_conv: int = 4
    """Steps that the short convolution sees."""
    kernels: Literal["official", "torch"] = "official"
    """Who runs it on a GPU: the packages mamba-ssm and causal-conv1d, without which training there is refused, or plain
    PyTorch, right but slow, and so no measure of Mamba2's speed. A CPU always takes the latter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, d_state=1, headdim=8)
        if not 2 <= self.d_conv <= 4:
            raise UsageError(f"--d-conv {self.d_conv} is out of range: give 2, 3 or 4, as the official kernels take")
        if not 0 < self.expand <= 64:
            raise UsageError(f"--expand {self.expand} is out of range: give a number above 0 and up to 64")

    def heads(self, dim: int) -> tuple[int, int]:
        """H and P at model width ``dim``."""
        return split_heads(self.expand * dim, self.headdim)

    def build(self, dim: int) -> Mamba2:
        return Mamba2(dim, self)

    def check_device(self, device: torch.device) -> None:
        if device.type != "cuda" or self.kernels != "official":
            return
        _, reason = official()
        if reason is not None:
            raise UsageError(
                f"--kernels official: Mamba2's fused kernels do not run here ({reason}): install them by "
                f"pip install --no-build-isolation mamba-ssm causal-conv1d, or give --kernels torch, which is slow "
                f"and says nothing of Mamba2's speed"
            )

    def check_resets(self, device: torch.device) -> None:
        if device.type == "cuda" and self.kernels == "official":
            raise UsageError(
                "--kernels official: Mamba2's fused kernels take no state and no resets: give --sampling windows, or "
                "--kernels torch, which is slow and says nothing of Mamba2's speed"
            )

    def num_params(self, dim: int) -> int:
        heads, width = self.heads(dim)
        d, conv = heads * width, heads * width + 2 * self.d_state
        return dim * (d + conv + heads) + (self.d_conv + 1) * conv + 3 * heads + d + d * dim

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        """As in the base, of the chunked form, whose work grows with the chunk, 256 steps or the context."""
        chunk = min(_CHUNK, seq_len)
        heads, width = self.heads(dim)
        d = heads * width
        projections = dim * (2 * d + 2 * self.d_state + heads) + d * dim
        return 2 * (projections + chunk * (self.d_state + d) + 2 * d * self.d_state)

    def state_size(self, dim: int, seq_len: int) -> int:
        """The heads' matrices, and the inputs that the convolution still sees."""
        heads, width = self.heads(dim)
        return heads * width * self.d_state + (self.d_conv - 1) * (heads * width + 2 * self.d_state)


class StepState(NamedTuple):
    """The state as the official kernels of a single step write to it, in place.

    Attributes:
        inputs: (B, d + 2N, d_conv), the convolution's last inputs, older first; its oldest is not needed any more.
        ssm: S (B, H, P, N), never of a half type.
    """

    inputs: Tensor
    ssm: Tensor


class Mamba2(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``.

    The state is the convolution's last inputs (B, d_conv - 1, d + 2N), older first, and S (B, H, P, N), never of a half
    type; reserved, where the official kernels run, it is a ``StepState``.
    """

    no_decay = frozenset({"dt_bias", "A_log", "D"})

    def __init__(self, dim: int, config: Mamba2Config) -> None:
        super().__init__()
        heads, self.headdim = config.heads(dim)
        d, conv_size = heads * self.headdim, heads * self.headdim + 2 * config.d_state
        self.config = config
        self.sizes = [d, conv_size, heads]
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(conv_size, conv_size, config.d_conv, groups=conv_size, padding=config.d_conv - 1)
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(d, eps=_NORM_EPS)
        self.out_proj = nn.Linear(d, dim, bias=False)

    @property
    def compiles(self) -> bool:
        return not self._takes_official(self.D)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        if isinstance(state, StepState):
            if len(x) == 1:
                return self._run_step(x, state, reset)
            state = (state.inputs[..., 1:].transpose(1, 2), state.ssm)
        # The fused kernel takes no state of the convolution, nor one step of one row, where it misreads the strides.
        if state is None and reset is None and x[..., 0].numel() > 1 and self._takes_official(x):
            return self._run_official(x)
        return self._run_torch(x, state, reset)

    def reserve(self, state: State, steps: int) -> State:
        if isinstance(state, StepState) or not self._takes_official(self.D) or step_kernels() is None:
            return state
        inputs, ssm = state
        return StepState(F.pad(inputs.transpose(1, 2), (1, 0)).contiguous(), ssm)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first product makes of the input: z (..., d), x with B and C (..., d + 2N), dt (..., H)."""
        d, conv_size, _ = self.sizes
        return projected[..., :d], projected[..., d : d + conv_size], projected[..., d + conv_size :]

    def _takes_official(self, x: Tensor) -> bool:
        # The kernels know no float64.
        fits = self.config.kernels == "official" and x.is_cuda and x.dtype != torch.float64
        return fits and _has_official()

    def _run_official(self, x: Tensor) -> tuple[Tensor, State]:
        note_backend("mamba_split_conv1d_scan_combined")
        kernel, _ = official()
        assert kernel is not None
        projected = self.in_proj(x.transpose(0, 1).contiguous())
        out, final = kernel(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            D=self.D,
            chunk_size=_CHUNK,
            return_final_states=True,
            activation="silu",
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=_NORM_EPS,
            outproj_weight=self.out_proj.weight,
            headdim=self.headdim,
            norm_before_gate=False,
        )
        _, inputs, _ = self.split(projected)
        kept = F.pad(inputs, (0, 0, self.config.d_conv - 1, 0))[:, -(self.config.d_conv - 1) :]
        return out.transpose(0, 1).contiguous(), (kept, final)

    def _run_step(self, x: Tensor, state: StepState, reset: Tensor | None) -> tuple[Tensor, StepState]:
        """One step by the kernels that generation with the official package takes."""
        note_backend("selective_state_update")
        kernels = step_kernels()
        assert kernels is not None
        conv_update, state_update = kernels
        if reset is not None:
            for tensor in state:
                tensor.masked_fill_(reset[0].view(-1, *[1] * (tensor.ndim - 1)), 0)
        z, projected, dt = self.split(self.in_proj(x[0]))
        dtype = projected.dtype
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        assert bias is not None
        inputs = state.inputs if state.inputs.dtype == dtype else state.inputs.to(dtype)
        convolved = conv_update(projected, inputs, weight.to(dtype), bias.to(dtype), "silu")
        (d, _, heads), n = self.sizes, self.config.d_state
        values, b, c = convolved.split((d, n, n), dim=-1)

        def a_row(x: Tensor) -> Tensor:
            return x.unsqueeze(-1).expand(*x.shape, self.headdim)

        decay = -torch.exp(self.A_log.float())
        y = state_update(
            state.ssm,
            values.view(-1, heads, self.headdim),
            a_row(dt),
            a_row(decay).unsqueeze(-1).expand(-1, -1, n),  # not in memory: the kernel then takes a number a head
            b.unsqueeze(1),
            c.unsqueeze(1),
            a_row(self.D),
            dt_bias=a_row(self.dt_bias),
            dt_softplus=True,
        )
        y = F.rms_norm(y.flatten(1).float() * F.silu(z.float()), (d,), self.norm.weight.float(), _NORM_EPS)
        return self.out_proj(y.to(x.dtype)).unsqueeze(0), StepState(inputs, state.ssm)

    def _run_torch(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        note_backend("torch")
        config = self.config
        inputs, ssm_state = (None, None) if state is None else state
        z, projected, dt = self.split(self.in_proj(x))
        convolved, inputs = causal_conv(projected, self.conv1d.weight.squeeze(1), self.conv1d.bias, inputs, reset)
        d = self.sizes[0]
        # Decays and the state that they build up are too fine for half types.
        dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32
        values, b, c = F.silu(convolved).to(dtype).tensor_split((d, d + config.d_state), dim=-1)
        values = values.view(*x.shape[:2], -1, self.headdim)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            log_decay = -dt * self.A_log.to(dtype).exp()
            y, ssm_state = ssd(values * dt.unsqueeze(-1), log_decay, b, c, ssm_state, reset)
        y = y + self.D.to(dtype).unsqueeze(-1) * values
        y = F.rms_norm(y.flatten(2) * F.silu(z.to(dtype)), (d,), self.norm.weight.to(dtype), _NORM_EPS)
        return self.out_proj(y.to(x.dtype)), (inputs, ssm_state)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each channel's weighted sum of its last K inputs, none of them from before the row's last reset.

    Args:
        x: (T, B, C).
        weight: (C, K), the last column for the step itself.
        bias: (C,) or None.
        before: (B, K - 1, C), the inputs before the first step, older first; zeros if absent.
        reset: (T, B) bool or None.

    Returns:
        y (T, B, C), and the inputs to carry on with, as ``before``.
    """
    steps, width = len(x), weight.shape[1]
    older = x.new_zeros(width - 1, *x.shape[1:]) if before is None else before.transpose(0, 1).to(x.dtype)
    padded = torch.cat((older, x))
    weight = weight.to(x.dtype)
    y = padded[width - 1 :] * weight[:, -1]
    if bias is not None:
        y = y + bias.to(x.dtype)
    if reset is None:
        for back in range(1, width):
            y = y + padded[width - 1 - back :][:steps] * weight[:, width - 1 - back]
        return y, padded[steps:].transpose(0, 1)
    index = torch.arange(steps, device=x.device).unsqueeze(1)
    # Steps since the row's last reset; without one, more than any window spans.
    since = index - torch.where(reset, index, -width).cummax(0).values
    for back in range(1, width):
        seen = (since >= back).unsqueeze(-1)
        y = y + torch.where(seen, padded[width - 1 - back :][:steps], 0) * weight[:, width - 1 - back]
    ages = torch.arange(width - 2, -1, -1, device=x.device).unsqueeze(1)
    return y, torch.where((ages <= since[-1]).unsqueeze(-1), padded[steps:], 0).transpose(0, 1)


def ssd(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(log_decay_t) S_{t-1} + x_t b_tᵀ``, ``y_t = S_t c_t``, a chunk of steps by a few products.

    Args:
        x: (T, B, H, P).
        log_decay: (T, B, H), at most 0.
        b: (T, B, N), shared by the heads.
        c: (T, B, N).
        state: S (B, H, P, N) before the first step, or None for zeros.
        reset: (T, B) bool or None; where true, that row's S is zeroed before that step.

    Returns:
        y (T, B, H, P), and S after the last step.
    """
    state = x.new_zeros(*x.shape[1:], b.shape[-1]) if state is None else state.to(x.dtype)
    pieces = []
    for first in range(0, len(x), _CHUNK):
        part = slice(first, first + _CHUNK)
        y, state = _ssd_chunk(x[part], log_decay[part], b[part], c[part], state, None if reset is None else reset[part])
        pieces.append(y)
    return torch.cat(pieces), state


def _ssd_chunk(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, log_decay = x.permute(1, 2, 0, 3), log_decay.permute(1, 2, 0)  # (B, H, T, P), (B, H, T)
    b, c = b.transpose(0, 1), c.transpose(0, 1)  # (B, T, N)
    steps = x.shape[2]
    total = log_decay.cumsum(-1)
    reaches = torch.ones(steps, steps, dtype=torch.bool, device=x.device).tril()
    from_state = total.exp()
    if reset is not None:
        document = reset.t().cumsum(-1)
        reaches = reaches & (document.unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)
        from_state = from_state * (document == 0).unsqueeze(1)
    # What is left at step i of what came in at step j.
    left = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~reaches, -math.inf).exp()
    weights = (c @ b.transpose(1, 2)).unsqueeze(1) * left
    y = weights @ x + (c.unsqueeze(1) @ state.transpose(2, 3)) * from_state.unsqueeze(-1)
    added = (x * left[..., -1, :].unsqueeze(-1)).transpose(2, 3) @ b.unsqueeze(1)
    return y.permute(2, 0, 1, 3), state * from_state[..., -1, None, None] + added


@functools.cache
def official() -> tuple[Any, str | None]:
    """The official fused kernel, or None and why it cannot run."""
    for package in ("mamba-ssm", "causal-conv1d"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None, f"the package {package} is not installed"
    # mamba-ssm imports this extension of the first Mamba's at its top; Mamba2 never calls it, and installing without
    # compiling leaves it out.
    if importlib.util.find_spec("selective_scan_cuda") is None:
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:
        return None, f"mamba-ssm cannot be imported: {type(error).__name__}: {error}"
    if module.causal_conv1d_fn is None:
        return None, "mamba-ssm does not find causal-conv1d"
    return module.mamba_split_conv1d_scan_combined, None


@functools.cache
def step_kernels() -> tuple[Any, Any] | None:
    """The official kernels of one step, the convolution's and the state's; None where they cannot be had."""
    if official()[0] is None:
        return None
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
        return importlib.import_module("causal_conv1d").causal_conv1d_update, module.selective_state_update
    except Exception:
        return None


@constant_when_traced
def _has_official() -> bool:
    return official()[0] is not None
