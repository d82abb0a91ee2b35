"""`nirvana mri report` with a small codec that never learned: what it writes, what it refuses."""

import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from PIL import Image
from typer.testing import CliRunner, Result

from helpers.small_codec import small_backbone, small_config
from nirvana import InputError
from nirvana.cli import mri
from nirvana.model.backbone import load_backbone
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.reports.figure import report_panel
from nirvana.mri.reports.grammar import parse, write
from nirvana.mri.reports.reporter import DISCLAIMER, Reading, Reporter, save_reporter
from nirvana.mri.reports.scan_report import RESULT_FILES, UNKNOWN_ORIENTATION


def run(*arguments: object) -> Result:
    return run_mri("report", *arguments)


def run_mri(*arguments: object) -> Result:
    return CliRunner().invoke(mri.app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reporter that finds something everywhere."""
    folder = tmp_path_factory.mktemp("reporter")
    name = small_backbone(folder / "backbone")
    torch.manual_seed(3)
    model = CodecModel(small_config(name), load_backbone("nirvana", name)).eval()
    from transformers import AutoTokenizer

    save_reporter(Reporter(model, AutoTokenizer.from_pretrained(name), 0.0), folder / "codec")
    return folder / "codec"


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slices of the head that nibabel ships."""
    image = nibabel.as_closest_canonical(nibabel.load(Path(data_path) / "example4d.nii.gz"))
    part = image.slicer[:, :, 12:18, :1]
    path = tmp_path_factory.mktemp("volume") / "head.nii.gz"
    nibabel.save(part, path)
    return path


def test_a_volume_is_scanned_and_reported(codec: Path, volume: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(volume, "--codec", codec, "--out", out, "--simulated-coils", 2)
    assert sorted(file.name for file in out.iterdir()) == sorted(RESULT_FILES)
    described = json.loads((out / "report.json").read_text())
    assert described["note"] == DISCLAIMER
    assert described["orientation"] == "of the scan"
    assert described["mask"]["acceleration"] == 4
    text = (out / "report.txt").read_text().splitlines()
    assert text[-1] == DISCLAIMER
    assert DISCLAIMER in result.stdout
    assert [one["slice"] for one in described["slices"]] == [1, 2, 3, 4, 5, 6]
    assert described["slices_of_scan"] == 6
    for one, line in zip(described["slices"], text, strict=False):
        assert line == f"Slice {one['slice']}: {one['text']}"
        facts = parse(one["text"])
        assert one["facts"] == facts.to_dict()
        assert set(one["probability"]) == set(one["facts"])
        assert all(0 <= p <= 1 for p in one["probability"].values())
    shown = max(described["slices"], key=lambda one: one["probability_of_a_finding"])
    assert described["panel"]["slice"] == shown["slice"]
    # The folder of an earlier report may be replaced.
    run(volume, "--codec", codec, "--out", out, "--simulated-coils", 2, "--slice", 3)
    described = json.loads((out / "report.json").read_text())
    assert [one["slice"] for one in described["slices"]] == [3]


def test_slices_at_heights_that_were_learned_are_read(codec: Path, tmp_path: Path) -> None:
    x, y, z = (np.arange(-n, n + 1, 4.0) for n in (76, 92, 68))
    inside = (x[:, None, None] / 65) ** 2 + (y[:, None] / 80) ** 2 + (z / 60) ** 2 < 1
    brain = tmp_path / "brain.nii.gz"
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(inside.astype(np.float32), affine), brain)
    out = tmp_path / "out"
    read = {}
    for options in ((), ("--every",)):
        run(brain, "--codec", codec, "--out", out, "--image", "--stripped", *options)
        described = json.loads((out / "report.json").read_text())
        read[options] = [one["slice"] for one in described["slices"]]
        some = f"{len(read[options])} of {len(z)} slices were read."
        assert (some in (out / "report.txt").read_text()) == (options == ())
    assert read["--every",] == list(range(1, len(z) + 1))
    heights = z[np.array(read[()]) - 1]
    assert 60 - 0.45 * 160 - 4 <= heights.min() < heights.max() <= 60 - 0.12 * 160 + 4


def test_a_reconstruction_is_read_as_it_is(codec: Path, volume: Path, tmp_path: Path) -> None:
    run(volume, "--codec", codec, "--out", tmp_path / "out", "--image", "--slice", 2)
    described = json.loads((tmp_path / "out" / "report.json").read_text())
    assert described["mask"] is None
    assert described["sampled"] == 1


def test_no_side_is_named_where_the_orientation_is_unknown(
    codec: Path, volume: Path, tmp_path: Path
) -> None:
    scan = tmp_path / "scan.h5"
    run_mri("simulate", volume, "--out", scan, "--simulated-coils", 2)
    with h5py.File(scan, "r+") as file:
        del file.attrs["affine"]
    out = tmp_path / "out"
    result = run(scan, "--codec", codec, "--out", out, "--slice", 1)
    assert UNKNOWN_ORIENTATION in result.stdout
    assert UNKNOWN_ORIENTATION in (out / "report.txt").read_text()
    described = json.loads((out / "report.json").read_text())
    assert (described["orientation"], described["sides"]) == ("unknown", "unknown")
    (one,) = described["slices"]
    assert "left or right" in one["text"]
    assert one["facts"]["side"] is None
    run(scan, "--codec", codec, "--out", out, "--slice", 1, "--radiological")
    described = json.loads((out / "report.json").read_text())
    assert (described["orientation"], described["sides"]) == ("as given", "the patient's")
    assert described["slices"][0]["facts"]["side"] in ("left", "right")


@pytest.mark.parametrize("known", [True, False])
def test_the_picture_marks_sides_that_are_known(known: bool, tmp_path: Path) -> None:
    facts = parse("One hyperintense mass in the left or right frontal lobe, measuring 12 mm.")
    reading = Reading(facts, 0.9, {}, write(facts))
    path = tmp_path / "panel.png"
    report_panel(path, np.zeros((64, 48)), reading, None, "", sides_known=known)
    picture = np.asarray(Image.open(path).convert("L"))
    height, width = picture.shape
    # The slice is black; letters stand in the middle of its left border.
    border = picture[int(0.4 * height) : int(0.6 * height), : width // 20]
    assert (border.max() > 128) == known


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.nii",), "no such file"),
        (("VOLUME", "--slice", "7"), "1 to 6"),
        (("VOLUME", "--batch-size", "0"), "--batch-size"),
        (("VOLUME", "--every", "--slice", "2"), "--every reads all slices, --slice 2 one"),
        (("VOLUME", "--codec", "codec"), "no MRI reporter 'codec': give a folder, or reporter"),
        (("VOLUME", "--codec", "FOLDER"), "was not trained on reports"),
        (("VOLUME", "--codec", "nowhere"), "no MRI reporter"),
        (("ARRAY", "--image"), "size of its pixels"),
        (("VOLUME", "--mask", "radial"), "radial"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(
    arguments: tuple[str, ...], words: str, codec: Path, volume: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "array.npy", np.ones((2, 32, 32), np.float32))
    from nirvana.packaged import resolve

    folder = str(resolve("codec", "MRI codec"))
    places = {"VOLUME": str(volume), "FOLDER": folder, "ARRAY": str(tmp_path / "array.npy")}
    given = [places.get(argument, argument) for argument in arguments]
    if "--codec" not in given:
        given += ["--codec", str(codec)]
    with pytest.raises(InputError, match=words):
        run(*given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
