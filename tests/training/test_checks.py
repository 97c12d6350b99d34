"""What is told of a run before it starts."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from elman.errors import UsageError
from elman.mixers import MixerConfig, mixer_config
from elman.mixers.e0 import E0Config
from elman.model import ModelConfig
from elman.training.checks import slow_option
from elman.training.config import TrainConfig
from elman.training.start import start_run

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("mixer", "cure"),
    [
        (mixer_config("e5")(rank=270), "--rank 272"),
        (mixer_config("e4")(rank=3), "--rank 8"),
        (mixer_config("e1")(structure="random_projection", rank=130), "--rank 128"),
        (mixer_config("e5")(rank=272), None),
        (mixer_config("e5")(), None),
        (mixer_config("mamba2")(), None),
    ],
    ids=lambda value: value.name if isinstance(value, MixerConfig) else str(value),
)
def test_a_rank_that_tensor_cores_read_slowly_is_told_of_with_the_cure(mixer: MixerConfig, cure: str | None) -> None:
    model = ModelConfig(512, 2, (mixer_config("e1")(), mixer))
    complaint = slow_option(model, GPU, "bf16")
    assert (complaint is None) == (cure is None)
    assert cure is None or (complaint or "").endswith(
        f"is no multiple of 8, which makes its products slow on a GPU: give {cure}"
    )
    assert slow_option(model, torch.device("cpu"), "bf16") is None
    assert slow_option(model, GPU, "fp32") is None


def test_it_is_told_of_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "elman.training.start.slow_option", lambda model, device, precision: slow_option(model, GPU, "bf16")
    )
    output = io.StringIO()
    e5 = mixer_config("e5")
    start_run(replace(config, steps=2), (e5(rank=5), e5(rank=6)), Console(file=output, width=200))
    assert output.getvalue().count("is no multiple of 8") == 1
    assert "--rank 5 is no multiple of 8" in output.getvalue()


class Miscounted(E0Config):
    """Forgets the bias."""

    def num_params(self, dim: int) -> int:
        return super().num_params(dim) - self.inner_size(dim)


def test_a_variant_whose_formula_miscounts_is_not_trained(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match="--model e0 has 6,224 parameters, but its formulas count 6,192: correct "):
        start_run(config, (Miscounted(),), Console(quiet=True))
    assert config.out is not None
    assert not config.out.exists()
