"""The gated softmax: its definition on the CPU, its kernels on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import gated_softmax as op
from elman.ops.gated_softmax import gated_softmax

HALVES = (torch.bfloat16, torch.float16)
#: Of a group: of one lane and of many, a whole number of 16 bytes or not, and such as would share banks.
SIZES = [1, 2, 3, 8, 20, 25, 32, 37, 40, 64, 100, 128, 333, 1184]


def definition(x: Tensor, s: Tensor, groups: int) -> Tensor:
    shares = x.unflatten(-1, (groups, -1)).exp()
    return (shares / shares.sum(-1, keepdim=True)).flatten(-2) * s * torch.sigmoid(s)


def draw(rows: int, width: int, *, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Inputs and the gradient of the output, in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64) for name in ("x", "s", "dy")}
    return {name: value.to(device) for name, value in drawn.items()}


def solve(problem: dict[str, Tensor], groups: int, plain: bool = False) -> dict[str, Tensor]:
    """The output and both gradients. ``plain`` does without the kernels."""
    x, s = (problem[name].clone().requires_grad_() for name in ("x", "s"))
    if plain:
        y = (x.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2) * torch.nn.functional.silu(s)).to(x.dtype)
    else:
        y = gated_softmax(x, s, groups)
    dx, ds = torch.autograd.grad(y, (x, s), problem["dy"])
    return {"y": y.detach(), "dx": dx, "ds": ds}


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_equals_its_definition_and_its_gradients_are_those_of_it(groups: int) -> None:
    problem = draw(5, 12)
    torch.testing.assert_close(
        gated_softmax(problem["x"], problem["s"], groups), definition(problem["x"], problem["s"], groups)
    )
    inputs = [problem[name].requires_grad_() for name in ("x", "s")]
    assert torch.autograd.gradcheck(lambda x, s: gated_softmax(x, s, groups), inputs)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_dtype_stays_and_is_rounded_once(dtype: torch.dtype) -> None:
    problem = {name: value.to(dtype) for name, value in draw(4, 24).items()}
    exact = definition(problem["x"].double(), problem["s"].double(), 3)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = gated_softmax(problem["x"], problem["s"], 3)
        assert y.dtype == dtype
        # A rounding in float32 may bring a number that lies half way to the other side.
        torch.testing.assert_close(y.double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-6)
    mixed = gated_softmax(problem["x"].float(), problem["s"], 3)
    assert mixed.dtype == torch.float32


def test_what_does_not_fit_is_an_error_that_says_so() -> None:
    x = torch.zeros(2, 12)
    with pytest.raises(UsageError, match=r"x has shape \(2, 12\) and s \(2, 6\): give both \(\.\.\., D\)"):
        gated_softmax(x, x[:, :6], 1)
    for groups in (5, 0, 24):
        with pytest.raises(UsageError, match=f"groups={groups} do not divide the 12 units"):
            gated_softmax(x, x, groups)


@pytest.mark.parametrize("inputs", [2, 3])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans_are_what_the_kernels_are_promised(itemsize: int, inputs: int) -> None:
    planned = 0
    for size in range(1, 2049):
        plan = op._plan(size, itemsize, inputs)
        if plan is None:
            assert size > 256
            continue
        planned += 1
        vector = 16 // itemsize
        assert plan.lanes * (plan.values - 1) < size <= plan.lanes * plan.values
        assert plan.tile % (32 // plan.lanes) == 0
        assert plan.tile * size % vector == plan.tile * plan.pitch % vector == 0
        assert plan.warps * 32 <= 128
        assert plan.shared_bytes == plan.warps * 2 * inputs * plan.tile * plan.pitch * itemsize <= 48 * 1024
        if plan.pitch == size:
            assert plan.inverse == 0
        else:
            assert size % vector == 0
            units = size // vector
            vectors = range(plan.tile * units)
            assert all((v * plan.inverse) >> 20 == v // units for v in vectors)
            assert vectors[-1] * plan.inverse < 2**31
    assert planned > 1000


@pytest.fixture
def kernels_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gated_softmax.cuh computes, on the CPU: so the op around it is tested without a GPU."""

    def launch(direction: str, groups: int, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        x, s, *rest = (t.double() for t in inputs)
        shares = x.unflatten(-1, (groups, -1)).softmax(-1)
        gate, open_ = s * s.sigmoid(), s.sigmoid()
        if direction == "forward":
            outputs[0].copy_(shares.flatten(-2) * gate)
            return
        (dy,), (dx, ds) = rest, outputs
        through = (dy * gate).view_as(shares)
        dx.copy_((shares * (through - (shares * through).sum(-1, keepdim=True))).flatten(-2))
        ds.copy_(dy * shares.flatten(-2) * (open_ + gate * (1 - open_)))

    monkeypatch.setattr(op, "_launch", launch)
    monkeypatch.setattr(op, "_has_kernel", lambda *arguments: True)


@pytest.mark.usefixtures("kernels_in_pytorch")
def test_the_op_brings_every_gradient_to_its_place_and_saves_its_inputs_alone() -> None:
    problem = {name: value.float() for name, value in draw(5, 12).items()}
    torch.testing.assert_close(solve(problem, 3), solve(problem, 3, plain=True))
    x, s = problem["x"].requires_grad_(), problem["s"].requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gated_softmax(x, s, 3)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), s.data_ptr()}
    (dx,) = torch.autograd.grad(y, x, problem["dy"], create_graph=True)
    with pytest.raises(UsageError, match="cannot be differentiated itself"):
        dx.sum().backward()


