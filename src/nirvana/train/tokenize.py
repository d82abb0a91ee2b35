"""Text to token shards: training a byte-level tokenizer, and encoding documents with it."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nirvana.errors import InputError
from nirvana.files import atomic_folder, replaceable_folder, write_json
from nirvana.text import PIECE_CHARACTERS, kind_of, read_documents, split_text, text_encoder

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE_START, IMAGE_END, *RESERVED)

SAMPLE_BYTES = 2**28  # a new tokenizer is trained on at most so much text
BATCH_CHARACTERS = 2**22  # text encoded at a time, by all cores
FILE_TOKENS = 2**28  # a token file is closed once it holds so many
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
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
        files: text files, see `nirvana.text.read_documents`.
        out: folder to write; one that holds a tokenizer and nothing else is replaced as a whole.
        vocab_size: number of tokens at most, `SPECIAL_TOKENS` included; at least 266.

    Raises:
        InputError: for files without a document, unreadable files, a vocabulary too small.
    """
    out = replaceable_folder(out, TOKENIZER_FILES)
    counts = _scan([Path(file) for file in files])
    with atomic_folder(out) as folder:
        _train(counts, folder, vocab_size)
    return _total(counts)


def tokenize(
    files: Iterable[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int = 8192,
) -> Counts:
    """Writes the documents of `files`, in order, as token shards into the folder `out`.

    The folder holds `tokens-00000.bin` ... (uint16 or uint32, little endian), `documents.npy`
    (int64 [documents + 1], where each document starts, the end last), `bytes.npy` (int64
    [documents], UTF-8 bytes of each text), `tokenizer/`, and `meta.json` with counts and SHA-256
    sums. Each document is BOS, its tokens, EOS; text that spells a special token stays text.
    The same files give the same bytes. Encoding uses all cores, or RAYON_NUM_THREADS of them.

    Args:
        files: text files, see `nirvana.text.read_documents`.
        out: folder to write; it appears when it is whole, in place of token shards there.
        tokenizer: folder of a tokenizer or of token shards; None trains one on `files`.
        vocab_size: size of a tokenizer that is trained here.

    Raises:
        InputError: before anything is written, for files that are missing, unreadable, of unknown
            kind, or hold no document, and for a folder without a usable tokenizer.
    """
    out = replaceable_folder(out, SHARD_FILES)
    source = None if tokenizer is None else tokenizer_folder(tokenizer)
    counts = _scan([Path(file) for file in files])
    with atomic_folder(out) as folder:
        place = folder / "tokenizer"
        place.mkdir()
        if source is None:
            _train(counts, place, vocab_size)
        else:
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, place / name)
        return _write_shards(counts, folder, place)


def tokenizer_folder(path: str | Path) -> Path:
    """The folder with `tokenizer.json`: `path` itself, or `path/tokenizer` of token shards.

    Raises:
        InputError: when there is none.
    """
    for folder in (Path(path), Path(path) / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise InputError(f"{path}: not a tokenizer: no folder with a tokenizer.json")


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer in the folder `path`, see `tokenizer_folder`.

    Raises:
        InputError: when there is none, or it has no BOS or EOS token.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}: not a readable tokenizer: {error}") from None
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise InputError(f"{folder}: the tokenizer has no {name}; name one in its config")
    return tokenizer


def _scan(paths: list[Path]) -> dict[Path, Counts]:
    """Reads all of the input once, so that nothing is written before it is known to be good."""
    if not paths:
        raise InputError("no text file given")
    for path in paths:
        kind_of(path)
    counts = {}
    for path in paths:
        documents = size = 0
        for text in read_documents(path):
            documents += 1
            size += len(text.encode("utf-8"))
        if documents == 0:
            raise InputError(f"{path}: holds no document")
        counts[path] = Counts(documents, size)
    return counts


def _total(counts: dict[Path, Counts]) -> Counts:
    values = counts.values()
    return Counts(sum(c.documents for c in values), sum(c.bytes for c in values))


def _train(counts: dict[Path, Counts], out: Path, vocab_size: int) -> None:
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


def _batches(counts: dict[Path, Counts]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path in counts:
        for text in read_documents(path):
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write_shards(counts: dict[Path, Counts], folder: Path, place: Path) -> Counts:
    tokenizer = load_tokenizer(place)
    encode = text_encoder(tokenizer)
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    total = _total(counts)
    starts, sizes, names = [0], [], []
    file = None
    try:
        with _progress(total.bytes) as advance:
            for batch in _batches(counts):
                for text, ids in zip(batch, encode(batch), strict=True):
                    if file is None or file.tell() >= FILE_TOKENS * dtype.itemsize:
                        if file is not None:
                            file.close()
                        names.append(f"tokens-{len(names):05d}.bin")
                        file = open(folder / names[-1], "wb")  # noqa: SIM115  (closed below)
                    document = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
                    file.write(np.array(document, dtype=dtype).tobytes())
                    starts.append(starts[-1] + len(document))
                    sizes.append(len(text.encode("utf-8")))
                advance(sum(sizes[-len(batch) :]))
    finally:
        if file is not None:
            file.close()
    np.save(folder / "documents.npy", np.array(starts, dtype=np.int64))
    np.save(folder / "bytes.npy", np.array(sizes, dtype=np.int64))
    result = Counts(len(sizes), total.bytes, starts[-1])
    meta = {
        "format": "nirvana token shards 1",
        "dtype": dtype.str,
        "documents": result.documents,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "vocab_size": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "tokenizer_sha256": sha256(place / "tokenizer.json"),
        "files": names,
        "file_tokens": [(folder / name).stat().st_size // dtype.itemsize for name in names],
        "sha256": {name: sha256(folder / name) for name in [*names, "documents.npy", "bytes.npy"]},
        "sources": [path.name for path in counts],
    }
    write_json(folder / "meta.json", meta)
    return result


def sha256(path: str | Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda amount: progress.advance(task, amount)
