"""Token shards: folders of encoded documents, written by `tokenize` and read by `TokenShards`."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from nirvana.data import encode
from nirvana.data.checksums import verify_files
from nirvana.data.documents import Counts, count_documents, expand_sources
from nirvana.data.hub import is_hub, local_path
from nirvana.data.remote import TOKENIZER_JSON, is_remote, local_copy
from nirvana.data.tokenizer import (
    copy_tokenizer,
    fit_tokenizer,
    load_tokenizer,
    tokenizer_folder,
)
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder, sha256, write_json
from nirvana.packaged import local_or_packaged
from nirvana.progress import ProgressLines

SHARD_FILES = ("tokens-*.bin", "documents.npy", "bytes.npy", "meta.json", "tokenizer")


class TokenShards:
    """The documents in a folder written by `tokenize`.

    Args:
        folder: the folder, the name of packaged token shards (`quickstart/train`,
            `quickstart/valid`), or an address, see `nirvana.data.remote.local_copy`.

    Attributes:
        folder: the folder, a local copy for an address.
        starts: int64 [documents + 1], index of each document's first token; the end last.
        bytes: int64 [documents], UTF-8 bytes of each document's text.
        bos: BOS token of the tokenizer.
        eos: EOS token.
        vocab_size: size of the tokenizer's vocabulary.
        tokenizer_sha256: SHA-256 of tokenizer.json.
        fingerprint: SHA-256 of the checksums of all files.

    Raises:
        InputError: for a folder that does not hold token shards, or files of the wrong size.
    """

    def __init__(self, folder: str | Path) -> None:
        remote = is_remote(folder)
        self.folder = local_copy(str(folder)) if remote else local_or_packaged(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.starts = np.load(self.folder / "documents.npy", allow_pickle=False)
            self.bytes = np.load(self.folder / "bytes.npy", allow_pickle=False)
            self.bos: int = meta["bos"]
            self.eos: int = meta["eos"]
            self.vocab_size: int = meta["vocab_size"]
            self.tokenizer_sha256: str = meta["tokenizer_sha256"]
            self._sums: dict[str, str] = meta["sha256"]
            self._dtype = np.dtype(meta["dtype"])
            self._names: list[str] = meta["files"]
            sizes = meta["file_tokens"]
            present = [(self.folder / name).stat().st_size for name in self._names]
        except FileNotFoundError as error:
            raise InputError(
                f"{folder}: not token shards (no {Path(error.filename).name}); "
                "write them with: nirvana data tokenize FILES --out DIR"
            ) from None
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{folder}: damaged token shards: {error}") from None
        expected = [size * self._dtype.itemsize for size in sizes]
        if present != expected or self.starts[-1] != sum(sizes):
            raise InputError(f"{folder}: damaged token shards: files of the wrong size")
        self._file_starts = np.cumsum([0, *sizes])
        self._handles: dict[int, BinaryIO] = {}
        self._lock = Lock()
        sums = json.dumps(self._sums, sort_keys=True)
        self.fingerprint = hashlib.sha256(sums.encode()).hexdigest()

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.bytes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents, BOS and EOS included."""
        return int(self.starts[-1])

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads the tokens [start, stop) of a document.

        Args:
            index: which document, 0 to `len(self) - 1`.
            start: first token, counted from BOS.
            stop: end, exclusive; None or more than the document has: its end, after EOS.

        Returns:
            int64 [stop - start].

        Raises:
            InputError: when the file was removed or truncated after the shards were opened.
        """
        first, end = int(self.starts[index]), int(self.starts[index + 1])
        stop = end - first if stop is None else min(stop, end - first)
        # A document never spans two files.
        file = int(np.searchsorted(self._file_starts, first, side="right")) - 1
        offset = first - int(self._file_starts[file])
        return self._read(file, offset + start, offset + stop)

    def _read(self, file: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a file. A memory map would not do: reading one of a file that
        was truncated meanwhile kills the process."""
        path = self.folder / self._names[file]
        size = self._dtype.itemsize
        try:
            with self._lock:  # threads share the handles, and not every system has os.pread
                if file not in self._handles:
                    self._handles[file] = open(path, "rb", buffering=0)  # noqa: SIM115  (stays open)
                self._handles[file].seek(start * size)
                data = self._handles[file].read((stop - start) * size)
        except OSError as error:
            raise InputError(f"{path}: can no longer be read: {error.strerror}") from None
        if len(data) != (stop - start) * size:
            raise InputError(f"{path}: was cut short since the training began")
        return np.frombuffer(data, self._dtype).astype(np.int64)

    def documents(self, limit: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the first documents in order.

        Args:
            limit: documents at most; None: all.

        Yields:
            int64 tokens with BOS and EOS, and the UTF-8 bytes of the text.
        """
        for index in range(len(self) if limit is None else min(limit, len(self))):
            yield self.document(index), int(self.bytes[index])

    def verify(self) -> None:
        """Compares the SHA-256 of every file with the recorded one, see `verify_files`.

        Raises:
            InputError: naming the first file that differs.
        """
        verify_files(self.folder, {**self._sums, TOKENIZER_JSON: self.tokenizer_sha256})


def tokenize(
    sources: Iterable[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int = 8192,
    workers: int = 1,
) -> Counts:
    """Encodes the documents of `sources`, in order, and writes them as token shards.

    The folder `out` holds `tokens-00000.bin` ... (uint16 or uint32, little endian), `documents.npy`
    (int64 [documents + 1], index of each document's first token, the end last), `bytes.npy` (int64
    [documents], UTF-8 bytes of each text), `tokenizer/`, and `meta.json` with counts and SHA-256
    checksums. Each document is BOS, its tokens, EOS; text that spells a special token is encoded as
    plain text. The same sources give the same bytes for any number of workers. After an
    interruption the finished parts stay in `.NAME.partial` beside `out`, and the same call
    continues from there.

    Args:
        sources: text files and data sets of the hub, see `nirvana.data.documents.read_documents`.
        out: folder to write; it appears once complete, and replaces token shards there.
        tokenizer: folder of a tokenizer or of token shards; None trains one on `sources`.
        vocab_size: size of a tokenizer that is trained here.
        workers: processes that encode, at least 1; with more than one, the calling program must
            have the usual `if __name__ == "__main__"`.

    Returns:
        Documents, bytes and tokens written.

    Raises:
        InputError: for sources that are missing, unreadable, of unknown kind, or hold no document,
            and for a folder without a usable tokenizer.
    """
    sources, out = list(sources), replaceable_folder(out, SHARD_FILES)
    if workers < 1:
        raise InputError(f"workers = {workers} must be at least 1")
    given = None if tokenizer is None else tokenizer_folder(tokenizer)
    partial = out.with_name(f".{out.name}.partial")
    read = [*map(local_path, sources), given]
    check_outputs({"out": out, "out, while unfinished,": partial}, read)
    if given is not None:
        load_tokenizer(given)  # so that an error names the folder that was given
    parts = expand_sources(sources)
    plan = {
        "sources": [[part, *_identity(part)] for part in parts],
        "tokenizer": vocab_size if given is None else sha256(given / "tokenizer.json"),
        "layout": [encode.FILE_TOKENS, encode.JOB_BYTES],
    }
    if not _same_plan(partial, plan):
        shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer_copy = partial / "tokenizer"
        if not tokenizer_copy.is_dir():
            counts = count_documents(parts) if given is None else {}
            with atomic_folder(tokenizer_copy) as folder:
                if given is None:
                    fit_tokenizer(counts, folder, vocab_size)
                else:
                    copy_tokenizer(given, folder)
            write_json(partial / "plan.json", plan)
        jobs = encode.make_jobs(parts, partial, tokenizer_copy)
        with _progress(sum(job.size for job in jobs)) as advance:
            encode.run_jobs(jobs, workers, advance)
        return _assemble(jobs, partial, out)
    finally:
        if not any(partial.glob("part-*")):
            shutil.rmtree(partial, ignore_errors=True)


def _assemble(jobs: list[encode.Job], partial: Path, out: Path) -> Counts:
    """Joins the parts into one folder: token files are linked under new numbers."""
    starts, sizes, names, sums = [], [], [], {}
    tokens = 0
    tokenizer = load_tokenizer(partial / "tokenizer")
    dtype = np.dtype(encode.token_dtype(len(tokenizer)))
    with atomic_folder(out) as folder:
        for job in jobs:
            part = json.loads((job.folder / "part.json").read_text(encoding="utf-8"))
            starts.append(np.load(job.folder / "starts.npy") + tokens)
            sizes.append(np.load(job.folder / "bytes.npy"))
            tokens += part["tokens"]
            for name in part["files"]:
                names.append(f"tokens-{len(names):05d}.bin")
                _link(job.folder / name, folder / names[-1])
                sums[names[-1]] = part["sha256"][name]
        num_bytes = np.concatenate(sizes)
        result = Counts(len(num_bytes), int(num_bytes.sum()), tokens)
        if result.documents == 0:
            raise InputError(f"{jobs[0].sources[0]}: holds no document")
        np.save(folder / "documents.npy", np.concatenate([*starts, [tokens]]).astype(np.int64))
        np.save(folder / "bytes.npy", num_bytes)
        copy_tokenizer(partial / "tokenizer", folder / "tokenizer")
        for name in ("documents.npy", "bytes.npy"):
            sums[name] = sha256(folder / name)
        meta = {
            "format": "nirvana token shards 1",
            "dtype": dtype.str,
            "documents": result.documents,
            "tokens": result.tokens,
            "bytes": result.bytes,
            "vocab_size": len(tokenizer),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "tokenizer_sha256": sha256(folder / "tokenizer" / "tokenizer.json"),
            "files": names,
            "file_tokens": [(folder / name).stat().st_size // dtype.itemsize for name in names],
            "sha256": sums,
            "sources": [_short(source) for job in jobs for source in job.sources],
        }
        write_json(folder / "meta.json", meta)
    shutil.rmtree(partial)
    return result


def _link(file: Path, name: Path) -> None:
    """Links a file: no copy, and the part stays complete if this call is interrupted."""
    try:
        os.link(file, name)
    except OSError:  # a file system without links
        shutil.copyfile(file, name)


def _identity(part: str) -> list[int]:
    """Size and modification time of a file; nothing for a data set of the hub."""
    if is_hub(part):
        return []
    status = os.stat(part)
    return [status.st_size, status.st_mtime_ns]


def _same_plan(partial: Path, plan: dict[str, Any]) -> bool:
    try:
        return json.loads((partial / "plan.json").read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        return False


def _short(source: str) -> str:
    return source if is_hub(source) else Path(source).name


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with ProgressLines(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("tokenizing, bytes", total=total)
        yield lambda amount: progress.advance(task, amount)
