"""Estimates before a run, against what is counted."""

import torch

from nirvana import NirvanaForCausalLM, preset
from nirvana.train.estimate import memory_bytes, peak_flops


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
