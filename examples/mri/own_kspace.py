"""
A k-space array of your own
===========================

Any complex array will do, once its axes and its origin are those that the package uses: ``[slices,
coils, H, W]``, the readout along H, the phase encoding along W, and the origin at ``[H // 2, W //
2]``. This example begins with an array that has neither, as many raw data readers return it, and
ends with files that keep the geometry.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from skimage.data import shepp_logan_phantom
from skimage.transform import resize

from nirvana.mri import reconstruct
from nirvana.mri.io import write_nifti, write_reconstruction
from nirvana.mri.pipeline import as_scan

# %%
# The array
# ---------
# A phantom seen by six coils around it, transformed by plain ``np.fft.fft2``: the origin of its
# k-space is in the corner. The axes are H, W, coils; the phase encoding runs along the first of
# them.

size, coils = 192, 6
rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
phantom = np.asarray(resize(shepp_logan_phantom(), (size, size)), dtype=np.float32)
angles = 2 * np.pi * np.arange(coils) / coils
distances = [(rows - np.sin(a)) ** 2 + (columns - np.cos(a)) ** 2 for a in angles]
sensitivities = np.stack(
    [np.exp(-d / 1.5 + 1j * a) for d, a in zip(distances, angles, strict=True)], axis=-1
)
raw = np.fft.fft2(phantom[..., None] * sensitivities, axes=(0, 1), norm="ortho")
rng = np.random.default_rng(0)
raw += 0.002 * (rng.standard_normal(raw.shape) + 1j * rng.standard_normal(raw.shape))
print(raw.shape, raw.dtype)

# %%
# Put it in order
# ---------------
# Move the coils to the front and the phase encoding to the end, shift the origin to the middle,
# and add the axis of slices. Then look at it: bright in the middle, and an image with one head in
# the middle. An origin in the corner would show as an image whose quarters are swapped in sign, or
# as k-space that is bright in its corners.

kspace = np.moveaxis(raw, -1, 0).swapaxes(-2, -1)
kspace = np.fft.fftshift(kspace, axes=(-2, -1))[None]
# The image's origin, too: np.fft puts pixel [0, 0] where the package puts the middle one.
kspace = kspace * (-1.0) ** np.add.outer(np.arange(size), np.arange(size))

mask = np.zeros(size, dtype=bool)
mask[1::4] = True
mask[size // 2 - 8 : size // 2 + 8] = True
scan = as_scan(kspace * mask, name="phantom", spacing=(5.0, 1.0, 1.0))

figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
axes[0].imshow(np.log10(np.abs(raw[..., 0]) + 1e-3), cmap="gray")
axes[0].set_title("as it came: origin in the corners")
axes[1].imshow(np.log10(np.abs(kspace[0, 0]) + 1e-3), cmap="gray")
axes[1].set_title("in order: origin in the middle")
axes[2].imshow(np.log10(np.abs(scan.kspace[0, 0]) + 1e-3), cmap="gray")
axes[2].set_title(f"{mask.mean():.0%} of the columns")
for each in axes:
    each.set_axis_off()
plt.show()

# %%
# Reconstruct it
# --------------
# Without a mask the columns that are not zero are taken as measured. The scale of the result is
# that of the k-space's own images.

images = reconstruct(scan)
folded = reconstruct(scan, method="zero-filled")
full = reconstruct(kspace)  # nothing is missing: its Fourier transform
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
for each, image, name in zip(
    axes, (full, folded, images), ("all columns", "zero-filled", "Nirvana"), strict=True
):
    each.imshow(image[0], cmap="gray", vmin=0, vmax=float(np.quantile(full, 0.998)))
    each.set_title(name)
    each.set_axis_off()
plt.show()

# %%
# A drawn phantom is far from the brains that the packaged codec learned from; its flat surfaces
# and sharp rims come out, its fine structures less so.
#
# Write it
# --------
# As NIfTI, and as HDF5 beside the mask. Without an affine no orientation is claimed, only the
# spacing.

out = Path(tempfile.mkdtemp())
write_nifti(out / "phantom.nii.gz", images, scan.affine, scan.spacing)
write_reconstruction(out / "phantom.h5", images, scan, mask, method="nirvana")
print(sorted(path.name for path in out.iterdir()))
# sphinx_gallery_thumbnail_number = 2
