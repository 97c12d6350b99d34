"""The recurrence with a matrix state: its definition, the backward pass by hand, the kernels on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import matrix_kernels, matrix_recurrence
from elman.ops.cuda import compiler
from elman.ops.cuda.compiler import Module
from elman.ops.matrix import MATRIX_CELLS
from elman.ops.operators import real_of
from tests.ops.cuda import emulator
from tests.ops.cuda.emulator import Emulator, needs_compiler

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INPUTS = ("q", "k", "v", "decay", "beta", "s0")


@dataclass(frozen=True)
class MatrixProblem:
    """The inputs and the gradients of both outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    s0: Tensor | None
    reset: Tensor | None
    dy: Tensor
    ds: Tensor
    cell: str = "tanh"

    def to(self, dtype: torch.dtype, device: str | None = None) -> MatrixProblem:
        """In another dtype, its states and gates never in a half type."""
        kinds = dict.fromkeys(("q", "k", "v", "dy"), dtype)
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                kind = torch.bool if field.name == "reset" else kinds.get(field.name, real_of(dtype))
                moved[field.name] = value.to(device or value.device, kind)
        return replace(self, **moved)


def draw(
    seq_len: int,
    batch: int = 2,
    heads: int = 2,
    keys: int = 4,
    values: int = 6,
    *,
    per_key: bool = False,
    with_s0: bool = True,
    reset_rate: float | None = 0.2,
    scale: float = 1.0,
    cell: str = "tanh",
    seed: int = 0,
) -> MatrixProblem:
    """Keys and queries of length 1, values times ``scale``, decays from 0.5 to 1, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    steps = (seq_len, batch, heads)
    return MatrixProblem(
        q=torch.nn.functional.normalize(normal(*steps, keys), dim=-1),
        k=torch.nn.functional.normalize(normal(*steps, keys), dim=-1),
        v=normal(*steps, values) * scale,
        decay=1 - normal(*steps, *((keys,) if per_key else ())).sigmoid() / 2,
        beta=normal(*steps).sigmoid(),
        s0=normal(batch, heads, keys, values).tanh() if with_s0 else None,
        reset=None if reset_rate is None else torch.rand(seq_len, batch, generator=generator) < reset_rate,
        dy=normal(*steps, values),
        ds=normal(batch, heads, keys, values),
        cell=cell,
    )


def solve(p: MatrixProblem, backend: str, wanted: Iterable[str] = ("y", "s")) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input, by name."""
    inputs = {name: getattr(p, name).clone().requires_grad_() for name in INPUTS if getattr(p, name) is not None}
    y, s = matrix_recurrence(**inputs, cell=p.cell, reset=p.reset, backend=backend)
    outputs = {"y": (y, p.dy), "s": (s, p.ds)}
    chosen = [outputs[name] for name in wanted]
    gradients = torch.autograd.grad(
        [x for x, _ in chosen], list(inputs.values()), [dx for _, dx in chosen], materialize_grads=True
    )
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "s": s.detach(), **named}


