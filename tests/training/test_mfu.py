import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elman.mixers import mixer_config
from elman.model import ModelConfig
from elman.sizing import flops_per_token
from elman.training.config import TrainConfig
from elman.training.mfu import Utilisation, peak_flops
from elman.training.run import RunFolder
from tests.training.runs import E1, start


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 989.4e12, 66.9e12),
        ("NVIDIA H200", 989.4e12, 989.4e12, 66.9e12),
        ("NVIDIA H200 NVL", 835.5e12, 835.5e12, 60e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 312e12, 19.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-16GB", None, 125e12, 15.7e12),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, bf16: float | None, fp16: float, fp32: float) -> None:
    for precision, peak in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)):
        assert peak_flops(name, precision) == (None if peak is None else pytest.approx(peak))


@pytest.mark.parametrize(
    ("name", "lanes", "ghz", "tensor_rate", "tensor_ghz"),
    [
        ("NVIDIA H100 80GB HBM3", 16896, 1.98, 16, 1.83),
        ("NVIDIA H100 PCIe", 14592, 1.755, 16, 1.62),
        ("NVIDIA A100-SXM4-40GB", 6912, 1.41, 16, 1.41),
        ("NVIDIA L40S", 18176, 2.52, 4, 2.52),
        ("NVIDIA L4", 7424, 2.04, 4, 2.04),
        ("NVIDIA A40", 10752, 1.74, 4, 1.74),
        ("NVIDIA A10", 9216, 1.695, 4, 1.695),
        ("NVIDIA GeForce RTX 4090", 16384, 2.52, 2, 2.52),
        ("NVIDIA GeForce RTX 3090", 10496, 1.695, 2, 1.695),
        ("Tesla V100-SXM2-16GB", 5120, 1.53, 8, 1.53),
        ("Tesla V100-PCIE-32GB", 5120, 1.38, 8, 1.38),
        ("Tesla T4", 2560, 1.59, 8, 1.59),
    ],
)
def test_peaks_are_units_times_clock(name: str, lanes: int, ghz: float, tensor_rate: int, tensor_ghz: float) -> None:
    """A multiply-add a clock of each float32 lane, and ``tensor_rate`` of a lane's share of the tensor cores."""
    assert peak_flops(name, "fp32") == pytest.approx(2e9 * lanes * ghz, rel=0.015)
    assert peak_flops(name, "fp16") == pytest.approx(2e9 * lanes * tensor_rate * tensor_ghz, rel=0.015)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA L40",
        "Something New",
    ],
)
def test_what_no_data_sheet_tells_is_not_guessed(name: str) -> None:
    assert all(peak_flops(name, precision) is None for precision in ("bf16", "fp16", "fp32"))


def test_a_precision_that_is_not_in_the_table_has_no_peak() -> None:
    assert peak_flops("NVIDIA H200", "fp8") is None


def test_a_cpu_has_no_mfu_and_a_known_device_shows_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, output = start(replace(config, out=tmp_path / "plain"))
    assert "MFU" not in output
    assert RunFolder(tmp_path / "plain").read_json("summary.json")["mfu"] is None
    monkeypatch.setattr(Utilisation, "at", lambda utilisation, speed: utilisation.flops_per_token * speed / 1e15)
    _, output = start(config)
    summary, rows = RunFolder(config.out).read_json("summary.json"), RunFolder(config.out).read_metrics()  # type: ignore[arg-type]
    model = ModelConfig(summary["dim"], summary["depth"], E1)
    assert summary["mfu"] == pytest.approx(3 * flops_per_token(model, 32) * summary["tokens_per_second"] / 1e15)
    assert all(row["mfu"] > 0 for row in rows if "loss" in row)
    assert re.search(r"MFU \d+\.\d%  \d", output)  # of the line while it goes
    assert re.search(r"MFU +│", output)


def test_utilisation_is_training_flops_over_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    model = ModelConfig(64, 2, (mixer_config("e1")(),))
    one, four = (Utilisation(model, 512, torch.device("cuda"), "bf16", devices) for devices in (1, 4))
    assert one.at(1e6) == pytest.approx(3 * flops_per_token(model, 512) * 1e6 / 989.4e12)
    assert four.at(4e6) == one.at(1e6)
    assert Utilisation(model, 512, torch.device("cpu"), "fp32").at(1e6) is None
