"""What users of the library expect of inputs, outputs, loading and saving."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, pipeline

from nirvana import NirvanaForCausalLM
from nirvana.packaged import resolve

PACKED = torch.cat([torch.arange(n) for n in (3, 19, 8)])[None].expand(2, -1)

PARTLY_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.bank", "model.norm", "lm_head"), "cpu"),
    **{f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)},
}


@pytest.fixture
def saved(small_model, tmp_path):
    """A small model, the folder it was saved in, tokens, and its logits for them."""
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(61, (2, 30))
    with torch.no_grad():
        return model, tmp_path / "model", tokens, model(tokens).logits


@pytest.mark.parametrize("keep", [1, 7, torch.tensor([0, 5, 29]), torch.tensor([-1])], ids=str)
@torch.no_grad()
def test_logits_to_keep(saved, keep):
    model, _, tokens, logits = saved
    expected = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, expected)


@torch.no_grad()
def test_hidden_states_are_embedding_blocks_and_final_norm(saved):
    model, _, tokens, logits = saved
    blocks = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: blocks.append(output[0]))
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert len(hidden) == len(model.model.layers) + 1
    expected = [model.get_input_embeddings()(tokens), *blocks[:-1], model.model.norm(blocks[-1])]
    for ours, theirs in zip(hidden, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.lm_head(hidden[-1]), logits)
    assert model(tokens).hidden_states is None
    model.config.output_hidden_states = True
    assert torch.equal(model(tokens).hidden_states[2], hidden[2])


@torch.no_grad()
def test_attention_matrices_do_not_exist(saved):
    model, _, tokens, _ = saved
    assert model(tokens, output_attentions=True).attentions is None


@torch.no_grad()
def test_tuples_in_place_of_outputs(saved):
    model, _, tokens, logits = saved
    out = model(tokens, labels=tokens, use_cache=True, output_hidden_states=True)
    loss, first, cache, hidden = model(
        tokens, labels=tokens, use_cache=True, output_hidden_states=True, return_dict=False
    )
    assert torch.equal(loss, out.loss)
    assert torch.equal(first, logits)
    assert cache.get_seq_length(2) == 30
    assert torch.equal(hidden[-1], out.hidden_states[-1])
    (alone,) = model(tokens, use_cache=False, return_dict=False)
    assert torch.equal(alone, logits)
    (trunk,) = model.model(tokens, use_cache=False, return_dict=False)
    assert torch.equal(trunk, hidden[-1])


@pytest.mark.parametrize("positions", [None, PACKED], ids=["plain", "packed"])
def test_embeddings_in_place_of_tokens_carry_gradients(small_model, positions):
    """Of every token that the loss depends on, and of no other."""
    model, tokens = small_model(), torch.randint(61, (2, 30))
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, position_ids=positions).logits
    assert torch.equal(logits, model(tokens, position_ids=positions).logits)
    logits[:, 21].sum().backward()
    reached = embeds.grad.abs().amax(-1) > 1e-10
    first = 0 if positions is None else 3
    expected = torch.zeros(2, 30, dtype=torch.bool)
    expected[:, first:22] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@torch.no_grad()
def test_loading_in_bfloat16(saved, argument):
    folder, tokens = resolve("tiny"), torch.randint(10, 8192, (2, 300))
    model = AutoModelForCausalLM.from_pretrained(folder, **{argument: torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(folder, **{argument: torch.float32})(tokens).logits
    assert 0 < (logits - exact).norm() / exact.norm() < 0.02
    stored = AutoModelForCausalLM.from_pretrained(saved[1], dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "where",
    ["cpu", "auto", {"": "cpu"}, PARTLY_ON_DISK],
    ids=["cpu", "auto", "map", "partly on disk"],
)
@torch.no_grad()
def test_device_maps(saved, tmp_path, where):
    pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    model, folder, tokens, logits = saved
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=where, dtype=torch.float64, offload_folder=tmp_path / "offload"
    )
    on_disk = [name for name, p in loaded.named_parameters() if p.is_meta]
    assert bool(on_disk) == ("disk" in str(where))
    # "auto" takes a GPU where there is one; a model that lies on one device moves no inputs.
    given = tokens.to("cuda" if where == "auto" and torch.cuda.is_available() else "cpu")
    torch.testing.assert_close(loaded(given).logits.cpu(), logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(given, **settings).cpu(), model.generate(tokens, **settings))


@torch.no_grad()
def test_weights_into_a_model_made_on_meta(saved):
    """Nothing but the saved tensors is needed: no buffer that only construction fills."""
    model, folder, tokens, logits = saved
    with torch.device("meta"):
        empty = NirvanaForCausalLM(model.config)
    missing, unexpected = empty.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False, assign=True
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    empty.tie_weights()
    torch.testing.assert_close(empty.eval()(tokens).logits, logits)


@torch.no_grad()
def test_shards(saved, tmp_path):
    model, _, tokens, logits = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype="auto")
    assert torch.equal(loaded(tokens).logits, logits)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_tied_and_untied_heads(small_model, tied, tmp_path):
    model = small_model(tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight.normal_()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    tokens = torch.randint(61, (2, 9))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 40])
@torch.no_grad()
def test_resized_vocabulary(small_model, tied, size, tmp_path):
    model, tokens = small_model(tie_word_embeddings=tied), torch.randint(40, (2, 9))
    expected = model(tokens).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.get_output_embeddings().out_features == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    both = min(size, 61)
    out = model(tokens, labels=tokens)
    torch.testing.assert_close(out.logits[..., :both], expected[..., :both])
    assert out.logits.shape[-1] == size
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(loaded(tokens, labels=tokens).loss, out.loss)
    new = torch.full((1, 3), size - 1)
    assert loaded.generate(new, max_new_tokens=2, pad_token_id=0).shape == (1, 5)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_of_other_kinds_is_refused(saved, attention):
    with pytest.raises(ValueError, match="NirvanaForCausalLM does not support"):
        AutoModelForCausalLM.from_pretrained(saved[1], attn_implementation=attention)


def test_text_generation_pipeline():
    write = pipeline("text-generation", model=str(resolve("tiny")), dtype=torch.float32)
    texts = ["The court held that", "In the"]
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = write(texts, batch_size=2, **settings)
    assert [out[0]["generated_text"] for out in together] == [
        write(text, **settings)[0]["generated_text"] for text in texts
    ]


def test_the_bank_cannot_be_offloaded(saved, tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    where = {**PARTLY_ON_DISK, "model.bank": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        saved[1], device_map=where, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        loaded(saved[2])


@pytest.mark.parametrize("variant", [{}, {"branches": "linear"}, {"branches": "window"}], ids=str)
def test_a_forward_on_meta_counts_the_work(small_model, variant):
    """Shapes, memory and FLOPs of a model without its weights, forward and backward."""
    model, counts = small_model(**variant), []
    with torch.device("meta"):
        empty = NirvanaForCausalLM(model.config).to(model.dtype)
    for each, where in ((model, "cpu"), (empty, "meta")):
        tokens = torch.zeros(2, 20, dtype=torch.long, device=where)
        with FlopCounterMode(display=False) as counter:
            out = each(tokens, labels=tokens)
            out.loss.backward()
        assert out.logits.shape == (2, 20, 61)
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0][torch.ops.aten.mm] == counts[1][torch.ops.aten.mm] > 0


@pytest.mark.parametrize("variant", [{}, {"branches": "linear"}, {"branches": "window"}], ids=str)
def test_a_batch_without_rows(small_model, variant):
    """As a filter leaves behind: empty results, and gradients of zero."""
    model, none = small_model(**variant), torch.zeros(0, 20, dtype=torch.long)
    out = model(none, attention_mask=none, use_cache=True)
    assert out.logits.shape == (0, 20, 61)
    assert model(none, past_key_values=out.past_key_values).logits.shape == (0, 20, 61)
    state = model(none, return_state=True).state
    assert model(none, state=state).logits.shape == (0, 20, 61)
    model(none).logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
