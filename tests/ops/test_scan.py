"""The linear scan against running step by step, and what its kernels are given and make of it."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import linear_scan, scan
from elman.ops.cuda.compiler import flatten

B, H = 3, 4
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def step_by_step(a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None) -> Tensor:
    h, outputs = torch.zeros_like(b[0]) if h0 is None else h0, []
    for t in range(len(b)):
        if reset is not None:
            h = torch.where(reset[t].unsqueeze(-1), 0, h)
        h = a[t] * h + b[t]
        outputs.append(h)
    return torch.stack(outputs)


def inputs(steps: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    a, b = (torch.randn(steps, B, H, generator=generator, dtype=torch.float64) for _ in range(2))
    a[torch.rand(a.shape, generator=generator) < 0.1] = 0
    h0 = torch.randn(B, H, generator=generator, dtype=torch.float64)
    return a.to(device), b.to(device), h0.to(device), (torch.rand(steps, B, generator=generator) < 0.2).to(device)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 13, 64, 100])
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_equals_step_by_step_with_gradients(steps: int, with_h0: bool, with_reset: bool) -> None:
    a, b, h0, reset = inputs(steps)
    leaves = [tensor.requires_grad_() for tensor in (a, b, h0)]
    results = []
    scan: Callable[..., Tensor]
    for scan in (step_by_step, lambda a, b, h0, reset: linear_scan(a, b, h0, reset=reset)):
        h = scan(a, b, h0 if with_h0 else None, reset if with_reset else None)
        loss = (h * torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)).sum()
        results.append([h, *torch.autograd.grad(loss, leaves[: 2 + with_h0])])
    torch.testing.assert_close(results[1], results[0])


def test_can_be_differentiated_twice() -> None:
    a, b, h0, _ = inputs(5)
    leaves = [tensor[..., :2].clone().requires_grad_() for tensor in (a, b, h0)]
    assert torch.autograd.gradgradcheck(lambda a, b, h0: linear_scan(a, b, h0), leaves)


def test_one_step_is_no_view_of_its_input() -> None:
    a, b, _, _ = inputs(1)
    assert linear_scan(a, b).data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"a": torch.ones(H)}, r"a has shape \(4,\): give \(5, 3, 4\), by expand"),
        ({"a": torch.ones(5, B, 1)}, r"a has shape \(5, 3, 1\)"),
        ({"a": torch.ones(5, B, H, dtype=BF16)}, "a has dtype torch.bfloat16: b has torch.float32, so cast one"),
        ({"a": 0.5}, "a is a float: give a tensor"),
        ({"b": torch.ones(B, H)}, r"b has shape \(3, 4\) and dtype torch.float32: give floating-point \(T, B, H\)"),
        ({"b": torch.ones(5, B, H, dtype=torch.long)}, "b has .*dtype torch.int64"),
        ({"h0": torch.ones(1, H)}, r"h0 has shape \(1, 4\): give \(3, 4\)"),
        ({"h0": torch.ones(B, H, dtype=F64)}, "h0 has dtype torch.float64"),
        ({"h0": torch.ones(B, H, device="meta")}, "h0 is on meta but b is on cpu"),
        ({"reset": torch.ones(B, 5, dtype=torch.bool)}, r"reset has shape \(3, 5\): give \(5, 3\)"),
        ({"reset": torch.ones(5, B)}, "reset has dtype torch.float32: give torch.bool"),
    ],
)
def test_what_would_be_broadcast_or_cast_is_refused(wrong: dict[str, Tensor], complaint: str) -> None:
    """The kernels would read past the end of what is smaller, and other numbers where dtypes differ."""
    with pytest.raises(UsageError, match=complaint):
        linear_scan(**{"a": torch.ones(5, B, H), "b": torch.ones(5, B, H), **wrong})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("keep", [0.01, 0.9, 0.999])
def test_float32_errs_no_more_than_step_by_step(keep: float, device: str) -> None:
    a, b, h0, _ = inputs(512, device)
    a = keep ** (a.abs() + 0.1)
    exact = step_by_step(a, b, h0, None)
    single = [tensor.float() for tensor in (a, b, h0)]
    errors = [(h.double() - exact).norm() for h in (linear_scan(*single), step_by_step(*single, None))]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_half_types_are_computed_in_float32() -> None:
    """Rounded once, at the end."""
    a, b, h0, reset = (x if x.dtype == torch.bool else x.to(BF16) for x in inputs(64))
    exact = step_by_step(a.float(), b.float(), h0.float(), reset)
    torch.testing.assert_close(linear_scan(a, b, h0, reset=reset), exact.to(BF16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("present", [True, False])
def test_what_the_compiler_is_told_is_what_the_ops_do(present: bool) -> None:
    a, b, h0, reset = inputs(5)
    h0, reset = (h0.requires_grad_(), reset) if present else (None, None)
    torch.library.opcheck(torch.ops.elman.linear_scan, (a.requires_grad_(), b.requires_grad_(), h0, reset))
    given = (b.detach(), a.detach(), b.detach(), None if h0 is None else h0.detach(), reset)
    torch.library.opcheck(torch.ops.elman.linear_scan_backward, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_both_passes_are_one_op_each() -> None:
    a, b, h0, reset = inputs(6)
    leaves = [x.requires_grad_() for x in (a, b, h0)]
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, given: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if "linear_scan" in str(node.target))
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, given: make_boxed_func(look(graph, given)))
    compiled = torch.compile(lambda *x: linear_scan(*x, reset=reset), fullgraph=True, backend=backend)
    ours = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(linear_scan(*leaves, reset=reset).square().sum(), leaves))
    assert seen == ["elman.linear_scan.default", "elman.linear_scan_backward.default"]


def parameters(direction: str) -> list[str]:
    """The names of a kernel's parameters, in order."""
    found = re.search(rf"scan_{direction}\(([^)]*)\)", flatten("scan.cuh"))
    assert found is not None
    return [part.split()[-1].lstrip("*") for part in found[1].split(",")]


