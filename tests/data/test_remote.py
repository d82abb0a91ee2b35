"""Token shards at an address: copied once, verified, and refused in one line."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.in_memory import upload
from nirvana.data import checksums
from nirvana.data.checksums import verify_files
from nirvana.data.remote import is_remote, local_copy
from nirvana.data.shards import TokenShards, tokenize
from nirvana.errors import InputError
from nirvana.files import sha256


@pytest.fixture
def shards(tmp_path):
    lines = [json.dumps({"text": f"the cat number {i} sat"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenize([tmp_path / "a.jsonl"], tmp_path / "a", None, 280)
    return tmp_path / "a"


@pytest.fixture
def memory(shards, monkeypatch, tmp_path):
    """A file system in memory that holds the shards and counts what is opened."""
    monkeypatch.setenv("NIRVANA_CACHE", str(tmp_path / "cache"))
    system = upload(shards, "/corpus/a")
    opened = []
    original = type(system).open

    def counted(self, path, *arguments, **options):
        opened.append(path)
        return original(self, path, *arguments, **options)

    monkeypatch.setattr(type(system), "open", counted)
    system.opened = opened
    return system


def change(system, name, content):
    with system.open(name, "wb") as file:
        file.write(content)


def test_a_copy_is_the_original(memory, shards):
    assert is_remote("memory://corpus/a")
    assert not is_remote(shards)
    here, there = TokenShards(shards), TokenShards("memory://corpus/a/")
    assert there.fingerprint == here.fingerprint
    pairs = zip(here.documents(), there.documents(), strict=True)
    assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in pairs)
    files = {file.relative_to(shards) for file in shards.rglob("*") if file.is_file()}
    copied = {f.relative_to(there.folder) for f in there.folder.rglob("*") if f.is_file()}
    assert copied - {next(f for f in copied if f.name == ".lock")} == files
    there.verify()


def test_files_are_copied_once(memory, monkeypatch):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(local_copy, ["memory://corpus/a"] * 4))
    assert len(folders) == 1
    assert len(memory.opened) == len(set(memory.opened)) == 5
    # What was compared while it was copied is not read again to verify it.
    monkeypatch.setattr(checksums, "sha256", None)
    TokenShards("memory://corpus/a").verify()


def test_an_interrupted_copy_continues(memory, monkeypatch):
    system = type(memory)
    original = system.open

    def broken(self, path, *arguments, **options):
        if path.endswith("bytes.npy"):
            raise ConnectionError("reset by peer")
        return original(self, path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(system, "open", broken)
        with pytest.raises(InputError, match=r"a/bytes.npy: cannot be read: reset by peer"):
            local_copy("memory://corpus/a")
    memory.opened.clear()
    TokenShards("memory://corpus/a")
    assert any(path.endswith("bytes.npy") for path in memory.opened)
    assert not any(path.endswith("documents.npy") for path in memory.opened)


def test_other_shards_at_the_address_are_another_copy(memory, shards, tmp_path):
    before = local_copy("memory://corpus/a")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "the dog"}))
    tokenize([tmp_path / "b.jsonl"], tmp_path / "b", shards)
    upload(tmp_path / "b", "/corpus/a")
    after = local_copy("memory://corpus/a")
    assert before != after
    assert len(TokenShards("memory://corpus/a")) == 1


def test_what_cannot_be_copied_is_refused(memory, tmp_path):
    for address, message in (
        ("memory://corpus/none", r"none/meta.json: not token shards: no such file"),
        ("gopher://a/b", r"gopher://a/b: cannot be opened: Protocol not known: gopher"),
    ):
        with pytest.raises(InputError, match=message) as error:
            TokenShards(address)
        assert "\n" not in str(error.value)
    meta = json.loads(memory.cat_file("/corpus/a/meta.json"))
    (name,) = meta["files"]
    content = bytearray(memory.cat_file(f"/corpus/a/{name}"))
    content[7] ^= 1
    change(memory, f"/corpus/a/{name}", bytes(content))
    with pytest.raises(InputError, match=rf"memory://corpus/a/{name}: damaged"):
        TokenShards("memory://corpus/a")
    for bad in ("../../evil", "/etc/evil", "a/b", ".hidden"):
        wrong = {**meta, "files": [bad], "sha256": {**meta["sha256"], bad: "0"}}
        change(memory, "/corpus/a/meta.json", json.dumps(wrong).encode())
        with pytest.raises(InputError, match="names files outside of its folder"):
            TokenShards("memory://corpus/a")
    for text in (b"[]", b"{", b"{}"):
        change(memory, "/corpus/a/meta.json", text)
        with pytest.raises(InputError, match="not that of token shards"):
            TokenShards("memory://corpus/a")


def test_verified_files_are_not_read_again(shards, monkeypatch, tmp_path):
    """Until their size or time changes, or the cache is gone."""
    monkeypatch.setenv("NIRVANA_CACHE", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(checksums, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    loaded = TokenShards(shards)
    loaded.verify()
    assert sorted(read) == ["bytes.npy", "documents.npy", "tokenizer.json", "tokens-00000.bin"]
    loaded.verify()
    assert len(read) == 4
    (shards / "bytes.npy").touch()
    loaded.verify()
    assert read[4:] == ["bytes.npy"]
    shutil.rmtree(tmp_path / "cache")
    loaded.verify()
    assert len(read) == 9
    monkeypatch.setenv("NIRVANA_CACHE", str(shards / "meta.json" / "no folder"))
    loaded.verify()
    assert len(read) == 13


def test_files_that_differ_are_named(tmp_path):
    (tmp_path / "a").write_text("a")
    expected = {"a": sha256(tmp_path / "a"), "b": "0"}
    with pytest.raises(InputError, match=r"b: cannot be read: No such file"):
        verify_files(tmp_path, expected)
    (tmp_path / "b").write_text("b")
    with pytest.raises(InputError, match=r"b: damaged: its SHA-256"):
        verify_files(tmp_path, expected)
