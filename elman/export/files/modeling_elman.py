"""An exported elman model, for transformers: AutoModelForCausalLM with trust_remote_code=True.

The model is elman's own, with its kernels, where elman is installed; elsewhere its plain PyTorch code, which lies in
elman_code.py. Its state takes the place of a cache: of constant size for recurrent models, however long the text.
"""

import dataclasses
import importlib

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_elman import ElmanConfig
from .elman_code import load

try:
    import elman.model  # noqa: F401

    _PACKAGE = "elman"
except ImportError:
    _PACKAGE = load().__name__

#: What transformers calls it: past_key_values, and since 5.x cache.
_CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)


class ElmanState:
    """A model's state after some tokens, where transformers passes caches around; it is never changed.

    Attributes:
        state: of elman's LanguageModel: a pytree of tensors whose first axis is the batch.
        last: (B,), the token that each row read last.
        length: tokens read, those that fill rows up included.
    """

    is_compileable = False
    is_linear = ()

    def __init__(self, state, last, length):
        self.state = state
        self.last = last
        self.length = length

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def rows(self, index):
        """The state of these rows, in this order; a row may be there several times."""

        def chosen(leaf):
            return leaf if leaf.ndim == 0 else leaf.index_select(0, index.to(leaf.device))

        return ElmanState(tree_map(chosen, self.state), chosen(self.last), self.length)


class ElmanForCausalLM(GenerationMixin, PreTrainedModel):
    config_class = ElmanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _is_stateful = True  # its state cannot be taken back by some tokens
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        model = importlib.import_module(f"{_PACKAGE}.model")
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # weights start by what half types do not know
        try:
            self.model = model.LanguageModel(model.ModelConfig.from_dict(config.elman)).to(dtype)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"config.json: its entry 'elman' is not as elman export wrote it ({error}): "
                f"put the file back, or export the run again"
            ) from error
        finally:
            torch.set_default_dtype(dtype)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As in transformers, but that all weights must be there, and no others.

        Raises:
            ValueError: they are another model's; transformers would leave those that are missing as memory was.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
        wrong += [f"{name} is no part of it" for name in sorted(info["unexpected_keys"])]
        mismatched = [
            found if isinstance(found, str) else found[0] for found in info["mismatched_keys"]
        ]  # shapes in 5.x
        wrong += [f"{name} has another shape" for name in sorted(mismatched)]
        if wrong:
            raise ValueError(
                f"the weights are not those of the model in config.json: {wrong[0]} ({len(wrong)} in all): "
                f"put both files back, or export the run again"
            )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module):
        """Every weight comes from the checkpoint, or starts as elman starts it."""

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value
        self.config.elman = {**self.config.elman, "vocab_size": len(value.weight)}  # what save_pretrained writes

    def get_output_embeddings(self):
        return None  # the head is the embedding

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def _reorder_cache(self, state, index):
        return state.rows(index)

    def generate(self, inputs=None, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: a text without tokens.
        """
        ids, mask = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask")
        empty = ids is not None and not ids.shape[-1]
        if empty or (mask is not None and mask.ndim == 2 and not mask.any(1).all()):
            raise ValueError(
                f"input_ids: a text is empty, and there is nothing to go on from: "
                f"give tokenizer.bos_token, the token {self.config.delimiter}, for the start of a document"
            )
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        state = kwargs.get(_CACHE)
        unread = input_ids
        if state is not None:
            # Rows may be given whole, or only what is new of them.
            whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
            unread = input_ids[:, state.length :] if whole and input_ids.shape[1] > state.length else input_ids[:, -1:]
            if not whole:
                unread = input_ids[:, -(attention_mask.shape[1] - state.length) :]
        return {
            "input_ids": unread.contiguous(),
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep") or 1,
            _CACHE: state,
        }

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        past_key_values=None,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits of the token after each one.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or (B, what the state has read and T); 0 where a row is filled up. A row starts from
                rest behind that. None: nowhere.
            labels: (B, T); the loss is that of each but a row's first, given those before it; -100 is left out.
            use_cache: whether to return the state.
            logits_to_keep: only those of so many last tokens are returned; 0 for all.
            return_dict: False for a tuple.
            past_key_values: an ElmanState to go on from.
            cache: the same, as newer versions call it.
            num_items_in_batch: what the sum of the losses is divided by, in place of their number; Trainer gives it
                where several batches make a step.
        """
        state = cache if cache is not None else past_key_values
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: an elman model reads tokens: give input_ids")
        if not input_ids.shape[-1]:
            raise ValueError(f"input_ids {tuple(input_ids.shape)} holds no token: give at least one a row")
        reset = self._resets(input_ids, attention_mask, state)
        logits, after = self.model(input_ids, None if state is None else state.state, reset)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            if attention_mask is not None and attention_mask.ndim == 2:
                # What follows a fill is a row's first.
                fill = attention_mask[:, -input_ids.shape[1] : -1] == 0
                targets = targets.masked_fill(fill.to(logits.device), -100)
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                targets.flatten(),
                ignore_index=-100,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        if not isinstance(logits_to_keep, int):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        read = input_ids.shape[1] + (0 if state is None else state.length)
        new_state = None if use_cache is False else ElmanState(after, input_ids[:, -1], read)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: new_state})
        return output if return_dict is not False else output.to_tuple()

    def _resets(self, input_ids, attention_mask, state):
        """(B, T), where rows start from rest: behind what fills them up and, if so trained, behind each document."""
        steps, reset = input_ids.shape[1], None
        if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.all():
            mask = attention_mask[:, -steps - 1 :].bool()
            if mask.shape[1] == steps:  # nothing was read before
                mask = F.pad(mask, (1, 0))
            reset = mask[:, 1:] & ~mask[:, :-1]
        if self.config.resets:
            first = input_ids[:, :1] if state is None else state.last.unsqueeze(1)
            before = torch.cat((first, input_ids[:, :-1]), dim=1)
            starts = before == self.config.delimiter
            if state is None:
                starts[:, 0] = False
            reset = starts if reset is None else reset | starts
        return reset


ElmanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
ElmanConfig.register_for_auto_class()
