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


def skip_without_float32() -> None:
    """There are builds of causal-conv1d for half types alone."""
    from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found, unused-ignore]

    try:
        causal_conv1d_fn(torch.zeros(1, 8, 8, device="cuda"), torch.zeros(8, 4, device="cuda"))
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        pytest.skip(f"this build of causal-conv1d takes no float32: {error}")


@pytest.mark.gpu
@pytest.mark.skipif(mamba2.official()[0] is None, reason=str(mamba2.official()[1]))
@pytest.mark.parametrize("steps", [5, 64, 600])
def test_the_official_kernels_compute_the_same(steps: int) -> None:
    """In float32, whose products the official kernels round to TF32; and through the official module's own weights."""
    skip_without_float32()
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


def conv_update(x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """As causal_conv1d documents it: inputs (B, C, at least K - 1), older first, take up x (B, C) in place."""
    inputs.copy_(torch.cat((inputs[..., 1:], x.unsqueeze(-1)), dim=-1))
    assert activation == "silu"
    return F.silu((inputs[..., -weight.shape[1] :] * weight).sum(-1) + bias)


def state_update(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:  # fmt: skip
    """As mamba_ssm documents it: state (B, H, P, N) in place; x and dt (B, H, P), a (H, P, N), b and c (B, 1, N)."""
    assert dt_softplus
    # Only then does the kernel take one decay a head.
    assert a.stride()[1:] == (0, 0)
    assert dt.stride(-1) == dt_bias.stride(-1) == 0
    dt = F.softplus(dt + dt_bias).unsqueeze(-1)
    state.copy_(state * torch.exp(dt * a) + dt * x.unsqueeze(-1) * b.unsqueeze(1))
    return (state * c.unsqueeze(1)).sum(-1) + skip * x


def test_steps_in_place_are_those_of_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the official kernels of one step; resets, and chunks in between, included."""
    plain, mixer = build(d_state=6, headdim=8), build(d_state=6, headdim=8)
    monkeypatch.setattr(mixer, "_takes_official", lambda x: x.ndim == 1)
    monkeypatch.setattr(mamba2, "step_kernels", lambda: (conv_update, state_update))
    x = torch.randn(T, B, D)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4, 1] = True
    expected, _ = plain(x, None, reset)
    y, state = mixer(x[:2], None, reset[:2])
    pieces = [y]
    for start, end in ((2, 3), (3, 4), (4, 5), (5, 6), (6, 9), (9, 10), (10, 11)):
        state = mixer.reserve(state, 1)
        assert isinstance(state, mamba2.StepState)
        assert mixer.reserve(state, 100) is state
        with record_backends() as used:
            y, after = mixer(x[start:end], state, reset[start:end] if start == 4 else None)
        assert used == ["selective_state_update" if end - start == 1 else "torch"]
        assert end - start > 1 or all(a is b for a, b in zip(after, state, strict=True))
        pieces.append(y)
        state = after
    torch.testing.assert_close(torch.cat(pieces), expected)


@pytest.mark.gpu
@pytest.mark.skipif(mamba2.step_kernels() is None, reason=str(mamba2.official()[1]))
@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")  # the official package's own
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_official_step_computes_the_same(dtype: torch.dtype | None) -> None:
    if dtype is None:
        skip_without_float32()
    fused, exact = build(256).cuda(), build(256, kernels="torch").double().cuda()
    plain = build(256, kernels="torch").cuda()
    x = torch.randn(40, 4, 256, device="cuda")
    truth, _ = exact(x.double(), None, None)
    with torch.inference_mode(), torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        reference, _ = plain(x, None, None)
        _, state = fused(x[:20], None, None)
        state = fused.reserve(state, 20)
        with record_backends() as used:
            pieces = []
            for t in range(20, 40):
                y, state = fused(x[t : t + 1], state, None)
                pieces.append(y)
    assert used == ["selective_state_update"] * 20
    found = (torch.cat(pieces).double() - truth[20:]).norm()
    # The prompt was read by the fused kernel, which takes TF32 in float32.
    least = 3e-3 * truth[20:].norm() if dtype is None else torch.zeros(())
    assert found <= 2 * (reference[20:].double() - truth[20:]).norm() + least.to(found)
