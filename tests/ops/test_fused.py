"""Backends with a backward pass written by hand: right against float64, and as PyTorch's machinery wants them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elman.errors import UsageError
from elman.ops import recurrence
from elman.ops.cells import CELLS, FUSED_CELLS
from elman.ops.operators import real_of
from tests.ops.problems import (
    assert_as_exact_as_reference,
    assert_chunks_equal_one_piece,
    draw,
    like,
    parts,
    solve,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {"loop": [F64, F32, BF16], "persistent": [BF16, F16]}

gpu = pytest.mark.gpu
LOOP_ON_CPU = pytest.param("loop", "cpu", F64, id="loop-cpu")
LOOP_ON_GPU = pytest.param("loop", "cuda", F64, id="loop-cuda", marks=gpu)
PERSISTENT = pytest.param("persistent", "cuda", BF16, id="persistent-cuda", marks=gpu)

of_loop = pytest.mark.parametrize(("backend", "device", "dtype"), [LOOP_ON_CPU, LOOP_ON_GPU])
on_each = pytest.mark.parametrize(("backend", "device", "dtype"), [LOOP_ON_CPU, LOOP_ON_GPU, PERSISTENT])
on_each_gpu = pytest.mark.parametrize(("backend", "device", "dtype"), [LOOP_ON_GPU, PERSISTENT])

#: PyTorch 2.11's compiler warns of its own deprecated calls and of TF32.
compilers_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def width(backend: str, hidden: int) -> int:
    """A number of units near this that the backend runs."""
    return hidden if backend == "loop" else -(-hidden // 8) * 8


def assert_alike(ours: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for the order of sums, in the Frobenius norm."""
    for a, b in zip(ours, expected, strict=True):
        tolerance = 1e-5 if b.dtype.itemsize > 2 else 0.02
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for without a value is NaN, so that an element left unwritten shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return empty

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@of_loop
@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("reset_rate", [None, 0.3])
def test_gradcheck(
    backend: str, device: str, dtype: torch.dtype, cell: str, with_h0: bool, reset_rate: float | None
) -> None:
    p = draw(4, 2, 3, device=device, with_h0=with_h0, with_bias=with_h0, reset_rate=reset_rate, cell=cell)
    inputs = {name: x.requires_grad_() for name, x in p.inputs().items()}
    assert torch.autograd.gradcheck(
        lambda *args: p.run(backend, dict(zip(inputs, args, strict=True))), list(inputs.values()), nondet_tol=0.0
    )


@on_each
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 20), st.one_of(st.integers(1, 80), st.sampled_from([256, 520]))),
    which_dtype=st.integers(0, 5),
    cell=st.sampled_from(sorted(FUSED_CELLS)),
    with_h0=st.booleans(),
    with_bias=st.booleans(),
    reset_rate=st.sampled_from([None, 0.0, 0.3, 1.0]),
    wants=st.sampled_from(["h", "h_last", "both"]),
    seed=st.integers(0, 2**16),
)
def test_errs_no_more_than_the_reference(
    backend: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    which_dtype: int,
    cell: str,
    with_h0: bool,
    with_bias: bool,
    reset_rate: float | None,
    wants: str,
    seed: int,
) -> None:
    seq_len, batch, hidden = shape
    p = draw(
        seq_len,
        batch,
        width(backend, hidden),
        dtype=DTYPES[backend][which_dtype % len(DTYPES[backend])],
        device=device,
        seed=seed,
        with_h0=with_h0,
        with_bias=with_bias,
        reset_rate=reset_rate,
        cell=cell,
    )
    p = replace(p, dh=None) if wants == "h_last" else p
    p = replace(p, dh_last=None) if wants == "h" else p
    assert_as_exact_as_reference(p, backend)


