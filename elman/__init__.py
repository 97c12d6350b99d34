"""elman: how far can simple nonlinear RNNs go with modern engineering?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from elman.model import LanguageModel

__version__ = "0.1.0"


def load(
    run: Path | str,
    *,
    checkpoint: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The model of a run, a ``torch.nn.Module`` in evaluation mode.

    Args:
        run: the folder that ``elman train`` made.
        checkpoint: the step of one that is there; the newest whole one if absent.
        device: where the model is put.
        dtype: of its weights, a floating-point one; that in which they were trained if absent.

    Returns:
        A function of bytes (B, T) to logits (B, T, 256) and a state to go on with, see ``elman.model.LanguageModel``.
        With ``--tokenizer`` bytes are tokens, of the vocabulary that ``elman.training.run.load_text`` gives.

    Raises:
        UsageError: (a ``ValueError``) no run there, no such or no whole checkpoint, or no such device.
    """
    from elman.training.run import load_model

    return load_model(run, step=checkpoint, device=device, dtype=dtype)