def assert_as_exact_as_reference(p: MatrixProblem, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """No result errs over float64, of the same rounded inputs, more than 1.5 times what the reference does.

    A rounding to the dtype, and a few of float32, are allowed beside that: the state is of float32, so that the
    reference in a half type errs by no more than its last rounding.
    """
    p = p.to(dtype)
    ours, plain, truth = solve(p, backend), solve(p, "reference"), solve(p.to(F64), "reference")
    rounding = 1e-12 if dtype == F64 else torch.finfo(dtype).eps / 2 + 2e-6
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert ours[name].shape == exact.shape, name
        norm = exact.norm().clamp_min(1e-30)
        errors = [float((x[name].double() - exact).norm() / norm) for x in (ours, plain)]
        assert errors[0] <= 1.5 * errors[1] + rounding, (name, errors)
    return ours


cells = pytest.mark.parametrize("cell", MATRIX_CELLS)
per_key = pytest.mark.parametrize("per_key", [False, True])


@cells
@per_key
def test_the_reference_is_its_definition(cell: str, per_key: bool) -> None:
    """Loops over numbers, row by row and head by head."""
    p = draw(5, per_key=per_key, cell=cell)
    assert p.s0 is not None
    assert p.reset is not None
    y, last = matrix_recurrence(p.q, p.k, p.v, p.decay, p.beta, p.s0, cell=cell, reset=p.reset)
    function = {"tanh": torch.tanh, "softsign": lambda x: x / (1 + x.abs()), "identity": lambda x: x}[cell]
    for row in range(2):
        for head in range(2):
            s = p.s0[row, head]
            for t in range(5):
                s = torch.zeros_like(s) if p.reset[t, row] else s
                at = (t, row, head)
                kept = torch.diag(p.decay[at]) @ s if per_key else p.decay[at] * s
                s = function(kept + p.beta[at] * torch.outer(p.k[at], p.v[at] - kept.t() @ p.k[at]))
                torch.testing.assert_close(y[at], s.t() @ p.q[at])
            torch.testing.assert_close(last[row, head], s)


@cells
@per_key
def test_gradcheck_of_every_input(cell: str, per_key: bool) -> None:
    p = draw(4, keys=2, values=3, per_key=per_key, cell=cell)
    inputs = [getattr(p, name).requires_grad_() for name in INPUTS]
    for backend in ("reference", "loop"):

        def run(*x: Tensor, backend: str = backend) -> tuple[Tensor, Tensor]:
            return matrix_recurrence(*x, cell=cell, reset=p.reset, backend=backend)

        assert torch.autograd.gradcheck(run, inputs)
    if cell == "tanh":  # what is differentiated twice is autograd's own
        assert torch.autograd.gradgradcheck(lambda *x: matrix_recurrence(*x, cell=cell, reset=p.reset)[0], inputs)


@cells
@per_key
@pytest.mark.parametrize("seq_len", [1, 16, 37])
@pytest.mark.parametrize("present", [True, False])
def test_the_backward_pass_by_hand_is_that_of_autograd(cell: str, per_key: bool, seq_len: int, present: bool) -> None:
    p = draw(seq_len, per_key=per_key, with_s0=present, reset_rate=0.1 if present else None, cell=cell)
    for wanted in (("y", "s"), ("y",), ("s",)):
        torch.testing.assert_close(solve(p, "loop", wanted), solve(p, "reference", wanted))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_the_loop_errs_no_more_than_the_reference(dtype: torch.dtype) -> None:
    for scale in (1.0, 8.0):
        assert_as_exact_as_reference(draw(40, scale=scale), dtype, "loop")


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_chunks_with_carried_state_equal_one_piece(dtype: torch.dtype, backend: str) -> None:
    p = draw(11).to(dtype)
    whole, last = matrix_recurrence(p.q, p.k, p.v, p.decay, p.beta, p.s0, reset=p.reset, backend=backend)
    for cut in range(1, 11):
        s, pieces = p.s0, []
        for part in (slice(0, cut), slice(cut, 11)):
            given = (x[part] for x in (p.q, p.k, p.v, p.decay, p.beta))
            assert p.reset is not None
            y, s = matrix_recurrence(*given, s, reset=p.reset[part], backend=backend)
            pieces.append(y)
        assert torch.equal(torch.cat(pieces), whole)
        assert s is not None
        assert torch.equal(s, last)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """CPU tensors are run by the kernels' own source, on an emulated GPU."""
    gpu = Emulator()

    def launch(*given: Any, shared_bytes: int) -> None:
        gpu(*given, shared_bytes=shared_bytes, cluster=None, cooperative=True)

    monkeypatch.setattr(matrix_kernels, "launch", launch)
    monkeypatch.setattr(matrix_kernels, "why_not", lambda *problem: None)
    monkeypatch.setattr(matrix_kernels, "_shared_bytes", lambda index: 227 * 1024)
    return gpu


EMULATED = {
    "one step": (draw(1, keys=16, values=16), BF16),
    "neither s0 nor resets": (draw(5, keys=32, values=32, with_s0=False, reset_rate=None), BF16),
    "several intervals, the last one short": (draw(53, keys=16, values=16, reset_rate=0.05), BF16),
    "whole intervals, float32": (draw(33, keys=16, values=32, cell="softsign"), F32),
    "a decay a row of the state, padded, the identity": (
        draw(21, keys=20, values=12, per_key=True, cell="identity"),
        BF16,
    ),
    "several warps a head": (draw(19, batch=1, keys=64, values=64), BF16),
    "several blocks a head, a decay a row": (draw(18, 1, 1, 128, 128, per_key=True), BF16),
    "saturated": (draw(18, keys=16, values=16, scale=30.0), BF16),
    "saturated, fp16": (draw(29, keys=16, values=16, scale=30.0), F16),
    "fp16": (draw(14, keys=32, values=32, per_key=True), F16),
}


@needs_compiler
@pytest.mark.parametrize("name", EMULATED)
def test_the_emulated_kernels_err_no_more_than_the_reference(emulated: Emulator, name: str) -> None:
    p, dtype = EMULATED[name]
    assert_as_exact_as_reference(p, dtype, "persistent")
    assert emulated.kernels == ["matrix_forward", "matrix_backward"]


@needs_compiler
def test_the_emulated_kernels_keep_a_nan_in_its_head_until_a_reset(emulated: Emulator) -> None:
    p = draw(9, keys=16, values=16, reset_rate=0.0).to(BF16)
    assert p.reset is not None
    p.v[2, 1, 0, 3] = torch.nan
    p.reset[6, 1] = True
    bad = torch.zeros(9, 2, 2, dtype=torch.bool)
    bad[2:6, 1, 0] = True
    result = solve(p, "persistent")
    assert torch.equal(result["y"].isnan().any(-1), bad)
    assert result["s"].isfinite().all()


@needs_compiler
def test_the_order_of_threads_changes_no_bit_and_either_output_may_be_alone(emulated: Emulator) -> None:
    p = EMULATED["several intervals, the last one short"][0].to(BF16)
    first, *others = (solve(p, "persistent") for _ in range(3))
    assert emulated.seed == 6
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())
    for wanted in ("y", "s"):
        ours, theirs = solve(p, "persistent", (wanted,)), solve(p, "reference", (wanted,))
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("max(stretch - 1, 0)", "stretch"),
        ("wait_copies<kDepth - 2>", "wait_copies<kDepth - 1>"),
        ("if (number < kInterval && interval > 0)", "if (false)"),
        ("to_key[i] = fmaf(a[i], kept, to_key[i]);", "to_key[i] += kept;"),
    ],
)
def test_a_broken_kernel_is_found_out(
    emulated: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str
) -> None:
    original = emulator._source
    assert any(right in original(name) for name in ("matrix.cuh", "matrix_state.cuh"))
    monkeypatch.setattr(emulator, "_source", lambda name: original(name).replace(right, wrong))
    monkeypatch.setattr(emulator, "_folder", lambda: str(tmp_path))
    with pytest.raises(AssertionError):
        assert_as_exact_as_reference(EMULATED["several intervals, the last one short"][0], F32, "persistent")


