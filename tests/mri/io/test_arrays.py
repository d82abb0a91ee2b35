"""K-space in arrays of any form: numbers, axes, masks, phase encoding, containers."""

import gzip
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from helpers.phantom import combined, error, head
from nirvana.errors import InputError
from nirvana.mri.io import (
    ReadOptions,
    find_scans,
    in_file_axes,
    is_volume,
    read_scan,
    selections_of,
)
from nirvana.mri.physics.masks import sampling_mask

SLICES, COILS, H, W = 2, 3, 40, 48


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    return head(SLICES, COILS, H, W)


def hdf5(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def compound(values: np.ndarray, kind: str, names: tuple[str, str]) -> np.ndarray:
    result = np.empty(values.shape, np.dtype([(name, kind) for name in names]))
    result[names[0]], result[names[1]] = values.real, values.imag
    return result


@pytest.mark.parametrize("names", [("real", "imag"), ("r", "i"), ("re", "im")])
@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f8", "<i2"])
def test_compounds(names: tuple[str, str], kind: str, kspace: np.ndarray, tmp_path: Path) -> None:
    scaled = kspace * 1000 if kind == "<i2" else kspace
    scan = read_scan(hdf5(tmp_path / "s.h5", kspace=compound(scaled, kind, names)))
    assert scan.kspace.dtype == np.complex64
    assert error(scan.kspace, scaled) < {"<f2": 1e-6, "<i2": 1e-3}.get(kind, 1e-12)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f8"])
def test_two_real_channels(axis: int, kind: str, kspace: np.ndarray, tmp_path: Path) -> None:
    stacked = np.stack([kspace.real, kspace.imag], axis).astype(kind)
    scan = read_scan(hdf5(tmp_path / "s.h5", kspace=stacked))
    assert error(scan.kspace, kspace) < 1e-6


def test_compounds_of_other_parts_are_refused(kspace: np.ndarray, tmp_path: Path) -> None:
    path = hdf5(tmp_path / "s.h5", kspace=compound(kspace, "<f4", ("magnitude", "phase")))
    with pytest.raises(InputError, match="must be complex"):
        read_scan(path)


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), values)
    return path.with_suffix(".npy")


def npz(path: Path, values: np.ndarray) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), values=values, label=np.array("head"))
    return path.with_suffix(".npz")


def mat(path: Path, values: np.ndarray) -> Path:
    """MATLAB's order: rows, columns, coils, slices."""
    content = {"values": values.transpose(2, 3, 1, 0), "label": "head", "size": np.ones((1, 3))}
    scipy.io.savemat(path.with_suffix(".mat"), content, do_compression=True)
    return path.with_suffix(".mat")


def mat73(path: Path, values: np.ndarray) -> Path:
    """HDF5 as MATLAB writes it: axes reversed, compounds, a block of text before."""
    path = path.with_suffix(".mat")
    with h5py.File(path, "w", userblock_size=512) as file:
        reversed_axes = values.transpose(2, 3, 1, 0).T
        file["values"] = compound(reversed_axes, "<f4", ("real", "imag"))
        file["#refs#/a"] = compound(reversed_axes, "<f4", ("real", "imag"))
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")
    return path


CONTAINERS: list[Callable[[Path, np.ndarray], Path]] = [npy, npz, mat, mat73]


