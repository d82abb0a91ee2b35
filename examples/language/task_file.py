"""
A task file for your domain
===========================

The packaged model has never read Python's reference. Let it read 32 pages of it with its weights
frozen: a few thousand task parameters learn, each token scored before it teaches, and go into a
file of 18 kB. The model with that file predicts other pages better.
"""

import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt

import nirvana
from nirvana.adapt import load_task, save_task
from nirvana.adapt.config import config_of
from nirvana.evaluate.adapted import learn_domain
from nirvana.evaluate.perplexity import read_scores
from nirvana.packaged import resolve

model, tokenizer = nirvana.load("tiny")
work = Path(tempfile.mkdtemp())

# %%
# The domain's texts
# ------------------
# A line of JSON for each document. Every fifth page is kept for the test. Pages are cut, so that
# this takes half a minute.

pages = [text[:1500] for _, text in sorted(topics.items()) if len(text) > 1000][:40]
test, train = pages[::5], [page for i, page in enumerate(pages) if i % 5]
texts = work / "python.jsonl"
texts.write_text("".join(json.dumps({"text": page}) + "\n" for page in train))
print(f"{len(train)} pages to learn from, {len(test)} to test on")

# %%
# Learn
# -----
# ``nirvana adapt tiny python.jsonl --out python.safetensors`` does the same. The settings are the
# model's own, in the file ``adapt.json`` of its folder.

settings = config_of(resolve("tiny"))
task, (first, second) = learn_domain(model, tokenizer, [texts], settings)
file = work / "python.safetensors"
save_task(task, file)
print(f"{file.name}: {task.values.shape[1]:,} numbers, {file.stat().st_size / 1000:.0f} kB")
print(f"as they were read: {first.bits_per_byte:.3f} bits per byte in the first half,")
print(f"{second.bits_per_byte:.3f} in the second")

# %%
# Use it
# ------
# Within ``applied`` every forward and ``generate`` uses the task parameters; after it the model is
# what it was. A task of another model is refused. In a terminal: ``nirvana eval tiny --task FILE``,
# ``nirvana generate tiny --task FILE``, and for a server ``python -m nirvana.launch --task FILE``.


def scores(documents: list[str]) -> list[float]:
    """Bits per byte of each document."""
    return [each.total.bits_per_byte for each in read_scores(model, tokenizer, documents)]


task = load_task(file)
before = scores(test)
with task.applied(model):
    after = scores(test)
better = sum(b > a for b, a in zip(before, after, strict=True))
mean = [sum(each) / len(each) for each in (before, after)]
print(f"bits per byte {mean[0]:.3f} without the file, {mean[1]:.3f} with it")
print(f"{better} of {len(test)} pages are predicted better")

# %%
# What it does elsewhere
# ----------------------
# A task is of its domain. On English prose, of which the model has read much, the same file gains
# next to nothing: one of these texts is predicted worse, the other about as before.

prose = [
    "It was a dark night, and no one was on the road. The old man had left his lamp in the window, "
    "as he did every evening, although nobody had come that way since the bridge was taken down. ",
    "The court held that the defendant was liable, because both parties had signed the contract "
    "before the goods were delivered, and that the damages were to be paid within a month. ",
]
plain = scores(prose)
with task.applied(model):
    changed = scores(prose)
for old, new in zip(plain, changed, strict=True):
    print(f"prose: bits per byte {old:.3f} without the file, {new:.3f} with it")

figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
low, high = 1.0, max(*before, *plain) + 0.2
axes.plot([low, high], [low, high], color="#999999", linewidth=1, label="no change")
axes.plot(before, after, "o", color="#0072b2", label="pages of the reference")
axes.plot(plain, changed, "D", color="#d55e00", label="prose")
axes.set(xlabel="bits per byte, frozen model", ylabel="bits per byte, with the task file")
axes.legend(frameon=False)
plt.show()
