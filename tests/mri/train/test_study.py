"""The study's programs at a size that takes seconds: a method, its repetition, the results page."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.io import savemat

from experiments.common.results import read_rows
from experiments.mri import measured, measured_page, page, prepare, short_page
from experiments.mri.methods import MEASURED, MEASURED_RECIPE, tiny
from nirvana.config import load_config
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import REALISTIC, Simulation
from nirvana.mri.model.checkpoint import load_codec, save_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.train.config import MriConfig
from nirvana.packaged import config_file
from nirvana.statistics import signed_rank_test


@pytest.fixture
def archive(tmp_path: Path, head_slices: np.ndarray) -> Path:
    eight_bits = np.round(head_slices[:2, 8:88:2, 4:124:2] * 255).astype(np.uint8)
    kspace = np.random.default_rng(0).normal(size=(1, 1, 32, 40)).astype(np.complex64)
    arrays = {"train/a_T1": eight_bits, "test/b_T1": eight_bits, "kspace/head": kspace}
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls a program of the study in this process; returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        capsys.readouterr()
        importlib.import_module(f"experiments.mri.{name}").main([*map(str, arguments)])
        return capsys.readouterr().out

    return call


def test_methods_are_run_once_and_shown(archive: Path, run: Callable[..., str], tmp_path: Path):
    places = ("--data", archive, "--out", tmp_path / "runs", "--device", "cpu", "--tiny")
    run("study", "--method", "zero-filled", *places)
    shown = run("study", "--method", "none", "--steps", 2, *places)
    assert "zero-filled" in shown
    results = tmp_path / "runs" / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["zero-filled", "none"]
    own = load_file(tmp_path / "runs" / "codec-none-0" / "model.safetensors")
    assert sum(x.size for x in own.values()) == lines[1]["parameters"]["trained"]
    assert {x.dtype for x in own.values()} == {np.dtype(np.float16)}
    rows = lines[1]["volumes"]
    assert {row["group"] for row in rows} == {"unseen people", "inverted contrast", "measured head"}
    # One volume and one measured scan under four masks each, and the inverted volume under one.
    assert len(rows) == 4 + 4 + 1
    assert "already done" in run("study", "--method", "none", *places)
    assert len(results.read_text().splitlines()) == 2
    out = tmp_path / "RESULTS.md"
    run("page", "--results", results, "--out", out)
    text = out.read_text()
    psnr = np.mean([r["psnr"] for r in rows if r["group"] == "inverted contrast"])
    assert f"| none | {psnr:.2f} |" in text
    assert f"| none | 0 | {lines[1]['parameters']['trained']:,} | 0 | 2 |" in text


def test_the_data_are_packed(
    run: Callable[..., str], tmp_path: Path, head_slices: np.ndarray
) -> None:
    """From files as their sources give them to the one file of the study."""
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        real, imaginary = random.standard_normal((2, *shape))
        return (real + 1j * imaginary).astype(np.complex64)

    for part in ("train", "valid", "test", "kspace", "coils"):
        (tmp_path / part).mkdir()
    image = nibabel.nifti1.Nifti1Image(head_slices.transpose(2, 1, 0), np.diag([1, 1, 4, 1]))
    for part in ("train", "valid", "test"):
        nibabel.save(image, tmp_path / part / f"{part}_T1.nii.gz")
    savemat(tmp_path / "kspace" / "larson_se_t1_sag_data.mat", {"data": noise(32, 24)})
    knee = {"kdata": noise(24, 64)}
    savemat(tmp_path / "kspace" / "larson_coronal_fatsat_2D_knee.mat", knee)
    savemat(tmp_path / "coils" / "mriphysics_alignedSENSE_xGT.mat", {"S": noise(20, 16, 1, 3)})
    np.save(tmp_path / "coils" / "pdawood_iterativeRaki_preScanRefData.npy", noise(4, 40, 32))
    run("prepare", tmp_path, "--out", tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as archive:
        packed = {name: (archive[name].dtype, archive[name].shape) for name in archive.files}
    number, side = np.dtype(np.complex64), prepare.COIL_GRID
    assert packed["kspace/head_sagittal"] == (number, (1, 1, 32, 24))
    assert packed["kspace/knee_coronal"] == (number, (1, 1, 32, 24))  # without oversampling
    assert packed["coils/aligned_sense"] == (number, (3, side, side))
    assert packed["coils/iterative_raki"] == (number, (4, side, side))
    volumes = ("train/train_T1_axial", "valid/valid_T1", "test/test_T1")
    assert all(packed[name][0] == np.uint8 and len(packed[name][1]) == 3 for name in volumes)


ROWS = read_rows(page.HERE / "results.jsonl")


def test_a_person_counts_once_however_many_volumes():
    scores = page.Scores(ROWS, "unseen people", "equispaced 4x", "psnr")
    people = scores.by_person("nirvana")
    assert set(people) == {"ecog", "ms_l20", "ms_x19", "seg3d", "stroke"}
    runs = [row["volumes"] for row in ROWS if row["method"] == "nirvana"]
    own = [
        scan["psnr"]
        for volumes in runs
        for scan in volumes
        if (scan["group"], scan["mask"]) == ("unseen people", "equispaced 4x")
        and scan["volume"].startswith("stroke_")
    ]
    assert len(own) == 9
    assert people["stroke"] == pytest.approx(np.mean(own))
    assert np.mean([*scores.by_run("nirvana").values()]) == pytest.approx(
        np.mean([*people.values()])
    )


def test_no_test_of_five_people_is_below_what_they_can_give():
    text = page.page(ROWS)
    people = page.gains(ROWS, page.OTHERS, over_runs=False)
    assert all((gain.corrected >= gain.p) for gain in people)
    for gain in people:
        p = signed_rank_test(gain.by_person)
        assert p is None or p >= 2 ** (1 - len(gain.by_person))
    assert "(p 0.002" not in text
    # Two measured slices are single figures.
    (line,) = (line for line in text.splitlines() if line.startswith("| bart-l1-wavelet | +0.09"))
    assert "(" not in line


def test_the_committed_rows_give_the_committed_page():
    assert (page.HERE / "RESULTS.md").read_text(encoding="utf-8") == page.page(ROWS)


def test_the_committed_measured_rows_give_their_page():
    folder = measured_page.HERE
    page_text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    assert page_text == measured_page.page(folder).rstrip("\n") + "\n"


def test_the_committed_short_trainings_give_their_page():
    rows = read_rows(short_page.HERE / "short-trainings.jsonl.xz")
    page_text = (short_page.HERE / "SHORT.md").read_text(encoding="utf-8")
    assert page_text == short_page.page(rows).rstrip("\n") + "\n"


def test_methods_are_scored_on_measured_scans(
    run: Callable[..., str], tmp_path: Path, head_slices: np.ndarray
):
    """A codec's folder and a classical method, in both directions; discs come back from all."""
    scan = simulate_scan(head_slices[1:2, 8:72, 8:72], "head", 1, Simulation(noise=(1e-3, 1e-3)))
    np.savez(tmp_path / "scans.npz", head=np.asarray(scan.kspace))
    save_codec(CodecModel(tiny(MEASURED["codec"]), None), tmp_path / "codec")
    places = ("--scans", tmp_path / "scans.npz", "--device", "cpu", "--results")
    rows = tmp_path / "measured.jsonl"
    run("measured", "--method", "codec", "--codec", tmp_path / "codec", *places, rows)
    run("measured", "--method", "zero-filled", *places, rows)
    scores = read_rows(rows)
    assert len(scores) == 2 * 2 * 4 * 3  # methods, directions, samplings, seeds

    def mean(method: str) -> float:
        chosen = (r for r in scores if r["method"] == method and r["mask"] == "equispaced 4x")
        return float(np.mean([row["psnr"] for row in chosen]))

    assert mean("codec") > mean("zero-filled")
    run("measured", "--method", "zero-filled", "--points", *places, rows)
    points = read_rows(rows)[len(scores) :]
    assert {row["mask"] for row in points} == set(measured.POINTS)
    assert len(points) == 4 * 3  # samplings, seeds; one direction
    discs = tmp_path / "phantom.jsonl"
    run("phantom", "--method", "codec", "--codec", tmp_path / "codec", *places, discs)
    found = read_rows(discs)
    assert len(found) == 2 * 4
    assert all(0 < row["recovered"] < 1.1 for row in found)
    out = tmp_path / "MEASURED.md"
    run("measured_page", "--folder", tmp_path, "--out", out)
    assert "| codec |" in out.read_text()
    after = out.read_text().partition("Masks of points")[2]
    lattice = [row["psnr"] for row in points if row["mask"] == "lattice points 4x"]
    assert f"| zero-filled | {np.mean(lattice):.2f} (" in after


def test_the_packaged_training_is_that_of_the_packaged_codec():
    config = load_config(MriConfig, config_file("codec"))
    assert config.simulation == REALISTIC
    assert config.codec == load_codec("codec").config == MEASURED["codec"]
    assert config.stage == MEASURED_RECIPE.stage
    assert tuple(config.data.sizes) == MEASURED_RECIPE.sizes
