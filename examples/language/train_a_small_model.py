"""
Train a small language model
============================

Forty steps of the packaged configuration ``quickstart``: novels in the public domain, which ship
with the package. The run writes its configuration, a log, checkpoints and the finished model; the
same call with ``resume=True`` continues an interrupted one.
"""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nirvana.packaged import config_file
from nirvana.train.language import train

out = Path(tempfile.mkdtemp()) / "run"
settings = ["--run.out", str(out), "--run.steps", "40", "--run.log_interval", "2"]
outcome = train(config_file("quickstart"), settings)
print(f"{outcome.step} steps, finished: {outcome.finished}")

# %%
# The log
# -------
# ``metrics.jsonl`` has a line for every log: loss, gradient norm, learning rate, speed, and of the
# Trigger its loss before and after the step and the mean gate.

lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
steps = [line["step"] for line in lines]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
axes[0].plot(steps, [line["loss"] for line in lines], color="#0072b2")
axes[0].set(xlabel="step", ylabel="loss, nats a token")
for name, colour in (("loss_before", "#d55e00"), ("loss_after", "#009e73")):
    label = name.replace("_", " ") + " the step"
    axes[1].plot(steps, [line["trigger"][name] for line in lines], color=colour, label=label)
axes[1].set(xlabel="step", ylabel="the Trigger's own loss")
axes[1].legend(frameon=False)
plt.show()

# %%
# The model
# ---------
# The folder is one of transformers. After forty steps the model knows frequent syllables; the
# whole configuration takes two minutes, and the larger ones of ``nirvana config`` take hours on a
# GPU.

model = AutoModelForCausalLM.from_pretrained(out / "model")
tokenizer = AutoTokenizer.from_pretrained(out / "model")
inputs = tokenizer("The old man", return_tensors="pt")
torch.manual_seed(0)
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.8)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
