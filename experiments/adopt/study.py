"""Distils the adopted models and measures them; every finished model is one row of results.

python -m experiments.adopt.prepare --teacher SMOLLM2.gguf --data DATA
python -m experiments.adopt.study --teacher SMOLLM2.gguf --data DATA
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.adopt import measure
from experiments.adopt.prepare import DOMAINS, FOLDER
from experiments.common.program import make_parser
from experiments.common.results import append_row, read_rows
from nirvana.bench.measure import environment
from nirvana.data.shards import TokenShards
from nirvana.data.tokenizer import load_tokenizer
from nirvana.device import choose_device
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.model.adopt import load_teacher
from nirvana.model.assets import load_language_model
from nirvana.packaged import packaged_config
from nirvana.train.distill import distill

RESULTS = Path(__file__).parent / "results.jsonl"
MILLIONS = (10, 50, 200)
SHARES = {"attention": 0.3, "logits": 0.6, "context": 0.1}
"""Of the tokens of a budget, by stage."""
RATES = {"attention": 1e-3, "logits": 3e-4, "context": 1e-4}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    check_outputs({"--out": options.out, "--runs": options.runs}, [options.teacher, options.data])
    device = choose_device(options.device)
    models: dict[str, tuple[Path | None, int]] = {"teacher": (None, 0)}
    models |= {name: (options.prepared / "models" / name, 0) for name in ("window", "both")}
    for tokens in options.tokens:
        for name in ("both", "linear"):
            models[f"{name}, {tokens:,} tokens"] = (options.prepared / "models" / name, tokens)
    there = {row["model"] for row in read_rows(options.out)}
    for name, (folder, tokens) in models.items():
        if name not in there:
            found = folder if folder is None or not tokens else _distilled(folder, tokens, options)
            append_row(options.out, _row(name, found, tokens, device, options))
            print(f"{name}: measured", flush=True)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("experiments.adopt.study", __doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="a folder or a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="with text/DOMAIN/test.jsonl.xz")
    parser.add_argument("--prepared", type=Path, default=FOLDER, help="folder of prepare")
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs", help="folder to write")
    parser.add_argument("--out", type=Path, default=RESULTS)
    budgets = [million * 10**6 for million in MILLIONS]
    parser.add_argument("--tokens", type=int, nargs="+", default=budgets, help="budgets")
    parser.add_argument("--context", type=int, default=2048, help="twice as long in stage three")
    parser.add_argument("--rows", type=int, default=8, help="of a micro batch")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--documents", type=int, help="of a domain at most")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--costs", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", default=[], help="of nirvana eval --tasks")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def _distilled(initial: Path, tokens: int, options: argparse.Namespace) -> Path:
    """The model after all stages; runs that are there are resumed."""
    before = initial
    for number, (stage, share) in enumerate(SHARES.items(), start=1):
        out = options.runs / f"{initial.name}-{tokens}-{number}"
        if not (out / "model").is_dir():
            length = options.context * (2 if stage == "context" else 1)
            rows = max(1, options.rows * options.context // length)
            steps = max(1, round(share * tokens / (rows * length)))
            settings: dict[str, Any] = {
                "distill.teacher": options.teacher,
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
            }
            overrides = [f"--{name}={value}" for name, value in settings.items()]
            overrides += [f"--data.train.{x}={_shards(options, x)}" for x in options.domains]
            outcome = distill(_config(options), overrides, resume=out.is_dir())
            if not outcome.finished:
                raise KeyboardInterrupt
        before = out / "model"
    return before


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


def _row(
    name: str, folder: Path | None, tokens: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    tokenizer = load_tokenizer(options.prepared / "models" / "both")
    if folder is None:
        model: Any = load_teacher(options.teacher).model
    else:
        model, _ = load_language_model(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    nn.Module.to(model, device, dtype)
    texts = {each: options.data / "text" / each / "test.jsonl.xz" for each in options.domains}
    haystack = texts[options.domains[0]]
    corpus = sum(TokenShards(_shards(options, each)).num_tokens for each in options.domains)
    row: dict[str, Any] = {"model": name, "tokens": tokens, "epochs": tokens / corpus}
    row["bits per byte"] = measure.bits_per_byte(model, tokenizer, texts, options.documents)
    row["niah"] = measure.needles(model, tokenizer, options.lengths, options.problems, haystack)
    row["generated"] = measure.generated(model, tokenizer, options.problems)
    if options.tasks:
        from nirvana.evaluate.harness import run_tasks

        found = run_tasks(model, tokenizer, options.tasks, [], None, options.problems)
        row["tasks"] = {task: each["figures"] for task, each in found.items()}
    if folder is not None:
        text, _ = next(TokenShards(_shards(options, options.domains[0])).documents(1))
        ids = torch.from_numpy(text[: options.context])[None].to(device)
        row["linear shares"] = measure.linear_shares(model, ids)
    row["generation"] = measure.generation_costs(model, options.costs, 16)
    return {**row, "environment": environment(device)}


if __name__ == "__main__":
    script(main)