@pytest.mark.parametrize("write", CONTAINERS)
@pytest.mark.parametrize("compressed", [False, True])
def test_containers(
    write: Callable[[Path, np.ndarray], Path], compressed: bool, kspace: np.ndarray, tmp_path: Path
) -> None:
    path = write(tmp_path / "s", kspace)
    if compressed:
        packed = Path(f"{path}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = packed
    assert not is_volume(path)
    assert find_scans(tmp_path) == [path]
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert scan.name == "s"
    assert "are read as" in scan.remarks[0]


def test_compressed_hdf5_and_bart(kspace: np.ndarray, tmp_path: Path) -> None:
    plain = hdf5(tmp_path / "s.h5", kspace=kspace)
    (tmp_path / "t.h5.gz").write_bytes(gzip.compress(plain.read_bytes()))
    np.testing.assert_array_equal(read_scan(tmp_path / "t.h5.gz").kspace, kspace)
    header = f"# Dimensions\n{H} {W} 1 {COILS} {' 1' * 9} {SLICES} 1 1\n".encode()
    (tmp_path / "b.hdr.gz").write_bytes(gzip.compress(header))
    values = kspace.transpose(2, 3, 1, 0).astype("<c8").tobytes(order="F")
    (tmp_path / "b.cfl.gz").write_bytes(gzip.compress(values))
    np.testing.assert_array_equal(read_scan(tmp_path / "b.cfl.gz").kspace, kspace)
    (tmp_path / "bad.h5.gz").write_bytes(gzip.compress(plain.read_bytes())[:500])
    with pytest.raises(InputError, match=r"bad\.h5\.gz cannot be unpacked"):
        read_scan(tmp_path / "bad.h5.gz")
    (tmp_path / "text.h5.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(InputError, match=r"text\.h5\.gz is not an HDF5 file"):
        read_scan(tmp_path / "text.h5.gz")


def test_axes_by_their_sizes(tmp_path: Path) -> None:
    single, many = head(1, 1, H, W)[0, 0], head(1, 3, H, W)[0]
    cases = {
        "plane": (single, single),
        "coils first": (many, many),
        "coils last": (many.transpose(1, 2, 0), many),
    }
    for name, (values, expected) in cases.items():
        found = read_scan(npy(tmp_path / name, values)).kspace[0]
        np.testing.assert_array_equal(found, expected if expected.ndim == 3 else expected[None])


@pytest.mark.parametrize(
    ("axes", "order"),
    [
        ("row,column,slice,coil", (2, 3, 0, 1)),
        ("coil,slice,column,row", (1, 0, 3, 2)),
        ("column,slice,row,coil", (3, 0, 2, 1)),
    ],
)
def test_axes_by_name(
    axes: str, order: tuple[int, ...], kspace: np.ndarray, tmp_path: Path
) -> None:
    path = npy(tmp_path / "s", kspace.transpose(order))
    options = ReadOptions(axes=tuple(axes.split(",")))
    np.testing.assert_array_equal(read_scan(path, options).kspace, kspace)
    with pytest.raises(InputError, match="names 2 axes"):
        read_scan(path, ReadOptions(axes=("row", "column")))


def test_partitions_make_a_3d_scan(tmp_path: Path) -> None:
    values = np.fft.fftshift(np.fft.fft(head(12, 2, 24, 20), axis=0), axes=0).astype(np.complex64)
    options = ReadOptions(axes=("partition", "coil", "row", "column"))
    scan = read_scan(npy(tmp_path / "s", values), options)
    assert scan.volume_encoding == "3D"
    np.testing.assert_array_equal(scan.kspace, values)


def test_repetitions_are_chosen(kspace: np.ndarray, tmp_path: Path) -> None:
    frames = np.stack([kspace, 2 * kspace, 3 * kspace])
    path = npy(tmp_path / "s", frames)
    first = read_scan(path)
    np.testing.assert_array_equal(first.kspace, kspace)
    assert "3 repetitions" in first.remarks[1]
    every = [read_scan(path, options) for options in selections_of(path)]
    assert [scan.name for scan in every] == [f"s_repetition{n}" for n in range(3)]
    np.testing.assert_array_equal(every[2].kspace, 3 * kspace)
    one = read_scan(path, ReadOptions(select={"repetition": 1, "slice": 1}))
    np.testing.assert_array_equal(one.kspace, 2 * kspace[1:])
    for counter, number in (("repetition", 3), ("slice", 2), ("contrast", 0)):
        with pytest.raises(InputError, match=counter):
            read_scan(path, ReadOptions(select={counter: number}))


def test_variables_are_chosen(kspace: np.ndarray, tmp_path: Path) -> None:
    both = hdf5(tmp_path / "s.h5", first=kspace, second=2 * kspace, text=np.array(b"abc"))
    with pytest.raises(InputError, match=r"first .* second .*--variable"):
        read_scan(both)
    chosen = read_scan(both, ReadOptions(variable="second"))
    np.testing.assert_array_equal(chosen.kspace, 2 * kspace)
    with pytest.raises(InputError, match="no array 'third'"):
        read_scan(both, ReadOptions(variable="third"))
    nested = hdf5(tmp_path / "n.h5", **{"data/raw/ksp": kspace, "maps": np.ones(3)})
    np.testing.assert_array_equal(read_scan(nested).kspace, kspace)
    # Images of other sizes and real numbers are no candidates.
    one = hdf5(tmp_path / "o.h5", one=kspace, small=kspace[..., 0, 0], real=np.ones((2, 40, 48)))
    np.testing.assert_array_equal(read_scan(one).kspace, kspace)


def test_options_without_meaning_are_refused(kspace: np.ndarray, tmp_path: Path) -> None:
    path = hdf5(tmp_path / "s.h5", kspace=kspace)
    with pytest.raises(InputError, match="--measurement has no meaning"):
        read_scan(path, ReadOptions(measurement="1"))


MASK = sampling_mask("random", W, 3, 0.2, seed=2).numpy()
ROWS = sampling_mask("equispaced", H, 3, 0.2, seed=2).numpy()
DIFFERENT = np.stack([MASK, sampling_mask("random", W, 3, 0.2, seed=3).numpy()])


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (MASK, MASK),
        (np.broadcast_to(MASK, (H, W)), MASK),
        (np.broadcast_to(MASK, (SLICES, W)), MASK),
        (np.broadcast_to(MASK, (SLICES, H, W)), MASK),
        (MASK[None, None, :, None], MASK),
        (DIFFERENT, DIFFERENT[:, None]),
        (np.broadcast_to(DIFFERENT[:, None], (SLICES, H, W)), DIFFERENT[:, None]),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "bool", "uint8"])
