"""Text files to token shards."""

import gzip
import json
import lzma

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nirvana.errors import InputError
from nirvana.text import read_documents, split_text, text_encoder
from nirvana.train.data import TokenShards
from nirvana.train.tokenize import SPECIAL_TOKENS, load_tokenizer, tokenize, train_tokenizer

TEXTS = [
    "The cat sat on the mat.\n\n  And the dog?\tIt sat, too.\r\n",
    "Zwölf Boxkämpfer jagen Viktor — 日本語 🙂 <|eos|> " * 20,
    "numbers 1234567 and the cat " * 50,
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus):
    folder = corpus.parent / "tokenizer"
    train_tokenizer([corpus], folder, 300)
    return load_tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.sampled_from(SPECIAL_TOKENS).map("x{} y".format))
def test_any_text_round_trips(tokenizer, text):
    encode = text_encoder(tokenizer)
    assert tokenizer.decode(encode([text])[0]) == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert min(encode([text])[0], default=len(SPECIAL_TOKENS)) >= len(SPECIAL_TOKENS)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 0
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab 1.\n é\x1f", max_size=200), st.integers(2, 50))
def test_pieces_change_no_token(tokenizer, text, size):
    """Wherever there is a place to cut between words, the tokens are those of the whole text."""
    pieces = list(split_text(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    if all(piece.startswith(" ") for piece in pieces[1:]):
        joined = [i for piece in text_encoder(tokenizer)(pieces) for i in piece]
        assert joined == text_encoder(tokenizer)([text])[0]


def test_shards(corpus, tmp_path):
    counts = tokenize([corpus], tmp_path / "a", None, 300)
    shards = TokenShards(tmp_path / "a")
    shards.verify()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert counts.documents == len(shards) == len(TEXTS)
    assert counts.bytes == shards.bytes.sum() == sum(len(text.encode()) for text in TEXTS)
    for text, (tokens, num_bytes) in zip(TEXTS, shards.documents(), strict=True):
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(tokens[1:-1]) == text
        assert num_bytes == len(text.encode())
    assert np.array_equal(shards.document(1, 2, 5), shards.document(1)[2:5])


def test_same_files_give_the_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        tokenize([corpus], tmp_path / name, None, 300)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_several_token_files(corpus, tmp_path, monkeypatch):
    tokenize([corpus], tmp_path / "one", None, 300)
    monkeypatch.setattr("nirvana.train.tokenize.FILE_TOKENS", 30)
    tokenize([corpus], tmp_path / "many", tmp_path / "one")
    one, many = TokenShards(tmp_path / "one"), TokenShards(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("tokens-*.bin"))) > 1
    for i in range(len(one)):
        assert np.array_equal(one.document(i), many.document(i))
    assert one.tokenizer_sha256 == many.tokenizer_sha256


def test_damage_is_found(corpus, tmp_path):
    tokenize([corpus], tmp_path / "a", None, 300)
    file = tmp_path / "a" / "tokens-00000.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"tokens-00000\.bin: damaged"):
        TokenShards(tmp_path / "a").verify()
    file.write_bytes(content[:-2])
    with pytest.raises(InputError, match="wrong size"):
        TokenShards(tmp_path / "a")
    with pytest.raises(InputError, match="not token shards"):
        TokenShards(tmp_path)


def test_every_kind_of_file(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert list(read_documents(path)) == TEXTS, path
    (tmp_path / "b.txt").write_bytes(TEXTS[0].encode())
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TEXTS[0].encode()))
    assert list(read_documents(tmp_path / "b.txt")) == [TEXTS[0]]
    assert list(read_documents(tmp_path / "b.txt.xz")) == [TEXTS[0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no document"),
        ("a.txt", b" \n\t", "holds no document"),
        ("a.jsonl", b"", "holds no document"),
        ("a.jsonl", b'{"text": "x"}\n{"tex": 1}\n', r'line 2: .*field "text"'),
        ("a.jsonl", b'{"text": 3}\n', "must be a text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "not valid Unicode"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.txt", b"\xff\xfe", "not a readable UTF-8"),
        ("a.txt.xz", b"nonsense", "not a readable"),
        ("a.txt.gz", b"nonsense", "not a readable"),
        ("a.txt.zst", b"nonsense", "not a readable"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "not a readable"),
        ("a.parquet", b"nonsense", "not a readable parquet"),
        ("a.pdf", b"x", "unknown kind"),
        (None, b"", "no such file"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*empty documents")
def test_wrong_input_writes_nothing(tmp_path, name, content, message):
    path = tmp_path / (name or "none.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokenize([path], tmp_path / "out", None, 300)
    assert [p.name for p in tmp_path.iterdir()] == ([name] if name else [])


def test_empty_documents_are_left_out_and_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n{"text": " "}\n\n{"text": "c"}\n')
    with pytest.warns(UserWarning, match=r"left out: 1, the first is .*line 2"):
        assert list(read_documents(path)) == ["a b", "c"]


def test_wrong_tokenizer(corpus, tmp_path):
    with pytest.raises(InputError, match="not a tokenizer"):
        tokenize([corpus], tmp_path / "out", tmp_path)
    with pytest.raises(InputError, match="must be at least 266"):
        tokenize([corpus], tmp_path / "out", None, 100)
    with pytest.raises(InputError, match="no text file"):
        tokenize([], tmp_path / "out")
    assert not list(tmp_path.iterdir())
