"""The short convolution: its definition, the backward pass written by hand, and what the kernels are given and make."""

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import short_conv
from elman.ops.cuda.compiler import flatten

module = sys.modules["elman.ops.short_conv"]
NAMES = ("u", "weight", "last")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def draw(
    seq_len: int = 11,
    batch: int = 3,
    hidden: int = 6,
    taps: int = 4,
    *,
    with_last: bool = True,
    with_reset: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Inputs and the gradients of both outputs, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    drawn = {
        "u": normal(seq_len, batch, hidden),
        "weight": normal(taps, hidden),
        "last": normal(batch, taps - 1, hidden),
        "dv": normal(seq_len, batch, hidden),
        "dleft": normal(batch, taps - 1, hidden),
        "reset": torch.rand(seq_len, batch, generator=generator) < 0.2,
    }
    absent = {"last": not with_last, "reset": not with_reset}
    return {name: value.to(device) for name, value in drawn.items() if not absent.get(name)}


def rounded(problem: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As in training: sequences of this dtype, the weights of what is summed in."""
    real = F64 if dtype == F64 else F32
    dtypes = {"weight": real, "reset": torch.bool}
    return {name: value.to(dtypes.get(name, dtype)) for name, value in problem.items()}


def solve(
    problem: dict[str, Tensor], by: str, silu: bool = True, wanted: tuple[str, ...] = ("dv", "dleft")
) -> dict[str, Tensor]:
    """Both outputs and every gradient, of the reference or of the op with a backward pass of its own."""
    inputs = {name: problem[name].clone().requires_grad_() for name in NAMES if name in problem}
    given = (inputs["u"], inputs["weight"], inputs.get("last"), problem.get("reset"), silu)
    v, left = module._reference(*given) if by == "reference" else torch.ops.elman.short_conv(*given)
    outputs = {"dv": v, "dleft": left}
    gradients = torch.autograd.grad(
        [outputs[name] for name in wanted],
        list(inputs.values()),
        [problem[name].to(outputs[name].dtype) for name in wanted],
        materialize_grads=True,
    )
    named = {f"d_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"v": v.detach(), "left": left.detach(), **named}


@pytest.mark.parametrize("silu", [True, False])
def test_equals_its_definition(silu: bool) -> None:
    p = draw()
    v, left = short_conv(
        p["u"], p["weight"], p["last"], activation="silu" if silu else "identity", reset=p["reset"]
    )  # fmt: skip
    for row in range(3):
        seen = list(p["last"][row])
        for t in range(len(p["u"])):
            seen = [torch.zeros_like(x) for x in seen] if p["reset"][t, row] else seen
            seen.append(p["u"][t, row])
            s = sum(p["weight"][lag] * seen[-1 - lag] for lag in range(4))
            torch.testing.assert_close(v[t, row], s * torch.sigmoid(s) if silu else s)
        torch.testing.assert_close(left[row], torch.stack(seen[-3:]))


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_gradcheck_of_every_input(activation: Any) -> None:
    p = draw(5, 2, 3)
    inputs = [p[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: short_conv(*x, activation=activation, reset=p["reset"]), inputs)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
@pytest.mark.parametrize("seq_len", [1, 3, 16])
@pytest.mark.parametrize(("with_last", "with_reset"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_backward_pass_by_hand_is_that_of_autograd(
    taps: int, seq_len: int, with_last: bool, with_reset: bool, silu: bool
) -> None:
    p = draw(seq_len, taps=taps, with_last=with_last, with_reset=with_reset)
    for wanted in (("dv", "dleft"), ("dv",), ("dleft",)):
        torch.testing.assert_close(solve(p, "op", silu, wanted), solve(p, "reference", silu, wanted))


def test_what_the_compiler_is_told_is_what_the_op_does() -> None:
    p = draw()
    torch.library.opcheck(torch.ops.elman.short_conv, (*(p[name].requires_grad_() for name in NAMES), p["reset"], True))
    torch.library.opcheck(torch.ops.elman.short_conv, (p["u"], p["weight"], None, None, False))


def test_the_backward_pass_of_the_op_cannot_be_differentiated() -> None:
    p = draw()
    v, _ = torch.ops.elman.short_conv(p["u"].requires_grad_(), p["weight"], None, None, True)
    (gradient,) = torch.autograd.grad(v.square().sum(), p["u"], create_graph=True)
    with pytest.raises(UsageError, match="cannot be differentiated itself"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_chunks_with_carried_inputs_equal_one_piece(dtype: torch.dtype) -> None:
    p = rounded(draw(), dtype)
    whole, end = short_conv(p["u"], p["weight"], p["last"], reset=p["reset"])
    for cut in range(1, 11):
        last, pieces = p["last"], []
        for part in (slice(0, cut), slice(cut, 11)):
            v, last = short_conv(p["u"][part], p["weight"], last, reset=p["reset"][part])
            pieces.append(v)
        assert torch.equal(torch.cat(pieces), whole)
        assert torch.equal(last, end)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": None}, "u is a NoneType: give a tensor"),
        ({"last": [0.0]}, "last is a list: give a tensor"),
        ({"weight": torch.zeros(4, 6, dtype=torch.long)}, "weight has dtype torch.int64: give floating point"),
        ({"weight": torch.zeros(4, 6, device="meta")}, "weight is on meta but u is on cpu: move one to the other"),
        ({"u": torch.zeros(3, 4)}, r"u has shape \(3, 4\)"),
        ({"u": torch.zeros(0, 3, 6)}, "T at least 1"),
        ({"u": torch.zeros(11, 3, 6, dtype=torch.long)}, "dtype torch.int64"),
        ({"weight": torch.zeros(4, 5)}, r"weight has shape \(4, 5\): give \(taps, H\), H being 6"),
        ({"last": torch.zeros(3, 4, 6)}, r"last has shape \(3, 4, 6\): give \(3, 3, 6\)"),
        ({"reset": torch.zeros(11, 3)}, "reset has dtype torch.float32"),
        ({"reset": torch.zeros(3, 11)}, r"reset has shape \(3, 11\): give \(11, 3\)"),
        ({"activation": "relu"}, "activation='relu' is unknown: choose identity or silu"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    p: dict[str, Any] = {**draw(), "activation": "silu", **change}
    with pytest.raises(UsageError, match=message):
        short_conv(p["u"], p["weight"], p["last"], activation=p["activation"], reset=p["reset"])


def parameters(direction: str) -> list[str]:
    """The names of a kernel's parameters, in order."""
    found = re.search(rf"short_conv_{direction}\(([^)]*)\)", flatten("short_conv.cuh"))
    assert found is not None
    return [part.split()[-1].lstrip("*") for part in found[1].split(",")]


@pytest.mark.parametrize(("with_last", "with_reset"), [(True, True), (False, False)])
def test_launches_compute_the_convolution(monkeypatch: pytest.MonkeyPatch, with_last: bool, with_reset: bool) -> None:
    """Without a GPU: a launch is run in PyTorch on the tensors that it names."""

    def launch(direction: str, u: Tensor, weight: Tensor, silu: bool, arguments: tuple[Any, ...]) -> None:
        x = dict(zip(parameters(direction)[:-4], arguments, strict=True))
        assert parameters(direction)[-4:] == ["steps", "batch", "hidden", "piece"]
        if direction == "forward":
            made = module._reference(x["u"], x["weight"], x["last"], x["reset"], silu)
            results = ("v", "left")
        else:
            given = (x["dv"], x["dleft"], x["u"], x["weight"], x["last"], x["reset"], silu)
            du, dweight, dlast = module._differentiate_by_hand(*given)
            parts = x["dweight"].shape[0] * x["dweight"].shape[1]
            made, results = (du, dweight / parts, dlast), ("du", "dweight", "dlast")
        for name, value in zip(results, made, strict=True):
            x[name].copy_(value)

    monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(module, "_has_kernel", lambda u, weight: True)
    p = draw(70, with_last=with_last, with_reset=with_reset)
    torch.testing.assert_close(solve(p, "op"), solve(p, "reference"))


def test_names_of_kernels_are_those_that_are_compiled() -> None:
    for dtype, most in ((BF16, 4), (F32, 2), (F64, 1)):
        for hidden in (8, 7):
            width = module._width(torch.zeros(2, 3, hidden, dtype=dtype))
            assert width == (most if hidden == 8 else 1)
            for direction in ("forward", "backward"):
                for silu in (True, False):
                    names = module._module(dtype, 4, silu).kernels
                    assert module._kernel_name(direction, dtype, width, 4, silu) in names


@pytest.mark.parametrize(("shape", "piece"), [((1, 1, 8), 32), ((512, 128, 1280), 40), ((512, 512, 3840), 256)])
def test_pieces_are_as_long_as_threads_are_many(shape: tuple[int, int, int], piece: int) -> None:
    assert module._piece(torch.empty(shape, dtype=BF16, device="meta")) == piece


SHAPES = [(1, 1, 1, 2), (2, 3, 8, 4), (5, 3, 7, 2), (64, 4, 96, 4), (37, 2, 130, 8), (200, 3, 20, 3), (512, 8, 256, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_err_no_more_than_plain_pytorch(
    shape: tuple[int, int, int, int],
    present: bool,
    silu: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = rounded(draw(*shape, with_last=present, with_reset=present, device="cuda"), dtype)
    truth = solve({name: x if x.dtype == torch.bool else x.double() for name, x in p.items()}, "reference", silu)
    plain = solve(p, "reference", silu)
    launched: list[str] = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda direction, *x: (launched.append(direction), launch(direction, *x)))
    torch.full((2**26,), torch.nan, device="cuda")  # what is not written shall show
    ours, again = solve(p, "op", silu), solve(p, "op", silu)
    assert launched == ["forward", "backward"] * 2
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert torch.equal(ours[name], again[name]), name
        norm = exact.norm().clamp_min(1e-30)
        errors = [(found[name].double() - exact).norm() / norm for found in (ours, plain)]
        luck = 1e-12 if dtype == F64 else 1e-5 if p["u"][0].numel() < 64 else 2e-6
        assert errors[0] <= 1.5 * errors[1] + luck, (name, errors)
