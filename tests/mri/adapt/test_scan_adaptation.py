"""A codec that adapts to a scan: what it sees, what it learns, and when it stays as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.small_codec import small_config
from nirvana import InputError
from nirvana.mri.adapt.adaptation import (
    AdaptedMethod,
    ScanAdaptation,
    adapt_to_scan,
    best_look,
)
from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.adapt.lines import (
    distance,
    outside_of_middle,
    parts,
    stands_for,
    weights,
)
from nirvana.mri.adapt.parameters import ScanParameters
from nirvana.mri.adapt.prediction import CoilKspace, ScanSlice, signal_share
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import measure
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io.scan import Scan
from nirvana.mri.methods import codec_method
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.masks import Sampling

CASCADES = {
    "maps": "espirit",
    "map_features": (4,),
    "data_consistency": "conjugate_gradient",
    "conditioning": 4,
    "correction": "none",
    "image_cascades": 2,
}
KINDS = {"tokens": {}, "cascades": CASCADES}
QUICK = {"steps": 6, "check_every": 3, "slices": 1}
UNLIKE = ScanAdaptConfig("gains", lr=1e-2, **QUICK)  # for a codec of random weights


def codec_of(kind: str = "cascades") -> CodecModel:
    """A small codec whose zero-initialised layers have values."""
    torch.manual_seed(0)
    model = CodecModel(replace(small_config("none"), **KINDS[kind]), None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model


@pytest.fixture(scope="module")
def scan() -> Scan:
    grid = np.linspace(-1, 1, 64)
    inside = np.hypot(grid[:, None], grid) < 0.8
    texture = np.random.default_rng(0).random((1, 8, 8)).repeat(8, 1).repeat(8, 2)
    image = np.where(inside, 0.3 + texture, 0).astype(np.float32)
    return simulate_scan(image, "disc", 0, Simulation(num_coils=2, noise=(0.002, 0.002)))


@pytest.fixture(scope="module")
def target(scan: Scan) -> np.ndarray:
    assert scan.target is not None
    return scan.target


@pytest.fixture(scope="module")
def acquisition(scan: Scan) -> Acquisition:
    return measure(scan).undersampled(Sampling("random", 2.5, 0.12), 0).acquisition


@pytest.fixture(scope="module")
def codec() -> CodecModel:
    return codec_of()


@pytest.fixture(scope="module")
def adapted(codec: CodecModel, acquisition: Acquisition) -> ScanAdaptation:
    return adapt_to_scan(codec, acquisition, UNLIKE)


def images(codec: CodecModel, acquisition: Acquisition) -> np.ndarray:
    return np.stack([each.magnitude for each in codec_method(codec, 2)(acquisition)])


def pattern(points: bool) -> np.ndarray:
    measured = np.random.default_rng(1).random((48, 64) if points else (1, 64)) < 0.5
    measured[:, 26:38] = True
    if points:
        measured[18:30] |= np.abs(np.arange(64) - 32) < 6
    return measured


@pytest.mark.parametrize("points", [False, True])
def test_parts_are_alike(points: bool) -> None:
    outside = outside_of_middle(pattern(points), 48)
    assert not outside[..., 32].all() or points
    found = parts(outside, 4, np.random.default_rng(2))
    np.testing.assert_array_equal(np.sum(found, axis=0), outside)
    # Of every four samples that follow each other outwards, each part has one.
    order = np.argsort(distance(outside.shape)[outside], kind="stable")
    for part in found:
        blocks = np.flatnonzero(part[outside][order]) // 4
        np.testing.assert_array_equal(blocks, np.arange(len(blocks)))


def test_a_hidden_sample_stands_for_those_at_its_distance() -> None:
    unseen = np.ones((1, 64), dtype=bool)
    unseen[:, 28:36] = False
    hidden = np.zeros_like(unseen)
    hidden[:, [20, 44, 60]] = True  # 12, 12 and 28 from the middle
    found = stands_for(hidden, unseen)
    assert found.sum() == unseen.sum()
    assert found[0, 20] == found[0, 44]
    # Nearer to 12 than to 28: 16 on the left and 16 on the right, 20 among neither.
    near = np.abs(np.arange(64) - 32) <= 20
    assert 2 * found[0, 20] == pytest.approx((unseen[0] & near).sum(), abs=1)
    assert not found[~hidden].any()


def test_weights_fall_with_energy_and_noise() -> None:
    generator = np.random.default_rng(0)
    radius = np.hypot(np.arange(-32, 32)[:, None], np.arange(-32, 32))
    kspace = generator.normal(size=(2, 64, 64)) * np.exp(-radius / 8) + 0j
    every = np.ones((1, 64), dtype=bool)
    even = weights(kspace, every, 0.0, 0.0)
    np.testing.assert_array_equal(even, np.ones((64, 64), np.float32))
    steep, noisy = (weights(kspace, every, noise, 1.0) for noise in (0.0, 0.01))
    assert steep[32, 32] < steep[32, 40] < steep[32, 60]
    assert noisy[0, 0] == pytest.approx(1 / (2 * 0.01**2), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_leaves_the_codec_as_it_is(kind: str, acquisition: Acquisition) -> None:
    codec = codec_of(kind)
    found = adapt_to_scan(codec, acquisition, ScanAdaptConfig(steps=0))
    assert found.record["kept"] == found.record["steps"] == 0
    np.testing.assert_array_equal(images(found.codec, acquisition), images(codec, acquisition))


def test_a_scan_that_does_not_fit_gets_a_better_image(
    codec: CodecModel, acquisition: Acquisition, target: np.ndarray, adapted: ScanAdaptation
) -> None:
    record = adapted.record
    assert record["steps"] == UNLIKE.total_steps
    assert record["gain"] > record["low"] > 0
    assert record["kept"] in (3, 6)
    scores = [score(target, images(each, acquisition))["psnr"] for each in (codec, adapted.codec)]
    assert scores[1] > scores[0] + 0.2
    # The given codec has neither changed nor gathered gradients.
    for name, weight in codec_of().state_dict().items():
        assert torch.equal(weight, codec.state_dict()[name]), name
    assert all(parameter.grad is None for parameter in codec.parameters())


def test_what_harms_is_not_kept(acquisition: Acquisition) -> None:
    codec = codec_of()
    found = adapt_to_scan(codec, acquisition, ScanAdaptConfig("gains", lr=3.0, **QUICK))
    assert min(found.record["curve"][1:]) > found.record["curve"][0]
    assert found.record["kept"] == found.record["gain"] == 0
    np.testing.assert_array_equal(images(found.codec, acquisition), images(codec, acquisition))


def test_a_gain_that_may_be_chance_is_none() -> None:
    groups = np.random.default_rng(0).normal(size=9)  # hard and easy ones
    scatter = np.array([0.3, -0.2, 0.1, -0.2, 0.3, -0.1, 0.2, -0.2, 0.1])  # of mean 0.03
    best, gain = best_look(np.stack([groups, groups + 0.1, groups - scatter]))
    assert best == 2
    assert gain.figure > 0 > gain.low
    best, gain = best_look(np.stack([groups, groups - scatter - 0.3, groups]))
    assert best == 1
    assert gain.low > 0


def test_a_scan_that_fits_stays_as_it_was(acquisition: Acquisition) -> None:
    """A new codec, whose networks add nothing, is SENSE, and little noise suits its weight."""
    torch.manual_seed(0)
    codec = CodecModel(replace(small_config("none"), **CASCADES), None).eval()
    found = adapt_to_scan(codec, acquisition, UNLIKE)
    assert found.record["kept"] == 0
    assert found.record["low"] <= 0
    np.testing.assert_array_equal(images(found.codec, acquisition), images(codec, acquisition))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_does_not_see_what_it_predicts(kind: str, acquisition: Acquisition) -> None:
    codec = codec_of(kind)
    each = ScanSlice.of(codec, acquisition, 0, 0.0)
    (hidden, *_) = parts(outside_of_middle(each.measured, 64), 3, np.random.default_rng(0))

    def error(each: ScanSlice) -> tuple[torch.Tensor, torch.Tensor]:
        (found,) = each.predicted(CoilKspace(codec), {}, each.kspace, [each.measured & ~hidden])
        return found, each.error(found, hidden)

    noise = torch.randn_like(each.kspace) * torch.from_numpy(hidden)
    first, second = error(each), error(replace(each, kspace=each.kspace + noise))
    assert torch.equal(first[0], second[0])
    assert first[1] != second[1]


def test_signal_is_separated_from_noise() -> None:
    noise = 0.01 * np.random.default_rng(0).normal(size=(2, 3, 64, 64))
    image = noise[0] + 1j * noise[1]
    image[:, 20:44, 20:44] += 0.1
    magnitude = torch.from_numpy(np.linalg.norm(image, axis=0))
    share = signal_share(magnitude, 0.01, 3)
    assert share.min() >= 0
    assert share.max() <= 1
    assert share[24:40, 24:40].min() > 0.97
    assert share[:16].mean() < 0.1
    assert torch.equal(signal_share(magnitude, 0.0, 3), torch.ones_like(magnitude))


def test_gains_start_at_the_weights() -> None:
    codec = codec_of("tokens")
    parameters = ScanParameters(codec, "gains")
    state = codec.state_dict()
    made = parameters.weights()
    assert {name: weight.shape for name, weight in made.items()} == {
        name: state[name].shape for name in made
    }
    for name, weight in made.items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=0)
    assert parameters.count < sum(weight.numel() for weight in made.values()) / 3
    assert ScanParameters(codec, "all").count == codec.num_trained
    with pytest.raises(InputError, match="'backbone': this codec has no such parameters"):
        ScanParameters(codec, "backbone")


def test_the_norms_of_the_backbone(small_model, acquisition: Acquisition) -> None:
    backbone = small_model().model.float().requires_grad_(False)
    torch.manual_seed(0)
    codec = CodecModel(small_config("nirvana"), backbone).eval()
    parameters = ScanParameters(codec, "backbone")
    assert all(".backbone." in name for name in parameters.values)
    config = ScanAdaptConfig("backbone", **QUICK)
    found = adapt_to_scan(codec, acquisition, config)
    assert isinstance(found, ScanAdaptation)
    changed = {
        name
        for name, weight in found.codec.state_dict().items()
        if not torch.equal(weight, codec.state_dict()[name])
    }
    assert changed <= set(parameters.values)


def test_the_method_records_its_last_scan(
    codec: CodecModel, acquisition: Acquisition, adapted: ScanAdaptation
) -> None:
    steps: list[int] = []
    method = AdaptedMethod(codec, 2, UNLIKE, steps.append)
    assert method.record == {}
    found = np.stack([each.magnitude for each in method(acquisition)])
    assert method.record == adapted.record
    before, after = images(codec, acquisition), images(adapted.codec, acquisition)
    share = signal_share(torch.from_numpy(before), acquisition.noise, 2).numpy()
    assert 0.1 < (share == 0).mean() < 0.5
    np.testing.assert_allclose(found[share == 0], before[share == 0], atol=1e-6)
    clear = share > 0.9
    assert np.abs(found - after)[clear].mean() < 0.15 * np.abs(before - after)[clear].mean()
    assert len(method.record["curve"]) == 3
    assert sum(steps) == UNLIKE.total_steps


def test_too_few_lines_are_refused(acquisition: Acquisition) -> None:
    middle = np.zeros(64, dtype=bool)
    middle[24:40] = True
    middle[[2, 50, 60]] = True
    few = replace(acquisition, pattern=middle)
    with pytest.raises(InputError, match="3 columns outside of the middle"):
        adapt_to_scan(codec_of(), few)
    five = replace(acquisition, pattern=middle | (np.arange(64) == 6) | (np.arange(64) == 10))
    with pytest.raises(InputError, match=r"5 columns outside of the middle.*at least 6"):
        adapt_to_scan(codec_of(), five, ScanAdaptConfig(folds=6))
    found = adapt_to_scan(codec_of(), five, ScanAdaptConfig(steps=1, folds=5))
    assert len(found.record["curve"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"lr": 0.0},
        {"hidden_share": 1.0},
        {"folds": 1},
        {"slices": 0},
        {"parameters": "some"},
        {"weight_power": 2.0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"adapt.{next(iter(wrong))}"):
        ScanAdaptConfig(**wrong)
