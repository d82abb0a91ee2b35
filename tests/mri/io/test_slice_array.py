"""K-space that stays in its file equals k-space that is read at once."""

import gzip
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers import synthetic_ismrmrd as ismrmrd
from helpers.phantom import head
from nirvana.errors import InputError
from nirvana.mri.data import slice_array
from nirvana.mri.data.slice_array import SliceArray
from nirvana.mri.io import ReadOptions, Scan, read_scan, write_scan
from nirvana.mri.io.bart import write_cfl

SLICES, COILS, H, W = 4, 2, 40, 48
KSPACE = head(SLICES, COILS, H, W)
THINNED = KSPACE * ((np.arange(W) % 3 == 0) | (np.abs(np.arange(W) - W // 2) < 5))


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_array, "IN_MEMORY", 0)


def compared(path: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Scan:
    """The scan as it is read slice by slice, after a comparison with what is read at once."""
    reading = ReadOptions(**options)  # type: ignore[arg-type]
    found = read_scan(path, reading)
    assert isinstance(found.kspace, SliceArray)
    with monkeypatch.context() as context:
        context.setattr(slice_array, "IN_MEMORY", 2**30)
        expected = read_scan(path, reading)
    assert isinstance(expected.kspace, np.ndarray)
    assert found.kspace.shape == expected.kspace.shape
    for part, whole in zip(found.kspace, expected.kspace, strict=True):
        assert part.dtype == np.complex64
        np.testing.assert_array_equal(part, whole)
    for field in fields(Scan):
        if field.name != "kspace":
            given, wanted = getattr(found, field.name), getattr(expected, field.name)
            same = (
                np.array_equal(given, wanted) if isinstance(given, np.ndarray) else given == wanted
            )
            assert same, field.name
    return found


def hdf5(path: Path, values: np.ndarray, **others: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in {"kspace": values, **others}.items():
            file[name] = array
    return path


def as_compound(values: np.ndarray) -> np.ndarray:
    kind = np.dtype([("real", "<f4"), ("imag", "<f4")])
    return np.ascontiguousarray(values).view(np.float32).view(kind)


def as_channels(values: np.ndarray) -> np.ndarray:
    return np.stack([values.real, values.imag], axis=-1)


def save(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def matlab(path: Path, values: np.ndarray) -> Path:
    """As version 7.3 writes `[row, column, coil, slice]`: the axes in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["kspace"] = as_compound(values.transpose(0, 1, 3, 2))
        file["kspace"].attrs["MATLAB_class"] = np.bytes_("double")
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "fastMRI": lambda folder: hdf5(folder / "a.h5", KSPACE),
    "one coil": lambda folder: hdf5(folder / "a.h5", KSPACE[:, 0]),
    "mask": lambda folder: hdf5(folder / "a.h5", THINNED, mask=THINNED[0, 0, 0] != 0),
    "corner": lambda folder: hdf5(folder / "a.h5", np.fft.ifftshift(KSPACE, axes=(-2, -1))),
    "rows": lambda folder: hdf5(folder / "a.h5", THINNED.swapaxes(-2, -1)),
    "compound": lambda folder: hdf5(folder / "a.h5", as_compound(KSPACE)),
    "channels": lambda folder: hdf5(folder / "a.h5", as_channels(KSPACE)),
    "first channels": lambda folder: save(
        folder / "a.npy", np.moveaxis(as_channels(KSPACE), -1, 0).astype(np.float32)
    ),
    "npy": lambda folder: save(folder / "a.npy", KSPACE.astype(np.complex128)),
    "Fortran": lambda folder: save(folder / "a.npy", np.asfortranarray(KSPACE)),
    "repetitions": lambda folder: save(folder / "a.npy", np.stack([KSPACE, 2 * KSPACE])),
    "MATLAB 7.3": lambda folder: matlab(folder / "a.mat", KSPACE),
}


@pytest.mark.parametrize("name", FILES)
def test_arrays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FILES[name](tmp_path)
    options = {"select": {"repetition": 1}} if name == "repetitions" else {}
    found = compared(path, monkeypatch, **options)
    if name not in ("one coil", "mask", "rows", "repetitions"):
        np.testing.assert_allclose(np.asarray(found.kspace), KSPACE, rtol=1e-5, atol=1e-6)
    if name == "rows":
        assert found.phase_encode == "rows"
    if name == "repetitions":
        np.testing.assert_array_equal(np.asarray(found.kspace), 2 * KSPACE)


def test_one_slice_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(hdf5(tmp_path / "a.h5", KSPACE), monkeypatch, select={"slice": 2})
    np.testing.assert_array_equal(np.asarray(found.kspace), KSPACE[2:3])


def test_bart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "a.cfl"
    write_cfl(data, KSPACE[0])
    text = f"# Dimensions\n{H} {W} 1 {COILS} 1 2 1 1 1 1 1 1 1 {SLICES} 1 1\n"
    data.with_suffix(".hdr").write_text(text)
    both = np.stack([KSPACE, -KSPACE], axis=1)  # slices, echoes, coils, H, W
    both.swapaxes(-2, -1).astype("<c8").tofile(data)
    found = compared(data, monkeypatch, select={"contrast": 1})
    np.testing.assert_array_equal(np.asarray(found.kspace), -KSPACE)


@pytest.mark.parametrize("recon", [64.0, 32.0])
def test_ismrmrd(recon: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kspace = head(ismrmrd.SLICES, ismrmrd.COILS, ismrmrd.H, ismrmrd.W)
    twice = ismrmrd.records(kspace) + ismrmrd.records(kspace * 1.02, average=1)
    path = ismrmrd.write(tmp_path / "a.mrd", twice, ismrmrd.header(recon=recon))
    found = compared(path, monkeypatch)
    if recon == 64.0:
        np.testing.assert_allclose(np.asarray(found.kspace), kspace * 1.01, rtol=1e-5)


def test_compressed_files_are_read_at_once(tmp_path: Path) -> None:
    hdf5(tmp_path / "a.h5", KSPACE)
    (tmp_path / "a.h5.gz").write_bytes(gzip.compress((tmp_path / "a.h5").read_bytes()))
    np.testing.assert_array_equal(read_scan(tmp_path / "a.h5.gz").kspace, KSPACE)


def test_wrong_numbers_are_found(tmp_path: Path) -> None:
    wrong = KSPACE.copy()
    wrong[3, 1, 2, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        read_scan(hdf5(tmp_path / "a.h5", wrong))
    with pytest.raises(InputError, match="zero everywhere"):
        read_scan(hdf5(tmp_path / "b.h5", 0 * KSPACE))


def test_parts_of_a_slice_array() -> None:
    read: list[int] = []

    def one(index: int) -> np.ndarray:
        read.append(index)
        return KSPACE[index]

    array = SliceArray(one, KSPACE.shape)
    assert (len(array), array.shape, array.ndim, array.dtype) == (4, KSPACE.shape, 4, np.complex64)
    assert read == []
    np.testing.assert_array_equal(array[1:][1], KSPACE[2])
    assert read == [2]
    np.testing.assert_array_equal(array[-1], KSPACE[3])
    np.testing.assert_array_equal(array[np.array([3, 0])], KSPACE[[3, 0]])
    turned = array[1:3].map(lambda part: part.swapaxes(1, 2))
    assert turned.shape == (2, COILS, W, H)
    np.testing.assert_array_equal(np.asarray(turned), KSPACE[1:3].swapaxes(2, 3))
    with pytest.raises(IndexError):
        array[4]


def test_a_scan_that_stays_in_its_file_can_be_written(tmp_path: Path) -> None:
    scan = read_scan(hdf5(tmp_path / "a.h5", KSPACE))
    write_scan(tmp_path / "b.h5", replace(scan, name="b"))
    np.testing.assert_array_equal(np.asarray(read_scan(tmp_path / "b.h5").kspace), KSPACE)
