"""The room of text: what the model made of each token of a prompt, and its continuation."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nirvana.adapt.adaptation import adapt_documents
from nirvana.adapt.chunks import next_token_nll
from nirvana.adapt.config import config_of
from nirvana.adapt.task import Task
from nirvana.app.work import Models, Watch
from nirvana.errors import InputError
from nirvana.generate.text import generate_text, prompt_tokens
from nirvana.packaged import resolve

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 4096, 512
MAX_CHARACTERS = 16 * MAX_PROMPT_TOKENS


@dataclass(frozen=True)
class TextRequest:
    """How a prompt is continued.

    Attributes:
        prompt: text.
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token.
        top_p: sample from so much of the probability.
        seed: the same seed gives the same text.
        adapt: the model first adapts to the prompt.
    """

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    adapt: bool = False

    def check(self) -> None:
        """Refuses values that are out of range.

        Raises:
            InputError: for the first of them.
        """
        if not self.prompt.strip():
            raise InputError("the prompt is empty: give some text")
        if len(self.prompt) > MAX_CHARACTERS:
            raise InputError(
                f"the prompt has {len(self.prompt):,} characters; this page takes at most "
                f"{MAX_CHARACTERS:,}"
            )
        for name, value, right, good in (
            ("tokens to write", self.max_new_tokens, f"1 to {MAX_NEW_TOKENS}",
             1 <= self.max_new_tokens <= MAX_NEW_TOKENS),
            ("temperature", self.temperature, "0 or more", self.temperature >= 0),
            ("top-p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("seed", self.seed, "0 to 2^62", 0 <= self.seed <= 2**62),
        ):  # fmt: skip
            if not good:
                raise InputError(f"{name} = {value} must be {right}")


@dataclass(frozen=True)
class TokenTrace:
    """What the model made of each token of a text but the first, BOS.

    Attributes:
        pieces: their texts.
        loss: -ln p of each, nats.
        gate: mean of the gates over the layers with a Trigger, 0..1; empty without a Trigger.
        step: Euclidean norm of the Trigger's step, the mean over these layers; likewise.
        adapted: whether the model adapted to the text. The loss is then as it was read, each token
            scored before it taught; gates and steps are those of the model that has read all.
    """

    pieces: list[str]
    loss: list[float]
    gate: list[float]
    step: list[float]
    adapted: bool


def prompt_of(models: Models, prompt: str) -> list[int]:
    """The tokens of a prompt, BOS first.

    Args:
        models: of the page.
        prompt: text.

    Raises:
        InputError: it is empty or too long.
    """
    TextRequest(prompt).check()
    tokens = prompt_tokens(models.language()[1], prompt)
    if len(tokens) > MAX_PROMPT_TOKENS:
        raise InputError(
            f"the prompt has {len(tokens):,} tokens; this page takes at most {MAX_PROMPT_TOKENS:,}"
        )
    return tokens


def trace(models: Models, prompt: str, adapt: bool, watch: Watch) -> TokenTrace:
    """Reads a prompt, and returns what the model made of its tokens.

    Args:
        models: of the page.
        prompt: text.
        adapt: the model adapts to it while it reads.
        watch: progress and limits.

    Raises:
        InputError: the prompt is empty or too long, or a limit was reached.
    """
    watch.show("reading the prompt")
    tokens = prompt_of(models, prompt)
    model, tokenizer = models.language()
    scores, task = _learned(models, tokens, watch) if adapt else (None, None)
    ids = torch.tensor([tokens], device=model.device)
    with torch.inference_mode(), nullcontext() if task is None else task.applied(model):
        output: Any = model(ids, output_trigger=True, use_cache=False)
    watch.check()
    if scores is None:
        scores = next_token_nll(output.logits[:, :-1], ids[:, 1:])[0]
    traces = output.trigger or ()
    gates = [each.gates.mean(-1)[0, 1:] for each in traces]
    steps = [each.change[0, 1:] for each in traces]
    return TokenTrace(
        [tokenizer.decode([token]) for token in tokens[1:]],
        scores.tolist(),
        _mean(gates),
        _mean(steps),
        adapt,
    )


def _mean(layers: list[Tensor]) -> list[float]:
    return torch.stack(layers).float().mean(0).tolist() if layers else []


def _learned(models: Models, tokens: list[int], watch: Watch) -> tuple[Tensor, Task]:
    """-ln p of each token as the model adapts to the text, and what it learned."""
    model = models.language()[0]
    config = config_of(resolve(models.config.model))
    count = -(-(len(tokens) - 1) // config.chunk)
    counter = watch.counter("adapting, chunks", count)
    scores, task = adapt_documents(model, [tokens], config, observer=lambda chunk: counter(1))
    return scores[0], task


def continue_prompt(models: Models, request: TextRequest, watch: Watch) -> Iterator[str]:
    """Yields the continuation of a prompt as it grows, until EOS at the latest.

    The model works in a thread of its own, which has it for itself and ends when the generator is
    closed, when `watch` stops it, or when the text is complete.

    Args:
        models: of the page.
        request: prompt and settings.
        watch: progress and limits.

    Yields:
        the whole continuation so far.

    Raises:
        InputError: a value is out of range, or a limit was reached.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    request.check()
    watch.show("loading the model")
    with models.in_use():
        model, tokenizer = models.language()
        tokens = prompt_of(models, request.prompt)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    failure: list[Exception] = []

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            watch.check()
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            with models.in_use():
                if stop.is_set():
                    return
                task = _learned(models, tokens, watch)[1] if request.adapt else None
                with nullcontext() if task is None else task.applied(model):
                    generate_text(
                        *(model, tokenizer, tokens, request.max_new_tokens, request.temperature),
                        *(request.top_p, request.seed),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stopped()]),
                    )
        except Exception as error:  # raised again where the text is read
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]
