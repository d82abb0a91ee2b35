"""How the study of adoption measures the adaptation of an adopted model to samples."""

import json
import lzma
import random

import pytest

from experiments.adapt.data import Document, load_documents
from experiments.adapt.domains import SEEN, UNSEEN, VALIDATION
from experiments.adopt import adaptation
from experiments.adopt.adaptation_tables import adaptations
from experiments.common.results import read_rows
from helpers.teachers import save_random_teacher
from helpers.words import WORDS
from nirvana.data.tokenizer import aligned_encoder, load_tokenizer, train_tokenizer
from nirvana.errors import InputError
from nirvana.model.adopt import adopt

TEXT_TOKENS = 512  # of `tiny` in a document


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Documents in the tokens of `tiny`, and a random teacher with a tokenizer of its own."""
    place = tmp_path_factory.mktemp("adaptation")
    dice = random.Random(0)
    encode = aligned_encoder(load_tokenizer("tiny"))
    bos = load_tokenizer("tiny").bos_token_id

    def document(domain):
        words = dice.sample(WORDS, 5)  # few, so that there is something to learn from a document
        ids, sizes = encode(f"{domain} é: " + " ".join(dice.choices(words, k=900)))
        blocks = [sum(sizes[i : i + 256]) for i in range(0, TEXT_TOKENS, 256)]
        return {"tokens": [bos, *ids[:TEXT_TOKENS]], "bytes": blocks, "packed": {}}

    splits = {"test": (*SEEN, *UNSEEN), "valid": (*SEEN, *VALIDATION)}
    found = {
        split: {domain: [document(domain) for _ in range(3)] for domain in domains}
        for split, domains in splits.items()
    }
    content = json.dumps({**found, "recall": {}}).encode()
    (place / "documents.json.xz").write_bytes(lzma.compress(content))
    (place / "text.txt").write_text(" ".join(dice.choices(WORDS, k=3000)))
    train_tokenizer([place / "text.txt"], place / "teacher", 280)
    save_random_teacher(
        place / "teacher",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
    )
    return place


def arguments(place, model, out, *more):
    given = ["--model", place / model, "--documents", place / "documents.json.xz"]
    given += ["--results", out, "--number", 2, "--tokens", 512, "--device", "cpu", *more]
    return [*map(str, given)]


def test_documents_keep_their_text_in_other_tokens(place):
    data = load_documents(place / "documents.json.xz")
    tokenizer = load_tokenizer(place / "teacher")
    found = adaptation.encoded_data(data, tokenizer, 512)
    tiny = load_tokenizer("tiny")
    for domain, documents in data.test.items():
        own = found.test[domain][0]
        text = tokenizer.decode(own.tokens[1:])
        assert len(own.tokens) == 1 + 512
        assert own.tokens[0] == tokenizer.bos_token_id
        assert sum(own.bytes) == len(text.encode())
        assert tiny.decode(documents[0].tokens[1:]).startswith(text)


def test_a_text_that_ends_within_a_character_loses_it(place):
    tiny, tokenizer = load_tokenizer("tiny"), load_tokenizer(place / "teacher")
    ids = tiny.encode("the cat sat " * 300 + "\u4e2d", add_special_tokens=False)
    assert tiny.decode(ids[:-1]).endswith("\ufffd")
    data = load_documents(place / "documents.json.xz")
    cut = Document([tiny.bos_token_id, *ids[:-1]], [], {})
    data.test.clear()
    data.valid.clear()
    data.test["law"] = [cut]
    (found,) = adaptation.encoded_data(data, tokenizer, 4096).test["law"]
    assert "\ufffd" not in tokenizer.decode(found.tokens)


@pytest.mark.timeout(600)
def test_from_a_model_to_its_tables(place, tmp_path):
    adopt(place / "teacher", place / "both", "both", window=16, sinks=1)
    out = tmp_path / "rows.jsonl"
    more = ["--chunks", 128, "--sizes", 0.01, 0.02, "--name", "both, 7 tokens"]
    adaptation.main(arguments(place, "both", out, "--minutes", 0, *more))
    assert read_rows(out) == []
    adaptation.main(arguments(place, "both", out, *more))
    rows = read_rows(out)
    tested = {row["name"]["condition"]: row for row in rows if row["part"] == "test"}
    assert set(tested) == {"bytes", "frozen", "chosen", "own domain", "other domain", "norm"}
    assert {row["name"]["model"] for row in rows} == {"both, 7 tokens"}
    assert {len(each) for each in tested["chosen"]["nats"].values()} == {2}
    assert tested["norm"]["numbers"] == 3 * 16  # two norms of the layer, and the last one
    assert tested["chosen"]["numbers"] > tested["norm"]["numbers"]
    adaptation.main(arguments(place, "both", out, *more))
    assert len(read_rows(out)) == len(rows)  # nothing is measured twice
    (section,) = adaptations(rows)
    assert "## Adaptation to a sample: `both, 7 tokens`" in section
    assert "| python | unseen | 2 |" in section
    assert "| law | distilled on | 2 |" in section
    assert "Not measured yet" not in section
    left = [row for row in rows if row["name"].get("condition") not in ("norm", "other domain")]
    assert "Not measured yet: `norm`, `other domain`.\n" in adaptations(left)[0]
    assert "the choice of settings" in adaptations([rows[0]])[0]


def test_a_model_without_a_trigger_adapts_its_norms_alone(place, tmp_path):
    adopt(place / "teacher", place / "linear", "linear", None)
    out = tmp_path / "rows.jsonl"
    adaptation.main(arguments(place, "linear", out, "--chunks", 256, "--sizes", 0.01))
    rows = read_rows(out)
    assert {row["name"].get("kind") for row in rows} == {None, "chosen"}
    (section,) = adaptations(rows)
    assert f"`{place / 'linear'}`" in section
    assert "norm gains, one step size" in section
    assert "Not measured yet" not in section


@pytest.mark.parametrize(
    ("more", "reason"), [(["--number", 1], "at least 2"), (["--tokens", 100], "from 256 to 4096")]
)
def test_impossible_sizes_are_refused(place, tmp_path, more, reason):
    with pytest.raises(InputError, match=reason):
        adaptation.main(arguments(place, "teacher", tmp_path / "rows.jsonl", *more))


@pytest.mark.parametrize("option", ["--graphs", "--no-graphs"])
def test_graphs_can_be_left_out(place, tmp_path, monkeypatch, option):
    seen = []
    monkeypatch.setattr(
        adaptation, "measure", lambda context, name, *_: seen.append((context, name))
    )
    adopt(place / "teacher", tmp_path / "both", "both", window=16, sinks=1)
    adaptation.main(arguments(place, tmp_path / "both", tmp_path / "rows.jsonl", option))
    ((context, name),) = seen
    # A model with hooks is read without graphs, see `nirvana.adapt.chunk_graphs.refusal`.
    assert bool(context.model(name)._forward_hooks) == (option == "--no-graphs")