@gpu
@pytest.mark.parametrize("shape", [(64, 16, 512), (32, 64, 1280), (16, 7, 1001), (512, 1, 8), (3, 300, 24)])
@pytest.mark.parametrize(
    ("backend", "dtype"), [*(("loop", dtype) for dtype in (F64, F32, BF16, F16)), ("persistent", BF16)]
)
def test_errs_no_more_than_the_reference_on_large_shapes(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    seq_len, batch, hidden = shape
    p = draw(seq_len, batch, width(backend, hidden), dtype=dtype, device="cuda", reset_rate=0.02)
    assert_as_exact_as_reference(p, backend)


@gpu
@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("loop", BF16), ("loop", F16), ("persistent", BF16), ("persistent", F16)]
)
def test_every_cell_errs_no_more_than_the_reference(backend: str, dtype: torch.dtype, cell: str) -> None:
    for seq_len, batch, hidden, with_bias in ((5, 3, 8, True), (6, 20, 72, False), (20, 64, 512, True)):
        p = draw(seq_len, batch, hidden, dtype=dtype, device="cuda", with_bias=with_bias, cell=cell, reset_rate=0.05)
        assert_as_exact_as_reference(p, backend)


@on_each
@pytest.mark.parametrize(
    "cell", [cell for cell in FUSED_CELLS if cell != "relu" and "polynomial" not in cell]
)  # which are flat, below 0 or far from it
def test_saturated_units_keep_their_gradient(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    """From |v| = 3.5 bf16 rounds tanh(v) to ±1; the reference's f′ is 0 there, ours is not."""
    p = draw(6, 4, 16, dtype=BF16, device=device, reset_rate=None, scale=8.0, cell=cell)
    p = replace(p, pre=p.pre.abs() + 4)
    assert_as_exact_as_reference(p, backend)
    dpre = solve(p, backend)["dpre"]
    if cell.endswith(("delta", "triple_r")):  # a unit that is where its candidate is has no use for its rate
        dpre = dpre[:, :, 0]
    assert (dpre != 0).all()


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize("at", range(4))
def test_resets_at_every_step(backend: str, device: str, dtype: torch.dtype, cell: str, at: int) -> None:
    p = draw(4, 3, 8, dtype=dtype, device=device, reset_rate=0.0, cell=cell)
    assert p.reset is not None
    p.reset[at, 1] = True
    assert_as_exact_as_reference(p, backend)


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_every_element_is_written(poison: None, backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    for hidden in (width(backend, 5), 64):
        for p in (
            draw(3, 5, hidden, dtype=dtype, device=device, cell=cell, with_bias=True),
            draw(1, 1, hidden, dtype=dtype, device=device, cell=cell, reset_rate=None, with_h0=False),
        ):
            assert all(x.isfinite().all() for x in solve(p, backend).values())


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_a_nan_spreads_until_a_reset(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    p = draw(6, 4, 8, dtype=dtype, device=device, reset_rate=0.0, cell=cell)
    assert p.reset is not None
    p.pre[2, 1, ..., 3] = torch.nan
    p.reset[4, 1] = True
    result = solve(p, backend)
    bad = torch.zeros(6, 4, dtype=torch.bool, device=device)
    bad[3:4, 1] = True
    assert torch.equal(result["h"].isnan().all(-1), bad)
    assert torch.equal(result["h"].isnan().any(-1) ^ bad, bad.roll(-1, 0))
    assert result["dpre"].flatten(2)[:3, 1].isnan().any(-1).all()
    assert result["dweight"].isnan().any()


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_layouts_that_are_not_contiguous(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    p = draw(5, 4, 16, dtype=dtype, device=device, cell=cell, with_bias=True)
    expected = solve(p, backend)

    def embed(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan)
        part = wide[..., x.shape[-1] : 2 * x.shape[-1]]
        part.copy_(x)
        return part

    def shift(x: Tensor) -> Tensor:
        part = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
        part.copy_(x)
        return part

    def transpose(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (embed, shift, transpose):
        q = replace(p.map(change), reset=transpose(p.reset))
        inputs = {name: x.detach().requires_grad_() for name, x in q.inputs().items()}
        outputs = q.results(backend, inputs)
        results = torch.autograd.grad(outputs, list(inputs.values()), [q.dh, *parts(q.dh_last)])
        for ours, name in zip((*outputs, *results), expected, strict=True):
            torch.testing.assert_close(ours, expected[name], msg=f"{change.__name__}: {name}")

    expanded = replace(p, dh=torch.ones((), dtype=dtype, device=device).expand(p.dh.shape))
    dense = replace(expanded, dh=expanded.dh.contiguous())
    for name, gradient in solve(expanded, backend).items():
        assert torch.equal(gradient, solve(dense, backend)[name])


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_only_the_gradients_asked_for(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    p = draw(4, 3, 8, dtype=dtype, device=device, cell=cell, with_bias=True)
    expected = solve(p, backend)
    for name in p.inputs():
        inputs = {other: x.clone().requires_grad_(other == name) for other, x in p.inputs().items()}
        outputs = p.results(backend, inputs)
        (gradient,) = torch.autograd.grad(outputs, [inputs[name]], [p.dh, *parts(p.dh_last)])
        assert torch.equal(gradient, expected[f"d{name}"])


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_each_last_state_alone(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    p = replace(draw(4, 3, 8, dtype=dtype, device=device, cell=cell), dh=None)
    assert p.dh_last is not None
    for index, _ in enumerate(parts(p.dh_last)):
        alone = [x if i == index else torch.zeros_like(x) for i, x in enumerate(parts(p.dh_last))]
        expected = solve(replace(p, dh_last=like(p.dh_last, alone)), backend)
        inputs = {name: x.clone().requires_grad_() for name, x in p.inputs().items()}
        outputs = p.results(backend, inputs)
        gradients = torch.autograd.grad(outputs[1 + index], list(inputs.values()), alone[index])
        for name, gradient in zip(inputs, gradients, strict=True):
            assert torch.equal(gradient, expected[f"d{name}"])


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_every_run_gives_the_same_bits(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    p = draw(32, 8, 64, dtype=BF16, device=device, cell=cell)
    first = solve(p, backend)
    for _ in range(3):
        again = solve(p, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_chunks_with_carried_state_equal_one_piece(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    for kind in {dtype, BF16}:
        assert_chunks_equal_one_piece(draw(9, 4, 16, dtype=kind, device=device, cell=cell), backend, 4)


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
@pytest.mark.parametrize("with_h0", [False, True])
def test_opcheck(backend: str, device: str, dtype: torch.dtype, cell: str, with_h0: bool) -> None:
    rule = CELLS[cell]
    p = draw(3, 2, 8, dtype=dtype, device=device, with_h0=with_h0, with_bias=True, cell=cell)
    pre = p.pre.view(3, 2, rule.gates, 8)
    bias = None if rule.additive else p.bias
    states = list(parts(p.h0))
    names = (cell, "dense", backend)

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone().requires_grad_()

    given = (leaf(pre), [leaf(p.weight)], leaf(bias), [leaf(state) for state in states], p.reset)
    pre_bias = torch.zeros(rule.gates, 8, device=device, dtype=real_of(dtype), requires_grad=True)
    torch.library.opcheck(torch.ops.elman.recurrence.default, (*given, *names, True, pre_bias))
    h, _, saved = torch.ops.elman.recurrence(pre, [p.weight], bias, states, p.reset, *names, True, None)
    gradients = (p.dh, list(parts(p.dh_last)))
    wanted = (True, bias is not None, with_h0, with_h0)
    backward = (*gradients, h, saved, [p.weight], states, p.reset, *names, *wanted)
    torch.library.opcheck(torch.ops.elman.recurrence_backward.default, backward)


class Layer(torch.nn.Module):
    """A recurrence with its input product: what a model makes of the op."""

    def __init__(self, hidden: int, backend: str, cell: str) -> None:
        super().__init__()
        self.backend, self.cell = backend, cell
        rule = CELLS[cell]
        self.input = torch.nn.Linear(hidden, rule.gates * hidden)
        square = (hidden, hidden) if rule.products == 1 else (rule.products, hidden, hidden)
        self.weight = torch.nn.Parameter(torch.randn(square) / hidden**0.5)

    def forward(self, x: Tensor, reset: Tensor | None = None) -> Tensor:
        gates = CELLS[self.cell].gates
        pre = self.input(x) if gates == 1 else self.input(x).unflatten(-1, (gates, -1))
        h, last = recurrence(pre, self.weight, cell=self.cell, reset=reset, backend=self.backend)
        return h.float().sum() + sum(state.float().square().sum() for state in parts(last))


def copy_of(layer: Layer, backend: str) -> Layer:
    twin = Layer(32, backend, layer.cell).to(layer.weight)
    twin.load_state_dict(layer.state_dict())
    return twin


def gradients(run: Callable[[Tensor], Tensor], layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    loss = run(x)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in layer.parameters())]


@pytest.fixture
def cell() -> str:
    return "tanh"


@pytest.fixture
def layer_and_input(backend: str, device: str, dtype: torch.dtype, cell: str) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    return Layer(32, backend, cell).to(device, dtype), torch.randn(6, 3, 32, device=device, dtype=dtype)


@on_each
@compilers_own_warnings
@pytest.mark.parametrize("cell", ["tanh", "lstm", "gru"])
def test_torch_compile_in_one_graph(layer_and_input: tuple[Layer, Tensor], device: str) -> None:
    layer, x = layer_and_input
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert_alike(gradients(compiled, layer, x), gradients(layer, layer, x))
    with torch.no_grad():
        assert_alike([compiled(x)], [layer(x)])


@on_each
@compilers_own_warnings
def test_torch_compile_with_dynamic_shapes(layer_and_input: tuple[Layer, Tensor]) -> None:
    layer, x = layer_and_input
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len, batch in ((5, 2), (9, 4)):
        other = torch.randn(seq_len, batch, 32).to(x)
        assert_alike(gradients(compiled, layer, other), gradients(layer, layer, other))


@on_each
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(layer_and_input: tuple[Layer, Tensor], reentrant: bool) -> None:
    layer, x = layer_and_input
    x.requires_grad_()
    recomputed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x)
    for ours, expected in zip(recomputed, gradients(layer, layer, x), strict=True):
        assert torch.equal(ours, expected)


@on_each
def test_distributed_data_parallel(layer_and_input: tuple[Layer, Tensor], device: str, tmp_path: Path) -> None:
    layer, x = layer_and_input
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(layer, device_ids=[0] if device == "cuda" else None)
        distributed = gradients(parallel, layer, x)
    finally:
        torch.distributed.destroy_process_group()
    assert_alike(distributed, gradients(layer, layer, x))


@on_each
def test_autocast_around_both_passes(layer_and_input: tuple[Layer, Tensor], device: str) -> None:
    layer, x = layer_and_input[0].float(), layer_and_input[1].float()
    with torch.autocast(device, BF16):
        _, *inside = gradients(layer, layer, x)
        layer.zero_grad()
        loss = layer(x)
    loss.backward()
    outside = [parameter.grad for parameter in layer.parameters()]
    exact = copy_of(layer, "reference").double()
    _, *expected = gradients(exact, exact, x.double())
    for ours in (inside, outside):
        for gradient, truth in zip(ours, expected, strict=True):
            assert gradient.dtype == F32
            assert (gradient - truth).norm() < 0.02 * truth.norm()


@of_loop
def test_float32_stays_float32_when_backward_runs_under_autocast(backend: str, device: str, dtype: torch.dtype) -> None:
    p = draw(4, 3, 16, dtype=F32, device=device)
    inputs = [x.requires_grad_() for x in (p.pre, p.weight, p.h0)]
    h, _ = recurrence(*inputs, reset=p.reset, backend=backend)
    expected = torch.autograd.grad(h.sum(), inputs, retain_graph=True)
    with torch.autocast(device, BF16):
        ours = torch.autograd.grad(h.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_first_call_does_not_import_the_compiler() -> None:
    """torch._dynamo takes seconds to import, which would be most of a program's start."""
    code = (
        "import sys, torch; from elman.ops import recurrence\n"
        "h, _ = recurrence(torch.ones(2, 2, 2, requires_grad=True), torch.ones(2, 2), backend='loop')\n"
        "h.sum().backward(); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@on_each
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_saves_only_what_backward_needs(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    p = draw(8, 4, 16, dtype=dtype, device=device, reset_rate=None, cell=cell)
    rule = CELLS[cell]
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.numel()
        return x

    inputs = {name: x.clone().requires_grad_() for name, x in p.inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        p.run(backend, inputs)
    small = p.weight.numel() + (rule.states + rule.logarithmic) * p.dh[0].numel()
    assert sum(saved.values()) == (rule.states + rule.saved) * p.dh.numel() + small
    with torch.no_grad():
        given = (p.pre.view(8, 4, rule.gates, 16), [p.weight], None, [], None, cell, "dense", backend, False, None)
        assert torch.ops.elman.recurrence(*given)[2] == []


@on_each
def test_differentiating_twice_is_an_error(backend: str, device: str, dtype: torch.dtype) -> None:
    p = draw(2, 2, 8, dtype=dtype, device=device)
    h, _ = recurrence(p.pre.requires_grad_(), p.weight, backend=backend)
    (gradient,) = torch.autograd.grad(h.square().sum(), p.pre, create_graph=True)
    with pytest.raises(UsageError, match="cannot be differentiated itself: use backend='reference'"):
        torch.autograd.grad(gradient.sum(), p.pre)


@on_each_gpu
def test_cuda_graph_of_both_passes(layer_and_input: tuple[Layer, Tensor]) -> None:
    layer, x = layer_and_input
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(layer, layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    with torch.cuda.graph(graph):
        loss = layer(x)
        loss.backward()
    captured = [loss, *(parameter.grad for parameter in layer.parameters())]
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        for value in captured[1:]:
            value.zero_()
        graph.replay()
        results = [value.clone() for value in captured]
        twin = copy_of(layer, layer.backend)
        assert_alike(results, gradients(twin, twin, x))


@on_each_gpu
def test_two_streams_at_once(backend: str, device: str, dtype: torch.dtype) -> None:
    problems = [draw(64, 16, 256, dtype=BF16, device=device, seed=seed) for seed in range(2)]
    expected = [solve(p, backend) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(3):
        results = []
        for p, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(solve(p, backend))
        torch.cuda.synchronize()
        for ours, theirs in zip(results, expected, strict=True):
            assert_alike([ours[name] for name in theirs], list(theirs.values()))


@on_each_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend: str, device: str, dtype: torch.dtype) -> None:
    with torch.cuda.device(0):
        assert_as_exact_as_reference(draw(4, 3, 64, dtype=dtype, device="cuda:1"), backend)


@on_each_gpu
@pytest.mark.parametrize("cell", FUSED_CELLS)
def test_peak_memory(backend: str, device: str, dtype: torch.dtype, cell: str) -> None:
    """Beyond inputs, outputs and their gradients: what is saved, one copy of h, and drec where it is no part of dpre.

    That is 2 times (T, B, H) where a cell has one gate, and a half for what does not grow with T.
    """
    p = draw(64, 64, 512, dtype=BF16, device=device, cell=cell)
    rule = CELLS[cell]
    solve(p, backend)
    inputs = {name: x.requires_grad_() for name, x in p.inputs().items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = p.run(backend, inputs)
    results = torch.autograd.grad(outputs, list(inputs.values()), [p.dh, *parts(p.dh_last)])
    of_user = sum(x.nbytes for x in (*outputs, *results))
    others = sum(kind.itemsize for kind in rule.dtypes(BF16)[1:]) // BF16.itemsize
    sequences = rule.saved + others + 1 + (0 if rule.additive else rule.products)
    # Weight gradients are two sums in float32.
    assert torch.cuda.max_memory_allocated() - before - of_user <= (sequences + 0.5) * p.dh.nbytes + 4 * p.weight.nbytes