def run_like_the_kernels(direction: str, h: Tensor, arguments: tuple[Tensor | None, ...]) -> None:
    """Step by step as in scan.cuh, on the tensors that the launch names."""
    x = dict(zip(parameters(direction), [*arguments, *h.shape], strict=True))
    assert list(x)[-3:] == ["steps", "batch", "hidden"]
    cut = torch.zeros(h.shape[:2], dtype=torch.bool) if x["reset"] is None else x["reset"]
    start = torch.zeros_like(h[0]) if x["h0"] is None else x["h0"]
    if direction == "forward":
        state = start
        for t in range(x["steps"]):
            state = torch.where(cut[t, :, None], x["b"][t], x["a"][t] * state + x["b"][t])
            x["h"][t] = state
        return
    carried = torch.zeros_like(h[0])
    for t in reversed(range(x["steps"])):
        fresh = cut[t, :, None] | torch.tensor(t == 0 and x["h0"] is None)
        through = x["dh"][t] + carried
        x["db"][t] = through
        x["da"][t] = torch.where(fresh, 0, through * (x["h"][t - 1] if t > 0 else start))
        carried = torch.where(fresh, 0, x["a"][t] * through)
    x["dh0"].copy_(carried)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_launches_compute_the_scan(
    monkeypatch: pytest.MonkeyPatch, steps: int, with_h0: bool, with_reset: bool
) -> None:
    p = solve(steps, F64, with_h0, with_reset, linear_scan)
    monkeypatch.setattr(scan, "_launch", run_like_the_kernels)
    monkeypatch.setattr(scan, "_has_kernel", lambda h: True)
    torch.testing.assert_close(solve(steps, F64, with_h0, with_reset, linear_scan), p)


def solve(
    steps: int,
    dtype: torch.dtype,
    with_h0: bool,
    with_reset: bool,
    run: Callable[..., Tensor],
    shape: tuple[int, int] = (B, H),
    device: str = "cpu",
) -> list[Tensor]:
    """H and the gradients of all inputs; these are rounded to ``dtype`` and then computed with as ``run`` likes."""
    generator = torch.Generator().manual_seed(steps)
    batch, hidden = shape
    drawn = [torch.randn(steps, batch, hidden, generator=generator, dtype=F64) for _ in range(3)]
    drawn[0] = drawn[0].sigmoid()
    h0 = torch.randn(batch, hidden, generator=generator, dtype=F64)
    reset = (torch.rand(steps, batch, generator=generator) < 0.1).to(device) if with_reset else None
    a, b, dh, h0 = (x.to(device, dtype) for x in (*drawn, h0))
    leaves = [x.requires_grad_() for x in ((a, b, h0) if with_h0 else (a, b))]
    h = run(a, b, h0 if with_h0 else None, reset=reset)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(h.dtype))]


def test_names_of_kernels_are_those_that_are_compiled() -> None:
    for dtype in (BF16, F32, F64):
        for hidden in (6, 7):
            width = scan._width(torch.zeros(2, 3, hidden, dtype=dtype))
            assert width == (2 if dtype == BF16 and hidden == 6 else 1)
            for direction in ("forward", "backward"):
                assert scan._kernel_name(direction, dtype, width) in scan._module(dtype).kernels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (5, 3, 8), (37, 2, 130), (64, 4, 96), (513, 8, 256)])
def test_the_kernels_err_no_more_than_step_by_step(
    shape: tuple[int, int, int], present: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over float64, of the same rounded inputs, as a multiple of what plain PyTorch errs in this dtype."""
    steps, *rest = shape

    def solved(run: Callable[..., Tensor]) -> list[Tensor]:
        return solve(steps, dtype, present, present, run, tuple(rest), "cuda")

    def plain(*x: Tensor | None, reset: Tensor | None) -> Tensor:
        return step_by_step(*x, reset)

    def exact(*x: Tensor | None, reset: Tensor | None) -> Tensor:
        return step_by_step(*(None if y is None else y.double() for y in x), reset)

    launched: list[str] = []
    launch = scan._launch
    monkeypatch.setattr(scan, "_launch", lambda direction, *x: (launched.append(direction), launch(direction, *x)))
    torch.full((2**26,), torch.nan, device="cuda")  # what is not written shall show
    ours, again = solved(linear_scan), solved(linear_scan)
    assert launched == ["forward", "backward"] * 2
    for got, same, by_steps, truth in zip(ours, again, solved(plain), solved(exact), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, same)
        norm = truth.double().norm().clamp_min(1e-30)
        errors = [(x.double() - truth.double()).norm() / norm for x in (got, by_steps)]
        rounding = 1e-12 if dtype == F64 else torch.finfo(dtype).eps / 2 + 1e-6
        assert errors[0] <= 1.5 * errors[1] + rounding, errors


@pytest.mark.gpu
def test_on_a_gpu_it_can_be_differentiated_twice_and_reads_slices() -> None:
    a, b, h0, reset = inputs(5, "cuda")
    leaves = [tensor[..., :3].requires_grad_() for tensor in (a, b, h0)]
    assert torch.autograd.gradcheck(lambda a, b, h0: linear_scan(a, b, h0, reset=reset), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b, h0: linear_scan(a, b, h0, reset=reset), leaves)
