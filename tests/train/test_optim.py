"""What is decayed, and the learning rate of every step."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from nirvana import NirvanaConfig, NirvanaForCausalLM
from nirvana.errors import InputError
from nirvana.train.config import OptimConfig
from nirvana.train.language import LanguageTask
from nirvana.train.optim import build_optimizer, is_decayed, learning_rate, stable_steps

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


def test_linear_schedule():
    config = replace(CONFIG, schedule="linear")
    rates = [learning_rate(step, config, 101) for step in range(10, 101)]
    assert rates[0] == 1.0
    assert rates[-1] == CONFIG.min_lr
    steps = [a - b for a, b in pairwise(rates)]
    assert max(steps) - min(steps) < 1e-12


@pytest.mark.parametrize(("steps", "share"), [(100, 0.2), (57, 0.3), (11, 1.0), (5, 0.2), (1, 0.5)])
def test_wsd_is_stable_and_then_decays(steps, share):
    config = replace(CONFIG, schedule="wsd", decay_share=share)
    stable = stable_steps(config, steps)
    rates = [learning_rate(step, config, steps) for step in range(steps)]
    assert rates[: min(10, stable)] == [
        learning_rate(s, CONFIG, 100) for s in range(min(10, stable))
    ]
    assert rates[10:stable] == [1.0] * (stable - min(10, stable) if stable > 10 else 0)
    decay = rates[stable:]
    assert decay == sorted(decay, reverse=True)
    assert all(rate < 1.0 for rate in decay)
    if decay:
        assert decay[-1] == pytest.approx(CONFIG.min_lr)
        assert len(decay) == max(1, round(share * steps)) or stable == 10
    # The stable phase of a longer run begins with this one's.
    longer = [learning_rate(step, config, 3 * steps) for step in range(stable)]
    assert longer == rates[:stable]


def test_only_wsd_has_a_stable_phase():
    for schedule in ("cosine", "linear"):
        assert stable_steps(replace(CONFIG, schedule=schedule), 100) == 0


def small_task():
    model = NirvanaForCausalLM(
        NirvanaConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            task_dim=4,
            bank_size=2,
            trigger_decay=0.5,
            tie_word_embeddings=False,
        )
    )

    class SmallTask(LanguageTask):
        def __init__(self):
            self.model, self.undecayed = model, model.no_weight_decay()

    return SmallTask()


def test_muon_updates_the_matrices_of_linear_maps():
    task = small_task()
    chosen = task.matrices()
    shapes = dict(task.model.named_parameters())
    assert {
        "model.layers.2.updater.in_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    } <= chosen
    assert all(shapes[name].ndim == 2 for name in chosen)
    words = ("embed", "lm_head", "conv", "bank", "norm", "gate_proj", "window_up", "A_log")
    assert not [name for name in chosen if any(word in name for word in words)]
    named = list(task.trainable())
    optimizer = build_optimizer(named, replace(CONFIG, name="muon"), task.undecayed, chosen)
    before = {name: p.detach().clone() for name, p in named}
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert set(optimizer.state) == {p for _, p in named}
    for name, parameter in named:
        change = parameter - before[name] * (1 - 0.3 * is_decayed(name, parameter))
        if name in chosen:
            assert set(optimizer.state[parameter]) == {"momentum_buffer"}
            # An orthogonal matrix, to what five steps of Newton and Schulz reach, scaled.
            values = torch.linalg.svdvals(change) / (0.2 * max(parameter.shape) ** 0.5)
            assert values.max() < 1.3
            assert values.median() > 0.5
        else:
            assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)
    # The rate is set for both at once.
    assert len(optimizer.param_groups) == 3


def test_muon_without_matrices_is_refused():
    linear = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"optim.name = 'muon' .*no matrices"):
        build_optimizer(linear.named_parameters(), replace(CONFIG, name="muon"))
