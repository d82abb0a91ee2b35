"""Prepares the data of the study of adaptation: documents as tokens, and text to train on.

    python -m experiments.adapt.collect
    python -m experiments.adapt.prepare --data DATA [--out FOLDER] [--megabytes 8]

DATA holds `text/<domain>/{train,valid,test}.jsonl.xz`. Documents are drawn before anything is
scored: those of at least 4,096 tokens, by the order of the SHA-256 of their text. In the domains of
the training text short documents of a file are joined in their order until they are long enough.
"""

import json
import lzma
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from experiments.adapt.data import BLOCK, FOLDER, LONG, TOKENS, order
from experiments.adapt.domains import SEEN, UNSEEN, VALIDATION
from experiments.common.program import make_parser
from experiments.language.prepare import XZ, _anonymous, _subset
from nirvana.data.documents import read_documents
from nirvana.data.shards import tokenize
from nirvana.data.tokenizer import aligned_encoder, load_tokenizer, text_encoder
from nirvana.errors import InputError, script
from nirvana.evaluate.mqar import make_mqar
from nirvana.evaluate.niah import make_niah
from nirvana.files import atomic_file, check_outputs
from nirvana.packaged import resolve

TEST_DOCUMENTS, VALID_DOCUMENTS = 32, 16
LONG_DOCUMENTS = 8  # of a domain keep up to `LONG` tokens, others `TOKENS`
PROBLEMS, PAIRS, LENGTHS = 100, 8, (512, 1024, 2048)
PPMD_ORDER, PPMD_MEMORY = 6, 1 << 26


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adapt.prepare", __doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("NIRVANA_DATA"))
    parser.add_argument("--texts", type=Path, default=FOLDER / "texts")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--megabytes", type=float, default=8, help="of a domain's training text")
    options = parser.parse_args(arguments)
    if options.data is None or not Path(options.data).is_dir():
        raise InputError("--data: give the folder that holds text/")
    prepare(Path(options.data), options.texts, options.out, options.megabytes)


def prepare(data: Path, texts: Path, out: Path, megabytes: float) -> None:
    """Writes both files into `out`; those of an earlier call are replaced.

    Raises:
        InputError: for a file that is missing, or a domain with too few long documents.
    """
    written = {name: out / name for name in ("train.tar.xz", "documents.json.xz")}
    check_outputs(written, [data / "text", texts])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(resolve("tiny"))
    found: dict[str, Any] = {"test": {}, "valid": {}}
    for domain in SEEN:
        for split, number in (("test", TEST_DOCUMENTS), ("valid", VALID_DOCUMENTS)):
            file = data / "text" / domain / f"{split}.jsonl.xz"
            pieces = joined_texts(read_documents(file), tokenizer)
            found[split][domain] = _drawn(domain, pieces, tokenizer, number)
    for split, domains in (("test", UNSEEN), ("valid", VALIDATION)):
        number = TEST_DOCUMENTS if split == "test" else VALID_DOCUMENTS
        for domain in domains:
            pieces = whole_texts(read_documents(texts / f"{domain}.jsonl.xz"), tokenizer)
            found[split][domain] = _drawn(domain, pieces, tokenizer, number)
    found["recall"] = _recall(data, tokenizer)
    with atomic_file(written["documents.json.xz"]) as file:
        content = json.dumps(found, separators=(",", ":")).encode()
        file.write_bytes(lzma.compress(content, preset=9))
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name)
        for domain in SEEN:
            source = data / "text" / domain / "train.jsonl.xz"
            part, _, _ = _subset(source, shards / f"{domain}.jsonl", megabytes)
            counts = tokenize([part], shards / domain, resolve("tiny"))
            print(f"{domain}: {counts.tokens / 1e6:.2f} M tokens to train on")
        with (
            atomic_file(written["train.tar.xz"]) as file,
            lzma.open(file, "wb", filters=XZ) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for domain in SEEN:
                tar.add(shards / domain, domain, filter=_anonymous)
    for file in written.values():
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


Text = tuple[str, list[int], list[int]]
"""A text, its tokens without BOS, and the bytes of each."""


def whole_texts(documents: Iterable[str], tokenizer: Any) -> Iterator[Text]:
    """Documents of at least `TOKENS` tokens, in the order in which they are drawn."""
    encode = aligned_encoder(tokenizer)
    for text in sorted(documents, key=order):
        ids, sizes = encode(text)
        if len(ids) >= TOKENS:
            yield text, ids, sizes


def joined_texts(documents: Iterable[str], tokenizer: Any) -> list[Text]:
    """Pieces of `TOKENS` to twice as many tokens, in the order in which they are drawn: short
    documents are joined in the order of their file, long ones are cut."""
    encode = aligned_encoder(tokenizer)
    found, pending = [], ""
    for text in documents:
        pending = f"{pending}\n\n{text}" if pending else text
        ids, sizes = encode(pending)
        while len(ids) >= TOKENS:
            stop = len(ids) if len(ids) < 2 * TOKENS else TOKENS
            content = pending.encode("utf-8")
            size = sum(sizes[:stop])
            found.append((content[:size].decode("utf-8", "ignore"), ids[:stop], sizes[:stop]))
            pending = content[size:].decode("utf-8", "ignore")
            ids, sizes = ids[stop:], sizes[stop:]
    return sorted(found, key=lambda each: order(each[0]))


def _drawn(domain: str, found: Iterable[Text], tokenizer: Any, number: int) -> list[dict[str, Any]]:
    """The first documents of those found."""
    drawn = list(islice(found, number))
    print(f"{domain}: {len(drawn)} documents", flush=True)
    longest = sorted((len(ids) for _, ids, _ in drawn), reverse=True)[:LONG_DOCUMENTS]
    documents = []
    for text, ids, sizes in drawn:
        limit = LONG if len(ids) >= longest[-1] else TOKENS
        documents.append(_document(ids, sizes, tokenizer.bos_token_id, text, limit))
    return documents


def _document(ids: list[int], sizes: list[int], bos: int, text: str, limit: int) -> dict[str, Any]:
    import pyppmd  # not on every machine that reads what is written here

    count = min(len(ids), limit) // BLOCK * BLOCK
    blocks = [sum(sizes[i : i + BLOCK]) for i in range(0, count, BLOCK)]
    content = text.encode("utf-8")
    ends = [sum(sizes[: TOKENS * 3 // 4]), sum(sizes[:TOKENS])]
    packers: dict[str, Callable[[bytes], bytes]] = {
        "xz": lambda part: lzma.compress(part, preset=9 | lzma.PRESET_EXTREME),
        "ppmd": lambda part: pyppmd.compress(part, max_order=PPMD_ORDER, mem_size=PPMD_MEMORY),
    }
    packed = {name: [len(pack(content[:end])) for end in ends] for name, pack in packers.items()}
    return {"tokens": [bos, *ids[:count]], "bytes": blocks, "packed": packed}


def _recall(data: Path, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Name@length -> problems of associative recall and of needles."""
    bos, encode = tokenizer.bos_token_id, text_encoder(tokenizer)
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    haystack = data / "text" / "novels" / "test.jsonl.xz"
    found = {}
    for length in LENGTHS:
        kinds = {
            "mqar": make_mqar(bos, words, length, PAIRS, PROBLEMS),
            "s_niah_2": make_niah(2, encode, bos, length, PROBLEMS, read_documents(haystack)),
        }
        for name, problems in kinds.items():
            found[f"{name}@{length}"] = [
                {"tokens": problem.tokens, "answers": problem.answers} for problem in problems
            ]
    return found


if __name__ == "__main__":
    script(main)
