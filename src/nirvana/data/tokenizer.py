"""Tokenizers in folders of the transformers library: training, loading and encoding."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nirvana.data.documents import (
    Counts,
    count_documents,
    expand_sources,
    read_documents,
    require_unicode,
)
from nirvana.data.hub import local_path
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder
from nirvana.packaged import local_or_packaged

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
BOS_AND_EOS = ("bos_token", "eos_token")

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE_START, IMAGE_END, *RESERVED)

SAMPLE_BYTES = 2**28  # text that a new tokenizer is trained on, at most
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
PIECE_CHARACTERS = 2**12  # longer texts are encoded in pieces, which is three times faster
NORMALIZED_PIECE_CHARACTERS = 2**20


def tokenizer_folder(path: str | Path) -> Path:
    """Finds the folder that holds `tokenizer.json`.

    Args:
        path: folder of a tokenizer or of token shards, or the name of a packaged model.

    Returns:
        that folder itself, or `tokenizer` in it.

    Raises:
        InputError: when there is none.
    """
    found = local_or_packaged(path)
    for folder in (found, found / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise InputError(f"{path}: not a tokenizer: it has no tokenizer.json")


def load_tokenizer(path: str | Path, required: Sequence[str] = BOS_AND_EOS) -> Any:
    """Loads the fast tokenizer in a folder.

    Python code in the folder is never executed, whatever its configuration names, and no file is
    downloaded.

    Args:
        path: see `tokenizer_folder`.
        required: special tokens that the tokenizer must have.

    Returns:
        A `PreTrainedTokenizerFast`.

    Raises:
        InputError: when there is none, it is damaged, needs code of its own, or lacks a required
            token.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(path)
    try:
        # With None instead of False, transformers would prompt on a terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises plain exceptions
        if _names_code(folder):
            raise InputError(
                f"{folder}: the tokenizer needs Python code of its own (auto_map in "
                "tokenizer_config.json), which is not executed; give one that works without"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: not a readable tokenizer: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{folder}: not a fast tokenizer; save it with its tokenizer.json")
    for name in required:
        if getattr(tokenizer, name) is None:
            raise InputError(f"{folder}: the tokenizer has no {name}; name one in its config")
    return tokenizer


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer.

    Args:
        source: folder of the tokenizer.
        folder: folder to copy into; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def same_tokens(a: Any, b: Any) -> bool:
    """Returns whether two tokenizers encode every text as the same tokens.

    Args:
        a: a fast transformers tokenizer.
        b: another.
    """
    # What saving adds (padding, truncation, a template for special tokens) makes no difference.
    parts = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    first, second = (json.loads(each.backend_tokenizer.to_str()) for each in (a, b))
    return all(first[part] == second[part] for part in parts)


def text_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Returns a function that encodes texts as in training.

    It adds no BOS or EOS, and encodes text that spells a special token as plain text.

    Args:
        tokenizer: a fast transformers tokenizer; it is not changed.

    Returns:
        A function from texts to the tokens of each; `InputError` for one that is not valid
        Unicode.
    """
    backend, size = _plain_backend(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        pieces = [list(split_text(text, size)) for text in texts]
        flat = [piece for each in pieces for piece in each]
        with _unicode_alone(texts):
            encoded = iter(backend.encode_batch_fast(flat, add_special_tokens=False))
        return [[token for _ in each for token in next(encoded).ids] for each in pieces]

    return encode


def aligned_encoder(tokenizer: Any) -> Callable[[str], tuple[list[int], list[int]]]:
    """Returns a function that encodes a text and counts the UTF-8 bytes of each token.

    The counts sum to the bytes of the text. The bytes of a character that several tokens spell
    count for the first of them; characters that a tokenizer drops count for the next token.

    Args:
        tokenizer: a fast transformers tokenizer; it is not changed.

    Returns:
        A function from a text to its tokens, equal to those of `text_encoder`, and the bytes of
        each token.
    """
    backend, size = _plain_backend(tokenizer)

    def encode(text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        sizes: list[int] = []
        left = 0  # bytes that no token covers so far
        for piece in split_text(text, size):
            with _unicode_alone([text]):
                encoding = backend.encode(piece, add_special_tokens=False)
            done = 0  # characters of this piece counted so far
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


@contextmanager
def _unicode_alone(texts: list[str]) -> Iterator[None]:
    """Names the text that is not valid Unicode, for which the tokenizers library raises a
    `TypeError` about types."""
    try:
        yield
    except TypeError:
        for text in texts:
            require_unicode(f"the text {text[:40]!a}", text)
        raise


def _plain_backend(tokenizer: Any) -> tuple[Tokenizer, int]:
    """A copy of a tokenizer without special tokens, and the characters of a piece for it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    # A normalizer may treat the start of a piece as the start of a text, so pieces are large.
    size = PIECE_CHARACTERS if backend.normalizer is None else NORMALIZED_PIECE_CHARACTERS
    return backend, size


def split_text(text: str, size: int) -> Iterator[str]:
    """Cuts a long text into pieces that join to the text.

    A cut is made before the last single space between two other characters, where a byte-level
    tokenizer starts a new word anyway, so that the tokens stay the same. A piece without such a
    space is cut at its end.

    Args:
        text: any text.
        size: characters of a piece at most, >= 2.

    Yields:
        The pieces in order; "" once for an empty text.
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


def train_tokenizer(files: Iterable[str | Path], out: str | Path, vocab_size: int = 8192) -> Counts:
    """Trains a byte-level BPE tokenizer and writes it as a transformers folder.

    Decoding returns any text exactly. BOS is added in front when the tokenizer is called with
    `add_special_tokens=True`. Of more than `SAMPLE_BYTES` of text, evenly spaced documents are
    used. The same files give the same tokenizer.

    Args:
        files: text files and data sets of the hub, see `nirvana.data.documents.read_documents`.
        out: folder to write; one that holds a tokenizer and nothing else is replaced as a whole.
        vocab_size: number of tokens at most, `SPECIAL_TOKENS` included; at least 266.

    Returns:
        Documents and bytes of the files.

    Raises:
        InputError: for files without a document, unreadable files, a vocabulary too small.
    """
    files, out = list(files), replaceable_folder(out, TOKENIZER_FILES)
    check_outputs({"out": out}, map(local_path, files))
    counts = count_documents(expand_sources(files))
    with atomic_folder(out) as folder:
        fit_tokenizer(counts, folder, vocab_size)
    return sum(counts.values(), Counts())


def fit_tokenizer(counts: dict[str, Counts], out: Path, vocab_size: int) -> None:
    """Trains a byte-level BPE tokenizer on counted sources; see `train_tokenizer`.

    Args:
        counts: source -> its size, see `count_documents`.
        out: folder to write into.
        vocab_size: tokens at most, >= `SMALLEST_VOCABULARY`.

    Raises:
        InputError: for a vocabulary that is too small.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(f"vocab-size = {vocab_size} must be at least {SMALLEST_VOCABULARY}")
    share = min(1.0, SAMPLE_BYTES / sum(counts.values(), Counts()).bytes)

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


def _names_code(folder: Path) -> bool:
    """Whether a tokenizer's configuration refers to a class in a Python file."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))
