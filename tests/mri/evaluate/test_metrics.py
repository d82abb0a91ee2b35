"""Metrics against their formulas, written out in NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest

from nirvana.errors import InputError
from nirvana.mri.evaluate.metrics import centre_crop, head_mask, score


def _pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    target = generator.random(shape)
    return target, target + 0.1 * generator.standard_normal(shape)


def _ssim(t: np.ndarray, r: np.ndarray, peak: float) -> np.ndarray:
    """SSIM of 7 x 7 windows with sample covariance, in the pixels whose window fits."""
    windows = [np.lib.stride_tricks.sliding_window_view(x, (7, 7)).reshape(-1, 49) for x in (t, r)]
    mean_t, mean_r = (w.mean(axis=1) for w in windows)
    var_t, var_r = (w.var(axis=1, ddof=1) for w in windows)
    deviations = (windows[0] - mean_t[:, None]) * (windows[1] - mean_r[:, None])
    covariance = deviations.sum(axis=1) / 48
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return ((2 * mean_t * mean_r + c1) * (2 * covariance + c2)) / (
        (mean_t**2 + mean_r**2 + c1) * (var_t + var_r + c2)
    )


def test_scores_equal_their_formulas() -> None:
    t, r = _pair(3, 20, 24)
    t[1] *= 0.3
    scores, peak = score(t, r), t.max()
    assert scores["nmse"] == pytest.approx(((t - r) ** 2).sum() / (t**2).sum())
    assert scores["psnr"] == pytest.approx(10 * np.log10(peak**2 / ((t - r) ** 2).mean()))
    expected = np.mean([_ssim(a, b, peak).mean() for a, b in zip(t, r, strict=True)])
    assert scores["ssim"] == pytest.approx(expected, abs=1e-9)
    assert set(scores) == {"ssim", "psnr", "nmse"}


def test_scores_within_a_mask() -> None:
    t, r = _pair(2, 20, 24)
    mask = np.zeros(t.shape, dtype=bool)
    mask[:, 5:15, 6:18] = True
    r[~mask] += 5
    scores, peak = score(t, r, mask), t.max()
    squared = ((t - r) ** 2)[mask]
    assert scores["psnr_head"] == pytest.approx(10 * np.log10(peak**2 / squared.mean()))
    assert scores["nmse_head"] == pytest.approx(squared.sum() / (t[mask] ** 2).sum())
    # Pixel (i, j) is the centre of the window at (i - 3, j - 3).
    maps = [_ssim(a, b, peak).reshape(14, 18)[2:12, 3:15] for a, b in zip(t, r, strict=True)]
    assert scores["ssim_head"] == pytest.approx(np.mean(maps), abs=1e-9)
    assert scores["psnr"] < scores["psnr_head"]


def test_equal_images_are_perfect_and_nothing_is_rescaled() -> None:
    t, _ = _pair(2, 16, 16)
    assert score(t, t) == {"ssim": pytest.approx(1), "psnr": math.inf, "nmse": 0}
    assert score(t, 2 * t)["nmse"] == pytest.approx(1)


def test_large_images_are_cropped_to_their_middle() -> None:
    t, r = _pair(1, 340, 330)
    inner = score(t[:, 10:330, 5:325], r[:, 10:330, 5:325])
    assert score(t, r) == inner
    assert score(t[:, 10:330, 5:325], r) == inner


@pytest.mark.parametrize(
    ("target", "reconstruction", "words"),
    [
        (np.zeros((2, 16, 16)), np.ones((2, 16, 16)), "no signal"),
        (np.ones((2, 16, 16)), np.ones((3, 16, 16)), "equally many"),
        (np.ones((2, 16, 16)), np.ones((2, 12, 16)), "cannot be cropped"),
        (np.ones((2, 16, 16)), np.full((2, 16, 16), np.nan), "NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    target: np.ndarray, reconstruction: np.ndarray, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        score(target, reconstruction)


def test_centre_crop_keeps_the_middle() -> None:
    image = np.arange(7 * 6).reshape(7, 6)
    assert centre_crop(image, (3, 2)).tolist() == image[2:5, 2:4].tolist()


def test_the_head_mask_covers_the_head_and_not_the_air(head_slices: np.ndarray) -> None:
    noisy = head_slices + 0.02 * np.abs(np.random.default_rng(0).standard_normal(head_slices.shape))
    mask = head_mask(noisy)
    assert mask.shape == head_slices.shape
    assert (head_slices[mask] ** 2).sum() / (head_slices**2).sum() > 0.98
    assert not mask[:, :, :20].any()
    assert not mask[:, :, -20:].any()


def test_head_masks_of_real_heads(mri_data: Path) -> None:
    from nirvana.mri.io import read_volume

    volume = read_volume(mri_data / "valid" / "ms_l04_FLAIR.nii.gz")[20:28]
    assert 0.3 < head_mask(volume).mean() < 0.9
