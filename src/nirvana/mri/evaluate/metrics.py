"""Image quality of a volume: SSIM, PSNR and NMSE as fastMRI defines them.

Nothing is rescaled: a reconstruction is compared on the scale of its target.
"""

from typing import Any

import numpy as np

from nirvana.errors import InputError

CROP = 320
SSIM_WINDOW = 7


def score(
    target: np.ndarray, reconstruction: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, float]:
    """SSIM, PSNR and NMSE of one volume.

    With t the target, r the reconstruction, both centre-cropped to at most 320 x 320 (and r to
    the target's size first), and m the maximum of t over the volume:

        ssim  mean over slices of scikit-image's SSIM, uniform window 7, data_range = m
        psnr  20 log10(m) - 10 log10(mean (t - r)^2), over the volume, in dB
        nmse  sum (t - r)^2 / sum t^2, over the volume

    Args:
        target: real `[slices, H, W]`, magnitude.
        reconstruction: real `[slices, H', W']`, at least as large as the target.
        mask: bool `[slices, H, W]` on the target's grid, e.g. of `head_mask`; adds `ssim_head`
            (mean of the SSIM map over the mask), `psnr_head` and `nmse_head` (errors inside the
            mask; m stays the volume's maximum).

    Returns:
        The figures by name. PSNR is infinite when the two are equal.

    Raises:
        InputError: shapes that do not fit, a target without signal, an empty mask, or a
            reconstruction that is not finite.
    """
    target = np.asarray(target, dtype=np.float64)
    reconstruction = np.asarray(reconstruction, dtype=np.float64)
    if target.ndim != 3 or reconstruction.ndim != 3 or len(target) != len(reconstruction):
        raise InputError(
            f"cannot compare a reconstruction {reconstruction.shape} with a target "
            f"{target.shape}; both must be [slices, H, W] with equally many slices"
        )
    reconstruction = centre_crop(reconstruction, target.shape[-2:])
    size = (min(CROP, target.shape[-2]), min(CROP, target.shape[-1]))
    target, reconstruction = centre_crop(target, size), centre_crop(reconstruction, size)
    if not np.isfinite(reconstruction).all():
        raise InputError("the reconstruction holds NaN or infinite values")
    peak = target.max()
    if not peak > 0:
        raise InputError("the target holds no signal, so nothing can be scored against it")
    squared = (target - reconstruction) ** 2
    means, maps = _ssim(target, reconstruction, peak)
    scores = {"ssim": means, **_errors(target, squared, peak)}
    if mask is not None:
        inside = centre_crop(np.asarray(mask, dtype=bool), size)
        if not inside.any():
            raise InputError("the head mask is empty")
        scores["ssim_head"] = float(maps[inside].mean())
        errors = _errors(target[inside], squared[inside], peak)
        scores |= {f"{key}_head": value for key, value in errors.items()}
    return scores


def _errors(target: np.ndarray, squared: np.ndarray, peak: float) -> dict[str, float]:
    mse = squared.mean()
    with np.errstate(divide="ignore"):
        psnr = 20 * np.log10(peak) - 10 * np.log10(mse)
    return {"psnr": float(psnr), "nmse": float(squared.sum() / (target**2).sum())}


def _ssim(target: np.ndarray, other: np.ndarray, peak: float) -> tuple[float, np.ndarray]:
    """The mean SSIM over slices, and its maps `[slices, H, W]`."""
    from skimage.metrics import structural_similarity

    results: list[Any] = [
        structural_similarity(t, r, win_size=SSIM_WINDOW, data_range=peak, full=True)
        for t, r in zip(target, other, strict=True)
    ]
    return float(np.mean([mean for mean, _ in results])), np.stack([full for _, full in results])


def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle `size` = (rows, columns) of `[..., H, W]`.

    Raises:
        InputError: the image is smaller than that.
    """
    (height, width), (rows, columns) = image.shape[-2:], size
    if rows > height or columns > width:
        raise InputError(f"an image of {height} x {width} cannot be cropped to {rows} x {columns}")
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[..., top : top + rows, left : left + columns]


def head_mask(target: np.ndarray) -> np.ndarray:
    """A mask of the whole head, with skull, CSF and air cavities.

    Half of Otsu's threshold on the smoothed volume, closed and opened; of that the largest
    component, with the holes of every slice filled.

    Args:
        target: real `[slices, H, W]`, magnitude.

    Returns:
        Bool `[slices, H, W]`.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    # Smoothed within slices only: these may be millimetres apart.
    smooth = ndimage.gaussian_filter(np.asarray(target, dtype=np.float32), (0, 1.5, 1.5))
    bright = smooth > threshold_otsu(smooth) / 2
    disc: Any = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
    # The closing erodes at the border of the image, which the head may reach: hence "| bright".
    closed = ndimage.binary_closing(bright, disc[None]) | bright
    labelled: Any = ndimage.label(ndimage.binary_opening(closed, disc[None]))
    pieces, number = labelled
    if number == 0:
        return closed
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    filled: Any = [ndimage.binary_fill_holes(piece) for piece in pieces == sizes.argmax()]
    return np.stack(filled)
