"""Model FLOPs utilisation: what part of a device's peak the model's own products take (Chowdhery et al., 2022).

Counted are the products of ``sizing.flops_per_token``, those of the recurrences among them, three times: once forward,
twice backward. Pointwise work, and what is computed anew, do not count.
"""

from __future__ import annotations

import re

import torch

from elman.model import ModelConfig
from elman.sizing import flops_per_token

#: Peak TFLOP/s of dense products with float32 sums, by the name that the driver gives a device: of bf16 or fp16 by its
#: tensor cores (None: it has none of that type), and of float32 without TF32, as training leaves it. A part of a device
#: (MIG), a laptop's or a market's variant has another name, and so none of these.
#:
#: From NVIDIA's data sheets of the H100, H200, A100, L40S, L4, A10, A40, V100 and T4 (rates with sparsity halved) and,
#: for what is rounded there and for the GeForce, its white papers on Hopper (v1.04), GA102 (v2) and Ada (v2). A test
#: holds them against units times clock. The NVL's are rated below the clock that they reach: an MFU may come out high.
_PEAKS: tuple[tuple[str, float | None, float, float], ...] = (
    # device, bf16, fp16, fp32
    (r"H100 80GB HBM3", 989.4, 989.4, 66.9),
    (r"H100 PCIe", 756.0, 756.0, 51.2),
    (r"H100 NVL", 835.5, 835.5, 60.0),
    (r"H200", 989.4, 989.4, 66.9),
    (r"H200 NVL", 835.5, 835.5, 60.0),
    (r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe", 312.0, 312.0, 19.5),
    (r"L40S", 362.0, 362.0, 91.6),
    (r"L4", 121.0, 121.0, 30.3),
    (r"A40", 149.7, 149.7, 37.4),
    (r"A10", 125.0, 125.0, 31.2),
    (r"GeForce RTX 4090", 165.2, 165.2, 82.6),
    (r"GeForce RTX 3090", 71.0, 71.0, 35.6),
    (r"V100-SXM2-\d+GB", None, 125.0, 15.7),
    (r"V100-PCIE-\d+GB", None, 112.0, 14.0),
    (r"T4", None, 65.0, 8.1),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device could do at most; None where no data sheet tells, and so for every CPU.

    Args:
        device_name: as ``torch.cuda.get_device_name`` tells it.
        precision: ``bf16``, ``fp16`` or ``fp32``; None is known of any other.
    """
    for pattern, *tera in _PEAKS:
        if re.fullmatch(rf"((NVIDIA|Tesla) )?({pattern})", device_name):
            value = dict(zip(("bf16", "fp16", "fp32"), tera, strict=True)).get(precision)
            return None if value is None else value * 1e12
    return None


class Utilisation:
    """The MFU of a model in training on a device; unknown in fp8, which some of its products are made in alone."""

    def __init__(
        self, model: ModelConfig, seq_len: int, device: torch.device, precision: str, devices: int = 1
    ) -> None:
        """``devices``: how many such devices the tokens are shared by."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = peak_flops(name, precision)
        #: All devices' FLOP/s, or None.
        self.peak = None if peak is None else devices * peak
        self.flops_per_token = 3 * flops_per_token(model, seq_len)

    def at(self, tokens_per_second: float) -> float | None:
        """The MFU, 0 to 1, at this speed; None where the peak is not known."""
        return None if self.peak is None else self.flops_per_token * tokens_per_second / self.peak
