"""Prepares the data of the language study: token shards, and all texts and questions as tokens.

    python -m experiments.language.prepare --data DATA [--out FOLDER] [--megabytes 17]

DATA holds `text/<domain>/{train,valid,test}.jsonl.xz` and `benchmarks/`. Two files come out, small
enough to carry to a machine without network: `train.tar.xz` (shards of each domain by the packaged
tokenizer; of a domain with more text than `--megabytes` an evenly spaced part of the documents) and
`evaluation.json.xz`.
"""

import json
import lzma
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from experiments.common.benchmarks import read_questions
from experiments.common.program import make_parser
from experiments.language.data import FOLDER
from experiments.language.variants import DOMAINS
from nirvana.data.documents import read_documents
from nirvana.data.shards import tokenize
from nirvana.data.tokenizer import aligned_encoder, load_tokenizer, text_encoder
from nirvana.errors import InputError, script
from nirvana.evaluate.mqar import make_mqar
from nirvana.evaluate.niah import make_niah
from nirvana.evaluate.tasks import TASKS
from nirvana.files import atomic_file, check_outputs, sha256
from nirvana.packaged import resolve

EDGES = (1, 256, 1024, 2048, 8192)  # tokens where a range of positions ends and the next begins
VALID_DOCUMENTS = 32  # of a domain
LENGTHS = (512, 1024, 2048, 4096)  # tokens of the recall problems
PAIRS = 8  # of an mqar problem
# Tokens are 16-bit numbers: literal and position bits of 1 let LZMA model both bytes apart.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1}]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.language.prepare", __doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("NIRVANA_DATA"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--megabytes", type=float, default=17, help="of a domain's training text")
    parser.add_argument("--questions", type=int, default=500, help="of a benchmark at most")
    parser.add_argument("--problems", type=int, default=100, help="of a recall task and length")
    options = parser.parse_args(arguments)
    if options.data is None or not Path(options.data).is_dir():
        raise InputError("--data: give the folder that holds text/ and benchmarks/")
    prepare(options.data, options.out, options.megabytes, options.questions, options.problems)


def prepare(data: Path, out: Path, megabytes: float, questions: int, problems: int) -> None:
    """Writes both files into `out`; those of an earlier call are replaced.

    Raises:
        InputError: for a file that is missing or of another form.
    """
    written = {name: out / name for name in ("train.tar.xz", "evaluation.json.xz")}
    check_outputs(written, [data / "text", data / "benchmarks"])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name)
        for domain in DOMAINS:
            source = data / "text" / domain / "train.jsonl.xz"
            part, whole, kept = _subset(source, shards / f"{domain}.jsonl", megabytes)
            counts = tokenize([part], shards / domain, resolve("tiny"))
            print(
                f"{domain}: {counts.documents:,} of {whole:,} documents, "
                f"{counts.bytes / 1e6:.1f} MB ({kept:.0%}), {counts.tokens / 1e6:.2f} M tokens"
            )
        with (
            atomic_file(out / "train.tar.xz") as file,
            lzma.open(file, "wb", filters=XZ) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for domain in DOMAINS:
                tar.add(shards / domain, domain, filter=_anonymous)
    tokenizer = load_tokenizer(resolve("tiny"))
    found = {
        "tokenizer_sha256": sha256(resolve("tiny") / "tokenizer.json"),
        "edges": EDGES,
        "text": {
            "test": {d: _texts(data, d, "test", tokenizer, EDGES[-1], None) for d in DOMAINS},
            "valid": {
                d: _texts(data, d, "valid", tokenizer, EDGES[-2], VALID_DOCUMENTS) for d in DOMAINS
            },
        },
        "tasks": {
            name: read_questions(data / "benchmarks", name, tokenizer, questions) for name in TASKS
        },
        "recall": _recall(data, tokenizer, problems),
    }
    with atomic_file(out / "evaluation.json.xz") as file:
        file.write_bytes(lzma.compress(json.dumps(found, separators=(",", ":")).encode()))
    for file in ("train.tar.xz", "evaluation.json.xz"):
        print(f"{out / file}: {(out / file).stat().st_size / 1e6:.1f} MB")


def _subset(source: Path, out: Path, megabytes: float) -> tuple[Path, int, float]:
    """Evenly spaced documents of a file, how many it has, and what share of its bytes is kept."""
    sizes = [len(text.encode("utf-8")) for text in read_documents(source)]
    share = min(1.0, megabytes * 1e6 / sum(sizes))
    kept = 0
    with open(out, "w", encoding="utf-8") as file:
        for i, text in enumerate(read_documents(source)):
            if int((i + 1) * share) > int(i * share):
                file.write(json.dumps({"text": text}) + "\n")
                kept += sizes[i]
    if not kept:
        raise InputError(f"--megabytes = {megabytes:g} holds no document of {source}")
    return out, len(sizes), kept / sum(sizes)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same text always gives the same archive."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def _texts(
    data: Path, domain: str, split: str, tokenizer: Any, most: int, limit: int | None
) -> list[dict[str, list[int]]]:
    """The first `most` tokens of each document, BOS included, and the bytes of each range of
    `EDGES` that they spell."""
    encode = aligned_encoder(tokenizer)
    found = []
    for text in islice(read_documents(data / "text" / domain / f"{split}.jsonl.xz"), limit):
        ids, sizes = encode(text)
        spans = pairwise(EDGES)
        spelled = [sum(sizes[start - 1 : min(stop, most) - 1]) for start, stop in spans]
        found.append({"tokens": [tokenizer.bos_token_id, *ids][:most], "bytes": spelled})
    return found


def _recall(data: Path, tokenizer: Any, number: int) -> dict[str, list[dict[str, Any]]]:
    """Name@length -> problems of S-NIAH 1 to 3 and MQAR."""
    bos, encode = tokenizer.bos_token_id, text_encoder(tokenizer)
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    haystack = data / "text" / "novels" / "test.jsonl.xz"
    found = {}
    for length in LENGTHS:
        kinds: dict[str, Iterator[Any]] = {
            f"s_niah_{task}": make_niah(task, encode, bos, length, number, read_documents(haystack))
            for task in (1, 2, 3)
        }
        kinds["mqar"] = make_mqar(bos, words, length, PAIRS, number)
        for name, problems in kinds.items():
            found[f"{name}@{length}"] = [
                {"tokens": problem.tokens, "answers": problem.answers} for problem in problems
            ]
    return found


if __name__ == "__main__":
    script(main)
