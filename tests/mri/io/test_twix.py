"""Siemens raw data comes in as it was measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.phantom import combined, error, fft2c, head, picture, sensitivities
from helpers.synthetic_twix import (
    CALIBRATION,
    FEEDBACK,
    NOISE,
    PHASE_CORRECTION,
    REFLECT,
    Block,
    block,
    measurement,
    protocol,
    write,
)
from nirvana.errors import InputError
from nirvana.mri.io import ReadOptions, read_scan, selections_of

SLICES, COILS, H, W = 2, 3, 40, 48
POSITIONS = ((0.0, 0.0, -4.0), (0.0, 0.0, 1.0))


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    return head(SLICES, COILS, H, W)


def oversampled(kspace: np.ndarray) -> np.ndarray:
    """K-space of the same images in the middle of twice the field of view along H."""
    images = np.fft.fftshift(
        np.fft.ifft2(np.fft.ifftshift(kspace, axes=(-2, -1)), norm="ortho"), axes=(-2, -1)
    )
    pad = kspace.shape[-2] // 2
    return fft2c(np.pad(images, ((0, 0), (0, 0), (pad, pad), (0, 0)))).astype(np.complex64)


def blocks(kspace: np.ndarray, columns: range = range(W), **facts: int) -> list[Block]:
    wide = oversampled(kspace)
    return [
        block(
            wide[number, :, :, column],
            Lin=column,
            Sli=number,
            center_line=W // 2,
            position=POSITIONS[number],
            **facts,
        )
        for column in columns
        for number in range(len(kspace))
    ]


@pytest.mark.parametrize("version", ["VD", "VB"])
def test_every_line_comes_to_its_place(version: str, kspace: np.ndarray, tmp_path: Path) -> None:
    content = measurement(blocks(kspace), protocol(H, W), version)
    scan = read_scan(write(tmp_path / "meas.dat", [content], version))
    np.testing.assert_allclose(scan.kspace, kspace, atol=1e-5)
    assert scan.spacing == pytest.approx((5.0, 240 / H, 160 / W))
    assert scan.affine is None  # directions of Siemens raw data are unverified
    assert "orientation is unknown" in scan.remarks[-1]
    study = scan.study
    assert (study.protocol, study.patient_name, study.patient_sex) == ("head", "Doe^Jo", "F")
    assert (study.repetition_time, study.echo_time, study.flip_angle) == (500, 4, 25)
    assert (study.frame_uid, study.field_strength) == ("1.2.3.4", 2.894)


def test_slices_come_as_they_lie(kspace: np.ndarray, tmp_path: Path) -> None:
    lines = blocks(kspace)
    for _, facts in lines:
        # Slice number 0 lies above slice number 1; the end with the lowest number stays first.
        facts["position"] = POSITIONS[1 - facts["Sli"]]
    content = measurement(lines, protocol(H, W))
    scan = read_scan(write(tmp_path / "meas.dat", [content]))
    np.testing.assert_allclose(scan.kspace, kspace, atol=1e-5)


def test_noise_of_another_measurement(kspace: np.ndarray, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).standard_normal((COILS, 64)) + 0j
    adjustment = measurement([block(noise, NOISE)], protocol(32, 1), meas="")
    image = measurement(blocks(kspace), protocol(H, W))
    path = write(tmp_path / "meas.dat", [adjustment, image])
    scan = read_scan(path)
    np.testing.assert_allclose(scan.noise, noise, rtol=1e-6)
    assert "2 measurements" in scan.remarks[0]
    assert "number 2 is read" in scan.remarks[0]
    with pytest.raises(InputError, match="only noise"):
        read_scan(path, ReadOptions(measurement="1"))
    assert read_scan(path, ReadOptions(measurement="head")).name == "meas"
    with pytest.raises(InputError, match="no measurement '3'"):
        read_scan(path, ReadOptions(measurement="3"))


@pytest.mark.parametrize(("mode", "is_separate"), [("2", False), ("4", True)])
def test_calibration(mode: str, is_separate: bool, kspace: np.ndarray, tmp_path: Path) -> None:
    lines = blocks(kspace, range(0, W, 2))
    lines += [
        (line, {**facts, "flags": CALIBRATION}) for line, facts in blocks(kspace, range(17, 31))
    ]
    ascconv = protocol(H, W, sPat__lAccelFactPE="2", sPat__ucRefScanMode=mode)
    scan = read_scan(write(tmp_path / "meas.dat", [measurement(lines, ascconv)]))
    measured = scan.kspace.any(axis=(0, 1, 2))
    expected = np.arange(W) % 2 == 0
    assert scan.encoding.acceleration == (2, 1)
    if is_separate:
        assert scan.calibration is not None
        np.testing.assert_allclose(scan.calibration, kspace[..., 17:31], atol=1e-5)
    else:
        expected[17:31] = True
        assert scan.calibration is None
    np.testing.assert_array_equal(measured, expected)


def test_contrasts_are_chosen(kspace: np.ndarray, tmp_path: Path) -> None:
    lines = blocks(kspace) + blocks(0.5 * kspace, Eco=1)
    path = write(tmp_path / "meas.dat", [measurement(lines, protocol(H, W))])
    first = read_scan(path)
    np.testing.assert_allclose(first.kspace, kspace, atol=1e-5)
    assert "2 contrasts" in first.remarks[0]
    every = [read_scan(path, options) for options in selections_of(path)]
    assert [scan.name for scan in every] == ["meas_contrast0", "meas_contrast1"]
    assert [scan.study.echo_time for scan in every] == [4, 9]
    np.testing.assert_allclose(every[1].kspace, 0.5 * kspace, atol=1e-5)


@pytest.mark.parametrize("missing", [12, 0])
def test_asymmetric_echoes_and_partial_fourier(
    missing: int, kspace: np.ndarray, tmp_path: Path
) -> None:
    """Lines and samples before the centre that were not measured are zero."""
    lines = blocks(kspace, range(missing, W))
    for number, (line, facts) in enumerate(lines):
        facts |= {"Lin": facts["Lin"] - missing, "center_line": W // 2 - missing}
        facts["center"] = H - 16
        lines[number] = (line[:, 16:], facts)
    scan = read_scan(write(tmp_path / "meas.dat", [measurement(lines, protocol(H, W))]))
    assert scan.kspace.shape == kspace.shape
    assert not scan.kspace[..., :missing].any()
    # The readout's first samples are high frequencies: the image loses little.
    assert error(combined(scan.kspace), combined(kspace * (np.arange(W) >= missing))) < 0.01


def echo_planar() -> tuple[np.ndarray, list[Block]]:
    """Lines of which every second one is read backwards with another phase, after navigators."""
    image = picture(2 * H, W) * (np.abs(np.arange(2 * H) - H) < H // 2)[:, None]
    values = fft2c(image * sensitivities(COILS, 2 * H, W)).astype(np.complex64)

    def backwards(line: np.ndarray) -> np.ndarray:
        spectrum = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(line, axes=1), axis=1), axes=1)
        spectrum = spectrum * np.exp(1j * (0.03 * np.arange(2 * H) + 0.7))
        shifted = np.fft.fft(np.fft.ifftshift(spectrum, axes=1), axis=1)
        return np.fft.fftshift(shifted, axes=1)[:, ::-1]

    middle = values[:, :, W // 2]
    flags = PHASE_CORRECTION | FEEDBACK
    lines = [
        block(backwards(middle) if n % 2 else middle, flags | REFLECT * (n % 2), center_line=W // 2)
        for n in range(3)
    ]
    for column in range(W):
        line = values[:, :, column]
        odd = column % 2
        line = backwards(line) if odd else line
        lines.append(block(line, REFLECT * odd, Lin=column, center_line=W // 2))
    return values[None], lines


def test_echo_planar_lines_get_one_phase(tmp_path: Path) -> None:
    values, lines = echo_planar()
    # The whole field of view is kept: the base resolution is that of the readout.
    path = write(tmp_path / "meas.dat", [measurement(lines, protocol(2 * H, W))])
    assert error(read_scan(path).kspace, values) < 1e-4
    without = measurement([each for each in lines if not each[1]["flags"] & 2], protocol(2 * H, W))
    with pytest.raises(InputError, match="backwards"):
        read_scan(write(tmp_path / "other.dat", [without]))


def test_three_dimensions(tmp_path: Path) -> None:
    volume = head(6, COILS, H, W)
    values = np.fft.fftshift(np.fft.fft(volume, axis=0, norm="ortho"), axes=0)
    wide = oversampled(values)
    lines = [
        block(wide[p, :, :, c], Lin=c, Par=p, center_line=W // 2, center_partition=3)
        for p in range(6)
        for c in range(W)
    ]
    ascconv = protocol(H, W, sKSpace__ucDimension="4")
    scan = read_scan(write(tmp_path / "meas.dat", [measurement(lines, ascconv)]))
    assert scan.volume_encoding == "3D"
    np.testing.assert_allclose(scan.kspace, values, atol=1e-5)
    assert scan.spacing == pytest.approx((0.5, 240 / H, 160 / W))


def _cut(content: bytes) -> bytes:
    return content[:-4000]


def _zero_channels(content: bytes) -> bytes:
    """The first block of a VB file claims no channels, so that it has no length."""
    start = int.from_bytes(content[:4], "little")
    return content[: start + 30] + b"\0\0" + content[start + 32 :]


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [
        ("VB", _cut, "cut off"),
        ("VB", _zero_channels, "damaged"),
        ("VD", lambda content: content[:9000], "cut"),
        ("VD", lambda content: b"", "cut off"),
        ("VD", lambda content: b"\0\0\0\0\1\0\0\0", "is cut"),
        ("VD", lambda content: b"some text, no scan" * 700, "damaged or cut off"),
    ],
)
def test_what_is_no_raw_data_is_refused(
    version: str,
    change: Callable[[bytes], bytes],
    words: str,
    kspace: np.ndarray,
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path / "m.dat", [measurement(blocks(kspace), protocol(H, W), version)], version
    )
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=words) as caught:
        read_scan(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sKSpace__ucTrajectory": "2"}, "not cartesian"),
        ({"alTE[123456]": "1"}, "impossible length"),
    ],
)
def test_protocols_that_cannot_be_used(
    changes: dict[str, str], words: str, kspace: np.ndarray, tmp_path: Path
) -> None:
    content = measurement(blocks(kspace), protocol(H, W, **changes))
    with pytest.raises(InputError, match=words):
        read_scan(write(tmp_path / "m.dat", [content]))


@pytest.mark.parametrize(("name", "size"), [("gre", 160), ("epi", 80)])
def test_real_files_show_the_phantom(name: str, size: int, mri_data: Path) -> None:
    """A disc of liquid: bright inside, nothing in the corners, and no ghost half a view away."""
    scan = read_scan(mri_data / "raw" / f"twixtools_{name}.dat")
    assert scan.kspace.shape == (1, 2, size, size)
    assert scan.spacing == pytest.approx((4, 200 / size, 200 / size))
    image = combined(scan.kspace)[0]
    corner = size // 8
    corners = np.stack([image[:corner, :corner], image[-corner:, -corner:]]).mean()
    assert np.median(image) > 5 * corners
    assert scan.study.protocol in ("gre", "ep2d_bold")


def test_real_lines_are_those_of_the_library(mri_data: Path) -> None:
    import twixtools

    path = mri_data / "raw" / "twixtools_gre.dat"
    mapped = twixtools.map_twix(str(path), verbose=False)[-1]["image"]
    mapped.flags["remove_os"] = True
    mapped.flags["squeeze_singletons"] = True
    # [lines, coils, samples] there, on the scale of a transform that is not orthonormal
    values = np.sqrt(2) * mapped[:].transpose(1, 2, 0)
    np.testing.assert_allclose(read_scan(path).kspace[0], values, rtol=1e-3, atol=1e-9)
