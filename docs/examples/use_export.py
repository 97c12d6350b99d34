"""Where torch and transformers are and elman is not: python use_export.py FOLDER LOGITS, both made where elman is."""

import importlib.util
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file = sys.argv[1:]
print(f"torch {torch.__version__}, transformers {transformers.__version__}, elman {importlib.util.find_spec('elman')}")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

saved = torch.load(file)
with torch.no_grad():
    logits = model(saved["tokens"]).logits
difference = (logits - saved["logits"]).abs().max().item()
print(f"logits {tuple(logits.shape)}, largest {logits.abs().max():.2f}")
print(f"they differ from elman.load's by {difference:.1e} at most")

prompts = ["def ", "import os\n", "class Test"]
options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
batch = tokenizer(prompts, return_tensors="pt", padding=True)
texts = tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
for prompt, text in zip(prompts, texts, strict=True):
    alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)
    print(f"{text!r}, {'as' if tokenizer.decode(alone[0]) == text else 'NOT as'} the prompt alone")
