"""Which models the two steps take, and the reason that they give for each of the others."""

import pytest
import torch

from helpers.adopted_settings import LLAMA3
from nirvana import NirvanaForCausalLM, preset
from nirvana.generate.cpu_step import CpuStep
from nirvana.generate.fused_step import FusedStep


@pytest.fixture(params=[CpuStep, FusedStep])
def step(request, kernels):
    return request.param


@pytest.fixture
def kernels(monkeypatch):
    """As if the models were in half precision on a GPU."""
    monkeypatch.setattr("nirvana.generate.fused_step.suits_kernels", lambda x: True)


def model_of(**fields):
    return NirvanaForCausalLM(preset("tiny", num_hidden_layers=3, **fields))


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"branches": "window"}, "branches = 'window'"),
        ({"branches": "linear"}, "branches = 'linear'"),
        ({"gate": "constant"}, "gate = 'constant'"),
        ({"trigger_step": "normalised"}, "trigger_step = 'normalised'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"conv_size": None, "conv_silu": False}, "conv_size = None"),
        ({"num_sinks": 2}, "num_sinks = 2"),
        ({"qkv_bias": True}, "qkv_bias = True"),
        ({"qk_norm": True}, "qk_norm = True"),
        ({"rope_theta": 1e4}, "rope_theta = 10000.0"),
    ],
)
def test_the_step_on_a_cpu_names_what_it_does_not_compute(fields, setting):
    assert CpuStep.refusal(model_of(**fields)) == f"it has {setting}"


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"branches": "window"}, "branches = 'window'"),
        ({"gate": "input"}, "gate = 'input'"),
        ({"trigger_step": "normalised"}, "trigger_step = 'normalised'"),
        ({"conv_size": 3}, "conv_size = 3"),
        ({"head_dim": 48}, "head_dim = 48"),
        ({"num_sinks": 17}, "num_sinks = 17"),
    ],
)
def test_the_fused_step_names_what_it_does_not_compute(kernels, fields, setting):
    assert FusedStep.refusal(model_of(**fields)) == f"it has {setting}"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 1, "head_dim": 32, "num_sinks": 4, "rope_theta": 1e4},
        {"conv_size": None, "conv_silu": False, "window_output": "full", "gate": "constant"},
        {"qkv_bias": True, "qk_norm": True, "rope_theta": 1e4, "rope_scaling": LLAMA3},
        {"branches": "linear", "trigger_step": "normalised"},
    ],
)
def test_the_fused_step_takes_adopted_models(kernels, fields):
    assert FusedStep.refusal(model_of(**fields)) is None


def adapted(model):
    part = model.model.layers[1].updater
    part.in_proj = torch.nn.utils.parametrizations.weight_norm(part.in_proj)


def wrapped(model):
    """The weight of a wrapper's attribute is not all that it computes with."""

    class Wrapper(type(model.model.norm)):
        pass

    model.model.norm.__class__ = Wrapper


def without_windows(model):
    model.model.layers[-1].updater.window_kept = torch.zeros(1, 1, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapted, "it has adapters, or quantised or replaced layers"),
        (wrapped, "it has adapters, or quantised or replaced layers"),
        (without_windows, "it drops window branches"),
    ],
)
def test_no_step_takes_a_changed_model(step, change, reason):
    model = model_of()
    assert step.refusal(model) is None
    change(model)
    assert step.refusal(model) == reason


def test_each_step_has_its_precisions():
    model = model_of()
    assert FusedStep.refusal(model) == "it is not in half precision on a GPU with Triton"
    assert CpuStep.refusal(model.double()) is None
    assert CpuStep.refusal(model.bfloat16()) == "it is not in float32 or float64 on a CPU"


def test_the_step_on_a_cpu_computes_without_autocast():
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert CpuStep.refusal(model) == "autocast is on"
