"""Measurements: patterns, whitened and compressed coils, 3D scans, and what can be a target."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.classical.peers import SenseSettings
from nirvana.mri.classical.sigpy import sense
from nirvana.mri.data import encoding_3d, scans
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import (
    CoilOptions,
    is_full,
    measure,
    read_covariance,
    scan_pattern,
    target_of,
)
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.compare import run_methods
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import Scan
from nirvana.mri.methods import classical_method, fourier_method
from nirvana.mri.physics.coil_matrix import compression_matrix
from nirvana.mri.physics.masks import Sampling, sampling_mask

# Not the settings of the acceleration, whose lower threshold keeps singular vectors that rounding
# decides: what happens to the scan is tested, whatever the method.
METHODS = {
    "empty": fourier_method,
    "sense": classical_method(lambda acquisition: sense(acquisition, SenseSettings(), workers=1)),
}


@pytest.fixture(scope="module")
def scan(head_slices: np.ndarray) -> Scan:
    return simulate_scan(head_slices, "head", 0, Simulation(num_coils=4, noise=(0.004, 0.004)))


def noisy(coils: int, samples: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    shape = (coils, samples)
    return (random.standard_normal(shape) + 1j * random.standard_normal(shape)).astype(np.complex64)


def test_an_undersampled_scan_is_not_undersampled_again(scan: Scan) -> None:
    mask = sampling_mask("random", 128, 4, 0.08, seed=0).numpy()
    for partial in (replace(scan, kspace=scan.kspace * mask), replace(scan, mask=mask)):
        assert not is_full(partial)
        assert np.array_equal(scan_pattern(partial), mask)
        with pytest.raises(InputError, match="head is undersampled; only a fully sampled"):
            measure(partial).undersampled(Sampling(), 0)


def test_a_missing_side_is_no_ground_truth(scan: Scan) -> None:
    partial = replace(scan, kspace=scan.kspace * (np.arange(128) < 88), target=None)
    measurement = measure(partial)
    assert not is_full(partial)
    assert not measurement.acquisition.has_gaps
    assert measurement.facts["partial_fourier"] == [0, 88]
    assert "partial Fourier: columns 0 to 87 of 128" in measurement.remarks[0]
    with pytest.raises(InputError, match=r"is no ground truth, one side .*partial Fourier"):
        measurement.undersampled(Sampling(), 0)
    assert scan.target is not None
    completed = run_methods(measurement, {"image": fourier_method})["image"].images
    empty = zero_filled(partial.kspace, np.ones(128, bool))
    assert score(scan.target, completed)["psnr"] > score(scan.target, empty)["psnr"] + 5


def test_an_accelerated_scan_of_one_side_is_filled_and_completed(scan: Scan) -> None:
    columns = (np.arange(128) < 88) & (
        (np.arange(128) % 2 == 0) | (np.abs(np.arange(128) - 64) < 10)
    )
    measurement = measure(replace(scan, kspace=scan.kspace * columns, target=None))
    assert measurement.acquisition.extent is not None
    found = run_methods(measurement, METHODS)
    without = replace(measurement, acquisition=replace(measurement.acquisition, extent=None))
    before = run_methods(without, METHODS)
    assert scan.target is not None
    gain = [score(scan.target, each["sense"].images)["psnr"] for each in (found, before)]
    assert gain[0] > gain[1] + 2, gain


def test_padded_columns_do_not_count_as_sampled(scan: Scan) -> None:
    padding = np.abs(np.arange(128) - 64) < 54
    full = measure(replace(scan, kspace=scan.kspace * padding))
    assert full.is_full
    acquisition = full.undersampled(Sampling(), 0).acquisition
    assert not acquisition.pattern[~padding].any()
    assert not acquisition.slice(0)[..., ~padding].any()


def test_without_a_target_the_rss_is_taken(scan: Scan) -> None:
    np.testing.assert_allclose(target_of(replace(scan, target=None)), scan.target, atol=1e-6)


@pytest.mark.parametrize("source", ["lines", "file", "option"])
def test_noise_is_whitened_by_what_is_known_of_it(scan: Scan, source: str) -> None:
    """One coil with much noise spoils the image, unless its weight is small."""
    deviations = np.array([0.002, 0.002, 1.0, 0.002])[:, None]
    bad = scan.kspace + (deviations * noisy(4, 4 * 96 * 128, 0)).reshape(4, 4, 96, 128).swapaxes(
        0, 1
    )
    noise = deviations * noisy(4, 500, 1)
    covariance = noise @ noise.conj().T / 500
    given = {
        "lines": {"noise": noise.astype(np.complex64)},
        "file": {"noise_covariance": covariance},
        "option": {},
    }[source]
    spoiled = replace(scan, kspace=bad.astype(np.complex64), target=None, **given)
    options = CoilOptions(covariance=covariance if source == "option" else None)
    measurement = measure(spoiled, options)
    assert "the noisiest coil has" in measurement.remarks[0]
    assert measurement.facts["noise_whitened_by"]
    assert scan.target is not None
    errors = [
        score(scan.target, target_of(spoiled, each))["nmse"]
        for each in (measure(spoiled, CoilOptions(whiten=False)), measurement)
    ]
    assert errors[0] > 1
    # What the bad coil saw is gone, the noise is not there.
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.1


def test_too_few_samples_of_noise_are_not_used(scan: Scan) -> None:
    measurement = measure(replace(scan, noise=noisy(4, 10, 0)))
    assert measurement.whitening is None
    assert "10 samples of it are too few for 4 coils" in measurement.remarks[0]
    with pytest.raises(InputError, match="covariance is of 3 coils, the scan of 4"):
        measure(scan, CoilOptions(covariance=np.eye(3)))


def test_compression_to_all_coils_changes_no_image(scan: Scan) -> None:
    mask = sampling_mask("equispaced", 128, 3, 0.1, seed=0).numpy()
    thin = replace(scan, kspace=scan.kspace * mask)
    whole = measure(thin, CoilOptions(count=0))
    assert measure(thin).acquisition.coil_matrix is None
    acquisition = whole.acquisition
    matrix, _ = compression_matrix(acquisition.coil_gram, 4)
    turned = replace(whole, acquisition=replace(acquisition, coil_matrix=matrix))
    before, after = (run_methods(each, METHODS) for each in (whole, turned))
    for name in METHODS:
        expected = before[name].images
        difference = after[name].images - expected
        # Rounding decides single voxels at the border of the sensitivities.
        assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(expected), name
        assert np.abs(difference).max() < 4e-3 * expected.max(), name


def test_many_coils_are_compressed_and_few_on_request(
    head_slices: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "MAX_COILS", 16)
    settings = Simulation(num_coils=20, noise=(0.002, 0.002))
    scan = simulate_scan(head_slices[:1], "head", 0, settings)
    many, few = measure(scan), measure(scan, CoilOptions(count=6))
    assert (many.acquisition.num_coils, few.acquisition.num_coils) == (16, 6)
    assert many.facts["energy_kept"] > few.facts["energy_kept"] > 0.9
    assert "20 coils were compressed to 16" in many.remarks[0]
    # The target is that of all coils; and compression keeps nearly all of it.
    np.testing.assert_allclose(target_of(replace(scan, target=None), few), scan.target, atol=1e-4)
    image = run_methods(few, {"image": fourier_method})["image"].images
    assert score(scan.target, image)["psnr"] > 30  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--coils -1 must be 1 or more"):
        CoilOptions(count=-1)


def test_a_covariance_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "noise.npy"
    np.save(path, 2 * np.eye(3))
    np.testing.assert_array_equal(read_covariance(path), 2 * np.eye(3))
    for wrong, words in [
        (np.eye(3)[:2], r"is \(2, 3\); a finite matrix"),
        (np.array(["a"]), "no array of numbers"),
        (np.full((2, 2), np.nan), "finite"),
    ]:
        np.save(path, wrong)
        with pytest.raises(InputError, match=words):
            read_covariance(path)
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read"):
        read_covariance(path)


def partitions_of(slices: np.ndarray) -> np.ndarray:
    """K-space of a 3D scan `[partitions, coils, H, W]` of the slices' k-space."""
    shifted = np.fft.fft(np.fft.ifftshift(slices, axes=0), axis=0, norm="ortho")
    return np.fft.fftshift(shifted, axes=0).astype(np.complex64)