@pytest.mark.usefixtures("kernels_in_pytorch")
def test_the_op_is_registered_as_pytorch_asks() -> None:
    problem = draw(3, 8)
    x, s = (problem[name].float().requires_grad_() for name in ("x", "s"))
    torch.library.opcheck(torch.ops.elman.gated_softmax.default, (x, s, 2))


def counting_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    launch = op._launch

    def count(direction: str, *rest: Any) -> None:
        launched.append(direction)
        launch(direction, *rest)

    monkeypatch.setattr(op, "_launch", count)
    return launched


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 5), (700, 32)])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_err_no_more_than_plain_pytorch(
    size: int, rows: int, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = {name: value.to(dtype) for name, value in draw(rows, groups * size, device="cuda").items()}
    exact = solve({name: value.double() for name, value in rounded.items()}, groups, plain=True)
    plain = solve(rounded, groups, plain=True)
    launched = counting_kernels(monkeypatch)
    torch.full((2**26,), torch.nan, device="cuda")  # what is not written shall show
    ours, again = solve(rounded, groups), solve(rounded, groups)
    runs = op._plan(size, dtype.itemsize, 3) is not None
    assert launched == ["forward", "backward"] * 2 * runs
    for name, truth in exact.items():
        assert ours[name].dtype == dtype
        assert torch.equal(ours[name], again[name]), name
        errors = [float((found[name].double() - truth).norm()) for found in (ours, plain)]
        # Of one number alone the gradient of the softmax is 0, and of a few plain PyTorch may be right by luck.
        allowed = 1.5 * errors[1] + torch.finfo(dtype).eps * float(truth.norm()) + 1e-6 * float(rounded["dy"].norm())
        assert errors[0] <= allowed, (name, errors)


@pytest.mark.gpu
def test_what_the_kernels_cannot_run_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = counting_kernels(monkeypatch)
    for size, dtype in ((4, torch.float64), (2049, torch.bfloat16), (1009, torch.bfloat16)):
        problem = {name: value.to(dtype) for name, value in draw(3, 2 * size, device="cuda").items()}
        torch.testing.assert_close(solve(problem, 2), solve(problem, 2, plain=True), rtol=2e-2, atol=1e-2)
    assert not launched


@pytest.mark.gpu
def test_strided_and_unaligned_inputs_give_the_same_bits() -> None:
    rounded = {name: value.bfloat16() for name, value in draw(6, 74, device="cuda").items()}
    expected = solve(rounded, 2)
    unaligned = {
        name: torch.empty(value.numel() + 1, device="cuda", dtype=value.dtype)[1:].view(value.shape).copy_(value)
        for name, value in rounded.items()
    }
    strided = {name: value.repeat_interleave(2, dim=-1)[..., ::2] for name, value in rounded.items()}
    for problem in (unaligned, strided):
        torch.testing.assert_close(solve(problem, 2), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_nan_spoils_its_group_and_no_other() -> None:
    rounded = {name: value.bfloat16() for name, value in draw(6, 74, device="cuda").items()}
    rounded["x"][2, 40] = torch.nan
    spoilt = solve(rounded, 2)["y"].isnan()
    assert spoilt[2, 37:].all()
    assert int(spoilt.sum()) == 37
