"""The measurements of one model: training, the Trigger's share, prefill, decoding, start-up."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from nirvana.bench.measure import Cost, measure_costs, milliseconds
from nirvana.bench.peers import OURS
from nirvana.bench.start import start
from nirvana.model.nirvana import compile_blocks
from nirvana.model.trigger import Trigger, without_trigger
from nirvana.train.float8 import use_float8

if TYPE_CHECKING:
    from nirvana.bench.run import Options

Row = dict[str, Any]

FLOOR_TRAIN = 95_000
"""Tokens/s that no 1.3b model exceeds on one H200 (its FLOPs at the measured peak)."""
BANDWIDTH = 4.2e12
"""Bytes/s of a copy there: decoding reads the weights and keys, and reads and writes the states."""

FLOAT8 = (OURS, "llama_compiled")
"""Models whose training is also measured in float8; rounding is fast only where it is compiled."""

TRIGGER_OFF = {
    "step off": "without gradient, memory and step; the task vector, from fast parameters of "
    "ones, its projection and the gates remain",
    "no trigger": "nor the task vector: the gates read the task query; the projection remains",
}


def train(model: nn.Module, name: str, options: "Options", batch: int, length: int) -> list[Row]:
    """Forward and backward, without an optimiser and without activation checkpointing; of compiled
    models also with the large products of the blocks in float8, where the device has it."""
    step = _training_step(model, name, options, batch, length)
    cost = measure_costs({name: step}, options.device, options.steps)[name]
    rows = [_training_row(cost, options, batch * length)]
    if name not in FLOAT8 or not options.has_float8:
        return rows
    before = model_gradients(model)
    use_float8(model.model.layers)  # type: ignore[union-attr,arg-type]
    cost = measure_costs({name: step}, options.device, options.steps)[name]
    row = {"how": "fp8"} | _training_row(cost, options, batch * length)
    after = model_gradients(model)
    error = total_norm([after[name] - g for name, g in before.items()])
    return [*rows, row | {"gradient_error": error / total_norm(before.values())}]


def total_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all numbers of some tensors."""
    return torch.stack([x.float().norm() for x in tensors]).norm().item()


def model_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's gradients by name."""
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def trigger(model: nn.Module, name: str, options: "Options", batch: int, length: int) -> list[Row]:
    """The same step with every Trigger's step disabled, and without any Trigger, in turns."""
    step = _training_step(model, name, options, batch, length)

    def step_off() -> None:
        with without_trigger(model):
            step()

    def no_trigger() -> None:
        with _bypassed(model):
            step()

    runs = {"on": step, "step off": step_off, "no trigger": no_trigger}
    measured = measure_costs(runs, options.device, options.steps)
    rows = [{"how": "on"} | _training_row(measured["on"], options, batch * length)]
    for how, meaning in TRIGGER_OFF.items():
        row = {"how": how} | _training_row(measured[how], options, batch * length)
        row["time_share_of_trigger"] = 1 - measured[how].ms / measured["on"].ms
        on, off = measured["on"].peak_bytes, measured[how].peak_bytes
        if on and off:
            row["memory_share_of_trigger"] = 1 - off / on
        rows.append(row | {"meaning": meaning})
    return rows


def prefill(model: nn.Module, name: str, options: "Options", batch: int, length: int) -> list[Row]:
    """Prefill of a context, with logits of its last token."""
    tokens, run = options.tokens(batch, length), _prefill(model.eval(), name, options)
    with torch.no_grad():
        cost = measure_costs({name: lambda: run(tokens)}, options.device, options.steps)[name]
    return [_row(cost, length)]


def decode(model: nn.Module, name: str, options: "Options", batch: int, length: int) -> list[Row]:
    """Greedy decoding after a context: plain `generate`, and for our model also `Decoder`.

    The compiled Llama has the library's static cache, with which `generate` compiles the step.
    """
    tokens, rows = options.tokens(batch, length), []
    model.eval()
    with torch.no_grad():
        if name == OURS:
            rows.append({"how": "Decoder"} | _decoder_row(model, tokens, options))
        rows.append({"how": "generate"} | _generate_row(model, name, tokens, options))
    return rows


PARTS: dict[str, Callable[..., list[Row]]] = {
    "train": train,
    "trigger": trigger,
    "prefill": prefill,
    "decode": decode,
    "start": start,
}


def _training_step(
    model: nn.Module, name: str, options: "Options", batch: int, length: int
) -> Callable[[], None]:
    ids = options.tokens(batch, length)
    how = {"skip_logits": True} if name == OURS else {"use_cache": False}
    if name == OURS and options.compiled:
        compile_blocks(model.model.layers)  # type: ignore[union-attr,arg-type]
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, **how).loss.backward()

    return step


