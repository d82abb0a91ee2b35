"""Invariants of the whole model for random configurations, in float64."""

import copy
from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nirvana import ops, without_trigger
from nirvana.model.trigger import Trigger

EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    # The fixture makes models and keeps nothing between examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def configurations(draw):
    """Fields of a `NirvanaConfig`, small ones."""
    heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    prelude = draw(st.integers(0, min(2, layers - 1)))
    triggers = layers - prelude
    learnable = draw(st.booleans())
    decay = st.floats(0.05, 0.99) if learnable else st.sampled_from([0.0, 0.3, 0.9, 1.0])
    lr = st.sampled_from([0.0, 0.01, 0.3])

    def one_or_each(values):
        return st.one_of(values, st.lists(values, min_size=triggers, max_size=triggers))

    window = draw(st.sampled_from([None, 2, 3, 7, 16, 500]))
    rope_theta = draw(st.sampled_from([None, 10.0, 10000.0]))
    linear = {"rope_type": "linear", "factor": 3.0}
    return {
        "hidden_size": heads * draw(st.sampled_from([2, 6, 16])),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_prelude_layers": prelude,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_key_value_heads": draw(st.sampled_from([None, 1])),
        "head_dim": draw(st.sampled_from([None, None, 4, 10])),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "conv_size": draw(st.sampled_from([None, 2, 3, 4, 5])),
        "conv_silu": draw(st.booleans()),
        "sliding_window": window,
        "num_sinks": 0 if window is None else draw(st.sampled_from([0, 1, 4])),
        "window_output": draw(st.sampled_from(["low_rank", "full"])),
        "rope_theta": rope_theta,
        "rope_scaling": None if rope_theta is None else draw(st.sampled_from([None, linear])),
        "interpolation": draw(st.sampled_from(["convex", "independent"])),
        "task_dim": draw(st.integers(1, 9)),
        "bank_size": draw(st.integers(1, 5)),
        "trigger_gradient": draw(st.sampled_from(["exact", "truncated"])),
        "trigger_lr": draw(one_or_each(lr)),
        "trigger_lr_learnable": draw(st.booleans()),
        "trigger_decay": draw(one_or_each(decay)),
        "trigger_decay_learnable": learnable,
        "tie_word_embeddings": draw(st.booleans()),
    }


def tokens_of(B: int, T: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def invariant(**drawn):
    """Runs a test for random configurations and seeds, and for further arguments that are drawn."""

    def decorate(test):
        return EXAMPLES(given(fields=configurations(), seed=seeds, **drawn)(test))

    return decorate


def made(small_model, fields, seed):
    torch.manual_seed(seed)
    return small_model(**fields)


@invariant(B=st.integers(1, 3), T=st.integers(1, 150), at=st.floats(0, 1, exclude_max=True))
@torch.no_grad()
def test_causality(small_model, fields, seed, B, T, at):
    model, tokens, t = made(small_model, fields, seed), tokens_of(B, T, seed), int(at * T)
    changed = tokens.clone()
    changed[:, t:] = tokens_of(B, T - t, seed + 1)
    after = model(changed).logits[:, :t]
    torch.testing.assert_close(after, model(tokens).logits[:, :t], rtol=0, atol=1e-11)


@invariant(B=st.integers(1, 3), pieces=st.lists(st.sampled_from([1, 1, 2, 5, 17, 70]), max_size=8))
@torch.no_grad()
def test_reading_in_pieces_is_forward(small_model, fields, seed, B, pieces):
    pieces = [3, *pieces]
    model, tokens = made(small_model, fields, seed), tokens_of(B, sum(pieces), seed)
    cache, logits = None, []
    for piece in tokens.split(pieces, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens).logits)


lengths_of = st.lists(st.sampled_from([1, 2, 3, 13, 16, 66]), min_size=1, max_size=5)


@invariant(lengths=lengths_of)
@torch.no_grad()
def test_packed_is_separate(small_model, fields, seed, lengths):
    model, tokens = made(small_model, fields, seed), tokens_of(1, sum(lengths), seed)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=positions).logits
    separate = [model(piece).logits for piece in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1))


@invariant(lengths=lengths_of, left=st.booleans())
@torch.no_grad()
def test_padding_is_no_padding(small_model, fields, seed, lengths, left):
    model, T = made(small_model, fields, seed), max(lengths)
    tokens, mask = torch.full((len(lengths), T), 7), torch.zeros(len(lengths), T).long()
    where = [slice(T - n, T) if left else slice(0, n) for n in lengths]
    for row, n in enumerate(lengths):
        tokens[row, where[row]], mask[row, where[row]] = tokens_of(1, n, seed + row)[0], 1
    logits = model(tokens, attention_mask=mask).logits
    for row, span in enumerate(where):
        alone = model(tokens[row : row + 1, span]).logits
        torch.testing.assert_close(logits[row : row + 1, span], alone)


@invariant(B=st.integers(2, 4), T=st.integers(1, 80))
@torch.no_grad()
def test_permuting_the_batch_permutes_the_result(small_model, fields, seed, B, T):
    model, tokens = made(small_model, fields, seed), tokens_of(B, T, seed)
    order = torch.randperm(B)
    torch.testing.assert_close(model(tokens[order]).logits, model(tokens).logits[order])


@invariant(T=st.integers(1, 100), cuts=st.lists(st.integers(1, 99), max_size=2, unique=True))
def test_chunked_is_reference(small_model, fields, seed, T, cuts):
    model, tokens = made(small_model, fields, seed), tokens_of(2, T, seed)
    borders = [0, *sorted(cut for cut in cuts if cut < T), T]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)]).expand(2, -1)

    def logits_and_gradients():
        model.zero_grad()
        logits = model(tokens, position_ids=positions).logits
        logits.square().mean().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters()}

    chunked = logits_and_gradients()
    with ops.use_backend("reference"):
        torch.testing.assert_close(chunked, logits_and_gradients())


@invariant(B=st.integers(1, 3), T=st.integers(1, 80))
@torch.no_grad()
def test_a_step_size_of_zero_is_no_trigger(small_model, fields, seed, B, T):
    model, tokens = made(small_model, fields, seed), tokens_of(B, T, seed)
    still = copy.deepcopy(model)
    for module in still.modules():
        if isinstance(module, Trigger) and fields["trigger_lr_learnable"]:
            module.lr_percent.zero_()
        elif isinstance(module, Trigger):
            module.fixed_lr = 0.0
    with without_trigger(model):
        torch.testing.assert_close(model(tokens).logits, still(tokens).logits, rtol=0, atol=0)
