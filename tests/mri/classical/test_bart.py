"""Reconstruction by BART's program: against ours where it is installed, its errors everywhere."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from nirvana.cli import mri
from nirvana.errors import InputError
from nirvana.mri.classical.bart import bart_pics
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.classical.peers import BartSettings, chosen_peers, peers_for
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_scan
from nirvana.mri.io.bart import read_cfl, write_cfl
from nirvana.mri.methods import classical_method
from nirvana.mri.physics.masks import sampling_mask

needs_bart = pytest.mark.skipif(shutil.which("bart") is None, reason="needs BART's program")
SETTINGS = Simulation(noise=(0.004, 0.004))


def scan_of(head_slices: np.ndarray, height: int, width: int):
    rows, columns = (head_slices.shape[-2] - height) // 2, (head_slices.shape[-1] - width) // 2
    part = head_slices[1:2, rows : rows + height, columns : columns + width]
    scan = simulate_scan(part, "head", 0, SETTINGS)
    return scan, sampling_mask("equispaced", width, 4, 0.08, seed=0).numpy()


def images(kspace_of, kspace: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The magnitude images of a method, `[slices, H, W]`."""
    by_slice = classical_method(kspace_of)(Acquisition(kspace, mask))
    return np.stack([image.magnitude for image in by_slice])


@needs_bart
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1), (2, 2), (3, 2)])
def test_bart_finds_what_ours_finds(head_slices: np.ndarray, norm, cut) -> None:
    """Sides that are even or odd, multiples of four or not, on the scale of the target."""
    height, width = (n - less for n, less in zip(head_slices.shape[1:], cut, strict=True))
    scan, mask = scan_of(head_slices, height, width)
    kspace = scan.kspace * mask
    found = images(lambda acquisition: bart_pics(acquisition, norm), kspace, mask)
    solve = l1_wavelet if norm == "l1" else sense
    ours = images(lambda acquisition: solve(acquisition, workers=1), kspace, mask)
    psnr = [score(scan.target, x)["psnr"] for x in (found, ours, zero_filled(kspace, mask))]
    assert psnr[0] > psnr[2] + 1.0, psnr
    assert psnr[0] > psnr[1] - 3.0, psnr


@needs_bart
def test_an_empty_slice_stays_empty_and_scale_does_not_matter(head_slices: np.ndarray) -> None:
    scan, mask = scan_of(head_slices, 96, 96)
    kspace = np.concatenate([scan.kspace * mask, 0 * scan.kspace])
    found = images(bart_pics, kspace, mask)
    assert not found[1].any()
    louder = images(bart_pics, 1e4 * kspace, mask)
    np.testing.assert_allclose(louder / 1e4, found, atol=1e-3 * found.max())


@needs_bart
def test_two_sets_of_maps_are_read(head_slices: np.ndarray) -> None:
    scan, mask = scan_of(head_slices, 96, 96)
    two = BartSettings(maps=2)
    found = images(lambda acquisition: bart_pics(acquisition, settings=two), scan.kspace, mask)
    empty = zero_filled(scan.kspace, mask)
    assert score(scan.target, found)["psnr"] > score(scan.target, empty)["psnr"] + 1.0


def test_the_settings_of_the_nearest_acceleration_are_taken() -> None:
    chosen = {peers.acceleration: peers for peers in chosen_peers()}
    assert peers_for(np.arange(64) % 5 == 0) is chosen[4.0]
    assert peers_for(np.arange(64) % 7 == 0) is chosen[8.0]
    assert chosen[8.0].bart("l1").norm == "l1"
    assert chosen[8.0].bart("l2").norm == "l2"


def test_files_are_those_that_the_reader_reads(tmp_path) -> None:
    random = np.random.default_rng(0)
    values = (random.normal(size=(3, 10, 12)) + 1j).astype(np.complex64)
    write_cfl(tmp_path / "scan.cfl", values)
    assert np.array_equal(read_cfl(tmp_path / "scan.cfl", (3, 10, 12)), values)
    assert np.array_equal(read_scan(tmp_path / "scan.cfl").kspace[0], values)


def test_without_the_program_there_is_one_clear_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    kspace, mask = np.ones((1, 2, 8, 8)), np.ones(8, bool)
    with pytest.raises(InputError, match="not on the PATH"):
        images(bart_pics, kspace, mask)
    with pytest.raises(InputError, match="not on the PATH"):
        mri.evaluate([Path("missing.npy")], bart=True)


def test_a_program_that_fails_ends_in_one_line(tmp_path, monkeypatch) -> None:
    script = tmp_path / "bart"
    script.write_text("#!/bin/sh\necho one >&2\necho 'Error: no memory' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    kspace, mask = np.ones((1, 2, 8, 8)), np.ones(8, bool)
    with pytest.raises(InputError, match="bart ecalib failed: Error: no memory"):
        images(bart_pics, kspace, mask)
    with pytest.raises(InputError, match="need at least 2"):
        images(bart_pics, kspace, np.arange(8) == 4)
