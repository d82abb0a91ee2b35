"""
Train a small codec
===================

A codec is an encoder and a decoder around a frozen language model. This one has 0.2 million
parameters and sees eighteen slices of one volume for half a minute: enough to learn to unfold
them, and too little to compare with anything. The training is that of ``nirvana mri train``, with
its checkpoints, log and export.
"""

import json
import tempfile
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nirvana.mri import load_codec, reconstruct
from nirvana.mri.data.scans import target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_volume
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.train.task import train

# %%
# Slices to learn from, and others to test on
# -------------------------------------------
# One volume is all that the dependencies carry. Training slices and test slices of the same head
# are alike, so the scores below show that the training works, not that the codec would work on
# another person.

path = Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
volume = read_volume(path)
work = Path(tempfile.mkdtemp())
np.save(work / "train.npy", volume[:18])
np.save(work / "valid.npy", volume[20:])

# %%
# The configuration
# -----------------
# ``nirvana config codec`` writes one with every setting explained. Here is a small one: four
# simulated coils, 4x, and two cascades after the image decoder.

(work / "small.toml").write_text(
    f"""
[data]
train = ["{work}/train.npy"]
valid = ["{work}/valid.npy"]
batch_size = 4
sizes = [[96, 128]]
coils = [4]
accelerations = [4.0]
center_fractions = [0.08]
valid_slices = 4

[stage]
name = "joint"
l1_weight = 4.0

[codec]
sensitivity_features = [4, 8]
cascade_features = [16, 32]
image_cascades = 2
vit_dim = 48
vit_depth = 1
decoder_features = [8, 16, 24, 32]

[optim]
lr = 3e-3
warmup_steps = 10

[run]
out = "{work}/run"
steps = 50
device = "cpu"
precision = "float32"
compile = false
log_interval = 4
validation_interval = 10
checkpoint_interval = 50
"""
)
train(work / "small.toml")

# %%
# How it went
# -----------
# The frozen model was hashed before and after: a run in which one of its bits changed would have
# ended with an error.

lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
valid = [line for line in lines if "valid" in line]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
axes[0].plot([line["step"] for line in lines], [line["loss"] for line in lines], color="#0072b2")
axes[0].set(xlabel="step", ylabel="1 - SSIM + 4 L1")
steps = [line["step"] for line in valid]
axes[1].plot(
    steps, [line["valid"]["psnr"] for line in valid], "o-", color="#0072b2", label="this codec"
)
zero = [line["valid"]["zero_filled_psnr"] for line in valid]
axes[1].plot(steps, zero, "--", color="#d55e00", label="zero-filled")
axes[1].set(xlabel="step", ylabel="PSNR of the other slices, dB")
axes[1].legend(frameon=False)
plt.show()

# %%
# Use it
# ------

codec = load_codec(work / "run" / "model")
print(f"{codec.num_trained / 1e6:.2f} million trained parameters")
scan = simulate_scan(volume[20:], "test", seed=1)
kspace = scan.kspace * Sampling("equispaced", 4.0, 0.08).mask(scan.kspace.shape[-1], 1).numpy()
target = target_of(scan)
before, after = reconstruct(kspace, method="zero-filled"), reconstruct(kspace, codec=codec)
gain = score(target, after)["psnr"] - score(target, before)["psnr"]
print(f"{gain:+.1f} dB over the zero-filled image")

white = float(np.quantile(target[1], 0.998))
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
shown = {"fully sampled": target, "zero-filled": before, "after 50 steps": after}
for each, (name, images) in zip(axes, shown.items(), strict=True):
    each.imshow(images[1], cmap="gray", vmin=0, vmax=white)
    each.set_title(name)
    each.set_axis_off()
plt.show()
# sphinx_gallery_thumbnail_number = 2
