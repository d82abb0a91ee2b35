"""The Trigger: its closed-form gradient, a decay of 0, a step size of 0, and the trace."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nirvana import NirvanaConfig, without_trigger
from nirvana.model.trigger import Trigger, WeightBank
from nirvana.ops import trigger_gradient, use_backend
from nirvana.ops.reference import TRIGGER_EPS


def make_bank(C: int, R: int) -> WeightBank:
    bank = WeightBank(NirvanaConfig(task_dim=C, bank_size=R)).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank


def loss_of_one_token(k, v, fast, bank):
    """The formula of docs/design.md for one token, which shares nothing with the code."""
    p_w, p_g, p_b, p_s = fast
    weight = torch.einsum("ior,r->io", bank.weight, p_w)
    z = k @ weight + bank.bias @ p_b
    n = (z - z.mean()) / (z.var(unbiased=False) + TRIGGER_EPS).sqrt()
    f = k + (bank.gain @ p_g) * n + bank.shift @ p_s
    return 0.5 * (f - v).square().sum()


@given(C=st.integers(2, 9), R=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device stays the same
)
@pytest.mark.usefixtures("device")
def test_closed_form_gradient_is_autograds(C, R, seed):
    torch.manual_seed(seed)
    bank = make_bank(C, R)
    k, v = torch.randn(2, C, dtype=torch.float64)
    fast = torch.randn(4, R, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(loss_of_one_token(k, v, fast, bank), fast)[0]
    for backend in ("reference", "chunked"):
        with use_backend(backend):
            actual = trigger_gradient(k[None], v[None], fast.detach()[None], *bank.parts())[0]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_truncated_gradient_leaves_out_the_normalisation():
    bank = make_bank(6, 3)
    k, v = torch.randn(2, 6, dtype=torch.float64)
    fast = torch.randn(4, 3, dtype=torch.float64)
    exact = trigger_gradient(k, v, fast, *bank.parts())
    truncated = trigger_gradient(k, v, fast, *bank.parts(), exact=False)
    torch.testing.assert_close(truncated[[1, 3]], exact[[1, 3]])
    assert (truncated[[0, 2]] - exact[[0, 2]]).abs().min() > 1e-3


def test_a_small_step_lowers_the_loss():
    bank = make_bank(8, 4)
    k, v = torch.randn(2, 8, dtype=torch.float64)
    fast = torch.ones(4, 4, dtype=torch.float64)
    stepped = fast - 1e-4 * trigger_gradient(k, v, fast, *bank.parts())
    assert loss_of_one_token(k, v, stepped, bank) < loss_of_one_token(k, v, fast, bank)


def make_trigger(**settings) -> tuple[Trigger, WeightBank, torch.Tensor, torch.Tensor]:
    config = NirvanaConfig(
        num_hidden_layers=3, num_prelude_layers=2, task_dim=8, bank_size=4, **settings
    )
    bank = make_bank(8, 4)
    qkv = torch.randn(2, 70, 24, dtype=torch.float64)
    return Trigger(config, 2).double(), bank, qkv, bank.start(qkv)


def test_without_decay_every_token_is_alone():
    trigger, bank, qkv, fast = make_trigger(trigger_decay=0.0)
    h, after, state = trigger(qkv, fast, bank)
    assert state is None
    order = torch.randperm(70)
    h_shuffled, after_shuffled, _ = trigger(qkv[:, order], fast, bank)
    torch.testing.assert_close(h_shuffled, h[:, order])
    torch.testing.assert_close(after_shuffled, after[:, order])


def test_decay_remembers_the_sample():
    trigger, bank, qkv, fast = make_trigger(trigger_decay=0.5, trigger_lr=0.1)
    _, k, v = qkv.chunk(3, dim=-1)
    g = trigger_gradient(k, v, fast, *bank.parts())
    m = torch.zeros_like(g[:, 0])
    _, after, state = trigger(qkv, fast, bank)
    for t in range(70):
        m = 0.5 * m + g[:, t]
        torch.testing.assert_close(after[:, t], fast[:, t] - 0.1 * m)
    torch.testing.assert_close(state, m)


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_learning_rate_zero_is_no_step(small_model, decay):
    model = small_model(trigger_lr=0.0, trigger_decay=decay)
    tokens = torch.randint(0, 61, (2, 30))
    with_step = model(tokens).logits
    with without_trigger(model):
        torch.testing.assert_close(model(tokens).logits, with_step)


def test_the_step_changes_the_output(small_model):
    model = small_model()
    tokens = torch.randint(0, 61, (2, 30))
    with_step = model(tokens).logits
    with without_trigger(model):
        assert (model(tokens).logits - with_step).abs().max() > 1e-3
    torch.testing.assert_close(model(tokens).logits, with_step)


def test_learnable_settings_start_at_the_values_of_the_configuration(small_model):
    model = small_model(
        trigger_lr=[0.1, -0.2],
        trigger_decay=[0.3, 0.9],
        trigger_lr_learnable=True,
        trigger_decay_learnable=True,
    )
    triggers = [m for m in model.modules() if isinstance(m, Trigger)]
    assert [round(t.lr.item(), 6) for t in triggers] == [0.1, -0.2]
    assert [round(t.decay.item(), 6) for t in triggers] == [0.3, 0.9]
    model(torch.randint(0, 61, (2, 30))).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_works_in_inference_mode(small_model):
    model = small_model()
    tokens = torch.randint(0, 61, (1, 20))
    expected = model(tokens).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected)


@pytest.fixture
def seen_steps():
    """Records the arguments and results of a model's Triggers: one entry a layer."""

    def watch(model) -> list[tuple]:
        steps = []
        for module in model.modules():
            if isinstance(module, Trigger):
                module.register_forward_hook(lambda _, given, out: steps.append((given, out)))
        return steps

    return watch


