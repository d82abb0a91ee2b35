"""Token shards of counted numbers, so that every token identifies its position."""

import numpy as np
import pytest

from nirvana.data.shards import TokenShards
from nirvana.files import sha256, write_json

BOS, EOS = 0, 1


def write_shards(folder, lengths, first=2, vocab_size=60000):
    """Documents of `lengths` tokens (BOS and EOS included) that count upwards from `first`."""
    folder.mkdir(parents=True)
    parts, value = [], first
    for length in lengths:
        parts.append([BOS, *range(value, value + length - 2), EOS])
        value += length - 2
    tokens = np.concatenate(parts).astype("<u2")
    tokens.tofile(folder / "tokens-00000.bin")
    np.save(folder / "documents.npy", np.cumsum([0, *lengths]))
    np.save(folder / "bytes.npy", np.array(lengths, dtype=np.int64) * 3)
    meta = {
        "dtype": "<u2",
        "vocab_size": vocab_size,
        "bos": BOS,
        "eos": EOS,
        "tokenizer_sha256": "same",
        "files": ["tokens-00000.bin"],
        "file_tokens": [len(tokens)],
        "sha256": {"tokens-00000.bin": sha256(folder / "tokens-00000.bin")},
    }
    write_json(folder / "meta.json", meta)
    return TokenShards(folder)


@pytest.fixture
def make_shards(tmp_path_factory):
    """A function from document lengths to token shards."""
    return lambda lengths, **more: write_shards(
        tmp_path_factory.mktemp("shards") / "shards", lengths, **more
    )
