"""The paper's setting, on a miniature of fastMRI's folder."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nirvana import InputError
from nirvana.config import load_config
from nirvana.mri.data.fastmri import ScanPool, cut
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.train.config import MriConfig
from nirvana.mri.train.task import train
from nirvana.packaged import packaged_config

CONFIG = packaged_config("mri-fastmri")
SMALL = [
    *("--codec.weights", "default"),
    *("--codec.sensitivity_features", "[2, 2, 2, 2, 2, 2]"),
    *("--codec.cascade_features", "[2, 2, 2, 2, 2, 2]"),
    *("--codec.decoder_features", "[2, 2, 2, 2]"),
    *("--codec.encoder_cascades", "1", "--codec.image_cascades", "1"),
    *("--codec.vit_dim", "12", "--codec.vit_depth", "1"),
    *("--data.sizes", "[[32, 48]]", "--data.coils", "[3]", "--data.valid_slices", "1"),
    *("--run.steps", "2", "--run.log_interval", "1", "--optim.accumulation", "2"),
    *("--optim.warmup_steps", "1"),
]


@pytest.fixture
def folder(tmp_path: Path, head_slices: np.ndarray) -> Path:
    """Files as fastMRI's: readout oversampled twofold, the target cropped to the field of view."""
    generator = torch.Generator().manual_seed(0)
    for part, name, coils in (
        ("train", "file_brain_AXT1_1", 3),
        ("train", "file_brain_AXT1_2", 3),
        ("train", "file_brain_AXT2_3", 5),
        ("val", "file_brain_AXT1_4", 3),
    ):
        image = torch.from_numpy(head_slices[:2, 30:62, 40:88])[:, None]
        weights = torch.randn(1, coils, 1, 1, generator=generator, dtype=torch.complex64)
        wide = torch.nn.functional.pad(image * weights, (0, 0, 16, 16))
        (tmp_path / f"multicoil_{part}").mkdir(exist_ok=True)
        with h5py.File(tmp_path / f"multicoil_{part}" / f"{name}.h5", "w") as file:
            file["kspace"] = fft2c(wide).numpy()
            file["reconstruction_rss"] = rss(image * weights).numpy()
            file["ismrmrd_header"] = "<ismrmrdHeader/>"
    return tmp_path


def test_the_file_describes_the_papers_setting():
    config = load_config(MriConfig, CONFIG)
    assert config.data.coils == [16]
    assert config.data.sizes == [(320, 320)]
    assert config.data.samplings == [Sampling("equispaced", 4.0, 0.08)]
    codec = config.codec
    assert codec.encoder_cascades + codec.image_cascades == 12
    assert (codec.vit_dim, codec.vit_depth) == (768, 6)


def test_both_stages_on_a_miniature_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = ["file_brain_AXT1_1.h5", "file_brain_AXT1_2.h5"]
    lines = [{"volume": name, "report": "No lesion."} for name in names]
    (folder / "reports.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first = ["--stage.name", "1", "--run.initial", "", "--data.reports", "reports.jsonl"]
    assert train(CONFIG, [*SMALL, *first, "--run.out", "runs/fastmri-1"]).finished
    outcome = train(CONFIG, SMALL)
    assert set(outcome.last["valid"]) == {"psnr", "ssim", "zero_filled_psnr", "zero_filled_ssim"}
    before, after = (
        load_file(folder / "runs" / run / "model" / "model.safetensors")
        for run in ("fastmri-1", "fastmri-2")
    )
    assert torch.equal(before["encoder.projection.weight"], after["encoder.projection.weight"])
    assert not torch.equal(before["decoder.write.weight"], after["decoder.write.weight"])


def test_batches_are_the_scans_own(folder):
    files = sorted((folder / "multicoil_train").glob("*.h5"))
    pool = ScanPool(files, torch.device("cpu"), [3])
    generator = torch.Generator().manual_seed(0)
    batch = pool.batch(3, (32, 48), 3, [Sampling()], generator)
    assert batch.kspace.shape == (3, 3, 32, 48)
    assert not (batch.kspace * ~batch.mask[:, None, None]).any()
    targets = []
    for path in files[:2]:
        with h5py.File(path) as file:
            targets.append(torch.from_numpy(file["reconstruction_rss"][()]))
    known = torch.cat(targets)
    for image in batch.target:  # without oversampling the target is fastMRI's
        assert (known - image).abs().amax((1, 2)).min() < 1e-4


def test_cutting_keeps_the_middle_of_the_image():
    image = torch.randn(2, 9, 12, dtype=torch.complex64)
    torch.testing.assert_close(ifft2c(cut(fft2c(image), (5, 12))), image[:, 2:7])
    padded = ifft2c(cut(fft2c(image), (9, 16)))
    torch.testing.assert_close(padded[..., 2:14], image)


def test_unusable_scans_are_named(folder, monkeypatch):
    monkeypatch.chdir(folder)
    train_folder = folder / "multicoil_train"
    with pytest.raises(InputError, match="no training scan has 7 coils"):
        ScanPool(train_folder.glob("*.h5"), torch.device("cpu"), [7])
    with h5py.File(train_folder / "thin.h5", "w") as file:
        file["kspace"] = np.ones((1, 3, 32, 48), np.complex64)
        file["mask"] = np.ones(48)
    with pytest.raises(InputError, match=r"thin\.h5 is undersampled"):
        ScanPool(train_folder.glob("thin.h5"), torch.device("cpu"), [3])
    with h5py.File(train_folder / "thin.h5", "w") as file:
        file["kspace"] = np.ones((1, 3, 32, 48), np.complex64) * (np.arange(48) % 4 == 0)
    pool = ScanPool([train_folder / "thin.h5"], torch.device("cpu"), [3])
    with pytest.raises(InputError, match=r"thin\.h5 is undersampled"):
        pool.batch(1, (32, 48), 3, [Sampling()], torch.Generator())
    with h5py.File(train_folder / "thin.h5", "w") as file:
        file["kspace"] = np.full((1, 3, 32, 48), np.nan, np.complex64)
    pool = ScanPool([train_folder / "thin.h5"], torch.device("cpu"), [3])
    with pytest.raises(InputError, match="slice 0 holds NaN"):
        pool.batch(1, (32, 48), 3, [Sampling()], torch.Generator())
    np.save(folder / "volume.npy", np.ones((1, 32, 32), np.float32))
    mixed = ["--data.train", '["volume.npy", "multicoil_train/*.h5"]', "--stage.name", "joint"]
    with pytest.raises(InputError, match="not both"):
        train(CONFIG, [*SMALL, *mixed, "--run.initial", ""])
