"""What every reader does with a file that is not what it should be: it reads it as it is, or
refuses it in one line. It raises nothing else, and takes no more memory than the file can hold."""

import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.scan_files import (
    MAKERS,
    MEMORY,
    SHAPE,
    damaged,
    fastmri,
    kspace,
    read,
    read_or_refuse,
)
from nirvana.errors import InputError
from nirvana.mri.io import find_scans, read_scan, read_volume
from nirvana.mri.io.formats import SUFFIXES as SCAN_SUFFIXES

SUFFIXES = [*SCAN_SUFFIXES, ".nii", ".nii.gz", ".npy.gz", ".h5.gz", ".mat.gz"]
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_whole_files_are_read(name: str, whole: dict[str, Path]) -> None:
    assert read(whole[name]).any()


@pytest.mark.parametrize("name", MAKERS)
@FUZZ
@given(seed=st.integers(0, 2**32))
def test_damaged_files(name: str, seed: int, whole: dict[str, Path], tmp_path: Path) -> None:
    """`tests/stress/mutated_files.py` does the same with as many files as one wants."""
    read(whole[name])  # imports what the format needs, so that its memory is not counted
    content = whole[name].read_bytes()
    (tmp_path / name).write_bytes(damaged(content, random.Random(seed)))
    if name == "bart.cfl":
        (tmp_path / "bart.hdr").write_bytes(whole[name].with_suffix(".hdr").read_bytes())
    read_or_refuse(tmp_path / name)


@FUZZ
@given(header=st.binary(max_size=200) | st.text("# Dimensons\n0123456789-+. ").map(str.encode))
def test_any_header_of_barts(header: bytes, whole: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bart.cfl"
    path.write_bytes(whole["bart.cfl"].read_bytes())
    path.with_suffix(".hdr").write_bytes(header)
    read_or_refuse(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@FUZZ
@given(content=st.binary(max_size=500))
def test_any_bytes(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="any"):
        read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_links_in_a_circle(suffix: str, tmp_path: Path) -> None:
    path, other = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    path.symlink_to(other)
    other.symlink_to(path)
    with pytest.raises(InputError, match="in a circle"):
        read(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="in a circle"):
        find_scans(tmp_path / "loop")


@pytest.mark.parametrize("dtype", [">c8", "<c16", ">c16"])
def test_kspace_of_any_precision_and_byte_order(dtype: str, tmp_path: Path) -> None:
    values = kspace(dtype)
    found = read_scan(fastmri(tmp_path / "s.h5", values)).kspace
    assert found.dtype == np.complex64
    np.testing.assert_array_equal(found, values.astype(np.complex64))


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">i2", "<u1", "<f2"])
def test_volumes_of_any_precision_and_byte_order(dtype: str, tmp_path: Path) -> None:
    values = (np.abs(kspace()[0]) * 50).astype(dtype)
    np.save(tmp_path / "v.npy", values)
    expected = values.astype(np.float64) / float(values.max())
    np.testing.assert_allclose(read_volume(tmp_path / "v.npy"), expected, rtol=1e-6)
    if dtype == "<f2":
        return  # NIfTI has no half precision
    header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(dtype)
    data = values.repeat(4, 0)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4), header), tmp_path / "v.nii")
    upright = data[::-1, ::-1].transpose(2, 1, 0).astype(np.float64) / float(values.max())
    np.testing.assert_allclose(read_volume(tmp_path / "v.nii"), upright, rtol=1e-6)


def _claims(path: Path, **datasets: tuple[tuple[int, ...], Any]) -> None:
    """Datasets of which nothing was ever written, beside a sound k-space."""
    with h5py.File(path, "w") as file:
        if "kspace" not in datasets:
            file["kspace"] = kspace()
        for key, (shape, dtype) in datasets.items():
            file.create_dataset(key, shape, dtype, chunks=True)


