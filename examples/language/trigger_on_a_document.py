"""
What the Trigger does to a document
===================================

At every token each layer's Trigger takes a step of gradient descent on a task of the token's own.
This example reads a page of Python's reference, which the packaged model was not trained on, and
draws the steps, the gates that they set, and what happens to the predictions without them.
"""

import math
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

import nirvana
from nirvana.model.trigger import TriggerTrace

model, tokenizer = nirvana.load("tiny")
text = topics["for"] + topics["while"] + topics["try"]
ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
print(f"{ids.shape[1]} tokens")

# %%
# The traces
# ----------
# ``output_trigger`` returns a trace for each layer that has a Trigger: its loss before and after
# the step, the length of the step, and the gate t, which is near 1 where the token reads the
# window and near 0 where it reads the long memory.


def score(ids: torch.Tensor) -> tuple[torch.Tensor, tuple[TriggerTrace, ...]]:
    """Bits of every token after the first, and the traces."""
    with torch.no_grad():
        out = model(ids, output_trigger=True)
    log_p = torch.log_softmax(out.logits[0, :-1].float(), dim=-1)
    return -log_p.gather(1, ids[0, 1:, None])[:, 0] / math.log(2), out.trigger


bits, traces = score(ids)
with nirvana.without_trigger(model):
    bits_without, _ = score(ids)
for i, trace in enumerate(traces, start=model.config.num_prelude_layers + 1):
    before, after = float(trace.loss_before.mean()), float(trace.loss_after.mean())
    print(f"layer {i}: loss {before:.3f} before the step, {after:.3f} after")

# %%
# Step and gate of every token, layer by layer. Colours of the lower picture are relative to a
# layer's own mean gate.

steps = torch.stack([trace.change[0] for trace in traces])
gates = torch.stack([trace.gates[0, :, 0] for trace in traces])
gates = gates - gates.mean(dim=1, keepdim=True)

figure, axes = plt.subplots(2, 1, figsize=(10, 5), sharex=True, layout="constrained")
shown = slice(0, 200)
image = axes[0].imshow(steps[:, shown], aspect="auto", cmap="viridis", interpolation="none")
figure.colorbar(image, ax=axes[0], label="length of the step")
limit = float(gates[:, shown].abs().max())
image = axes[1].imshow(
    gates[:, shown], aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none"
)
figure.colorbar(image, ax=axes[1], label="gate, minus its mean")
first = model.config.num_prelude_layers + 1
for each in axes:
    each.set_yticks(range(len(traces)), range(first, first + len(traces)))
    each.set_ylabel("layer")
axes[1].set_xlabel("token")
plt.show()

# %%
# Tokens coloured by their step
# -----------------------------
# The first tokens as text, on a ground that is darker where the Trigger's step, over all layers,
# is longer.

change = steps.square().sum(dim=0).sqrt()
low, high = (float(change[:120].quantile(q)) for q in (0.05, 0.95))
figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
axes.set_axis_off()
columns, x, y = 96, 0, 0
for token, size in zip(ids[0, 1:120].tolist(), change[1:120].tolist(), strict=True):
    word = str(tokenizer.decode([token])).replace("\n", "⏎")
    if x + len(word) > columns:
        x, y = 0, y + 1
    share = min(max((size - low) / (high - low), 0.0), 1.0)
    colour = plt.get_cmap("YlOrBr")(0.7 * share)
    axes.add_patch(Rectangle((x, -y - 0.5), len(word), 0.95, color=colour, lw=0))
    axes.text(x, -y, word, family="monospace", fontsize=12, va="center")
    x += len(word)
axes.set(xlim=(0, columns), ylim=(-y - 1, 1))
plt.show()

# %%
# With and without
# ----------------
# Bits per token, averaged over 64 tokens. The model was trained with its Trigger, and pays where
# it is switched off. That a model trained without one would be worse is another question; the
# study of it found no difference.


def smoothed(values: torch.Tensor, width: int = 64) -> torch.Tensor:
    """The mean of each token and the `width - 1` tokens before it."""
    return values.unfold(0, width, 1).mean(dim=1)


print(f"{float(bits.mean()):.2f} bits a token, without the steps {float(bits_without.mean()):.2f}")
figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
place = torch.arange(64, len(bits) + 1)
axes.plot(place, smoothed(bits), color="#0072b2", label="Trigger on")
axes.plot(place, smoothed(bits_without), color="#d55e00", linestyle="--", label="Trigger off")
axes.set(xlabel="token", ylabel="bits a token")
axes.legend(frameon=False)
plt.show()
