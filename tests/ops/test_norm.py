"""The norm of a sum: its definition on the CPU, its kernels on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from elman.errors import UsageError
from elman.ops import add_norm, norm

HALVES = (torch.bfloat16, torch.float16)


def draw(rows: int, width: int, *, with_y: bool = True, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Inputs, and the gradients of both outputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    names = ("x", *("y" * with_y), "ds", "dn")
    drawn = {name: torch.randn(rows, width, generator=generator, dtype=torch.float64) for name in names}
    drawn["weight"] = 1 + 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
    return {name: value.to(device) for name, value in drawn.items()}


def in_dtypes(problem: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As in training: stream and weight float32, branch and result of this dtype."""
    return {name: value.to(dtype if name in ("y", "dn") else torch.float32) for name, value in problem.items()}


def solve(problem: dict[str, Tensor], dtype: torch.dtype, plain: bool = False) -> dict[str, Tensor]:
    """Both outputs and every gradient. ``plain`` does without the kernels."""
    inputs = {name: problem[name].clone().requires_grad_() for name in ("x", "y", "weight") if name in problem}
    if plain:
        s = inputs["x"] + inputs["y"] if "y" in inputs else inputs["x"]
        n = torch.nn.functional.rms_norm(s, s.shape[-1:], inputs["weight"], torch.finfo(torch.float32).eps).to(dtype)
    else:
        eps = torch.finfo(torch.float32).eps
        s, n = add_norm(inputs["x"], inputs.get("y"), inputs["weight"], eps=eps, dtype=dtype)
    gradients = torch.autograd.grad((s, n), list(inputs.values()), (problem["ds"], problem["dn"]))
    named = {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"s": s.detach(), "n": n.detach(), **named}


@pytest.mark.parametrize("with_y", [True, False])
def test_equals_its_definition_and_its_gradients_are_those_of_it(with_y: bool) -> None:
    problem = draw(5, 12, with_y=with_y)
    s, n = add_norm(problem["x"], problem.get("y"), problem["weight"], eps=1e-3)
    expected = problem["x"] + problem["y"] if with_y else problem["x"]
    torch.testing.assert_close(s, expected)
    scale = (expected.square().mean(-1, keepdim=True) + 1e-3) ** -0.5
    torch.testing.assert_close(n, expected * scale * problem["weight"])
    inputs = [problem[name].requires_grad_() for name in ("x", "weight", *("y" * with_y))]
    torch.autograd.gradcheck(lambda x, weight, *y: add_norm(x, y[0] if y else None, weight), inputs)


