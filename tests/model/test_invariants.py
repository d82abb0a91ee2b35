"""Invariants of the whole model: causality, decoding, packing, padding, batch order, saving."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
)

from helpers.adopted_settings import ADOPTED
from nirvana import InputError, NirvanaConfig, NirvanaForCausalLM, ops, preset
from nirvana.model.config import PRESETS

VARIANTS = [
    {},
    {"trigger_decay": 0.0},
    {"interpolation": "independent", "trigger_gradient": "truncated", "sliding_window": None},
    {"rope_theta": 10000.0, "trigger_decay": [0.0, 0.9], "conv_size": 2},
    {"num_prelude_layers": 0, "tie_word_embeddings": False, "sliding_window": 2},
    {"trigger_step": "normalised"},
    {"gate": "input"},
    {"gate": "constant", "interpolation": "independent"},
    {"branches": "linear"},
    {"branches": "window", "num_prelude_layers": 0, "rope_theta": 10000.0, "sliding_window": None},
    {"branches": "window", "num_prelude_layers": 1},
    *ADOPTED,
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))


def tokens_of(B: int, T: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randint(1, 61, (B, T), generator=generator, device="cpu")
    return tokens.to(torch.get_default_device())


@pytest.mark.usefixtures("device")
@variants
@pytest.mark.parametrize("t", [0, 17, 63, 64, 79])
@torch.no_grad()
def test_causality(small_model, variant, t):
    model = small_model(**variant)
    tokens = tokens_of(2, 80)
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % 61
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
    assert (after[:, t] - before[:, t]).abs().min(-1).values.max() > 0


@pytest.mark.usefixtures("device")
@variants
@pytest.mark.parametrize("n", [1, 2, 3, 11, 12, 13, 30])
@torch.no_grad()
def test_prefill_and_decode_is_forward(small_model, variant, n):
    """After one token all others are decoded; after n, as many as replace the whole window of 12
    and one more."""
    model = small_model(**variant)
    T = 45 if n == 1 else n + 13
    tokens = tokens_of(2, T)
    expected = model(tokens).logits
    out = model(tokens[:, :n], use_cache=True)
    parts = [out.logits]
    for t in range(n, T):
        out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


@variants
@torch.no_grad()
def test_reading_in_pieces_is_forward(small_model, variant):
    model = small_model(**variant)
    tokens = tokens_of(2, 150)
    cache, parts = None, []
    for piece in tokens.split([1, 2, 70, 5, 64, 8], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits)


@pytest.mark.usefixtures("device")
@variants
@torch.no_grad()
def test_packed_is_separate(small_model, variant):
    model = small_model(**variant)
    lengths = [1, 40, 66, 2, 13]
    tokens = tokens_of(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=positions).logits
    separate = [model(piece).logits for piece in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1))


@pytest.mark.parametrize("borders", [[0, 4, 21], [0, 4, 19], [2, 4, 20]])
def test_borders_that_are_not_the_batch_are_refused(small_model, borders):
    message = f"cu_seqlens goes from {borders[0]} to {borders[-1]}, not from 0 to 2 x 10 tokens"
    with pytest.raises(ValueError, match=message):
        small_model()(torch.randint(61, (2, 10)), cu_seqlens=torch.tensor(borders))


@pytest.mark.usefixtures("device")
@variants
@pytest.mark.parametrize(
    ("backend", "name", "rows"),
    [
        ("reference", "cu_seqlens", 1),
        ("reference", "cu_seq_lens_q", 2),
        ("chunked", "cu_seqlens", 2),
        ("chunked", "cu_seq_lens_q", 1),
    ],
)
@torch.no_grad()
def test_packed_by_borders_is_separate(small_model, variant, backend, name, rows):
    """The borders count through the batch laid out as one row; a row ends a sample anyway. Every
    two of backend, name and rows meet once."""
    model = small_model(**variant)
    lengths = [1, 20, 10, 2, 26, 3]  # the third ends with the first row, if there are two
    tokens = tokens_of(1, sum(lengths))
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with ops.use_backend(backend):
        packed = model(tokens.view(rows, -1), **{name: borders}).logits
        separate = [model(piece).logits for piece in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed.view(1, len(tokens[0]), -1), torch.cat(separate, dim=1))


def test_the_librarys_flattening_collator_packs(small_model):
    model, lengths = small_model(), [5, 20, 1, 17]
    rows = [{"input_ids": tokens_of(1, n, seed=n)[0].tolist()} for n in lengths]
    for options in ({}, {"return_flash_attn_kwargs": True, "return_position_ids": False}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(rows)
        assert ("position_ids" in batch) != bool(options)
        packed = model(**batch).logits
        separate = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
        torch.testing.assert_close(packed, torch.cat(separate, dim=1))


@variants
@pytest.mark.parametrize("by", ["position_ids", "cu_seqlens"])
@torch.no_grad()
def test_reading_packed_samples_in_pieces_is_separate(small_model, variant, by):
    """Cached keys of samples before the current one are not seen, whatever the window."""
    model = small_model(**variant)
    lengths = [7, 23, 5, 15]
    tokens = tokens_of(1, 50)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    separate = [model(piece).logits for piece in tokens.split(lengths, dim=1)]
    first = {"position_ids": positions[:, :33]}
    if by == "cu_seqlens":
        first = {"cu_seqlens": torch.tensor([0, 7, 30, 33])}
    out = model(tokens[:, :33], use_cache=True, **first)
    parts = [out.logits]
    for start, end in ((33, 34), (34, 38), (38, 39), (39, 50)):
        where = {"position_ids": positions[:, start:end]}
        out = model(tokens[:, start:end], past_key_values=out.past_key_values, **where)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), torch.cat(separate, dim=1))


@variants
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_goes_on_with_the_last_packed_sample(small_model, variant, cache):
    model, tokens = small_model(**variant), tokens_of(2, 25)
    positions = torch.cat([torch.arange(20), torch.arange(5)]).expand(2, -1)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    settings["cache_implementation"] = cache
    packed = model.generate(tokens, position_ids=positions, **settings)[:, 25:]
    torch.testing.assert_close(packed, model.generate(tokens[:, 20:], **settings)[:, 5:])


@variants
def test_gradients_of_packed_samples_are_their_sum(small_model, variant):
    model = small_model(**variant)
    lengths = [1, 40, 66, 2, 13]
    tokens = tokens_of(1, sum(lengths))

    def gradients(*runs):
        model.zero_grad()
        for piece, settings in runs:
            model(piece, **settings).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    borders = torch.tensor([0, *lengths]).cumsum(0)
    packed = gradients((tokens, {"cu_seqlens": borders}))
    separate = gradients(*((piece, {}) for piece in tokens.split(lengths, dim=1)))
    torch.testing.assert_close(packed, separate)


@torch.no_grad()
def test_packing_also_holds_when_gradients_are_on(small_model):
    model = small_model()
    tokens, positions = tokens_of(2, 30), torch.arange(15).repeat(2)[None].expand(2, -1)
    with torch.enable_grad():
        packed = model(tokens, position_ids=positions).logits
    torch.testing.assert_close(packed[:, 15:], model(tokens[:, 15:]).logits)


@variants
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_no_padding(small_model, variant, side):
    model = small_model(**variant)
    lengths = [1, 3, 17, 40]
    rows = [tokens_of(1, n, seed=n)[0] for n in lengths]
    tokens = torch.full((4, 40), 7)
    mask = torch.zeros(4, 40, dtype=torch.long)
    for row, text in enumerate(rows):
        where = slice(40 - len(text), 40) if side == "left" else slice(0, len(text))
        tokens[row, where], mask[row, where] = text, 1
    logits = model(tokens, attention_mask=mask).logits
    for row, text in enumerate(rows):
        torch.testing.assert_close(logits[row][mask[row].bool()], model(text[None]).logits[0])


@variants
@torch.no_grad()
def test_left_padded_generation_is_unpadded(small_model, variant):
    model = small_model(**variant)
    short, long = tokens_of(1, 2, seed=1), tokens_of(1, 20, seed=2)
    settings = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(x, **settings)[0, x.shape[1] :] for x in (short, long)]
    tokens = torch.cat([torch.cat([torch.zeros(1, 18).long(), short], 1), long])
    mask = torch.ones_like(tokens)
    mask[0, :18] = 0
    together = model.generate(tokens, attention_mask=mask, **settings)[:, 20:]
    torch.testing.assert_close(together, torch.stack(alone))


@torch.no_grad()
def test_generation_repeats_the_forward_argmax(small_model):
    model = small_model()
    tokens = tokens_of(2, 9)
    generated = model.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model(generated).logits.argmax(-1)
    torch.testing.assert_close(generated[:, 9:], expected[:, 8:-1])


@torch.no_grad()
def test_permuting_the_batch_permutes_the_result(small_model):
    model = small_model()
    tokens, order = tokens_of(5, 33), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(model(tokens[order]).logits, model(tokens).logits[order])


@variants
@torch.no_grad()
def test_save_and_load(small_model, variant, tmp_path):
    model = small_model(**variant)
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    tokens = tokens_of(2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is NirvanaForCausalLM
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == loaded.config.to_dict()
    trunk = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(
        trunk(tokens).last_hidden_state, model.model(tokens).last_hidden_state
    )


def test_construction_on_meta_allocates_nothing():
    with torch.device("meta"):
        model = NirvanaForCausalLM(preset("1.3b"))
    assert all(p.is_meta for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    assert 1.36e9 < count < 1.40e9


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 5, 6), ("60m", 50, 70)])
def test_preset_sizes(name, low, high):
    with torch.device("meta"):
        model = NirvanaForCausalLM(preset(name))
    assert low * 1e6 < sum(p.numel() for p in model.parameters()) < high * 1e6


@torch.no_grad()
def test_state_does_not_grow_with_the_context(small_model):
    model = small_model()
    sizes = []
    for T in (50, 500):
        cache = model(tokens_of(1, T), use_cache=True).past_key_values
        sizes.append(
            sum(
                x.numel()
                for layer in cache.layers
                for x in (
                    *layer.conv_states.values(),
                    *layer.recurrent_states.values(),
                    getattr(layer, "keys", None),
                    getattr(layer, "values", None),
                )
                if x is not None
            )
        )
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 50),
        ("num_prelude_layers", 4),
        ("sliding_window", 1),
        ("trigger_decay", 1.5),
        ("trigger_lr", [0.1]),
        ("conv_size", 1),
        ("bank_size", 0),
        ("num_key_value_heads", 2),
        ("num_sinks", -1),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),  # without rope_theta
    ],
)
def test_impossible_configurations_are_named(field, value):
    settings = {"num_hidden_layers": 4, "trigger_decay_learnable": False, field: value}
    with pytest.raises(InputError, match=rf"^preset tiny: {field} = .* must be [^\n]*$"):
        preset("tiny", **settings)
    with pytest.raises(StrictDataclassError, match=field):
        NirvanaConfig(**{**PRESETS["tiny"], **settings})


def test_unknown_preset_lists_the_presets():
    with pytest.raises(InputError, match=r"unknown preset 'huge'.*tiny, 60m, 340m, 1\.3b"):
        preset("huge")


def test_ids_and_embeddings_exclude_each_other(small_model):
    model = small_model()
    tokens = tokens_of(1, 5)
    with pytest.raises(ValueError, match="exactly one"):
        model.model(tokens, inputs_embeds=model.model.embed_tokens(tokens))
    a = model(inputs_embeds=model.model.embed_tokens(tokens)).logits
    torch.testing.assert_close(a, model(tokens).logits)


def test_labels_give_the_shifted_cross_entropy(small_model):
    model = small_model()
    tokens = tokens_of(2, 15)
    out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss.float(), expected)


def test_the_loss_needs_no_logits(small_model):
    model = small_model()
    tokens = tokens_of(2, 15)
    labels = tokens.clone()
    labels[0, :6] = -100
    for how in ({}, {"num_items_in_batch": 7}, {"shift_labels": labels.roll(-1, 1)}):
        expected = model(tokens, labels=labels, **how)
        lean = model(tokens, labels=labels, skip_logits=True, **how)
        assert lean.logits is None
        assert lean.past_key_values is None
        torch.testing.assert_close(lean.loss.float(), expected.loss.float())
    with pytest.raises(ValueError, match="without labels"):
        model(tokens, skip_logits=True)


def test_gradient_checkpointing_changes_nothing(small_model):
    model = small_model().train()
    tokens = tokens_of(2, 40)
    model(tokens, labels=tokens).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_default_config_is_the_1_3b_model():
    default, big = NirvanaConfig(), preset("1.3b")
    assert default.to_dict() == big.to_dict()
