"""From an array as a file holds it to a scan: origin in the middle, phase encoding along W."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import Kspace, map_slices
from nirvana.mri.io.centre import around_corner, moves_to_middle, to_middle_of_view
from nirvana.mri.io.geometry import resampled
from nirvana.mri.io.options import ReadOptions
from nirvana.mri.io.scan import Scan, Spacing
from nirvana.mri.io.target import matched


def arranged(
    scan: Scan, options: ReadOptions, path: Path, mask: np.ndarray | None, target: np.ndarray | None
) -> Scan:
    """The scan with everything in its place.

    Args:
        scan: as the file holds it: k-space `[slices, coils, rows, columns]`, without mask and
            target.
        options: see `ReadOptions`.
        path: of the file.
        mask: bool, of any of the shapes of `matched_mask`.
        target: real `[slices, h, w]`.

    Raises:
        InputError: mask or target do not fit the k-space, or the options do not fit the file.
    """
    remarks = list(scan.remarks)
    measured = _measured(scan.kspace)
    if mask is not None:
        mask = matched_mask(mask, measured, path)
    along, remark = phase_encoding(measured, mask, options)
    remarks += remark
    scan, mask, remark = _centred(scan, mask, options, path)
    remarks += remark
    if along == "rows":
        scan, mask = _swapped(scan, mask)
        target = None if target is None else target.swapaxes(-2, -1)
    scan = replace(scan, mask=None if mask is None else _simplified(mask, scan.kspace.shape[-1]))
    if target is not None:
        target, remark = matched(target, scan.kspace, scan.mask, path)
        remarks += remark
    return replace(scan, target=target, remarks=tuple(remarks))


def _measured(kspace: Kspace) -> np.ndarray:
    """Bool `[slices, rows, columns]`, where any coil holds a number other than zero."""
    return np.stack([part.any(axis=0) for part in kspace])


def matched_mask(mask: np.ndarray, measured: np.ndarray, path: Path) -> np.ndarray:
    """A file's mask, as bool `[slices or 1, rows or 1, columns or 1]`.

    Args:
        mask: bool `[columns]`, `[rows]`, `[rows, columns]`, `[slices, columns]`, `[slices, rows]`,
            `[slices, rows, columns]`, or one of these with further axes of one.
        measured: bool `[slices, rows, columns]`, where k-space is not zero. Of several shapes that
            are possible, the first that leaves out none of these is taken.
        path: of the file.

    Raises:
        InputError: it has none of these shapes.
    """
    slices, rows, columns = measured.shape
    shape = tuple(size for size in mask.shape if size > 1)
    possible = {
        (1, 1, columns): (columns,),
        (1, rows, 1): (rows,),
        (1, rows, columns): (rows, columns),
        (slices, 1, columns): (slices, columns),
        (slices, rows, 1): (slices, rows),
        (slices, rows, columns): (slices, rows, columns),
    }
    fits = [
        mask.reshape(full)
        for full, short in possible.items()
        if tuple(size for size in short if size > 1) == shape
    ]
    if not fits:
        raise InputError(
            f"{path}: 'mask' has shape {mask.shape}; for k-space of {slices} slices, {rows} rows "
            f"and {columns} columns it must be [{columns}], [{rows}, {columns}], "
            f"[{slices}, {columns}] or [{slices}, {rows}, {columns}]"
        )
    agreeing = [each for each in fits if not (measured & ~each).any()]
    return (agreeing or fits)[0]


def phase_encoding(
    measured: np.ndarray, mask: np.ndarray | None, options: ReadOptions
) -> tuple[Literal["columns", "rows"], list[str]]:
    """Along what the phase encoding runs in a file, and a remark where it was found to be rows.

    Args:
        measured: bool `[slices, rows, columns]`, where k-space is not zero.
        mask: of `matched_mask`.
        options: see `ReadOptions`.
    """
    if options.phase_encode != "auto":
        return options.phase_encode, []
    used = measured if mask is None else measured & mask
    rows, columns = (_has_gaps(np.any(used, axis=axis)) for axis in (2, 1))
    if rows and not columns:
        return "rows", ["rows of k-space are missing: phase encoding runs along the rows"]
    return "columns", []


def _has_gaps(used: np.ndarray) -> bool:
    """Whether lines between used ones are missing in most slices of bool `[slices, lines]`."""
    lines = [np.flatnonzero(part) for part in used if part.any()]
    gaps = [part[-1] - part[0] + 1 > len(part) for part in lines]
    return bool(lines) and 2 * sum(gaps) > len(gaps)


def _centred(
    scan: Scan, mask: np.ndarray | None, options: ReadOptions, path: Path
) -> tuple[Scan, np.ndarray | None, tuple[str, ...]]:
    moves, remarks = moves_to_middle(scan.kspace, options, scan.volume_encoding == "3D", path)
    kspace, affine, spacing = scan.kspace, scan.affine, scan.spacing
    for move in moves:
        kspace = move.of_kspace(kspace)
        place = (0, None, 1, 2)[move.axis]
        assert place is not None
        # A mask has no axis of coils.
        if mask is not None and mask.shape[place] > 1:
            mask = replace(move, axis=place)(mask)
        if move.new_size == move.size:
            continue
        if affine is not None:
            affine = resampled(affine, place, move.size, move.new_size)
        if spacing is not None:
            sides = list(spacing)
            sides[place] *= move.size / move.new_size
            spacing = (sides[0], sides[1], sides[2])
    if options.centre != "middle" and around_corner(kspace):
        kspace = map_slices(kspace, to_middle_of_view)
        remarks += (
            "the images lie around the corner of their field of view and were moved to the middle",
        )
    calibration = scan.calibration
    if calibration is not None and any(move.wraps for move in moves):
        calibration = _calibration_centred(calibration, options, path)
    scan = replace(scan, kspace=kspace, affine=affine, spacing=spacing, calibration=calibration)
    return scan, mask, remarks


def _calibration_centred(calibration: np.ndarray, options: ReadOptions, path: Path) -> np.ndarray:
    """Of a file whose k-space has its origin in the corner, that of the calibration lines too."""
    moves, _ = moves_to_middle(calibration, replace(options, centre="auto"), False, path)
    for move in moves:
        calibration = move(calibration)
    return calibration


def _swapped(scan: Scan, mask: np.ndarray | None) -> tuple[Scan, np.ndarray | None]:
    """The scan with rows and columns swapped."""
    affine, spacing, calibration = scan.affine, scan.spacing, scan.calibration
    if affine is not None:
        affine = affine[:, [0, 2, 1, 3]]
    if spacing is not None:
        spacing: Spacing | None = (spacing[0], spacing[2], spacing[1])
    if calibration is not None:
        calibration = np.ascontiguousarray(calibration.swapaxes(-2, -1))
    swapped = replace(
        scan,
        kspace=map_slices(scan.kspace, lambda k: np.ascontiguousarray(k.swapaxes(-2, -1))),
        affine=affine,
        spacing=spacing,
        calibration=calibration,
        phase_encode="rows",
    )
    return swapped, None if mask is None else mask.swapaxes(-2, -1)


def _simplified(mask: np.ndarray, width: int) -> np.ndarray:
    """Bool `[slices or 1, H or 1, W or 1]` as one of the shapes of `Scan.mask`, the smallest."""
    mask = np.broadcast_to(mask, (*mask.shape[:2], width))
    if (mask == mask[:, :1]).all():
        mask = mask[:, :1]
    if len(mask) > 1 and (mask != mask[:1]).any():
        return mask.copy()
    return mask[0, 0].copy() if mask.shape[1] == 1 else mask[0].copy()
