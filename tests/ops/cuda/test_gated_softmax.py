"""The kernels of the gated softmax, run by a host's threads: tiles, copies and lanes. Shared memory starts as NaN."""

import numpy as np
import pytest
import torch
from torch import Tensor

from elman.ops import gated_softmax as op
from tests.ops.cuda.host import HostKernels, aligned
from tests.ops.test_gated_softmax import SIZES, definition


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    names = {
        op._name(direction, dtype, plan.lanes, plan.values): None
        for dtype in (torch.float32, torch.bfloat16)
        for size in SIZES
        for plan in [op._plan(size, dtype.itemsize, 3)]
        if plan is not None
        for direction in ("forward", "backward")
    }
    return HostKernels(tmp_path_factory.mktemp("kernels"), "gated_softmax.cuh", [*names], "gated_softmax::memory")


def run(
    kernels: HostKernels, direction: str, inputs: list[Tensor], outputs: int, size: int, turns: int
) -> list[Tensor]:
    """On two warps a block, whatever the plan has: enough to see that they do not mix."""
    like = inputs[0]
    plan = op._plan(size, like.itemsize, len(inputs))
    assert plan is not None
    warps, groups = min(plan.warps, 2), like.numel() // size
    made = [aligned(torch.full_like(like, torch.nan)) for _ in range(outputs)]
    arguments = [*map(aligned, inputs), *made, groups, size, plan.tile, plan.pitch, plan.inverse, turns]
    name = op._name(direction, like.dtype, plan.lanes, plan.values)
    kernels.launch(name, -(-groups // (plan.tile * turns * warps)), 32 * warps, arguments)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_compute_the_definition(kernels: HostKernels, size: int, dtype: torch.dtype) -> None:
    """Of more tiles than warps, the last one not whole."""
    plan = op._plan(size, dtype.itemsize, 3)
    if plan is None:
        pytest.skip("plain PyTorch runs these")
    generator = torch.Generator().manual_seed(0)
    groups = 7 * plan.tile + max(1, plan.tile // 3)
    x, s, dy = (2 * torch.randn(groups, size, generator=generator).to(dtype) for _ in range(3))
    exact = [t.double().requires_grad_() for t in (x, s)]
    y = definition(*exact, 1)
    expected = [y.detach(), *torch.autograd.grad(y, exact, dy.double())]
    ours = run(kernels, "forward", [x, s], 1, size, 2) + run(kernels, "backward", [x, s, dy], 2, size, 2)
    for name, a, b in zip(("y", "dx", "ds"), ours, expected, strict=True):
        np.testing.assert_allclose(
            a.double().numpy(), b.numpy(), rtol=1.01 * torch.finfo(dtype).eps / 2 + 1e-5, atol=3e-6, err_msg=name
        )
