"""Estimates before a run, against what is counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nirvana import NirvanaForCausalLM, preset
from nirvana.train.estimate import flops_per_token, memory_bytes, peak_flops


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"sliding_window": 64}])
def test_flops_are_about_those_of_the_products(overrides):
    """PyTorch's counter sees the products of the forward pass as they are really done: some work
    within chunks more, and of window attention the masked part, too."""
    config = preset("tiny", vocab_size=2048, **overrides)
    model = NirvanaForCausalLM(config)
    T = 256
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(2048, (1, T)), use_cache=False)
    counted = 3 * counter.get_total_flops() / T
    assert 0.8 < flops_per_token(model, config, T) / counted <= 1.0


def test_memory():
    config = preset("tiny")
    with torch.device("meta"):
        model = NirvanaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    plain = memory_bytes(model, config, 1000)
    assert plain["state"] == 16 * count
    assert memory_bytes(model, config, 1000, parts=4)["state"] == 4 * count
    recomputed = memory_bytes(model, config, 1000, recompute=1)
    assert recomputed["activations"] < plain["activations"]
    assert memory_bytes(model, config, 2000)["activations"] == 2 * plain["activations"]


def test_no_peak_is_made_up():
    assert peak_flops(torch.device("cpu"), "bf16") == 0
