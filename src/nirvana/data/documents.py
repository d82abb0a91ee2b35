"""Documents from text files and data sets of the hub, read as streams."""

import io
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from nirvana.data.hub import is_hub, read_hub, split_source
from nirvana.errors import InputError
from nirvana.files import existing_file, refuse_utf16

KINDS = (
    ".txt and other plain text such as .md and .py, .jsonl (each also .xz, .gz or .zst) or .parquet"
)
PLAIN_TEXT = (
    *(".txt", ".md", ".rst", ".tex"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt"),
    *(".swift", ".js", ".ts", ".sh", ".sql", ".jl", ".r", ".rb", ".pl", ".lua", ".hs"),
)
"""Suffixes of files that are one document each, unchanged. Formats of records (.json, .csv, .xml)
are not among them: only a part of such a file is text."""
_COMPRESSED = (".xz", ".gz", ".zst")
COMPRESSED_BYTES = 2**13  # decompressed at a time: the text may be a thousand times as long
TEXT_BYTES = 2**16
GZIP = 16 + zlib.MAX_WBITS  # a gzip stream, whose checksum and length zlib compares


@dataclass(frozen=True)
class Counts:
    """Size of a set of documents."""

    documents: int = 0
    bytes: int = 0  # of UTF-8 text
    tokens: int = 0  # BOS and EOS included

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents, self.bytes + other.bytes, self.tokens + other.tokens
        )


def kind_of(path: str | Path) -> str:
    """Determines the kind of a source from its name.

    Args:
        path: a file, or a data set of the hub.

    Returns:
        "txt", "jsonl", "parquet" or "hub".

    Raises:
        InputError: when the file does not exist or is of no known kind.
    """
    if is_hub(path):
        return "hub"
    path = existing_file(path)
    compressed = path.suffix in _COMPRESSED
    suffix = (Path(path.stem) if compressed else path).suffix.lower()
    kinds = dict.fromkeys(PLAIN_TEXT, "txt") | {".jsonl": "jsonl"}
    if not compressed:
        kinds[".parquet"] = "parquet"
    if suffix not in kinds:
        raise InputError(f"{path}: unknown kind of text file; known are {KINDS}")
    return kinds[suffix]


def read_documents(path: str | Path) -> Iterator[str]:
    """Yields the documents of a file in order.

    A .txt file, or another of plain text (`PLAIN_TEXT`), is one document; a .jsonl file has one
    on each line, in the field "text"; a .parquet file has a column "text", as has a data set of the
    hub (`nirvana.data.hub`). Documents of white space alone are skipped; a warning states their
    number at the end of the file. A byte order mark at the start of a file is no part of its text.

    Args:
        path: a file, or a data set of the hub.

    Yields:
        The text of each document, not empty, valid Unicode.

    Raises:
        InputError: for an unknown or damaged file, or a record without text.
    """
    kind = kind_of(path)
    if kind == "hub":
        documents = read_hub(str(path))
    else:
        documents = {"txt": _txt, "jsonl": _jsonl, "parquet": _parquet}[kind](Path(path))
    empty: list[str] = []
    found = 0
    for where, text in documents:
        if not isinstance(text, str):
            raise InputError(f'{where}: "text" must be a text, not {type(text).__name__}')
        if not text.strip():
            empty.append(where)
            continue
        require_unicode(where, text)
        found += 1
        yield text
    if empty and found:  # a file without any text is an error, raised by the caller
        warnings.warn(
            f"{path}: empty documents left out: {len(empty)}, the first is {empty[0]}", stacklevel=1
        )


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of a .jsonl file (also .xz, .gz, .zst).

    Args:
        path: the file.

    Yields:
        File and line number for error messages, and the JSON object of the line.

    Raises:
        InputError: for a damaged file, or a line that is not a JSON object of valid Unicode.
    """
    with _open(Path(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise InputError(f"{where}: must be a JSON object")
            if "\\ud" in line.lower():
                require_unicode(where, json.dumps(record, ensure_ascii=False))
            yield where, record


def expand_sources(sources: Iterable[str | Path]) -> list[str]:
    """Replaces every data set of the hub by its parts, after checking that every file exists.

    Args:
        sources: text files and data sets of the hub.

    Returns:
        Files and parts of data sets, in order.

    Raises:
        InputError: for no source, a missing file, one of unknown kind, or a data set that cannot be
            opened.
    """
    parts: list[str] = []
    for source in sources:
        kind_of(source)
        parts += split_source(str(source)) if is_hub(source) else [str(source)]
    if not parts:
        raise InputError("no text file given")
    return parts


def count_documents(sources: Iterable[str]) -> dict[str, Counts]:
    """Reads every source once and counts its documents and bytes.

    Args:
        sources: see `expand_sources`.

    Returns:
        Source -> counts, without tokens.

    Raises:
        InputError: see `read_documents`; and for a file without a document.
    """
    counts = {}
    for source in sources:
        documents = size = 0
        for text in read_documents(source):
            documents += 1
            size += len(text.encode("utf-8"))
        if documents == 0 and not is_hub(source):
            raise InputError(f"{source}: holds no document")
        counts[source] = Counts(documents, size)
    return counts


def require_unicode(where: str, text: str) -> None:
    """Refuses half of a pair of surrogates, which an escape in JSON can spell, and which stands for
    a byte of a program's argument that is not UTF-8.

    Args:
        where: the text is, with which the error begins.
        text: any.

    Raises:
        InputError: it is not valid Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not valid Unicode: {error}") from None


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as lines:
        yield str(path), lines.read()


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for where, record in read_records(path):
        if "text" not in record:
            raise InputError(f'{where}: must be a JSON object with a field "text"')
        yield where, record["text"]


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: parquet files need the package pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise InputError(f'{path}: has no column "text"')
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0):
                    yield f"{path}, row {row}", value.as_py()
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable parquet file of UTF-8 text: {reason}") from None


