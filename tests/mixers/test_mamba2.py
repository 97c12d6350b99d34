"""Mamba2's plain path against its recurrence, one step at a time, and against the official kernels."""

import importlib.metadata
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elman.errors import UsageError
from elman.mixers import Mixer, mamba2, mixer_config
from elman.ops import record_backends

T, B, D = 11, 3, 16


def build(dim: int = D, **options: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = mixer_config("mamba2")(**options).build(dim)
    mixer.initialize()
    return mixer


def step_by_step(mixer: Mixer, x: Tensor, reset: Tensor | None) -> Tensor:
    """The equations as they stand, on the parameters by their official names."""
    p = dict(mixer.named_parameters())
    d, heads = p["norm.weight"].numel(), p["D"].numel()
    n, width = (p["conv1d.weight"].shape[0] - d) // 2, p["conv1d.weight"].shape[-1]
    rows = []
    for row in range(x.shape[1]):
        window = x.new_zeros(width, d + 2 * n)
        state = x.new_zeros(heads, d // heads, n)
        outputs = []
        for t in range(len(x)):
            if reset is not None and reset[t, row]:
                window, state = torch.zeros_like(window), torch.zeros_like(state)
            z, projected, dt = (p["in_proj.weight"] @ x[t, row]).split((d, d + 2 * n, heads))
            window = torch.cat((window[1:], projected[None]))
            convolved = F.silu((window.t() * p["conv1d.weight"][:, 0]).sum(1) + p["conv1d.bias"])
            values, b, c = convolved.split((d, n, n))
            values = values.view(heads, -1)
            dt = F.softplus(dt + p["dt_bias"])
            decay = torch.exp(-dt * p["A_log"].exp())
            state = decay[:, None, None] * state + dt[:, None, None] * values[:, :, None] * b
            y = (state @ c + p["D"][:, None] * values).flatten() * F.silu(z)
            y = y * (y.square().mean() + 1e-5).rsqrt() * p["norm.weight"]
            outputs.append(p["out_proj.weight"] @ y)
        rows.append(torch.stack(outputs))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("resets", [False, True])
def test_the_chunked_form_is_the_recurrence(chunk: int, resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2, "_CHUNK", chunk)
    mixer = build(d_state=6, headdim=8).double()
    x = 5 * torch.randn(T, B, D, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 0] = reset[3, 0] = reset[5, 1] = reset[6, 1] = reset[T - 1, 2] = resets
    y, _ = mixer(x, None, reset if resets else None)
    torch.testing.assert_close(y, step_by_step(mixer, x, reset))


def test_chunks_of_the_kernel_and_of_the_caller_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2, "_CHUNK", 4)
    mixer = build(d_state=6, headdim=8).double()
    x = torch.randn(T, B, D, dtype=torch.float64)
    whole, last = mixer(x, None, None)
    state, pieces = None, []
    for start, end in itertools.pairwise((0, 1, 3, 9, T)):
        y, state = mixer(x[start:end], state, None)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole)
    torch.testing.assert_close(state, last)


def test_long_decays_neither_overflow_nor_vanish() -> None:
    mixer = build(d_state=6, headdim=8)
    with torch.no_grad():
        mixer.dt_bias.fill_(30.0)
    x = torch.randn(300, 1, D, requires_grad=True)
    y, _ = mixer(x, None, None)
    y.square().sum().backward()
    assert y.isfinite().all()
    for parameter in mixer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_parameters_are_the_official_ones() -> None:
    """Of mamba_ssm.Mamba2(64): 2 · 64 units in 2 heads, a state of 128."""
    shapes = {name: tuple(value.shape) for name, value in build(64).state_dict().items()}
    assert shapes == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "in_proj.weight": (2 * 128 + 2 * 128 + 2, 64),
        "conv1d.weight": (128 + 2 * 128, 1, 4),
        "conv1d.bias": (128 + 2 * 128,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }


def test_the_initial_steps_are_those_of_the_paper() -> None:
    mixer = build(1024)
    dt = F.softplus(mixer.dt_bias)
    assert 0.9e-3 < dt.min() < dt.max() < 0.11
    assert 1 <= mixer.A_log.exp().min() < mixer.A_log.exp().max() <= 16


def test_training_on_a_gpu_without_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2, "official", lambda: (None, "the package mamba-ssm is not installed"))
    config = mixer_config("mamba2")
    with pytest.raises(UsageError, match=r"mamba-ssm is not installed.*pip install.*--kernels torch"):
        config().check_device(torch.device("cuda"))
    config(kernels="torch").check_device(torch.device("cuda"))
    config().check_device(torch.device("cpu"))


