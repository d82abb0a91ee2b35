"""Documents out of text files, and texts to tokens."""

import io
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tokenizers import Tokenizer

from nirvana.errors import InputError
from nirvana.hub import is_hub, read_hub

KINDS = ".txt, .jsonl (each also .xz, .gz or .zst) or .parquet"
PIECE_CHARACTERS = 2**12  # longer texts are encoded in pieces: short ones go three times faster
NORMALIZED_PIECE_CHARACTERS = 2**20
_PACKED = (".xz", ".gz", ".zst")
PACKED_BYTES = 2**13  # unpacked at a time: a little, for it may be a thousand times as much text
TEXT_BYTES = 2**16
GZIP = 16 + zlib.MAX_WBITS  # a gzip stream, whose checksum and length zlib compares


def kind_of(path: str | Path) -> str:
    """The kind of a source, by its name: "txt", "jsonl", "parquet" or "hub".

    Raises:
        InputError: when the file does not exist or is of no known kind.
    """
    if is_hub(path):
        return "hub"
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    packed = path.suffix in _PACKED
    suffix = Path(path.stem).suffix if packed else path.suffix
    kinds = (
        {".txt": "txt", ".jsonl": "jsonl"}
        if packed
        else {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
    )
    if suffix not in kinds:
        raise InputError(f"{path}: unknown kind of text file; known are {KINDS}")
    return kinds[suffix]


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a file in their order, read as a stream.

    A .txt file is one document; a .jsonl file has one on each line, in the field "text"; a
    .parquet file has a column "text", as has a data set of the hub (`nirvana.hub`). Documents of
    nothing but white space are left out; a warning counts them at the end of the file.

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
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: not valid Unicode: {error}") from None
        found += 1
        yield text
    if empty and found:  # a file without any text is an error, which the caller tells
        warnings.warn(
            f"{path}: empty documents left out: {len(empty)}, the first is {empty[0]}", stacklevel=1
        )


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each line of a .jsonl file (also .xz, .gz, .zst), read as a stream.

    Raises:
        InputError: for a damaged file, or a line that is no JSON object.
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
            yield where, record


def text_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their tokens as in training: no BOS or EOS, nothing special.

    Args:
        tokenizer: a fast transformers tokenizer; stays as it is.
    """
    backend, size = _plain_backend(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        pieces = [list(split_text(text, size)) for text in texts]
        flat = [piece for each in pieces for piece in each]
        encoded = iter(backend.encode_batch_fast(flat, add_special_tokens=False))
        return [[token for _ in each for token in next(encoded).ids] for each in pieces]

    return encode


def aligned_encoder(tokenizer: Any) -> Callable[[str], tuple[list[int], list[int]]]:
    """A function from a text to its tokens, those of `text_encoder`, and each token's share of the
    text's UTF-8 bytes.

    The shares sum to the bytes of the text. A character that several tokens spell counts at the
    first of them; what a tokenizer leaves out counts at the token that follows it.

    Args:
        tokenizer: a fast transformers tokenizer; stays as it is.
    """
    backend, size = _plain_backend(tokenizer)

    def encode(text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        sizes: list[int] = []
        left = 0  # bytes that no token covers yet
        for piece in split_text(text, size):
            encoding = backend.encode(piece, add_special_tokens=False)
            done = 0  # characters of this piece that are counted
            for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
                end = max(end, done)
                ids.append(token)
                sizes.append(left + len(piece[done:end].encode("utf-8")))
                done, left = end, 0
            left += len(piece[done:].encode("utf-8"))
        if sizes:
            sizes[-1] += left
        return ids, sizes

    return encode


def _plain_backend(tokenizer: Any) -> tuple[Tokenizer, int]:
    """A copy of a tokenizer that reads everything as text, and the size of its pieces."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    # A normalizer may treat the beginning of each piece as that of a text: few pieces, then.
    size = PIECE_CHARACTERS if backend.normalizer is None else NORMALIZED_PIECE_CHARACTERS
    return backend, size


def split_text(text: str, size: int) -> Iterator[str]:
    """Cuts a long text into pieces of at most `size` characters that join to the text.

    A cut falls before the last single space between two other characters, where a byte-level
    tokenizer begins a new word anyway, so that the tokens stay the same; only a piece without any
    such space is cut at its end.
    """
    start = 0
    while len(text) - start > size:
        cut = text.rfind(" ", start + 1, start + size)
        while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", start + 1, cut)
        cut = cut if cut > 0 else start + size
        yield text[start:cut]
        start = cut
    yield text[start:]


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


class _Unpacked(io.RawIOBase):
    """The content of a packed file of one or more streams, each of which must be whole.

    The readers of `zstandard` and `lzma` take a file that was cut off, or garbage behind a stream,
    for its end.

    Args:
        file: the packed bytes.
        make: a new decompressor, with `decompress`, `eof` and `unused_data`, for each stream.
        padding: a byte that may be repeated between and behind streams; empty for none.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._make, self._padding = file, make, padding
        self._stream = make()
        self._fresh = True  # nothing of this stream was read yet
        self._packed, self._text = b"", memoryview(b"")
        self._streams = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if not self._packed:
                self._packed = self._file.read(PACKED_BYTES)
            if self._fresh and self._streams and self._padding:
                self._packed = self._packed.lstrip(self._padding) or self._more_than_padding()
            if not self._packed:
                if self._fresh and self._streams:
                    return 0
                raise EOFError("the packed data end too early")
            self._text = memoryview(self._stream.decompress(self._packed))
            self._packed, self._fresh = b"", False
            if self._stream.eof:
                self._packed = self._stream.unused_data
                self._stream, self._fresh = self._make(), True
                self._streams += 1
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _more_than_padding(self) -> bytes:
        """What follows padding that fills all that was read."""
        while packed := self._file.read(PACKED_BYTES):
            if packed := packed.lstrip(self._padding):
                return packed
        return b""

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacker(path: Path) -> tuple[Callable[[], Any], bytes, type[Exception]]:
    """What unpacks a file of this name, the padding that its format allows, and its error."""
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
    """A text file as UTF-8 with its line ends untouched, unpacked while it is read."""
    damaged: tuple[type[Exception], ...] = (EOFError, OSError, UnicodeDecodeError)
    try:
        with ExitStack() as opened:
            stream: Any = opened.enter_context(open(path, "rb"))
            if path.suffix in _PACKED:
                make, padding, error_of_format = _unpacker(path)
                damaged += (error_of_format,)
                stream = io.BufferedReader(_Unpacked(stream, make, padding), TEXT_BYTES)
            yield opened.enter_context(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))
    except damaged as error:
        raise InputError(f"{path}: not a readable UTF-8 text file: {error}") from None
