"""
Adopt a Transformer
===================

A Llama becomes a Nirvana model: its attention is the window branch, and a linear branch beside it
starts at zero. Two stages of distillation let that branch learn the teacher's attention, layer by
layer, and then the teacher's distribution. The teacher here is small and has random weights, so
that this takes half a minute on a CPU; a folder or a ``.gguf`` file of your own takes its place.
"""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nirvana
from nirvana.data.tokenizer import copy_tokenizer
from nirvana.model.adopt import adopt
from nirvana.packaged import packaged
from nirvana.train.distill import distill

work = Path(tempfile.mkdtemp())
shards = packaged("quickstart") / "train"  # tokens of novels, and their tokenizer

# %%
# A teacher
# ---------
# With as many tokens as the packaged text has.

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=json.loads((shards / "meta.json").read_text())["vocab_size"],
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    initializer_range=0.2,
)
LlamaForCausalLM(config).save_pretrained(work / "teacher")
copy_tokenizer(shards / "tokenizer", work / "teacher")

# %%
# Adopt it
# --------
# Within the window of 32 tokens the adopted model computes what its teacher computes; one more
# token, the first of the text, stays in view as the attention's sink. Beyond the window the two
# differ, until the linear branch has learned.

report = adopt(work / "teacher", work / "adopted", "both", window=32, sinks=1)
print(f"mapped: {report['mapped parameters']:,} of {report['parameters']:,} parameters")

teacher = AutoModelForCausalLM.from_pretrained(work / "teacher").eval()
tokens = torch.randint(config.vocab_size, (1, 128))


def divergence(folder: Path) -> torch.Tensor:
    """The teacher's Kullback-Leibler divergence from a model, nats for each position."""
    model, _ = nirvana.load(folder)
    with torch.no_grad():
        own, right = (each(tokens).logits.log_softmax(-1)[0] for each in (model, teacher))
    return (right.exp() * (right - own)).sum(-1)


untrained = divergence(work / "adopted")
print(f"first 32 tokens: {untrained[:32].max():.1e} nats; later: {untrained[32:].mean():.3f}")

# %%
# Distil it
# ---------
# The same as ``nirvana distill CONFIG``, one stage after the other, each from the weights of the
# one before.

losses = {}
for stage, initial in (("attention", "adopted"), ("logits", "attention")):
    settings = {
        "distill.teacher": work / "teacher",
        "distill.stage": stage,
        "data.train.text": shards,
        "data.context_length": 128,
        "data.batch_size": 4,
        "optim.lr": 0.005,
        "optim.weight_decay": 0.0,
        "optim.warmup_steps": 5,
        "run.initial": work / initial,
        "run.out": work / stage,
        "run.steps": 40,
        "run.log_interval": 1,
        "run.compile": "false",
    }
    (work / f"{stage}.toml").write_text("")  # all settings are given here
    distill(work / f"{stage}.toml", [f"--{key}={value}" for key, value in settings.items()])
    lines = (work / stage / "metrics.jsonl").read_text().splitlines()
    losses[stage] = [json.loads(line)["loss"] for line in lines]
    print(f"{stage}: loss {losses[stage][0]:.3f} -> {losses[stage][-1]:.3f}")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
names = {"attention": "difference of attention outputs", "logits": "divergence, nats a token"}
for axis, (stage, name), colour in zip(axes, names.items(), ("#0072b2", "#d55e00"), strict=True):
    axis.plot(losses[stage], color=colour)
    axis.set(title=f"stage: {stage}", xlabel="step", ylabel=name)
plt.show()
