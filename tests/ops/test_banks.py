"""The banks: their definition, the backward pass written by hand, and what the kernels are given and make of it."""

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import banks
from elman.ops.cuda.compiler import flatten

module = sys.modules["elman.ops.banks"]
NAMES = ("h", "z", "decay", "m0")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def draw(
    seq_len: int = 11,
    batch: int = 3,
    hidden: int = 6,
    k: int = 4,
    *,
    with_m0: bool = True,
    with_reset: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Inputs and the gradients of both outputs, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    drawn = {
        "h": normal(seq_len, batch, hidden).tanh(),
        "z": normal(seq_len, batch, k + 1, hidden),
        "decay": (1.5 + normal(k, hidden)).sigmoid(),
        "m0": normal(batch, k, hidden),
        "dy": normal(seq_len, batch, hidden),
        "dm": normal(batch, k, hidden),
        "reset": torch.rand(seq_len, batch, generator=generator) < 0.2,
    }
    absent = {"m0": not with_m0, "reset": not with_reset}
    return {name: value.to(device) for name, value in drawn.items() if not absent.get(name)}


def rounded(problem: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As in training: sequences of this dtype, the banks and their decays of what that is summed in."""
    real = F64 if dtype == F64 else F32
    dtypes = {"h": dtype, "z": dtype, "dy": dtype, "reset": torch.bool}
    return {name: value.to(dtypes.get(name, real)) for name, value in problem.items()}


def solve(problem: dict[str, Tensor], by: str, wanted: tuple[str, ...] = ("dy", "dm")) -> dict[str, Tensor]:
    """Both outputs and every gradient, of the reference or of the op with a backward pass of its own."""
    inputs = {name: problem[name].clone().requires_grad_() for name in NAMES if name in problem}
    given = (inputs["h"], inputs["z"], inputs["decay"], inputs.get("m0"), problem.get("reset"))
    y, m, _ = module._reference(*given) if by == "reference" else torch.ops.elman.banks(*given, True)
    outputs = {"dy": y, "dm": m}
    gradients = torch.autograd.grad(
        [outputs[name] for name in wanted],
        list(inputs.values()),
        [problem[name].to(outputs[name].dtype) for name in wanted],
        materialize_grads=True,
    )
    named = {f"d_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), "m": m.detach(), **named}


def test_equals_its_definition() -> None:
    p = draw()
    y, last = banks(p["h"], p["z"], p["decay"], p["m0"], reset=p["reset"])
    for row in range(3):
        m = p["m0"][row]
        for t in range(len(p["h"])):
            m = torch.zeros_like(m) if p["reset"][t, row] else m
            h, z = p["h"][t, row], p["z"][t, row]
            m = p["decay"] * m + (1 - p["decay"]) * h
            expected = h * z[0] * torch.sigmoid(z[0]) + (m * z[1:] * torch.sigmoid(z[1:])).sum(0)
            torch.testing.assert_close(y[t, row], expected)
        torch.testing.assert_close(last[row], m)


def test_gradcheck_of_every_input() -> None:
    p = draw(5, 2, 3)
    inputs = [p[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: banks(*x, reset=p["reset"]), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: banks(*x, reset=p["reset"])[0], inputs)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("seq_len", [1, 7, 16])
@pytest.mark.parametrize(("with_m0", "with_reset"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_backward_pass_by_hand_is_that_of_autograd(k: int, seq_len: int, with_m0: bool, with_reset: bool) -> None:
    p = draw(seq_len, k=k, with_m0=with_m0, with_reset=with_reset)
    for wanted in (("dy", "dm"), ("dy",), ("dm",)):
        torch.testing.assert_close(solve(p, "op", wanted), solve(p, "reference", wanted))


def test_what_the_compiler_is_told_is_what_the_op_does() -> None:
    p = draw()
    given = (*(p[name].requires_grad_() for name in NAMES), p["reset"])
    torch.library.opcheck(torch.ops.elman.banks, (*given, True))
    torch.library.opcheck(torch.ops.elman.banks, (*(x.detach() for x in given), False))


def test_the_backward_pass_of_the_op_cannot_be_differentiated() -> None:
    p = draw()
    h = p["h"].requires_grad_()
    y, _, _ = torch.ops.elman.banks(h, p["z"], p["decay"], None, None, True)
    (gradient,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
    with pytest.raises(UsageError, match="cannot be differentiated itself"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_chunks_with_carried_banks_equal_one_piece(dtype: torch.dtype) -> None:
    p = rounded(draw(), dtype)
    whole, last = banks(p["h"], p["z"], p["decay"], p["m0"], reset=p["reset"])
    for cut in range(1, 11):
        m, pieces = p["m0"], []
        for part in (slice(0, cut), slice(cut, 11)):
            y, m = banks(p["h"][part], p["z"][part], p["decay"], m, reset=p["reset"][part])
            pieces.append(y)
        assert torch.equal(torch.cat(pieces), whole)
        assert torch.equal(m, last)


def test_a_slow_bank_takes_what_bf16_would_lose() -> None:
    """Towards 1 in steps of a thousandth: bf16 would stop where a step is less than half its last place."""
    ones = torch.ones(4000, 1, 1, dtype=BF16)
    _, m = banks(ones, torch.zeros(4000, 1, 2, 1, dtype=BF16), torch.full((1, 1), 0.999))
    assert m.dtype == F32
    assert m.item() == pytest.approx(1 - 0.999**4000, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(3, 4)}, r"h has shape \(3, 4\)"),
        ({"h": torch.zeros(0, 3, 6)}, "T at least 1"),
        ({"z": torch.zeros(11, 3, 4, 6)}, r"z has shape \(11, 3, 4, 6\): give \(11, 3, 5, 6\)"),
        ({"z": torch.zeros(11, 3, 5, 6)}, "z has dtype torch.float32 but h has torch.float64"),
        ({"decay": torch.zeros(4, 5)}, r"decay has shape \(4, 5\): give \(k, H\), H being 6"),
        ({"m0": torch.zeros(3, 6)}, r"m0 has shape \(3, 6\): give \(3, 4, 6\)"),
        ({"reset": torch.zeros(11, 3)}, "reset has dtype torch.float32"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    p = {**draw(), **change}
    with pytest.raises(UsageError, match=message):
        banks(p["h"], p["z"], p["decay"], p["m0"], reset=p["reset"])


def parameters(direction: str) -> list[str]:
    """The names of a kernel's parameters, in order."""
    found = re.search(rf"banks_{direction}\(([^)]*)\)", flatten("banks.cuh"))
    assert found is not None
    return [part.split()[-1].lstrip("*") for part in found[1].split(",")]


@pytest.mark.parametrize(("with_m0", "with_reset"), [(True, True), (False, False)])
def test_launches_compute_the_banks(monkeypatch: pytest.MonkeyPatch, with_m0: bool, with_reset: bool) -> None:
    """Without a GPU: a launch is run in PyTorch on the tensors that it names."""
    has_kernel = [True]

    def launch(direction: str, h: Tensor, decay: Tensor, arguments: tuple[Any, ...]) -> None:
        x = dict(zip(parameters(direction), [*arguments, *h.shape], strict=True))
        assert list(x)[-3:] == ["steps", "batch", "hidden"]
        has_kernel[0] = False
        if direction == "forward":
            save = x["checkpoints"] is not None
            made = module._forward(x["h"], x["z"], x["decay"], x["m0"], x["reset"], save)
            results = ("y", "m_last", "checkpoints") if save else ("y", "m_last")
        else:
            given = (x["dy"], x["dm_last"], x["h"], x["z"], x["decay"], x["reset"], x["checkpoints"])
            dh, dz, ddecay, dm0 = module._backward(*given)
            made, results = (dh, dz, ddecay / h.shape[1], dm0), ("dh", "dz", "ddecay", "dm0")
        for name, value in zip(results, made, strict=False):
            x[name].copy_(value)
        has_kernel[0] = True

    monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(module, "_has_kernel", lambda h, decay: has_kernel[0])
    p = draw(with_m0=with_m0, with_reset=with_reset)
    torch.testing.assert_close(solve(p, "op"), solve(p, "reference"))
    unsaved = torch.ops.elman.banks(p["h"], p["z"], p["decay"], p.get("m0"), p.get("reset"), False)
    torch.testing.assert_close(unsaved[0], solve(p, "reference")["y"])


def test_names_of_kernels_are_those_that_are_compiled() -> None:
    for dtype in (BF16, F32, F64):
        for k in (1, 4, 16):
            for hidden in (6, 7):
                width = module._width(torch.zeros(2, 3, hidden, dtype=dtype), k)
                assert width == (2 if dtype == BF16 and hidden == 6 and k < 16 else 1)
                for direction in ("forward", "backward"):
                    assert module._kernel_name(direction, k, dtype, width) in module._module(k, dtype).kernels


SHAPES = [(1, 1, 1, 1), (5, 3, 7, 2), (64, 4, 96, 4), (37, 2, 130, 8), (16, 3, 20, 16), (512, 8, 256, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_err_no_more_than_plain_pytorch(
    shape: tuple[int, int, int, int], present: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = rounded(draw(*shape, with_m0=present, with_reset=present, device="cuda"), dtype)
    truth = solve({name: x if x.dtype == torch.bool else x.double() for name, x in p.items()}, "reference")
    plain = solve(p, "reference")
    launched: list[str] = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda direction, *x: (launched.append(direction), launch(direction, *x)))
    torch.full((2**26,), torch.nan, device="cuda")  # what is not written shall show
    ours, again = solve(p, "op"), solve(p, "op")
    assert launched == ["forward", "backward"] * 2
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert torch.equal(ours[name], again[name]), name
        norm = exact.norm().clamp_min(1e-30)
        errors = [(found[name].double() - exact).norm() / norm for found in (ours, plain)]
        luck = 1e-12 if dtype == F64 else 1e-5 if p["h"][0].numel() < 64 else 2e-6
        assert errors[0] <= 1.5 * errors[1] + luck, (name, errors)


@pytest.mark.gpu
def test_a_slice_that_is_not_aligned_is_read_right() -> None:
    p = rounded(draw(9, 2, 6, device="cuda"), BF16)
    shifted = {}
    for name, x in p.items():
        room = torch.zeros(x.numel() + 1, dtype=x.dtype, device="cuda")
        shifted[name] = room[1:].view(x.shape).copy_(x)
    torch.testing.assert_close(solve(shifted, "op"), solve(p, "op"), rtol=0, atol=0)
