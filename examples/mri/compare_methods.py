"""
Compare methods on a scan
=========================

Zero-filled, SENSE, L1-wavelet and the packaged codec on the same columns of the same scan, with
the scores over the volume, the scores of the slice that is shown, and error maps on one scale.

The scan is simulated from a real volume, and simulated scans are what the codec learned from. On
measured multi-coil scans it is behind BART: compare on your own before you believe a table.
"""

import tempfile
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt

from nirvana.mri import load_codec
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.scans import target_of, undersample_scan
from nirvana.mri.data.simulate import Simulation, simulate_scan
from nirvana.mri.evaluate.compare import run_methods, score_rows
from nirvana.mri.evaluate.figure import panel
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_spacing, read_volume
from nirvana.mri.physics.masks import Sampling, calibration_width

path = Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
settings = Simulation(noise=(0.005, 0.005))
scan = simulate_scan(read_volume(path)[10:13], "brain", 0, settings, read_spacing(path))
kspace, mask = undersample_scan(scan, Sampling("equispaced", 4.0, 0.08), seed=0)
middle_columns = calibration_width(mask)

# %%
# A method is a function of k-space and mask
# ------------------------------------------
# Add one of your own here: it gets complex ``[slices, coils, H, W]`` and bool ``[W]``, and returns
# real ``[slices, H, W]``. With ``workers=1`` the classical methods start no processes, which a
# script without ``if __name__ == "__main__"`` needs.

codec = load_codec()
methods = {
    "zero-filled": zero_filled,
    "SENSE": lambda k, m: sense(k, m, middle_columns, workers=1),
    "L1-wavelet": lambda k, m: l1_wavelet(k, m, middle_columns, workers=1),
    "Nirvana": codec.reconstruct,
}
results = run_methods(kspace, mask, methods)
target = target_of(scan)

# %%
# Scores
# ------
# SSIM, PSNR and NMSE of the volume, as fastMRI defines them; ``_head`` within the head.

rows = score_rows(target, results)
for row in rows:
    inside = f"in the head {row['psnr_head']:.2f} dB"
    print(f"{row['method']:12} SSIM {row['ssim']:.3f}  PSNR {row['psnr']:.2f} dB  {inside}")

# %%
# The picture
# -----------
# ``panel`` writes a PNG: one grey scale, one error scale, and under each image the scores of this
# slice alone.

middle = 1
images = {"fully sampled": target[middle]} | {
    name: volume[middle] for name, (volume, _) in results.items()
}
scores = {name: score(target[[middle]], volume[[middle]]) for name, (volume, _) in results.items()}
file = Path(tempfile.mkdtemp()) / "panel.png"
panel(file, images, "fully sampled", scores, f"simulated scan, slice {middle + 1}, 4x")
picture = plt.imread(file)
height, width = picture.shape[:2]
figure, axes = plt.subplots(figsize=(14, 14 * height / width), layout="constrained")
axes.imshow(picture)
axes.set_axis_off()
plt.show()
