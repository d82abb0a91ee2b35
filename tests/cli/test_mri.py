"""The MRI commands, with a stand-in for the neural network, which its own tests cover."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from typer.testing import CliRunner, Result

from nirvana.cli import mri
from nirvana.errors import InputError
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.io import Scan, read_scan, write_scan
from nirvana.mri.methods import fourier_method
from nirvana.mri.model.codec import CodecImages
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import sampling_mask

DEFAULT_FILES = [
    "dicom",
    "metrics.json",
    "panel.png",
    "reconstruction.h5",
    "reconstruction.nii.gz",
]


class ZeroFilledModel:
    """Has the interface of a codec."""

    num_trained = 1_230_000

    def images(self, acquisition: Acquisition, batch_size: int = 4) -> Iterator[CodecImages]:
        acquisition.require_calibration()
        for image in fourier_method(acquisition):
            magnitude = torch.from_numpy(image.magnitude)[None]
            coils = torch.from_numpy(image.coils())[None]
            yield CodecImages(magnitude, torch.complex(magnitude, -magnitude), coils)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mri, "load_model", lambda codec, device: ZeroFilledModel())


@pytest.fixture(scope="module")
def volume() -> Path:
    return Path(data_path) / "example4d.nii.gz"


@pytest.fixture(scope="module")
def full_scan(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "head.h5"
    result = _run(
        "simulate", str(volume), "--out", str(path), "--simulated-coils", "4", "--noise", "0.004"
    )
    assert "24 slices of 96 x 128, 4 coils" in result.stdout
    scan = read_scan(path)
    assert scan.target is not None
    write_scan(path, replace(scan, kspace=scan.kspace[10:13], target=scan.target[10:13]))
    return path


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(mri.app, list(arguments), catch_exceptions=False)


def _undersampled(full_scan: Path, path: Path) -> Scan:
    scan = read_scan(full_scan)
    mask = sampling_mask("random", 128, 4, 0.08, seed=3).numpy()
    thinned = replace(scan, kspace=scan.kspace * mask, target=None)
    write_scan(path, thinned)
    return thinned


def test_a_full_scan_is_undersampled_reconstructed_and_scored(
    full_scan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    copy = tmp_path / "copy.json"
    arguments = ("--acceleration", "4", "--json", str(copy))
    result = _run("reconstruct", str(full_scan), "--out", str(out), *arguments)
    assert sorted(file.name for file in out.iterdir()) == DEFAULT_FILES
    report = json.loads((out / "metrics.json").read_text())
    assert report == json.loads(copy.read_text())
    mask = sampling_mask("equispaced", 128, 4, 0.08, seed=0)
    assert report["columns"] == mask.nonzero().flatten().tolist()
    assert report["mask"]["seed"] == 0
    rows = {row["method"]: row for row in report["results"]}
    assert list(rows) == ["zero-filled", "L1-wavelet", "Nirvana"]
    assert rows["L1-wavelet"]["psnr"] > rows["zero-filled"]["psnr"] + 2
    assert rows["Nirvana"]["psnr"] == rows["zero-filled"]["psnr"]
    with h5py.File(out / "reconstruction.h5") as file:
        kspace = read_scan(full_scan).kspace
        expected = rss(ifft2c(torch.from_numpy(kspace) * mask))
        np.testing.assert_allclose(file["reconstruction"], expected, rtol=1e-5)
    assert "24.2%" in result.stdout
    # The folder of an earlier reconstruction may be replaced.
    again = ("--acceleration", "4", "--no-wavelet", "--seed", "1")
    _run("reconstruct", str(full_scan), "--out", str(out), *again)
    assert json.loads((out / "metrics.json").read_text())["mask"]["seed"] == 1


def test_the_mask_of_an_undersampled_scan_is_found(full_scan: Path, tmp_path: Path) -> None:
    _undersampled(full_scan, tmp_path / "thin.h5")
    out, facts = tmp_path / "out", tmp_path / "facts.json"
    result = _run(
        *("reconstruct", str(tmp_path / "thin.h5"), "--out", str(out), "--json", str(facts)),
        "--no-wavelet",
    )
    assert sorted(file.name for file in out.iterdir()) == DEFAULT_FILES
    mask = sampling_mask("random", 128, 4, 0.08, seed=3)
    report = json.loads(facts.read_text())
    assert report["columns"] == mask.nonzero().flatten().tolist()
    assert report["mask"] is None
    assert "psnr" not in report["results"][0]
    assert "as measured" in result.stdout


def test_a_folder_of_scans_and_volumes_is_reconstructed(
    volume: Path, full_scan: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    _undersampled(full_scan, folder / "b_thin.h5")
    (folder / "a.nii.gz").write_bytes(volume.read_bytes())
    (folder / "notes.txt").write_text("not a scan")
    _run("reconstruct", str(folder), "--out", str(out), "--no-wavelet", "--seed", "5")
    assert sorted(file.name for file in out.iterdir()) == ["a", "b_thin", "metrics.json"]
    for name in ("a", "b_thin"):
        assert sorted(file.name for file in (out / name).iterdir()) == DEFAULT_FILES
    whole = json.loads((out / "metrics.json").read_text())
    alone = [json.loads((out / name / "metrics.json").read_text()) for name in ("a", "b_thin")]
    assert whole == {"scans": alone, "skipped": [], "summary": None}
    assert [one["mask"] and one["mask"]["seed"] for one in alone] == [5, None]
    # The volume's own place in space, through the simulator and out again.
    given = nibabel.as_closest_canonical(nibabel.load(volume))
    made = nibabel.load(out / "a" / "reconstruction.nii.gz")
    assert made.shape == given.shape[:3]
    np.testing.assert_allclose(made.affine, given.affine, atol=1e-4)
    assert len(list((out / "a" / "dicom").iterdir())) == given.shape[2]


def test_a_broken_scan_in_a_folder_is_refused_before_any_work(
    full_scan: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    _undersampled(full_scan, folder / "a.h5")
    (folder / "b.h5").symlink_to(folder / "b.h5")
    with pytest.raises(InputError, match="in a circle"):
        _run("reconstruct", str(folder), "--out", str(tmp_path / "out"))
    (folder / "b.h5").unlink()
    (folder / "b.h5").write_bytes((folder / "a.h5").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"b\.h5"):
        _run("reconstruct", str(folder), "--out", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [folder]


def test_evaluate_scores_scans_and_volumes(volume: Path, full_scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    arguments = ("--slices", "1", "--no-wavelet", "--mask", "random", "--json", str(out))
    result = _run("evaluate", str(volume), str(full_scan), *arguments)
    report = json.loads(out.read_text())
    assert [(row["volume"], row["method"], row["seed"]) for row in report["rows"]] == [
        ("example4d", "zero-filled", 0),
        ("example4d", "Nirvana", 0),
        (full_scan.stem, "zero-filled", 1),  # the file states the name of its volume
        (full_scan.stem, "Nirvana", 1),
    ]
    assert [row["coils"] for row in report["rows"]] == [8, 8, 4, 4]
    assert {row["slices"] for row in report["rows"]} == {1}
    assert report["mask"]["kind"] == "random"
    assert report["summary"][0]["volumes"] == 2
    assert "Nirvana" in result.stdout


def test_several_codecs_are_compared_with_the_first(volume: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    codecs = ("--codec", "runs/a", "--codec", "runs/b")
    arguments = ("--slices", "1", "--no-wavelet", "--sense", *codecs, "--json", str(out))
    result = _run("evaluate", str(volume), *arguments)
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["zero-filled", "SENSE", "a", "b"]
    assert [row["parameters"] for row in report["rows"]] == [None, None, 1_230_000, 1_230_000]
    assert report["rows"][1]["psnr"] > report["rows"][0]["psnr"] + 1
    assert "1.23 M" in result.stdout
    with pytest.raises(InputError, match="twice"):
        _run("evaluate", str(volume), "--codec", "a", "--codec", "a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reconstruct", "missing.h5", "--out", "OUT"), "no such file"),
        (("reconstruct", "VOLUME", "--out", "OUT", "--simulated-coils", "0"), "0 coils"),
        (("reconstruct", "VOLUME", "--out", "OUT", "--coils", "-1"), "--coils -1"),
        (("reconstruct", "FULL", "--out", "OUT", "--batch-size", "0"), "--batch-size"),
        (("reconstruct", "EMPTY", "--out", "OUT"), "holds no scan"),
        (("reconstruct", "FULL", "--out", "OUT", "--mask", "radial"), "radial"),
        (("reconstruct", "FULL", "--out", "OUT", "--acceleration", "0"), "1 or more"),
        (
            ("reconstruct", "VOLUME", "--out", "OUT", "--center-fraction", "0.01"),
            "at least 2",
        ),
        (("reconstruct", "FULL", "--out", "FULL"), "is the input"),
        (("simulate", "VOLUME", "--out", "OUT"), "ends in .h5"),
        (("simulate", "VOLUME", "--out", "OUT.h5", "--simulated-coils", "0"), "0 coils"),
        (("simulate", "VOLUME", "--out", "OUT.h5", "--noise", "-1"), "noise"),
        (("simulate", "FULL", "--out", "OUT.h5"), "no image volume"),
        (("evaluate", "VOLUME", "missing.npy", "--json", "OUT"), "no such file"),
        (("evaluate", "VOLUME", "THIN", "--json", "OUT"), "only a fully sampled"),
        (("evaluate", "VOLUME", "--slices", "-1"), "--slices"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(
    arguments: tuple[str, ...], words: str, volume: Path, full_scan: Path, tmp_path: Path
) -> None:
    thin = tmp_path / "thin.h5"
    _undersampled(full_scan, thin)
    (tmp_path / "empty").mkdir()
    places = {
        "FULL": str(full_scan),
        "VOLUME": str(volume),
        "THIN": str(thin),
        "EMPTY": str(tmp_path / "empty"),
        "OUT": str(tmp_path / "out"),
        "OUT.h5": str(tmp_path / "out.h5"),
    }
    with pytest.raises(InputError, match=words):
        _run(*(places.get(argument, argument) for argument in arguments))
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty", thin]


def test_a_folder_with_other_things_is_not_replaced(full_scan: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        _run("reconstruct", str(full_scan), "--out", str(tmp_path))
    assert (tmp_path / "thesis.txt").exists()


def test_train_hands_its_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from nirvana.mri.train import task
    from nirvana.packaged import config_file

    calls = []
    monkeypatch.setattr(task, "train", lambda *arguments: calls.append(arguments))
    _run("train", "codec", "--optim.lr", "1e-3", "--resume")
    assert calls == [(config_file("codec"), ["--optim.lr", "1e-3"], True, False)]
