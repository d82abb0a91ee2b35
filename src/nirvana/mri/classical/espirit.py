"""Coil sensitivities by ESPIRiT (Uecker et al., 2014)."""

import numpy as np

from nirvana.mri.classical.common import AXES, central_rows, ifft2c
from nirvana.mri.classical.peers import EspiritSettings


def espirit_maps(
    calibration: np.ndarray, size: tuple[int, int], settings: EspiritSettings | None = None
) -> np.ndarray:
    """Coil sensitivities from the middle of k-space, one set.

    With P the projection on the leading singular space of the calibration patches, and R its sums
    along equal displacements, the sensitivities in pixel r are the leading eigenvector of
    sum_d R[:, :, d] exp(2 pi i d r / N) / kernel size. sigpy's own version needs a square
    calibration region; this one uses up to `calibration_rows` rows of the sampled columns, which
    at 8 to 10 columns gains more than a decibel.

    Args:
        calibration: complex `[coils, h, w]`, fully sampled, around the origin.
        size: H and W of the maps.
        settings: see `EspiritSettings`.

    Returns:
        complex64 `[coils, H, W]`, of unit norm over the coils or zero. Their common phase is that
        of the coils' first principal component, so that the image's stays smooth.
    """
    settings = settings or EspiritSettings()
    height, width = size
    middle = central_rows(calibration, settings.calibration_rows)
    coils, rows, columns = middle.shape
    # About half of the samples must remain for the kernel to be shifted over.
    kernel = (min(settings.kernel, (rows + 2) // 2), min(settings.kernel, (columns + 2) // 2))
    projection = _patch_projection(middle, kernel, settings.threshold)
    sums = np.zeros((coils, coils, 2 * kernel[0] - 1, 2 * kernel[1] - 1), dtype=np.complex64)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            down, right = kernel[0] - 1 - i, kernel[1] - 1 - j
            block = projection[..., i, j].transpose(0, 3, 1, 2)
            sums[..., down : down + kernel[0], right : right + kernel[1]] += block
    padded = np.zeros((coils, coils, height, width), dtype=np.complex64)
    above, before = height // 2 - kernel[0] + 1, width // 2 - kernel[1] + 1
    padded[..., above : above + sums.shape[2], before : before + sums.shape[3]] = sums
    gram = ifft2c(padded, norm="forward").transpose(2, 3, 0, 1) / np.prod(kernel)
    values, vectors = np.linalg.eigh(gram)
    maps, certainty = vectors[..., -1], values[..., -1]
    component = np.linalg.eigh(np.einsum("chw,dhw->cd", middle, middle.conj()))[1][:, -1]
    maps = maps * np.exp(-1j * np.angle(maps @ component.conj()))[..., None]
    return np.where(certainty > settings.crop, maps.transpose(2, 0, 1), 0).astype(np.complex64)


def _patch_projection(middle: np.ndarray, kernel: tuple[int, int], threshold: float) -> np.ndarray:
    """The projection on the patches' signal space, `[coils, k, l, coils, k, l]`."""
    windows = np.lib.stride_tricks.sliding_window_view(middle, kernel, axis=AXES)
    size = len(middle) * kernel[0] * kernel[1]
    # In double precision: the square of a low threshold is near the rounding of float32.
    patches = windows.transpose(0, 3, 4, 1, 2).reshape(size, -1).astype(np.complex128)
    values, vectors = np.linalg.eigh(patches @ patches.conj().T)
    # The eigenvalues are the squares of the singular values.
    signal = vectors[:, values > threshold**2 * values[-1]]
    projection = (signal @ signal.conj().T).astype(middle.dtype)
    return projection.reshape(len(middle), *kernel, len(middle), *kernel)
