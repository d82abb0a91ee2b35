"""Scans that a reconstruction once took for what they are not: from the file to the image."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers.phantom import combined, error, fft2c, head, picture, sensitivities
from helpers.synthetic_ismrmrd import CALIBRATION, NOISE, header, record, records, write
from nirvana.errors import InputError
from nirvana.mri.classical.sigpy import sense
from nirvana.mri.data.scans import CoilOptions, Measurement, measure
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.compare import run_methods
from nirvana.mri.io import read_scan
from nirvana.mri.methods import Method, classical_method, fourier_method
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.pipeline import Preparation, load_full_scan, prepare

H, W, COILS = 40, 48, 4
FULL = head(2, COILS, H, W)
SETTINGS = Preparation(Simulation(), Sampling())


def image(measurement: Measurement, method: Method = fourier_method) -> np.ndarray:
    return run_methods(measurement, {"image": method})["image"].images


def fastmri(path: Path, kspace: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace
    return path


def xml(**changes: object) -> str:
    """The header of a scan of `FULL`'s size without oversampling."""
    return header(**{"x": H, "y": W, "fov": 80.0, "recon": 80.0, "center": W // 2, **changes})


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_one_missing_side_is_completed_and_no_truth(tmp_path: Path, axis: str) -> None:
    rows, columns = (np.arange(n) < round(0.7 * n) for n in (H, W))
    kept = columns if axis == "columns" else rows[:, None]
    path = fastmri(tmp_path / "scan.h5", FULL * kept)
    prepared = prepare(path, SETTINGS, 0)
    assert not prepared.measurement.acquisition.has_gaps
    assert prepared.target is None
    word = "partial Fourier" if axis == "columns" else "asymmetric echo"
    assert any(word in remark for remark in prepared.scan.remarks)
    truth = combined(FULL)
    assert error(image(prepared.measurement), truth) < 0.2 * error(combined(FULL * kept), truth)
    # Neither a wish for undersampling nor an evaluation takes it for the truth.
    request = Preparation(Simulation(), Sampling(), undersample=True)
    assert prepare(path, request, 0).drawn is None
    with pytest.raises(InputError, match=f"is no ground truth, .*{word}"):
        load_full_scan(path, SETTINGS, 0)


def test_measured_columns_are_kept_unless_undersampling_is_requested(tmp_path: Path) -> None:
    path = fastmri(tmp_path / "scan.h5", FULL)
    whole = prepare(path, SETTINGS, 0)
    assert (whole.sampled, whole.drawn) == (1, None)
    np.testing.assert_allclose(image(whole.measurement), combined(FULL), rtol=1e-3, atol=1e-4)
    request = prepare(path, Preparation(Simulation(), Sampling(), undersample=True), 0)
    assert request.sampled < 0.4
    assert request.measurement.acquisition.has_gaps
    assert request.target is not None


@pytest.mark.parametrize("gain", [1, 10])
def test_a_separate_reference_scan_calibrates_alone(tmp_path: Path, gain: int) -> None:
    """Its contrast and its scale are others."""
    inside = np.stack([picture(H, W, number) for number in range(2)])
    contrast = np.where(inside > 0, 1.3 - inside, 0)
    reference = gain * fft2c(contrast[:, None] * sensitivities(COILS, H, W))
    lines = records(FULL, range(0, W, 2))
    lines += records(reference, range(12, 36), flags=CALIBRATION)
    path = write(tmp_path / "scan.h5", lines, xml(mode="separate"))
    measurement = measure(read_scan(path))
    assert measurement.facts["separate_calibration"]
    found = image(measurement, classical_method(lambda each: sense(each, workers=1)))
    assert error(found, combined(FULL)) < 0.01


def test_a_wrong_centre_and_a_missing_side(tmp_path: Path) -> None:
    """The lines from a quarter on, counted from 0, with the middle of the matrix as centre."""
    first = W // 4
    lines = [
        record(FULL[number, :, :, column], column - first, number)
        for column in range(first, W)
        for number in range(2)
    ]
    measurement = measure(read_scan(write(tmp_path / "scan.h5", lines, xml())))
    assert measurement.facts["partial_fourier"] == [first, W]
    assert error(image(measurement), combined(FULL)) < 0.01


def test_noise_lines_whiten_one_bad_coil(tmp_path: Path) -> None:
    random = np.random.default_rng(3)

    def noise(*shape: int) -> np.ndarray:
        return 0.25 * (random.standard_normal(shape) + 1j * random.standard_normal(shape))

    deviations = np.array([0.01, 0.01, 1, 0.01])[:, None]
    lines = [record(deviations * noise(COILS, 80), 0, 0, flags=NOISE)]
    spoiled = FULL.copy()
    spoiled[:, 2] += noise(2, H, W)
    lines += records(spoiled, range(W))
    scan = read_scan(write(tmp_path / "scan.h5", lines, xml()))
    truth = combined(FULL)
    before = error(image(measure(scan, CoilOptions(whiten=False))), truth)
    measurement = measure(scan)
    assert measurement.facts["noise_whitened_by"] == "80 samples of noise"
    assert before > 0.2
    assert error(image(measurement), truth) < 0.1 * before