@pytest.mark.parametrize(
    "datasets",
    [
        {"kspace": ((4096, 64, 4096, 4096), np.complex64)},
        {"kspace": ((16, 16, 2048, 2048), np.complex64)},
        {"mask": ((2**40,), np.float32)},
        {"reconstruction_rss": ((2, 2**20, 2**20), np.float32)},
        {"ismrmrd_header": ((2**34,), "S1000")},
        {"ismrmrd_header": ((), "S60000")},
    ],
)
def test_hdf5_that_claims_what_it_does_not_hold(
    datasets: dict[str, tuple[tuple[int, ...], Any]], tmp_path: Path
) -> None:
    path = tmp_path / "s.h5"
    if datasets.get("ismrmrd_header", ((1,),))[0] == ():
        fastmri(path)
        with h5py.File(path, "a") as file:
            del file["ismrmrd_header"]
            file["ismrmrd_header"] = np.array(b"x" * 60000)
        assert read_scan(path).header == "x" * 60000  # large, yet there
        return
    _claims(path, **datasets)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"s\.h5"):
        read_scan(path)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.npy"])
def test_volumes_that_claim_terabytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "v.npy":
        header = {"descr": "<f8", "fortran_order": False, "shape": (8000, 8000, 8000)}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    else:
        image = nibabel.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4))
        content = bytearray(image.to_bytes())
        content[40:56] = np.array([3, 1000, 1000, 1000, 1, 1, 1, 1], "<i2").tobytes()
        if name.endswith(".gz"):
            import gzip

            content = bytearray(gzip.compress(bytes(content)))
        path.write_bytes(content)
    read_or_refuse(path)
    with pytest.raises(InputError):
        read_volume(path)


@pytest.mark.parametrize("key", ["kspace", "mask", "reconstruction_rss", "ismrmrd_header"])
def test_links_inside_hdf5_are_not_followed(key: str, tmp_path: Path) -> None:
    fastmri(tmp_path / "other.h5")
    links = [
        h5py.SoftLink(f"/{key}"),
        h5py.SoftLink("/nowhere"),
        h5py.ExternalLink(str(tmp_path / "other.h5"), f"/{key}"),
    ]
    for number, link in enumerate(links):
        path = fastmri(tmp_path / f"s{number}.h5")
        with h5py.File(path, "a") as file:
            del file[key]
            file[key] = link
        with pytest.raises(InputError, match=f"'{key}' is a link"):
            read_scan(path)


def test_numbers_in_other_files_are_notread(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(kspace().tobytes())
    with h5py.File(tmp_path / "s.h5", "w") as file:
        external = [(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("kspace", SHAPE, np.complex64, external=external)
        file["large enough"] = np.ones(2000)
    with pytest.raises(InputError, match="other files"):
        read_scan(tmp_path / "s.h5")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kspace", np.array(b"text"), "must be complex"),
        ("kspace", None, "is a group"),
        ("mask", np.array([b"a"] * 16), "numbers or booleans"),
        ("mask", np.full(16, np.nan), "NaN"),
        ("mask", None, "is a group"),
        ("reconstruction_rss", kspace(shape=(2, 12, 16)), "real numbers"),
        ("ismrmrd_header", np.ones(3), "one string"),
    ],
)
def test_wrong_kinds_of_dataset(key: str, value: Any, words: str, tmp_path: Path) -> None:
    path = fastmri(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        del file[key]
        if value is None:
            file.create_group(key)
        else:
            file[key] = value
    with pytest.raises(InputError, match=words):
        read_scan(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spacing_mm", "wide"),
        ("spacing_mm", (1.0, 2.0)),
        ("spacing_mm", (1.0, np.nan, 1.0)),
        ("spacing_mm", (1.0, -1.0, 1.0)),
        ("affine", np.zeros((4, 4))),
        ("affine", np.eye(3)),
    ],
)
def test_wrong_attributes(key: str, value: Any, tmp_path: Path) -> None:
    path = fastmri(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        file.attrs[key] = value
    with pytest.raises(InputError, match=key):
        read_scan(path)


def test_the_program_refuses_in_one_line_and_writes_nothing(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    path, out = tmp_path / "s.h5", tmp_path / "out"
    path.write_bytes(whole["fastmri.h5"].read_bytes()[:4000])
    arguments = ["mri", "reconstruct", str(path), "--out", str(out), "--json", f"{out}.json"]
    done = subprocess.run(
        [sys.executable, "-c", "from nirvana.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(path) in done.stderr
    assert list(tmp_path.iterdir()) == [path]
