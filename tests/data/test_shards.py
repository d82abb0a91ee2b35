"""Text files to token shards."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nirvana.data import encode
from nirvana.data.documents import read_documents
from nirvana.data.shards import TokenShards, tokenize
from nirvana.data.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    split_text,
    text_encoder,
    train_tokenizer,
)
from nirvana.errors import InputError

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
    monkeypatch.setattr("nirvana.data.encode.FILE_TOKENS", 30)
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
    for name in ("b.txt", "b.py", "b.R", "b.md"):
        (tmp_path / name).write_bytes(TEXTS[0].encode())
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(TEXTS[0].encode()))
        assert list(read_documents(tmp_path / name)) == [TEXTS[0]]
        assert list(read_documents(tmp_path / f"{name}.xz")) == [TEXTS[0]]


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
        ("a.txt", b"\xff\xfe", "UTF-16 by its byte order mark"),
        ("a.txt.xz", b"nonsense", "not a readable"),
        ("a.txt.gz", b"nonsense", "not a readable"),
        ("a.txt.zst", b"nonsense", "not a readable"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "not a readable"),
        ("a.parquet", b"nonsense", "not a readable parquet"),
        ("a.pdf", b"x", "unknown kind"),
        ("a.json", b"[]", "unknown kind"),
        ("a.py", b"\x7fELF\x80", "not a readable UTF-8"),
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


def test_empty_documents_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n{"text": " "}\n\n{"text": "c"}\n')
    with pytest.warns(UserWarning, match=r"left out: 1, the first is .*line 2"):
        assert list(read_documents(path)) == ["a b", "c"]


def test_an_unusable_tokenizer_is_called_by_its_own_name(corpus, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"^\S*/damaged: not a readable tokenizer"):
        tokenize([corpus], tmp_path / "out", damaged)
    with pytest.raises(InputError, match="workers = -1 must be at least 1"):
        tokenize([corpus], tmp_path / "out", None, workers=-1)
    assert [file.name for file in tmp_path.iterdir()] == ["damaged"]


def test_wrong_tokenizer(corpus, tmp_path):
    with pytest.raises(InputError, match="not a tokenizer"):
        tokenize([corpus], tmp_path / "out", tmp_path)
    with pytest.raises(InputError, match="must be at least 266"):
        tokenize([corpus], tmp_path / "out", None, 100)
    with pytest.raises(InputError, match="no text file"):
        tokenize([], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def many(tmp_path, corpus):
    """Four files, each a job of its own."""
    files = []
    for i in range(4):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": f"{i} {t}"}) + "\n" for t in TEXTS))
    return files


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}


def test_workers_change_nothing(many, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("nirvana.data.encode.JOB_BYTES", 1)
    place = Path(tokenizer.name_or_path)
    tokenize(many, tmp_path / "one", place)
    tokenize(many, tmp_path / "two", place, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    shards = TokenShards(tmp_path / "one")
    shards.verify()
    texts = [text for file in many for text in read_documents(file)]
    assert [tokenizer.decode(d[1:-1]) for d, _ in shards.documents()] == texts


def test_interrupted_work_is_not_done_again(many, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("nirvana.data.encode.JOB_BYTES", 1)
    place = Path(tokenizer.name_or_path)
    tokenize(many, tmp_path / "whole", place)
    original, seen = encode.encode, []

    def interrupted(job):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(job.sources)
        original(job)

    monkeypatch.setattr(encode, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(many, tmp_path / "out", place)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(encode, "encode", lambda job: (seen.append(job.sources), original(job)))
    # One of the two finished parts is damaged meanwhile: it is made anew.
    (tmp_path / ".out.partial/part-00001/bytes.npy").write_bytes(b"")
    tokenize(many, tmp_path / "out", place)
    assert [Path(name).name for (name,) in seen[2:]] == ["1.jsonl", "2.jsonl", "3.jsonl"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_finished_parts_of_other_input_are_not_used(many, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("nirvana.data.encode.JOB_BYTES", 1)
    place = Path(tokenizer.name_or_path)
    many[3].write_bytes(b"{")
    with pytest.raises(InputError, match=r"3\.jsonl, line 1: not JSON"):
        tokenize(many, tmp_path / "out", place)
    assert (tmp_path / ".out.partial").is_dir()
    many[3].unlink()
    many[0].write_text('{"text": "all new"}\n')
    tokenize(many[:3], tmp_path / "out", place)
    assert tokenizer.decode(TokenShards(tmp_path / "out").document(0)[1:-1]) == "all new"


def test_a_data_set_of_the_hub(many, tokenizer, tmp_path):
    """`datasets` reads a local folder in the way in which it reads the hub."""
    folder = tmp_path / "data set"
    folder.mkdir()
    for file in many[:3]:
        file.rename(folder / file.name)
    source = f"hub:{folder}"
    counts = tokenize([source, many[3]], tmp_path / "out", Path(tokenizer.name_or_path))
    shards = TokenShards(tmp_path / "out")
    texts = [f"{i} {text}" for i in range(4) for text in TEXTS]
    assert [tokenizer.decode(d[1:-1]) for d, _ in shards.documents()] == texts
    assert counts.documents == 12
    for wrong, message in (
        (f"{source}:default:valid", "cannot be opened"),
        (f"{source}:a:b:c", "must be hub:NAME"),
        ("hub:", "must be hub:NAME"),
    ):
        with pytest.raises(InputError, match=message):
            tokenize([wrong], tmp_path / "none", Path(tokenizer.name_or_path))
    (folder / "0.jsonl").write_text('{"body": "x"}\n')
    (folder / "1.jsonl").unlink()
    (folder / "2.jsonl").unlink()
    with pytest.raises(InputError, match='no column "text", but body'):
        tokenize([source], tmp_path / "none", Path(tokenizer.name_or_path))
