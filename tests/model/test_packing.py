"""Every way to mark where samples begin and end gives what the samples give alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from nirvana.model.rows import row_layout

LENGTHS = [9, 1, 17, 6]
TOTAL = sum(LENGTHS)
BORDERS = [0, 9, 10, 27, 33]
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BLOCKS = ((NUMBERS[0][:, None] == NUMBERS[0]) & torch.ones(TOTAL, TOTAL).tril().bool())[None, None]
ADDITIVE = torch.zeros(BLOCKS.shape).masked_fill(~BLOCKS, torch.finfo(torch.float32).min)

FORMS = {
    "position_ids": {"position_ids": POSITIONS},
    "cu_seqlens": {"cu_seqlens": torch.tensor(BORDERS, dtype=torch.int32)},
    "list": {"cu_seqlens": BORDERS},
    "empty samples": {"cu_seqlens": [0, 0, 9, 9, 10, 27, 33, 33]},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor(BORDERS), "cu_seq_lens_k": None},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "numbers": {"attention_mask": NUMBERS + 1},
    "float numbers": {"attention_mask": (NUMBERS + 1).float()},
    "bfloat16 numbers": {"attention_mask": (NUMBERS + 1).bfloat16()},
    "numbers that come back": {"attention_mask": torch.tensor([1, 2, 1, 2])[NUMBERS]},
    "blocks": {"attention_mask": BLOCKS},
    "additive blocks": {"attention_mask": ADDITIVE},
    "all": {
        "attention_mask": NUMBERS + 1,
        "position_ids": POSITIONS,
        "cu_seqlens": BORDERS,
        "seq_idx": NUMBERS,
    },
}
VARIANTS = [
    {},
    {"rope_theta": 10000.0, "trigger_decay": 0.0},
    {"branches": "linear"},
    {"branches": "window", "num_prelude_layers": 0, "sliding_window": None},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))


def tokens_of(B: int, T: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (B, T), generator=generator)


def alone(model, tokens):
    pieces = tokens.split(LENGTHS, dim=1)
    return torch.cat([model(piece).logits for piece in pieces], dim=1)


@variants
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_every_form_isolates_the_samples(small_model, variant, form, gradients):
    model, tokens = small_model(**variant), tokens_of(1, TOTAL)
    with torch.set_grad_enabled(gradients):
        packed = model(tokens, **FORMS[form]).logits
    torch.testing.assert_close(packed.detach(), alone(model, tokens).detach())
    with torch.no_grad():
        assert (model(tokens).logits - packed)[:, 9:].abs().max() > 1e-3


@torch.no_grad()
def test_one_row_of_positions_serves_all_rows(small_model):
    model, tokens = small_model(), tokens_of(2, TOTAL)
    for name in ("position_ids", "seq_idx", "numbers", "blocks"):
        packed = model(tokens, **FORMS[name]).logits
        for row in (0, 1):
            separate = alone(model, tokens[row : row + 1])
            torch.testing.assert_close(packed[row : row + 1], separate)


def test_a_collator_with_sequence_numbers_alone(small_model):
    rows = [{"input_ids": tokens_of(1, n, seed=n)[0].tolist()} for n in LENGTHS]
    collate = DataCollatorWithFlattening(
        return_tensors="pt",
        return_position_ids=False,
        return_flash_attn_kwargs=False,
        return_seq_idx=True,
    )
    batch = collate(rows)
    assert set(batch) == {"input_ids", "labels", "seq_idx"}
    model = small_model()
    separate = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    torch.testing.assert_close(model(**batch).logits, torch.cat(separate, dim=1))


@variants
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("positions", [None, "columns", "counted"])
def test_padding_inside_a_row_is_as_if_cut_out(small_model, variant, gradients, positions):
    """Prompt, padding, completion: the completion sees the prompt; the second row has no gap, the
    third padding at both ends as well."""
    if positions == "columns" and "rope_theta" in variant:
        pytest.skip("rotary positions of columns keep the distance across the gap")
    model = small_model(**variant)
    tokens, mask = tokens_of(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, 8:15] = 0
    mask[2, [0, 1, 2, 14, 20, 21, 28, 29]] = 0
    given = {"attention_mask": mask, "output_hidden_states": True, "output_trigger": True}
    if positions is not None:
        counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        given["position_ids"] = counted if positions == "counted" else torch.arange(30)[None]
    with torch.set_grad_enabled(gradients):
        out = model(tokens, **given)
        other = tokens.masked_fill(mask == 0, 3)  # what padding spells changes nothing
        same = model(other, **given)
    for row in range(3):
        kept = mask[row].bool()
        whole = model(tokens[row, kept][None], output_hidden_states=True, output_trigger=True)
        torch.testing.assert_close(out.logits[row, kept], whole.logits[0])
        torch.testing.assert_close(same.logits[row, kept], whole.logits[0])
        for ours, theirs in zip(out.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, kept], theirs[0])
        for ours, theirs in zip(out.trigger, whole.trigger, strict=True):
            torch.testing.assert_close(ours.loss_after[row, kept], theirs.loss_after[0])


def test_gradients_through_padding_inside_a_row(small_model):
    model, tokens = small_model(), tokens_of(1, 20)
    mask = torch.ones_like(tokens)
    mask[0, 5:9] = 0
    kept = mask[0].bool()
    model(tokens, attention_mask=mask).logits[0, kept].square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens[:, kept]).logits.square().sum().backward()
    torch.testing.assert_close(gradients, {n: p.grad for n, p in model.named_parameters()})


@variants
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_right_padded_prefill_goes_on_with_its_mask(small_model, variant, kind):
    model, tokens = small_model(**variant), tokens_of(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, 6:11] = 0
    mask[1, 2:4] = 0
    settings = {"max_cache_len": 30} if kind is StaticCache else {}
    cache = kind(config=model.config, **settings)
    first = model(tokens[:, :11], attention_mask=mask[:, :11], cache=cache)
    parts = [first.logits]
    for start, end in ((11, 12), (12, 17), (17, 24)):
        piece = {"attention_mask": mask[:, :end], "cache": cache}
        parts.append(model(tokens[:, start:end], **piece).logits)
    logits = torch.cat(parts, dim=1)
    for row in range(2):
        kept = mask[row].bool()
        torch.testing.assert_close(logits[row, kept], model(tokens[row, kept][None]).logits[0])


@variants
@torch.no_grad()
def test_numbered_samples_read_in_pieces(small_model, variant):
    """A piece may begin with a new sample, or in the middle of one; no position is needed."""
    model, tokens = small_model(**variant), tokens_of(1, TOTAL)
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 5), (5, 9), (9, 10), (10, 20), (20, 33)):
        mask = NUMBERS[:, :end] + 1
        parts.append(model(tokens[:, start:end], attention_mask=mask, cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), alone(model, tokens))


@variants
@torch.no_grad()
def test_a_piece_of_padding_alone_reaches_nothing(small_model, variant):
    model, tokens = small_model(**variant), tokens_of(1, 12)
    cache = DynamicCache(config=model.config)
    padded = torch.cat([torch.full((1, 6), 5), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 6).long(), torch.ones_like(tokens)], dim=1)
    model(padded[:, :6], attention_mask=mask[:, :6], cache=cache)
    logits = model(padded[:, 6:], attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(logits, model(tokens).logits)


REFUSED = {
    "an additive mask of rows": (
        {"attention_mask": torch.where(NUMBERS > 0, 0.0, float("-inf"))},
        "must be 0 at padding",
    ),
    "numbers between two": ({"attention_mask": NUMBERS + 0.5}, "must be 0 at padding"),
    "numbers that bfloat16 rounds": ({"attention_mask": (NUMBERS + 256).bfloat16()}, "below 256"),
    "shape": ({"attention_mask": torch.ones(2, 9)}, r"shape \[2, 9\]; it must be \[1, 33\]"),
    "positions": ({"position_ids": torch.arange(9)[None]}, r"position_ids has the shape"),
    "descending": ({"cu_seqlens": [0, 27, 10, 33]}, "must ascend"),
    "fractions": ({"cu_seqlens": [0.0, 33.0]}, "integers"),
    "window": (
        {"attention_mask": BLOCKS & torch.ones(TOTAL, TOTAL).triu(-3).bool()},
        "block-diagonal and causal",
    ),
    "bidirectional": ({"attention_mask": torch.ones(1, 1, TOTAL, TOTAL)}, "must be additive"),
    "not causal": (
        {"attention_mask": torch.ones(1, 1, TOTAL, TOTAL).bool()},
        "block-diagonal and causal",
    ),
    "biases": ({"attention_mask": ADDITIVE - 0.5}, "must be additive"),
    "heads": ({"attention_mask": BLOCKS.expand(1, 3, -1, -1)}, r"must be \[1, 1, 33, 33\]"),
    "two names": ({"cu_seqlens": BORDERS, "cu_seq_lens_q": BORDERS}, "two names"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused(small_model, what):
    given, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        small_model()(tokens_of(1, TOTAL), **given)


def test_samples_that_interleave_are_no_blocks(small_model):
    odd = torch.arange(TOTAL) % 2
    mask = (odd[:, None] == odd) & torch.ones(TOTAL, TOTAL).tril().bool()
    with pytest.raises(ValueError, match="block-diagonal"):
        small_model()(tokens_of(1, TOTAL), attention_mask=mask[None, None])


@torch.no_grad()
def test_a_cache_that_would_be_misread_is_refused(small_model):
    model, tokens = small_model(), tokens_of(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, 3:10] = 0
    for padded in (mask, mask.flip(1)):
        out = model(tokens[:, :10], attention_mask=padded[:, :10] * mask[:, :10], use_cache=True)
        with pytest.raises(ValueError, match="contain padding: attention_mask must cover them"):
            model(tokens[:, 10:], cache=out.cache)
    packed = model(tokens[:, :10], cu_seqlens=[0, 4, 10, 20], use_cache=True).cache
    with pytest.raises(ValueError, match="packed samples: give position_ids"):
        model(tokens[:, 10:], cache=packed)
    for borders in ({"cu_seqlens": [0, 20]}, {"seq_idx": torch.zeros(2, 10)}):
        cache = model(tokens[:, :10]).cache
        with pytest.raises(ValueError, match="is for rows without cached tokens"):
            model(tokens[:, 10:], cache=cache, **borders)
    late, cache = torch.ones_like(tokens), model(tokens[:, :10]).cache
    late[0, 12:14] = 0
    with pytest.raises(ValueError, match="between a row's cached and its new tokens"):
        model(tokens[:, 10:], attention_mask=late, cache=cache)
    ended = torch.ones_like(tokens)
    ended[0, 15:] = 0
    cache = model(tokens[:, :10]).cache
    model(tokens[:, 10:], attention_mask=ended, cache=cache)
    more = torch.cat([ended, torch.ones(2, 1).long()], dim=1)
    with pytest.raises(ValueError, match="end with padding"):
        model(tokens[:, :1], attention_mask=more, cache=cache)


def test_layout_of_random_masks_by_an_independent_count():
    """Against a loop over tokens that follows the rules word by word."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        T = int(torch.randint(2, 12, (), generator=generator))
        mask = torch.randint(0, 3, (1, T), generator=generator)
        starts = torch.randint(0, 4, (1, T), generator=generator) == 0
        positions = torch.zeros(1, T, dtype=torch.long)
        for t in range(1, T):
            positions[0, t] = 0 if starts[0, t] else positions[0, t - 1] + 1
        row = row_layout(mask, positions, None, None, 1, T, 0, torch.device("cpu"), False)
        order = torch.arange(T)[None] if row.order is None else row.order
        border = torch.zeros(1, T).bool() if row.border is None else row.border
        found = {int(c) for c, b in zip(order[0], border[0], strict=True) if b and mask[0, c]}
        expected, before = set(), None
        for t in range(T):
            if mask[0, t] == 0:
                continue
            if before is not None:
                step = int(positions[0, t] - positions[0, before])
                if mask[0, t] != mask[0, before] or step not in (1, t - before):
                    expected.add(t)
            before = t
        first = next((t for t in range(T) if mask[0, t]), None)
        assert found - {first} == expected