def test_the_stream_keeps_its_dtype_and_the_norm_takes_the_one_asked_for() -> None:
    problem = in_dtypes(draw(3, 8), torch.bfloat16)
    s, n = add_norm(problem["x"], problem["y"], problem["weight"], dtype=torch.bfloat16)
    assert (s.dtype, n.dtype) == (torch.float32, torch.bfloat16)
    s, n = add_norm(problem["x"], problem["y"], problem["weight"])
    assert (s.dtype, n.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_stream_as_small_as_an_embedding_starts_is_normed_too(dtype: torch.dtype) -> None:
    """Its mean square, 4e-4, is less than bfloat16's machine epsilon."""
    x = (0.02 * draw(7, 64, with_y=False)["x"]).to(dtype)
    _, n = add_norm(x, None, torch.ones(64, dtype=dtype))
    expected = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert ((n - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()


def test_a_stream_in_float64_is_normed_as_in_float32() -> None:
    """Another epsilon would be another model: of small streams it is not small."""
    x = 1e-4 * draw(7, 64, with_y=False)["x"]
    torch.testing.assert_close(
        add_norm(x.double(), None, torch.ones(64, dtype=torch.float64))[1].float(),
        add_norm(x.float(), None, torch.ones(64))[1],
    )


@pytest.fixture
def kernels_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What norm.cuh computes, on the CPU: so the op around it is tested without a GPU."""

    def launch(direction: str, dtype: torch.dtype, like: Tensor, arguments: tuple[Any, ...]) -> None:
        if direction == "forward":
            x, y, weight, s, n, r, eps = arguments
            total = x if y is None else s.copy_(x + y)
            r.copy_((total.square().mean(-1) + eps).rsqrt())
            n.copy_(total * r[..., None] * weight)
            return
        dn, ds, s, weight, r, dx, dy, parts = arguments
        scale, g = r[..., None], dn * weight
        dx.copy_(scale * (g - s * scale.square() * (g * s).mean(-1, keepdim=True)) + (0 if ds is None else ds))
        if dy is not None:
            dy.copy_(dx)
        parts.copy_(torch.stack([part.sum(0) for part in (dn * s * scale).tensor_split(len(parts))]))

    monkeypatch.setattr(norm, "_launch", launch)
    monkeypatch.setattr(norm, "_blocks", lambda direction, x: 2)
    monkeypatch.setattr(norm, "_has_kernel", lambda *arguments: True)


@pytest.mark.usefixtures("kernels_in_pytorch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_y", [True, False])
def test_the_op_brings_every_gradient_to_its_place(with_y: bool, dtype: torch.dtype) -> None:
    problem = in_dtypes(draw(5, 12, with_y=with_y), dtype)
    torch.testing.assert_close(solve(problem, dtype), solve(problem, dtype, plain=True))


@pytest.mark.usefixtures("kernels_in_pytorch")
def test_the_gradient_of_one_output_alone_and_none_of_a_gradient() -> None:
    problem = in_dtypes(draw(6, 8), torch.bfloat16)
    inputs = [problem[name].clone().requires_grad_() for name in ("x", "y", "weight")]
    s, n = add_norm(*inputs, eps=torch.finfo(torch.float32).eps, dtype=torch.bfloat16)
    for name, output in (("s", s), ("n", n)):
        other = "dn" if name == "s" else "ds"
        expected = solve({**problem, other: torch.zeros_like(problem[other])}, torch.bfloat16, plain=True)
        found = torch.autograd.grad(
            output, inputs, problem[f"d{name}"], materialize_grads=True, retain_graph=True, create_graph=True
        )
        for of, gradient in zip(("x", "y", "weight"), found, strict=True):
            torch.testing.assert_close(gradient.detach(), expected[f"d{of}"])
    with pytest.raises(UsageError, match="cannot be differentiated itself"):
        found[0].sum().backward()


def counting_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    launch = norm._launch
    monkeypatch.setattr(
        norm, "_launch", lambda direction, *rest: (launched.append(direction), launch(direction, *rest))
    )
    return launched


SHAPES = [(1, 4), (3, 8), (5, 60), (1000, 128), (300, 1280), (7, 2052), (4096, 1280), (9, 4100), (20, 8192)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_kernels_err_no_more_than_plain_pytorch(
    rows: int, width: int, with_y: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw(rows, width, with_y=with_y, device="cuda")
    rounded = in_dtypes(problem, dtype)
    truth = solve({name: value.double() for name, value in rounded.items()}, torch.float64, plain=True)
    plain = solve(rounded, dtype, plain=True)
    launched = counting_kernels(monkeypatch)
    torch.full((2**26,), torch.nan, device="cuda")  # what is not written shall show
    ours, again = solve(rounded, dtype), solve(rounded, dtype)
    assert launched == ["forward", "backward"] * 2
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert torch.equal(ours[name], again[name]), name
        errors = [float((found[name].double() - exact).norm() / exact.norm()) for found in (ours, plain)]
        # Of a few numbers plain PyTorch may be right by luck; a rounding to the result's dtype is always allowed.
        assert errors[0] <= 1.5 * errors[1] + torch.finfo(ours[name].dtype).eps, (name, errors)


@pytest.mark.gpu
def test_what_the_kernels_cannot_run_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = counting_kernels(monkeypatch)
    for rows, width, dtype in ((3, 6, torch.bfloat16), (2, 8196, torch.bfloat16), (3, 8, torch.float64)):
        problem = {name: value.to(dtype) for name, value in draw(rows, width, device="cuda").items()}
        torch.testing.assert_close(solve(problem, dtype), solve(problem, dtype, plain=True))
    assert not launched


@pytest.mark.gpu
def test_strided_and_unaligned_inputs_give_the_same_bits() -> None:
    rounded = in_dtypes(draw(6, 64, device="cuda"), torch.bfloat16)
    expected = solve(rounded, torch.bfloat16)
    unaligned = {
        name: torch.empty(value.numel() + 1, device="cuda", dtype=value.dtype)[1:].view(value.shape).copy_(value)
        for name, value in rounded.items()
    }
    strided = {name: value.repeat_interleave(2, dim=-1)[..., ::2] for name, value in rounded.items()}
    for problem in (unaligned, strided):
        torch.testing.assert_close(solve(problem, torch.bfloat16), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("with_y", [True, False])
def test_the_op_is_registered_as_pytorch_asks(with_y: bool) -> None:
    problem = in_dtypes(draw(6, 64, with_y=with_y, device="cuda"), torch.bfloat16)
    x, weight = problem["x"].requires_grad_(), problem["weight"].requires_grad_()
    y = problem["y"].requires_grad_() if with_y else None
    torch.library.opcheck(torch.ops.elman.add_norm.default, (x, y, weight, 1e-6, torch.bfloat16))
