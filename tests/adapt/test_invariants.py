"""What holds for every adaptation of a frozen model to samples, in float64 unless stated."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import nirvana
from nirvana.adapt import AdaptConfig, adapt, adapt_documents
from nirvana.adapt.adaptation import default_config, start_optimizer
from nirvana.adapt.chunks import read_documents
from nirvana.adapt.config import GROUPS
from nirvana.adapt.parameters import TaskHooks, task_layout
from nirvana.errors import InputError
from nirvana.generate.graph_decoder import Decoder

ALL = tuple(GROUPS)


def config(**changes) -> AdaptConfig:
    return AdaptConfig(**{"parameters": ALL, "chunk": 7, "rank": 3, **changes})


def texts(*lengths: int, vocabulary: int = 61) -> list[torch.Tensor]:
    """Repetitive texts, of which there is something to learn."""
    found = []
    for length in lengths:
        phrase = torch.randint(vocabulary, (5,))
        found.append(phrase.repeat(length // 5 + 1)[:length])
    return found


FOREIGN = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}


def likelihoods(model, row: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=row[None]).logits[0, :-1]
    return -logits.log_softmax(-1).gather(1, row[1:, None])[:, 0]


@pytest.fixture(scope="module")
def tiny():
    """The packaged model, and two texts of a kind that it was not trained on."""
    model, tokenizer = nirvana.load("tiny")
    sources = [inspect.getsource(each) for each in (inspect, qwen3_next)]
    rows = [torch.tensor(tokenizer(text[-1500:]).input_ids) for text in sources]
    return model, rows


def test_it_learns(tiny):
    model, rows = tiny
    frozen, _ = adapt_documents(model, rows, AdaptConfig(steps=0))
    for group in ALL:
        learned, _ = adapt_documents(model, rows, AdaptConfig(parameters=(group,), chunk=64))
        for before, after in zip(frozen, learned, strict=True):
            torch.testing.assert_close(before[:64], after[:64], rtol=1e-4, atol=1e-4)
            assert after[300:].sum() < 0.995 * before[300:].sum(), group


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_whatever_the_caller_computes_in(small_model, mode):
    model, (row,) = small_model(), texts(30)
    expected = adapt(model, row[None], config=config())
    with mode():
        found = adapt(model, row[None] + 0, config=config())
    assert torch.equal(found.nll, expected.nll)
    assert torch.equal(found.task.values, expected.task.values)


def test_turned_steps_unlearn(tiny):
    model, rows = tiny
    scores = [
        torch.cat(adapt_documents(model, rows, AdaptConfig(("norm",), lr={"norm": lr}))[0]).mean()
        for lr in (0.01, 0.0, -0.01)
    ]
    assert scores[0] < scores[1] < scores[2]


def test_task_parameters_of_zero_are_the_frozen_model_to_the_bit(small_model):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = small_model().to(dtype)
        layout = task_layout(model, config())
        tokens = torch.randint(61, (2, 30))
        plain = model(tokens).logits
        with TaskHooks(model, layout) as hooks:
            for rows in (1, 2):
                hooks.set(torch.zeros(rows, sum(layout.sizes)))
                assert torch.equal(model(tokens).logits, plain)
        assert torch.equal(model(tokens).logits, plain)


def test_no_steps_are_the_frozen_model_to_the_bit(small_model):
    model, (row,) = small_model(), texts(40)
    (scores,), task = adapt_documents(model, [row], config(steps=0))
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start in range(0, 39, 7):
            part = row[start : start + 7]
            part = torch.nn.functional.pad(part, (0, 7 - len(part)))
            logits = model(input_ids=part[None], cache=cache, use_cache=True).logits[0]
            targets = torch.nn.functional.pad(row[start + 1 : start + 8], (0, 7))[:7]
            found.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        assert torch.equal(scores, torch.cat(found)[:39])
        torch.testing.assert_close(scores, likelihoods(model, row))
    assert not task.values.any()


def test_a_score_never_depends_on_what_it_predicts(small_model):
    """Token t changes no score before t, and the task parameters before its chunk not at all."""
    model, (row,) = small_model(), texts(60)
    (scores,), _ = adapt_documents(model, [row], config())
    for place in (7, 8, 20, 59):
        changed = row.clone()
        changed[place] = (row[place] + 1) % 61
        (other,), _ = adapt_documents(model, [changed], config())
        assert torch.equal(scores[: place - 1], other[: place - 1])
        assert not torch.equal(scores[place - 1 :], other[place - 1 :])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_row_is_the_row_alone(small_model, optimizer):
    """Longer, shorter and other rows beside it change neither its scores nor its parameters."""
    model, rows = small_model(), texts(50, 9, 33, 2, 1)
    settings = config(optimizer=optimizer, steps=2, lr=dict.fromkeys(ALL, 0.01))
    together, task = adapt_documents(model, rows, settings)
    for number, row in enumerate(rows):
        (alone,), own = adapt_documents(model, [row], settings)
        torch.testing.assert_close(together[number], alone)
        torch.testing.assert_close(task.row(number).values, own.values)
        assert len(alone) == len(row) - 1
    assert not task.values[4].any()


def test_packed_documents_share_nothing(small_model):
    model, rows = small_model(), texts(20, 31, 9)
    packed = torch.cat(rows)[None]
    borders = torch.tensor([0, 20, 51, 60])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    numbers = torch.cat([torch.full((len(row),), i + 1) for i, row in enumerate(rows)])[None]
    forms = (
        {"cu_seqlens": borders},
        {"position_ids": positions},
        {"seq_idx": numbers},
        {"attention_mask": numbers},
    )
    scores, task = adapt_documents(model, rows, config())
    for form in forms:
        found = adapt(model, packed, **form, config=config())
        torch.testing.assert_close(found.task.values, task.values)
        for sample, score in zip(found.samples, scores, strict=True):
            assert found.nll[0, sample.columns[0]] == 0
            torch.testing.assert_close(found.nll[0, sample.columns[1:]], score)


def test_padding_changes_nothing(small_model):
    model, rows = small_model(), texts(20, 31)
    scores, task = adapt_documents(model, rows, config())
    tokens = torch.full((2, 40), 5)
    mask = torch.zeros(2, 40, dtype=torch.long)
    tokens[0, 20:], mask[0, 20:] = rows[0], 1  # left
    tokens[1, :31], mask[1, :31] = rows[1], 1  # right
    found = adapt(model, tokens, mask, config=config())
    torch.testing.assert_close(found.task.values, task.values)
    torch.testing.assert_close(found.nll[0, 21:], scores[0])
    torch.testing.assert_close(found.nll[1, 1:31], scores[1])
    assert not found.nll[mask == 0].any()


def test_the_gradient_is_that_of_the_chunk_from_a_fixed_state(small_model):
    """Steps of plain descent, against central differences of the loss of one chunk after another:
    the state before a chunk is a constant."""
    model, (row,) = small_model(), texts(15)
    settings = config(optimizer="sgd", lr=dict.fromkeys(ALL, 0.5))
    _, task = adapt_documents(model, [row], settings)
    layout = task_layout(model, settings)
    values = torch.zeros(1, sum(layout.sizes), dtype=torch.float64)
    step = 1e-6 * torch.eye(values.shape[1], dtype=torch.float64)  # a row for each number
    state = DynamicCache(config=model.config)
    for part in (row[:8], row[7:]):
        above, _ = _chunk_loss(model, layout, values + step, part, state)
        below, _ = _chunk_loss(model, layout, values - step, part, state)
        _, state = _chunk_loss(model, layout, values.expand_as(step), part, state)
        values = values - 0.5 * (above - below) / 2e-6
    torch.testing.assert_close(task.values, values, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def _chunk_loss(model, layout, values, part, state):
    """The loss of a chunk with each row of task parameters, and the state after it."""
    state = copy.deepcopy(state)
    rows = part.expand(len(values), -1)
    with TaskHooks(model, layout) as hooks:
        hooks.set(values)
        logits = model(input_ids=rows[:, :-1], cache=state, use_cache=True).logits
    nll = torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none")
    return nll.sum(1) / 7, state


def test_weights_and_their_flags_stay(small_model):
    model, (row,) = small_model(), texts(30)
    weights = copy.deepcopy(model.state_dict())
    model.model.norm.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    adapt_documents(model, [row], config())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_keeps_small_changes(small_model):
    """In bfloat16 1 + 0.001 is 1: the task parameters are float32 and so is what they multiply."""
    model = small_model().bfloat16()
    rows = texts(200, 200)
    frozen, _ = adapt_documents(model, rows, config(steps=0))
    learned, task = adapt_documents(model, rows, config(parameters=("norm",), lr={"norm": 0.0005}))
    assert task.values.dtype == torch.float32
    assert 0 < task.values.abs().max() < 0.05
    for before, after in zip(frozen, learned, strict=True):
        assert after[100:].mean() < before[100:].mean()


def test_rows_of_task_parameters_fit_the_batch(small_model):
    model = small_model()
    layout = task_layout(model, config())
    with TaskHooks(model, layout) as hooks:
        hooks.set(torch.zeros(3, sum(layout.sizes)))
        with pytest.raises(ValueError, match="3 rows of task parameters for a batch of 2 rows"):
            model(torch.zeros(2, 4, dtype=torch.long))


def test_documents_may_share_one_set(small_model):
    """The gradient of a shared set is the mean of the documents' gradients."""
    model, rows = small_model(), texts(8, 8)
    settings = config(optimizer="sgd", lr=dict.fromkeys(ALL, 0.1))
    _, own = adapt_documents(model, rows, settings)
    shared = start_optimizer(model, settings)
    read_documents(model, rows, shared)
    torch.testing.assert_close(shared.values[0], own.values.mean(0))


