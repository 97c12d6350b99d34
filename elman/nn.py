"""``torch.nn``'s RNN, LSTM and GRU on this package's recurrence: the same modules, other kernels.

    from elman import nn
    lstm = nn.LSTM(512, 1024, num_layers=2, batch_first=True).cuda().bfloat16()
    output, (h, c) = lstm(x)

Arguments, parameters, their names and start, ``state_dict``, shapes, results and errors are those of PyTorch's modules,
whose ``RNNBase`` these are built on; weights load both ways. What differs:

- They are no subclasses of ``torch.nn.LSTM`` and so on, which ``torch.compile`` refuses to look into; what asks for
  those by ``isinstance`` must ask for ``torch.nn.RNNBase``.
- ``backend``, one argument more, is that of ``elman.ops.recurrence``. By default the steps on a CPU are plain PyTorch,
  one by one, and PyTorch's own modules are faster.
- The two biases are summed before they are added; on a GPU dropout draws other numbers.
- Weights may be replaced or parametrised, no flat copy of them is kept; ``flatten_parameters`` does nothing.
- TorchScript is not supported, nor is a second derivative on a GPU, which cuDNN does not have either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from elman.ops import recurrence
from elman.ops.cells import CELLS, Tensors

__all__ = ["GRU", "LSTM", "RNN"]


class Weights(NamedTuple):
    """One layer's in one direction: G gates of H units that see I inputs and the last P outputs; P = H without ``hr``.

    Attributes:
        ih: (G·H, I).
        hh: (G·H, P).
        bias_ih: (G·H,), or None.
        bias_hh: the same.
        hr: (P, H), by which the LSTM's h becomes its output; None if it is the output.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


def weights_of(module: nn.RNNBase, layer: int = 0, reverse: bool = False) -> Weights:
    """Those of a layer in one direction, of PyTorch's modules too."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    end = f"_l{layer}{'_reverse' * reverse}"
    found: list[Any] = [getattr(module, name + end, None) for name in names]
    return Weights(*found)


def input_part(x: Tensor, weights: Weights, cell: str) -> Tensor:
    """What the input adds to every step: of x (..., I) ``recurrence``'s pre, (..., G, H), or (..., H) for one gate."""
    rule, bias = CELLS[cell], weights.bias_ih
    if rule.additive and bias is not None and weights.bias_hh is not None:
        bias = bias + weights.bias_hh
    pre = F.linear(x, weights.ih, bias)
    return pre if rule.gates == 1 else pre.view(*x.shape[:-1], rule.gates, pre.shape[-1] // rule.gates)


def run_steps(
    pre: Tensor,
    weights: Weights,
    state: Tensors | None,
    cell: str,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensors]:
    """All steps of one layer in one direction.

    Args:
        pre: (T, B, G, H) or (T, B, H), from ``input_part``.
        weights: the layer's.
        state: the first state, of the LSTM (h, c), of the others (h,): h (B, P), c (B, H); zeros if absent.
        cell: tanh, relu, lstm or gru.
        reset: as for ``recurrence``, which ``hr`` does without.
        backend: as for ``recurrence``.

    Returns:
        The outputs (T, B, P), and the last state.
    """
    rule, hidden, batch = CELLS[cell], pre.shape[-1], pre.shape[1]
    if batch == 0:
        # The op wants rows; a row that is cut off again leaves gradients of zero, as PyTorch does.
        pre, state = (_with_row(pre, 1), None if state is None else tuple(_with_row(x, 0) for x in state))
    weight: Tensor | tuple[Tensor, Tensor] = weights.hh
    if rule.products > 1:
        weight = weights.hh.view(rule.products, hidden, weights.hh.shape[-1])
    if weights.hr is not None:
        assert reset is None
        assert isinstance(weight, Tensor)
        # W_hh sees h only through W_hr: a recurrent matrix of low rank, but for the first state, which is an output.
        weight = (weight, weights.hr.expand(rule.products, -1, -1))
        if state is not None:
            output, *others = state
            first = F.linear(output, weights.hh).view(-1, *pre.shape[2:])
            pre = torch.cat((pre[:1] + first, pre[1:]))
            state = (pre.new_zeros(len(output), hidden), *others)
    bias = None if rule.additive or weights.bias_hh is None else weights.bias_hh.view(rule.products, hidden)
    given = state[0] if state is not None and rule.states == 1 else state
    h, last = recurrence(pre, weight, given, cell=cell, bias=bias, reset=reset, backend=backend)
    ends = (last,) if rule.states == 1 else last
    if weights.hr is not None:
        h = F.linear(h, weights.hr)
        ends = (h[-1], *ends[1:])
    return h[:, :batch], tuple(x[:batch] for x in ends)


def _with_row(x: Tensor, dim: int) -> Tensor:
    return torch.cat((x, x.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :])), dim)


