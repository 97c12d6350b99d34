"""The short convolution of several tensors, and the variants that take it. Chunks and resets: tests/test_model.py."""

import pytest
import torch

from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.mixers.short_conv import ShortConv
from elman.model import LanguageModel, ModelConfig
from elman.ops import short_conv

T, B, D = 9, 2, 5


@pytest.mark.parametrize("sizes", [[D], [2, D, 1]])
def test_each_part_has_its_weights_and_its_inputs_before(sizes: list[int]) -> None:
    torch.manual_seed(0)
    conv = ShortConv(sizes, 4, "silu").double()
    torch.nn.init.normal_(conv.weight)
    parts = [torch.randn(T, B, size, dtype=torch.float64) for size in sizes]
    before = torch.randn(B, 3, sum(sizes), dtype=torch.float64)
    reset = torch.rand(T, B) < 0.3
    found, last = conv(parts, before, reset)
    assert [part.shape for part in found] == [part.shape for part in parts]
    whole, left = short_conv(torch.cat(parts, 2), conv.weight, before, activation="silu", reset=reset)
    torch.testing.assert_close(torch.cat(found, 2), whole)
    assert torch.equal(last, left)


@pytest.mark.parametrize("name", ["e0", "e1", "e10", "e15"])
def test_it_starts_as_the_model_without_it(name: str) -> None:
    logits = []
    for conv in (0, 4):
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(16, 2, (mixer_config(name)(conv=conv),)))
        logits.append(model(torch.arange(24).view(2, 12))[0])
    assert torch.equal(*logits)


@pytest.mark.parametrize("width", [-1, 1, 65])
def test_a_width_out_of_range_is_refused(width: int) -> None:
    with pytest.raises(UsageError, match=f"--conv {width} is out of range"):
        mixer_config("e1")(conv=width)
