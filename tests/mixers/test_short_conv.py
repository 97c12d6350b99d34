"""The short convolution against its sum, and the variants that take it. Chunks and resets: tests/test_model.py."""

import pytest
import torch

from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.mixers.short_conv import ShortConv
from elman.model import LanguageModel, ModelConfig

T, B, D = 9, 2, 5


def test_is_its_sum_over_what_the_row_has_seen_since_its_last_reset() -> None:
    torch.manual_seed(0)
    conv = ShortConv(D, 4).double()
    torch.nn.init.normal_(conv.weight)
    u, before = torch.randn(T, B, D, dtype=torch.float64), torch.randn(B, 3, D, dtype=torch.float64)
    reset = torch.rand(T, B) < 0.3
    v, last = conv(u, before, reset)
    for row in range(B):
        seen = list(before[row])
        for t in range(T):
            seen = [] if reset[t, row] else seen
            seen.append(u[t, row])
            expected = sum(w * x for w, x in zip(conv.weight, reversed(seen), strict=False))
            torch.testing.assert_close(v[t, row], expected)
        padded = [torch.zeros(D, dtype=torch.float64)] * 3 + seen
        torch.testing.assert_close(last[row], torch.stack(padded[-3:]))


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
