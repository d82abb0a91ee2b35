"""ISMRMRD files of scanners: references, noise, several images and measurements, three dimensions,
echo-planar lines, and headers that state a wrong centre."""

from pathlib import Path

import numpy as np
import pytest

from helpers.phantom import error, head
from helpers.synthetic_ismrmrd import (
    CALIBRATION,
    CALIBRATION_AND_IMAGING,
    COILS,
    NOISE,
    NORMAL,
    PHASE,
    PHASE_CORRECTION,
    READ,
    REVERSED,
    SLICES,
    STEP,
    H,
    W,
    encoding,
    header,
    record,
    records,
    write,
)
from nirvana.errors import InputError
from nirvana.mri.io import ReadOptions, read_scan, selections_of

MIDDLE = range(6, 15)


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    return head(SLICES, COILS, H, W)


@pytest.fixture(scope="module")
def reference(kspace: np.ndarray) -> np.ndarray:
    """Of the same coils, with another contrast."""
    return (7 * np.abs(kspace) ** 0.9 * np.exp(1j * np.angle(kspace))).astype(np.complex64)


@pytest.mark.parametrize("z", [2, 3, 1.00004, 0.99996])
def test_2d_scans_whose_header_claims_partitions(
    z: float, kspace: np.ndarray, tmp_path: Path
) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace), header(z=z)))
    assert scan.volume_encoding == "2D"
    np.testing.assert_array_equal(scan.kspace, kspace)