class _Whole:
    """Sequences of one length, (T, B, ...), as they are."""

    def before(self, x: Tensor, reverse: bool) -> Tensor:
        """The inputs, in the order in which their product with the weights is made."""
        return x.flip(0) if reverse else x

    def steps(self, pre: Tensor, cell: str, reverse: bool) -> Tensor:
        """That product as ``recurrence`` takes it."""
        return pre

    def after(self, h: Tensor, reverse: bool) -> Tensor:
        """The outputs of all steps, in the order of the inputs."""
        return h.flip(0) if reverse else h

    def ends(self, h: Tensor, last: Tensors) -> Tensors:
        """The state behind the last step of each sequence, of all outputs and the state behind all steps."""
        return last


#: What holds a cell still in a step: the sign of each gate's pre there, of a size that no recurrent product changes. A
#: memory is neither written to nor forgotten, an output without one is 0 or ±1.
_HOLD = {"tanh": (0,), "relu": (-1,), "lstm": (-1, 1, 0, 0), "gru": (0, 1, 0)}


class _Packed:
    """Sequences of several lengths: the rows of a ``PackedSequence``, (N, ...).

    All run from their first step, in reverse from their own last; the short ones are held still when they are through.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        """``batch_sizes`` (T,), as PyTorch packs them: how many sequences have a step t."""
        self.shape = len(batch_sizes), int(batch_sizes[0])
        row = torch.arange(self.shape[1])
        there = row < batch_sizes.unsqueeze(1)
        lengths = there.sum(0)
        step, sequence = there.nonzero(as_tuple=True)
        # Where (t, b) lies in (T·B), of every packed row and of every sequence's last.
        forward = step * self.shape[1] + sequence
        backward = (lengths[sequence] - 1 - step) * self.shape[1] + sequence
        self._places = [x.to(device) for x in (forward, backward)]
        self._lasts = ((lengths - 1) * self.shape[1] + row).to(device)

    def before(self, x: Tensor, reverse: bool) -> Tensor:
        return x

    def steps(self, pre: Tensor, cell: str, reverse: bool) -> Tensor:
        signs = pre.new_tensor(_HOLD[cell]) if pre.ndim == 3 else pre.new_full((), _HOLD[cell][0])
        held = (signs * (torch.finfo(pre.dtype).max / 4)).view(-1, *[1] * (pre.ndim > 2)).expand(pre.shape[1:])
        steps, batch = self.shape
        rows = held.expand(steps * batch, *held.shape).index_copy(0, self._places[reverse], pre)
        return rows.view(steps, batch, *held.shape)

    def after(self, h: Tensor, reverse: bool) -> Tensor:
        return h.flatten(0, 1).index_select(0, self._places[reverse])

    def ends(self, h: Tensor, last: Tensors) -> Tensors:
        return h.flatten(0, 1).index_select(0, self._lasts), *last[1:]


class _Recurrent(nn.RNNBase):
    """What the three have in common: ``torch.nn.RNNBase`` with a forward pass of ours."""

    backend: str

    def __init__(self, mode: str, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        self.backend = backend

    @property
    def cell(self) -> str:
        """Which of ``elman.ops.cells.CELLS`` runs."""
        return {"RNN_TANH": "tanh", "RNN_RELU": "relu", "LSTM": "lstm", "GRU": "gru"}[self.mode]

    def flatten_parameters(self) -> None:
        """Does nothing: every weight lies for itself."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002 (PyTorch's name)
        """All layers over sequences of T steps, B of them.

        Args:
            input: (T, B, I); (B, T, I) if ``batch_first``; (T, I) for one sequence; or a ``PackedSequence``. Of the
                weights' dtype, but under autocast.
            hx: the first state h (L·D, B, P) of L layers in D directions, or (L·D, P) for one sequence; for the LSTM
                the pair of it and c (L·D, B, H), or (L·D, H). P is H but with ``proj_size``. Zeros if absent.

        Returns:
            The outputs of the last layer, in the form of ``input`` but D·P wide; and the last state, in that of ``hx``.

        Raises:
            RuntimeError, ValueError: wrong shapes, dtypes or devices, as PyTorch's modules tell of them.
        """
        single = False
        if self.mode == "LSTM" and isinstance(hx, Tensor) and isinstance(input, PackedSequence):
            raise TypeError(f"lstm expects two hidden states but hx is a tensor {tuple(hx.shape)}: give hx=(h, c)")
        states = None if hx is None else (hx[0], hx[1]) if self.mode == "LSTM" else (hx,)
        if self.mode == "LSTM" and hx is not None and len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states: give hx=(h, c)")
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
        else:
            x, batch_sizes, order, back = input, None, None, None
            if x.dim() not in (2, 3):
                raise ValueError(
                    f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D: "
                    f"give (T, B, {self.input_size}), or (T, {self.input_size}) for one sequence"
                )
            single = x.dim() == 2
            for state in states or ():
                if state.dim() != x.dim():
                    raise RuntimeError(
                        f"For {'unbatched' if single else 'batched'} {x.dim()}-D input, hx should also be {x.dim()}-D "
                        f"but got {state.dim()}-D tensor"
                    )
            if single:
                x = x.unsqueeze(1)
                states = None if states is None else tuple(state.unsqueeze(1) for state in states)
            elif self.batch_first:
                x = x.transpose(0, 1)
        self._check(x, states, batch_sizes)
        if states is not None and order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        h, last = self._run(x, states, _Whole() if batch_sizes is None else _Packed(batch_sizes, x.device))
        if isinstance(input, PackedSequence):
            output: Tensor | PackedSequence = PackedSequence(h, *input[1:])
            last = last if back is None else tuple(state.index_select(1, back) for state in last)
        else:
            output = h.squeeze(1) if single else h.transpose(0, 1) if self.batch_first else h
            last = tuple(state.squeeze(1) for state in last) if single else last
        return output, last if self.mode == "LSTM" else last[0]

    def _check(self, x: Tensor, states: Tensors | None, batch_sizes: Tensor | None) -> None:
        """Of x (T, B, I) or the rows of a packed one."""
        if not torch.compiler.is_compiling():
            self._update_flat_weights()  # which check_input reads
        self.check_input(x, batch_sizes)
        if len(x) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        for index, state in enumerate(states or ()):
            name = f"hidden[{index}]" if self.mode == "LSTM" else "hidden"
            expected = (self.num_layers * (1 + self.bidirectional), batch, sizes[index])
            self.check_hidden_size(state, expected, f"Expected {name} size {{}}, got {{}}")
            self._check_device(x, "hidden", state)
            if state.dtype != x.dtype and not cast:
                raise RuntimeError(f"{name} has dtype {state.dtype} but input has {x.dtype}: cast one to the other")
        self._check_device(x, "parameter", weights_of(self).ih)

    def _check_device(self, x: Tensor, name: str, other: Tensor) -> None:
        if other.device != x.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device: "
                f"{x.device} and {other.device}; move one to the other"
            )

    def _run(self, x: Tensor, states: Tensors | None, sequences: _Whole | _Packed) -> tuple[Tensor, Tensors]:
        """The outputs, in the form of x, and the last states; x is (T, B, I), or the rows of a packed one."""
        found: list[Tensors] = []
        for layer in range(self.num_layers):
            outputs = []
            for reverse in (False, True)[: 1 + self.bidirectional]:
                weights = weights_of(self, layer, reverse)
                pre = input_part(sequences.before(x, reverse), weights, self.cell)
                pre = sequences.steps(pre, self.cell, reverse)
                state = None if states is None else tuple(each[len(found)] for each in states)
                h, last = run_steps(pre, weights, state, self.cell, backend=self.backend)
                outputs.append(sequences.after(h, reverse))
                found.append(sequences.ends(h, last))
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(each) for each in zip(*found, strict=True))


