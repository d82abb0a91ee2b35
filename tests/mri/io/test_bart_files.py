"""BART's pairs of files."""

from pathlib import Path

import numpy as np
import pytest

from nirvana.errors import InputError
from nirvana.mri.io import read_scan


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
        ([9, 11, 2], "3D"),
        ([99, 1, 1], "two of them"),
        ([9, 11, 1, 1, 2], "2 sensitivity maps"),
        ([9, 11, 1, 1, 1, 2], "2 echoes"),
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
    with pytest.raises(InputError, match=r"s\.hdr does not exist"):
        read_scan(path)
