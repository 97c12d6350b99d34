"""Run as a script, where transformers is and elman need not be: does an export do what the run's model did?

    python tests/export/check_transformers.py FOLDER EXPECTED [--without-elman]

EXPECTED is a file of torch.save, as ``expected`` in test_huggingface.py makes it.
"""

import dataclasses
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

folder, expected = sys.argv[1:3]
if "--without-elman" in sys.argv:
    sys.modules.update(dict.fromkeys(("elman", "tyro", "cuda", "tiktoken"), None))  # type: ignore[arg-type]

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

CACHE = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
want = torch.load(expected)
text, short = "line 1 of\x1eanother", "li"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
package = type(model.model).__module__.partition(".")[0]
without = "--without-elman" in sys.argv or importlib.util.find_spec("elman") is None
assert (package == "elman") != without, package

# A byte is a token, whatever the text.
for each in (text, "é Ğ\x1e\n\t\0 ñ 中 🎉", "  a  b ", ""):
    tokens = tokenizer(each).input_ids
    assert tokens == list(each.encode()), (each, tokens)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == each
assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0x1E

tokens = tokenizer(text, return_tensors="pt").input_ids
everything = {"attention_mask": torch.ones_like(tokens)}
with torch.no_grad():
    logits = model(tokens).logits
    torch.testing.assert_close(logits, want["logits"])
    loss = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))
    part = model(tokens[:, :5])
    rest = model(tokens[:, 5:], attention_mask=everything["attention_mask"], **{CACHE: getattr(part, CACHE)})
    torch.testing.assert_close(torch.cat((part.logits, rest.logits), 1), logits)

# By the state, by whole texts each time, filled up in front, by beams, and going on from what was returned.
options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
cached = model.generate(tokens, **everything, **options)
assert cached[0, tokens.shape[1] :].tolist() == want["texts"][text]
assert model.generate(tokens, **everything, use_cache=False, **options).tolist() == cached.tolist()
batch = tokenizer([text, short], return_tensors="pt", padding=True)
assert batch.attention_mask[1, 0] == 0
several = model.generate(**batch, **options)[:, batch.input_ids.shape[1] :].tolist()
assert several == [want["texts"][text], want["texts"][short]]
beams = [model.generate(**batch, **options, num_beams=3, use_cache=use).tolist() for use in (True, False)]
assert beams[0] == beams[1]
first = model.generate(tokens, **everything, return_dict_in_generate=True, **{**options, "max_new_tokens": 5})
mask = torch.ones_like(first.sequences)
state = {CACHE: getattr(first, CACHE)}
more = model.generate(first.sequences, attention_mask=mask, **state, **{**options, "max_new_tokens": 7})
assert more.tolist() == cached.tolist()

# It can be trained on, saved again, and held in half the memory.
model(tokens, labels=tokens).loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
with tempfile.TemporaryDirectory() as place:
    model.save_pretrained(place)
    again = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)

# A fill's successor is a row's first token, which nothing predicts; parts of a step's batch add up.
labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
filled = model(**batch, labels=labels).loss
apart = [tokenizer(each, return_tensors="pt").input_ids for each in (text, short)]
count = sum(each.shape[1] - 1 for each in apart)
parts = sum(model(each, labels=each, num_items_in_batch=count).loss for each in apart)
torch.testing.assert_close(filled, parts)


def refusal(run, message):
    """It raises a ValueError of this message."""
    said = "nothing"
    try:
        run()
    except ValueError as error:
        said = str(error)
    assert message in said, said


refusal(lambda: model.generate(torch.zeros(1, 0, dtype=torch.long)), "a text is empty")
refusal(lambda: model.generate(**tokenizer(["", text], return_tensors="pt", padding=True)), "a text is empty")
refusal(lambda: model(inputs_embeds=torch.zeros(1, 2, 16)), "give input_ids")
refusal(lambda: model(tokens[:, :0]), "holds no token")

# Weights or a config of another model are none to run.
with tempfile.TemporaryDirectory() as place:
    weights, written = load_file(f"{folder}/model.safetensors"), json.loads(Path(folder, "config.json").read_text())
    shutil.copytree(folder, place, dirs_exist_ok=True)
    name = next(name for name in weights if name.startswith("model.layers.1."))

    def load_with(elman, weights, **options):
        save_file(weights, f"{place}/model.safetensors", metadata={"format": "pt"})
        Path(place, "config.json").write_text(json.dumps({**written, "elman": elman}))
        AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)

    fewer = {key: value for key, value in weights.items() if key != name}
    refusal(lambda: load_with(written["elman"], fewer), f"{name} is missing (1 in all)")
    refusal(lambda: load_with({**written["elman"], "depth": 1}, weights), "is no part of it")
    other = {**weights, name: torch.zeros(2, 2)}
    refusal(lambda: load_with(written["elman"], other, ignore_mismatched_sizes=True), f"{name} has another shape")
    refusal(lambda: load_with(None, weights), "'elman' is not as elman export wrote it")
    refusal(lambda: load_with({}, weights), "'elman' is not as elman export wrote it")

# With more tokens it is saved as such.
with tempfile.TemporaryDirectory() as place:
    again.resize_token_embeddings(264)
    again.save_pretrained(place)
    wider = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    assert torch.equal(wider(tokens).logits, again(tokens).logits)
    assert wider(tokens).logits.shape[-1] == 264

half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
assert half(tokens).logits.dtype == torch.bfloat16
print(f"{folder}: as expected, by transformers {transformers.__version__}, torch {torch.__version__}, {package}")
