"""The kernels of the short convolution, run by a host's threads: windows, pieces and their borders."""

import numpy as np
import pytest
import torch
from torch import Tensor

from elman.ops import short_conv as short_conv_function
from tests.ops.cuda.host import HostKernels, aligned
from tests.ops.test_short_conv import draw, module, rounded, solve

assert short_conv_function is module.short_conv
KINDS = [
    (torch.float32, 2, 4, True),
    (torch.bfloat16, 4, 4, True),
    (torch.float32, 1, 4, False),
    (torch.float32, 1, 2, True),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    names = [module._kernel_name(direction, *kind) for kind in KINDS for direction in ("forward", "backward")]
    return HostKernels(tmp_path_factory.mktemp("kernels"), "short_conv.cuh", names)


def run(
    kernels: HostKernels, p: dict[str, Tensor], kind: tuple[torch.dtype, int, int, bool], piece: int
) -> dict[str, Tensor]:
    """What the kernels leave, every number of it NaN before."""
    dtype, width, taps, _ = kind
    x = {name: aligned(value) for name, value in p.items()}
    seq_len, batch, hidden = p["u"].shape
    pieces = -(-seq_len // piece)
    shapes = {"v": p["u"].shape, "left": p["dleft"].shape, "d_u": p["u"].shape, "d_last": p["dleft"].shape}
    made = {name: aligned(torch.full(shape, torch.nan, dtype=dtype)) for name, shape in shapes.items()}
    made["d_weight"] = torch.full((pieces, batch, taps, hidden), torch.nan)
    given = [x["u"], x["weight"], x.get("last"), x.get("reset")]
    blocks = -(-pieces * batch * hidden // width // 128)
    for direction, arguments in (
        ("forward", [*given, made["v"], made["left"]]),
        ("backward", [x["dv"], x["dleft"], *given, made["d_u"], made["d_weight"], made["d_last"]]),
    ):
        kernels.launch(
            module._kernel_name(direction, *kind), blocks, 128, [*arguments, seq_len, batch, hidden, piece]
        )  # fmt: skip
    return {**made, "d_weight": made["d_weight"].sum((0, 1))}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize(("seq_len", "piece"), [(1, 32), (2, 32), (7, 32), (7, 2), (9, 4), (40, 16), (8, 1)])
def test_the_kernels_compute_the_definition(
    kernels: HostKernels, kind: tuple[torch.dtype, int, int, bool], present: bool, seq_len: int, piece: int
) -> None:
    dtype, _, taps, silu = kind
    p = rounded(draw(seq_len, 3, 8, taps, with_last=present, with_reset=present), dtype)
    exact = {name: value if value.dtype == torch.bool else value.double() for name, value in p.items()}
    expected, ours = solve(exact, "reference", silu), run(kernels, p, kind, piece)
    for name, value in expected.items():
        np.testing.assert_allclose(
            ours[name].double().numpy(), value.numpy(), rtol=1.01 * torch.finfo(ours[name].dtype).eps / 2 + 1e-5,
            atol=1e-5, err_msg=name,
        )  # fmt: skip