class _Decompressed(io.RawIOBase):
    """The content of a compressed file of one or more streams, each of which must be complete.

    The readers of `zstandard` and `lzma` treat a truncated file, or garbage behind a stream, as the
    end of the file.

    Args:
        file: the compressed bytes.
        make: a new decompressor, with `decompress`, `eof` and `unused_data`, for each stream.
        padding: a byte that may be repeated between and behind streams; empty for none.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._make, self._padding = file, make, padding
        self._stream = make()
        self._fresh = True  # no byte of this stream has been read
        self._compressed, self._text = b"", memoryview(b"")
        self._streams = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if not self._compressed:
                self._compressed = self._file.read(COMPRESSED_BYTES)
            if self._fresh and self._streams and self._padding:
                self._compressed = self._compressed.lstrip(self._padding) or self._skip_padding()
            if not self._compressed:
                if self._fresh and self._streams:
                    return 0
                raise EOFError("the compressed data end too early")
            self._text = memoryview(self._stream.decompress(self._compressed))
            self._compressed, self._fresh = b"", False
            if self._stream.eof:
                self._compressed = self._stream.unused_data
                self._stream, self._fresh = self._make(), True
                self._streams += 1
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _skip_padding(self) -> bytes:
        """Skips padding that fills a whole read; returns the bytes after it."""
        while compressed := self._file.read(COMPRESSED_BYTES):
            if compressed := compressed.lstrip(self._padding):
                return compressed
        return b""

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompressor(path: Path) -> tuple[Callable[[], Any], bytes, type[Exception]]:
    """A maker of decompressors for this suffix, the format's padding byte, and its exception."""
    if path.suffix == ".xz":
        return lzma.LZMADecompressor, b"\0", lzma.LZMAError
    if path.suffix == ".gz":
        return lambda: zlib.decompressobj(GZIP), b"\0", zlib.error
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: .zst files need the package zstandard") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), b"", zstandard.ZstdError


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Opens a text file as UTF-8, line ends unchanged, and decompresses it while it is read."""
    damaged: tuple[type[Exception], ...] = (EOFError, OSError, UnicodeDecodeError)
    try:
        with ExitStack() as opened:
            stream: Any = opened.enter_context(open(path, "rb"))
            if path.suffix in _COMPRESSED:
                make, padding, error_of_format = _decompressor(path)
                damaged += (error_of_format,)
                stream = io.BufferedReader(_Decompressed(stream, make, padding), TEXT_BYTES)
            refuse_utf16(stream.peek(64)[:64], path)
            # A byte order mark, which some editors put in front, is not part of the text.
            encoding = "utf-8-sig"
            yield opened.enter_context(io.TextIOWrapper(stream, encoding=encoding, newline="\n"))
    except damaged as error:
        raise InputError(f"{path}: not a readable UTF-8 text file: {error}") from None
