"""
A first scan
============

Take a real brain volume, simulate a scan of it with eight coils, leave out three of four columns
of its k-space, and reconstruct the images with the packaged codec.
"""

from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nirvana.mri import reconstruct
from nirvana.mri.data.scans import target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_spacing, read_volume
from nirvana.mri.physics.masks import Sampling

path = Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
volume = read_volume(path)[10:14]
scan = simulate_scan(
    volume, "brain", seed=0, settings=Simulation(noise=(0.005, 0.005)), spacing=read_spacing(path)
)
print("k-space", scan.kspace.shape, scan.kspace.dtype, "[slices, coils, H, W]")

# %%
# Leave columns out
# -----------------
# The scanner would have measured a quarter of the columns: every fourth or so, and a block in the
# middle, from which the sensitivities of the coils are learned. ``reconstruct`` finds the measured
# columns by itself: the others are zero.

mask = Sampling("equispaced", 4.0, 0.08).mask(scan.kspace.shape[-1], seed=0).numpy()
kspace = scan.kspace * mask
print(f"{mask.mean():.1%} of the columns")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for each, data, name in zip(
    axes, (scan.kspace, kspace), ("fully sampled", "undersampled"), strict=True
):
    each.imshow(np.log10(np.abs(data[1, 0]) + 1e-3), cmap="gray", vmin=-3, vmax=0)
    each.set_title(f"k-space of one coil, {name}")
    each.set_axis_off()
plt.show()

# %%
# Reconstruct
# -----------
# An inverse Fourier transform of what was measured, combined over coils, folds the head over
# itself ("zero-filled"). The codec puts the image through a frozen language model and several
# cascades; at the end the measured columns are exactly the measurement.

target = target_of(scan)
results = {
    "fully sampled": target,
    "zero-filled": reconstruct(kspace, method="zero-filled"),
    "Nirvana": reconstruct(kspace),
}
for name in ("zero-filled", "Nirvana"):
    print(f"{name}: {score(target, results[name])['psnr']:.1f} dB over these slices")

white = float(np.quantile(target[1], 0.998))
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for each, (name, images_of) in zip(axes, results.items(), strict=True):
    each.imshow(images_of[1], cmap="gray", vmin=0, vmax=white)
    each.set_title(name)
    each.set_axis_off()
plt.show()
# sphinx_gallery_thumbnail_number = 2
