"""Every way of `generate` ends in what the forward pass gives, or in an error with its reason."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

GREEDY = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
VARIANTS = {
    "memory": {},
    "no memory, rotary": {"trigger_decay": 0.0, "rope_theta": 10000.0},
    "no window": {"sliding_window": None, "trigger_decay": 0.9},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def padded_prompts() -> dict[str, torch.Tensor]:
    """Prompts of 3, 9 and 20 tokens (the window is 12), padded on the left."""
    tokens = torch.randint(1, 61, (3, 20))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((17, 11, 0)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


@variants
@pytest.mark.parametrize(
    "other",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
    ],
    ids=["static", "no cache", "prefill in chunks", "both"],
)
def test_greedy_is_the_same_whatever_the_cache(small_model, variant, other):
    model, prompts = small_model(**variant), padded_prompts()
    expected = model.generate(**prompts, **GREEDY)
    assert torch.equal(model.generate(**prompts, **GREEDY, **other), expected)


@variants
def test_compiled_decoding_is_eager(small_model, variant):
    """As the library does by itself on GPUs: the prompt eagerly, then one whole graph a token."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    model = small_model(**variant, num_hidden_layers=3)
    how = CompileConfig(backend=backend, mode="default", fullgraph=True)
    how._compile_all_devices = True  # the library compiles on a CPU only for this flag
    for _ in range(2):
        prompts = padded_prompts()
        compiled = model.generate(
            **prompts, **GREEDY, cache_implementation="static", compile_config=how
        )
        assert torch.equal(compiled, model.generate(**prompts, **GREEDY))
        # The window's cache counts in Python: one graph for its first length, one for any.
        assert 1 <= len(graphs) <= 2


@variants
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_are_those_without_a_cache(small_model, variant, cache):
    model, prompts = small_model(**variant), padded_prompts()
    settings = {
        **GREEDY,
        "num_beams": 3,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected = model.generate(**prompts, **settings, use_cache=False)
    out = model.generate(**prompts, **settings, cache_implementation=cache)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.sequences_scores, expected.sequences_scores)
    changes = out.beam_indices[:, 1:] != out.beam_indices[:, :-1]
    assert changes.sum() > 20  # beams did take over from one another, so states had to move


def test_sampling_is_that_without_a_cache(small_model):
    model, prompts = small_model(), padded_prompts()
    settings = {**GREEDY, "do_sample": True, "top_k": 0, "num_return_sequences": 4}
    torch.manual_seed(5)
    expected = model.generate(**prompts, **settings, use_cache=False)
    torch.manual_seed(5)
    sampled = model.generate(**prompts, **settings)
    assert torch.equal(sampled, expected)
    assert len(sampled.unique(dim=0)) == len(sampled) == 12


def test_logits_while_generating_are_those_of_the_forward(small_model):
    model, tokens = small_model(), torch.randint(1, 61, (2, 9))
    out = model.generate(tokens, **GREEDY, return_dict_in_generate=True, output_logits=True)
    expected = model(out.sequences).logits[:, 8:-1]
    torch.testing.assert_close(
        torch.stack(out.logits, dim=1).to(expected), expected, rtol=1e-5, atol=1e-5
    )


def test_embeddings_in_place_of_a_prompt(small_model):
    model, prompts = small_model(), padded_prompts()
    tokens = prompts.pop("input_ids")
    from_ids = model.generate(tokens, **prompts, **GREEDY)
    embeds = model.get_input_embeddings()(tokens)
    from_embeds = model.generate(inputs_embeds=embeds, **prompts, **GREEDY)
    assert torch.equal(from_embeds, from_ids[:, tokens.shape[1] :])


@variants
def test_a_row_that_has_ended_leaves_the_others_alone(small_model, variant):
    model, prompts = small_model(**variant), padded_prompts()
    free = model.generate(**prompts, **GREEDY)[:, 20:]
    eos = int(free[1, 4])
    out = model.generate(**prompts, **GREEDY, eos_token_id=eos)[:, 20:]
    for row, expected in zip(out, free, strict=True):
        ends = (expected == eos).nonzero()[:, 0].tolist()
        length = ends[0] + 1 if ends else len(expected)
        assert torch.equal(row[:length], expected[: len(row)][:length])
        assert not row[length:].any()


@variants
def test_a_chat_goes_on_from_its_cache(small_model, variant):
    """Two continuations of one conversation, one token and many, as if read from the start."""
    model, prompts = small_model(**variant), padded_prompts()
    first = model.generate(**prompts, **GREEDY, return_dict_in_generate=True)
    for length in (1, 15):
        dialogue = torch.cat([first.sequences, torch.randint(1, 61, (3, length))], dim=1)
        mask = torch.nn.functional.pad(
            prompts["attention_mask"], (0, dialogue.shape[1] - 20), value=1
        )
        past = copy.deepcopy(first.past_key_values)
        onwards = model.generate(dialogue, attention_mask=mask, past_key_values=past, **GREEDY)
        assert torch.equal(onwards, model.generate(dialogue, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful"),
        ({"assistant_model": None}, "assisted generation is not supported with stateful"),
        ({"assistant_early_exit": 2}, "assisted generation is not supported with stateful"),
        ({"cache_implementation": "quantized"}, "only supported for models with only full att"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires `trust_remote_code"),
        ({"dola_layers": "low"}, "Dola Generation requires `trust_remote_code"),
        ({"num_beams": 4, "force_words_ids": [[3]]}, "Constrained Beam Search requires `trust"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_stateful_model_cannot_do_is_refused(small_model, settings, message):
    model = small_model()
    if "assistant_model" in settings:
        settings = {"assistant_model": small_model()}
    with pytest.raises(ValueError, match=message):
        model.generate(torch.randint(1, 61, (1, 9)), **GREEDY, **settings)


def test_paged_batching_is_refused(small_model):
    settings = GenerationConfig(max_new_tokens=2, eos_token_id=1)
    with pytest.raises(ValueError, match="continuous batching is not possible"):
        small_model().generate_batch([[1, 2, 3]], generation_config=settings)


def test_a_cache_cannot_be_cut_back(small_model):
    cache = small_model()(torch.randint(1, 61, (1, 9)), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-1)


class NoStream(nullcontext):
    """In a CUDA stream's place: with it an offloaded cache does on a CPU all but move memory."""

    def wait_stream(self, other):
        pass


@pytest.fixture(params=["offloaded", "offloaded_static"])
def offloaded(request, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    return {"cache_implementation": request.param, "disable_compile": True}


@pytest.mark.parametrize("prelude", [0, 2])
def test_offloaded_keys_of_full_attention_are_the_same(small_model, offloaded, prelude):
    model = small_model(branches="window", sliding_window=None, num_prelude_layers=prelude)
    prompts = padded_prompts()
    expected = model.generate(**prompts, **GREEDY)
    assert torch.equal(model.generate(**prompts, **GREEDY, **offloaded), expected)


@pytest.mark.parametrize(
    "variant", [*VARIANTS.values(), {"branches": "linear"}, {"branches": "window"}], ids=str
)
def test_offloading_anything_else_is_refused(small_model, offloaded, variant):
    with pytest.raises(ValueError, match="only for models with full attention layers"):
        small_model(**variant).generate(**padded_prompts(), **GREEDY, **offloaded)
