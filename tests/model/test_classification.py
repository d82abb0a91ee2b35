"""Classification of sequences and tokens: the last token, padding, packing, the Auto classes."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from nirvana import (
    NirvanaConfig,
    NirvanaForSequenceClassification,
    NirvanaForTokenClassification,
)
from nirvana.model.assets import load_language_model
from nirvana.packaged import resolve

END = 2
"""Ends every text, and is the padding as well."""
LENGTHS = [1, 3, 17, 24]


@pytest.fixture
def make(small_model):
    """Makes a classifier with the weights of a small language model."""

    def build(model_class, **settings):
        trunk = small_model(pad_token_id=END, num_labels=3, **settings)
        model = model_class(trunk.config).double().eval()
        model.model.load_state_dict(trunk.model.state_dict())
        return model

    return build


def texts():
    rows = [torch.randint(3, 61, (n,)) for n in LENGTHS]
    return [torch.cat([row[:-1], torch.tensor([END])]) for row in rows]


def padded(rows, side):
    """Tokens and mask `[B, longest]`."""
    tokens = torch.full((len(rows), max(LENGTHS)), END)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        where = slice(-len(row), None) if side == "left" else slice(len(row))
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_is_classified_by_its_last_token(make, side):
    """Also if that is the token that pads."""
    model, rows = make(NirvanaForSequenceClassification), texts()
    tokens, mask = padded(rows, side)
    found = model(tokens, attention_mask=mask)
    trunk = [model.model(row[None]).last_hidden_state[0, -1] for row in rows]
    torch.testing.assert_close(found.logits, model.score(torch.stack(trunk)))
    assert found.past_key_values is None
    alone = [model(row[None], attention_mask=torch.ones(1, len(row))).logits for row in rows]
    torch.testing.assert_close(found.logits, torch.cat(alone))
    embeds = model.model.embed_tokens(tokens)
    again = model(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(again, found.logits)
    continued = model(tokens[2:3, :10], use_cache=True).past_key_values
    if side == "right":
        last = model(tokens[2:3, 10:17], past_key_values=continued, attention_mask=mask[2:3, :17])
        torch.testing.assert_close(last.logits, found.logits[2:3])


@torch.no_grad()
def test_without_a_mask_the_padding_token_marks_padding(make):
    model = make(NirvanaForSequenceClassification)
    rows = [torch.randint(3, 61, (n,)) for n in LENGTHS]
    tokens, mask = padded(rows, "right")
    expected = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(model(tokens).logits, expected)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="several rows need an attention_mask, or a pad_token_id"):
        model(tokens)
    torch.testing.assert_close(model(rows[3][None]).logits, expected[3:])


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seqlens": [0, 4, 10]},
        {"seq_idx": torch.tensor([[0] * 4 + [1] * 6])},
        {"position_ids": torch.tensor([[*range(4), *range(6)]])},
        {"position_ids": torch.tensor([[*range(1, 5), *range(1, 7)]])},
        {"attention_mask": torch.tensor([[1] * 4 + [2] * 6])},
        {"attention_mask": torch.tensor([[0] + [1] * 3 + [0] + [2] * 4 + [0]])},
        {"attention_mask": torch.block_diag(torch.ones(4, 4), torch.ones(6, 6)).tril().bool()},
    ],
    ids=range(7),
)
def test_packed_samples_need_rows(make, given):
    model = make(NirvanaForSequenceClassification)
    given = {name: x[None, None] if len(x) == 10 == x.shape[-1] else x for name, x in given.items()}
    with pytest.raises(ValueError, match="packed samples have a label each"):
        model(torch.randint(3, 61, (1, 10)), **given)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@torch.no_grad()
def test_padding_is_found_in_every_mask(make, side):
    """Of numbers, floats and blocks, with embeddings, which show no padding."""
    model, tokens = make(NirvanaForSequenceClassification), torch.randint(3, 61, (1, 12))
    hidden = {"left": [0, 1, 2], "right": [9, 10, 11], "inside": [4, 5, 6]}[side]
    real = torch.ones(12, dtype=torch.bool)
    real[hidden] = False
    expected = model(tokens[:, real]).logits
    embeds = model.get_input_embeddings()(tokens)
    mask = real[None].long()
    masks = [mask, mask.float(), 5 * mask]
    if side != "inside":
        masks.append((real & real[:, None] & torch.ones(12, 12).bool().tril())[None, None])
    for each in masks:
        found = model(inputs_embeds=embeds, attention_mask=each)
        torch.testing.assert_close(found.logits, expected)


def test_states_go_in_but_not_out(make):
    model, tokens = make(NirvanaForSequenceClassification), torch.randint(3, 61, (2, 20))
    state = model.model(tokens[:, :12], return_state=True).state
    torch.testing.assert_close(model(tokens[:, 12:], state=state).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="a classifier returns no state"):
        model(tokens, return_state=True)


def test_losses_are_the_librarys(make):
    model, (tokens, mask) = make(NirvanaForSequenceClassification), padded(texts(), "left")
    labels = torch.tensor([0, 2, 1, 1])
    out = model(tokens, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    out.loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_classified(make, side):
    model, rows = make(NirvanaForTokenClassification), texts()
    tokens, mask = padded(rows, side)
    alone = torch.cat([model(row[None]).logits[0] for row in rows])
    logits = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], alone)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = model(torch.cat(rows)[None], position_ids=positions)
    torch.testing.assert_close(packed.logits[0], alone)
    labels = torch.randint(3, tokens.shape).masked_fill(mask == 0, -100)
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    expected = F.cross_entropy(alone.float(), labels[mask.bool()])  # float32 in the library
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_language_models_become_classifiers(auto, tmp_path):
    """The trunk's weights are those of the language model; the head is new, and is saved."""
    language_model, _ = load_language_model("tiny")
    model = auto.from_pretrained(str(resolve("tiny")), num_labels=5)
    for name, weight in language_model.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name
    assert model.score.weight.shape == (5, 192)
    assert 0.01 < model.score.weight.std() < 0.03
    model.save_pretrained(tmp_path)
    again, tokens = auto.from_pretrained(tmp_path), torch.randint(3, 8000, (1, 30))
    assert type(again) is type(model)
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_the_librarys_pipeline_classifies(tmp_path):
    model, tokenizer = load_language_model("tiny")
    classifier = NirvanaForSequenceClassification(NirvanaConfig(**model.config.to_dict()))
    classifier.model = model.model
    labels = pipeline("text-classification", classifier.eval(), tokenizer=tokenizer)
    texts = ["The court held", "Patients were randomly assigned to two groups."]
    together = labels(texts, batch_size=2)
    assert [each["label"] for each in together] == [labels(text)[0]["label"] for text in texts]
    assert together[0]["score"] == pytest.approx(labels(texts[0])[0]["score"], abs=1e-5)
