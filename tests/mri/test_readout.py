"""An asymmetric echo of a 3D scan that is undersampled along both phase encodings: completed from
the images of all planes, against the truth, and against the same of a 2D scan."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.mri.methods import MEASURED, tiny
from helpers.phantom import fft2c, head, picture, sensitivities
from helpers.synthetic_ismrmrd import header, record, write
from nirvana.errors import InputError
from nirvana.mri import reconstruct
from nirvana.mri.classical.peers import SenseSettings
from nirvana.mri.classical.sigpy import sense
from nirvana.mri.data import encoding_3d
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import Measurement, is_full, measure
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.compare import run_methods
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import Scan
from nirvana.mri.io.options import SliceRange
from nirvana.mri.methods import (
    Method,
    SliceImage,
    classical_method,
    codec_method,
    fourier_method,
)
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.physics.pattern import Extent
from nirvana.mri.pipeline import Preparation, prepare
from nirvana.mri.readout import complete_readout

SLICES, COILS, H, W = 12, 4, 64, 48
ROWS = 40  # of the readout, that were measured
EARLY = np.arange(H) < ROWS


def along_slices(kspace: np.ndarray) -> np.ndarray:
    """K-space of a 3D scan `[partitions, coils, H, W]` of that of its slices."""
    shifted = np.fft.fft(np.fft.ifftshift(kspace, axes=0), axis=0, norm="ortho")
    return np.fft.fftshift(shifted, axes=0).astype(np.complex64)


def volume_kspace(images: np.ndarray) -> np.ndarray:
    """The centred, orthonormal transform of coil images `[slices, coils, H, W]` along all axes."""
    return along_slices(fft2c(images))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Coil images of an object whose phase has a ramp, a bend and a bump of more than a radian."""
    slices = np.stack([picture(H, W, number % 4) for number in range(SLICES)])
    slices *= 1 - 0.05 * np.abs(np.arange(SLICES) - SLICES // 2)[:, None, None]
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (SLICES, H, W)), indexing="ij")
    phase = 2 * y - 1.5 * y * x + z + 1.4 * np.exp(-8 * ((y - 0.3) ** 2 + (x + 0.2) ** 2))
    return (slices * np.exp(1j * phase))[:, None] * sensitivities(COILS, H, W)


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Bool `[partitions, W]`: half of both phase encodings, and their middle."""
    points = np.random.default_rng(0).random((SLICES, W)) < 0.5
    points[3:9, 16:32] = True
    return points


@pytest.fixture(scope="module")
def full(images: np.ndarray, points: np.ndarray) -> Scan:
    """The undersampled scan whose echo is full, with a little noise."""
    generator = np.random.default_rng(1)
    real, imaginary = generator.standard_normal((2, *images.shape))
    kspace = volume_kspace(images) + 0.002 * (real + 1j * imaginary)
    measured = (kspace * points[:, None, None]).astype(np.complex64)
    return Scan(measured, None, None, "block", volume_encoding="3D")


@pytest.fixture(scope="module")
def late(full: Scan) -> Scan:
    return replace(full, kspace=full.kspace * EARLY[:, None])


def slow_sense() -> Method:
    # Settings that do not depend on the acceleration: the completion is tested, not the method.
    return classical_method(lambda acquisition: sense(acquisition, SenseSettings(), workers=1))


def zeros(measurement: Measurement) -> Measurement:
    """The same scan without the completion of its echo."""
    return replace(measurement, readout=None)


@pytest.mark.parametrize("missing", ["late", "early", "late, and columns", "late, and partitions"])
def test_the_echo_is_completed(
    full: Scan, images: np.ndarray, points: np.ndarray, missing: str
) -> None:
    rows = EARLY[::-1] if missing == "early" else EARLY
    kept = points.copy()
    if "columns" in missing:
        kept[:, :14] = False
    if "partitions" in missing:
        kept[:3] = False
    kspace = full.kspace * kept[:, None, None]
    symmetric = measure(replace(full, kspace=kspace))
    measurement = measure(replace(full, kspace=kspace * rows[:, None]))
    assert symmetric.readout is None
    assert measurement.readout is not None
    truth = np.linalg.norm(images, axis=1)
    methods = {"sense": slow_sense(), "zero-filled": fourier_method}
    whole, completed, empty = (
        run_methods(each, methods) for each in (symmetric, measurement, zeros(measurement))
    )

    def error(found: np.ndarray, expected: np.ndarray) -> float:
        return score(expected, found)["nmse"]

    found, left = completed["sense"].images, empty["sense"].images
    assert found.shape == truth.shape
    assert error(found, truth) < 0.7 * error(left, truth)
    # Most of what the echo lacks comes back, whatever the method leaves of the gaps.
    for name in methods:
        expected = whole[name].images
        share = error(completed[name].images, expected) / error(empty[name].images, expected)
        assert share < 0.4, (name, share)


def test_the_phase_is_completed_too(late: Scan, images: np.ndarray) -> None:
    """The complex image has the object's phase plus that of one combination of the coils."""
    measurement = measure(late)
    found, left = (
        run_methods(each, {"sense": slow_sense()}, combined="sense")["sense"].combined
        for each in (measurement, zeros(measurement))
    )
    assert found is not None
    assert left is not None
    assert found.shape == (SLICES, H, W)
    # A real combination of sensitivities varies slowly; the object's own phase is bent.
    magnitude = np.linalg.norm(images, axis=1)
    object_phase = images[:, 0] / sensitivities(COILS, H, W)[0]
    inside = magnitude > 0.3 * magnitude.max()

    def roughness(image: np.ndarray) -> float:
        """Of the phase that is left when the object's is taken off, along the readout."""
        rest = image * object_phase.conj()
        step = (rest[:, 1:] * rest[:, :-1].conj())[inside[:, 1:] & inside[:, :-1]]
        return float(np.std(np.angle(step)))

    assert roughness(found) < 0.8 * roughness(left)


