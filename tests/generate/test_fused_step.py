"""The kernels for one token compute the forward pass; without a GPU, in Triton's interpreter."""

from copy import deepcopy

import pytest
import torch

from helpers.adopted_settings import LLAMA3, YARN
from nirvana.generate.fused_step import FusedStep
from nirvana.generate.graph_decoder import Decoder

pytest.importorskip("triton")
from triton import knobs

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 1,
    "num_hidden_layers": 3,
    "num_prelude_layers": 1,
    "intermediate_size": 32,
}
KINDS = {
    "memory": {},
    "each token alone": {"trigger_decay": 0.0, "interpolation": "independent"},
    "truncated, learned, odd sizes": {
        "trigger_gradient": "truncated",
        "trigger_lr_learnable": True,
        "trigger_decay_learnable": True,
        "task_dim": 7,
        "bank_size": 5,
        "intermediate_size": 41,
    },
}
WINDOW = 4
NEW = {"num_prelude_layers": 0, "num_hidden_layers": 1, "sliding_window": WINDOW}
ADOPTED = {
    "SmolLM2": {
        **NEW,
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "conv_size": None,
        "conv_silu": False,
        "num_sinks": 2,
        "window_output": "full",
        "interpolation": "independent",
        "rope_theta": 100.0,
        "rope_scaling": LLAMA3,
    },
    "sinks without positions, constant gates": {
        **NEW,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_sinks": 3,
        "conv_silu": False,
        "gate": "constant",
    },
    "bias, norms and positions without a window": {
        **NEW,
        "sliding_window": None,
        "num_attention_heads": 2,
        "head_dim": 32,
        "hidden_size": 41,
        "conv_size": None,
        "qkv_bias": True,
        "qk_norm": True,
        "gate": "constant",
        "interpolation": "independent",
        "rope_theta": 100.0,
        "rope_scaling": YARN,
    },
    "linear branches alone, a bias": {
        **NEW,
        "branches": "linear",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qkv_bias": True,
    },
}


@pytest.fixture(autouse=True)
def _where_triton_runs(device):
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton is compiled for the GPU here")


# Every two of kind, rows and length meet once: each case takes seconds in the interpreter.
BATCHES = [
    (kind, rows, length)
    for number, kind in enumerate(KINDS)
    for rows, length in zip((1, 3), (1, 30) if number % 2 == 0 else (30, 1), strict=True)
]


@pytest.mark.parametrize(("kind", "rows", "length"), BATCHES)
def test_tokens_by_kernels(small_model, kind, rows, length):
    check(small_model(**{**SIZES, **KINDS[kind]}), rows, length, steps=3)


def test_two_blocks_of_rows(small_model):
    """A layer without a Trigger and one with it, and a second token, which reads what the first
    one left in the rows of both blocks."""
    check(small_model(**{**SIZES, "num_hidden_layers": 2}), rows=65, length=1, steps=2)


# From texts of few tokens on, of two lengths in a batch, until the sinks have left the window.
ADOPTED_BATCHES = [(kind, 3, 3, WINDOW + 1) for kind in ADOPTED]
ADOPTED_BATCHES += [(kind, 1, 1, WINDOW + 3 if kind == "SmolLM2" else 2) for kind in ADOPTED]


@pytest.mark.parametrize(("kind", "rows", "length", "steps"), ADOPTED_BATCHES)
def test_tokens_of_adopted_models(small_model, kind, rows, length, steps):
    check(small_model(**{**SIZES, **ADOPTED[kind]}), rows, length, steps)


@pytest.mark.parametrize("kind", ["low rank", "full"])
def test_follows_weights_that_changed_in_place(small_model, kind):
    settings = {} if kind == "low rank" else ADOPTED["SmolLM2"]
    model = small_model(**{**SIZES, "num_hidden_layers": 2, **settings}).float()
    decoder = Decoder(model, 100, compiled=False)
    decoder.prefill(torch.randint(61, (1, 3)))
    step = FusedStep(model, decoder.states, decoder.count)
    with torch.no_grad():
        for part in (
            *model.model.layers[1].updater.window_out,
            *model.model.layers[1].updater.zeta,
        ):
            for weight in part.parameters():
                weight.mul_(-2)
    decoder.prefill(torch.randint(61, (1, 3)))
    step.refresh()
    exact = FusedStep(model, deepcopy(decoder.states), decoder.count)
    token = torch.randint(61, (1, 1))
    torch.testing.assert_close(step(token), exact(token), rtol=0, atol=0)


def check(model, rows, length, steps):
    """The logits of `steps` tokens after `length` ones are as exact as those without kernels."""
    exact, model = Decoder(deepcopy(model), 100, compiled=False), model.float()
    tokens = torch.randint(61, (rows, length + steps))
    # Texts of different lengths have their token in different slots of the ring buffers.
    mask = torch.ones_like(tokens)[:, :length]
    mask[1::2, : length // 3] = 0
    decoder = Decoder(model, 100, compiled=False)
    for each in (exact, decoder):
        each.prefill(tokens[:, :length], mask)
    step = FusedStep(model, deepcopy(decoder.states), decoder.count.clone())
    for token in tokens[:, length:].split(1, dim=1):
        expected, plain, actual = exact.step(token), decoder.step(token), step(token)
        step.count += 1
        # The Trigger amplifies rounding in some texts, by PyTorch's operations just as by ours.
        assert (actual - expected).norm() < 10 * (plain - expected).norm() + 1e-5 * expected.norm()