def test_shared_memory_is_what_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By static_asserts, of heads of one warp, of several, and of blocks that do not hold all of them."""
    claims = []
    for keys, values, per_key, itemsize in (
        (16, 16, True, 2),
        (32, 32, False, 2),
        (64, 64, False, 4),
        (128, 128, True, 2),
    ):
        heads = matrix_kernels._Heads(keys, values, per_key, itemsize)
        number, per = {2: "bf16", 4: "float"}[itemsize], str(per_key).lower()
        warps = heads.backward_warps(227 * 1024)
        claims += [
            f"static_assert(matrix::Tile<{keys}, {values}>::kWarps == {heads.warps});",
            f"static_assert(matrix::Record<{number}, {keys}, {heads.width}, false, {per}>::kBytes == "
            f"{heads.record(heads.width, False)});",
            f"static_assert(matrix::Backward<{number}, {keys}, {values}, {per}, {warps}>::kSharedBytes == "
            f"{heads.backward_bytes(warps)});",
        ]
    text = compiler.flatten("matrix.cuh") + "\n".join(claims)
    monkeypatch.setattr(compiler, "flatten", lambda source: text)
    compiler._compile(Module("matrix.cuh", ()), "sm_90a")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(
    ("keys", "values"), [(16, 16), (32, 32), (64, 64), (128, 128), (32, 64), (128, 16), (16, 128), (20, 40)]
)
@pytest.mark.parametrize("cell", MATRIX_CELLS)
def test_the_kernels_err_no_more_than_the_reference(cell: str, keys: int, values: int, dtype: torch.dtype) -> None:
    """And twice the same bits; inputs that are spread over memory, and units that saturate."""
    for seq_len, per_key, with_s0, reset_rate, scale in (
        (1, False, True, None, 1.0),
        (16, True, False, 0.2, 1.0),
        (83, False, True, 0.05, 8.0),
        (40, True, True, 0.3, 1.0),
    ):
        p = draw(
            *(seq_len, 3, 3, keys, values),
            per_key=per_key,
            with_s0=with_s0,
            reset_rate=reset_rate,
            scale=scale,
            cell=cell,
        )
        p = p.to(F64, "cuda")
        ours = assert_as_exact_as_reference(p, dtype, "persistent")
        again = solve(p.to(dtype), "persistent")
        assert all(torch.equal(value, again[name]) for name, value in ours.items())


@pytest.mark.gpu
def test_the_kernels_do_not_drift_over_65536_steps() -> None:
    p = draw(65_536, 1, 1, 32, 32, reset_rate=None).to(BF16, "cuda")
    y, s = matrix_recurrence(p.q, p.k, p.v, p.decay, p.beta, p.s0, backend="persistent")
    exact = p.to(F64, "cpu")
    _, late = matrix_recurrence(*(getattr(exact, n)[-512:] for n in ("q", "k", "v", "decay", "beta")))
    assert y.isfinite().all()
    # What is older than 512 steps is forgotten.
    assert (s.double().cpu() - late).norm() <= 1e-2 * late.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings(r"ignore:::torch\b")  # of torch.compile's own
def test_the_kernels_in_a_graph_compiled_and_in_chunks() -> None:
    p = draw(40, 4, 4, 32, 32).to(BF16, "cuda")
    names = ("q", "k", "v", "decay", "beta")
    given = [getattr(p, name) for name in names]
    whole, last = matrix_recurrence(*given, p.s0, reset=p.reset)
    compiled = torch.compile(matrix_recurrence, fullgraph=True)
    assert torch.equal(compiled(*given, p.s0, reset=p.reset)[0], whole)
    assert p.reset is not None
    first, s = matrix_recurrence(*(x[:23] for x in given), p.s0, reset=p.reset[:23])
    second, s = matrix_recurrence(*(x[23:] for x in given), s, reset=p.reset[23:])
    assert torch.equal(torch.cat((first, second)), whole)
    assert torch.equal(s, last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = matrix_recurrence(*given, p.s0, reset=p.reset)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, whole)


@pytest.mark.gpu
def test_the_identity_is_the_gated_delta_rule_of_flash_linear_attention() -> None:
    """Its recurrent kernel, which has no backward pass, and its chunked one, where its Triton may compute gradients."""
    rules = pytest.importorskip("fla.ops.gated_delta_rule")
    p = draw(100, 2, 4, 32, 32, reset_rate=None, cell="identity").to(BF16, "cuda")
    ours = solve(p, "persistent")
    given = {name: getattr(p, name).transpose(0, 1).contiguous().requires_grad_() for name in INPUTS[:5]}
    q, k, v, decay, beta = given.values()
    assert p.s0 is not None
    rest = {"beta": beta, "scale": 1.0, "initial_state": p.s0, "output_final_state": True}
    for rule in (rules.fused_recurrent_gated_delta_rule, rules.chunk_gated_delta_rule):
        y, s = rule(q, k, v, g=decay.log(), **rest)
        torch.testing.assert_close(ours["y"], y.transpose(0, 1), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(ours["s"], s, rtol=2e-2, atol=2e-2)
    try:
        found = torch.autograd.grad((y, s), list(given.values()), (p.dy.transpose(0, 1).contiguous(), p.ds))
    except RuntimeError as error:
        assert "Triton" in str(error)  # noqa: PT017  # some of its versions are refused on a Hopper
        pytest.skip(str(error))
    for name, gradient in zip(given, found, strict=True):
        torch.testing.assert_close(ours[f"d{name}"], gradient.transpose(0, 1), rtol=5e-2, atol=5e-2)


def test_what_the_compiler_is_told_is_what_the_op_does() -> None:
    p = draw(18)
    given = [getattr(p, name).requires_grad_() for name in INPUTS]
    torch.library.opcheck(torch.ops.elman.matrix_recurrence, (*given, p.reset, "tanh", "loop", True))
    given = [x.detach() for x in given]
    torch.library.opcheck(torch.ops.elman.matrix_recurrence, (*given, None, "softsign", "loop", False))


def test_the_backward_pass_of_the_loop_cannot_be_differentiated() -> None:
    p = draw(3)
    q = p.q.requires_grad_()
    y, _ = matrix_recurrence(q, p.k, p.v, p.decay, p.beta, backend="loop")
    (gradient,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(UsageError, match="cannot be differentiated itself: use backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_shapes_alone_go_through(backend: str) -> None:
    p = draw(5)
    y, s = matrix_recurrence(*(getattr(p, name).to("meta") for name in INPUTS), backend=backend)
    assert (y.shape, s.shape, y.device.type) == (p.v.shape, p.s0.shape, "meta")


def test_autocast_casts_what_moves_and_keeps_what_decays() -> None:
    p = draw(5).to(F32)
    with torch.autocast("cpu", BF16):
        y, s = matrix_recurrence(p.q, p.k, p.v, p.decay, p.beta, p.s0)
    half = p.to(BF16)
    expected = matrix_recurrence(half.q, half.k, half.v, p.decay, p.beta, p.s0)
    assert (y.dtype, s.dtype) == (BF16, F32)
    assert torch.equal(y, expected[0])
    assert torch.equal(s, expected[1])


def test_a_nan_stays_in_its_head_until_a_reset() -> None:
    p = draw(9, reset_rate=0.0)
    assert p.reset is not None
    p.v[2, 1, 0, 3] = torch.nan
    p.reset[6, 1] = True
    bad = torch.zeros(9, 2, 2, dtype=torch.bool)
    bad[2:6, 1, 0] = True
    for backend in ("reference", "loop"):
        result = solve(p, backend)
        assert torch.equal(result["y"].isnan().any(-1), bad)
        assert result["s"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q is a NoneType: give a tensor"),
        ({"v": [1.0]}, "v is a list: give a tensor"),
        ({"beta": 1.0}, "beta is a float: give a tensor"),
        ({"s0": (torch.zeros(2, 2, 4, 6),)}, "s0 is a tuple: give a tensor"),
        ({"q": torch.zeros(3, 4)}, r"q has shape \(3, 4\)"),
        ({"q": torch.zeros(0, 2, 2, 4)}, "each at least 1"),
        ({"k": torch.zeros(5, 2, 2, 5)}, r"k has shape \(5, 2, 2, 5\) beside q of .*: give \(5, 2, 2, 4\)"),
        ({"v": torch.zeros(5, 2, 6)}, r"v has shape \(5, 2, 6\) .* give \(T, B, N, V\)"),
        ({"v": torch.zeros(5, 2, 2, 0, dtype=F64)}, r"v has shape \(5, 2, 2, 0\)"),
        ({"decay": torch.zeros(5, 2)}, r"decay has shape .* give \(5, 2, 2\) or \(5, 2, 2, 4\)"),
        ({"beta": torch.zeros(5, 2, 2, 1)}, "beta has shape"),
        ({"s0": torch.zeros(2, 2, 6, 4)}, r"s0 has shape .* give \(2, 2, 4, 6\)"),
        ({"k": torch.zeros(5, 2, 2, 4)}, "k has dtype torch.float32 but q has torch.float64"),
        ({"beta": torch.zeros(5, 2, 2, dtype=torch.int32)}, "beta has dtype torch.int32: give floating point"),
        ({"reset": torch.zeros(5, 2)}, "reset has dtype torch.float32: give torch.bool"),
        ({"beta": torch.zeros(5, 2, 2, device="meta")}, "beta is on meta but q is on cpu"),
        ({"cell": "relu"}, "cell='relu' is unknown: choose one of tanh, softsign, identity"),
        ({"backend": "fast"}, "backend='fast' is unknown: choose auto or one of reference, loop, persistent"),
        ({"backend": "persistent"}, "backend='persistent' cannot run this problem: .*CUDA"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    p = draw(5)
    given = {name: getattr(p, name) for name in (*INPUTS, "reset", "cell")} | change
    with pytest.raises(UsageError, match=message):
        matrix_recurrence(**given)
