"""Training a codec: samples from a seed, a gain on zero-filling, bitwise resumption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nirvana import InputError
from nirvana.mri.data import SlicePool, simulate_batch
from nirvana.mri.model import load_codec
from nirvana.mri.physics import Sampling, rss
from nirvana.mri.physics import ifft2c as to_image
from nirvana.mri.simulate import Simulation
from nirvana.mri.train import expand, train

CONFIG = """
[data]
train = ["{volumes}/*.npy"]
valid = ["{volumes}/a.npy"]
batch_size = 2
sizes = [[32, 48], [48, 32]]
coils = [2]
accelerations = [2.0]
center_fractions = [0.2]
valid_slices = 2

[codec]
backbone = "{backbone}"
sensitivity_features = [2, 2, 2, 2, 2, 2]
cascade_features = [2, 2, 2, 2, 2, 2]
image_cascades = 1
vit_dim = 8
vit_depth = 1
vit_heads = 2
decoder_features = [2, 2, 2, 2]

[optim]
lr = 3e-3
warmup_steps = 1

[run]
out = "{out}"
steps = 4
log_interval = 1
checkpoint_interval = 2
validation_interval = 0
"""


@pytest.fixture
def volumes(tmp_path: Path, head_slices: np.ndarray) -> Path:
    folder = tmp_path / "volumes"
    folder.mkdir()
    np.save(folder / "a.npy", head_slices)
    np.save(folder / "b.npy", head_slices[:2] * 0.7)
    return folder


@pytest.fixture
def config(tmp_path: Path, volumes: Path):
    def write(backbone: str = "none", out: str = "run") -> Path:
        path = tmp_path / f"{out}.toml"
        path.write_text(CONFIG.format(volumes=volumes, backbone=backbone, out=tmp_path / out))
        return path

    return write


def test_a_batch_is_a_function_of_its_generator(volumes):
    pool = SlicePool(sorted(volumes.glob("*.npy")), torch.device("cpu"))

    def batch(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return simulate_batch(pool, 3, (32, 40), 4, Sampling(), Simulation(), generator)

    first, again, other = batch(1), batch(1), batch(2)
    assert torch.equal(first.kspace, again.kspace)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.kspace, other.kspace)
    assert first.kspace.shape == (3, 4, 32, 40)
    assert not first.kspace[..., ~first.mask].any()
    assert (first.calibration <= first.mask).all()
    assert first.calibration[20]
    ratio = first.scale / rss(to_image(first.kspace)).amax((-2, -1))
    assert ((ratio >= 0.999) & (ratio <= 1.501)).all()
    assert first.target.max() > 0.1


def test_views_show_the_whole_slice(volumes):
    pool = SlicePool([volumes / "a.npy"], torch.device("cpu"))
    views = pool.views(40, (64, 64), torch.Generator().manual_seed(0))
    assert views.shape == (40, 64, 64)
    assert views.min() >= 0
    assert views.max() <= 1
    rows = (views > 0.1).any(2).float().mean(1)
    assert 0.4 < rows.mean() < 0.95
    assert (views[:, [0, -1]] > 0.1).float().mean() < 0.1


def test_an_empty_volume_is_refused(tmp_path):
    dark = np.zeros((2, 32, 32), np.float32)
    dark[0, 0, 0] = 1
    np.save(tmp_path / "dark.npy", dark)
    with pytest.raises(InputError, match="no slice shows anything"):
        SlicePool([tmp_path / "dark.npy"], torch.device("cpu"))
    with pytest.raises(InputError, match="no volume matches"):
        expand([str(tmp_path / "*.nii")])


@pytest.mark.parametrize("backbone", ["none", "tiny"])
def test_training_resumes_bitwise_and_exports(config, tmp_path, backbone):
    whole = train(config(backbone, "whole"))
    assert whole.finished
    train(config(backbone, "parts"), ["--run.steps", "4"])
    parts = tmp_path / "parts"
    for late in (parts / "checkpoints").glob("*4"):  # as if it had been killed after step 2
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    assert train(config(backbone, "parts"), resume=True).step == 4
    weights = [
        load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts")
    ]
    assert not any("backbone" in name for name in weights[0])
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name]), name
    model = load_codec(tmp_path / "whole" / "model")
    assert model.config.backbone == backbone
    last = json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(last["valid"]) == {"psnr", "ssim", "zero_filled_psnr", "zero_filled_ssim"}


def test_training_gains_on_zero_filling(config):
    """A fresh codec gives the zero-filled image; some steps later it must be better."""
    out = train(config(), ["--run.steps", "40", "--run.checkpoint_interval", "0"])
    valid = out.last["valid"]
    assert valid["psnr"] > valid["zero_filled_psnr"] + 0.02
    assert valid["ssim"] > valid["zero_filled_ssim"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.center_fractions", "[0.1, 0.2]"], "1 numbers, one for each acceleration"),
        (["--data.coils", "[]"], "data.coils"),
        (["--codec.vit_dim", "10"], "vit_dim = 10"),
        (["--codec.cascade_features", "[1, 2]"], "cascade_features"),
        (["--codec.backbone", "huge"], "no language model 'huge'"),
        (["--data.masks", "['spiral']"], "equispaced"),
        (["--simulation.num_coils", "0"], "coils"),
    ],
)
def test_wrong_settings_are_named(config, tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        train(config(), override)
    assert not (tmp_path / "run").exists()