def test_without_gaps_it_is_the_completion_of_a_2d_scan(images: np.ndarray) -> None:
    """Planes that lack nothing, and slices that lack nothing but their echo, are one scan."""
    slices = fft2c(images).astype(np.complex64) * EARLY[:, None]
    flat = measure(Scan(slices, None, None, "slices"))
    assert flat.acquisition.extent == Extent((0, ROWS), (0, W), H, W, True, False)
    planes, along_readout = _planes(along_slices(slices))
    solid = Measurement(planes, along_readout, readout=flat.acquisition.extent)
    expected, found = (
        run_methods(each, {"image": fourier_method}, combined="image")["image"]
        for each in (flat, solid)
    )
    brightest = expected.images.max()
    np.testing.assert_allclose(found.images, expected.images, atol=1e-4 * brightest)
    assert expected.combined is not None
    assert found.combined is not None
    np.testing.assert_allclose(found.combined, expected.combined, atol=1e-3 * brightest)


def _planes(kspace: np.ndarray) -> tuple[Acquisition, bool]:
    """The planes across the readout of a 3D scan without gaps."""
    shifted = np.fft.ifft(np.fft.ifftshift(kspace, axes=2), axis=2, norm="ortho")
    planes = np.fft.fftshift(shifted, axes=2).transpose(2, 1, 0, 3)
    return Acquisition(planes.astype(np.complex64), np.ones((SLICES, W), bool)), True


def test_measured_samples_are_kept(late: Scan, points: np.ndarray) -> None:
    measurement = measure(late)
    readout = measurement.readout
    assert readout is not None
    acquisition = measurement.acquisition
    slices = complete_readout(slow_sense()(acquisition), acquisition, readout)
    coils = np.stack([each.coils() for each in slices])
    found = volume_kspace(coils).transpose(1, 2, 0, 3)[:, EARLY][:, :, points]
    expected = np.asarray(late.kspace).transpose(1, 2, 0, 3)[:, EARLY][:, :, points]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_full_echo_is_untouched(full: Scan) -> None:
    """To the bit: the images are those of the planes."""
    measurement = measure(full)
    assert measurement.missing_sides == ()
    assert measurement.facts["asymmetric_echo"] is None
    found = run_methods(measurement, {"sense": slow_sense()}, combined="sense")["sense"]
    planes = list(slow_sense()(measurement.acquisition))
    assert np.array_equal(found.images, np.stack([each.magnitude for each in planes], axis=1))
    assert found.combined is not None
    assert np.array_equal(found.combined, np.stack([each.combined() for each in planes], axis=1))


