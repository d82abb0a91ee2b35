"""
Compare methods on a scan
=========================

Zero-filled, SENSE, L1-wavelet and the packaged codec on the same columns of the same scan, with
the scores over the volume, the scores of the slice that is shown, and error maps on one scale.

The scan is simulated from a real volume, and simulated scans are what the codec learned from. On
measured multi-coil scans it is behind BART: compare on your own before you believe a table.
"""

import tempfile
from functools import partial
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt

from nirvana.mri import load_codec
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.scans import measure, target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.compare import run_methods, score_rows
from nirvana.mri.evaluate.figure import panel
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_spacing, read_volume
from nirvana.mri.methods import classical_method, codec_method, fourier_method
from nirvana.mri.physics.masks import Sampling

path = Path(str(files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
settings = Simulation(noise=(0.005, 0.005))
scan = simulate_scan(read_volume(path)[10:13], "brain", 0, settings, read_spacing(path))
measurement = measure(scan).undersampled(Sampling("equispaced", 4.0, 0.08), seed=0)

# %%
# A method is a function of an acquisition
# ----------------------------------------
# Add one of your own here: ``classical_method`` makes a method of a function that gets the
# acquisition, with its k-space and mask of every slice, and yields completed k-space, complex
# ``[coils, H, W]``, slice by slice. With ``workers=1`` those of the package start no processes,
# which a script without ``if __name__ == "__main__"`` needs.

methods = {
    "zero-filled": fourier_method,
    "SENSE": classical_method(partial(sense, workers=1)),
    "L1-wavelet": classical_method(partial(l1_wavelet, workers=1)),
    "Nirvana": codec_method(load_codec(), batch_size=4),
}
results = run_methods(measurement, methods)
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
    name: result.images[middle] for name, result in results.items()
}
scores = {
    name: score(target[[middle]], result.images[[middle]]) for name, result in results.items()
}
file = Path(tempfile.mkdtemp()) / "panel.png"
panel(file, images, "fully sampled", scores, f"simulated scan, slice {middle + 1}, 4x")
picture = plt.imread(file)
height, width = picture.shape[:2]
figure, axes = plt.subplots(figsize=(14, 14 * height / width), layout="constrained")
axes.imshow(picture)
axes.set_axis_off()
plt.show()