@pytest.fixture(scope="module")
def block(head_slices: np.ndarray) -> Scan:
    """A 2D scan of 12 slices."""
    part = np.repeat(head_slices, 3, axis=0)
    return simulate_scan(part, "block", 0, Simulation(num_coils=4, noise=(0.002, 0.002)))


def test_a_3d_scan_of_whole_partitions_is_that_of_its_slices(block: Scan) -> None:
    mask = sampling_mask("equispaced", 128, 3, 0.1, seed=0).numpy()
    thin = replace(block, kspace=block.kspace * mask, target=None)
    solid = replace(thin, kspace=partitions_of(thin.kspace), volume_encoding="3D")
    flat, deep = measure(thin), measure(solid)
    assert not deep.along_readout
    assert np.array_equal(deep.acquisition.pattern, mask)
    np.testing.assert_allclose(
        deep.acquisition.kspace, thin.kspace, atol=1e-5 * np.abs(thin.kspace).max()
    )
    expected = run_methods(flat, METHODS)
    for name, found in run_methods(deep, METHODS).items():
        np.testing.assert_allclose(found.images, expected[name].images, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_a_3d_scan_is_decoupled_along_its_readout(
    block: Scan, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the pattern is the same in all planes, they are separate 2D scans of points."""
    monkeypatch.setattr(encoding_3d, "IN_MEMORY", in_memory)
    solid = partitions_of(block.kspace)
    plane = np.random.default_rng(0).random((12, 128)) < 0.6
    plane[3:9, 56:72] = True
    measured = solid * plane[:, None, None]
    scan = replace(block, kspace=measured, target=None, volume_encoding="3D")
    measurement = measure(scan)
    acquisition = measurement.acquisition
    assert measurement.along_readout
    assert "not trained on such patterns" in measurement.remarks[-1]
    assert isinstance(acquisition.kspace, np.memmap) == (in_memory == 0)
    assert np.array_equal(acquisition.pattern, plane)
    assert acquisition.kspace.shape == (96, 4, 12, 128)
    found = run_methods(measurement, METHODS)
    assert found["empty"].images.shape == block.target.shape  # type: ignore[union-attr]
    # The same by the three-dimensional transform.
    images = np.fft.fftshift(
        np.fft.ifftn(np.fft.ifftshift(measured, axes=(0, 2, 3)), axes=(0, 2, 3), norm="ortho"),
        axes=(0, 2, 3),
    )
    np.testing.assert_allclose(
        found["empty"].images, np.linalg.norm(images, axis=1), rtol=1e-3, atol=1e-4
    )
    assert block.target is not None
    psnr = {name: score(block.target, each.images)["psnr"] for name, each in found.items()}
    assert psnr["sense"] > psnr["empty"] + 3, psnr


def test_what_a_3d_scan_lacks_along_readout_and_partitions_is_stated(block: Scan) -> None:
    solid = partitions_of(block.kspace)
    plane = np.random.default_rng(0).random((12, 128)) < 0.7
    plane[2:10, 56:72] = True
    late = solid * (np.arange(96) < 64)[:, None]
    scan = replace(block, kspace=late * plane[:, None, None], volume_encoding="3D", target=None)
    measurement = measure(scan)
    (remark,) = (each for each in measurement.remarks if "asymmetric echo" in each)
    assert "rows 0 to 63 of 96 were measured; the missing side was completed" in remark
    assert measurement.facts["asymmetric_echo"] == [0, 64]
    assert measurement.facts["partial_partitions"] is None
    part = solid * (np.arange(12) < 9)[:, None, None, None]
    measurement = measure(replace(block, kspace=part, volume_encoding="3D", target=None))
    assert not measurement.is_full
    assert measurement.facts["partial_partitions"] == [0, 9]
    assert measurement.facts["asymmetric_echo"] is None
    with pytest.raises(InputError, match="partial Fourier: partitions 0 to 8 of 12"):
        measurement.require_full("block")


def test_a_full_3d_scan_can_be_undersampled(block: Scan) -> None:
    full = replace(block, kspace=partitions_of(block.kspace), target=None, volume_encoding="3D")
    measurement = measure(full)
    assert measurement.is_full
    np.testing.assert_allclose(target_of(full, measurement), block.target, atol=1e-4)
    thin = measurement.undersampled(Sampling(), 3).acquisition
    assert np.array_equal(thin.pattern, Sampling().mask(128, 3).numpy())


def test_a_3d_readout_with_holes_is_refused(block: Scan) -> None:
    points = np.random.default_rng(0).random((96, 128)) < 0.5
    scan = replace(block, kspace=partitions_of(block.kspace) * points, volume_encoding="3D")
    with pytest.raises(InputError, match="block: a 3D scan whose readouts have holes"):
        measure(scan)


def test_a_separate_calibration_follows_the_encoding(block: Scan) -> None:
    """A small 3D reference scan calibrates a 3D scan without a sampled middle."""
    solid = partitions_of(block.kspace)
    columns = np.arange(128) % 2 == 1
    middle = solid[3:9, :, 36:60, 52:76]
    scan = replace(
        block, kspace=solid * columns, target=None, volume_encoding="3D", calibration=middle
    )
    measurement = measure(scan)
    assert "separate reference scan alone" in measurement.remarks[-1]
    found = run_methods(measurement, METHODS)
    assert block.target is not None
    psnr = {name: score(block.target, each.images)["psnr"] for name, each in found.items()}
    assert psnr["sense"] > psnr["empty"] + 5, psnr


def test_a_memory_map_is_read_slice_by_slice(scan: Scan, tmp_path: Path) -> None:
    path = tmp_path / "kspace.npy"
    np.save(path, scan.kspace)
    mapped = np.load(path, mmap_mode="r")
    acquisition = Acquisition(mapped, np.ones(128, bool))
    found = run_methods(measure(replace(scan, kspace=mapped)), {"image": fourier_method})
    np.testing.assert_allclose(found["image"].images, scan.target, atol=1e-5)
    assert acquisition.scale == pytest.approx(float(scan.target.max()), rel=1e-5)  # type: ignore[union-attr]
    assert torch.from_numpy(acquisition.slice(0)).dtype == torch.complex64
