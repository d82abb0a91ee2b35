"""Step sizes and the start learned through the inner loop."""

import math

import pytest
import torch

from nirvana.adapt import AdaptConfig, adapt_documents
from nirvana.adapt.adaptation import start_optimizer
from nirvana.adapt.chunks import read_documents
from nirvana.adapt.step_sizes import learn_step_sizes

GROUPS = ("norm", "fast")


def rows(count: int, length: int = 60) -> list[torch.Tensor]:
    return [torch.randint(61, (5,)).repeat(length // 5) for _ in range(count)]


def test_the_outer_gradient_is_that_of_constant_directions(small_model):
    """One chunk after the first: phi_1 = start - lr d_1 with d_1 constant, by central differences
    of the loss of the second chunk."""
    model, documents = small_model(), rows(2, 15)
    config = AdaptConfig(GROUPS, chunk=7, optimizer="sgd", lr=dict.fromkeys(GROUPS, 0.3))
    layout = start_optimizer(model, config).layout
    chunks = []
    optimizer = start_optimizer(model, config, rows=2)
    read_documents(model, documents, optimizer, chunks.append)
    directions = (chunks[0].before - chunks[0].after) / optimizer.lr

    def second_loss(log_change, number, start):
        sizes = torch.tensor([config.step_size(name) for name in layout.names]).double()
        sizes[number] *= math.exp(log_change)
        values = start - layout.expand(sizes) * directions
        seen = []
        still = AdaptConfig(GROUPS, chunk=7, steps=0, lr=config.lr)
        other = start_optimizer(model, still, rows=2)

        def note(chunk):
            seen.append(chunk.nll.sum() / 7)
            other.values = values

        read_documents(model, documents, other, note)
        return float(seen[1])

    for number in (0, 3, len(layout.tensors) - 1):
        zero = torch.zeros(1, sum(layout.sizes), dtype=torch.float64)
        numeric = (second_loss(1e-4, number, zero) - second_loss(-1e-4, number, zero)) / 2e-4
        part = layout.split(chunks[1].gradient * chunks[1].before)[number]
        assert float(part.sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_learned_step_sizes_are_better(small_model):
    """From steps that are far too small, on other documents than those that are scored."""
    torch.manual_seed(1)
    model = small_model().float()
    config = AdaptConfig(GROUPS, chunk=6, lr=dict.fromkeys(GROUPS, 1e-4))
    seen = []
    learned, start = learn_step_sizes(
        model,
        (rows(4) for _ in range(12)),
        config,
        rate=0.5,
        log_progress=lambda *x: seen.append(x),
    )
    assert [number for number, _ in seen] == list(range(12))
    assert len(learned.lr) == len(start.layout.tensors)
    assert not start.values.any()
    test = rows(6)
    before, after = (
        torch.cat(adapt_documents(model, test, each)[0]).mean() for each in (config, learned)
    )
    assert after < before - 0.01


def test_a_learned_start_is_better_and_a_task(small_model):
    """On the documents from which it is learned; its step sizes hardly change."""
    model, documents = small_model().float(), rows(4)
    config = AdaptConfig(("norm",), chunk=6, lr={"norm": 0.001})
    learned, start = learn_step_sizes(model, [documents] * 12, config, rate=1e-9, start_rate=0.003)
    assert start.values.any()
    assert learned.step_size("norm/model.norm") == pytest.approx(0.001, rel=1e-3)
    before, after = (
        torch.cat(adapt_documents(model, documents, learned, task)[0]).mean()
        for task in (None, start)
    )
    assert after < before


def test_a_step_size_of_zero_is_refused(small_model):
    config = AdaptConfig(GROUPS, lr={"norm": 0.0})
    with pytest.raises(ValueError, match="has no logarithm"):
        learn_step_sizes(small_model(), [], config)
