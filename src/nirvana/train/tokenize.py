"""Text to token shards: training a byte-level tokenizer, and encoding documents with it."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nirvana.data.tokenizer import (
    TOKENIZER_FILES,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_folder,
)
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder, sha256, write_json
from nirvana.hub import is_hub, local_path, split_source
from nirvana.progress import ProgressLines
from nirvana.text import PIECE_CHARACTERS, kind_of, read_documents, split_text
from nirvana.train import encode

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE_START, IMAGE_END, *RESERVED)

SAMPLE_BYTES = 2**28  # a new tokenizer is trained on at most so much text
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
SHARD_FILES = ("tokens-*.bin", "documents.npy", "bytes.npy", "meta.json", "tokenizer")


@dataclass(frozen=True)
class Counts:
    """What a set of files or shards holds."""

    documents: int
    bytes: int  # of UTF-8 text
    tokens: int = 0  # BOS and EOS included


def train_tokenizer(files: Iterable[str | Path], out: str | Path, vocab_size: int = 8192) -> Counts:
    """Trains a byte-level BPE tokenizer and writes it as a transformers folder.

    Any text is read back exactly from its tokens. BOS is put in front when the tokenizer is called
    with `add_special_tokens=True`. Of more than `SAMPLE_BYTES` of text an evenly spaced part of
    the documents is used. The same files give the same tokenizer.

    Args:
        files: text files and data sets of the hub, see `nirvana.text.read_documents`.
        out: folder to write; one that holds a tokenizer and nothing else is replaced as a whole.
        vocab_size: number of tokens at most, `SPECIAL_TOKENS` included; at least 266.

    Raises:
        InputError: for files without a document, unreadable files, a vocabulary too small.
    """
    files, out = list(files), replaceable_folder(out, TOKENIZER_FILES)
    check_outputs({"out": out}, map(local_path, files))
    counts = _scan(_expand(files))
    with atomic_folder(out) as folder:
        _train(counts, folder, vocab_size)
    return _total(counts)


def tokenize(
    sources: Iterable[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int = 8192,
    workers: int = 1,
) -> Counts:
    """Writes the documents of `sources`, in order, as token shards into the folder `out`.

    The folder holds `tokens-00000.bin` ... (uint16 or uint32, little endian), `documents.npy`
    (int64 [documents + 1], where each document starts, the end last), `bytes.npy` (int64
    [documents], UTF-8 bytes of each text), `tokenizer/`, and `meta.json` with counts and SHA-256
    sums. Each document is BOS, its tokens, EOS; text that spells a special token stays text.
    The same sources give the same bytes, whatever the number of workers. When the work is
    interrupted, what is finished stays beside `out`, and the same call goes on from there.

    Args:
        sources: text files and data sets of the hub, see `nirvana.text.read_documents`.
        out: folder to write; it appears when it is whole, in place of token shards there.
        tokenizer: folder of a tokenizer or of token shards; None trains one on `sources`.
        vocab_size: size of a tokenizer that is trained here.
        workers: processes that encode; with more than one, the calling program must have the usual
            `if __name__ == "__main__"`.

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
        load_tokenizer(given)  # so that an unusable one is called by its own name
    parts = _expand(sources)
    plan = {
        "sources": [[part, *_identity(part)] for part in parts],
        "tokenizer": vocab_size if given is None else sha256(given / "tokenizer.json"),
        "layout": [encode.FILE_TOKENS, encode.JOB_BYTES],
    }
    if not _same_plan(partial, plan):
        shutil.rmtree(partial, ignore_errors=True)
    try:
        place = partial / "tokenizer"
        if not place.is_dir():
            counts = _scan(parts) if given is None else {}
            with atomic_folder(place) as folder:
                if given is None:
                    _train(counts, folder, vocab_size)
                else:
                    copy_tokenizer(given, folder)
            write_json(partial / "plan.json", plan)
        jobs = encode.make_jobs(parts, partial, place)
        with _progress(sum(job.size for job in jobs)) as advance:
            encode.run_jobs(jobs, workers, advance)
        return _assemble(jobs, partial, out)
    finally:
        if not any(partial.glob("part-*")):
            shutil.rmtree(partial, ignore_errors=True)


def _scan(paths: list[str]) -> dict[str, Counts]:
    """Reads all of the input once: no tokenizer is trained before it is known to be good."""
    counts = {}
    for path in paths:
        documents = size = 0
        for text in read_documents(path):
            documents += 1
            size += len(text.encode("utf-8"))
        if documents == 0 and not is_hub(path):
            raise InputError(f"{path}: holds no document")
        counts[path] = Counts(documents, size)
    return counts


def _total(counts: dict[str, Counts]) -> Counts:
    values = counts.values()
    return Counts(sum(c.documents for c in values), sum(c.bytes for c in values))


def _train(counts: dict[str, Counts], out: Path, vocab_size: int) -> None:
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(f"vocab-size = {vocab_size} must be at least {SMALLEST_VOCABULARY}")
    share = min(1.0, SAMPLE_BYTES / _total(counts).bytes)

    def sample() -> Iterator[str]:
        for path in counts:
            for i, text in enumerate(read_documents(path)):
                if int((i + 1) * share) > int(i * share):
                    yield from split_text(text, PIECE_CHARACTERS)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE_START, IMAGE_END, *RESERVED],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def _assemble(jobs: list[encode.Job], partial: Path, out: Path) -> Counts:
    """Makes one folder of the parts: token files keep their content and get new numbers."""
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
    """A second name: it costs nothing, and leaves the part whole should this be interrupted."""
    try:
        os.link(file, name)
    except OSError:  # a file system without links
        shutil.copyfile(file, name)


def _expand(sources: Iterable[str | Path]) -> list[str]:
    """Files as they are, data sets of the hub as their parts; all are known to be there."""
    parts: list[str] = []
    for source in sources:
        kind_of(source)
        parts += split_source(str(source)) if is_hub(source) else [str(source)]
    if not parts:
        raise InputError("no text file given")
    return parts


def _identity(part: str) -> list[int]:
    """What tells that a file is still the same."""
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
