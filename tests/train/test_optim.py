"""What is decayed, and the learning rate of every step."""

import math

import pytest
import torch
from torch import nn

from nirvana import NirvanaConfig, NirvanaForCausalLM
from nirvana.train.config import OptimConfig
from nirvana.train.optim import build_optimizer, learning_rate

CONFIG = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, weight_decay=0.3)


def test_groups():
    model = NirvanaForCausalLM(
        NirvanaConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            task_dim=4,
            bank_size=2,
            trigger_decay=0.5,
            trigger_lr_learnable=True,
            trigger_decay_learnable=True,
        )
    )
    named = list(model.named_parameters())
    optimizer = build_optimizer(named, CONFIG, model.no_weight_decay())
    names = {id(parameter): name for name, parameter in named}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    decayed, others = groups[0.3], groups[0.0]
    assert decayed | others == set(names.values())
    assert not decayed & others
    assert {"model.bank.weight", "model.layers.2.updater.in_proj.weight"} <= decayed
    assert all(dict(named)[name].ndim >= 2 for name in decayed)
    words = ("norm", "embed", "bias", "gain", "shift", "A_log", ".lr", "decay_logit")
    for word in words:
        assert not [name for name in decayed if word in name]
        assert [name for name in others if word in name], word


def test_decay_acts_on_its_group_alone():
    linear = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    optimizer = build_optimizer(linear.named_parameters(), CONFIG)
    for parameter in linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(linear.weight, before["weight"] * (1 - 0.3))
    assert torch.equal(linear.bias, before["bias"])


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1)],
)
def test_learning_rate(step, expected):
    assert math.isclose(learning_rate(step, CONFIG, 101), expected, rel_tol=1e-12)


def test_learning_rate_falls_after_the_warm_up():
    rates = [learning_rate(step, CONFIG, 50) for step in range(10, 50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == CONFIG.min_lr
    # A run that is all warm-up, or one step after it, is still defined.
    assert learning_rate(4, CONFIG, 5) == 0.5
    assert learning_rate(10, CONFIG, 11) == CONFIG.min_lr
