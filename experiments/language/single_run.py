"""One run of the study: trains a variant and scores it."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.common.benchmarks import chance, point
from experiments.language.probe import probe_trigger
from experiments.language.variants import PEERS, SETTINGS, Budget, fields_of
from nirvana.config import from_dict
from nirvana.device import peak_memory
from nirvana.evaluate.likelihood import TokenLikelihoods, token_log_likelihoods
from nirvana.train.config import LanguageConfig
from nirvana.train.distributed import ProcessContext
from nirvana.train.language import LanguageTask
from nirvana.train.optim import build_optimizer
from nirvana.train.trainer import Trainer

LOGGED = 25  # lines of loss and speed in a training


def run(
    variant: str,
    seed: int,
    setting: str,
    budget: Budget,
    shards: Path,
    evaluation: dict[str, Any],
    device: torch.device,
    compiled: bool,
    log_progress: Callable[[str], None],
    save: Path | None = None,
) -> dict[str, Any]:
    """Trains and scores one variant; everything that is recorded, as plain data.

    Args:
        shards: folder of each domain's token shards.
        evaluation: what `experiments.language.prepare` wrote.
        compiled: compile the blocks.
        log_progress: called with a line of progress.
        save: folder to write the model to, as transformers loads it.
    """
    config = configuration(variant, seed, setting, budget, shards, device)
    started = time.perf_counter()
    torch.manual_seed(seed)
    task = LanguageTask(config, device)
    if device.type == "cuda":
        gc.collect()  # of the run before
        torch.cuda.reset_peak_memory_stats(device)
    trainer, figures = train(task, config, ProcessContext(device), compiled, log_progress)
    trained = time.perf_counter()
    model: Any = task.model.eval()
    # Scored texts have many shapes, each of which would be compiled again.
    with torch.no_grad(), trainer.autocast(), torch.compiler.set_stance("force_eager"):
        # The results page shows ablations on text alone.
        scored = evaluation if variant in PEERS else {**evaluation, "tasks": {}, "recall": {}}
        scores = score(model, scored, budget.context_length * budget.rows)
        if model.config.has_trigger:
            scores["trigger"] = probe_trigger(
                model, evaluation, budget.context_length * budget.rows
            )
    if save is not None:
        model.save_pretrained(save)
        task.tokenizer.save_pretrained(save)
    ended = time.perf_counter()
    seconds = {"training": round(trained - started, 1), "scoring": round(ended - trained, 1)}
    return {
        "model": fields_of(variant, budget.size),
        "parameters": sum(p.numel() for p in model.parameters()),
        **figures,
        "seconds": seconds,
        **scores,
    }


def configuration(
    variant: str, seed: int, setting: str, budget: Budget, shards: Path, device: torch.device
) -> LanguageConfig:
    """The trainer's configuration of a run."""
    domains = SETTINGS[setting]
    tree = {
        "model": {"preset": "tiny", **fields_of(variant, budget.size)},
        "data": {
            "train": {domain: str(shards / domain) for domain in domains},
            "weights": dict.fromkeys(domains, 1.0),
            "context_length": budget.context_length,
            "batch_size": budget.rows,
        },
        "optim": {
            "lr": budget.lr,
            "min_lr": budget.lr / 10,
            "warmup_steps": round(budget.warmup * budget.steps),
        },
        "run": {"out": "unused", "steps": budget.steps, "seed": seed, "device": str(device)},
    }
    return from_dict(LanguageConfig, tree, "")


def train(
    task: LanguageTask,
    config: LanguageConfig,
    processes: ProcessContext,
    compiled: bool,
    log_progress: Callable[[str], None],
) -> tuple[Trainer, dict[str, Any]]:
    """The package's own training steps, without checkpoints: a run takes a minute."""
    task.prepare(processes, compiled)
    parameters = list(task.trainable())
    optimizer = build_optimizer(parameters, config.optim, task.undecayed)
    trainer = Trainer(task, config.optim, config.run, parameters, optimizer, processes)
    task.model.train()
    steps, losses, rates = config.run.steps, [], []
    every = max(1, steps // LOGGED)
    for step in range(steps):
        trainer.step(step, [task.batch(step, 0)])
        if (step + 1) % every == 0 or step + 1 == steps:
            line = trainer.metrics(step + 1)
            losses.append([step + 1, line["loss"] and round(line["loss"], 4)])
            rates.append(line["tokens_per_second"])
            log_progress(f"step {step + 1}/{steps} loss {line['loss']} {rates[-1]:,.0f} tokens/s")
    return trainer, {
        "steps": steps,
        "losses": losses,
        # Blocks are compiled in the first steps.
        "tokens_per_second": round(median(rates[1:] or rates)),
        "memory_gib": round(peak_memory(processes.device) / 2**30, 2),
        "skipped": line["skipped"],
    }


def score(model: Any, evaluation: dict[str, Any], batch_tokens: int) -> dict[str, Any]:
    """Bits of every document in every range of positions, points of every question, and for every
    recall problem the share of right answers and the bits of an answer."""
    found: dict[str, Any] = {"edges": evaluation["edges"], "text": {}, "tasks": {}, "recall": {}}
    edges = evaluation["edges"]
    for split, domains in evaluation["text"].items():
        documents = [document for each in domains.values() for document in each]
        read = iter(_scores(model, [each["tokens"] for each in documents], batch_tokens))
        found["text"][split] = {
            domain: {
                "bits": [_ranges(next(read)[0], edges) for _ in each],
                "bytes": [document["bytes"] for document in each],
            }
            for domain, each in domains.items()
        }
    questions = [question for each in evaluation["tasks"].values() for question in each]
    read = iter(_scores(model, [r for q in questions for r in q["rows"]], batch_tokens))
    for name, each in evaluation["tasks"].items():
        points = [point(question, [next(read) for _ in question["rows"]]) for question in each]
        found["tasks"][name] = {"points": "".join(map(str, points)), "chance": chance(each)}
    problems = [problem for each in evaluation["recall"].values() for problem in each]
    read = iter(_scores(model, [each["tokens"] for each in problems], batch_tokens))
    for name, each in evaluation["recall"].items():
        answered = [_recall(problem, *next(read)) for problem in each]
        points, bits = zip(*answered, strict=True)
        found["recall"][name] = {"points": list(points), "bits": list(bits)}
    return found


def _scores(model: Any, rows: Sequence[Sequence[int]], batch_tokens: int) -> list[TokenLikelihoods]:
    """Scores rows in batches of `batch_tokens` tokens, whatever their number."""
    return token_log_likelihoods(model, rows, batch_size=len(rows), batch_tokens=batch_tokens)


def _ranges(nll: Tensor, edges: Sequence[int]) -> list[float]:
    """Bits of a document's tokens between each two edges; entry t - 1 is token t's nll."""
    spans = pairwise(edges)
    return [round(float(nll[a - 1 : b - 1].sum()) / math.log(2), 1) for a, b in spans]


def _recall(problem: dict[str, Any], nll: Tensor, is_argmax: Tensor) -> tuple[float, float]:
    spans = [slice(start - 1, stop - 1) for start, stop in problem["answers"]]
    right = [bool(is_argmax[span].all()) for span in spans]
    bits = sum(float(nll[span].sum()) for span in spans) / math.log(2) / len(spans)
    return round(sum(right) / len(right), 4), round(bits, 2)