class RNN(_Recurrent):
    """``torch.nn.RNN``, layers of Elman's (1990) h_t = f(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh), f tanh or relu.

    Args:
        input_size: I, of the input.
        hidden_size: H, of h.
        num_layers: L, each but the first reading the outputs of the one before.
        nonlinearity: f, ``tanh`` or ``relu``.
        bias: whether there are b_ih and b_hh.
        batch_first: inputs and outputs are (B, T, ...) in place of (T, B, ...); states are as ever.
        dropout: the share of each layer's outputs but the last's that is zeroed in training.
        bidirectional: a second set of weights reads the sequence from its end, and D is 2.
        device: of the parameters.
        dtype: of the parameters.
        backend: as for ``elman.ops.recurrence``.
        proj_size: the LSTM's alone, not to be given.

    Raises:
        ValueError, TypeError: as ``torch.nn.RNN``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        proj_size: None = None,
    ) -> None:
        _check_no_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class LSTM(_Recurrent):
    """``torch.nn.LSTM``, layers of Hochreiter and Schmidhuber's (1997) cell, its state (h, c); gates i, f, g, o.

    c = σ(f) c + σ(i) tanh(g), h = σ(o) tanh(c), each gate W_ih x + b_ih + W_hh h + b_hh; with ``proj_size`` the output,
    which W_hh then reads, is W_hr h (Sak et al., 2014).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, backend: as for
            ``RNN``.
        proj_size: P, of the outputs; 0 for H.

    Raises:
        ValueError, TypeError: as ``torch.nn.LSTM``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class GRU(_Recurrent):
    """``torch.nn.GRU``, layers of Cho et al.'s (2014) cell as cuDNN has it; gates r, z, n.

    h = (1 − σ(z)) tanh(W_n x + b_n + σ(r) (U_n h + c_n)) + σ(z) h, r and z each W_ih x + b_ih + W_hh h + b_hh.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, backend: as for
            ``RNN``.
        proj_size: the LSTM's alone, not to be given.

    Raises:
        ValueError, TypeError: as ``torch.nn.GRU``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        proj_size: None = None,
    ) -> None:
        _check_no_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
        )


def _check_no_projection(proj_size: None) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