def test_masks(
    stored: np.ndarray, expected: np.ndarray, kind: str, kspace: np.ndarray, tmp_path: Path
) -> None:
    thin = kspace * (expected[:, None] if expected.ndim == 3 else expected)
    scan = read_scan(hdf5(tmp_path / "s.h5", kspace=thin, mask=stored.astype(kind)))
    np.testing.assert_array_equal(scan.mask, expected)
    assert scan.mask is not None
    assert scan.mask.dtype == bool
    assert (scan.phase_encode, scan.kspace.shape) == ("columns", kspace.shape)


def test_masks_of_two_dimensions(kspace: np.ndarray, tmp_path: Path) -> None:
    plane = np.outer(ROWS, MASK)
    scan = read_scan(hdf5(tmp_path / "s.h5", kspace=kspace * plane, mask=plane))
    np.testing.assert_array_equal(scan.mask, plane)
    each = np.stack([plane, np.outer(ROWS, DIFFERENT[1])])
    scan = read_scan(hdf5(tmp_path / "t.h5", kspace=kspace * each[:, None], mask=each))
    np.testing.assert_array_equal(scan.mask, each)


def test_a_mask_of_as_many_slices_as_rows(tmp_path: Path) -> None:
    """[8, W] could be [rows, W] and [slices, W]: what was measured decides."""
    masks = np.stack([sampling_mask("random", W, 3, 0.2, seed=n).numpy() for n in range(8)])
    values = head(8, 2, 8, W) * masks[:, None, None]
    scan = read_scan(hdf5(tmp_path / "s.h5", kspace=values, mask=masks))
    np.testing.assert_array_equal(scan.mask, masks[:, None])


