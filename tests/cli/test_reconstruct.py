"""Folders of scans by `nirvana mri reconstruct`: killed and resumed, shared, with bad files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from typer.testing import CliRunner, Result

from helpers.small_codec import small_config
from nirvana.cli import mri
from nirvana.errors import InputError
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import Scan, read_scan, write_scan
from nirvana.mri.model.checkpoint import save_codec
from nirvana.mri.model.codec import CodecModel

NAMES = [f"scan{number}" for number in range(6)]
PROGRAM = [sys.executable, "-m", "nirvana"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "nirvana"),
]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec") / "small"
    save_codec(CodecModel(small_config("none"), None).eval(), folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fully sampled scans, each of its own image."""
    folder = tmp_path_factory.mktemp("scans")
    for number, name in enumerate(NAMES):
        image = np.random.default_rng(number).random((4, 40, 48), dtype=np.float32)
        scan = simulate_scan(image, name, number, Simulation(num_coils=2), (5.0, 2.0, 2.0))
        write_scan(folder / f"{name}.h5", scan)
    return folder


@pytest.fixture(scope="module")
def alone(scans: Path, codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert _run(*_arguments(scans, out, codec)).exit_code == 0
    return out


def _arguments(scans: Path, out: Path, codec: Path, *more: str) -> list[str]:
    words = ["--out", str(out), "--codec", str(codec), "--device", "cpu", "--no-wavelet"]
    words += ["--acceleration", "4"]
    if "--formats" not in more:
        words += ["--formats", "hdf5,nifti,dicom"]  # the picture takes a second
    return ["reconstruct", str(scans), *words, "--seed", "3", *more]


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(mri.app, list(arguments), catch_exceptions=False)


def _contents(folder: Path) -> dict[str, Any]:
    """All results, without dates and times."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".h5":
            with h5py.File(file) as data:
                found[name] = {key: data[key][()].tolist() for key in data}
        elif file.name.endswith(".nii.gz"):
            found[name] = np.asarray(nibabel.load(file).dataobj).tolist()
        elif file.suffix == ".dcm":
            image = pydicom.dcmread(file)
            for keyword in ("Series", "Content", "InstanceCreation"):
                del image[f"{keyword}Date"], image[f"{keyword}Time"]
            found[name] = image.to_json()
        elif file.suffix == ".json":
            found[name] = json.loads(file.read_text(), object_hook=_without_time)
    return found


def _without_time(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "seconds_per_slice"}


def test_a_killed_run_is_resumed(scans: Path, codec: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*PROGRAM, "mri", *_arguments(scans, out, codec, "--resume")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(list(out.glob("scan*"))) < 2:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    done = sorted(file.name for file in out.glob("scan*"))
    assert 2 <= len(done) < len(NAMES)
    assert not (out / "metrics.json").exists()
    written = {name: (out / name / "metrics.json").stat().st_mtime_ns for name in done}
    result = _run(*_arguments(scans, out, codec, "--resume"))
    assert f"{len(done)} of these were finished before" in result.stdout
    for name, when in written.items():
        assert (out / name / "metrics.json").stat().st_mtime_ns == when
    assert _contents(out) == _contents(alone)


def test_processes_share_a_folder(scans: Path, codec: Path, alone: Path, tmp_path: Path) -> None:
    """Under torchrun; and one file that cannot be read ends no process."""
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    for file in scans.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "scan7.h5").write_text("no scan")
    arguments = _arguments(folder, out, codec, "--skip")
    done = subprocess.run([*TORCHRUN, "mri", *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert "left out" in done.stderr
    assert "scan7.h5" in done.stderr
    found = _contents(out)
    whole = found.pop("metrics.json")
    assert [each["scan"] for each in whole["skipped"]] == [str(folder / "scan7.h5")]
    del found["scan7.skipped.json"]
    for name, expected in _contents(alone).items():
        if name != "metrics.json" and not name.endswith("/metrics.json"):
            assert found[name] == expected, name
    assert done.stdout.count("zero-filled") == len(NAMES)  # one table


def test_a_slurm_array_shares_a_folder(
    scans: Path, codec: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for task in (4, 1, 3, 2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        before = set(out.glob("scan*"))
        result = _run(*_arguments(scans, out, codec))
        assert (task == 2) == (out / "metrics.json").exists()
        assert ("left to other processes" in result.stdout) == (task != 2)
        added = {file.name for file in set(out.glob("scan*")) - before}
        assert added == {name for number, name in enumerate(NAMES) if number % 4 == task - 1}
    assert _contents(out) == _contents(alone)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    _run(*_arguments(scans, tmp_path / "all", codec, "--no-share"))
    assert _contents(tmp_path / "all") == _contents(alone)


def test_bad_files_are_listed_at_the_end(scans: Path, codec: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    (folder / "a.h5").write_bytes((scans / "scan0.h5").read_bytes())
    (folder / "b.h5").write_bytes((scans / "scan1.h5").read_bytes()[:5000])
    (folder / "c.h5").symlink_to(folder / "c.h5")
    with pytest.raises(InputError, match=r"[bc]\.h5"):
        _run(*_arguments(folder, out, codec))
    assert not out.exists()
    result = _run(*_arguments(folder, out, codec, "--skip", "--json", str(tmp_path / "s.json")))
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()[-2:]
    assert all(line.startswith("nirvana: left out: ") for line in lines)
    assert "b.h5" in lines[0]
    assert "c.h5" in lines[1]
    whole = json.loads((tmp_path / "s.json").read_text())
    assert whole == json.loads((out / "metrics.json").read_text())
    assert [one["volume"] for one in whole["scans"]] == ["a"]  # the file states "scan0"
    assert [Path(each["scan"]).name for each in whole["skipped"]] == ["b.h5", "c.h5"]
    assert [each["method"] for each in whole["summary"]] == ["zero-filled", "Nirvana"]


def test_another_setting_is_computed_anew(scans: Path, codec: Path, tmp_path: Path) -> None:
    one, out = scans / "scan0.h5", tmp_path / "out"
    _run(*_arguments(one, out, codec))
    first = read_mask(out)
    result = _run(*_arguments(one, out, codec, "--resume"))
    assert "1 of these were finished before" in result.stdout
    _run(*_arguments(one, out, codec, "--resume", "--acceleration", "3"))
    assert read_mask(out).sum() > first.sum()


def read_mask(out: Path) -> np.ndarray:
    with h5py.File(out / "reconstruction.h5") as file:
        return file["mask"][()]


@pytest.mark.parametrize("formats", ["hdf5", "nifti", "dicom", "cfl", "png", "cfl,hdf5,nifti"])
def test_formats(formats: str, scans: Path, codec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(*_arguments(scans / "scan0.h5", out, codec, "--formats", formats))
    names = {
        "hdf5": {"reconstruction.h5"},
        "nifti": {"reconstruction.nii.gz"},
        "dicom": {"dicom"},
        "cfl": {"reconstruction.cfl", "reconstruction.hdr"},
        "png": {"panel.png"},
    }
    expected = set().union(*(names[each] for each in formats.split(",")))
    assert {file.name for file in out.iterdir()} == {"metrics.json", *expected}
    if formats == "cfl,hdf5,nifti":
        image = read_scan(out / "reconstruction.cfl").kspace[:, 0]
        with h5py.File(out / "reconstruction.h5") as file:
            np.testing.assert_array_equal(image, file["reconstruction"])


def test_complex_images(scans: Path, codec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    formats = ("--formats", "hdf5,nifti,dicom,cfl", "--complex")
    _run(*_arguments(scans / "scan0.h5", out, codec, *formats))
    with h5py.File(out / "reconstruction.h5") as file:
        image, magnitude = file["reconstruction_complex"][()], file["reconstruction"][()]
    assert image.dtype == np.complex64
    assert (np.abs(image) <= magnitude * (1 + 1e-5)).all()
    np.testing.assert_array_equal(read_scan(out / "reconstruction.cfl").kspace[:, 0], image)
    phase = np.asarray(nibabel.load(out / "reconstruction_phase.nii.gz").dataobj)
    np.testing.assert_allclose(phase.transpose(2, 1, 0)[:, ::-1], np.angle(image), atol=1e-6)
    for number, slice_ in enumerate(image):
        found = pydicom.dcmread(out / "dicom_phase" / f"{number + 1:04d}.dcm")
        beside = pydicom.dcmread(out / "dicom" / f"{number + 1:04d}.dcm")
        assert found.StudyInstanceUID == beside.StudyInstanceUID
        assert found.SeriesInstanceUID != beside.SeriesInstanceUID
        assert found.SeriesNumber == beside.SeriesNumber + 1
        (mapping,) = found.RealWorldValueMappingSequence
        radians = found.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
        np.testing.assert_allclose(radians, np.angle(slice_), atol=1e-4)


@pytest.mark.parametrize("method", ["sense", "l1-wavelet", "zero-filled"])
def test_another_method_is_written(method: str, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = _arguments(scans / "scan0.h5", out, tmp_path / "no codec", "--method", method)
    _run(*arguments, "--complex", "--formats", "hdf5")
    described = json.loads((out / "metrics.json").read_text())
    assert described["method"].lower() == method
    assert described["codec"] is None
    methods = [row["method"].lower() for row in described["results"]]
    assert methods == ["zero-filled", *([method] if method != "zero-filled" else [])]
    with h5py.File(out / "reconstruction.h5") as file:
        image, magnitude = file["reconstruction_complex"][()], file["reconstruction"][()]
    scores = described["results"][-1]
    assert scores["ssim"] == pytest.approx(_ssim(read_scan(scans / "scan0.h5"), magnitude))
    assert 0.5 < np.abs(image).sum() / magnitude.sum() <= 1


def _ssim(scan: Scan, image: np.ndarray) -> float:
    assert scan.target is not None
    return score(scan.target, image)["ssim"]


def test_the_codec_adapts_to_every_scan(scans: Path, codec: Path, tmp_path: Path) -> None:
    out, one = tmp_path / "out", scans / "scan0.h5"
    adapt = ("--adapt", "--adapt-parameters", "all", "--adapt-steps", "8", "--formats", "hdf5")
    _run(*_arguments(one, out, codec, *adapt))
    described = json.loads((out / "metrics.json").read_text())
    assert described["method"] == "Nirvana, adapted"
    methods = [row["method"] for row in described["results"]]
    assert methods == ["zero-filled", "Nirvana", "Nirvana, adapted"]
    record = described["adaptation"]
    assert (record["steps"], len(record["curve"])) == (24, 2)
    assert record["config"]["seed"] == 3
    with h5py.File(out / "reconstruction.h5") as file:
        image = file["reconstruction"][()]
    assert described["results"][-1]["ssim"] == pytest.approx(_ssim(read_scan(one), image))
    with pytest.raises(InputError, match="--adapt is for --method nirvana, not sense"):
        _run(*_arguments(one, out, codec, "--adapt", "--method", "sense"))
    with pytest.raises(InputError, match=r"adapt\.parameters = 'some' must be"):
        _run(*_arguments(one, out, codec, "--adapt", "--adapt-parameters", "some"))


def test_some_slices(scans: Path, codec: Path, tmp_path: Path) -> None:
    whole = _run(*_arguments(scans / "scan0.h5", tmp_path / "whole", codec, "--formats", "hdf5"))
    assert whole.exit_code == 0
    with h5py.File(tmp_path / "whole" / "reconstruction.h5") as file:
        every, affine = file["reconstruction"][()], file.attrs.get("affine")
    assert affine is None
    for text, chosen in (("2", slice(1, 3)), ("3:4", slice(2, 4)), ("1:1", slice(0, 1))):
        out = tmp_path / text.replace(":", "-")
        _run(*_arguments(scans / "scan0.h5", out, codec, "--formats", "hdf5", "--slices", text))
        with h5py.File(out / "reconstruction.h5") as file:
            # A network is only nearly equivariant to the brightness of the other slices.
            np.testing.assert_allclose(file["reconstruction"], every[chosen], rtol=0.2, atol=0.05)
    for text in ("3:5", "0:2", "3:2", "-1", "a", "1:2:3"):
        with pytest.raises(InputError, match="--slices"):
            _run(*_arguments(scans / "scan0.h5", tmp_path / "out", codec, "--slices", text))
    assert not (tmp_path / "out").exists()


def test_fewer_slices_than_requested_are_remarked(scans: Path, codec: Path, tmp_path: Path) -> None:
    """By reconstruct and evaluate, of scans and of volumes that scans are simulated of."""
    volume = tmp_path / "volume.npy"
    np.save(volume, np.random.default_rng(0).random((4, 40, 48), dtype=np.float32))
    remark = "it has 4 slices, fewer than 40: all are taken"
    for count, times in (("40", 1), ("5", 0), ("4", 0), ("0", 0), ("1:4", 0)):
        for path in (scans / "scan0.h5", volume):
            out = tmp_path / path.stem / count.replace(":", "-")
            arguments = _arguments(path, out, codec, "--formats", "hdf5", "--slices", count)
            printed = _run(*arguments).stdout
            assert printed.count(f"{path.stem}: {remark}") == times
            found = json.loads((out / "metrics.json").read_text())
            assert found["remarks"].count(remark) == times
            if count == "5":
                assert remark.replace("40", "5") in found["remarks"]
        scored = _run(
            *("evaluate", str(scans / "scan0.h5"), str(volume), "--codec", str(codec)),
            *("--device", "cpu", "--no-wavelet", "--slices", count),
        )
        assert scored.stdout.count(remark) == 2 * times


def test_every_image_of_a_file_gets_a_folder(codec: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kspace = rng.standard_normal((3, 2, 2, 40, 48)) + 1j * rng.standard_normal((3, 2, 2, 40, 48))
    np.save(tmp_path / "echoes.npy", (kspace * _decay(40, 48)).astype(np.complex64))
    out = tmp_path / "out"
    _run(*_arguments(tmp_path / "echoes.npy", out, codec, "--all", "--formats", "hdf5"))
    names = sorted(file.name for file in out.iterdir())
    assert names == [*(f"echoes_repetition{n}" for n in range(3)), "metrics.json"]
    images = []
    for name in names[:-1]:
        with h5py.File(out / name / "reconstruction.h5") as file:
            images.append(file["reconstruction"][()])
    assert not np.allclose(images[0], images[1])
    _run(*_arguments(tmp_path / "echoes.npy", tmp_path / "one", codec, "--select", "repetition=2"))
    with h5py.File(tmp_path / "one" / "reconstruction.h5") as file:
        np.testing.assert_allclose(file["reconstruction"], images[2], rtol=1e-5)


def _decay(height: int, width: int) -> np.ndarray:
    """Samples weaken from the middle of k-space, by which readers find it."""
    rows, columns = np.mgrid[:height, :width]
    return 1 / (1 + np.hypot(rows - height // 2, columns - width // 2)) ** 2


@pytest.mark.parametrize("formats", ["", "jpeg", "hdf5,tiff"])
def test_unknown_formats_are_refused(formats: str, scans: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--formats"):
        _run(*_arguments(scans, tmp_path / "out", tmp_path, "--formats", formats))