def test_a_large_scan_is_completed_from_a_file(late: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images to the bit, and one plane in memory at a time."""
    measurement = measure(late)
    expected = run_methods(measurement, {"image": fourier_method})["image"].images
    monkeypatch.setattr(encoding_3d, "IN_MEMORY", 0)
    assert isinstance(encoding_3d.scratch_array((2, 3)), np.memmap)
    alive = 0

    class Image:
        def __init__(self, image: SliceImage) -> None:
            nonlocal alive
            alive += 1
            self.coils = image.coils

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def planes() -> Iterator[SliceImage]:
        for image in fourier_method(measurement.acquisition):
            assert alive <= 1
            yield Image(image)  # type: ignore[misc]  # all that is used of it

    readout = measurement.readout
    assert readout is not None
    slices = complete_readout(planes(), measurement.acquisition, readout)
    found = np.stack([each.magnitude for each in slices])
    assert np.array_equal(found, expected)


def test_the_echo_of_a_codec_is_completed(late: Scan, images: np.ndarray) -> None:
    """The coil images that it gives out are those of its magnitude."""
    method = codec_method(CodecModel(tiny(MEASURED["codec"]), None).eval(), batch_size=5)
    measurement = measure(late)
    for image in method(measurement.acquisition):
        np.testing.assert_allclose(
            np.linalg.norm(image.coils(), axis=0), image.magnitude, rtol=1e-4, atol=1e-5
        )
    truth = np.linalg.norm(images, axis=1)
    found, left = (
        run_methods(each, {"codec": method})["codec"].images
        for each in (measurement, zeros(measurement))
    )
    assert score(truth, found)["nmse"] < 0.8 * score(truth, left)["nmse"]


def test_it_is_reported_and_no_ground_truth(tmp_path: Path, full: Scan, points: np.ndarray) -> None:
    lines = [
        record(full.kspace[p, :, :ROWS, c], c, 0, kspace_encode_step_2=p, center_sample=H // 2)
        for p, c in np.argwhere(points)
    ]
    xml = header(x=H, y=W, z=SLICES, fov=2.0 * H, recon=2.0 * H, center=W // 2)
    path = write(tmp_path / "scan.h5", lines, xml)
    prepared = prepare(path, Preparation(Simulation(), Sampling()), 0)
    measurement = prepared.measurement
    (remark,) = (each for each in prepared.scan.remarks if "asymmetric echo" in each)
    assert remark == (
        f"asymmetric echo: rows 0 to {ROWS - 1} of {H} were measured; the missing side was "
        "completed by conjugate symmetry"
    )
    assert measurement.facts["asymmetric_echo"] == [0, ROWS]
    assert measurement.missing_sides == (remark,)
    assert not measurement.is_full
    assert not is_full(prepared.scan)
    # A target in the file is the image of an incomplete scan.
    assert prepared.target is None
    done: list[int] = []
    image = reconstruct(prepared.scan, method="zero-filled", progress=done.append)
    assert image.shape == (SLICES, H, W)
    assert sum(done) == H  # planes


def test_a_part_of_a_3d_scan_is_refused(tmp_path: Path) -> None:
    """What completes one slice is in all planes, and these are in all partitions."""
    kspace = head(4, COILS, 40, 48)
    lines = [
        record(kspace[p, :, :, c], c, 0, kspace_encode_step_2=p)
        for p in range(4)
        for c in range(48)
    ]
    path = write(tmp_path / "scan.h5", lines, header(x=40, y=48, z=4, fov=80.0, recon=80.0))
    how = Preparation(Simulation(), Sampling(), slices=SliceRange(middle=2))
    with pytest.raises(InputError, match="is a 3D scan, which is reconstructed as a whole: no"):
        prepare(path, how, 0)
