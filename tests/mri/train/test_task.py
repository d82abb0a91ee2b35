"""Training a codec: samples from a seed, a gain on zero-filling, bitwise resumption."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import HELPERS
from helpers.runs import curve, one_thread, torchrun, weights
from nirvana import InputError
from nirvana.config import load_config
from nirvana.mri.data.batch import HeldBackBatch, micro_batch_generator
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.slices import SlicePool, simulate_batch
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.physics.fourier import fft2c as to_kspace
from nirvana.mri.physics.fourier import ifft2c as to_image
from nirvana.mri.physics.fourier import rss
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.train.config import MriConfig
from nirvana.mri.train.task import ReconstructionTask, expand, train

CPU = torch.device("cpu")
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
sensitivity_features = [2, 2]
cascade_features = [2, 2]
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
    np.save(folder / "wide.npy", head_slices[1:2, 10:80, :].repeat(2, 2))
    return folder


@pytest.fixture
def config(tmp_path: Path, volumes: Path):
    def write(backbone: str = "none", out: str = "run") -> Path:
        path = tmp_path / f"{out}.toml"
        path.write_text(CONFIG.format(volumes=volumes, backbone=backbone, out=tmp_path / out))
        return path

    return write


def test_a_batch_is_a_function_of_its_generator(volumes):
    pool = SlicePool.read(sorted(volumes.glob("*.npy")), torch.device("cpu"))
    samplings = [Sampling(), Sampling("random", 2, 0.2)]

    def batch(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return simulate_batch(pool, 3, (32, 40), 4, samplings, Simulation(), generator)

    first, again, other = batch(1), batch(1), batch(2)
    assert torch.equal(first.kspace, again.kspace)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.kspace, other.kspace)
    assert first.kspace.shape == (3, 4, 32, 40)
    assert not (first.kspace * ~first.mask[:, None, None]).any()
    assert (first.calibration <= first.mask).all()
    assert first.calibration[:, 20].all()
    shares = torch.cat([batch(seed).mask.float().mean(1) for seed in range(4)])
    assert shares.min() < 0.3
    assert shares.max() > 0.4
    ratio = first.scale / rss(to_image(first.kspace)).amax((-2, -1))
    assert ((ratio >= 0.999) & (ratio <= 1.501)).all()
    assert first.target.max() > 0.1


def test_views_show_the_whole_slice(volumes):
    pool = SlicePool.read([volumes / "a.npy", volumes / "wide.npy"], torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    index = pool.draw(40, generator)
    assert set(index.tolist()) == {0, 1, 2, 3, 4}
    views = pool.views(index, (64, 64), generator)
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
        SlicePool.read([tmp_path / "dark.npy"], torch.device("cpu"))
    with pytest.raises(InputError, match="no volume matches"):
        expand([str(tmp_path / "*.nii")])


@pytest.mark.parametrize("backbone", ["none", "nirvana"])
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


def test_two_stages_and_the_joint_one(config, tmp_path, volumes):
    """Stage 1 learns to write reports and leaves the decoder as it was; stage 2 begins with its
    codec and leaves the encoder; the joint stage moves both."""
    reports = tmp_path / "reports.jsonl"
    lines = [
        {"volume": "a.npy", "report": "No lesion."},
        {"volume": "b.npy", "slice": 0, "report": "One lesion, left frontal lobe, 12 mm, bright."},
        {"volume": "b.npy", "report": "Two lesions."},
        {"volume": "wide.npy", "report": "No lesion."},
    ]
    reports.write_text("\n".join(map(json.dumps, lines)))
    path = config("nirvana", "first")
    settings = ["--data.reports", str(reports), "--run.steps", "12", "--run.log_interval", "3"]
    train(path, [*settings, "--stage.name", "1"])
    log = [json.loads(x) for x in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["report_nats"] < log[0]["report_nats"] - 0.5
    assert "ssim" not in log[-1]
    first = load_file(tmp_path / "first" / "model" / "model.safetensors")

    initial = ["--run.initial", str(tmp_path / "first" / "model")]
    train(config("nirvana", "second"), ["--stage.name", "2", *initial])
    second = load_file(tmp_path / "second" / "model" / "model.safetensors")
    for name, x in first.items():
        trained = name.startswith(("decoder.", "image_cascades."))
        # The last cascade's eta weighs columns that are put back as measured anyway.
        if trained and x.any() and not name.endswith("eta"):
            assert not torch.equal(second[name], x), name
        elif not trained:
            assert torch.equal(second[name], x), name

    train(config("nirvana", "joint"), [*settings, *initial])
    last = json.loads((tmp_path / "joint" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"report_nats", "ssim", "l1"} <= set(last)
    joint = load_file(tmp_path / "joint" / "model" / "model.safetensors")
    for part in ("encoder.projection.weight", "image_cascades.0.refine.net.write.weight"):
        assert not torch.equal(joint[part], first[part])

    with pytest.raises(InputError, match="another codec"):
        train(config("nirvana", "other"), ["--stage.name", "2", *initial, "--codec.vit_dim", "16"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"volume": "a.npy"}', "line 2"),
        ('{"volume": "a.npy", "slice": "x", "report": ""}', "line 2"),
        ('{"volume": "b.npy", "slice": 0, "report": "x"}', "has no report"),
    ],
)
def test_wrong_reports_are_named(config, tmp_path, line, message):
    reports = tmp_path / "reports.jsonl"
    reports.write_text('{"volume": "a.npy", "report": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        train(config("nirvana"), ["--data.reports", str(reports)])
    assert not (tmp_path / "run").exists()


def test_a_changed_backbone_is_noticed(config, monkeypatch):
    """Frozen means bit-equal: a run that changes the backbone does not end well."""
    loss = ReconstructionTask.loss

    def careless(task, batch):
        with torch.no_grad():
            task.model.backbone.base_model.norm.weight[0] *= 1 + 1e-6
        return loss(task, batch)

    monkeypatch.setattr(ReconstructionTask, "loss", careless)
    with pytest.raises(RuntimeError, match="frozen backbone"):
        train(config("nirvana"), ["--run.steps", "1"])


POINTS = ["--data.points", "1.0"]


def test_a_share_of_the_batches_has_masks_of_points(config):
    def kinds(*more: str) -> list[int]:
        task = ReconstructionTask(load_config(MriConfig, config(), list(more)), CPU)
        return [task.batch(step, 0).mask.ndim for step in range(24)]

    assert kinds() == 24 * [2]
    assert kinds(*POINTS) == 24 * [3]
    assert 4 < kinds("--data.points", "0.5").count(3) < 20
    # Without points nothing else of a batch changes.
    tasks = [
        ReconstructionTask(load_config(MriConfig, config(), more), CPU)
        for more in ([], ["--data.points", "1e-9"])
    ]
    shapes = [{task.batch(step, 0).kspace.shape for step in range(8)} for task in tasks]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--data.points", "1.5"], "data.points"),
        (
            ["--data.points", "0.1", "--data.sizes", "[[8, 24]]", "--data.accelerations", "[4.0]"],
            "fewer than the 8 x 8",
        ),
        (["--stage.held_share", "1.0"], "stage.held_share"),
        (["--stage.loss", "ssdu", "--data.reports", "x.jsonl"], "data.reports"),
        (["--parallel.recompute", "1"], "parallel.recompute"),
    ],
)
def test_wrong_settings_are_refused(config, setting, message):
    with pytest.raises(InputError, match=message):
        load_config(MriConfig, config(), setting)


SSDU = ["--stage.loss", "ssdu"]


def test_the_self_supervised_loss_sees_the_measured_samples_alone(config):
    task = ReconstructionTask(load_config(MriConfig, config(), SSDU), CPU)
    batch = task.batch(0, 0)
    assert isinstance(batch, HeldBackBatch)
    loss, terms = task.loss(batch)
    again, _ = task.loss(replace(batch, target=torch.zeros_like(batch.target)))
    assert torch.equal(loss, again)
    # The relative errors of a prediction that is zero are 1 each.
    with torch.no_grad():
        coils, _ = task.model.coil_images(*batch.inputs)
        predicted = to_kspace(coils) * batch.scale[:, None, None, None]
        error = (predicted - batch.held_kspace) * batch.held[:, None, None]
        norms = [each.abs().flatten(1).norm(dim=1) for each in (error, batch.held_kspace)]
    torch.testing.assert_close(terms["held_l2"], (norms[0] / norms[1]).mean())
    # What was not held back does not count: the input is put back as measured.
    louder = replace(batch, held_kspace=batch.held_kspace * 0 + 1e-3 * batch.held[:, None, None])
    assert not torch.equal(task.loss(louder)[0], loss)


SENSE = ["--codec.maps", "espirit", "--codec.data_consistency", "conjugate_gradient"]
SENSE += ["--codec.map_sets", "2", "--codec.map_features", "[2, 2]", "--codec.conditioning", "4"]


@pytest.mark.parametrize(
    "codec",
    [[], SENSE, [*SENSE, *SSDU], [*SENSE, "--data.points", "0.5"]],
    ids=["gradient", "sense", "ssdu", "points"],
)
def test_training_gains_on_the_start(config, codec):
    """A fresh codec gives the zero-filled or the SENSE image; some steps later it must be
    better."""
    path = config()
    fresh = ReconstructionTask(load_config(MriConfig, path, codec), torch.device("cpu")).validate()
    out = train(path, [*codec, "--run.steps", "40", "--run.checkpoint_interval", "0"])
    valid = out.last["valid"]
    assert valid["psnr"] > fresh["psnr"] + 0.02
    assert valid["ssim"] > fresh["ssim"]


PROCESSES = HELPERS / "processes.py"
TWO = ["--run.steps", "2", "--optim.accumulation", "4", "--run.compile", "false"]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [*SENSE, *SSDU],
        [*SENSE, *SSDU, "--parallel.shard", "1"],
        [*SENSE, *SSDU, "--parallel.reshard", "false"],
    ],
    ids=["image", "ssdu", "ssdu-copies", "ssdu-gathered-once"],
)
def test_two_processes_compute_what_one_computes(config, forks, tmp_path, settings):
    """Codec and frozen backbone in two parts each (FSDP2), or a whole copy in each process."""
    settings = [*TWO, "--run.device", "cpu", *settings]
    with one_thread():
        train(config("nirvana", "alone"), settings)
    given = ["codec", "none", 0, config("nirvana", "together"), *settings]
    code, output = forks.together(PROCESSES, given)
    assert code == 0, output
    assert curve(tmp_path / "together") == curve(tmp_path / "alone")
    assert weights(tmp_path / "together") == weights(tmp_path / "alone")


def test_an_interrupted_run_of_two_processes_resumes_bitwise(config, forks, tmp_path):
    """Self-supervised, without a backbone; one of the two gets a signal."""

    def together(out: str, kind: str, *more: str) -> str:
        settings = [*TWO, "--run.device", "cpu", *SENSE, *SSDU, *more]
        given = ["codec", kind, 1, config(out=out), *settings]
        code, output = forks.together(PROCESSES, given)
        assert code == 0, output
        return output

    together("whole", "none")
    assert together("parts", "sigterm").count("stopped after step 1") == 1
    assert "continuing after step 1" in together("parts", "none", "--resume")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
def test_two_gpus_are_one_to_rounding(config, tmp_path):
    """In bfloat16; sharded at first, then in whole copies."""
    settings = [*TWO, "--run.device", "auto", *SENSE, *SSDU]
    train(config("nirvana", "one"), settings)
    given = [config("nirvana", "two"), *settings]
    code, output = torchrun(PROCESSES, ["codec", "sigterm", 1, *given])
    assert code == 0, output
    resumed = [*given, "--resume", "--parallel.shard", "1"]
    code, output = torchrun(PROCESSES, ["codec", "none", 0, *resumed])
    assert code == 0, output
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=5e-2)
    psnr = one[-1]["valid"]["psnr"]
    assert two[-1]["valid"]["psnr"] == pytest.approx(psnr, abs=0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.center_fractions", "[0.1, 0.2]"], "1 numbers, one for each acceleration"),
        (["--data.coils", "[]"], "data.coils"),
        (["--data.coils", "[4, 0]"], r"data.coils = \[4, 0\] must be from 1 to 256"),
        (["--data.sizes", "[[-4, 32]]"], "sides of at least 8 pixels"),
        (["--data.accelerations", "[0.5]"], "acceleration 0.5 is not possible"),
        (["--codec.vit_dim", "10"], "vit_dim = 10"),
        (["--codec.vit_dim", "12", "--codec.vit_stem", "convolutions"], "multiple of 8"),
        (["--codec.vit_stem", "pools"], "codec.vit_stem"),
        (["--codec.cascade_features", "[1, 0]"], "cascade_features"),
        (["--codec.unet", "instance"], "must be 6 numbers"),
        (["--codec.backbone", "huge"], "codec.backbone"),
        (
            ["--codec.backbone", "nirvana", "--codec.weights", "huge"],
            "no language model 'huge'",
        ),
        (["--codec.backbone", "transformer", "--codec.weights", "huge"], "no transformer at"),
        (["--stage.name", "2"], "run.initial"),
        (["--stage.name", "1"], "data.reports"),
        (["--data.reports", "reports.jsonl"], "codec.backbone"),
        (["--data.masks", "['spiral']"], "equispaced"),
        (["--simulation.num_coils", "0"], "coils"),
    ],
)
def test_wrong_settings_are_named(config, tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        train(config(), override)
    assert not (tmp_path / "run").exists()


def test_every_seed_and_micro_batch_draws_other_numbers():
    """The numbers, not the generators' seeds: the CPU's generator uses 32 bits of a seed."""

    def drawn(seed, micro_batch):
        return tuple(torch.rand(3, generator=micro_batch_generator(seed, micro_batch)).tolist())

    keys = [(seed, part) for seed in (0, 1, 3, 20261127, 2**23, 2**62) for part in (0, 5, 2**33)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(3, 5) == drawn(3, 5)
