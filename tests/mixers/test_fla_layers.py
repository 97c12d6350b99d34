"""Layers of flash-linear-attention itself, where it is installed; ``test_fla.py`` has a stand-in for the rest."""

import pytest
import torch

from elman.mixers import mixer_config
from elman.model import LanguageModel, ModelConfig
from elman.sizing import num_params

pytestmark = [
    pytest.mark.gpu,
    # Of the package's own calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of their difference over that of what is expected: of a kernel in bf16, single ones may be far off."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.timeout(300)  # its kernels are compiled and tuned first
@pytest.mark.parametrize("name", ["GLA", "GatedDeltaNet", "HGRN2"])
def test_a_layer_trains_carries_its_state_and_is_reset(name: str) -> None:
    pytest.importorskip("fla.layers")
    torch.manual_seed(0)
    config = ModelConfig(256, 2, (mixer_config(f"fla:{name}")(),))
    model = LanguageModel(config).cuda()
    assert num_params(config) == sum(parameter.numel() for parameter in model.parameters())
    text = torch.randint(256, (2, 96), device="cuda")
    reset = torch.zeros(2, 96, dtype=torch.bool, device="cuda")
    reset[1, 70] = True
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            model.eval()
            whole, _ = model(text)
            first, state = model(text[:, :70])
            rest, _ = model(text[:, 70:], state)
            apart, _ = model(text, None, reset)
            alone, _ = model(text[1:, 70:])
        assert _distance(torch.cat((first, rest), 1), whole) < 0.01
        assert _distance(apart[0], whole[0]) < 0.01
        assert _distance(apart[1:, 70:], alone) < 0.01
        assert _distance(alone, whole[1:, 70:]) > 0.03
        model.train()
        loss = torch.nn.functional.cross_entropy(model(text)[0][:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())
    try:
        loss.backward()
    except RuntimeError as error:
        assert "Triton" in str(error)  # noqa: PT017  # some of its versions are refused on a Hopper
        pytest.skip(str(error))
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.norm() > 0