@pytest.fixture(params=["llama", "qwen3-next"])
def foreign(request, monkeypatch):
    """A model of the library: states that are keys, or those of a delta rule and convolutions."""
    if request.param == "llama":
        shape = {"num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**FOREIGN, **shape))
    else:
        # Where fla is installed the library would call its GPU kernels by these names.
        for name in (
            "torch_chunk_gated_delta_rule",
            "torch_recurrent_gated_delta_rule",
            "causal_conv1d_fn",
            "causal_conv1d_update",
        ):
            monkeypatch.setattr(qwen3_next, name, inspect.unwrap(getattr(qwen3_next, name)))
        heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "head_dim": 16}
        sizes = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_hidden_layers": 4}
        plain = {"mlp_only_layers": [0, 1, 2, 3], "num_experts": 2, "num_experts_per_tok": 1}
        settings = Qwen3NextConfig(**FOREIGN, **heads, **sizes, **plain)
        model = qwen3_next.Qwen3NextForCausalLM(settings)
    return model.eval()


def test_any_causal_model_of_the_library(foreign):
    rows = texts(100, 57)
    settings = config(parameters=("norm", "low_rank"))
    layers = foreign.config.num_hidden_layers
    assert len(task_layout(foreign, settings).tensors) == 2 * layers + 1 + layers
    frozen, _ = adapt_documents(foreign, rows, config(parameters=("norm",), steps=0))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(frozen[1], likelihoods(foreign, rows[1]).double(), **close)
    learned, task = adapt_documents(foreign, rows, settings)
    (alone,), own = adapt_documents(foreign, rows[1:], settings)
    torch.testing.assert_close(learned[1], alone, **close)
    torch.testing.assert_close(task.row(1).values, own.values, **close)
    assert learned[0][50:].mean() < frozen[0][50:].mean()
    assert default_config(foreign).parameters == ("norm",)


