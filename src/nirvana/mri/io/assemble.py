"""K-space of the measured lines of a raw file."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import K, Kspace, SliceArray, is_large, map_slices
from nirvana.mri.io.arrange import arranged
from nirvana.mri.io.epi import ReversedLines
from nirvana.mri.io.geometry import LPS_TO_RAS, is_affine, spacing_of
from nirvana.mri.io.header import EncodedSpace
from nirvana.mri.io.lines import IMAGES, VECTORS, ChosenLines, RawLines, choose
from nirvana.mri.io.options import ReadOptions, suffix_of
from nirvana.mri.io.scan import Scan, Spacing, Study, check_size, checked_kspace

CONFLICT = 0.1  # of the energy: noise differs between two measurements of a line, signal does not
SEPARATE = ("separate", "external", "other")
OVERLAP = 64  # lines that are compared
MARGIN = 0.01  # of a field of view
MAX_SPARSITY = 64  # claimed over measured samples
UNVERIFIED = "the axis directions of Siemens raw data are unverified: the orientation is unknown"


@dataclass(frozen=True)
class _Grid:
    """Where lines lie in `[outer, coils, H, W]`, outer the slices or the partitions.

    Attributes:
        shape: of k-space with the readout's oversampling.
        outer: int `[N]`, index along the first axis.
        column: int `[N]`, index along W.
        start: number of the readout's first place that sample 0 takes, before discarding.
        is_3d: whether the first axis is a second phase encoding.
        remarks: of lines that do not lie where the header states.
    """

    shape: tuple[int, int, int, int]
    outer: np.ndarray
    column: np.ndarray
    start: np.ndarray
    is_3d: bool
    remarks: tuple[str, ...]


def scan_of_lines(
    lines: RawLines,
    spaces: tuple[EncodedSpace, ...],
    options: ReadOptions,
    path: Path,
    study: Study,
    header: str | None = None,
    *,
    is_siemens: bool = False,
) -> Scan:
    """The scan that measured lines make up: 2D multi-slice or 3D, Cartesian.

    Averages and repeated lines are averaged. Calibration lines take the places in k-space that no
    other line has, unless they are of a separate scan: by the header, or because they differ from
    image lines of the same place. The readout's oversampling is cut off. Slices are in the order of
    their positions where the lines contain these.

    Args:
        lines: of one measurement.
        spaces: of its header.
        options: see `ReadOptions`.
        path: of the file.
        study: of its header.
        header: its ISMRMRD header.
        is_siemens: whether the lines come from a scanner of Siemens, directly or converted. The
            directions of the axes of their images were not verified, so the orientation stays
            unknown.

    Raises:
        InputError: the lines are no such scan.
    """
    chosen = choose(lines.heads, options, path)
    image, remarks = chosen.image, list(chosen.remarks)
    space = _space(spaces, int(image["encoding"][0]), path)
    numbers = np.unique(image["slice"])
    order = _order(image, numbers)
    turn = ReversedLines(lines, chosen, path)
    separate = _is_separate(lines, chosen, space, turn)
    if not separate:
        image = _joined(image, chosen.calibration, numbers)
    places = order[np.searchsorted(numbers, image["slice"])]
    grid = _grid(image, space, places, chosen.coils, path)
    if math.prod(grid.shape) > MAX_SPARSITY * chosen.coils * image["samples"].sum():
        raise InputError(
            f"{path}: its {len(image)} lines fill less than 1/{MAX_SPARSITY} of the k-space that "
            "they claim; it seems damaged"
        )
    kspace = without_oversampling(_kspace(lines, image, grid, turn, path), space)
    affine = None if is_siemens else _affine(image, space, kspace.shape, grid)
    calibration = None
    if separate:
        calibration, remark = _calibration(
            lines, chosen, spaces, space, (numbers, order, grid.is_3d), turn, path
        )
        remarks.append(remark)
    noise = None
    if len(chosen.noise):
        noise = np.concatenate(list(lines.read(chosen.noise)), axis=1)
        noise = noise if np.isfinite(noise).all() and noise.any() else None
    scan = Scan(
        kspace=checked_kspace(path, kspace, "its k-space"),
        mask=None,
        target=None,
        name=path.stem + suffix_of(options),
        spacing=_spacing(image, space, kspace.shape, grid)
        if affine is None
        else spacing_of(affine),
        header=header,
        affine=affine,
        noise=noise,
        calibration=calibration,
        remarks=(*remarks, *grid.remarks, *([UNVERIFIED] if is_siemens else [])),
        volume_encoding="3D" if grid.is_3d else "2D",
        study=study,
        encoding=space.facts(int(image["samples"][0]), int(image["center"][0])),
    )
    return arranged(scan, replace(options, phase_encode="columns"), path, None, None)


def _space(spaces: tuple[EncodedSpace, ...], number: int, path: Path) -> EncodedSpace:
    if number >= len(spaces):
        raise InputError(
            f"{path}: its lines are of encoding space {number}, and its header has {len(spaces)}"
        )
    space = spaces[number]
    if space.trajectory != "cartesian":
        raise InputError(
            f"{path}: its trajectory is '{space.trajectory}'; only cartesian ones can be used"
        )
    return space


def _order(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Index of each slice number among the slices: by position along the normal, or by the number
    where positions are missing.

    Slices are often measured and numbered in another order than that of their positions.
    """
    first = np.array([np.flatnonzero(image["slice"] == number)[0] for number in numbers])
    along = image["position"][first] @ image["slice_dir"][first[0]]
    if len(numbers) == 1 or not np.isfinite(along).all() or len(np.unique(along)) < len(along):
        return np.arange(len(numbers))
    # The end with the lowest number remains the first.
    order = np.argsort(along if along[-1] > along[0] else -along, kind="stable")
    return np.argsort(order)


