"""Trains the study's model with a window of 512 and with one of 2,048, and compares bits per byte.

    python -m experiments.language.windows --data DATA --out FILE [--tokens 16000000]

Both windows have the same seeds, batches and number of parameters, and rows of 8,192 tokens, four
times the larger window; they train on all five domains. FILE gets a row for each run, and the
last lines printed are the differences with t intervals over the seeds. A run that FILE has is not
run again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.common.program import make_parser
from experiments.common.results import append_row, read_rows
from experiments.language.data import FOLDER, load_data
from experiments.language.scores import has_text, mean_figure, position_ranges, text
from experiments.language.single_run import configuration, score, train
from experiments.language.variants import DOMAINS, REFERENCE, Budget
from nirvana.bench.measure import environment
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.statistics import t_interval
from nirvana.train.distributed import ProcessContext
from nirvana.train.language import LanguageTask

MODULE = "experiments.language.windows"
WINDOWS = (512, 2048)
SETTING = "A"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(MODULE, __doc__)
    parser.add_argument("--size", default=Budget.size)
    parser.add_argument("--tokens", type=int, default=16_000_000, help="of a run")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    for name in ("tokens", "context", "rows", "seeds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} = {getattr(options, name)} must be at least 1")
    check_outputs({"--out": options.out}, [options.data])
    run_missing(options)
    for line in comparison(read_rows(options.out)):
        print(line)


def run_missing(options: argparse.Namespace) -> None:
    """Trains and scores what the file of results does not have yet."""
    device = choose_device(options.device)
    shards, evaluation, identity = load_data(options.data)
    budget = Budget(options.size, options.tokens, options.context, options.rows, data=identity)
    texts = {
        "edges": evaluation["edges"],
        "text": {"test": evaluation["text"]["test"]},
        "tasks": {},
        "recall": {},
    }
    done = {
        (row["window"], row["seed"])
        for row in read_rows(options.out)
        if row["budget"] == budget.to_dict()
    }
    missing = [(w, s) for s in range(options.seeds) for w in WINDOWS if (w, s) not in done]
    for window, seed in missing:
        found = run(window, seed, budget, shards, texts, device)
        about = {"window": window, "seed": seed, "budget": budget.to_dict()}
        append_row(options.out, about | {"environment": environment(device)} | found)
        print(f"window {window}, seed {seed}: loss {found['losses'][-1][1]}", flush=True)


def run(
    window: int,
    seed: int,
    budget: Budget,
    shards: Path,
    texts: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The figures of one training, and the bits of the test texts."""
    config = configuration(REFERENCE, seed, SETTING, budget, shards, device)
    fields = {**config.model.fields, "sliding_window": window}
    config = replace(config, model=replace(config.model, fields=fields))
    torch.manual_seed(seed)
    task = LanguageTask(config, device)
    compiled = device.type == "cuda"
    trainer, figures = train(task, config, ProcessContext(device), compiled, lambda line: None)
    model: Any = task.model.eval()
    with torch.no_grad(), trainer.autocast(), torch.compiler.set_stance("force_eager"):
        scores = score(model, texts, budget.context_length * budget.rows)
    return {"parameters": sum(p.numel() for p in model.parameters()), **figures, **scores}


def comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Bits per byte with the small window minus those with the large one: the mean over domains,
    and over those whose texts reach them the same of each range of positions."""
    if not rows:
        return []
    rows = [row for row in rows if row["budget"] == rows[-1]["budget"]]
    found = {(row["window"], row["seed"]): row for row in rows}
    small, large = WINDOWS
    pairs = [(row, found[large, seed]) for (window, seed), row in found.items() if window == small
             if (large, seed) in found]  # fmt: skip
    if not pairs:
        return []
    spans = [("all positions", slice(None))]
    for span, first, behind in position_ranges(rows[0]):
        spans.append((f"positions {first:,} to {behind - 1:,}", span))
    lines = []
    for name, span in spans:
        takes = [text(each, ranges=span) for each in DOMAINS if has_text(rows[0], each, span)]
        both = np.array([[mean_figure(row, takes) for row in pair] for pair in pairs])
        difference = both[:, 0] - both[:, 1]
        shown = t_interval(difference).show(4, True) if len(pairs) > 1 else f"{difference[0]:+.4f}"
        of_small, of_large = both.mean(0)
        lines.append(f"{name}: {of_small:.4f} with {small}, {of_large:.4f} with {large}, {shown}")
    return lines


if __name__ == "__main__":
    script(main)
