"""``elman export RUN --to hf``: a folder that Hugging Face's transformers loads, with or without elman installed.

config.json, generation_config.json   the model, and which classes read it (``auto_map``)
model.safetensors                     its weights
configuration_elman.py, modeling_elman.py, elman_code.py
                                      what trust_remote_code runs; the last is generated, see ``bundle.py``
tokenizer.json, tokenizer_config.json bytes as tokens, for transformers' own fast tokeniser; not of other vocabularies
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import elman
from elman.data.bytes import DELIMITER
from elman.data.vocabulary import BYTES
from elman.errors import UsageError
from elman.export.bundle import bundle
from elman.model import ModelConfig
from elman.sizing import num_params
from elman.training.run import check_free, load_model, load_text, open_run
from elman.units import format_count

_FILES = Path(__file__).parent / "files"
#: What a tokenizer config gives where there is no limit.
_NO_LIMIT = int(1e30)


def export(run: Path, out: Path | None, tell: Callable[[str], None]) -> Path:
    """Make the folder; returns where it is: ``out``, or ``hf`` inside the run.

    Args:
        run: a run folder.
        out: a folder that is not there yet, or empty.
        tell: is called with lines for the user.

    Raises:
        UsageError: no run, no checkpoint, or the folder is not free.
    """
    config, model_config = open_run(run).read_text_config()
    modules = _modules(model_config)
    folder = run / "hf" if out is None else out
    if (folder / "config.json").exists():
        raise UsageError(f"--out {folder} is there already and is left as it is: give another --out")
    check_free(folder)
    vocabulary, resets = load_text(run)
    model = load_model(run, tell)
    place = folder.resolve()  # "." has no name to put another beside
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        weights = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        _write_json(partial / "config.json", model_json(model_config, resets, vocabulary.delimiter))
        # safetensors keeps its files to their owner.
        (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
        ends = {f"{name}_token_id": vocabulary.delimiter for name in ("bos", "eos", "pad")}
        _write_json(partial / "generation_config.json", ends)
        for name in ("configuration_elman.py", "modeling_elman.py"):
            shutil.copyfile(_FILES / name, partial / name)
        (partial / "elman_code.py").write_text(bundle(modules), encoding="utf-8")
        if vocabulary is BYTES:
            _write_json(partial / "tokenizer.json", tokenizer_json())
            _write_json(partial / "tokenizer_config.json", _TOKENIZER_CONFIG)
        else:
            tell(f"no tokeniser is exported: encode text by tiktoken's {config.tokenizer}, 0x1e ending each document")
        card = _card(model_config, config.tokenizer)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if place.exists():
            # It may be where somebody is, or a mount: it stays, and counts as an export once config.json is there.
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                shutil.move(file, place)
            partial.rmdir()
        else:
            partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def model_json(config: ModelConfig, resets: bool, delimiter: int) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["ElmanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_elman.ElmanConfig",
            "AutoModelForCausalLM": "modeling_elman.ElmanForCausalLM",
        },
        "model_type": "elman",
        "elman": config.to_dict(),
        "elman_version": elman.__version__,
        "resets": resets,
        "delimiter": delimiter,
        **{f"{name}_token_id": delimiter for name in ("bos", "eos", "pad")},
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokeniser without merges, in the format of the package ``tokenizers``: a byte's number is its token.

    Bytes that are no printable ASCII or Latin-1 are shown as characters from U+0100 on, as GPT-2 (Radford et al., 2019)
    shows them; but for the delimiter, which is a token of its own by its own character, so that no text is it.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shown = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    shown[DELIMITER] = chr(DELIMITER)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": DELIMITER, "content": chr(DELIMITER), **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {shown[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{f"{name}_token": chr(DELIMITER) for name in ("bos", "eos", "pad")},
    "model_max_length": _NO_LIMIT,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
}


def _modules(config: ModelConfig) -> list[str]:
    """What the model's config imports by name: its mixers' files."""
    for mixer in config.mixers:
        if mixer.code is not None:
            raise UsageError(
                f"the variant {mixer.name} is not elman's own, and an export has elman's own code alone: move its file "
                f"to elman/mixers, give it its line in _REGISTRY there, and train again"
            )
    files = {type(mixer).__module__.removeprefix("elman.") for mixer in config.mixers}
    return ["model", *sorted(files)]


_CARD_USE = """\
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["def ", "import os"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=100)))
"""


def _card(config: ModelConfig, tokenizer: str | None) -> str:
    equations = "\n".join(f"- `{mixer.name}`: {mixer.equation}" for mixer in dict.fromkeys(config.mixers))
    tokens = "raw bytes" if tokenizer is None else f"tokens of tiktoken's {tokenizer}"
    if tokenizer is None:
        classes, use = "AutoModelForCausalLM, AutoTokenizer", _CARD_USE
    else:
        # Its vocabulary is not exported.
        classes, use = "AutoModelForCausalLM", ""
    return f"""# {config.pattern}, {format_count(num_params(config))} parameters

A language model on {tokens}, trained with elman: width {config.dim}, depth {config.depth}.

{equations}

```python
from transformers import {classes}

folder = "."  # the one that this file lies in
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
{use}```

With the package elman installed its GPU kernels are used; without it, plain PyTorch that lies in this folder.
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
