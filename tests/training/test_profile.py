"""Where a step's time goes: names sorted into classes, and times that add up."""

import gzip
import json
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from elman.training.config import TrainConfig
from elman.training.profile import OTHER, Profile, classify, profile_steps
from elman.training.run import RunFolder
from tests.training.runs import losses, resume, start

#: As PyTorch's profiler names them on a GPU and on a CPU.
NAMES = {
    "recurrences and attention": [
        "void persistent_forward<__nv_bfloat16, Tanh, 4, 2, 0, 1, persistent::ClusterPush>(Args)",
        "wide_backward<bf16, Tanh, 5, 5, 6, 10, 1>",
        "void step_forward<Gru, bf16, 2>(x)",
        "void banks_backward<bf16, 2, 4, 4>(x)",
        "_chunk_scan_fwd_kernel",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<64>>(Flash_fwd_params)",
        "void cudnn::RNN_blockPersist_GEMM_LSTM(x)",
        "elman::recurrence_backward",
    ],
    "optimiser": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::LpNormFunctor<float, 2>>",
        "aten::_fused_adamw_",
    ],
    "products": [
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_256x128_32x3_nn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "aten::addmm",
    ],
    "norms": ["norm_forward<bf16, 2>", "void at::native::cuComputeGradInput_rms_norm", "aten::rms_norm"],
    "loss and embedding": [
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>",
        "triton_red_fused__log_softmax_nll_loss_forward_1",
        "void at::native::(anonymous namespace)::embedding_backward_feature_kernel",
    ],
    "copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "triton_poi_fused__to_copy_t_0",
        "aten::copy_",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(at::TensorIteratorBase&)>",
        "triton_poi_fused_mul_silu_2",
        "triton_red_fused__to_copy_sum_3",
        "aten::tanh",
    ],
    OTHER: ["something new", "autograd::engine::evaluate_function: MulBackward0"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_every_name_is_in_its_class(kind: str, name: str) -> None:
    assert classify(name) == kind


def event(name: str, start: float, end: float, device: Any = DeviceType.CUDA, **more: Any) -> Any:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name,
        time_range=span,
        device_type=device,
        **{"is_user_annotation": False, "self_cpu_time_total": 0, **more},
    )


def test_a_gpus_time_is_its_kernels_and_what_lies_between_them() -> None:
    """Two steps of 10 ms: products 4, a recurrence 4, of which 1 beside the products, nothing for 3."""
    cpu = [event("aten::mm", -5000, 20000, DeviceType.CPU), event("ProfilerStep#10", 0, 20000, is_user_annotation=True)]
    kernels = [
        kernel
        for at in (0, 10000)
        for kernel in (event("nvjet_tst", at, at + 4000), event("persistent_forward<x>", at + 3000, at + 7000))
    ]
    kernels.append(event("Memset (Device)", 19999, 20000))
    profile = Profile(SimpleNamespace(events=lambda: cpu + kernels), 2)
    assert profile.on_gpu
    assert profile.ms_per_step == pytest.approx(10)
    shares = {share.name: share for share in profile.shares}
    assert shares["products"].ms == pytest.approx(4)
    assert shares["products"].calls == 1
    assert shares["recurrences and attention"].part == pytest.approx(0.4)
    assert shares["idle"].ms == pytest.approx(3, abs=1e-3)
    assert profile.kernels[0] == {"name": "nvjet_tst", "calls": 1, "ms": 4}


def test_a_cpus_time_is_its_operators_and_what_lies_between_them() -> None:
    x = torch.randn(300, 300)

    def step() -> None:
        torch.mm(x, x).tanh_()
        time.sleep(0.05)

    profile = profile_steps(step, torch.device("cpu"), 4)
    shares = {share.name: share for share in profile.shares}
    assert not profile.on_gpu
    assert shares["products"].calls == 1
    assert shares["elementwise"].calls >= 1
    assert shares["between operators"].ms > 30
    assert sum(share.part for share in profile.shares) == pytest.approx(1, abs=0.01)


def test_a_run_leaves_a_trace_and_shows_a_table(config: TrainConfig) -> None:
    config = replace(config, seq_len=8)
    start(replace(config, steps=20, out=config.out.with_name("plain")))  # type: ignore[union-attr]
    _, output = start(replace(config, steps=20, profile=True))
    assert losses(config.out) == losses(config.out.with_name("plain"))  # type: ignore[union-attr]
    for part in ("where a step's time goes", "products", "optimiser", "between operators"):
        assert output.count(part) == 1
    assert config.out is not None
    trace = json.loads(gzip.decompress((config.out / "profile.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert "aten::mm" in names
    assert len({name for name in names if name.startswith("ProfilerStep")}) == 3
    # It was for that time only.
    assert RunFolder(config.out).read_config()[0].profile is False
    (config.out / "profile.json.gz").unlink()
    _, output = resume(config, steps=40)
    assert "where a step's time goes" not in output
    _, output = resume(config, steps=60, profile=True)
    assert "where a step's time goes" in output
    assert (config.out / "profile.json.gz").exists()


def test_a_run_too_short_for_it_says_so(config: TrainConfig) -> None:
    _, output = start(replace(config, profile=True))
    assert "--profile: no steps were profiled, for the run was shorter than 13 steps" in output
    assert not (config.out / "profile.json.gz").exists()  # type: ignore[operator]


@pytest.mark.gpu
def test_a_run_on_the_gpu_is_told_apart_by_its_kernels(config: TrainConfig) -> None:
    _, output = start(replace(config, device="cuda", steps=20, profile=True))
    for part in ("where a step's time goes", "recurrences and attention", "products", "optimiser", "idle"):
        assert output.count(part) == 1
