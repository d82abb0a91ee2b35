"""BART's pairs of files."""

from pathlib import Path

import numpy as np
import pytest

from nirvana.errors import InputError
from nirvana.mri.io import ReadOptions, read_scan, selections_of


def write(path: Path, values: np.ndarray, dims: list[int]) -> Path:
    """As BART does: first dimension fastest, little-endian."""
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    path.with_suffix(".cfl").write_bytes(values.astype("<c8").tobytes(order="F"))
    return path


def _values(*shape: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((2, *shape))
    return (values[0] + 1j * values[1]).astype(np.complex64)


@pytest.mark.parametrize("suffix", [".cfl", ".hdr"])
@pytest.mark.parametrize("lead", [[9, 11, 1], [9, 1, 11], [1, 9, 11]])
def test_dimensions_come_to_their_places(tmp_path: Path, suffix: str, lead: list[int]) -> None:
    values = _values(9, 11, 4, 3)  # H, W, coils, slices
    dims = [*lead, 4, *[1] * 9, 3, 1, 1]
    scan = read_scan(write(tmp_path / f"s{suffix}", values, dims))
    np.testing.assert_array_equal(scan.kspace, values.transpose(3, 2, 0, 1))
    assert scan.kspace.dtype == np.complex64
    assert (scan.name, scan.mask, scan.target, scan.affine) == ("s", None, None, None)


def test_a_single_coil_and_slice(tmp_path: Path) -> None:
    values = _values(9, 11)
    scan = read_scan(write(tmp_path / "s.cfl", values, [9, 11]))
    np.testing.assert_array_equal(scan.kspace, values[None, None])


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ([9, 11, 2], "its header requires 1584"),
        ([99, 1, 1], "two of the three"),
        ([9, 11, 1, 1, 2], "2 sensitivity maps"),
        ([9, 11, 2, *[1] * 10, 2], "one slice"),
        ([9, 11, 1, 1, 1, 1, 2], "2 coefficients"),
        ([9, 11, 1, 2], "its header requires 1584"),
        ([9, 11, 1, 10**14], "100000000000000 coils"),
        ([9, 11, 1, 0], "0 coils"),
        ([9, 10**12], "9 x 1000000000000"),
        ([8000, 8000, 1, 1000, *[1] * 9, 8000], "GiB"),
        ([9, 11] + [1] * 15, "up to 16"),
        ([-9, 11], "whole numbers"),
        ([], "whole numbers"),
    ],
)
def test_impossible_dimensions_are_refused(tmp_path: Path, dims: list[int], words: str) -> None:
    write(tmp_path / "s.cfl", _values(9, 11), dims)
    with pytest.raises(InputError, match=words) as caught:
        read_scan(tmp_path / "s.cfl")
    assert str(tmp_path / "s.") in str(caught.value)


def test_three_dimensions(tmp_path: Path) -> None:
    values = _values(9, 11, 5, 4)  # H, W, partitions, coils
    scan = read_scan(write(tmp_path / "s.cfl", values, [9, 11, 5, 4]))
    assert scan.volume_encoding == "3D"
    np.testing.assert_array_equal(scan.kspace, values.transpose(2, 3, 0, 1))


def test_echoes_and_frames_are_chosen(tmp_path: Path) -> None:
    values = _values(9, 11, 4, 2, 3, 2)  # H, W, coils, echoes, frames, slices
    path = write(tmp_path / "s.cfl", values, [9, 11, 1, 4, 1, 2, *[1] * 4, 3, 1, 1, 2, 1, 1])
    first = read_scan(path)
    np.testing.assert_array_equal(first.kspace, values[:, :, :, 0, 0].transpose(3, 2, 0, 1))
    assert [remark.split(" in")[0] for remark in first.remarks] == ["2 contrasts", "3 phases"]
    scan = read_scan(path, ReadOptions(select={"contrast": 1, "phase": 2}))
    np.testing.assert_array_equal(scan.kspace, values[:, :, :, 1, 2].transpose(3, 2, 0, 1))
    every = [
        read_scan(path, each) for each in selections_of(path, ReadOptions(select={"phase": 1}))
    ]
    assert [scan.name for scan in every] == ["s_phase1_contrast0", "s_phase1_contrast1"]
    with pytest.raises(InputError, match="--select contrast may be 0 to 1"):
        read_scan(path, ReadOptions(select={"contrast": 2}))
    with pytest.raises(InputError, match="no encodings"):
        read_scan(path, ReadOptions(select={"encoding": 0}))


def test_damaged_pairs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s.cfl", _values(9, 11) * np.nan, [9, 11])
    with pytest.raises(InputError, match="NaN"):
        read_scan(path)
    write(path, _values(9, 11) * 0, [9, 11])
    with pytest.raises(InputError, match="zero everywhere"):
        read_scan(path)
    path.with_suffix(".hdr").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="no header"):
        read_scan(path)
    path.with_suffix(".hdr").unlink()
    with pytest.raises(InputError, match=r"s\.hdr: no such file"):
        read_scan(path)
