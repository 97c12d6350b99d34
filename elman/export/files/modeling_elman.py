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
        finally:
            torch.set_default_dtype(dtype)
        self.post_init()

    def _init_weights(self, module):
        """Every weight comes from the checkpoint, or starts as elman starts it."""

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return None  # the head is the embedding

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def _reorder_cache(self, state, index):
        return state.rows(index)

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
        input_ids,
        attention_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        """Logits of the token after each one.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or (B, what the state has read and T); 0 where a row is filled up. A row starts from
                rest behind that. None: nowhere.
            labels: (B, T); the loss is that of each but the first, given those before it; -100 is left out.
            use_cache: whether to return the state.
            logits_to_keep: only those of so many last tokens are returned; 0 for all.
            return_dict: False for a tuple.
            past_key_values: an ElmanState to go on from.
            cache: the same, as newer versions call it.
        """
        state = cache if cache is not None else past_key_values
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: an elman model reads tokens: give input_ids")
        reset = self._resets(input_ids, attention_mask, state)
        logits, after = self.model(input_ids, None if state is None else state.state, reset)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
            )
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
