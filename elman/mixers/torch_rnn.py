"""The LSTM, the GRU and the tanh network as PyTorch defines them, by its kernels or by ours.

    h   = RNN(x)        torch.nn.LSTM, GRU or RNN, one layer of d units
    out = W_out h

Sources: Hochreiter and Schmidhuber (1997), Cho et al. (2014), Elman (1990). Weights start as PyTorch starts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from elman.mixers.base import ExpandedConfig, Mixer, RecurrentConfig, State
from elman.nn import input_part, run_steps, weights_of
from elman.ops import note_backend, note_recurrence


@dataclass(frozen=True)
class TorchRNNConfig(ExpandedConfig, RecurrentConfig):
    """G gates, each with matrices of the input and of the state: G (e + e²) + e weights in units of D²."""

    gates: ClassVar[int]
    states: ClassVar[int] = 1
    cell: ClassVar[str]
    module: ClassVar[type[nn.LSTM | nn.GRU | nn.RNN]]

    kernels: Literal["cudnn", "elman"] = "cudnn"
    """Who runs the steps on a GPU: cuDNN (PyTorch itself on a CPU), or this package. The values are the same. A chunk
    with resets inside, which cuDNN cannot run, always takes the latter."""

    def build(self, dim: int) -> TorchRNN:
        return TorchRNN(dim, self)

    def num_params(self, dim: int) -> int:
        d = self.inner_size(dim)
        return self.gates * (dim * d + d * d + 2 * d) + d * dim

    def flops_per_token(self, dim: int, seq_len: int) -> int:
        d = self.inner_size(dim)
        return 2 * self.gates * (dim * d + d * d) + 2 * d * dim

    def state_size(self, dim: int, seq_len: int) -> int:
        return self.states * self.inner_size(dim)


@dataclass(frozen=True)
class LSTMConfig(TorchRNNConfig):
    """PyTorch's LSTM: 4e + 4e² + e weights in units of D² (9 at e = 1)."""

    name: ClassVar[str] = "lstm"
    equation: ClassVar[str] = "c = σ(f) c + σ(i) tanh(g); y = σ(o) tanh(c); i, f, g, o = W_h y + W_x x + b"
    gates: ClassVar[int] = 4
    states: ClassVar[int] = 2
    cell: ClassVar[str] = "lstm"
    module: ClassVar[type[nn.LSTM | nn.GRU | nn.RNN]] = nn.LSTM


@dataclass(frozen=True)
class GRUConfig(TorchRNNConfig):
    """PyTorch's GRU: 3e + 3e² + e weights in units of D² (7 at e = 1)."""

    name: ClassVar[str] = "gru"
    equation: ClassVar[str] = "y = (1 − z) tanh(W_n x + r (U_n y + c) + b) + z y; r, z = σ(W x + U y + b)"
    gates: ClassVar[int] = 3
    cell: ClassVar[str] = "gru"
    module: ClassVar[type[nn.LSTM | nn.GRU | nn.RNN]] = nn.GRU


@dataclass(frozen=True)
class RNNConfig(TorchRNNConfig):
    """PyTorch's tanh network: e + e² + e weights in units of D² (3 at e = 1)."""

    name: ClassVar[str] = "rnn"
    equation: ClassVar[str] = "y = tanh(W_h y + W_x x + b)"
    gates: ClassVar[int] = 1
    cell: ClassVar[str] = "tanh"
    module: ClassVar[type[nn.LSTM | nn.GRU | nn.RNN]] = nn.RNN


class TorchRNN(Mixer):
    """See the top of this file; shapes as in ``Mixer.forward``, the state being h (B, d), of the LSTM (h, c)."""

    def __init__(self, dim: int, config: TorchRNNConfig) -> None:
        super().__init__()
        d = config.inner_size(dim)
        self.kernels = config.kernels
        self.cell, self.gates = config.cell, config.gates
        self.rnn = config.module(dim, d)
        self.rnn.lr_multiples = {"weight_hh_l0": config.recurrent_lr}
        self.out_proj = nn.Linear(d, dim, bias=False)

    @property
    def compiles(self) -> bool:
        # torch.compile refuses to look into PyTorch's own RNNs; nor is there anything to fuse.
        return False

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        if self.kernels == "cudnn" and reset is None:
            h, state = self._run_torch(x, state)
        else:
            h, state = self._run_elman(x, state, reset)
        return self.out_proj(h), state

    def _run_torch(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        note_backend("cudnn" if x.is_cuda else "torch")
        # PyTorch's states have an axis of layers in front.
        h, state = self.rnn(x, tree_map(lambda s: s.unsqueeze(0), state) if state is not None else None)
        weight = weights_of(self.rnn).hh
        note_recurrence((weight if self.gates == 1 else weight.view(self.gates, *[h.shape[-1]] * 2),), self.gates, h)
        return h, tree_map(lambda s: s.squeeze(0), state)

    def _run_elman(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        weights = weights_of(self.rnn)
        given = (state,) if isinstance(state, Tensor) else state
        h, last = run_steps(input_part(x, weights, self.cell), weights, given, self.cell, reset=reset)
        return h, last[0] if len(last) == 1 else last