def _grid(
    image: np.ndarray, space: EncodedSpace, places: np.ndarray, coils: int, path: Path
) -> _Grid:
    length, width, depth = space.encoded.matrix
    remarks = []
    column, remark = _centred(image["step_1"], space.center, width, "phase-encoding step", path)
    remarks += remark
    is_3d = len(np.unique(image["step_2"])) > 1
    outer, slices = places, int(places.max()) + 1
    if is_3d:
        if slices > 1:
            raise InputError(
                f"{path} holds {slices} slabs of a 3D scan; choose one by --select slice=N, "
                f"{image['slice'].min()} to {image['slice'].max()}"
            )
        slices = max(depth, int(np.ptp(image["step_2"])) + 1)
        outer, remark = _centred(image["step_2"], space.center_2, slices, "partition", path)
        remarks += remark
    shape = (slices, coils, length, width)
    check_size(path, shape, 8, in_memory=is_3d or not is_large(shape))
    start, remark = _starts(image, length, path)
    return _Grid(shape, outer, column, start, is_3d, (*remarks, *remark))


def _centred(
    steps: np.ndarray, center: int | None, size: int, name: str, path: Path
) -> tuple[np.ndarray, list[str]]:
    """Indices `[N]` of encoding steps on an axis with the centre in its middle, and a remark where
    the header's centre would put them outside."""
    middle = size // 2
    index = steps - (middle if center is None else center) + middle
    if index.min() >= 0 and index.max() < size:
        return index, []
    if np.ptp(steps) >= size:
        outside = int(steps[(index < 0) | (index >= size)][0])
        raise InputError(
            f"{path}: {name} {outside} lies outside its encoded matrix of {size} columns"
        )
    shift = -int(index.min()) if index.min() < 0 else size - 1 - int(index.max())
    remark = f"the header's centre, {name} {center}, leaves lines outside of k-space; not used"
    return index + shift, [remark]


def _starts(image: np.ndarray, length: int, path: Path) -> tuple[np.ndarray, list[str]]:
    """The place along the readout, `[N]`, that each line's sample 0 takes."""
    start = length // 2 - image["center"]
    first = start + image["discard_pre"]
    stop = start + image["samples"] - image["discard_post"]
    if (first < stop).all() and (first >= 0).all() and (stop <= length).all():
        return start, []
    wrong = int(np.flatnonzero((first >= stop) | (first < 0) | (stop > length))[0])
    head = image[wrong]
    same = all(len(np.unique(each)) == 1 for each in (start, first, stop))
    if not same or not 0 < stop[0] - first[0] <= length:
        raise InputError(
            f"{path}: line {int(head['number'])} of {int(head['samples'])} samples around sample "
            f"{int(head['center'])} does not fit the encoded matrix of {length}"
        )
    shift = -int(first[0]) if first[0] < 0 else length - int(stop[0])
    remark = f"the lines' centre, sample {int(head['center'])}, leaves samples outside; not used"
    return start + shift, [remark]


def _kspace(
    lines: RawLines, image: np.ndarray, grid: _Grid, turn: ReversedLines, path: Path
) -> Kspace:
    """The k-space `[outer, coils, H, W]` with the readout's oversampling."""
    if grid.is_3d or not is_large(grid.shape):
        return _filled(lines, image, grid, turn, path)

    def read(number: int) -> np.ndarray:
        own = np.flatnonzero(grid.outer == number)
        part = replace(
            grid,
            shape=(1, *grid.shape[1:]),
            outer=np.zeros(len(own), int),
            column=grid.column[own],
            start=grid.start[own],
        )
        return _filled(lines, image[own], part, turn, path)[0]

    return SliceArray(read, grid.shape)


