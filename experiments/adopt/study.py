"""Distils the adopted models and measures them; every finished model is one row of results.

python -m experiments.adopt.prepare --teacher SMOLLM2.gguf --data DATA
python -m experiments.adopt.study --data DATA --minutes 9     # what is missing, in this time
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.adopt import measure
from experiments.adopt.prepare import DOMAINS, FOLDER, TEACHER
from experiments.common.program import make_parser
from experiments.common.results import append_row, read_rows
from nirvana.bench.measure import environment
from nirvana.data.shards import TokenShards
from nirvana.data.tokenizer import load_tokenizer
from nirvana.device import choose_device
from nirvana.errors import script
from nirvana.evaluate.tasks import TASKS, task_file
from nirvana.files import check_outputs
from nirvana.model.adopt import load_teacher
from nirvana.model.assets import load_language_model
from nirvana.packaged import packaged_config
from nirvana.train.distill import distill

RESULTS = Path(__file__).parent / "results.jsonl"
MILLIONS = (10, 50, 200)
SHARES = {"attention": 0.3, "logits": 0.5, "context": 0.2}
"""Of the tokens of a budget, by stage."""
RATES = {"attention": 1e-3, "logits": 4e-4, "context": 2e-4}
MODELS = (TEACHER, "window", "both", "linear")
BENCHMARKS = ("arc_easy", "hellaswag", "lambada", "piqa")
"""Tasks of the harness in which a model of this size is far from a guess."""
MEASURED = ("domains", "documents", "lengths", "costs", "problems", "tasks", "compile")
"""The options that a row records."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    inputs = [options.data, options.prepared / "models", options.prepared / "shards"]
    check_outputs({"--out": options.out, "--runs": options.runs}, inputs)
    for task in options.tasks:
        task_file(task, options.data / "benchmarks")  # before hours of work, not after
    device = choose_device(options.device)
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    models = [(TEACHER, 0), ("window", 0)]
    models += [(branches, tokens) for tokens in options.tokens for branches in ("both", "linear")]
    models += [("both", 0)]  # the teacher with the window once more, a check
    models = [each for each in models if each[0] in options.models]
    there = {row["model"] for row in read_rows(options.out)}
    for branches, tokens in models:
        name = f"{branches}, {tokens:,} tokens" if tokens else branches
        if name in there:
            continue
        if end is not None and time.monotonic() > end:
            print(f"{name}: no time is left", flush=True)
            break
        began = time.monotonic()
        folder, stages = options.prepared / "models" / branches, []
        if tokens:
            folder, stages = _distilled(folder, tokens, options)
        print(f"{name}: to be measured, after {time.monotonic() - began:.0f} s", flush=True)
        row = {"model": name, "branches": branches, "tokens": tokens, "stages": stages}
        append_row(options.out, row | _measured(folder, tokens, device, options))
        print(f"{name}: measured, after {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("experiments.adopt.study", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="with text/DOMAIN/test.jsonl.xz")
    parser.add_argument("--prepared", type=Path, default=FOLDER, help="folder of prepare")
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs", help="folder to write")
    parser.add_argument("--out", type=Path, default=RESULTS)
    budgets = [million * 10**6 for million in MILLIONS]
    parser.add_argument("--tokens", type=int, nargs="+", default=budgets, help="budgets")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens of a row; stage three: four times as many"
    )
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--documents", type=int, default=16, help="of a domain at most")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--costs", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=BENCHMARKS)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="distillation, on a GPU",
    )
    parser.add_argument("--minutes", type=float, help="begin no model later")
    parser.add_argument("--commit", help="of the code, for the record, where there is no git")
    return parser.parse_args(arguments)


