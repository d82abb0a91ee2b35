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
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_scan
from nirvana.mri.io.bart import read_cfl, write_cfl
from nirvana.mri.physics.masks import calibration_width, sampling_mask

needs_bart = pytest.mark.skipif(shutil.which("bart") is None, reason="needs BART's program")
SETTINGS = Simulation(noise=(0.004, 0.004))


def scan_of(head_slices: np.ndarray, height: int, width: int):
    rows, columns = (head_slices.shape[-2] - height) // 2, (head_slices.shape[-1] - width) // 2
    part = head_slices[1:2, rows : rows + height, columns : columns + width]
    scan = simulate_scan(part, "head", 0, SETTINGS)
    return scan, sampling_mask("equispaced", width, 4, 0.08, seed=0).numpy()


@needs_bart
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1), (2, 2), (3, 2)])
def test_bart_finds_what_ours_finds(head_slices: np.ndarray, norm, cut) -> None:
    """Sides that are even or odd, multiples of four or not, on the scale of the target."""
    height, width = (n - less for n, less in zip(head_slices.shape[1:], cut, strict=True))
    scan, mask = scan_of(head_slices, height, width)
    kspace, calibration = scan.kspace * mask, calibration_width(mask)
    found = bart_pics(kspace, mask, calibration, norm)
    solve = l1_wavelet if norm == "l1" else sense
    ours = solve(kspace, mask, calibration, workers=1)
    psnr = [score(scan.target, x)["psnr"] for x in (found, ours, zero_filled(kspace, mask))]
    assert psnr[0] > psnr[2] + 1.0, psnr
    assert psnr[0] > psnr[1] - 3.0, psnr


@needs_bart
def test_an_empty_slice_stays_empty_and_scale_does_not_matter(head_slices: np.ndarray) -> None:
    scan, mask = scan_of(head_slices, 96, 96)
    kspace = np.concatenate([scan.kspace * mask, 0 * scan.kspace])
    done: list[int] = []
    found = bart_pics(kspace, mask, calibration_width(mask), progress=done.append)
    assert done == [1, 1]
    assert not found[1].any()
    louder = bart_pics(1e4 * kspace, mask, calibration_width(mask))
    np.testing.assert_allclose(louder / 1e4, found, atol=1e-3 * found.max())


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
        bart_pics(kspace, mask, 8)
    with pytest.raises(InputError, match="not on the PATH"):
        mri.evaluate([Path("missing.npy")], bart=True)


def test_a_program_that_fails_is_told(tmp_path, monkeypatch) -> None:
    script = tmp_path / "bart"
    script.write_text("#!/bin/sh\necho one >&2\necho 'Error: no memory' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    kspace, mask = np.ones((1, 2, 8, 8)), np.ones(8, bool)
    with pytest.raises(InputError, match="bart ecalib failed: Error: no memory"):
        bart_pics(kspace, mask, 8)
    with pytest.raises(InputError, match="takes 2 or more"):
        bart_pics(kspace, mask, 1)