@pytest.mark.parametrize("installed", [False, True])
def test_compiled_layers_do_not_look_for_the_packages(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for packages, which happens on a GPU alone, is nothing that torch.compile can trace."""
    asked = []

    def look() -> tuple[object, str | None]:
        asked.append(importlib.metadata.version("torch"))
        return (look, None) if installed else (None, "the package mamba-ssm is not installed")

    monkeypatch.setattr(mamba2, "official", look)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x: Tensor) -> Tensor:
        return x + 1 if mamba2._has_official() else x - 1

    assert [float(chosen(torch.zeros(()))) for _ in range(2)] == [1.0 if installed else -1.0] * 2
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.skipif(mamba2.official()[0] is None, reason=str(mamba2.official()[1]))
@pytest.mark.parametrize("steps", [5, 64, 600])
def test_the_official_kernels_compute_the_same(steps: int) -> None:
    """In float32, whose products the official kernels round to TF32; and through the official module's own weights."""
    from mamba_ssm.modules.mamba2 import Mamba2  # type: ignore[import-not-found, unused-ignore]

    theirs = Mamba2(256, device="cuda")
    fused, plain = build(256).cuda(), build(256, kernels="torch").cuda()
    for mixer in (fused, plain):
        mixer.load_state_dict(theirs.state_dict())
    exact = build(256).double().cuda()
    exact.load_state_dict(theirs.state_dict())
    exact.config = plain.config
    x = torch.randn(steps, 4, 256, device="cuda")
    truth, truth_state = exact(x.double(), None, None)
    with record_backends() as used:
        y, state = fused(x, None, None)
    assert used == ["mamba_split_conv1d_scan_combined"]
    torch.testing.assert_close(y, theirs(x.transpose(0, 1)).transpose(0, 1))
    y_plain, _ = plain(x, None, None)
    assert (y_plain.double() - truth).norm() <= 1e-4 * truth.norm()
    assert (y.double() - truth).norm() <= 3e-3 * truth.norm()
    for found, expected in zip(state, truth_state, strict=True):
        assert (found.double() - expected).norm() <= 3e-3 * expected.norm()
    y.sum().backward()
    truth.sum().backward()
    for (name, found), expected in zip(fused.named_parameters(), exact.parameters(), strict=True):
        assert (found.grad.double() - expected.grad).norm() <= 1e-2 * expected.grad.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(mamba2.official()[0] is None, reason=str(mamba2.official()[1]))
@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")  # the official package's own
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 5, 600])
def test_the_official_kernels_err_no_more_in_bf16(steps: int, batch: int) -> None:
    """Than the plain path in bf16, over float64; of a projection whose rows are no multiple of 8 numbers long."""
    fused, plain = build(272).cuda(), build(272, kernels="torch").cuda()
    assert fused.in_proj.weight.shape[0] % 8
    exact = build(272, kernels="torch").double().cuda()
    x = torch.randn(steps, batch, 272, device="cuda")
    truth, truth_state = exact(x.double(), None, None)
    with torch.autocast("cuda", torch.bfloat16):
        (y, state), (y_plain, state_plain) = (mixer(x, None, None) for mixer in (fused, plain))
    for found, other, expected in zip((y, *state), (y_plain, *state_plain), (truth, *truth_state), strict=True):
        assert (found.double() - expected).norm() <= 2 * (other.double() - expected).norm()


def test_one_step_of_one_row_is_none_of_the_official_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They refuse it where the projection's rows are no multiple of 8 numbers long: a prompt of one token."""
    monkeypatch.setattr(mamba2.Mamba2, "_takes_official", lambda self, x: True)
    monkeypatch.setattr(mamba2.Mamba2, "_run_official", lambda self, x: pytest.fail("called"))
    y, _ = build()(torch.randn(1, 1, D), None, None)
    assert y.shape == (1, 1, D)


def test_the_official_kernels_refuse_documents_told_apart() -> None:
    with pytest.raises(UsageError, match=r"--kernels official: .*no state and no resets: give --sampling windows, or"):
        mixer_config("mamba2")().check_resets(torch.device("cuda"))
    mixer_config("mamba2")().check_resets(torch.device("cpu"))
    mixer_config("mamba2")(kernels="torch").check_resets(torch.device("cuda"))  # type: ignore[call-arg]