def test_a_group_that_a_model_lacks_is_refused(small_model):
    with pytest.raises(InputError, match="no task parameters of the group fast"):
        adapt_documents(small_model(gate="input"), texts(9), config())


def test_training_mode_and_compiled_blocks_are_refused(small_model):
    model = small_model()
    with pytest.raises(ValueError, match="training mode"):
        adapt_documents(model.train(), texts(9), config())
    model.eval().model.layers[0].compile()
    with pytest.raises(ValueError, match="compiled"):
        adapt_documents(model, texts(9), config())


def test_a_decoder_does_not_pass_over_task_parameters(small_model):
    model, (row,) = small_model(), texts(30)
    task = adapt(model, row[None], config=config()).task
    with task.applied(model), pytest.raises(ValueError, match="reads the weights alone"):
        Decoder(model)


def test_memory_is_that_of_a_chunk(small_model):
    """What backward saves does not grow with the length of a sample."""
    model, saved = small_model(), []

    def pack(x):
        saved.append(x.numel())
        return x

    for length in (29, 57, 113):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            adapt_documents(model, texts(length), config(chunk=28))
        saved.append(0)
    sizes, chunks = [0], []
    for number in saved:
        sizes.append(sizes[-1] + number)
        if number == 0:
            chunks.append(sizes[-1])
            sizes = [0]
    per_chunk = [total / (2**i) for i, total in enumerate(chunks)]
    assert per_chunk[2] < 1.2 * per_chunk[1]


def test_generation_after_compiled_generation_notices_the_task(small_model):
    """`generate` compiles a forward for a static cache; hooks that come later must count."""
    model = small_model().float()
    (row,) = texts(40)
    found = adapt(model, row[None], config=config(lr=dict.fromkeys(ALL, 0.1)))
    model.generation_config.compile_config = None
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def written():
        return model.generate(row[None, :10], cache_implementation="static", **how)[0].tolist()

    before = written()
    with found.task.applied(model):
        during = written()
        dynamic = model.generate(row[None, :10], **how)[0].tolist()
    assert during == dynamic
    assert written() == before
