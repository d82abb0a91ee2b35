"""Chunks read by a CUDA graph: the same numbers as without one, and a graph only where it fits."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils import _pytree as pytree

import nirvana
from nirvana.adapt import AdaptConfig, adapt_documents, chunk_graphs, chunks
from nirvana.adapt.config import GROUPS

ALL = tuple(GROUPS)
CONFIGS = {
    "adam": AdaptConfig(ALL, chunk=6, rank=3),
    "sgd": AdaptConfig(ALL, chunk=6, rank=3, optimizer="sgd"),
    "two steps": AdaptConfig(("norm",), chunk=6, steps=2),
    "none": AdaptConfig(("norm",), chunk=6, steps=0),
}


class Recorded:
    """A graph without a GPU: what was recorded runs again, and its results go to the same memory,
    as those of a replay do."""

    count = 0

    def __init__(self, function, device, warmups=1):
        Recorded.count += 1
        for _ in range(warmups):
            function()
        self.function, self.output = function, function()

    def pool(self):
        return None

    def replay(self):
        leaves = [pytree.tree_leaves(x) for x in (self.output, self.function())]
        for old, new in zip(*leaves, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Lets graphs be recorded on the CPU, and counts them."""

    def record(function, device, warmups=1, pool=None):
        graph = Recorded(function, device, warmups)
        return graph, graph.output

    # A replay here runs the hooks again, and must find those of the recording in the model.
    hooks = functools.cache(chunks.TaskHooks)
    monkeypatch.setattr(chunks, "TaskHooks", hooks)
    monkeypatch.setattr(chunk_graphs, "record", record)
    monkeypatch.setattr(chunks, "refusal", lambda model: None)
    Recorded.count = 0
    return Recorded


def rows(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(61, (length,)) for length in lengths]


def adapted(model, documents, config, task=None):
    """Scores, task parameters, and what an observer sees after the last chunk."""
    seen = []
    scores, task = adapt_documents(model, documents, config, task, seen.append)
    observed = [x for chunk in seen for x in chunk if isinstance(x, torch.Tensor)]
    return [*scores, task.values, *observed]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_replays_are_the_plain_chunks_to_the_bit(small_model, recorded, name):
    model, config = small_model(), CONFIGS[name]
    plain = copy.deepcopy(model)
    for lengths in ((45, 20, 33), (50, 31, 2), (19, 1, 14)):
        documents = rows(*lengths)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(chunks, "refusal", lambda model: "compared with")
            expected = adapted(plain, documents, config)
        assert_equal(adapted(model, documents, config), expected)
    assert recorded.count == 2  # for the first chunk, and for those after a full window
    assert "_chunk_graphs" not in vars(plain)


def test_step_sizes_and_starts_may_change_between_documents(small_model, recorded):
    model, config = small_model(), CONFIGS["adam"]
    plain = copy.deepcopy(model)
    _, task = adapt_documents(model, rows(40), config)
    other = replace(config, lr={"norm": 0.02, "fast": -0.01})
    documents = rows(40)
    found = adapted(model, documents, other, task)
    assert recorded.count == 2
    plain_task = adapted(plain, documents, other, task)
    assert_equal(found, plain_task)
    assert not torch.equal(found[0], adapted(model, documents, config, task)[0])


def test_what_a_graph_does_not_read_gets_another(small_model, recorded):
    model, config, documents = small_model(), CONFIGS["adam"], rows(40)
    first = adapted(model, documents, config)
    model.model.layers[-1].updater.trigger.enabled = False
    second = adapted(model, documents, config)
    assert recorded.count == 2  # of chunks after a full window
    assert not torch.equal(first[0], second[0])
    adapted(model, documents, replace(config, betas=(0.5, 0.9)))
    adapted(model, documents, replace(config, seed=3))
    assert recorded.count == 4
    assert len(model._chunk_graphs) == chunk_graphs.GRAPHS
    assert len(copy.deepcopy(model)._chunk_graphs) == 0


def test_weights_at_another_address_get_another(small_model, recorded):
    model, config, documents = small_model(), CONFIGS["adam"], rows(40)
    before = adapted(model, documents, config)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight.mul_(1.5)  # in place: the graph reads it
    changed = adapted(model, documents, config)
    assert recorded.count == 2  # the second one of first chunks
    assert not torch.equal(changed[0], before[0])
    weight.data = weight.data / 1.5
    torch.testing.assert_close(adapted(model, documents, config)[0], before[0])
    assert recorded.count == 3


def test_a_state_that_grows_is_read_without_a_graph(small_model, recorded):
    model, documents = small_model(sliding_window=None), rows(40, 30)
    adapted(model, documents, CONFIGS["adam"])
    assert recorded.count == 0


def test_reasons_for_no_graph(small_model):
    model = small_model()
    assert "not on a GPU" in str(chunk_graphs.refusal(model))
    on_gpu = type("OnGPU", (type(model),), {"device": torch.device("cuda")})
    on_gpu.__module__ = "nirvana.model.nirvana"
    model.__class__ = on_gpu
    assert chunk_graphs.refusal(model) is None
    handle = model.lm_head.register_forward_hook(lambda *given: None)
    assert "hooks" in str(chunk_graphs.refusal(model))
    handle.remove()
    model.model.layers[-1].updater.window_kept = torch.ones(1, 1, 1)
    assert "dropped" in str(chunk_graphs.refusal(model))
    model.model.layers[-1].updater.window_kept = None
    model.lm_head.to("meta")
    assert "several devices" in str(chunk_graphs.refusal(model))
    model = small_model()
    model.__class__ = on_gpu
    get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
    assert "adapters" in str(chunk_graphs.refusal(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [("float32", 2e-3, 1e-4), ("bfloat16", 0.3, 5e-3)]
)
def test_graphs_of_the_packaged_model(dtype, most, mean):
    """Logits in bfloat16 are multiples of 1/16 where a token's -ln p is 8, and steps in another
    order of sums move some of them by one."""
    model, _ = nirvana.load("tiny", "cuda")
    model = model.to(getattr(torch, dtype))
    documents = [torch.randint(4000, (length,)) for length in (900, 513, 700)]
    for config in (AdaptConfig(ALL, chunk=128), AdaptConfig(("norm",), chunk=128, steps=2)):
        for _ in range(2):
            found = adapted(model, documents, config)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(chunks, "refusal", lambda model: "compared with")
                expected = adapted(model, documents, config)
            for a, b in zip(found[:3], expected[:3], strict=True):
                assert (a - b).abs().max() < most
                assert abs(a.mean() - b.mean()) < mean
    assert len([graph for graph in model._chunk_graphs.values() if graph]) == 4
