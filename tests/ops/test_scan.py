"""The linear scan against running step by step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elman.ops import linear_scan

B, H = 3, 4


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("keep", [0.01, 0.9, 0.999])
def test_float32_errs_no_more_than_step_by_step(keep: float, device: str) -> None:
    a, b, h0, _ = inputs(512, device)
    a = keep ** (a.abs() + 0.1)
    exact = step_by_step(a, b, h0, None)
    single = [tensor.float() for tensor in (a, b, h0)]
    errors = [(h.double() - exact).norm() for h in (linear_scan(*single), step_by_step(*single, None))]
    assert 0 < errors[0] <= 1.5 * errors[1]