class _NoTrigger(nn.Module):
    """The task query as the task vector; fast parameters pass."""

    def forward(
        self,
        qkv: Tensor,
        fast: Tensor,
        bank: nn.Module,
        state: Any = None,
        segments: Any = None,
        lengths: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        return qkv.chunk(3, dim=-1)[0], fast, state


@contextmanager
def _bypassed(model: nn.Module) -> Iterator[None]:
    """Removes every Trigger of a model in the block."""
    owners = [
        (module, module.trigger)
        for module in model.modules()
        if isinstance(getattr(module, "trigger", None), Trigger)
    ]
    try:
        for owner, _ in owners:
            owner.trigger = _NoTrigger()
        yield
    finally:
        for owner, module in owners:
            owner.trigger = module


def _prefill(model: nn.Module, name: str, options: "Options") -> Callable[[Tensor], object]:
    if name != OURS:
        return lambda tokens: model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    from nirvana.generate.graph_decoder import Decoder

    return Decoder(model, compiled=options.compiled).prefill


def _decoder_row(model: nn.Module, tokens: Tensor, options: "Options") -> Row:
    from nirvana.generate.graph_decoder import Decoder

    takes = 4  # the first one is not counted
    room = tokens.shape[1] + takes * options.new_tokens
    decoder = Decoder(model, max_length=room, compiled=options.compiled)
    with _peak(options) as peak:
        logits = decoder.prefill(tokens)

        def write() -> None:
            nonlocal logits
            for _ in range(options.new_tokens):
                logits = decoder.step(logits.argmax(-1, keepdim=True))

        times = [milliseconds(write, options.device) for _ in range(takes)]
    row = _decode_row(median(times[1:]) / options.new_tokens, tokens.shape[0])
    if options.has_floor:
        row["share_of_floor"] = _floor_ms(decoder) / row["ms"]
    return row | peak


def _floor_ms(decoder: Any) -> float:
    """Milliseconds of a step that reads weights, keys and states once and writes the states."""
    weights = sum(x.numel() * x.element_size() for x in decoder.model.parameters())
    traffic = float(weights)
    for state in decoder.states:
        for name, times in (("conv", 2), ("delta", 2), ("memory", 2), ("keys", 1), ("values", 1)):
            x = getattr(state, name)
            if x is not None:
                read = min(1.0, decoder.length / decoder.slots) if times == 1 else 1.0
                traffic += times * read * x.numel() * x.element_size()
    return 1e3 * traffic / BANDWIDTH


def _generate_row(model: Any, name: str, tokens: Tensor, options: "Options") -> Row:
    """Time per step from the second token on; the first includes the prefill."""
    clock = _Clock()
    how: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([clock])}
    if name == OURS:
        from nirvana.generate.graph_decoder import Decoder

        room = tokens.shape[1] + options.new_tokens + 1
        how["past_key_values"] = Decoder(model, max_length=room, compiled=options.compiled)
    elif name == "llama_compiled":
        how["cache_implementation"] = "static"
    with _peak(options) as peak:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=options.new_tokens + 1,
            max_new_tokens=options.new_tokens + 1,
            pad_token_id=0,
            **how,
        )
    taken = [1e3 * (after - before) for before, after in pairwise(clock.ticks)]
    return _decode_row(median(taken), tokens.shape[0]) | peak


class _Clock(StoppingCriteria):
    """Records when each token was generated; the criteria run after every token, in batches,
    too (which a streamer refuses)."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _peak(options: "Options") -> Iterator[Row]:
    """Fills the dictionary that it gives with the peak memory of the block, where it is counted."""
    row: Row = {}
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
    yield row
    if options.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(options.device)


def _row(cost: Cost, tokens: int) -> Row:
    row: Row = {"tokens_per_second": 1e3 * tokens / cost.ms, "ms": cost.ms}
    return row | ({} if cost.peak_bytes is None else {"peak_bytes": cost.peak_bytes})


def _training_row(cost: Cost, options: "Options", tokens: int) -> Row:
    row = _row(cost, tokens)
    if options.has_floor:
        row["share_of_floor"] = row["tokens_per_second"] / FLOOR_TRAIN
    return row


def _decode_row(ms: float, batch: int) -> Row:
    """Of a step, which writes a token of every text of the batch."""
    return {"tokens_per_second": 1e3 * batch / ms, "ms": ms}