@pytest.mark.parametrize("interpolation", ["convex", "independent"])
def test_the_trace_is_what_the_triggers_did(small_model, seen_steps, interpolation):
    model = small_model(interpolation=interpolation)
    steps, tokens = seen_steps(model), torch.randint(0, 61, (2, 30))
    out = model(tokens, output_trigger=True)
    assert len(out.trigger) == len(steps) == 2
    updaters = [layer.updater for layer in model.model.layers[2:]]
    for trace, updater, step in zip(out.trigger, updaters, steps, strict=True):
        (qkv, before, bank, *_), (h_task, after, _) = step
        _, k, v = qkv.chunk(3, dim=-1)
        for at in [(0, 0), (0, 29), (1, 13)]:
            expected = loss_of_one_token(k[at], v[at], before[at], bank)
            torch.testing.assert_close(trace.loss_before[at], expected)
            expected = loss_of_one_token(k[at], v[at], after[at], bank)
            torch.testing.assert_close(trace.loss_after[at], expected)
            torch.testing.assert_close(trace.change[at], (after[at] - before[at]).norm())
        torch.testing.assert_close(trace.gates, updater.gate_proj(h_task).sigmoid())
        assert trace.gates.shape == (2, 30, 1 if interpolation == "convex" else 2)
        assert trace.loss_before.shape == trace.change.shape == (2, 30)
        assert not any(x.requires_grad for x in trace)


def test_a_trace_changes_nothing_and_is_only_returned_on_request(small_model):
    model, tokens = small_model(), torch.randint(0, 61, (2, 30))
    plain, out = model(tokens, labels=tokens), model(tokens, labels=tokens, output_trigger=True)
    assert plain.trigger is None
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(out.loss, plain.loss)
    trunk = model.model(tokens, output_trigger=True).trigger
    in_tuple = model(tokens, use_cache=False, output_trigger=True, return_dict=False)[-1]
    for traces in (trunk, in_tuple):
        torch.testing.assert_close(traces, out.trigger, rtol=0, atol=0)
    with without_trigger(model):
        for trace in model(tokens, output_trigger=True).trigger:
            assert not trace.change.any()
            assert torch.equal(trace.loss_before, trace.loss_after)


@torch.no_grad()
def test_traces_of_pieces_are_those_of_the_whole(small_model):
    model, tokens = small_model(), torch.randint(0, 61, (2, 30))
    whole, cache, parts = model(tokens, output_trigger=True).trigger, None, []
    for piece in tokens.split([20, 1, 9], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True, output_trigger=True)
        cache = out.past_key_values
        parts.append(out.trigger)
    for layer, expected in enumerate(whole):
        joined = [
            torch.cat(pieces, dim=1) for pieces in zip(*(p[layer] for p in parts), strict=True)
        ]
        torch.testing.assert_close(joined, list(expected))


def test_checkpointed_training_traces_each_layer_once(small_model):
    model, tokens = small_model().train(), torch.randint(0, 61, (2, 30))
    expected = model(tokens, output_trigger=True).trigger
    model.gradient_checkpointing_enable()
    out = model(tokens, labels=tokens, use_cache=False, output_trigger=True)
    out.loss.backward()
    torch.testing.assert_close(out.trigger, expected)
