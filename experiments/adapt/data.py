"""The prepared data of the study, and where its rows lie."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.prepared import load_prepared, load_scored

HERE = Path(__file__).parent
FOLDER = HERE / "data"
SCORED = "documents.json.xz"
PROGRAM = "experiments.adapt.prepare"  # that writes the data
RESULTS = HERE / "results.jsonl.xz"
BLOCK = 256  # tokens whose nats are one number in the results
TOKENS = 4096  # predicted tokens of a document in the main table
LONG = 32768  # and of a long document


@dataclass(frozen=True)
class Document:
    """A document as tokens.

    Attributes:
        tokens: BOS first; 1 + a multiple of `BLOCK`.
        bytes: UTF-8 bytes of each block.
        packed: bytes of its first `TOKENS` tokens, and of three quarters of them, by xz and PPMd;
            empty for a text that was encoded anew.
    """

    tokens: list[int]
    bytes: list[int]
    packed: dict[str, list[int]]


@dataclass(frozen=True)
class Data:
    """What `experiments.adapt.prepare` wrote.

    Attributes:
        test: domain -> documents.
        valid: the same, of documents from which settings are chosen.
        recall: name -> problems, {"tokens", "answers"}.
        shards: folder of the training text's shards, by domain; None: documents alone were read.
        identity: a hash of it all.
    """

    test: dict[str, list[Document]]
    valid: dict[str, list[Document]]
    recall: dict[str, list[dict[str, Any]]]
    shards: Path | None
    identity: str


def load_data(folder: Path) -> Data:
    """Reads the prepared data; the shards are unpacked beside their archive, once.

    Raises:
        InputError: for data that `experiments.adapt.prepare` did not write.
    """
    shards, found, identity = load_prepared(folder, SCORED, PROGRAM)
    return _data(found, shards, identity)


def load_documents(file: Path) -> Data:
    """Reads the prepared documents alone, which are all that a trained model needs.

    Args:
        file: documents.json.xz.

    Raises:
        InputError: for a file that `experiments.adapt.prepare` did not write.
    """
    found, identity = load_scored(file, PROGRAM)
    return _data(found, None, identity)


def _data(found: dict[str, Any], shards: Path | None, identity: str) -> Data:
    test, valid = (
        {domain: [Document(**each) for each in documents] for domain, documents in split.items()}
        for split in (found["test"], found["valid"])
    )
    return Data(test, valid, found["recall"], shards, identity)


def order(text: str) -> bytes:
    """The order in which documents are drawn: that of the SHA-256 of their text."""
    return hashlib.sha256(text.encode()).digest()
