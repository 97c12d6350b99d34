"""The one language-model shell that every variant hangs in.

    embedding -> depth x [x = x + mixer(norm(x))] -> norm -> head tied to the embedding

Batch-major outside, time-major inside: the tokens are transposed once, and no activation ever is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers import Mixer, MixerConfig, State, mixer_config, own
from elman.mixers.base import FollowsWeights, WeightInit
from elman.ops import add_norm
from elman.options import flag

#: Beyond these nobody means a model, and to count or build it would not end.
MAX_DIM, MAX_DEPTH = 1 << 17, 1 << 10


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    Attributes:
        dim: D, the width of the residual stream.
        depth: layers.
        mixers: the pattern of variants, repeated over the depth.
        vocab_size: 256 for raw bytes.
    """

    dim: int
    depth: int
    mixers: tuple[MixerConfig, ...]
    vocab_size: int = 256

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{flag(name)} {value} is out of range: give a whole number of at least 1")
        for name, most in (("dim", MAX_DIM), ("depth", MAX_DEPTH)):
            if (value := getattr(self, name)) > most:
                raise UsageError(f"{flag(name)} {value} is out of range: give at most {most}")
        if not self.mixers:
            raise UsageError("a model needs at least one mixer")

    def layers(self) -> Iterator[MixerConfig]:
        """The mixer of each layer, from the first to the last."""
        for i in range(self.depth):
            yield self.mixers[i % len(self.mixers)]

    @property
    def pattern(self) -> str:
        """The variants' names, as ``--model`` takes them."""
        return ",".join(mixer.name for mixer in self.mixers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; ``from_dict`` reads it back."""
        mixers = [
            {"name": mixer.name, **({} if mixer.code is None else {"code": mixer.code}), **dataclasses.asdict(mixer)}
            for mixer in self.mixers
        ]
        return {"dim": self.dim, "depth": self.depth, "vocab_size": self.vocab_size, "mixers": mixers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read what ``to_dict`` wrote."""
        mixers = []
        for options in values["mixers"]:
            options = dict(options)
            name, code = options.pop("name"), options.pop("code", None)
            if own.is_file(name):  # which is for the command line alone
                raise ValueError(f"{name} is no variant's name")
            mixers.append((mixer_config(name) if code is None else own.known_config(name, code))(**options))
        return cls(**{**values, "mixers": tuple(mixers)})


#: Of the token read, in a model that starts as its embedding.
_FIRST_LOGIT = 4.0


class AddNorm(nn.Module):
    """``x + y``, in the dtype of the residual stream, and its root-mean-square norm, under autocast in autocast's.

    So a float32 stream is rounded once for all the products that read its norm.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return add_norm(x, y, self.weight, dtype=dtype)


class Layer(nn.Module):
    """``x + mixer(norm(x))``."""

    def __init__(self, dim: int, mixer: Mixer, weight_init: WeightInit = "normal") -> None:
        super().__init__()
        self.norm = AddNorm(dim)
        self.mixer = mixer
        self.mixer.initialize(weight_init)

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: nn.Module, state: State, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, State]:
        """From behind this layer's norm to behind the next: a sum and its norm are one pass over memory."""
        y, state = self.mixer(normed, state, reset)
        # A sum would broadcast what is too small.
        assert y.shape == normed.shape, (
            f"{type(self.mixer).__name__} made {tuple(y.shape)} of an x of {tuple(normed.shape)}, not the same shape"
        )
        x, normed = next_norm(x, y)
        return x, normed, state


def _chain(mixer: MixerConfig, dim: int) -> tuple[Mixer, ...]:
    built = mixer.build(dim)
    return built if isinstance(built, tuple) else (built,)


def _call(module: nn.Module, *arguments: Any) -> Any:
    """The module is an argument, so that layers of one kind share one compilation of this."""
    return module(*arguments)


class LanguageModel(nn.Module):
    """A byte-level (or token-level) language model with explicit state.

    The mixers' weights start as ``weight_init`` and ``Mixer.initialize`` say. The embedding starts as N(0, 0.02²), and
    with zero_out as N(0, (4 / D)²): a model that starts as its embedding foretells the token that it reads, by a logit
    of D times that deviation. Under autocast the residual stream stays float32, and what enters a mixer or the head is
    of autocast's dtype.

    A training loop calls ``after_step`` after each step of its optimiser.
    """

    def __init__(self, config: ModelConfig, weight_init: WeightInit = "normal") -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        chains = (_chain(mixer, config.dim) for mixer in config.layers())
        self.layers = nn.ModuleList(Layer(config.dim, mixer, weight_init) for chain in chains for mixer in chain)
        self.norm = AddNorm(config.dim)
        std = _FIRST_LOGIT / config.dim if weight_init == "zero_out" else 0.02
        nn.init.normal_(self.embedding.weight, std=std)
        self._call_in_training = _call

    def compile_training(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compile) -> None:
        """Have ``wrap``, such as ``torch.compile``, make the function that runs the layers in training mode.

        Evaluation mode stays plain: with and without a state, it meets texts of many lengths, each a compilation. So do
        layers whose mixer says that it does not compile.
        """
        self._call_in_training = wrap(_call)

    def after_step(self) -> None:
        """Bring up to date what follows the weights, such as the vectors by which spectral norms are known."""
        for module in self.modules():
            if isinstance(module, FollowsWeights):
                module.after_step()

    def reserve(self, state: State, steps: int) -> tuple[State, ...]:
        """A state that ``forward`` returned, to go on from in the memory that it has: see ``Mixer.reserve``."""
        assert state is not None
        mixers = [layer.mixer for layer in self.layers if isinstance(layer, Layer)]
        return tuple(mixer.reserve(each, steps) for mixer, each in zip(mixers, state, strict=True))

    def forward(
        self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Logits of the token after each one.

        Args:
            tokens: (B, T), any integer dtype.
            state: what the last call returned, to go on where it ended; None starts at rest.
            reset: (B, T) bool; where true, that row starts anew at that token.

        Returns:
            Logits (B, T, V) in the dtype of the head's product, and the state: one entry a mixer.

        Raises:
            UsageError: a wrong shape, or tokens that are not integers.
        """
        if tokens.ndim != 2:
            raise UsageError(f"tokens has shape {tuple(tokens.shape)}: give (B, T)")
        if tokens.dtype.is_floating_point:
            raise UsageError(f"tokens has dtype {tokens.dtype}: give integers, such as torch.long")
        if reset is not None:
            if reset.shape != tokens.shape:
                raise UsageError(f"reset has shape {tuple(reset.shape)}: give that of tokens, {tuple(tokens.shape)}")
            reset = reset.t().contiguous()
        x = self.embedding(tokens.t().long())
        call = self._call_in_training if self.training else _call
        norms: list[Any] = [*(layer.norm for layer in self.layers), self.norm]
        x, normed = call(norms[0], x)
        new_state = []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state[i]
            assert isinstance(layer, Layer)
            run = call if layer.mixer.compiles else _call
            x, normed, layer_state = run(layer, x, normed, norms[i + 1], layer_state, reset)
            new_state.append(layer_state)
        logits = F.linear(normed, self.embedding.weight)
        return logits.transpose(0, 1), tuple(new_state)


#: A target that is none: it is left out of the loss, and of its mean.
IGNORED = -100


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, in float32. logits (B, T, V) as the model returns them, targets (B, T)."""
    # The model's logits are time-major underneath, so flattening them that way round is free of a copy.
    flat = logits.transpose(0, 1).flatten(0, 1).float()
    return F.cross_entropy(flat, targets.t().flatten().long(), reduction=reduction, ignore_index=IGNORED)


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """As ``next_token_loss``, of each token: (B, T)."""
    return next_token_loss(logits, targets, reduction="none").view(targets.shape[1], -1).t()
