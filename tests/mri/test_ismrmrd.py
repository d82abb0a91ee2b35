"""ISMRMRD files, written here record by record as the format's definition says."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.io import read_scan
from nirvana.mri.physics import fft2c, find_mask, ifft2c, rss

INDEX = [
    (name, "<u2")
    for name in (
        *("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast"),
        *("phase", "repetition", "set", "segment"),
    )
] + [("user", "<u2", (8,))]
HEAD = [
    ("version", "<u2"),
    ("flags", "<u8"),
    ("measurement_uid", "<u4"),
    ("scan_counter", "<u4"),
    ("acquisition_time_stamp", "<u4"),
    ("physiology_time_stamp", "<u4", (3,)),
    ("number_of_samples", "<u2"),
    ("available_channels", "<u2"),
    ("active_channels", "<u2"),
    ("channel_mask", "<u8", (16,)),
    ("discard_pre", "<u2"),
    ("discard_post", "<u2"),
    ("center_sample", "<u2"),
    ("encoding_space_ref", "<u2"),
    ("trajectory_dimensions", "<u2"),
    ("sample_time_us", "<f4"),
    ("position", "<f4", (3,)),
    ("read_dir", "<f4", (3,)),
    ("phase_dir", "<f4", (3,)),
    ("slice_dir", "<f4", (3,)),
    ("patient_table_position", "<f4", (3,)),
    ("idx", INDEX),
    ("user_int", "<i4", (8,)),
    ("user_float", "<f4", (8,)),
]
NOISE, CALIBRATION, REVERSED = 1 << 18, 1 << 19, 1 << 21
SLICES, COILS, H, W = 3, 2, 32, 20
STEP = 4.0  # mm between slices
READ, PHASE, NORMAL = np.array([0, 1, 0.0]), np.array([0.6, 0, 0.8]), np.array([0.8, 0, -0.6])


def header(**changes: Any) -> str:
    values = {"trajectory": "cartesian", "x": H, "z": 1, "fov": 64.0, "recon": 64.0, "center": 10}
    values.update(changes)
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ismrmrdHeader '
        'xmlns="http://www.ismrm.org/ISMRMRD"><encoding><encodedSpace><matrixSize><x>{x}</x>'
        "<y>20</y><z>{z}</z></matrixSize><fieldOfView_mm><x>{fov}</x><y>60</y><z>3</z>"
        "</fieldOfView_mm></encodedSpace><reconSpace><matrixSize><x>16</x><y>20</y><z>1</z>"
        "</matrixSize><fieldOfView_mm><x>{recon}</x><y>60</y><z>3</z></fieldOfView_mm>"
        "</reconSpace><trajectory>{trajectory}</trajectory><encodingLimits>"
        "<kspace_encoding_step_1><minimum>0</minimum><maximum>19</maximum>"
        "<center>{center}</center></kspace_encoding_step_1></encodingLimits></encoding>"
        "</ismrmrdHeader>"
    ).format(**values)


def record(line: np.ndarray, column: int, number: int, **changes: Any) -> tuple[Any, np.ndarray]:
    """One acquisition, `[coils, samples]`, of slice `number`."""
    head = np.zeros((), HEAD)
    head["number_of_samples"], head["active_channels"] = line.shape[1], line.shape[0]
    head["center_sample"] = line.shape[1] // 2
    head["idx"]["kspace_encode_step_1"], head["idx"]["slice"] = column, number
    head["position"] = np.array([10, 20, 30]) + number * STEP * NORMAL
    head["read_dir"], head["phase_dir"], head["slice_dir"] = READ, PHASE, NORMAL
    for name, value in changes.items():
        (head["idx"] if name in head["idx"].dtype.names else head)[name] = value
    return head, np.ascontiguousarray(line, np.complex64).view(np.float32).ravel()


def write(path: Path, records: list[tuple[Any, np.ndarray]], xml: str | None = None) -> Path:
    floats = h5py.vlen_dtype(np.dtype("<f4"))
    data = np.empty(len(records), np.dtype([("head", HEAD), ("traj", floats), ("data", floats)]))
    for i, (head, values) in enumerate(records):
        data[i] = (head, np.zeros(0, np.float32), values)
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group["data"] = data
        group.create_dataset(
            "xml", data=[header() if xml is None else xml], dtype=h5py.string_dtype()
        )
    return path


@pytest.fixture
def kspace() -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((2, SLICES, COILS, H, W))
    return (values[0] + 1j * values[1]).astype(np.complex64)


def records(kspace: np.ndarray, columns: Any = range(W)) -> list[tuple[Any, np.ndarray]]:
    return [
        record(kspace[number, :, :, column], column, number)
        for column in columns
        for number in range(len(kspace))
    ]


def test_every_line_comes_to_its_place(kspace: np.ndarray, tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace)))
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert scan.kspace.dtype == np.complex64
    assert scan.spacing == pytest.approx((STEP, 2.0, 3.0))
    assert scan.header == header()


def test_voxels_lie_where_the_scanner_says(kspace: np.ndarray, tmp_path: Path) -> None:
    affine = read_scan(write(tmp_path / "s.h5", records(kspace))).affine
    assert affine is not None
    # The centre of k-space's image is the position of the slice, in LPS.
    for number, row, column in [(0, H // 2, W // 2), (2, 0, 0), (1, 31, 3)]:
        place = np.array([10, 20, 30]) + number * STEP * NORMAL
        place = place + (row - H // 2) * 2.0 * READ + (column - W // 2) * 3.0 * PHASE
        found = (affine @ [number, row, column, 1])[:3]
        np.testing.assert_allclose(found * [-1, -1, 1], place, atol=1e-4)


def test_missing_columns_are_zero_and_the_mask_is_found(kspace: np.ndarray, tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace, range(0, W, 3))))
    assert find_mask(scan.kspace).nonzero().flatten().tolist() == list(range(0, W, 3))


def test_slices_come_as_they_lie(kspace: np.ndarray, tmp_path: Path) -> None:
    lying = [0, 2, 1]  # slice number n lies at place lying[n]
    made = [
        record(kspace[place, :, :, column], column, number, position=place * STEP * NORMAL)
        for number, place in enumerate(lying)
        for column in range(W)
    ]
    scan = read_scan(write(tmp_path / "s.h5", made))
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert scan.affine is not None


def test_averages_are_averaged_and_other_lines_are_left_out(
    kspace: np.ndarray, tmp_path: Path
) -> None:
    made = []
    for column in range(W):
        for number in range(SLICES):
            line = kspace[number, :, :, column]
            made.append(record(line * 0.5, column, number, average=0))
            made.append(record(line * 1.5, column, number, average=1))
            made.append(record(line * 99, column, number, repetition=1))
            made.append(record(line * 99, column, number, flags=CALIBRATION))
    made.insert(0, record(np.full((COILS, 50), 7.0), 0, 0, flags=NOISE))
    scan = read_scan(write(tmp_path / "s.h5", made))
    np.testing.assert_allclose(scan.kspace, kspace, rtol=1e-6)


def test_calibration_lines_fill_what_is_missing(kspace: np.ndarray, tmp_path: Path) -> None:
    made = records(kspace, range(0, W, 2))
    made += [record(kspace[n, :, :, 9], 9, n, flags=CALIBRATION) for n in range(SLICES)]
    scan = read_scan(write(tmp_path / "s.h5", made))
    assert find_mask(scan.kspace).nonzero().flatten().tolist() == sorted([*range(0, W, 2), 9])
    np.testing.assert_array_equal(scan.kspace[..., 9], kspace[..., 9])


def test_short_echoes_and_discarded_samples(kspace: np.ndarray, tmp_path: Path) -> None:
    made = [
        record(kspace[n, :, 6:, c], c, n, center_sample=H // 2 - 6, discard_pre=1, discard_post=2)
        for n in range(SLICES)
        for c in range(W)
    ]
    scan = read_scan(write(tmp_path / "s.h5", made))
    expected = kspace.copy()
    expected[:, :, :7] = expected[:, :, H - 2 :] = 0
    np.testing.assert_array_equal(scan.kspace, expected)


def test_readout_oversampling_is_cut_from_the_image(kspace: np.ndarray, tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace), header(recon=32.0)))
    whole, cut = (rss(ifft2c(torch.from_numpy(each))) for each in (kspace, scan.kspace))
    torch.testing.assert_close(cut, whole[:, 8:24], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fft2c(ifft2c(torch.from_numpy(scan.kspace))).numpy(), scan.kspace)
    assert scan.spacing == pytest.approx((STEP, 2.0, 3.0))
    assert scan.affine is not None
    centre = (scan.affine @ [0, 8, 10, 1])[:3]
    np.testing.assert_allclose(centre, [-10, -20, 30], atol=1e-4)


@pytest.mark.parametrize("coils", [1, 64])
def test_any_number_of_coils(coils: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((1, coils, H, W)).astype(np.complex64)
    np.testing.assert_array_equal(
        read_scan(write(tmp_path / "s.mrd", records(values))).kspace, values
    )


LINE = np.ones((COILS, H), np.complex64)
BOMB = '<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]>' + header()


@pytest.mark.parametrize(
    ("made", "xml", "words"),
    [
        ([record(LINE, 0, 0)], "", "no XML"),
        ([record(LINE, 0, 0)], "<a/>", "no 'encoding'"),
        ([record(LINE, 0, 0)], BOMB, "document type"),
        ([record(LINE, 0, 0)], header(trajectory="spiral"), "spiral"),
        ([record(LINE, 0, 0)], header(z=8), "3D"),
        ([record(LINE, 0, 0)], header(fov="nan"), "impossible"),
        ([record(LINE, 0, 0)], header(x="many"), "cannot be used"),
        ([record(LINE, 0, 0)], header(x=10**9), "1000000000 x 20"),
        ([record(LINE, 0, 0)], header(x=16), "does not fit"),
        ([record(LINE, 0, 0, flags=NOISE)], None, "only noise"),
        ([record(LINE, 0, 0, flags=REVERSED)], None, "backwards"),
        ([record(LINE, 20, 0)], None, "outside"),
        ([record(LINE, 0, 0, kspace_encode_step_2=1)], None, "second phase"),
        ([record(LINE, 0, 0), record(LINE[:1], 1, 0)], None, "different numbers of coils"),
        ([record(LINE, 0, 0, number_of_samples=9)], None, "asks for 36"),
        ([record(LINE, 0, 0, center_sample=1000)], None, "does not fit"),
        ([record(LINE * np.nan, 0, 0)], None, "NaN"),
        ([record(LINE * 0, 0, 0)], None, "zero everywhere"),
        ([record(LINE, 0, 0, active_channels=0)], None, "0 coils"),
        ([], None, "claims 0 lines"),
    ],
)
def test_what_is_no_such_scan_is_refused(
    made: list[Any], xml: str | None, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "s.h5", made, xml)
    with pytest.raises(InputError, match=words) as caught:
        read_scan(path)
    assert str(path) in str(caught.value)


def test_records_without_a_field_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["dataset/xml"] = header()
        file["dataset/data"] = np.zeros(4, [("head", [("flags", "<u8")]), ("data", "<f4")])
    with pytest.raises(InputError, match="lacks number_of_samples"):
        read_scan(path)
