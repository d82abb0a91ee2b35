"""
A first text
============

Load the packaged model, continue a text, and see how many bits each token costs. The second time a
sentence is read it costs less: the model's state remembers it.
"""

import math

import matplotlib.pyplot as plt
import torch

import nirvana

model, tokenizer = nirvana.load("tiny")
print(f"{model.num_parameters() / 1e6:.1f} million parameters")

# %%
# Continue a text
# ---------------
# The model and its tokenizer are those of transformers, so ``generate`` is, too. With 5.8 million
# parameters the model knows the form of such a sentence, and no facts.

inputs = tokenizer("The patients were randomly assigned to", return_tensors="pt")
torch.manual_seed(0)
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

# %%
# What a token costs
# ------------------
# The cost of a token is -log2 of the probability that the model gave it. Read an unusual sentence,
# other words, and the same sentence again.

sentence = " The harbour pilot Ragnhild Oksanen counted eleven red lanterns."
text = "Monday." + sentence + " Then it rained for two days, and nobody went out." + sentence
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
log_p = torch.log_softmax(logits[0, :-1].float(), dim=-1)
bits = -log_p.gather(1, ids[0, 1:, None])[:, 0] / math.log(2)

length = len(tokenizer(sentence, add_special_tokens=False).input_ids)
start = len(tokenizer("Monday.", add_special_tokens=False).input_ids)
first, second = bits[start : start + length], bits[-length:]
print(f"bits: {float(first.sum()):.0f} at first, {float(second.sum()):.0f} the second time")

figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
places = torch.arange(length)
axes.bar(places - 0.2, first, 0.4, label="read for the first time", color="#0072b2")
axes.bar(places + 0.2, second, 0.4, label="read again", color="#e69f00")
names = [str(tokenizer.decode([token])) for token in ids[0, -length:].tolist()]
axes.set_xticks(places, names, rotation=60, ha="right")
axes.set_ylabel("bits")
axes.legend(frameon=False)
plt.show()

# %%
# The state does not grow
# -----------------------
# What the model keeps of a text has a constant size once the window is full, here after 256
# tokens. A Transformer keeps keys and values of every token.


def kept(length: int) -> int:
    """Bytes of the cache after a text of so many tokens."""
    with torch.no_grad():
        cache = model(torch.full((1, length), 100), use_cache=True).past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values()]
    tensors += [part for each in tensors if isinstance(each, list | tuple) for part in each]
    tensors += [part for each in tensors if isinstance(each, dict) for part in each.values()]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))


for count in (64, 256, 1024, 4096):
    print(f"{count:5} tokens: {kept(count) / 1024:.0f} KiB")
