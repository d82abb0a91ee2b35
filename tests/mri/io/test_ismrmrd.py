"""ISMRMRD files come in as they were measured."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from helpers.synthetic_ismrmrd import (
    CALIBRATION,
    COILS,
    NOISE,
    NORMAL,
    PHASE,
    READ,
    REVERSED,
    SLICES,
    STEP,
    H,
    W,
    header,
    record,
    records,
    write,
)
from nirvana.errors import InputError
from nirvana.mri.io import read_scan
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.masks import find_mask


@pytest.fixture
def kspace() -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((2, SLICES, COILS, H, W))
    return (values[0] + 1j * values[1]).astype(np.complex64)


def test_every_line_comes_to_its_place(kspace: np.ndarray, tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace)))
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert scan.kspace.dtype == np.complex64
    assert scan.spacing == pytest.approx((STEP, 2.0, 3.0))
    assert scan.header == header()


def test_voxels_lie_where_the_scanner_records_them(kspace: np.ndarray, tmp_path: Path) -> None:
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
        ([record(LINE, 0, 0)], header(fov="nan"), "impossible"),
        ([record(LINE, 0, 0)], header(x="many"), "cannot be used"),
        ([record(LINE, 0, 0)], header(x=10**9), "1000000000 x 20"),
        ([record(LINE, 0, 0)], header(x=16), "does not fit"),
        ([record(LINE, 0, 0, flags=NOISE)], None, "only noise"),
        ([record(LINE, 0, 0, flags=REVERSED)], None, "backwards"),
        ([record(LINE, 20, 0), record(LINE, 0, 0)], None, "outside"),
        ([record(LINE, 0, 0), record(LINE[:1], 1, 0)], None, "different numbers of coils"),
        ([record(LINE, 0, 0, number_of_samples=18)], None, "requires 72"),
        ([record(LINE, 0, 0, center_sample=1000), record(LINE, 1, 0)], None, "does not fit"),
        ([record(LINE, 0, 0, encoding_space_ref=1)], None, "encoding space 1"),
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


def test_sequences_that_hdf5_would_allocate_or_search_for_ever(
    kspace: np.ndarray, tmp_path: Path
) -> None:
    path = write(tmp_path / "s.h5", records(kspace))
    content = path.read_bytes()
    heap = content.index(b"GCOL")
    loop = content[: heap + 16] + bytes(16) + content[heap + 32 :]  # a part of no length
    path.write_bytes(loop)
    with pytest.raises(InputError, match="sequences that cannot be found"):
        read_scan(path)
    with h5py.File(write(tmp_path / "t.h5", records(kspace))) as file:
        data = file["dataset/data"]
        first, size = data.id.get_offset(), data.id.get_type().get_size()
    long = bytearray((tmp_path / "t.h5").read_bytes())
    long[first + size - 16 : first + size - 12] = b"\xff\xff\xff\x7f"  # eight gigabytes
    (tmp_path / "t.h5").write_bytes(long)
    with pytest.raises(InputError, match="sequences longer than the file"):
        read_scan(tmp_path / "t.h5")


def test_types_that_contradict_themselves(tmp_path: Path) -> None:
    """HDF5 would write over its memory: a member of four bytes is read into eight."""
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = np.ones((2, 2, 12, 16), np.complex64)
    content = bytearray(path.read_bytes())
    # The properties of the first four-byte float: after its size an offset and a precision of bits.
    at = content.index(b"\x04\x00\x00\x00\x00\x00\x20\x00")
    content[at + 6] = 64
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"s\.h5"):
        read_scan(path)
