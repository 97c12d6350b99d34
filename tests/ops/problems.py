"""Random recurrences, and how far a backend's answers may lie from the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elman.ops import recurrence
from elman.ops.cells import CELLS
from elman.ops.log_space import from_log_space, split

State = Tensor | tuple[Tensor, ...]


def parts(state: State | None) -> tuple[Tensor, ...]:
    """The tensors of a state in either of its forms."""
    return () if state is None else (state,) if isinstance(state, Tensor) else state


def like(state: State | None, tensors: Sequence[Tensor]) -> State | None:
    """The tensors in the form of this state."""
    return None if state is None else tensors[0] if isinstance(state, Tensor) else tuple(tensors)


@dataclass(frozen=True)
class Problem:
    """Inputs of ``recurrence``, and the gradients of its two outputs; None for what is absent."""

    pre: Tensor
    weight: State
    h0: State | None
    reset: Tensor | None
    dh: Tensor | None
    dh_last: State | None
    cell: str = "tanh"
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        def states(given: State | None) -> State | None:
            return like(
                given, [x.to(kind) for x, kind in zip(parts(given), CELLS[self.cell].dtypes(dtype), strict=False)]
            )

        cast = self.map(lambda x: x.to(dtype))
        return replace(cast, h0=states(self.h0), dh_last=states(self.dh_last))

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """With every floating-point tensor changed."""
        changed = {
            name: like(value, [change(x) for x in parts(value)])
            for name in ("pre", "weight", "h0", "dh", "dh_last", "bias")
            for value in [getattr(self, name)]
        }
        return replace(self, **changed)

    def inputs(self) -> dict[str, Tensor]:
        """What can be differentiated, by name."""
        weights = parts(self.weight)
        names = ("weight",) if len(weights) == 1 else ("u", "v")
        named = {"pre": self.pre, **dict(zip(names, weights, strict=True))}
        named |= dict(zip(("h0", "c0"), parts(self.h0), strict=False))
        return named if self.bias is None else {**named, "bias": self.bias}

    def run(self, backend: str, inputs: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """H of every step and all last states, of other inputs of these names if given."""
        x = self.inputs() if inputs is None else inputs
        h0 = like(self.h0, [x[name] for name in ("h0", "c0") if name in x])
        weight = like(self.weight, [x[name] for name in ("weight", "u", "v") if name in x])
        h, last = recurrence(
            x["pre"], weight, h0, cell=self.cell, bias=x.get("bias"), reset=self.reset, backend=backend
        )
        return h, *parts(last)

    def results(self, backend: str, inputs: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """As ``run``, but for the number that a memory in log space stands for in its place.

        Near 0 a logarithm and its slope say nothing of how exact they are.
        """
        *others, last = self.run(backend, inputs)
        return *others, from_log_space(*split(last)) if CELLS[self.cell].logarithmic else last

    def piece(self, start: int, stop: int, h0: State | None) -> Problem:
        """The steps from ``start`` to before ``stop``, from this state."""
        reset = None if self.reset is None else self.reset[start:stop]
        return replace(self, pre=self.pre[start:stop], h0=h0, reset=reset)


def draw(
    seq_len: int,
    batch: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    with_h0: bool = True,
    with_bias: bool = False,
    reset_rate: float | None = 0.2,
    scale: float = 1.0,
    cell: str = "tanh",
    operator: str = "dense",
    heads: int = 2,
    rank: int | None = None,
) -> Problem:
    """Standard normal inputs times ``scale``, weights of spectral radius near 1; ``reset_rate`` None: no resets.

    Block-diagonal are at most ``heads`` heads, as many as divide the units; ``low_rank_of`` has the rank unless given.
    """
    generator = torch.Generator().manual_seed(seed)
    rule = CELLS[cell]

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, of)

    def state() -> State:
        drawn = tuple(normal(batch, hidden, of=kind) for kind in rule.dtypes(dtype))
        return drawn[0] if rule.states == 1 else drawn

    def weights() -> State:
        front = () if rule.products == 1 else (rule.products,)
        if operator == "low_rank":
            r = rank or low_rank_of(hidden)
            return normal(*front, hidden, r) / r**0.5, normal(*front, r, hidden) / hidden**0.5
        if operator == "diagonal":
            return normal(*front, hidden).tanh()
        number = math.gcd(heads, hidden) if operator == "block_diagonal" else 1
        width = hidden // number
        return normal(*front, *(() if operator == "dense" else (number,)), width, width) / width**0.5

    h0 = state()
    return Problem(
        pre=normal(seq_len, batch, *(() if rule.gates == 1 else (rule.gates,)), hidden) * scale,
        weight=weights(),
        h0=like(h0, [x.tanh() for x in parts(h0)]) if with_h0 else None,
        reset=None if reset_rate is None else (torch.rand(seq_len, batch, generator=generator) < reset_rate).to(device),
        dh=normal(seq_len, batch, hidden),
        dh_last=state(),
        cell=cell,
        bias=normal(rule.products, hidden) if with_bias else None,
    )


def low_rank_of(hidden: int) -> int:
    """A quarter of the units."""
    return max(1, hidden // 4)


def solve(problem: Problem, backend: str) -> dict[str, Tensor]:
    """All outputs and the gradient of every input, by name."""
    inputs = {
        name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, value in problem.inputs().items()
    }
    outputs = problem.results(backend, inputs)
    given = (problem.dh, *(parts(problem.dh_last) or (None,) * len(outputs[1:])))
    pairs = [(y, dy) for y, dy in zip(outputs, given, strict=True) if dy is not None]
    gradients = torch.autograd.grad(
        [y for y, _ in pairs], list(inputs.values()), [dy for _, dy in pairs], materialize_grads=True
    )
    named = dict(zip(("h", "h_last", "c_last"), (y.detach() for y in outputs), strict=False))
    return {**named, **{f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}}


@dataclass(frozen=True)
class Errors:
    """Errors of one result against float64, relative to its norm: the backend's and the reference's in its dtype."""

    ours: float
    reference: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.ours / self.reference if self.reference else float("nan")


@dataclass(frozen=True)
class Answers:
    """What ``solve`` finds by the reference, in float64 and in the problem's dtype."""

    truth: dict[str, Tensor]
    reference: dict[str, Tensor]


