"""Tasks of the lm-eval library on a model in memory: our own local ones and those of the hub.

Texts are read as in training, which the library's own adapter does not do: BOS once in front,
spelled-out special tokens as text, no cut at a maximum length, for the state carries everything.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import StoppingCriteria

from nirvana.errors import InputError
from nirvana.evaluate.perplexity import PIECE_TOKENS, read_tokens, score_tokens
from nirvana.evaluate.tasks import answer_tokens, benchmark_folder, task_config
from nirvana.text import text_encoder

MAX_NEW_TOKENS = 256  # of an answer whose task does not say
FEWSHOT_SEED = 1234  # lm-eval's own, so that its program asks with the same examples
BOOTSTRAP = 1000  # resamples for the errors of metrics that are no means


class HarnessModel(LM):
    """A model and its tokenizer as lm-eval asks them.

    Args:
        model: a causal language model of transformers; put into eval mode.
        tokenizer: its fast tokenizer, with a BOS token.
        batch_size: sequences read at once, where they are no longer than a piece of 2048 tokens;
            changes nothing but speed and rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        super().__init__()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._encode = text_encoder(tokenizer)
        self._batch_size = batch_size

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """ln p of each continuation given its context, and whether greedy decoding writes it."""
        rows = [self._row(*request.args) for request in requests]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        answers: dict[int, tuple[float, bool]] = {}
        short = [i for i in order if len(rows[i][0]) <= PIECE_TOKENS]
        for begin in range(0, len(short), self._batch_size):
            batch = short[begin : begin + self._batch_size]
            found = self._read_batch([rows[i] for i in batch])
            answers.update(zip(batch, found, strict=True))
        for i in order[len(short) :]:
            tokens, start = rows[i]
            costs, hits = read_tokens(self._model, torch.tensor(tokens), start)
            answers[i] = (-float(costs.sum()), bool(hits.all()))
        return [answers[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p of each text as a document of its own."""
        rows = [[self._bos, *self._encode([request.args[0]])[0]] for request in requests]
        return [
            -float(score_tokens(self._model, torch.tensor(row)).sum()) if len(row) > 1 else 0.0
            for row in rows
        ]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to the first of the task's stop words."""
        return [self._generate(*request.args) for request in requests]

    @property
    def _bos(self) -> int:
        return self._tokenizer.bos_token_id

    def _row(self, context: str, continuation: str) -> tuple[list[int], int]:
        """BOS and the tokens of `answer_tokens`, and the first of the continuation."""
        tokens, first = answer_tokens(self._encode, context, continuation)
        return [self._bos, *tokens], 1 + first

    @torch.no_grad()
    def _read_batch(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        lengths = [len(tokens) for tokens, _ in rows]
        device = next(self._model.parameters()).device
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64, device=device)
        mask = torch.zeros_like(tokens)
        for row, (ids, _) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids, device=device)
            mask[row, : len(ids)] = 1
        keep = max(lengths) - min(start for _, start in rows) + 1
        output = self._model(
            input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=keep
        )
        answers = []
        for row, (ids, start) in enumerate(rows):
            skipped = max(lengths) - keep
            logits: Tensor = output.logits[row, start - 1 - skipped : len(ids) - 1 - skipped]
            targets = tokens[row, start : len(ids)]
            cost = F.cross_entropy(logits.float(), targets, reduction="none").double().sum()
            answers.append((-float(cost), bool((logits.argmax(-1) == targets).all())))
        return answers

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens = torch.tensor([[self._bos, *self._encode([context])[0]]], device=self._model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            sampling = {"do_sample": True, "top_k": 0}
            sampling |= {k: settings[k] for k in ("temperature", "top_p", "top_k") if k in settings}
        written = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=settings.get("max_gen_toks") or MAX_NEW_TOKENS,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            stopping_criteria=[_Written(self._tokenizer, tokens.shape[1], stops)],
            **sampling,
        )
        text = self._tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class _Written(StoppingCriteria):
    """Ends a generation of one row when one of the stop words stands in it."""

    def __init__(self, tokenizer: Any, start: int, stops: list[str]) -> None:
        self._tokenizer, self._start, self._stops = tokenizer, start, stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        text = self._tokenizer.decode(input_ids[0, self._start :])
        done = any(stop in text for stop in self._stops)
        return torch.tensor([done], device=input_ids.device)


def run_tasks(
    model: Any,
    tokenizer: Any,
    local: Sequence[str],
    hub: Sequence[str],
    folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Scores a model on tasks.

    Args:
        model, tokenizer, batch_size: see `HarnessModel`.
        local: names out of `nirvana.evaluate.tasks.TASKS`.
        hub: names of tasks, groups or tags of the lm-eval library, whose data it fetches.
        folder: of the local benchmark files; None: see `benchmark_folder`.
        limit: questions of each task at most; None: all.

    Returns:
        name -> {"figures": metric -> value, "each": {"metric", "points" of every question,
        "sha256" of the questions}}; tasks without points of single questions, and groups, have no
        "each".

    Raises:
        InputError: for tasks or files that are not there, or data that cannot be fetched.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("the model's tokenizer has no BOS token, with which every text begins")
    configs = [task_config(name, benchmark_folder(folder)) for name in local]
    with _quiet():
        results = _evaluate(
            HarnessModel(model, tokenizer, batch_size), [*configs, *hub], bool(hub), limit
        )
    found: dict[str, dict[str, Any]] = {}
    for name, figures in results["results"].items():
        found[name] = {"figures": _figures(figures)}
        each = _each(results["samples"].get(name, []))
        if each:
            found[name]["each"] = each
    return found


def _evaluate(model: LM, tasks: list[Any], hub: bool, limit: int | None) -> dict[str, Any]:
    names = ", ".join(task for task in tasks if isinstance(task, str))
    manager = TaskManager(include_defaults=hub)
    unknown = [task for task in tasks if isinstance(task, str) and task not in manager.all_tasks]
    if unknown:
        raise InputError(f"hub:{unknown[0]}: the lm-eval library has no task of that name")
    try:
        loaded = manager.load(tasks)
    except ImportError as error:  # some tasks of the library need packages of their own
        raise InputError(f"{names}: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        if not names:
            raise
        raise InputError(
            f"{names}: the task's data cannot be fetched: {_first_line(error)}"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"hub:{name}: this task executes what the model writes; not done here")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
    assert results is not None  # only other ranks of a group of processes get nothing
    return dict(results)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's notes on its own settings, which are not the user's here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "metric,filter" as our names, finite numbers alone."""
    plain = {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float) and math.isfinite(value):
            plain[metric if kind == "none" else f"{metric} ({kind})"] = float(value)
    return plain


def _each(samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The points of every question by the task's first metric that gives numbers."""
    if not samples:
        return None
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    samples.sort(key=lambda sample: sample["doc_id"])
    for metric in samples[0]["metrics"]:
        points = [sample.get(metric) for sample in samples]
        if all(isinstance(point, int | float) and math.isfinite(point) for point in points):
            content = "".join(sample["doc_hash"] + sample["prompt_hash"] for sample in samples)
            digest = hashlib.sha256(content.encode()).hexdigest()
            return {"metric": metric, "points": [float(p) for p in points], "sha256": digest}  # type: ignore[arg-type]
    return None
