"""The kernels for one token compute the forward pass; without a GPU, in Triton's interpreter."""

from copy import deepcopy

import pytest
import torch

from nirvana.generate import fused_step
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


@pytest.fixture(autouse=True)
def _where_triton_runs(device):
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton is compiled for the GPU here")


def test_adapters_are_not_for_the_kernels(small_model, monkeypatch):
    monkeypatch.setattr(fused_step, "suits_kernels", lambda x: True)
    model = small_model(**SIZES)
    assert FusedStep.refusal(model) is None
    part = model.model.layers[1].updater
    part.in_proj = torch.nn.utils.parametrizations.weight_norm(part.in_proj)
    assert "adapters" in str(FusedStep.refusal(model))


# 70 rows are two blocks of rows, which are slow in the interpreter.
BATCHES = [(kind, rows, length) for kind in KINDS for rows in (1, 3) for length in (1, 30)]
BATCHES.append(("memory", 70, 1))


@pytest.mark.parametrize(("kind", "rows", "length"), BATCHES)
def test_tokens_by_kernels(small_model, kind, rows, length):
    model = small_model(**{**SIZES, **KINDS[kind]})
    exact, model = Decoder(deepcopy(model), compiled=False), model.float()
    tokens = torch.randint(61, (rows, length + 3))
    # Texts of different lengths have their token in different slots of the ring buffers.
    mask = torch.ones_like(tokens)[:, :length]
    mask[1::2, : length // 3] = 0
    decoder = Decoder(model, compiled=False)
    for each in (exact, decoder):
        each.prefill(tokens[:, :length], mask)
    step = FusedStep(model, deepcopy(decoder.states), decoder.count.clone())
    for token in tokens[:, length:].split(1, dim=1):
        expected, plain, actual = exact.step(token), decoder.step(token), step(token)
        step.count += 1
        # The Trigger amplifies rounding in some texts, by PyTorch's operations just as by ours.
        assert (actual - expected).norm() < 10 * (plain - expected).norm() + 1e-5 * expected.norm()
