"""What is read of a damaged file of text: it is refused in one line, wherever the damage lies."""

import gzip
import io
import json
import lzma
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nirvana import InputError
from nirvana.config import load_config
from nirvana.data.documents import read_documents, read_records
from nirvana.mri.data.report_texts import read_reports
from nirvana.train.config import LanguageConfig

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = "".join(random.Random(0).choices("abcdefghij klmnop", k=300_000))
DOCUMENTS = [f"{i} {TEXT[i * 30 : i * 31]}" for i in range(1000)]


def zst(data, **options):
    """A frame as programs write it: checksum and, unless they stream, the size."""
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(data)


def streamed_zst(data):
    """Blocks of a frame whose header has no content size."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        for start in range(0, len(data), 50_000):
            writer.write(data[start : start + 50_000])
            writer.flush(zstandard.FLUSH_BLOCK)
    return out.getvalue()


PACK = {
    "zst": zst,
    "streamed.zst": streamed_zst,
    "gz": lambda data: gzip.compress(data, mtime=0),
    "xz": lzma.compress,
}
EVERY_KIND = pytest.mark.parametrize("kind", PACK)


@pytest.mark.parametrize("kind", [None, *PACK])
def test_a_byte_order_mark_is_no_text(tmp_path, kind):
    """Editors, mostly of Windows, put one in front of a file of UTF-8."""
    for name, content in (
        ("a.txt", "caf\u00e9\r\n"),
        ("a.jsonl", '{"text": "caf\u00e9\\r\\n"}\r\n'),
    ):
        data = content.encode("utf-8-sig")
        path = tmp_path / (name if kind is None else f"{name}.{kind.rpartition('.')[2]}")
        path.write_bytes(data if kind is None else PACK[kind](data))
        assert list(read_documents(path)) == ["caf\u00e9\r\n"]


@pytest.mark.parametrize("kind", [None, *PACK])
@pytest.mark.parametrize(
    ("encoding", "mark", "name"),
    [
        ("utf-16-le", "\ufeff", "UTF-16"),
        ("utf-16-be", "\ufeff", "UTF-16"),
        ("utf-32-le", "\ufeff", "UTF-32"),
        ("utf-32-be", "\ufeff", "UTF-32"),
        ("utf-16-le", "", "UTF-16LE"),  # of which every byte is UTF-8, too
        ("utf-16-be", "", "UTF-16BE"),
    ],
)
def test_another_unicode_is_named_with_the_way_out(tmp_path, kind, encoding, mark, name):
    for suffix, content in (("txt", "text\r\n" * 9), ("jsonl", '{"text": "text"}\r\n' * 9)):
        data = (mark + content).encode(encoding)
        path = tmp_path / f"a.{suffix}{'' if kind is None else '.' + kind.rpartition('.')[2]}"
        path.write_bytes(data if kind is None else PACK[kind](data))
        way_out = f"must be UTF-8: convert it, as `iconv -f {name} -t UTF-8` does"
        with pytest.raises(InputError) as error:
            list(read_documents(path))
        assert str(error.value).startswith(f"{path}: {name[:6]} by its")
        assert str(error.value).endswith(way_out)
        if kind is None:
            with pytest.raises(InputError, match=way_out):
                load_config(LanguageConfig, path)
            with pytest.raises(InputError, match=way_out):
                read_reports(path)


@pytest.mark.parametrize("text", ["", "a", "a\0", "\0a", "a\0b", "\0\0\0\0", "a\0bc"])
def test_zero_bytes_of_utf8_stay(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert list(read_documents(path)) == ([text] if text.strip() else [])


def test_half_a_pair_of_surrogates_is_refused(tmp_path):
    """In any field of any record: questions of a benchmark, too."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"query": "a", "choices": ["b", "\\ud83d\\ude00"]}\n{"choices": ["\\uD83D"]}\n'
    )
    records = read_records(path)
    assert next(records)[1]["choices"][1] == "\N{GRINNING FACE}"
    with pytest.raises(InputError, match="line 2: not valid Unicode"):
        next(records)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, message in (
        ("folder.txt", "is a folder; give a file"),
        ("circle.txt", "leads nowhere or in a circle"),
        ("pipe.txt", "is a pipe or a device, which cannot be read twice"),
        ("none.txt", "no such file"),
        ("none.txt/a.txt", "no such file"),
        ("a" * 300 + ".txt", "cannot be opened: File name too long"),
        ("a\0.txt", "cannot be opened: embedded null"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_documents(tmp_path / name))


def path_of(folder, kind, suffix):
    return folder / f"a.{suffix}.{kind.rpartition('.')[2]}"


def refused(path):
    with pytest.raises(InputError, match=r"^\S+: not a readable") as found:
        list(read_documents(path))
    assert "\n" not in str(found.value)


@EVERY_KIND
@pytest.mark.parametrize(("suffix", "documents"), [("txt", [TEXT]), ("jsonl", DOCUMENTS)])
def test_a_packed_file_that_was_cut_off_is_refused(kind, suffix, documents, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    packed = PACK[kind]((TEXT if suffix == "txt" else lines).encode())
    path = path_of(tmp_path, kind, suffix)
    path.write_bytes(packed)
    assert list(read_documents(path)) == documents
    size = len(packed)
    cuts = {0, 1, 3, 4, 5, 8, 11, 12, 20, size // 3, size // 2, size - 1000}
    cuts |= {size - back for back in (1, 2, 3, 4, 5, 8, 9, 12, 13, 30)}
    for cut in sorted(cuts):
        path.write_bytes(packed[:cut])
        refused(path)


@EVERY_KIND
def test_several_streams_in_a_file_are_one_text(kind, tmp_path):
    parts = [TEXT[:100_000], TEXT[100_000:100_001], "", TEXT[100_001:]]
    packed = [PACK[kind](part.encode()) for part in parts]
    path = path_of(tmp_path, kind, "txt")
    path.write_bytes(b"".join(packed))
    assert list(read_documents(path)) == [TEXT]
    for cut in (1, 5, 10, len(packed[-1]) // 2, len(packed[-1]) - 1):
        path.write_bytes(b"".join(packed[:-1]) + packed[-1][:cut])
        refused(path)


@EVERY_KIND
@pytest.mark.parametrize("garbage", [b"x", b"garbage behind the end", b"\1" * 50_000])
def test_garbage_behind_the_end_is_refused(kind, garbage, tmp_path):
    path = path_of(tmp_path, kind, "txt")
    path.write_bytes(PACK[kind](TEXT.encode()) + garbage)
    refused(path)


@pytest.mark.parametrize("kind", ["gz", "xz"])
@pytest.mark.parametrize("size", [4, 2**13, 50_000])
def test_padding_that_the_format_allows_is_passed_over(kind, size, tmp_path):
    path = path_of(tmp_path, kind, "txt")
    packed = PACK[kind](TEXT.encode())
    path.write_bytes(packed + bytes(size) + packed + bytes(size))
    assert list(read_documents(path)) == [TEXT + TEXT]
    path.write_bytes(packed + bytes(size) + packed[:-1])
    refused(path)


def test_frames_that_hold_no_text_are_passed_over(tmp_path):
    """Of zstandard's format: other programs put an index there."""
    index = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(index + zst(TEXT.encode()) + index)
    assert list(read_documents(path)) == [TEXT]


@EVERY_KIND
@FUZZ
@given(where=st.integers(0, 2**31), change=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_harmless(kind, where, change, tmp_path):
    """All of these formats carry a sum of what they hold, but for zstandard's streams here."""
    small = TEXT[:3000]
    packed = bytearray(PACK[kind](small.encode()))
    packed[where % len(packed)] ^= change
    path = path_of(tmp_path, kind, "txt")
    path.write_bytes(packed)
    try:
        found = list(read_documents(path))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found == [small] or kind == "streamed.zst"


@FUZZ
@given(line=st.binary(max_size=200))
def test_lines_of_anything(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line)
    try:
        for _, record in read_records(path):
            assert isinstance(record, dict)
        assert all(isinstance(text, str) for text in read_documents(path))
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def table():
    """Two row groups, several pages."""
    out = io.BytesIO()
    texts = [f"{i} {TEXT[i * 7 : i * 9]}" for i in range(300)]
    pq.write_table(
        pa.table({"text": texts, "id": range(300)}), out, row_group_size=150, data_page_size=2000
    )
    return out.getvalue()


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1))
def test_a_damaged_table_is_refused_or_read(table, changes, tmp_path):
    data = bytearray(table)
    for where, value in changes:
        data[where % len(data)] = value
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    try:
        assert all(isinstance(text, str) for text in read_documents(path))
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


def test_a_table_that_was_cut_off_or_zeroed_is_refused(table, tmp_path):
    path = tmp_path / "a.parquet"
    for cut in (0, 1, 4, len(table) // 2, len(table) - 1):
        path.write_bytes(table[:cut])
        refused(path)
    path.write_bytes(table[:20] + bytes(400) + table[420:])
    refused(path)


def test_a_table_that_is_not_utf8_is_refused(tmp_path):
    buffers = [None, pa.py_buffer(np.array([0, 3], np.int32).tobytes()), pa.py_buffer(b"\xff\xfea")]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)}), path)
    refused(path)
