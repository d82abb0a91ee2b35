"""Token shards, and the loader that packs their documents into rows.

The loader has no state: a batch is a function of the seed and the step alone, so its place in a
checkpoint is those two numbers, and any number of processes can share its work.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.files import sha256
from nirvana.packaged import local_or_packaged

IGNORE = -100  # the label of a position that is not trained on
PERIOD = 4096  # rows over which the shares of the sources are exact


class TokenShards:
    """The documents in a folder written by `nirvana.train.tokenize.tokenize`, or in packaged token
    shards (`quickstart/train`, `quickstart/valid`).

    Attributes:
        folder: where they lie.
        starts: int64 [documents + 1], where each document starts among all tokens.
        bytes: int64 [documents], UTF-8 bytes of each document's text.
        bos, eos, vocab_size: of the tokenizer.
        tokenizer_sha256: identifies the tokenizer.
        fingerprint: identifies the content.

    Raises:
        InputError: for a folder that does not hold token shards, or files of the wrong size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_or_packaged(folder)
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
        """The number of documents."""
        return len(self.bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, BOS and EOS included."""
        return int(self.starts[-1])

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tokens [start, stop) of a document, BOS first and EOS last, as int64."""
        first, end = int(self.starts[index]), int(self.starts[index + 1])
        stop = end - first if stop is None else min(stop, end - first)
        # A document never spans two files.
        file = int(np.searchsorted(self._file_starts, first, side="right")) - 1
        offset = first - int(self._file_starts[file])
        return self._read(file, offset + start, offset + stop)

    def _read(self, file: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a file. Not through a memory map, where a file that was cut short
        meanwhile would kill the process."""
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
        """The first `limit` documents in order: tokens with BOS and EOS, and bytes of the text."""
        for index in range(len(self) if limit is None else min(limit, len(self))):
            yield self.document(index), int(self.bytes[index])

    def verify(self) -> None:
        """Reads every file and compares its sum.

        Raises:
            InputError: naming the file that is damaged.
        """
        for name, expected in self._sums.items():
            if sha256(self.folder / name) != expected:
                raise InputError(f"{self.folder / name}: damaged: its SHA-256 is not the recorded")


@dataclass(frozen=True)
class _Epoch:
    """How one epoch of one source is cut into rows: documents one after another, in `order`."""

    order: np.ndarray  # [documents], which document comes when
    ends: np.ndarray  # [documents], tokens up to and with each of them
    rows: np.ndarray  # [rows], which stretch of the stream is the n-th row


class PackedLoader:
    """Rows of T tokens, packed from documents without padding.

    Each epoch of a source lines its documents up in a new order, cuts that line into rows of T
    tokens and shuffles the rows. A document that does not fit is cut: each piece is a sample of
    its own, whose positions start at 0 and whose state starts anew; only the first piece has BOS.
    The last row of an epoch may end in padding. Without `reset` a row is one sample: its state is
    carried from document to document. Over each 4096 rows the sources have their shares
    of rows exactly (to the whole row, at least one), evenly mixed.

    Args:
        sources: name -> shards; all by one tokenizer.
        context_length: T.
        batch_size: rows in a batch.
        seed: of orders and mixing.
        weights: name -> share of the rows, at least 0; None: by number of tokens.
        parts: batches that make one step (micro batches of all processes).
        reset: whether the state starts anew at every document.

    Raises:
        InputError: for sources of different tokenizers.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        context_length: int,
        batch_size: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        parts: int = 1,
        reset: bool = True,
    ) -> None:
        first = next(iter(sources.values()))
        for shards in sources.values():
            if shards.tokenizer_sha256 != first.tokenizer_sha256:
                raise InputError(
                    f"{shards.folder} and {first.folder} were written with different tokenizers; "
                    "tokenize both with the same --tokenizer"
                )
        shares = {
            name: shards.num_tokens if weights is None else weights[name]
            for name, shards in sources.items()
        }
        # A source of weight 0 is never read.
        self._sources = [shards for name, shards in sources.items() if shares[name] > 0]
        self._quota = _apportion(np.array([share for share in shares.values() if share > 0]))
        self._context = context_length
        self._batch_size = batch_size
        self._seed = seed
        self._parts = parts
        self._reset = reset
        self._planning = Lock()  # threads that meet a new epoch plan it once
        # Bounded: a batch may straddle two epochs of every source.
        self._epoch = lru_cache(maxsize=2 * len(self._sources))(self._plan_epoch)
        self._period = lru_cache(maxsize=2)(self._plan_period)

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """One batch: int64 tensors [B, T].

        Args:
            step: from 0.
            part: which of the step's batches, 0..parts-1.

        Returns:
            input_ids: tokens; EOS where a row is padded.
            position_ids: place in the piece; 0 where a document or a piece begins.
            labels: the token that follows each token of `input_ids` in its document, already
                shifted; -100 after the last token of a document and at padding.
        """
        first = (step * self._parts + part) * self._batch_size
        rows = [self._row(first + i) for i in range(self._batch_size)]
        names = ("input_ids", "position_ids", "labels")
        stacked = (np.stack(column) for column in zip(*rows, strict=True))
        return {name: torch.from_numpy(s) for name, s in zip(names, stacked, strict=True)}

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stand after `step` steps, as plain data: two loaders of equal positions
        give equal batches from there on."""
        return {
            "seed": self._seed,
            "next_row": step * self._parts * self._batch_size,
            "context_length": self._context,
            "reset": self._reset,
            "tokenizer": self._sources[0].tokenizer_sha256,
            "sources": {
                str(i): {"content": shards.fingerprint, "rows_of_4096": int(rows)}
                for i, (shards, rows) in enumerate(zip(self._sources, self._quota, strict=True))
            },
        }

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        period, place = divmod(index, PERIOD)
        source, before = (int(each[place]) for each in self._period(period))
        return self._pack(source, period * int(self._quota[source]) + before)

    def _pack(self, source: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The row `number` of a source, counted through all its epochs."""
        T = self._context
        shards = self._sources[source]
        epoch, row = divmod(number, _ceil(shards.num_tokens, T))
        with self._planning:
            plan = self._epoch(source, epoch)
        inputs = np.full(T, shards.eos, dtype=np.int64)
        positions = np.empty(T, dtype=np.int64)
        labels = np.full(T, IGNORE, dtype=np.int64)
        begin = int(plan.rows[row]) * T
        end = min(begin + T, shards.num_tokens)
        at = begin
        slot = int(np.searchsorted(plan.ends, begin, side="right"))
        while at < end:
            document = int(plan.order[slot])
            length = int(shards.starts[document + 1] - shards.starts[document])
            start = at - (int(plan.ends[slot]) - length)
            count = min(end - at, length - start)
            tokens = shards.document(document, start, start + count + 1)
            place = at - begin
            inputs[place : place + count] = tokens[:count]
            labels[place : place + len(tokens) - 1] = tokens[1:]
            positions[place : place + count] = np.arange(count)
            at += count
            slot += 1
        positions[end - begin :] = np.arange(begin + T - end)
        if not self._reset:
            positions = np.arange(T)
        return inputs, positions, labels

    def _plan_epoch(self, source: int, epoch: int) -> _Epoch:
        shards = self._sources[source]
        random = np.random.default_rng([self._seed, 0, source, epoch])
        order = random.permutation(len(shards))
        ends = np.cumsum(np.diff(shards.starts)[order])
        return _Epoch(order, ends, random.permutation(_ceil(shards.num_tokens, self._context)))

    def _plan_period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a period: its source, and how many rows of that source precede it."""
        random = np.random.default_rng([self._seed, 1, period])
        times = [(np.arange(n) + random.random(n)) / n for n in self._quota]
        sources = np.repeat(np.arange(len(self._quota)), self._quota)
        sources = sources[np.argsort(np.concatenate(times), kind="stable")]
        before = np.empty(PERIOD, dtype=np.int64)
        for source, n in enumerate(self._quota):
            before[sources == source] = np.arange(n)
        return sources, before


class ReadAhead:
    """Batches that threads have ready when they are asked for: those of the step after.

    Args:
        batch: a function of step and part alone.
        workers: number of threads.
    """

    def __init__(self, batch: Callable[[int, int], Any], workers: int) -> None:
        self._batch = batch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
        self._coming: dict[tuple[int, int], Future[Any]] = {}

    def get(self, step: int, part: int) -> Any:
        """The batch; what reading it raised is raised here."""
        found = self._coming.pop((step, part), None)
        batch = self._batch(step, part) if found is None else found.result()
        self._coming[step + 1, part] = self._pool.submit(self._batch, step + 1, part)
        return batch


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _apportion(shares: np.ndarray) -> np.ndarray:
    """Whole rows of a period for each source, by largest remainder, at least one for each."""
    exact = shares / shares.sum() * PERIOD
    quota = np.maximum(1, np.floor(exact)).astype(np.int64)
    while quota.sum() < PERIOD:
        quota[np.argmax(exact - quota)] += 1
    while quota.sum() > PERIOD:
        quota[np.argmax(quota)] -= 1
    return quota
