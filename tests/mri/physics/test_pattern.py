"""Sampling patterns: found in any form, their gaps, their extent and their central block."""

import numpy as np
import pytest

from nirvana.errors import InputError
from nirvana.mri.physics.masks import sampling_mask
from nirvana.mri.physics.pattern import (
    central_block,
    central_width,
    checked_pattern,
    find_extent,
    find_pattern,
    has_gaps,
    measured_points,
    pattern_has_gaps,
)

COLUMNS = sampling_mask("random", 24, 3, 0.2, seed=4).numpy()
POINTS = np.random.default_rng(0).random((16, 24)) < 0.4


def kspace(pattern: np.ndarray, slices: int = 3) -> np.ndarray:
    """Random k-space `[slices, 2, 16, 24]` of a pattern that broadcasts to `[slices, H, W]`."""
    random = np.random.default_rng(1)
    full = random.standard_normal((slices, 2, 16, 24)) + 1j
    return full * np.broadcast_to(pattern, (slices, 16, 24))[:, None]


def found(pattern: np.ndarray, slices: int = 3) -> np.ndarray:
    return find_pattern(measured_points(kspace(pattern, slices)), "scan.h5")


def test_a_pattern_is_found_in_its_simplest_form() -> None:
    assert np.array_equal(found(COLUMNS), COLUMNS)
    assert np.array_equal(found(POINTS), POINTS)
    rolled = np.stack([np.roll(COLUMNS, shift) for shift in range(3)])
    assert np.array_equal(found(rolled[:, None]), rolled[:, None])
    by_slice = np.random.default_rng(2).random((3, 16, 24)) < 0.4
    assert np.array_equal(found(by_slice), by_slice)


def test_rows_at_the_ends_and_zeros_by_chance_change_no_column() -> None:
    late = COLUMNS & (np.arange(16) >= 4)[:, None]
    assert np.array_equal(found(late), COLUMNS)
    data = kspace(COLUMNS)
    data[0, :, 6, 7:9] = 0
    data[1] = 0  # an empty slice
    assert np.array_equal(find_pattern(measured_points(data), "scan.h5"), COLUMNS)


def test_missing_rows_are_refused_and_so_is_nothing() -> None:
    with pytest.raises(InputError, match=r"scan.h5: slice 0 lacks rows .* along the last axis"):
        found((np.arange(16) % 2 == 0)[:, None])
    with pytest.raises(InputError, match="keeps no point"):
        found(np.zeros(24, bool))


def test_given_masks_take_four_forms() -> None:
    shape = (3, 2, 16, 24)
    for given in (COLUMNS, POINTS, np.ones((3, 16, 24))):
        assert np.array_equal(checked_pattern(given, shape, "scan"), given != 0)
    assert checked_pattern(np.ones((3, 24)), shape, "scan").shape == (3, 1, 24)
    with pytest.raises(InputError, match=r"scan: the mask is \(23,\).*\[24\], \[16, 24\]"):
        checked_pattern(np.ones(23), shape, "scan")


def test_gaps_are_holes_between_samples() -> None:
    line = np.zeros(24, bool)
    assert has_gaps(line)
    line[3:20] = True
    assert not has_gaps(line)
    assert not pattern_has_gaps(line)
    assert not pattern_has_gaps(np.outer(np.arange(16) > 3, line))
    for holes in (COLUMNS, POINTS, np.outer(np.arange(16) > 3, line) ^ np.eye(16, 24, 5, bool)):
        assert pattern_has_gaps(holes)


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        ("11111111", 8),
        ("00000000", 0),
        ("00001000", 1),
        ("00011000", 2),
        ("00011100", 3),
        ("00111000", 2),
        ("10111101", 4),
        ("1111", 4),
        ("11111", 5),
        ("00110", 1),
        ("01100", 2),
        ("1110111", 0),
    ],
)
def test_the_central_width(columns: str, width: int) -> None:
    line = np.array([column == "1" for column in columns])
    assert central_width(line) == width
    middle = len(columns) // 2 - width // 2
    assert line[middle : middle + width].all()


def test_the_central_block_of_points_is_the_largest_full_one() -> None:
    columns = np.zeros(24, bool)
    columns[10:15] = True
    assert central_block(columns[None], 16) == (slice(0, 16), slice(10, 15))
    assert central_block(np.broadcast_to(columns, (16, 24)), 16) == (slice(0, 16), slice(10, 15))
    points = np.zeros((16, 24), bool)
    points[5:11, 8:16] = True
    points[8, :] = True
    assert central_block(points, 16) == (slice(5, 11), slice(8, 16))


@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_side_is_found(width: int, side: int) -> None:
    energy = np.ones(width)
    line = np.ones(width, bool)
    line[: width // 4] = False
    if side:
        line = line[::-1].copy()
    extent = find_extent(line, energy)
    assert extent.partial_fourier
    assert not extent.late_echo
    assert extent.columns == ((0, width - width // 4) if side else (width // 4, width))
    assert "partial Fourier: columns" in extent.remarks()[0]
    # Also where every second column is measured, and in the energy of rows.
    assert find_extent(line & (np.arange(width) % 2 == 0), energy).partial_fourier
    late = find_extent(np.ones(width, bool), np.where(line, 1.0, 0.01))
    assert late.late_echo
    assert late.rows == extent.columns
    assert "asymmetric echo: rows" in late.remarks()[0]


def test_symmetric_sampling_is_not_partial() -> None:
    padded = np.zeros(64, bool)
    padded[8:57] = True
    for line in (np.ones(64, bool), padded, np.roll(padded, 1)):
        assert not find_extent(line, np.ones(64)).is_partial
        assert not find_extent(np.ones(64, bool), line.astype(float)).is_partial
    # The strongest row of a scan whose centre is one row off has no counterpart.
    energy = np.ones(64)
    energy[33] = 1000
    assert not find_extent(np.ones(64, bool), energy).is_partial


@pytest.mark.parametrize("kind", ["equispaced", "random"])
@pytest.mark.parametrize(("acceleration", "center"), [(4, 0.08), (8, 0.04)])
def test_masks_of_accelerated_scans_are_not_partial(
    kind: str, acceleration: int, center: float
) -> None:
    masks = (
        sampling_mask(kind, width, acceleration, center, seed).numpy()  # type: ignore[arg-type]
        for width in (128, 320, 368)
        for seed in range(100)
    )
    found = [find_extent(mask, np.ones(64)).partial_fourier for mask in masks]
    assert np.mean(found) < 0.01
