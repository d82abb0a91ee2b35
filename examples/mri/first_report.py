"""
A first report
==============

Paint a bright spot into one slice of a real brain volume, simulate a scan of it, and let the
packaged reporter read the slices: one sentence each, and the probability of every fact.

The reporter learned from lesions that the package simulates in T1, T2 and FLAIR slices, and from
no echo-planar image such as this one. It is no proof of what it does on patients. Research
software, not for diagnosis.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nirvana.mri import load_reporter, report
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import read_affine, read_volume
from nirvana.mri.physics.masks import Sampling

path = Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
volume, spacing = read_volume(path)[11:16].copy(), (2.2, 2.0, 2.0)  # mm

# %%
# A spot in the third slice
# -------------------------
# A soft disc of 24 mm, as bright as fluid, in the white matter on the right of the picture. In
# radiological convention that is the left of the patient.

rows, columns = np.mgrid[: volume.shape[1], : volume.shape[2]]
_, height, width = spacing
distance = np.hypot((rows - 60) * height, (columns - 78) * width)
spot = 1 / (1 + np.exp(distance - 12))
volume[2] = volume[2] * (1 - spot) + spot

scan = simulate_scan(volume, "brain", 0, Simulation(noise=(0.005, 0.005)), spacing)
scan = replace(scan, affine=read_affine(path), target=None)
mask = Sampling("equispaced", 4.0, 0.08).mask(scan.kspace.shape[-1], seed=0).numpy()
scan = replace(scan, kspace=scan.kspace * mask)

# %%
# Read the slices
# ---------------
# The packaged threshold was chosen so that at most one normal slice in a hundred gets a finding. In
# an image as foreign as this one, no slice may reach it.

reporter = load_reporter("reporter")
found = report(scan, slices=range(len(volume)), reporter=reporter)
print(f"threshold {reporter.threshold:.4f}")
print(found.text)

# %%
# Every fact has a probability, so a threshold of your own can be applied to them: lower ones find
# more, and name more normal slices. Side and signal are right here; the size is not, 24 mm were
# painted.

reporter.threshold = 0.9
found = report(scan, slices=range(len(volume)), reporter=reporter)
print(found.text)
reading = found.readings[2]
for fact, probability in reading.to_dict()["probability"].items():
    print(f"{fact:12} {reading.to_dict()['facts'][fact]!s:20} {probability:.0%}")

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
image = found.images[2]
axes[0].imshow(image, cmap="gray", vmin=0, vmax=float(np.quantile(image, 0.998)))
axes[0].set_axis_off()
axes[0].set_title("the slice with the spot, as the reporter sees it")
names = [f"slice {index + 1}" for index in found.readings]
axes[1].barh(names, [each.finding for each in found.readings.values()], color="#0072b2")
axes[1].axvline(reporter.threshold, color="#d55e00", linestyle="--")
axes[1].invert_yaxis()
axes[1].set(xlim=(0, 1), xlabel="probability of a finding")
plt.show()
