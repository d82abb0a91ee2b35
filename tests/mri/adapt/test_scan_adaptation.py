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
    _CoilKspace,
    _problems,
    adapt_to_scan,
)
from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.adapt.lines import held_back, outside_of_middle, weights
from nirvana.mri.adapt.parameters import ScanParameters
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import measure
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
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
def acquisition() -> Acquisition:
    grid = np.linspace(-1, 1, 64)
    inside = np.hypot(grid[:, None], grid) < 0.8
    texture = np.random.default_rng(0).random((3, 8, 8)).repeat(8, 1).repeat(8, 2)
    image = np.where(inside, 0.3 + texture, 0).astype(np.float32)
    scan = simulate_scan(image, "disc", 0, Simulation(num_coils=3, noise=(0.002, 0.002)))
    return measure(scan).undersampled(Sampling("random", 2.5, 0.12), 0).acquisition


def images(codec: CodecModel, acquisition: Acquisition) -> np.ndarray:
    return np.stack([each.magnitude for each in codec_method(codec, 2)(acquisition)])


@pytest.mark.parametrize("points", [False, True])
def test_samples_are_held_back_outside_of_the_middle(points: bool) -> None:
    measured = np.random.default_rng(1).random((48, 64) if points else (1, 64)) < 0.5
    measured[:, 26:38] = True
    if points:
        measured[18:30] |= np.abs(np.arange(64) - 32) < 6
    outside = outside_of_middle(measured, 48)
    assert not outside[..., 32].all() or points
    generator = np.random.default_rng(2)
    first, second = (held_back(measured, 48, 0.25, generator) for _ in range(2))
    for part in (first, second):
        assert (part <= outside).all()
        assert part.sum() == round(0.25 * outside.sum())
    assert (first != second).any()


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


@pytest.mark.parametrize("parameters", ["gains", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_held_back_samples_are_predicted_better(
    kind: str, parameters: str, acquisition: Acquisition
) -> None:
    codec = codec_of(kind)
    before = {name: weight.clone() for name, weight in codec.state_dict().items()}
    config = ScanAdaptConfig(parameters, steps=24, lr=1e-2 if parameters == "gains" else 1e-3)  # type: ignore[arg-type]
    steps: list[int] = []
    found = adapt_to_scan(codec, acquisition, config, steps.append)
    assert sum(steps) == found.record["steps"]
    assert found.record["after"] < 0.99 * found.record["before"]
    assert found.record["kept"] in range(config.check_every, config.steps + 1, config.check_every)
    assert (images(found.codec, acquisition) != images(codec, acquisition)).any()
    # The given codec has neither changed nor gathered gradients.
    for name, weight in codec.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(parameter.grad is None for parameter in codec.parameters())
    again = adapt_to_scan(codec, acquisition, config)
    assert again.record == found.record


def test_what_harms_is_not_kept(acquisition: Acquisition) -> None:
    codec = codec_of()
    found = adapt_to_scan(codec, acquisition, ScanAdaptConfig(steps=16, lr=3.0))
    assert min(found.record["curve"][1:]) > found.record["curve"][0]
    assert found.record["kept"] == 0
    assert found.record["after"] == found.record["before"]
    np.testing.assert_array_equal(images(found.codec, acquisition), images(codec, acquisition))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_does_not_see_what_it_predicts(kind: str, acquisition: Acquisition) -> None:
    codec = codec_of(kind)
    parameters = ScanParameters(codec, "gains")
    (problem, *_) = _problems(codec, acquisition, ScanAdaptConfig(), np.random.default_rng(0))

    class Watched(_CoilKspace):
        def forward(self, *inputs):
            self.found = super().forward(*inputs)
            return self.found

    model = Watched(codec)
    first = problem.error(model, parameters, problem.learned, problem.stop)
    prediction = model.found
    noise = torch.randn_like(problem.kspace) * torch.from_numpy(problem.stop)
    other = replace(problem, kspace=problem.kspace + noise)
    second = other.error(model, parameters, problem.learned, problem.stop)
    assert torch.equal(model.found, prediction)
    assert first != second


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
    config = ScanAdaptConfig("backbone", steps=8, least_gain=0.0)
    found = adapt_to_scan(codec, acquisition, config)
    assert isinstance(found, ScanAdaptation)
    changed = {
        name
        for name, weight in found.codec.state_dict().items()
        if not torch.equal(weight, codec.state_dict()[name])
    }
    assert changed <= set(parameters.values)


def test_the_method_records_its_last_scan(acquisition: Acquisition) -> None:
    config = ScanAdaptConfig(steps=8, check_every=4, lr=1e-2)
    method = AdaptedMethod(codec_of(), 2, config)
    assert method.record == {}
    found = np.stack([each.magnitude for each in method(acquisition)])
    expected = adapt_to_scan(codec_of(), acquisition, config)
    np.testing.assert_array_equal(found, images(expected.codec, acquisition))
    assert method.record == expected.record
    assert len(method.record["curve"]) == 3


def test_too_few_lines_are_refused(acquisition: Acquisition) -> None:
    middle = np.zeros(64, dtype=bool)
    middle[24:40] = True
    middle[[2, 50, 60]] = True
    few = replace(acquisition, pattern=middle)
    with pytest.raises(InputError, match="3 columns outside of the middle"):
        adapt_to_scan(codec_of(), few)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"lr": 0.0},
        {"loss_share": 1.0},
        {"stop_share": 0.0},
        {"slices": 0},
        {"parameters": "some"},
        {"least_gain": 1.0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"adapt.{next(iter(wrong))}"):
        ScanAdaptConfig(**wrong)