def answers(problem: Problem) -> Answers:
    """What every backend is judged by."""
    return Answers(solve(problem.to(torch.float64), "reference"), solve(problem, "reference"))


def errors(problem: Problem, ours: dict[str, Tensor], known: Answers) -> dict[str, Errors]:
    """How far every output and gradient lies from the reference in float64, in the Frobenius norm.

    Allowed is 1.5 times the error of the reference in the same dtype, or one as small as that of a few roundings of
    float32 and one to the dtype; more on a tiny problem, where a sum may cancel and the reference may be right by luck.
    Where the slope jumps, at relu's 0, a rounding of v flips the whole gradient of some 2 eps of all units, whose norm
    is the root of that; which ones is luck, and on a small problem one alone may carry as much as twenty.
    In float64 the truth itself is rounded: 1e-12 is allowed.
    """
    assert ours.keys() == known.truth.keys()
    dtype = problem.pre.dtype
    luck = 1e-5 if problem.pre[0].numel() < 64 else 5e-7
    rounding = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps / 2 + luck
    flips = 8 * torch.finfo(dtype).eps + 24 / problem.pre.numel()
    jumps = flips**0.5 if problem.cell == "relu" and dtype != torch.float64 else 0.0
    found = {}
    for name, exact in known.truth.items():
        assert ours[name].shape == exact.shape
        assert ours[name].dtype == known.reference[name].dtype
        assert ours[name].dtype == dtype or name in ("c_last", "dc0")
        norm = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
        of_ours, of_reference = (float((x[name].double() - exact).norm() / norm) for x in (ours, known.reference))
        flipped = jumps if name.startswith("d") else 0
        found[name] = Errors(of_ours, of_reference, 1.5 * of_reference + rounding + flipped)
    return found


def assert_as_exact_as_reference(problem: Problem, backend: str) -> None:
    """No result errs more than ``errors`` allows."""
    for name, error in errors(problem, solve(problem, backend), answers(problem)).items():
        assert error.ours <= error.allowed, f"{name}: {error}"


def assert_a_nan_stays_in_its_row(problem: Problem, backend: str) -> None:
    """From the step that it comes with until a reset; the problem, of ten steps and two rows at least, has none yet."""
    assert problem.reset is not None
    problem.pre[2, 1, 3] = torch.nan
    problem.reset[9, 1] = True
    result = solve(problem, backend)
    bad = torch.zeros_like(problem.reset)
    bad[3:9, 1] = True
    assert torch.equal(result["h"].isnan().all(-1), bad)
    bad[2, 1] = True
    assert torch.equal(result["h"].isnan().any(-1), bad)
    assert torch.equal(result["dpre"].isnan().any(-1).any(0), bad.any(0))


def assert_chunks_equal_one_piece(problem: Problem, backend: str, cut: int) -> None:
    """Bit for bit, states carried over from ``cut``."""
    h, *last = problem.run(backend)
    first, *carried = problem.piece(0, cut, problem.h0).run(backend)
    second, *carried = problem.piece(cut, len(h), like(problem.dh_last, carried)).run(backend)
    assert torch.equal(h, torch.cat([first, second]))
    assert all(torch.equal(a, b) for a, b in zip(last, carried, strict=True))