def _filled(
    lines: RawLines, image: np.ndarray, grid: _Grid, turn: ReversedLines, path: Path
) -> np.ndarray:
    """The k-space, complex64 `[outer, coils, H, W]`, zero where nothing was measured."""
    kspace = np.zeros(grid.shape, np.complex64)
    times = np.zeros((grid.shape[0], grid.shape[3]), np.int64)
    for i, line in enumerate(lines.read(image)):
        head = image[i]
        line = turn.turned(line, head)
        before, after = int(head["discard_pre"]), int(head["samples"] - head["discard_post"])
        first = int(grid.start[i]) + before
        outer, column = grid.outer[i], grid.column[i]
        with np.errstate(invalid="ignore", over="ignore"):  # refused where k-space is checked
            kspace[outer, :, first : first + after - before, column] += line[:, before:after]
        times[outer, column] += 1
    kspace /= np.maximum(times, 1)[:, None, None, :]
    return kspace


def _joined(image: np.ndarray, calibration: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The lines of an image and the calibration lines whose place in k-space none of them has."""
    keys = ("slice", "step_1", "step_2")
    taken = {tuple(row) for row in np.stack([image[key] for key in keys], axis=1).tolist()}
    rows = np.stack([calibration[key] for key in keys], axis=1).tolist()
    used = np.array([tuple(row) not in taken for row in rows], bool)
    used &= calibration["encoding"] == image["encoding"][0]
    used &= np.isin(calibration["slice"], numbers)
    for counter in IMAGES:
        own = calibration[counter] == image[counter][0]
        used &= own if own.any() else calibration[counter] == calibration[counter].min(initial=0)
    joined = np.concatenate([image, calibration[used]])
    return joined[np.argsort(joined["number"], kind="stable")]


def _is_separate(
    lines: RawLines, chosen: ChosenLines, space: EncodedSpace, turn: ReversedLines
) -> bool:
    """Whether the calibration lines are of another scan than the image: by the header, by an
    encoding space of their own, or where both measured a line and the two differ."""
    own, image = chosen.calibration, chosen.image
    if not len(own):
        return False
    if space.calibration_mode in SEPARATE or (own["encoding"] != image["encoding"][0]).all():
        return True
    keys = ("slice", "step_1", "step_2", "samples")

    def first(heads: np.ndarray) -> dict[tuple[int, ...], int]:
        rows = np.stack([heads[key] for key in keys], axis=1).tolist()
        return {tuple(row): number for number, row in reversed(list(enumerate(rows)))}

    ours, theirs = first(own), first(image)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return False
    common = common[:: -(-len(common) // OVERLAP)]
    different = energy = 0.0
    for key in common:
        a, b = (
            turn.turned(next(iter(lines.read(heads[at : at + 1]))), heads[at])
            for heads, at in ((own, ours[key]), (image, theirs[key]))
        )
        different += float((np.abs(a.astype(np.complex128) - b) ** 2).sum())
        energy += float((np.abs(b.astype(np.complex128)) ** 2).sum())
    return different > CONFLICT * energy


def _calibration(
    lines: RawLines,
    chosen: ChosenLines,
    spaces: tuple[EncodedSpace, ...],
    image_space: EncodedSpace,
    slices: tuple[np.ndarray, np.ndarray, bool],
    turn: ReversedLines,
    path: Path,
) -> tuple[np.ndarray | None, str]:
    """Calibration lines of a separate scan, complex64 `[slices, coils, h, w]`, and a remark."""
    numbers, order, is_3d = slices
    own = chosen.calibration
    own = own[(own["encoding"] == own["encoding"].min()) & np.isin(own["slice"], numbers)]
    if not len(own):
        return None, "a separate reference scan of other slices is left out"
    space = spaces[min(int(own["encoding"][0]), len(spaces) - 1)]
    sides = [
        (side.recon.fov[0] if side.recon.fov[0] < side.encoded.fov[0] else side.encoded.fov[0])
        for side in (space, image_space)
    ]
    fovs = [(*sides[:1], space.encoded.fov[1]), (*sides[1:], image_space.encoded.fov[1])]
    larger = math.prod(space.encoded.matrix) > 4 * math.prod(image_space.encoded.matrix)
    if larger or any(abs(a - b) > MARGIN * b for a, b in zip(*fovs, strict=True)):
        return None, "a separate reference scan of another field of view is left out"
    places = order[np.searchsorted(numbers, own["slice"])]
    grid = _grid(own, space, places, chosen.coils, path)
    outer = len(numbers) if not is_3d else grid.shape[0]
    if grid.is_3d != is_3d:
        return None, "a separate reference scan of another number of dimensions is left out"
    grid = replace(grid, shape=(outer, *grid.shape[1:]))
    kspace = without_oversampling(_filled(lines, own, grid, turn, path), space)
    if not np.isfinite(kspace).all() or not kspace.any():
        return None, "a separate reference scan holds no usable numbers and is left out"
    kspace = _around_middle(kspace, axis=3)
    kspace = _around_middle(kspace, axis=0) if is_3d else kspace
    remark = f"a separate reference scan of {len(np.unique(grid.column))} lines calibrates coils"
    return kspace, remark


def _around_middle(kspace: np.ndarray, axis: int) -> np.ndarray:
    """Without the outer places along an axis that hold nothing, origin still in the middle."""
    other = tuple(number for number in range(kspace.ndim) if number != axis)
    used = np.flatnonzero(kspace.any(axis=other))
    middle = kspace.shape[axis] // 2
    below, above = max(middle - int(used[0]), 0), max(int(used[-1]) + 1 - middle, 0)
    half = max(below, above, 1)
    first, stop = max(middle - half, 0), min(middle + half, kspace.shape[axis])
    index = [slice(None)] * kspace.ndim
    index[axis] = slice(first, stop)
    return np.ascontiguousarray(kspace[tuple(index)])


def without_oversampling(kspace: K, space: EncodedSpace) -> K:
    """Crops the image along the oversampled readout to the header's reconstructed field of view.

    Args:
        kspace: complex64 `[slices, coils, H, W]`.
        space: of the header.
    """
    length = kspace.shape[2]
    kept = round(length * space.recon.fov[0] / space.encoded.fov[0])
    if not 8 <= kept < length:
        return kspace
    first = length // 2 - kept // 2

    def cropped(part: np.ndarray) -> np.ndarray:
        image = np.fft.fftshift(
            np.fft.ifft(np.fft.ifftshift(part, axes=1), axis=1, norm="ortho"), axes=1
        )[:, first : first + kept]
        cut = np.fft.fftshift(
            np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1, norm="ortho"), axes=1
        )
        # Unmeasured columns must stay exactly zero, because the mask is found by them.
        return (cut * part.any(axis=1, keepdims=True)).astype(np.complex64)

    # An array slice by slice, too: the transform is in double precision.
    return map_slices(kspace, lambda k: cropped(k) if k.ndim == 3 else np.stack([*map(cropped, k)]))


def _voxel(space: EncodedSpace, shape: tuple[int, ...], grid: _Grid) -> tuple[float, float, float]:
    """Size of a voxel along the readout, the phase encoding and the slices, mm."""
    row, column, thickness = space.encoded.voxel
    return row, column, space.encoded.fov[2] / shape[0] if grid.is_3d else thickness


def _spacing(
    image: np.ndarray, space: EncodedSpace, shape: tuple[int, ...], grid: _Grid
) -> Spacing:
    """The spacing of a scan without directions: slices as far apart as their positions are."""
    row, column, thickness = _voxel(space, shape, grid)
    places, first = np.unique(grid.outer, return_index=True)
    if grid.is_3d or len(places) == 1:
        return (thickness, row, column)
    positions = image["position"][first]
    distances = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    even = np.isfinite(distances).all() and np.ptp(distances) <= 0.01 * distances.max() > 0
    return (float(distances.mean()) if even else thickness, row, column)


def _affine(
    image: np.ndarray, space: EncodedSpace, shape: tuple[int, ...], grid: _Grid
) -> np.ndarray | None:
    """The affine of the volume; None where the lines contain none, or the slices are not parallel
    and evenly spaced."""
    slices, _, rows, columns = shape
    index = np.zeros(len(image), np.int64) if grid.is_3d else grid.outer
    places, first = np.unique(index, return_index=True)
    positions, *directions = (image[name][first] for name in VECTORS)
    if not grid.is_3d and len(places) != slices:
        return None
    if any(not np.isfinite(each).all() for each in (positions, *directions)):
        return None
    if any(np.ptp(each, axis=0).max() > 1e-3 for each in directions):
        return None
    read, phase, normal = (each[0] for each in directions)
    row, column, thickness = _voxel(space, shape, grid)
    step = normal * thickness
    middle = slices // 2 if grid.is_3d else 0
    if slices > 1 and not grid.is_3d:
        step = (positions[-1] - positions[0]) / (slices - 1)
        even = positions[0] + np.arange(slices)[:, None] * step
        if np.abs(positions - even).max() > 0.01 * np.linalg.norm(step):
            return None
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, read * row, phase * column
    index_of_position = np.array([middle, rows // 2, columns // 2])
    affine[:3, 3] = positions[0] - affine[:3, :3] @ index_of_position
    affine = LPS_TO_RAS @ affine
    return affine if is_affine(affine) else None
