"""The configuration of an exported elman model, for transformers."""

from transformers import PretrainedConfig


class ElmanConfig(PretrainedConfig):
    """What the model is made of.

    Attributes:
        elman: the model's own config, as elman's ModelConfig writes it.
        resets: whether a document's start resets a row's state, as it did in training.
        delimiter: the token that ends a document.
    """

    model_type = "elman"

    def __init__(self, elman=None, resets=False, delimiter=30, **kwargs):
        self.elman = elman
        self.resets = resets
        self.delimiter = delimiter
        if (
            isinstance(elman, dict) and {"vocab_size", "dim", "depth"} <= elman.keys()
        ):  # else the model says what is wrong
            self.vocab_size = elman["vocab_size"]
            self.hidden_size = elman["dim"]
            self.num_hidden_layers = elman["depth"]
        kwargs.setdefault("tie_word_embeddings", False)  # the model itself multiplies by its embedding
        super().__init__(**kwargs)
