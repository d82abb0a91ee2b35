"""Readers and writers: round trips, orientation, and every refusal."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import h5py
import nibabel
import numpy as np
import pytest

from helpers.phantom import combined
from nirvana.errors import InputError
from nirvana.mri.io import (
    Scan,
    read_scan,
    read_spacing,
    read_volume,
    write_reconstruction,
    write_scan,
)


def _kspace(*shape: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(shape) + 1j * generator.standard_normal(shape)
    return values.astype(np.complex64)


def _scan() -> Scan:
    mask = np.arange(16) % 2 == 0
    kspace = _kspace(3, 2, 12, 16)
    target = combined(kspace)[:, 1:11, 2:14].astype(np.float32)
    return Scan(kspace, mask, target, "head one", (3.0, 0.5, 0.75))


def _write(path: Path, **datasets: np.ndarray | bytes) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in datasets.items():
            file[key] = value
    return path


def test_a_scan_survives_writing_and_reading(tmp_path: Path) -> None:
    scan = _scan()
    write_scan(tmp_path / "scan.h5", scan, source="here")
    again = read_scan(tmp_path / "scan.h5")
    np.testing.assert_array_equal(again.kspace, scan.kspace)
    np.testing.assert_array_equal(again.mask, scan.mask)
    np.testing.assert_array_equal(again.target, scan.target)
    assert (again.name, again.spacing) == (scan.name, scan.spacing)
    assert again.kspace.dtype == np.complex64
    assert [file.name for file in tmp_path.iterdir()] == ["scan.h5"]


def test_all_of_a_scan_survives(tmp_path: Path) -> None:
    scan = replace(
        _scan(),
        mask=np.arange(3 * 16).reshape(3, 1, 16) % 3 > 0,
        target=None,
        noise=_kspace(2, 50),
        noise_covariance=np.eye(2) + 0.125j,
        calibration=_kspace(3, 2, 12, 6),
        volume_encoding="3D",
    )
    write_scan(tmp_path / "scan.h5", scan)
    again = read_scan(tmp_path / "scan.h5")
    for name in ("kspace", "mask", "noise", "noise_covariance", "calibration"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scan, name))
    assert (again.volume_encoding, again.remarks) == ("3D", ())


def test_the_written_header_has_what_fastmri_requires(tmp_path: Path) -> None:
    write_scan(tmp_path / "scan.h5", _scan())
    header = read_scan(tmp_path / "scan.h5").header
    assert header is not None
    encoding = ElementTree.fromstring(header).find("{*}encoding")
    assert encoding is not None
    found = {
        name: encoding.findtext("/".join("{*}" + part for part in name.split("/")))
        for name in (
            "encodedSpace/matrixSize/x",
            "encodedSpace/matrixSize/y",
            "reconSpace/matrixSize/x",
            "reconSpace/matrixSize/y",
            "encodingLimits/kspace_encoding_step_1/center",
            "encodingLimits/kspace_encoding_step_1/maximum",
        )
    }
    assert list(found.values()) == ["12", "16", "10", "12", "8", "15"]


def test_single_coil_kspace_gets_a_coil(tmp_path: Path) -> None:
    kspace = _kspace(3, 12, 16)
    # fastMRI's single-coil files also have the image of all the coils.
    images = combined(kspace[:, None]).astype(np.float32)
    scan = read_scan(
        _write(
            tmp_path / "single.h5",
            kspace=kspace,
            reconstruction_rss=images[:, ::-1],
            reconstruction_esc=images,
        )
    )
    assert scan.kspace.shape == (3, 1, 12, 16)
    np.testing.assert_array_equal(scan.target, images)
    assert (scan.name, scan.mask, scan.header) == ("single", None, None)


def test_a_reconstruction_records_its_source(tmp_path: Path) -> None:
    scan = _scan()
    assert scan.mask is not None
    volume = np.abs(_kspace(3, 12, 16))
    write_reconstruction(tmp_path / "r.h5", volume, scan, scan.mask, method="nirvana")
    with h5py.File(tmp_path / "r.h5") as file:
        np.testing.assert_array_equal(file["reconstruction"][()], volume)
        np.testing.assert_array_equal(file["mask"][()], scan.mask)
        assert file["reconstruction"].dtype == np.float32
        assert file.attrs["acceleration"] == 2
        assert (file.attrs["name"], file.attrs["method"]) == ("head one", "nirvana")
        assert file.attrs["spacing_mm"].tolist() == [3.0, 0.5, 0.75]


def _nothing(path: Path) -> None: ...


def _text(path: Path) -> None:
    path.write_text("kspace = 1, 2, 3\n")


def _cut_h5(path: Path) -> None:
    _write(path, kspace=_kspace(3, 2, 12, 16))
    path.write_bytes(path.read_bytes()[:3000])


def _huge(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", (4096, 64, 4096, 4096), np.complex64, chunks=(1, 1, 64, 64))


def _with_nan(path: Path) -> None:
    kspace = _kspace(3, 2, 12, 16)
    kspace[1, 0, 3, 3] = np.nan
    _write(path, kspace=kspace)


def _saved(**datasets: np.ndarray) -> Callable[[Path], None]:
    return lambda path: (_write(path, **datasets), None)[1]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_nothing, "no such file"),
        (Path.mkdir, "is a folder; give a file"),
        (_text, "not an HDF5 file"),
        (_cut_h5, "damaged"),
        (_saved(image=np.ones(3), other=np.ones(2)), r"holds image \(3,\), other \(2,\)"),
        (_saved(), "holds nothing"),
        (_with_nan, "NaN"),
        (_saved(kspace=np.ones((3, 2, 12, 16))), "must be complex"),
        (_saved(kspace=_kspace(12)), "shape"),
        (_saved(kspace=_kspace(1, 1, 3, 2, 12, 16)), "name its axes by --axes"),
        (_saved(kspace=_kspace(3, 2, 12, 4)), "12 x 4"),
        (_saved(kspace=_kspace(0, 2, 12, 16)), "0 slices"),
        (_saved(kspace=np.zeros((3, 2, 12, 16), np.complex64)), "zero everywhere"),
        (_saved(kspace=_kspace(3, 2, 12, 16), mask=np.ones(13)), "16 columns"),
        (
            _saved(kspace=_kspace(3, 2, 12, 16), reconstruction_rss=np.ones((3, 20, 16))),
            "the target has shape",
        ),
        (
            _saved(kspace=_kspace(3, 2, 12, 16), reconstruction_rss=np.full((3, 12, 16), np.inf)),
            "'reconstruction_rss' holds NaN",
        ),
        (
            _saved(kspace=_kspace(3, 2, 12, 16), reconstruction_rss=np.zeros((3, 12, 16))),
            "'reconstruction_rss' holds no value above zero",
        ),
        (_saved(kspace=1e22 * _kspace(3, 2, 12, 16)), r"reaches .e\+22, whose square is beyond"),
        (_huge, "cannot hold"),
    ],
)
def test_what_is_no_scan_is_refused(
    tmp_path: Path, prepare: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "scan.h5"
    prepare(path)
    with pytest.raises(InputError, match=words) as caught:
        read_scan(path)
    assert str(path) in str(caught.value)


def test_an_image_volume_is_no_scan(example4d: Path) -> None:
    with pytest.raises(InputError, match="nirvana mri simulate"):
        read_scan(example4d)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volumes_stand_upright_in_radiological_convention(
    tmp_path: Path, axes: str, suffix: str
) -> None:
    data = np.zeros((10, 12, 14), dtype=np.float32)  # to the right, to the front, up
    data[1, 5, 4] = 1.0  # on the patient's left
    data[5, 10, 4] = 0.5  # at the front
    data[5, 5, 12] = 0.25  # high up
    image = nibabel.Nifti1Image(data, np.diag([2.0, 3.0, 4.0, 1.0]))
    turned = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    path = tmp_path / f"v{suffix}"
    nibabel.save(image.as_reoriented(turned), path)
    volume = read_volume(path)
    assert volume.shape == (14, 12, 10)
    assert volume.dtype == np.float32
    assert volume[4, 6, 8] == 1.0  # the patient's left is on the right of the picture
    assert volume[4, 1, 4] == 0.5  # the front is on top
    assert volume[12, 6, 4] == 0.25  # slices go up
    assert read_spacing(path) == (4.0, 3.0, 2.0)


def test_the_first_of_a_series_is_read_and_scaled(example4d: Path) -> None:
    volume = read_volume(example4d)
    assert volume.shape == (24, 96, 128)
    assert (volume.min(), volume.max()) == (0, 1)
    first = nibabel.load(example4d).dataobj[..., 0]
    np.testing.assert_allclose(np.sort(volume.ravel()), np.sort(first.ravel()) / first.max())


def test_npy_volumes_are_taken_as_they_are(tmp_path: Path) -> None:
    volume = np.abs(_kspace(2, 9, 11))
    volume[0, 0, 0] = -1
    np.save(tmp_path / "v.npy", volume)
    expected = np.clip(volume / volume.max(), 0, 1)
    np.testing.assert_allclose(read_volume(tmp_path / "v.npy"), expected, rtol=1e-6)
    assert read_spacing(tmp_path / "v.npy") is None


def _nifti(data: np.ndarray) -> Callable[[Path], None]:
    return lambda path: nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)


def _without_affine(path: Path) -> None:
    _nifti(ONES)(path)
    header = bytearray(path.read_bytes())
    header[280:328] = bytes(48)  # the three rows of the sform
    path.write_bytes(header)


def _cut_nifti(path: Path) -> None:
    noise = np.random.default_rng(0).random((16, 16, 16)).astype(np.float32)
    _nifti(noise)(path)
    path.write_bytes(path.read_bytes()[:5000])


def _no_gzip(path: Path) -> None:
    path.write_bytes(b"hello, I am not compressed")


def _empty_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b""))


ONES = np.ones((16, 16, 16), dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "prepare", "words"),
    [
        ("v.nii.gz", _nothing, "no such file"),
        ("v.png", _text, "no image volume"),
        ("v.nii", _text, "no readable NIfTI"),
        ("v.nii.gz", _no_gzip, "no readable NIfTI"),
        ("v.nii.gz", _empty_gzip, "no readable NIfTI"),
        ("v.nii", _cut_nifti, "cut off"),
        ("v.nii.gz", _cut_nifti, "cut off"),
        ("v.nii.gz", _nifti(ONES[0]), "shape"),
        ("v.nii.gz", _nifti(ONES.astype(np.complex64)), "real numbers"),
        ("v.nii.gz", _nifti(ONES * np.nan), "NaN"),
        ("v.nii.gz", _nifti(ONES * 0), "empty"),
        ("v.nii.gz", _nifti(ONES[:, :4]), "4 x 16"),
        ("v.nii", _without_affine, "affine"),
        ("v.npy", _text, "array of numbers"),
        ("v.npy", lambda path: np.save(path, np.array([{}])), "array of numbers"),
        ("v.npy", lambda path: np.save(path, ONES[0]), "slices, H, W"),
        ("v.npy", lambda path: np.save(path, ONES.astype(np.complex64)), "no image volume"),
        ("v.npy", lambda path: np.save(path, ONES.astype("S2")), "must be real"),
        ("v.npy", lambda path: np.save(path, ONES[:0]), "0 slices"),
        ("v.npy", lambda path: np.save(path, -ONES), "empty"),
    ],
)
def test_what_is_no_volume_is_refused(
    tmp_path: Path, name: str, prepare: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / name
    prepare(path)
    with pytest.raises(InputError, match=words) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


def test_a_cut_npy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, ONES)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="array of numbers"):
        read_volume(path)


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    broken = replace(_scan(), spacing="nowhere near h5py")  # type: ignore[arg-type]
    broken = replace(broken, kspace=np.array([object()]))
    with pytest.raises(TypeError):
        write_scan(tmp_path / "scan.h5", broken)
    assert not list(tmp_path.iterdir())


def test_every_volume_of_the_data_can_be_read(mri_data: Path) -> None:
    volume = read_volume(mri_data / "test" / "tumor_pyr1_T1post.nii.gz")
    assert volume.shape == (25, 256, 250)
    assert read_spacing(mri_data / "test" / "tumor_pyr1_T1post.nii.gz") == (6.5, 0.78125, 0.78125)
