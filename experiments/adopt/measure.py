"""What the study measures of a model."""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from experiments.common.benchmarks import chance, point, read_questions
from nirvana.data.documents import read_documents
from nirvana.data.tokenizer import text_encoder
from nirvana.device import peak_memory
from nirvana.evaluate.likelihood import token_log_likelihoods
from nirvana.evaluate.niah import make_niah
from nirvana.evaluate.perplexity import read_files
from nirvana.evaluate.recall import answer_all
from nirvana.generate.graph_decoder import Decoder
from nirvana.model.cache import CACHE_FIELD
from nirvana.model.nirvana import NirvanaForCausalLM

WORDS = (
    *("apple", "river", "stone", "cloud", "tiger", "lamp"),
    *("garden", "paper", "silver", "bridge", "window", "horse"),
)
KINDS = ("copy", "add", "recall", "format")
SHOTS = 4
BATCH = 64  # answers of benchmarks that are read together


def bits_per_byte(
    model: Any, tokenizer: Any, files: dict[str, Path], limit: int | None
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """Bits per byte of each file, and tokens, bits and bytes of each of its documents."""
    scores = read_files(model, tokenizer, files, limit)
    documents = {
        name: [
            [each.tokens, round(each.nats / math.log(2), 2), each.bytes] for each in score.documents
        ]
        for name, score in scores.items()
    }
    return {name: score.total.bits_per_byte for name, score in scores.items()}, documents


def shares(points: Mapping[str, str]) -> dict[str, float]:
    """Name -> share of right answers, of points such as "0110", one digit for each problem."""
    return {name: each.count("1") / len(each) for name, each in points.items()}


def benchmarks(
    model: Any, tokenizer: Any, tasks: Sequence[str], number: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Points of the first questions of tasks of the harness, and the share that a guess has."""
    found = {}
    for name in tasks:
        questions = read_questions(folder, name, tokenizer, number)
        rows = [row for question in questions for row in question["rows"]]
        scores = iter(token_log_likelihoods(model, rows, batch_size=BATCH))
        points = [point(each, [next(scores) for _ in each["rows"]]) for each in questions]
        found[name] = {"points": "".join(map(str, points)), "chance": chance(questions)}
    return found


def needles(
    model: Any, tokenizer: Any, lengths: Sequence[int], number: int, haystack: Path
) -> dict[str, str]:
    """Points of S-NIAH 1 and 2 at each length; problems are read whole and together."""
    encode, found = text_encoder(tokenizer), {}
    for length in lengths:
        for task in (1, 2):
            texts = read_documents(haystack)
            problems = make_niah(task, encode, tokenizer.bos_token_id, length, number, texts)
            recall = answer_all(model, problems, piece=length, batch_size=number)
            found[f"{task} at {length}"] = "".join(str(int(each)) for each in recall.points)
    return found


def problem(kind: str, dice: random.Random) -> tuple[str, str]:
    """A question and the answer with which a right continuation begins."""
    words = dice.sample(WORDS, 5)
    if kind == "copy":
        return f"Copy: {' '.join(words)}\nCopied:", f" {' '.join(words)}\n"
    if kind == "add":
        a, b = dice.randint(10, 99), dice.randint(10, 99)
        return f"{a} + {b} =", f" {a + b}\n"
    if kind == "recall":
        values = [dice.randint(100, 999) for _ in words]
        listed = ", ".join(f"{word} = {value}" for word, value in zip(words, values, strict=True))
        at = dice.randrange(5)
        return f"{listed}\nValue of {words[at]}:", f" {values[at]}\n"
    return f"Name {words[0]}, number {len(words[1])}\nJSON:", (
        f' {{"name": "{words[0]}", "number": {len(words[1])}}}\n'
    )


def generated(model: Any, tokenizer: Any, number: int) -> dict[str, str]:
    """Points of problems of each kind, 1 where greedy generation answers exactly, after `SHOTS`
    examples."""
    encode, found = text_encoder(tokenizer), {}
    for kind in KINDS:
        dice = random.Random(0)
        prompts, answers = [], []
        for _ in range(number):
            examples = [problem(kind, dice) for _ in range(SHOTS)]
            question, answer = problem(kind, dice)
            prompts.append("".join(q + a for q, a in examples) + question)
            answers.append(answer)
        room = max(map(len, encode(answers))) + 2
        rows = [[tokenizer.bos_token_id, *ids] for ids in encode(prompts)]
        texts = tokenizer.batch_decode(continued(model, rows, room))
        right = [
            str(int(text.startswith(answer.rstrip("\n"))))
            for text, answer in zip(texts, answers, strict=True)
        ]
        found[kind] = "".join(right)
    return found


@torch.no_grad()
def continued(model: Any, rows: Sequence[Sequence[int]], number: int) -> Tensor:
    """The `number` tokens that greedily follow each row; rows are read together, padded at their
    start. After the end of a text comes padding."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
    out = model.generate(
        tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=number,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, length:].cpu()


@torch.no_grad()
def linear_shares(model: NirvanaForCausalLM, tokens: Tensor) -> list[float]:
    """Of every layer, |t' b| / (|t a| + |t' b|), norms over all tokens `[B, T]`; 0 is a bypassed
    linear branch, 1 the only one. Empty for a model without both branches and a Trigger."""
    if not model.config.has_trigger:
        return []
    outputs: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    with _recorded(model, outputs):
        traces = model(tokens, output_trigger=True, logits_to_keep=1).trigger
    shares = []
    for output, trace in zip(outputs, traces, strict=True):
        t, other = trace.gates[..., :1], trace.gates[..., -1:]
        if model.config.interpolation == "convex":
            other = 1 - t
        a, b = (t * output["a"].float()).norm(), (other * output["b"].float()).norm()
        shares.append(float(b / (a + b)))
    return shares


@contextmanager
def _recorded(model: NirvanaForCausalLM, outputs: list[dict[str, Tensor]]) -> Iterator[None]:
    """Records the outputs of the window branch, "a", and the linear one, "b", of every layer."""

    def record(into: dict[str, Tensor], name: str) -> Any:
        def hook(part: nn.Module, given: Any, output: Tensor) -> None:
            into[name] = output

        return hook

    hooks = []
    for layer, into in zip(model.model.layers, outputs, strict=True):
        updater: Any = layer.updater
        hooks.append(updater.window_out.register_forward_hook(record(into, "a")))
        hooks.append(updater.out_proj.register_forward_hook(record(into, "b")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def generation_costs(model: Any, lengths: Sequence[int], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a token and peak memory, after prompts of each length, with the library's
    dynamic cache."""
    found = {}
    for length in lengths:
        tokens = torch.randint(2, model.config.vocab_size, (1, length), device=model.device)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cache = None
        for piece in tokens.split(2048, dim=1):
            out = model(piece, use_cache=True, logits_to_keep=1, **{CACHE_FIELD: cache})
            cache = out[CACHE_FIELD]
        token, given = tokens[:, -1:], {"use_cache": True, CACHE_FIELD: cache}
        model(token, **given)  # the first call is slower
        _wait(model)
        began = time.perf_counter()
        for _ in range(steps):
            model(token, **given)
        _wait(model)
        milliseconds = 1000 * (time.perf_counter() - began) / steps
        memory = peak_memory(model.device) / 2**20
        found[str(length)] = {"ms": milliseconds, "MiB": memory}
    return found


@torch.no_grad()
def graph_costs(model: Any, lengths: Sequence[int], steps: int) -> dict[str, dict[str, float]]:
    """The same of `generate` at its fastest: an adopted model with a `Decoder`, which replays a
    CUDA graph, and a Transformer with the library's static cache and compiled step."""
    found = {}
    adopted = isinstance(model, NirvanaForCausalLM)
    for length in lengths:
        tokens = torch.randint(2, model.config.vocab_size, (1, length), device=model.device)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock, room = _Clock(model), length + steps + 1
        decoder = {"past_key_values": Decoder(model, max_length=room)} if adopted else {}
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=steps + 1,
            max_new_tokens=steps + 1,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **(decoder if adopted else {"cache_implementation": "static"}),
        )
        taken = [1000 * (after - before) for before, after in pairwise(clock.ticks)]
        found[str(length)] = {"ms": median(taken), "MiB": peak_memory(model.device) / 2**20}
    return found


class _Clock(StoppingCriteria):
    """Records when each token was written."""

    def __init__(self, model: Any) -> None:
        self.model, self.ticks = model, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        _wait(self.model)
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