@pytest.mark.parametrize("mode", ["separate", "external", "other"])
def test_a_separate_reference_is_kept_from_the_image(
    mode: str, kspace: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    made = records(kspace, range(0, W, 2)) + records(reference, MIDDLE, flags=CALIBRATION)
    scan = read_scan(write(tmp_path / "s.h5", made, header(mode=mode)))
    assert scan.kspace.any(axis=(0, 1, 2)).tolist() == [column % 2 == 0 for column in range(W)]
    assert scan.calibration is not None
    expected = np.zeros((SLICES, COILS, H, 10), np.complex64)  # origin in the middle, as in W
    expected[..., 1:] = reference[..., 6:15]
    np.testing.assert_array_equal(scan.calibration, expected)
    assert scan.encoding.calibration_mode == mode
    assert "a separate reference scan of 9 lines" in scan.remarks[0]


@pytest.mark.parametrize("mode", ["", "embedded"])
def test_a_reference_that_differs_from_the_image_is_separate(
    mode: str, kspace: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    """Where both measured a line, they can be compared, whatever the header states."""
    made = records(kspace, range(0, W, 2)) + records(reference, MIDDLE, flags=CALIBRATION)
    scan = read_scan(write(tmp_path / "s.h5", made, header(mode=mode)))
    assert scan.kspace.any(axis=(0, 1, 2)).tolist() == [column % 2 == 0 for column in range(W)]
    assert scan.calibration is not None


@pytest.mark.parametrize("mode", ["", "embedded"])
@pytest.mark.parametrize("flags", [CALIBRATION, CALIBRATION_AND_IMAGING])
def test_embedded_calibration_lines_fill_the_middle(
    mode: str, flags: int, kspace: np.ndarray, tmp_path: Path
) -> None:
    made = records(kspace, range(0, W, 2)) + records(kspace, MIDDLE, flags=flags)
    scan = read_scan(write(tmp_path / "s.h5", made, header(mode=mode)))
    used = [column for column in range(W) if column % 2 == 0 or column in MIDDLE]
    np.testing.assert_allclose(scan.kspace[..., used], kspace[..., used], rtol=1e-6)
    assert np.flatnonzero(scan.kspace.any(axis=(0, 1, 2))).tolist() == used
    assert scan.calibration is None


@pytest.mark.parametrize(("width", "is_used"), [(60, True), (80, False)])
def test_a_reference_in_an_encoding_space_of_its_own(
    width: float, is_used: bool, kspace: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    """Of a smaller matrix and the same field of view; another field of view cannot be used."""
    small = reference[..., H // 2 - 8 : H // 2 + 8, W // 2 - 6 : W // 2 + 6]
    made = records(kspace, range(0, W, 2))
    made += [
        record(small[n, :, :, c], c, n, flags=CALIBRATION, encoding_space_ref=1)
        for n in range(SLICES)
        for c in range(12)
    ]
    xml = header(after=encoding(x=16, y=12, center=6, width=width))
    scan = read_scan(write(tmp_path / "s.h5", made, xml))
    if is_used:
        np.testing.assert_array_equal(scan.calibration, small)
    else:
        assert scan.calibration is None
        assert "another field of view is left out" in scan.remarks[0]


def test_a_second_encoding_space_is_chosen(kspace: np.ndarray, tmp_path: Path) -> None:
    made = records(kspace) + records(3 * kspace, encoding_space_ref=1)
    path = write(tmp_path / "s.h5", made, header(after=encoding()))
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert "2 encoding spaces in the file (0, 1): encoding 0 is read" in scan.remarks[0]
    other = read_scan(path, ReadOptions(select={"encoding": 1}))
    np.testing.assert_array_equal(other.kspace, 3 * kspace)
    # All images are those of one encoding space.
    assert len(selections_of(path)) == 1


SEQUENCE = "<sequenceParameters><TE>5</TE><TE>9</TE><TE>13</TE><TR>500</TR></sequenceParameters>"


@pytest.mark.parametrize("counter", ["contrast", "phase", "repetition", "set"])
def test_several_images_in_one_file(counter: str, kspace: np.ndarray, tmp_path: Path) -> None:
    made = [line for n in range(3) for line in records((n + 1) * kspace, **{counter: n})]
    path = write(tmp_path / "s.h5", made, header(after=SEQUENCE))
    first = read_scan(path)
    np.testing.assert_array_equal(first.kspace, kspace)
    assert f"3 {counter}s in the file (0 to 2): {counter} 0 is read" in first.remarks[0]
    every = [read_scan(path, options) for options in selections_of(path)]
    assert [scan.name for scan in every] == [f"s_{counter}{n}" for n in range(3)]
    for number, scan in enumerate(every):
        np.testing.assert_array_equal(scan.kspace, (number + 1) * kspace)
        assert scan.study.echo_time == (5, 9, 13)[number if counter == "contrast" else 0]
    with pytest.raises(InputError, match=f"no {counter} 3; --select {counter} may be 0 to 2"):
        read_scan(path, ReadOptions(select={counter: 3}))


def test_averages_and_slices_are_chosen(kspace: np.ndarray, tmp_path: Path) -> None:
    made = records(0.5 * kspace, average=0) + records(1.5 * kspace, average=1)
    path = write(tmp_path / "s.h5", made)
    np.testing.assert_allclose(read_scan(path).kspace, kspace, rtol=1e-6)
    options = ReadOptions(select={"average": 1, "slice": 2})
    scan = read_scan(path, options)
    np.testing.assert_array_equal(scan.kspace, (1.5 * kspace)[2:])
    assert scan.affine is not None
    np.testing.assert_allclose(
        (scan.affine @ [0, H // 2, W // 2, 1])[:3] * [-1, -1, 1],
        np.array([10, 20, 30]) + 2 * STEP * NORMAL,
        atol=1e-4,
    )


def test_noise_lines_are_kept(kspace: np.ndarray, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((2, COILS, 50)) + 0j
    made = [record(noise[n], 0, 0, flags=NOISE) for n in range(2)] + records(kspace)
    scan = read_scan(write(tmp_path / "s.h5", made))
    np.testing.assert_allclose(scan.noise, np.concatenate(list(noise), axis=1), rtol=1e-6)
    np.testing.assert_array_equal(scan.kspace, kspace)
    made = [record(noise[0, :1], 0, 0, flags=NOISE), *records(kspace)]
    scan = read_scan(write(tmp_path / "t.h5", made))
    assert scan.noise is None
    assert "another number of coils" in scan.remarks[0]


def test_several_measurements_in_one_file(kspace: np.ndarray, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((COILS, 50)) + 0j
    path = tmp_path / "s.h5"
    write(path, [record(noise, 0, 0, flags=NOISE)], name="adjustment")
    write(path, records(kspace[:1]), name="localizer")
    write(path, records(2 * kspace), name="scan")
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.kspace, 2 * kspace)
    np.testing.assert_allclose(scan.noise, noise, rtol=1e-6)
    listed = "3 measurements in the file (1 adjustment, 2 localizer, 3 scan): number 3 is read"
    assert listed in scan.remarks[0]
    for wanted in ("2", "localizer"):
        other = read_scan(path, ReadOptions(measurement=wanted))
        np.testing.assert_array_equal(other.kspace, kspace[:1])
        np.testing.assert_allclose(other.noise, noise, rtol=1e-6)
    with pytest.raises(InputError, match="no measurement '4'; --measurement may be 1 to 3"):
        read_scan(path, ReadOptions(measurement="4"))


def test_a_wrong_centre_in_the_header(kspace: np.ndarray, tmp_path: Path) -> None:
    """Partial Fourier whose steps are counted from the first measured one."""
    made = [record(kspace[n, :, :, c], c - 6, n) for c in range(6, W) for n in range(SLICES)]
    expected = kspace * (np.arange(W) >= 6)
    scan = read_scan(write(tmp_path / "s.h5", made))
    np.testing.assert_array_equal(scan.kspace, expected)
    assert "column 4 of 20 and was moved" in scan.remarks[0]
    right = read_scan(write(tmp_path / "t.h5", made, header(center=4)))
    np.testing.assert_array_equal(right.kspace, expected)
    assert not right.remarks
    assert (right.encoding.phase_center, right.encoding.phase_limits) == (4, (0, 19))


@pytest.mark.parametrize("center", [0, 19])
def test_a_centre_that_leaves_lines_outside(
    center: int, kspace: np.ndarray, tmp_path: Path
) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace), header(center=center)))
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert f"the header's centre, phase-encoding step {center}" in scan.remarks[0]


def test_a_sample_in_the_middle_that_leaves_samples_outside(
    kspace: np.ndarray, tmp_path: Path
) -> None:
    scan = read_scan(write(tmp_path / "s.h5", records(kspace, center_sample=0)))
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert "the lines' centre, sample 0" in scan.remarks[0]


def test_three_dimensions(tmp_path: Path) -> None:
    images = head(7, COILS, H, W)
    values = np.fft.fftshift(np.fft.fft(images, axis=0), axes=0).astype(np.complex64)
    made = [
        record(values[p, :, :, c], c, 0, kspace_encode_step_2=p, position=[1.0, 2.0, 3.0])
        for p in range(7)
        for c in range(W)
    ]
    # 7 partitions, as a vendor's converter writes the number.
    scan = read_scan(write(tmp_path / "s.h5", made, header(z=6.9996)))
    np.testing.assert_array_equal(scan.kspace, values)
    assert scan.volume_encoding == "3D"
    assert scan.spacing == pytest.approx((3 / 7, 2.0, 3.0))
    assert scan.affine is not None
    centre = (scan.affine @ [3, H // 2, W // 2, 1])[:3] * [-1, -1, 1]
    np.testing.assert_allclose(centre, [1, 2, 3], atol=1e-5)
    for axis, direction in enumerate((NORMAL * 3 / 7, READ * 2, PHASE * 3)):
        np.testing.assert_allclose(scan.affine[:3, axis] * [-1, -1, 1], direction, atol=1e-5)


def test_slabs_of_a_3d_scan_are_chosen(tmp_path: Path) -> None:
    values = head(2, COILS, H, W)
    made = [
        record(values[p, :, :, c] * (slab + 1), c, slab, kspace_encode_step_2=p)
        for slab in range(2)
        for p in range(2)
        for c in range(W)
    ]
    path = write(tmp_path / "s.h5", made, header(z=2))
    with pytest.raises(InputError, match="--select slice=N, 0 to 1"):
        read_scan(path)
    scan = read_scan(path, ReadOptions(select={"slice": 1}))
    assert (scan.volume_encoding, scan.name) == ("3D", "s_slice1")
    assert error(scan.kspace, 2 * values) < 1e-12


def _backwards(line: np.ndarray) -> np.ndarray:
    """A line as it is read backwards, with a shift of the echo and a constant phase."""
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(line, axes=1), axis=1), axes=1)
    image = image * np.exp(1j * (0.05 * np.arange(H) - 0.4))
    shifted = np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1)
    return np.fft.fftshift(shifted, axes=1)[:, ::-1].astype(np.complex64)


def test_echo_planar_lines_get_one_phase(kspace: np.ndarray, tmp_path: Path) -> None:
    made = []
    for n in range(SLICES):
        middle = kspace[n, :, :, W // 2]
        made += [
            record(middle, W // 2, n, flags=PHASE_CORRECTION),
            record(_backwards(middle), W // 2, n, flags=PHASE_CORRECTION | REVERSED),
            record(middle, W // 2, n, flags=PHASE_CORRECTION),
        ]
        for column in range(W):
            line, odd = kspace[n, :, :, column], column % 2
            made.append(record(_backwards(line) if odd else line, column, n, flags=REVERSED * odd))
    scan = read_scan(write(tmp_path / "s.h5", made))
    assert error(scan.kspace, kspace) < 1e-6


STUDY = """<subjectInformation><patientName>Doe^Jo</patientName><patientID>7</patientID>
<patientBirthdate>1970-01-31</patientBirthdate><patientGender>F</patientGender></subjectInformation>
<studyInformation><studyDate>2020-02-03</studyDate><studyTime>04:05:06.789</studyTime>
<studyID>S1</studyID><studyInstanceUID>1.2.3</studyInstanceUID></studyInformation>
<measurementInformation><patientPosition>HFS</patientPosition><initialSeriesNumber>4
</initialSeriesNumber><protocolName>t1 \u00a0 brain</protocolName>
<frameOfReferenceUID>not.an.uid</frameOfReferenceUID></measurementInformation>
<acquisitionSystemInformation><systemVendor>V</systemVendor><systemFieldStrength_T>1.5
</systemFieldStrength_T></acquisitionSystemInformation><experimentalConditions>
<H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions>"""


def test_patient_and_study(kspace: np.ndarray, tmp_path: Path) -> None:
    study = read_scan(write(tmp_path / "s.h5", records(kspace), header(before=STUDY))).study
    assert (study.patient_name, study.patient_id, study.patient_sex) == ("Doe^Jo", "7", "F")
    assert (study.patient_birth_date, study.study_date) == ("19700131", "20200203")
    assert (study.study_time, study.study_id, study.study_uid) == ("040506", "S1", "1.2.3")
    assert (study.series_number, study.protocol, study.frame_uid) == (4, "t1 brain", None)
    assert (study.field_strength, study.resonance_frequency) == (1.5, 63.5)
    assert (study.manufacturer, study.patient_position) == ("V", "HFS")
    assert study.repetition_time is None


@pytest.mark.parametrize("vendor", ["SIEMENS", "Siemens Healthineers"])
def test_directions_of_siemens_are_not_claimed(
    vendor: str, kspace: np.ndarray, tmp_path: Path
) -> None:
    system = f"<acquisitionSystemInformation><systemVendor>{vendor}</systemVendor>"
    xml = header(before=f"{system}</acquisitionSystemInformation>")
    scan = read_scan(write(tmp_path / "s.h5", records(kspace), xml))
    assert scan.affine is None
    assert scan.spacing == pytest.approx((STEP, 2.0, 3.0))
    assert "orientation is unknown" in scan.remarks[-1]
