"""Encoding documents to parts of token shards, in several processes.

The sources are grouped, in order, into jobs. Each job writes one folder, which appears once it is
complete. Parts that an interrupted call has finished are not encoded again.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from nirvana.data.documents import read_documents
from nirvana.data.hub import is_hub
from nirvana.data.tokenizer import load_tokenizer, text_encoder
from nirvana.errors import InputError
from nirvana.files import publish_folder, sha256, write_json

BATCH_CHARACTERS = 2**22  # text encoded at a time
FILE_TOKENS = 2**28  # a token file is closed once it holds this many
JOB_BYTES = 2**26  # small files are encoded together up to this size


@dataclass(frozen=True)
class Job:
    """Sources that one process encodes, one after another, into one part."""

    sources: tuple[str, ...]
    folder: Path
    tokenizer: Path
    file_tokens: int

    @property
    def size(self) -> int:
        """Bytes of the files; 1 for each part of a hub data set, whose size is unknown."""
        return sum(1 if is_hub(s) else Path(s).stat().st_size for s in self.sources)


def make_jobs(sources: Sequence[str], folder: Path, tokenizer: Path) -> list[Job]:
    """Groups sources into jobs, in order; the same sources always give the same jobs.

    Args:
        sources: see `nirvana.data.documents.expand_sources`.
        folder: the parts are written into it.
        tokenizer: folder of the tokenizer.

    Returns:
        The jobs, `part-00000` first.
    """
    groups: list[list[str]] = []
    size = JOB_BYTES
    for source in sources:
        if is_hub(source) or size >= JOB_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += JOB_BYTES if is_hub(source) else Path(source).stat().st_size
    return [
        Job(tuple(group), folder / f"part-{i:05d}", tokenizer, FILE_TOKENS)
        for i, group in enumerate(groups)
    ]


def run_jobs(jobs: Sequence[Job], workers: int, advance: Callable[[int], None]) -> None:
    """Runs the jobs whose part does not exist yet.

    Args:
        jobs: see `make_jobs`.
        workers: processes; each encodes with an equal part of the cores.
        advance: called with the size of every finished job.

    Raises:
        InputError: for a source that cannot be read or holds no document.
    """
    left = []
    for job in jobs:
        if is_whole(job.folder):
            advance(job.size)
        else:
            left.append(job)
    workers = min(workers, len(left))
    if workers <= 1:
        for job in left:
            encode(job)
            advance(job.size)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), _limit_threads, (threads,)) as pool:
        try:
            for job, notes in zip(left, pool.map(_encode_elsewhere, left), strict=True):
                for note in notes:
                    warnings.warn(note, stacklevel=2)
                advance(job.size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def encode(job: Job) -> None:
    """Encodes one job and writes its part.

    The folder holds `tokens-*.bin`, `starts.npy` (int64 [documents], number of tokens of the part
    before each document), `bytes.npy` (int64 [documents]) and `part.json`.

    Args:
        job: sources, tokenizer and folder.

    Raises:
        InputError: for a source that cannot be read or holds no document.
    """
    tokenizer = load_tokenizer(job.tokenizer)
    encode_texts = text_encoder(tokenizer)
    dtype = np.dtype(token_dtype(len(tokenizer)))
    partial = job.folder.with_name(f".{job.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    starts, sizes, names = [0], [], []
    file = None
    try:
        for texts in _batches(job.sources):
            for text, ids in zip(texts, encode_texts(texts), strict=True):
                if file is None or file.tell() >= job.file_tokens * dtype.itemsize:
                    if file is not None:
                        file.close()
                    names.append(f"tokens-{len(names):05d}.bin")
                    file = open(partial / names[-1], "wb")  # noqa: SIM115  (closed below)
                document = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
                file.write(np.array(document, dtype=dtype).tobytes())
                starts.append(starts[-1] + len(document))
                sizes.append(len(text.encode("utf-8")))
    finally:
        if file is not None:
            file.close()
    np.save(partial / "starts.npy", np.array(starts[:-1], dtype=np.int64))
    np.save(partial / "bytes.npy", np.array(sizes, dtype=np.int64))
    sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
    write_json(partial / "part.json", {"tokens": starts[-1], "files": names, "sha256": sums})
    publish_folder(partial, job.folder)


def is_whole(folder: Path) -> bool:
    """Returns whether a part exists and all its files have the recorded SHA-256.

    Args:
        folder: of the part.
    """
    try:
        part = json.loads((folder / "part.json").read_text(encoding="utf-8"))
        return all(sha256(folder / name) == value for name, value in part["sha256"].items())
    except (OSError, ValueError, KeyError):
        return False


def token_dtype(vocab_size: int) -> str:
    """Returns the NumPy type of stored tokens.

    Args:
        vocab_size: size of the vocabulary.

    Returns:
        "<u2" for up to 65536 tokens, else "<u4".
    """
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _encode_elsewhere(job: Job) -> list[str]:
    """Runs `encode` in a worker process; returns its warnings, which the main process prints."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        encode(job)
    return [str(note.message) for note in caught if note.category is UserWarning]


def _limit_threads(threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when the tokenizer is first used


def _batches(sources: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for source in sources:
        documents = 0
        for text in read_documents(source):
            documents += 1
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if documents == 0 and not is_hub(source):
            raise InputError(f"{source}: holds no document")
    if batch:
        yield batch
