"""The parts of the study of adaptation; see `experiments.adapt.study`."""

import math
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.adapt import extra
from experiments.adapt.conditions import (
    choose,
    grid,
    measure_condition,
    named_nats,
    swapped,
)
from experiments.adapt.context import Context, by_domain, changed, is_seen, plain
from experiments.adapt.data import BLOCK, LONG
from experiments.adapt.domains import UNSEEN
from experiments.adapt.measure import (
    FROZEN,
    block_nats,
    cache_mixture,
    read,
    rows_of,
    still,
    task_of,
    unigram_cache,
)
from experiments.adapt.shifts import shifted
from experiments.common.results import Row
from nirvana.adapt.adaptation import start_optimizer
from nirvana.adapt.chunks import read_documents
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.step_sizes import learn_step_sizes
from nirvana.adapt.task import Task
from nirvana.data.shards import TokenShards

EQUAL = ("nirvana", "hybrid-input", "transformer")
"""Models of `experiments.language.variants`, trained alike at the size of `tiny`."""

FIRST = AdaptConfig(("norm", "fast"), 64, lr={"norm": 0.02, "fast": 0.06})
"""Settings from which step sizes are learned."""
VALIDATED = "trained, on validation documents"
GROUPS = ("norm", "fast", "low_rank")
CHUNKS = (32, 64, 128)
SIZES = (0.01, 0.02, 0.04)
SHARES = (0.02, 0.05, 0.1, 0.2)
STEP_ROWS = {"cuda": 64, "cpu": 16}


def select(context: Context) -> None:
    """Chooses the settings of `tiny` on validation documents."""
    choose(context, "tiny", "chosen", grid(("norm", "fast"), CHUNKS, SIZES))


def groups(context: Context) -> None:
    """Chooses the step size of each group alone."""
    for group in GROUPS:
        choose(context, "tiny", group, grid((group,), CHUNKS[1:2], SIZES))


def caches(context: Context) -> None:
    """Chooses the share of the unigram cache."""
    extra.select_cache(context, SHARES)


