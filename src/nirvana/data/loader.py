"""The loader that packs the documents of token shards into rows.

The loader has no state: a batch is a function of the seed and the step alone. Its place in a
checkpoint is therefore these two numbers, and any number of processes can share its work.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nirvana.data.shards import TokenShards
from nirvana.errors import InputError

IGNORE = -100  # the label of a position without loss
PERIOD = 4096  # rows over which the shares of the sources are exact


@dataclass(frozen=True)
class _Epoch:
    """How one epoch of one source is cut into rows; the documents are concatenated in `order`."""

    order: np.ndarray  # [documents], a permutation of the documents
    ends: np.ndarray  # [documents], number of tokens up to the end of each document in `order`
    rows: np.ndarray  # [rows], index of the n-th row's span of T tokens in the concatenation


class PackedLoader:
    """Packs documents into rows of T tokens without padding.

    Each epoch of a source concatenates its documents in a new order, cuts the result into rows of T
    tokens and shuffles the rows. A document that does not fit is cut: each piece is a separate
    sample, with positions from 0 and a fresh state; only the first piece has BOS. The last row of
    an epoch may end in padding. Without `reset` a row is one sample, whose state carries over from
    document to document. In each 4096 rows every source has its exact share (rounded to whole rows,
    at least one), evenly mixed.

    Args:
        sources: name -> shards, all of one tokenizer.
        context_length: T, tokens of a row.
        batch_size: B, rows of a batch.
        seed: of the orders and of the mixing.
        weights: name -> share of the rows, at least 0; None: by number of tokens.
        parts: batches of one step (micro batches of all processes).
        reset: whether every document starts with a fresh state.

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
        self._names = [name for name in sources if shares[name] > 0]
        # A source of weight 0 is never read.
        self._sources = [shards for name, shards in sources.items() if shares[name] > 0]
        self._quota = _apportion(np.array([share for share in shares.values() if share > 0]))
        self._context = context_length
        self._batch_size = batch_size
        self._seed = seed
        self._parts = parts
        self._reset = reset
        self._planning = Lock()  # one thread plans a new epoch, the others wait
        # A batch may span two epochs of every source.
        self._epoch = lru_cache(maxsize=2 * len(self._sources))(self._plan_epoch)
        self._period = lru_cache(maxsize=2)(self._plan_period)

    def batch(self, step: int, part: int = 0) -> dict[str, Tensor]:
        """Builds one batch.

        Args:
            step: from 0.
            part: which of the step's batches, 0 to parts - 1.

        Returns:
            Three int64 tensors [B, T]. `input_ids`: tokens; EOS where a row is padded.
            `position_ids`: position within the piece; 0 where a document or a piece starts.
            `labels`: the token that follows each token of `input_ids` in its document, already
            shifted; -100 after the last token of a document and at padding.
        """
        first = (step * self._parts + part) * self._batch_size
        rows = [self._row(first + i) for i in range(self._batch_size)]
        names = ("input_ids", "position_ids", "labels")
        stacked = (np.stack(column) for column in zip(*rows, strict=True))
        return {name: torch.from_numpy(s) for name, s in zip(names, stacked, strict=True)}

    def position(self, step: int) -> dict[str, Any]:
        """Describes the position in the data after `step` steps.

        Args:
            step: steps done.

        Returns:
            Plain data; two loaders with equal positions return equal batches from there on.
        """
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

    def epochs(self, steps: int) -> dict[str, float]:
        """Computes how often each source is read.

        Args:
            steps: of the run.

        Returns:
            Name -> epochs, without sources of weight 0.
        """
        rows = steps * self._parts * self._batch_size / PERIOD * self._quota
        return {
            name: float(n / _ceil(shards.num_tokens, self._context))
            for name, shards, n in zip(self._names, self._sources, rows, strict=True)
        }

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        period, place = divmod(index, PERIOD)
        source, before = (int(each[place]) for each in self._period(period))
        return self._pack(source, period * int(self._quota[source]) + before)

    def _pack(self, source: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `number` of a source, counted over all its epochs: inputs, positions, labels [T]."""
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
        """For each row of a period: its source, and the number of earlier rows of that source."""
        random = np.random.default_rng([self._seed, 1, period])
        times = [(np.arange(n) + random.random(n)) / n for n in self._quota]
        sources = np.repeat(np.arange(len(self._quota)), self._quota)
        sources = sources[np.argsort(np.concatenate(times), kind="stable")]
        before = np.empty(PERIOD, dtype=np.int64)
        for source, n in enumerate(self._quota):
            before[sources == source] = np.arange(n)
        return sources, before


class ReadAhead:
    """Prefetches batches in threads: a request for a step also starts the same part of the next.

    Args:
        batch: builds a batch from step and part alone.
        workers: number of threads.
    """

    def __init__(self, batch: Callable[[int, int], Any], workers: int) -> None:
        self._batch = batch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
        self._pending: dict[tuple[int, int], Future[Any]] = {}

    def get(self, step: int, part: int) -> Any:
        """Returns a batch, read ahead if it was expected.

        Args:
            step: from 0.
            part: which of the step's batches.

        Returns:
            What `batch(step, part)` returns.

        Raises:
            InputError: when the batch could not be read.
        """
        prefetched = self._pending.pop((step, part), None)
        batch = self._batch(step, part) if prefetched is None else prefetched.result()
        self._pending[step + 1, part] = self._pool.submit(self._batch, step + 1, part)
        return batch


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _apportion(shares: np.ndarray) -> np.ndarray:
    """Rows of a period for each source, by largest remainder, at least one for each."""
    exact = shares / shares.sum() * PERIOD
    quota = np.maximum(1, np.floor(exact)).astype(np.int64)
    while quota.sum() < PERIOD:
        quota[np.argmax(exact - quota)] += 1
    while quota.sum() > PERIOD:
        quota[np.argmax(quota)] -= 1
    return quota