def _distilled(
    initial: Path, tokens: int, options: argparse.Namespace
) -> tuple[Path, list[dict[str, Any]]]:
    """The model after all stages, and the settings and last figures of each; runs that are there
    are resumed."""
    before, stages = initial, []
    for number, (stage, share) in enumerate(SHARES.items(), start=1):
        out = options.runs / f"{initial.name}-{tokens}-{number}"
        length = options.context * (4 if stage == "context" else 1)
        rows = max(1, options.rows * options.context // length)
        steps = max(1, round(share * tokens / (rows * length)))
        if not (out / "model").is_dir():
            settings: dict[str, Any] = {
                "distill.teacher": options.prepared / "models" / TEACHER,
                "distill.stage": stage,
                "data.context_length": length,
                "data.batch_size": rows,
                "data.valid": "{}",
                "optim.lr": RATES[stage],
                "optim.min_lr": RATES[stage] / 10,
                "optim.warmup_steps": max(1, steps // 50),
                "optim.accumulation": 1,
                "run.initial": before,
                "run.out": out,
                "run.steps": steps,
                "run.device": options.device,
                "run.export_precision": "float32",
                "run.compile": str(options.compile).lower(),
                "run.checkpoint_interval": 0,  # at its end, or where it is interrupted
                "run.keep_checkpoints": 1,
            }
            overrides = [f"--{name}={value}" for name, value in settings.items()]
            overrides += [f"--data.train.{x}={_shards(options, x)}" for x in options.domains]
            torch.compiler.reset()  # no stage uses what another compiled
            outcome = distill(_config(options), overrides, resume=out.is_dir())
            if not outcome.finished:
                raise KeyboardInterrupt
        before = out / "model"
        last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        about = {"stage": stage, "rows": rows, "context": length, "lr": RATES[stage]}
        stages.append({**about, "steps": steps, "last": last})
    return before, stages


def _config(options: argparse.Namespace) -> Path:
    """The packaged settings without their data."""
    path = options.runs / "distill.toml"
    text = packaged_config("distill").read_text(encoding="utf-8")
    head, _, rest = text.partition("[data.train]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + rest[rest.index("[optim]") :], encoding="utf-8")
    return path


def _shards(options: argparse.Namespace, domain: str) -> Path:
    return options.prepared / "shards" / domain


def _measured(
    folder: Path, tokens: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """What is measured of a model, and all that a reader must know of how."""
    began = time.monotonic()
    tokenizer = load_tokenizer(options.prepared / "models" / "both")
    adopted = folder.name != TEACHER
    model: Any = load_language_model(folder)[0] if adopted else load_teacher(folder).model
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    nn.Module.to(model, device, dtype)
    texts = {each: options.data / "text" / each / "test.jsonl.xz" for each in options.domains}
    haystack = texts[options.domains[0]]
    corpus = {each: TokenShards(_shards(options, each)).num_tokens for each in options.domains}
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "window": model.config.sliding_window if adopted else None,
        "sinks": model.config.num_sinks if adopted else None,
        "positions": None if adopted else model.config.max_position_embeddings,
        "corpus": corpus,
        "epochs": tokens / sum(corpus.values()),
        "settings": {name: getattr(options, name) for name in MEASURED},
        "dtype": str(dtype).removeprefix("torch."),
    }
    seconds: dict[str, float] = {}

    def put(name: str, value: Any) -> None:
        row[name], seconds[name] = value, time.monotonic() - began - sum(seconds.values())

    bits, row["documents"] = measure.bits_per_byte(model, tokenizer, texts, options.documents)
    put("bits per byte", bits)
    points = measure.needles(model, tokenizer, options.lengths, options.problems, haystack)
    put("niah", measure.shares(points))
    answered = measure.generated(model, tokenizer, options.problems)
    put("generated", measure.shares(answered))
    row["points"] = {"niah": points, "generated": answered}
    benchmarks = options.data / "benchmarks"
    number = options.problems
    put("tasks", measure.benchmarks(model, tokenizer, options.tasks, number, benchmarks))
    if adopted:
        text, _ = next(TokenShards(_shards(options, options.domains[0])).documents(1))
        ids = torch.from_numpy(text[: options.context])[None].to(device)
        put("linear shares", measure.linear_shares(model, ids))
    put("generation", measure.generation_costs(model, options.costs, 16))
    if not adopted or model.config.branches != "window":  # a Decoder needs linear branches
        put("graph generation", measure.graph_costs(model, options.costs, 32))
    about = environment(device)
    about["commit"] = about["commit"] or options.commit
    return {**row, "seconds": seconds, "environment": about}


if __name__ == "__main__":
    script(main)