@pytest.mark.parametrize("stored", [ROWS, np.broadcast_to(ROWS[:, None], (H, W)), None])
def test_phase_encoding_along_the_rows(
    stored: np.ndarray | None, kspace: np.ndarray, tmp_path: Path
) -> None:
    thin = kspace * ROWS[:, None]
    arrays = {"kspace": thin} | ({} if stored is None else {"mask": stored})
    images = combined(thin)
    path = hdf5(tmp_path / "s.h5", **arrays, reconstruction_rss=images)
    with h5py.File(path, "a") as file:
        file.attrs["spacing_mm"] = (4.0, 2.0, 3.0)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.kspace, thin.swapaxes(-2, -1))
    assert (scan.phase_encode, scan.spacing) == ("rows", (4.0, 3.0, 2.0))
    if stored is not None:
        np.testing.assert_array_equal(scan.mask, ROWS)
    assert "along the rows" in scan.remarks[0]
    assert scan.target is not None
    back, spacing, _ = in_file_axes(scan.target, scan)
    np.testing.assert_allclose(back, images, rtol=1e-5)
    assert spacing == (4.0, 2.0, 3.0)


def test_phase_encoding_by_name(kspace: np.ndarray, tmp_path: Path) -> None:
    path = hdf5(tmp_path / "s.h5", kspace=kspace)
    assert read_scan(path).phase_encode == "columns"
    scan = read_scan(path, ReadOptions(phase_encode="rows"))
    np.testing.assert_array_equal(scan.kspace, kspace.swapaxes(-2, -1))
    assert scan.phase_encode == "rows"
    rows = hdf5(tmp_path / "r.h5", kspace=kspace * ROWS[:, None])
    scan = read_scan(rows, ReadOptions(phase_encode="columns"))
    np.testing.assert_array_equal(scan.kspace, kspace * ROWS[:, None])


def test_noise_and_calibration_beside_kspace(kspace: np.ndarray, tmp_path: Path) -> None:
    noise = (np.arange(COILS * 7) + 1j).reshape(COILS, 7).astype(np.complex64)
    covariance = np.eye(COILS) + 0.1j
    lines = 2 * kspace[..., 20:28]
    content = {"kspace": kspace, "noise": noise, "noise_covariance": covariance}
    np.savez(tmp_path / "s.npz", **content, calibration=lines)
    scan = read_scan(tmp_path / "s.npz")
    np.testing.assert_array_equal(scan.kspace, kspace)
    np.testing.assert_array_equal(scan.noise, noise)
    np.testing.assert_allclose(scan.noise_covariance, covariance)
    np.testing.assert_array_equal(scan.calibration, lines)
    for name, wrong in (
        ("noise", noise[:2]),
        ("noise_covariance", covariance[:2]),
        ("calibration", lines[:, :2]),
    ):
        np.savez(tmp_path / "t.npz", **{**content, name: wrong})
        with pytest.raises(InputError, match=name):
            read_scan(tmp_path / "t.npz")


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (Path.touch, (Path("unpickled"),))  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", kspace=np.array([_Bomb()], dtype=object))
    Path("s.npy").write_bytes(pickle.dumps(_Bomb()))
    for path in ("s.npz", "s.npy"):
        with pytest.raises(InputError):
            read_scan(path)
    assert not Path("unpickled").exists()


def test_archives_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("kspace.npy", "w") as file:
        header = {"descr": "<c8", "fortran_order": False, "shape": (8, 8, 4096, 4096)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputError, match=r"s\.npz"):
        read_scan(path)
    scipy.io.savemat(tmp_path / "s.mat", {"kspace": np.ones((8, 8)) + 1j})
    content = bytearray((tmp_path / "s.mat").read_bytes())
    at = content.index(np.array([8, 8], "<i4").tobytes())
    content[at : at + 8] = np.array([2**30, 2**30], "<i4").tobytes()
    (tmp_path / "s.mat").write_bytes(content)
    with pytest.raises(InputError, match=r"s\.mat"):
        read_scan(tmp_path / "s.mat")
