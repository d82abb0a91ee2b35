"""Completion of a missing side of k-space, against the truth and against homodyne detection."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nirvana.mri.evaluate.metrics import score
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.partial_fourier import complete, homodyne, pocs
from nirvana.mri.physics.pattern import Extent, find_extent


def smooth_coils(image: np.ndarray, noise: float = 0.0) -> Tensor:
    """K-space `[3, H, W]` of a real image under smooth complex coils."""
    height, width = image.shape
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    coils = torch.stack(
        [
            torch.polar(torch.exp(-((x - a) ** 2 + (y - b) ** 2)), a * x + 2 * b * y * x)
            for a, b in ((1.0, 0.2), (-0.8, 0.6), (0.1, -1.0))
        ]
    )
    kspace = fft2c(coils * torch.from_numpy(image))
    random = torch.randn(
        kspace.shape, dtype=kspace.dtype, generator=torch.Generator().manual_seed(0)
    )
    return kspace + noise * random


def extent_of(kspace: Tensor, rows: np.ndarray, columns: np.ndarray) -> Extent:
    kept = kspace * torch.from_numpy(np.outer(rows, columns))
    return find_extent(columns, kept.abs().square().mean((0, 2)).numpy())


def kept(length: int, share: float, first: bool = True) -> np.ndarray:
    """The first, or last, part of an axis."""
    line = np.arange(length) < round(share * length)
    return line if first else line[::-1].copy()


def psnr(found: Tensor, truth: Tensor) -> float:
    return score(rss(ifft2c(truth)).numpy()[None], found.numpy()[None])["psnr"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("axis", ["columns", "rows", "both"])
def test_an_image_of_smooth_phase_is_completed(head_slices: np.ndarray, axis, first) -> None:
    truth = smooth_coils(head_slices[1], noise=0.002)
    rows = kept(96, 0.7, first) if axis != "columns" else np.ones(96, bool)
    columns = kept(128, 0.7, first) if axis != "rows" else np.ones(128, bool)
    extent = extent_of(truth, rows, columns)
    assert (extent.late_echo, extent.partial_fourier) == (axis != "columns", axis != "rows")
    measured = truth * torch.from_numpy(np.outer(rows, columns))
    found = complete(measured, extent)
    inside = torch.from_numpy(np.outer(rows, columns))
    assert torch.equal(found[:, inside], truth[:, inside])
    gain = psnr(rss(ifft2c(found)), truth) - psnr(rss(ifft2c(measured)), truth)
    assert gain > (10 if axis != "both" else 3), gain


def test_projections_and_homodyne_detection_agree(head_slices: np.ndarray) -> None:
    truth = smooth_coils(head_slices[1])
    columns = kept(128, 0.65)
    extent = extent_of(truth, np.ones(96, bool), columns)
    measured = truth * torch.from_numpy(columns)
    empty, projected, detected = (
        psnr(rss(images), truth)
        for images in (
            ifft2c(measured),
            ifft2c(pocs(measured, extent)),
            homodyne(measured, extent),
        )
    )
    assert projected > empty + 10
    assert detected > empty + 8


def test_of_a_symmetric_scan_everything_is_the_truth(head_slices: np.ndarray) -> None:
    """Full k-space is inside of the extent; and homodyne's ramp adds up to one."""
    truth = smooth_coils(head_slices[1][:95, :127])
    full = Extent((0, 95), (0, 127), 95, 127, late_echo=False, partial_fourier=True)
    torch.testing.assert_close(pocs(truth, full), truth)
    torch.testing.assert_close(complete(truth, full), truth)
    assert psnr(rss(homodyne(truth, full)), truth) > 40


def test_noise_is_not_mirrored(head_slices: np.ndarray) -> None:
    """Where symmetry does not hold, what is completed is no worse than zeros."""
    noise = torch.randn(
        3, 96, 128, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)
    )
    rough = smooth_coils(head_slices[1]) + 5 * noise
    columns = kept(128, 0.7)
    extent = extent_of(rough, np.ones(96, bool), columns)
    measured = rough * torch.from_numpy(columns)
    found = complete(measured, extent)
    missing = ~torch.from_numpy(columns)
    error = (found - rough)[..., missing].norm() / rough[..., missing].norm()
    mirrored = (pocs(measured, extent) - rough)[..., missing].norm() / rough[..., missing].norm()
    assert error < 1.02
    assert mirrored > 1.1