def _batches(context: Context, number: int) -> Iterator[list[Tensor]]:
    """Training documents of another look, side by side."""
    tokenizer = context.tokenizer()
    encode = tokenizer.backend_tokenizer
    folder = context.data.shards
    assert folder is not None  # the whole data are read
    shards = [TokenShards(folder / d) for d in context.data.test if is_seen(d)]
    source = random.Random(0)
    for _ in range(number):
        rows: list[Tensor] = []
        while len(rows) < STEP_ROWS[context.device.type]:
            shard = source.choice(shards)
            tokens = shard.document(source.randrange(len(shard)), 1, context.tokens * 2)
            text = shifted(tokenizer.decode(tokens[:-1]), source.getrandbits(32))
            ids = encode.encode(text, add_special_tokens=False).ids[: context.tokens // 2]
            if len(ids) >= context.tokens // 4:
                rows.append(torch.tensor([tokenizer.bos_token_id, *ids]))
        yield rows


def steps(context: Context) -> None:
    """Learns the step sizes of `tiny`."""
    name = {"model": "tiny", "kind": "trained"}
    row = context.measure("steps", name, partial(_learn_steps, context, 0.0))
    if row is not None:
        choose(context, "tiny", VALIDATED, [context.settings("tiny", "trained")])


def start(context: Context) -> None:
    """Learns the step sizes of `tiny` and the start of its task parameters."""
    name = {"model": "tiny", "kind": "trained, start"}
    context.measure("steps", name, partial(_learn_steps, context, 0.005))


def _learn_steps(context: Context, start_rate: float) -> Row:
    """Learns step sizes from `FIRST`; a start that is learned, too, is part of the row."""
    curve: list[float] = []
    config, task = learn_step_sizes(
        context.model("tiny"),
        _batches(context, context.batches),
        FIRST,
        rate=0.1,
        start_rate=start_rate,
        log_progress=lambda _, nll: curve.append(round(nll, 4)),
    )
    row = {"config": plain(config), "curve": curve, "figure": curve[-1]}
    row |= {"rows": STEP_ROWS[context.device.type], "batches": context.batches}
    if start_rate:
        row["start"] = [float(f"{value:.5g}") for value in task.values[0].tolist()]
    return row


def test(context: Context) -> None:
    """The main table: the frozen model, adapted, and adapted with what was trained for it."""
    names, documents, rows = context.flat("test")
    packed = {
        name: by_domain(names, [each.packed[name] for each in documents]) for name in ("xz", "ppmd")
    }
    pairs = zip(documents, rows, strict=True)
    sizes = by_domain(names, [each.bytes[: len(row) // BLOCK] for each, row in pairs])
    name = {"model": "tiny", "condition": "bytes"}
    context.measure("test", name, lambda: {"bytes": sizes, "packed": packed})
    measure_condition(context, names, rows, "frozen", FROZEN)
    for kind in ("chosen", "trained"):
        measure_condition(context, names, rows, kind, context.settings("tiny", kind))
    kind = "trained, start"
    learned = context.settings_row("tiny", kind)
    if learned is not None:
        config = context.settings("tiny", kind)
        task = task_of(context.model("tiny"), config, torch.tensor([learned["start"]]))
        measure_condition(context, names, rows, kind, config, task)


def variants(context: Context) -> None:
    """The chosen settings, changed one by one."""
    names, _, rows = context.flat("test")
    ours = context.settings("tiny", "chosen")
    for chunk in (32, 64, 128, 256, 512):
        if chunk != ours.chunk:
            measure_condition(context, names, rows, f"chunk {chunk}", changed(ours, chunk=chunk))
    for number in (2, 3):
        measure_condition(context, names, rows, f"{number} steps", changed(ours, steps=number))
    everything = changed(ours, parameters=tuple(GROUPS), lr={**ours.lr, "low_rank": 0.01})
    measure_condition(context, names, rows, "all three", everything)
    for group in GROUPS:
        measure_condition(context, names, rows, group, context.settings("tiny", group))


def equal(context: Context) -> None:
    """Settings and test of the equal models: norm gains, which all of them have."""
    names, _, rows = context.flat("test")
    for model in EQUAL:
        if not (context.models / model).is_dir():
            continue
        choose(context, model, "chosen", grid(("norm",), CHUNKS[1:2], SIZES))
        conditions = {"frozen": FROZEN, "norm": context.settings(model, "chosen")}
        for name, config in conditions.items():
            measure_condition(context, names, rows, name, config, model=model)


def joint(context: Context) -> None:
    """Trains the weights of `tiny` jointly with its adaptation, and tests it."""
    extra.train_jointly(context, _batches)
    names, _, rows = context.flat("test")
    if not (context.models / "tiny-joint").is_dir():
        return
    conditions = {"frozen": FROZEN, "trained": context.settings("tiny", "trained")}
    for name, config in conditions.items():
        measure_condition(context, names, rows, name, config, model="tiny-joint")


def controls(context: Context) -> None:
    """Caches of the document's words, steps turned around, task parameters of other documents."""
    names, _, rows = context.flat("test")
    model = context.model("tiny")
    ours = context.settings("tiny", "chosen")
    scores = cache(lambda: read(model, rows, FROZEN)[0])
    share = extra.cache_share(context)
    for name, mixed in (
        ("unigram cache", partial(unigram_cache, share=share)),
        ("cache mixture", cache_mixture),
    ):

        def compute(mixed: Callable[..., Tensor] = mixed) -> Row:
            pairs = zip(rows, scores(), strict=True)
            return {"nats": named_nats(names, [mixed(row.tolist(), nll) for row, nll in pairs])}

        context.measure("test", {"model": "tiny", "condition": name}, compute)
    turned = {name: -ours.step_size(name) for name in ours.parameters}
    measure_condition(context, names, rows, "turned", changed(ours, lr=turned))
    swapped(context, names, rows, ours)
    _of_domains(context, names, rows, ours)


def _of_domains(
    context: Context, names: list[str], rows: list[Tensor], config: AdaptConfig
) -> None:
    """Task parameters of half a domain's documents on the others, fixed and as a start."""
    model = context.model("tiny")
    places = by_domain(names, range(len(names)))

    @cache
    def learned(domain: str) -> Task:
        numbers = places[domain][len(places[domain]) // 2 :]
        optimizer = start_optimizer(model, config)
        for first in range(0, len(numbers), 8):
            read_documents(model, [rows[i] for i in numbers[first : first + 8]], optimizer)
        return task_of(model, config, optimizer.values)

    for name, settings in (("domain", still(config)), ("domain, adapted", config)):

        def compute(settings: AdaptConfig = settings) -> Row:
            found = {}
            for domain, numbers in places.items():
                part = [rows[i] for i in numbers[: len(numbers) // 2]]
                found[domain] = block_nats(read(model, part, settings, learned(domain))[0])
            return {"nats": found}

        context.measure("test", {"model": "tiny", "condition": name}, compute)


def recall(context: Context) -> None:
    """Bits of an answer stated early: with the state, with task parameters alone, with neither."""
    model = context.model("tiny")
    ours = context.settings("tiny", "chosen")
    for kind, problems in context.data.recall.items():
        chosen = problems[: context.documents and 2 * context.documents]
        # What follows the facts: the first query, or the last words before the needle's value.
        back = 1 if kind.startswith("mqar") else 24
        for condition in ("state", "state, task", "task", "task, 8 steps", "neither"):
            context.measure(
                "recall",
                {"task": kind, "condition": condition},
                partial(_recall_bits, model, ours, chosen, back, condition),
            )


def _recall_bits(
    model: Any, ours: AdaptConfig, problems: list[dict[str, Any]], back: int, condition: str
) -> Row:
    """Bits of each problem's answers.

    Args:
        model: the model.
        ours: settings of the adaptation.
        problems: {"tokens", "answers"} of each.
        back: tokens before the first answer at which a model without state begins anew.
        condition: "state", "state, task", "task", "task, 8 steps" or "neither".

    Returns:
        the row.
    """
    rows = [torch.tensor(each["tokens"]) for each in problems]
    answers = [each["answers"] for each in problems]
    config = changed(ours, steps=8) if "8 steps" in condition else ours
    if condition.startswith("state"):
        scores = read(model, rows, config if "task" in condition else FROZEN)[0]
        offsets = [0] * len(rows)
    else:
        cuts = [min(start for start, _ in each) - back for each in answers]
        heads = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
        tails = [torch.cat([row[:1], row[cut:]]) for row, cut in zip(rows, cuts, strict=True)]
        task = None
        if condition != "neither":
            task = task_of(model, config, read(model, heads, config)[1])
        scores = read(model, tails, still(config), task)[0]
        offsets = [cut - 1 for cut in cuts]
    found = []
    for nll, offset, each in zip(scores, offsets, answers, strict=True):
        spans = [float(nll[a - 1 - offset : b - 1 - offset].sum()) for a, b in each]
        found.append(round(sum(spans) / len(spans) / math.log(2), 3))
    return {"bits": found, "figure": round(float(np.mean(found)), 3)}


def long(context: Context) -> None:
    """Documents of up to 32,768 tokens of the domains that no training saw, by position."""
    model = context.model("tiny")
    ours = context.settings("tiny", "chosen")
    trained = context.settings("tiny", "trained")
    limit = LONG if context.tokens >= 4096 else 2 * context.tokens
    chosen = [
        (domain, document)
        for domain, documents in context.domains("test").items()
        for document in documents
        if domain in UNSEEN and len(document.tokens) > 2 * context.tokens
    ]
    if not chosen:
        return
    names, documents = zip(*chosen, strict=True)
    rows = rows_of(documents, limit)
    for name, config in (("frozen", FROZEN), ("chosen", ours), ("trained", trained)):
        context.measure(
            "long",
            {"condition": name},
            lambda c=config: {"nats": named_nats(list(names), read(model, rows, c)[0])},
        )


PARTS: dict[str, Callable[[Context], None]] = {
    "steps": steps,
    "start": start,
    "select": select,
    "groups": groups,
    "caches": caches,
    "joint": joint,
    "test": test,
    "variants": variants,
    "controls": controls,
    "lora": extra.lora,
    "recall": recall,
    "long": long,
    "equal": equal,
    "time": extra.cost,
}
WAVES = (
    ("steps", "start", "select", "groups", "caches"),
    ("joint", "test", "variants", "controls", "lora", "recall", "long"),
    ("equal",),
    ("time",),
)
"""Parts that may run beside each other; each wave needs the ones before it, and "equal" the equal
models, which are trained beside the first two."""
