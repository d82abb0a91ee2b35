"""Tasks of the lm-eval library on a model in memory: local benchmark files and tasks of the hub.

Unlike the library's own adapter, this one encodes texts as in training: a single BOS in front, text
that spells a special token as plain text, and no truncation, since the state has a fixed size.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import StoppingCriteria

from nirvana.data.tokenizer import text_encoder
from nirvana.errors import InputError
from nirvana.evaluate.likelihood import PIECE_TOKENS, token_log_likelihoods
from nirvana.evaluate.tasks import answer_tokens, benchmark_folder, task_config

MAX_NEW_TOKENS = 256  # of an answer, where the task sets no limit
FEWSHOT_SEED = 1234  # of lm-eval's own program, which then selects the same examples
BOOTSTRAP = 1000  # resamples for the standard errors of metrics other than means


class HarnessModel(LM):
    """Adapter of a model and its tokenizer to the interface of lm-eval.

    Args:
        model: a causal language model of transformers; put into eval mode.
        tokenizer: its fast tokenizer, with a BOS token.
        batch_size: sequences read at once, of those no longer than `PIECE_TOKENS`; affects speed
            and rounding only.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        super().__init__()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._encode = text_encoder(tokenizer)
        self._batch_size = batch_size

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Scores continuations.

        Args:
            requests: `args` of each are context and continuation.

        Returns:
            ln p of each continuation given its context, and whether greedy decoding produces it.
        """
        rows = [self._row(*request.args) for request in requests]
        scores = token_log_likelihoods(
            self._model,
            [tokens for tokens, _ in rows],
            [start for _, start in rows],
            batch_size=self._batch_size,
            piece=PIECE_TOKENS,
        )
        return [(-float(each.nll.sum()), bool(each.is_argmax.all())) for each in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Scores texts as documents.

        Args:
            requests: `args` of each is the text.

        Returns:
            ln p of each text; 0 for an empty one.
        """
        rows = [[self._bos, *self._encode([request.args[0]])[0]] for request in requests]
        return [
            -float(token_log_likelihoods(self._model, [row])[0].nll.sum()) if len(row) > 1 else 0.0
            for row in rows
        ]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates a continuation of each context, up to the first stop word.

        Args:
            requests: `args` of each are the context and the generation settings.

        Returns:
            The continuations, without stop words.
        """
        return [self._generate(*request.args) for request in requests]

    @property
    def _bos(self) -> int:
        return self._tokenizer.bos_token_id

    def _row(self, context: str, continuation: str) -> tuple[list[int], int]:
        """BOS and the tokens of `answer_tokens`, and the index of the first scored token."""
        tokens, first = answer_tokens(self._encode, context, continuation)
        return [self._bos, *tokens], 1 + first

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
            stopping_criteria=[_StopWords(self._tokenizer, tokens.shape[1], stops)],
            **sampling,
        )
        text = self._tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class _StopWords(StoppingCriteria):
    """Stops the generation of one row when its text contains one of the stop words."""

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
        model: see `HarnessModel`.
        tokenizer: see `HarnessModel`.
        local: names from `nirvana.evaluate.tasks.TASKS`.
        hub: names of tasks, groups or tags of the lm-eval library, which downloads their data.
        folder: of the local benchmark files; None: see `benchmark_folder`.
        limit: questions of each task at most; None: all.
        batch_size: see `HarnessModel`.

    Returns:
        Name -> {"figures": metric -> value, "each": {"metric", "points" of every question,
        "sha256" of the questions}}; tasks without points of single questions, and groups, have no
        "each".

    Raises:
        InputError: for missing tasks or files, or data that cannot be downloaded.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("the model's tokenizer has no BOS token, with which every text starts")
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
            raise InputError(f"hub:{name}: refused, since this task executes what the model writes")
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
    """Silences the library's notes on its own settings, which the user cannot change here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """Renames lm-eval's "metric,filter" to "metric" or "metric (filter)"; finite numbers only."""
    plain = {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float) and math.isfinite(value):
            plain[metric if kind == "none" else f"{metric} ({kind})"] = float(value)
    return plain


def _each(samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The points of every question, by the task's first metric with a number for each."""
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
