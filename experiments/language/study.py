"""Runs the language study: every missing variant, seed and setting adds one row of results.

    python -m experiments.language.prepare --data DATA
    python -m experiments.language.study                                          # all missing runs
    python -m experiments.language.study --variant nirvana --seed 0 --setting A   # one run
    python -m experiments.language.study --minutes 8 --jobs 3 --tokens 16000000
    python -m experiments.language.page

Setting A trains on all five domains, B on general and novels; both are scored on all five. Without
options that choose, peers run with three seeds in both settings and ablations with one seed in B.
A run that is in the results already, trained alike, is not run again.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.common.program import make_parser
from experiments.common.results import append_row, read_rows
from experiments.language.data import FOLDER, RESULTS, load_data
from experiments.language.scores import context_scores
from experiments.language.single_run import run
from experiments.language.variants import (
    ABLATIONS,
    DOMAINS,
    PEERS,
    REFERENCE,
    SETTINGS,
    SIZES,
    VARIANTS,
    Budget,
    parameters,
)
from nirvana.bench.measure import environment
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs

MODULE = "experiments.language.study"
SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    data = [options.data / name for name in ("train.tar.xz", "evaluation.json.xz")]
    check_outputs({"--out": options.out, "--save": options.save}, data)
    budget = Budget(
        options.size,
        options.tokens,
        options.context,
        options.rows,
        options.lr,
        data=load_data(options.data)[2],
    )
    missing = _missing(_plan(options), options.out, budget)
    print(f"{len(missing)} runs are missing, of {budget.steps} steps each", flush=True)
    variants = list(dict.fromkeys(variant for variant, _, _ in missing))
    for variant in variants:  # one that does not fit is refused before anything runs
        number = parameters(variant, budget.size)
        share = number / parameters(REFERENCE, budget.size)
        print(f"{variant}: {number:,} parameters, {share - 1:+.2%}", flush=True)
    if options.jobs > 1 and len(variants) > 1:
        code = _run_processes(variants, options)
    else:
        code = _run_all(missing, options, budget)
    if options.beside == 1:
        _print_table(options.out, budget)
    return code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    parser.add_argument(
        "--variant", action="append", choices=[*VARIANTS], metavar="VARIANT", default=[]
    )
    parser.add_argument("--seed", action="append", type=int, default=[])
    parser.add_argument("--setting", action="append", choices=[*SETTINGS], default=[])
    parser.add_argument("--size", choices=[*SIZES], default=Budget.size)
    parser.add_argument("--tokens", type=int, default=Budget.tokens, help="to train on, of a run")
    parser.add_argument("--context", type=int, default=Budget.context_length)
    parser.add_argument("--rows", type=int, default=Budget.rows, help="of a step")
    parser.add_argument("--lr", type=float, default=Budget.lr)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--save", type=Path, help="folder that keeps the models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of the code, for the record, where there is no git")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, among which variants are divided"
    )
    parser.add_argument("--minutes", type=float, help="start no run that would end later")
    parser.add_argument("--beside", type=int, default=1, help=argparse.SUPPRESS)  # of --jobs
    options = parser.parse_args(arguments)
    for name in ("tokens", "context", "rows", "jobs"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} = {getattr(options, name)} must be at least 1")
    return options


def _plan(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """(variant, seed, setting): peers before ablations, one seed of all before the next."""
    runs = []
    for variant in options.variant or VARIANTS:
        seeds = options.seed or (SEEDS if variant in PEERS else SEEDS[:1])
        for setting in options.setting or (("B", "A") if variant in PEERS else ("B",)):
            runs += [(variant, seed, setting) for seed in seeds]
    return sorted(runs, key=lambda each: (each[0] in ABLATIONS, each[1]))


def _missing(
    plan: Sequence[tuple[str, int, str]], results: Path, budget: Budget
) -> list[tuple[str, int, str]]:
    done = {
        (row["variant"], row["seed"], row["setting"])
        for row in read_rows(results)
        if row["budget"] == budget.to_dict()
    }
    return [each for each in plan if each not in done]


def _run_processes(variants: list[str], options: argparse.Namespace) -> int:
    """Divides the variants among processes: one compiles while another one trains."""
    jobs = min(options.jobs, len(variants))
    given = {**vars(options), "jobs": 1, "beside": jobs}
    children = []
    for first in range(jobs):
        words = []
        for name, value in {**given, "variant": variants[first::jobs]}.items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            elif value is not None and value is not False:
                for each in value if isinstance(value, list) else [value]:
                    words += [flag, str(each)]
        children.append(subprocess.Popen([sys.executable, "-m", MODULE, *words]))
    return max(child.wait() for child in children)


def _run_all(
    missing: Sequence[tuple[str, int, str]], options: argparse.Namespace, budget: Budget
) -> int:
    device = choose_device(options.device)
    compiled = device.type == "cuda" and not options.no_compile
    shards, evaluation, _ = load_data(options.data)
    about = environment(device)
    about["commit"] = about["commit"] or options.commit
    failed = 0
    # All variants share the code of a block; a block that fell back to eager must be an error.
    limits: dict[str, Any] = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
    began = time.perf_counter()
    last = 0.0
    with torch._dynamo.config.patch(limits | {"fail_on_recompile_limit_hit": True}):
        for variant, seed, setting in missing:
            name = f"{variant}/{setting}/{seed}"
            start = time.perf_counter()
            if options.minutes and start - began + last > 60 * options.minutes:
                print(f"{name} and the runs after it are left for another call")
                break
            try:
                found = run(
                    variant,
                    seed,
                    setting,
                    budget,
                    shards,
                    evaluation,
                    device,
                    compiled,
                    lambda text, name=name: print(f"{name}: {text}", flush=True),
                    options.save / f"{variant}-{setting}-{seed}" if options.save else None,
                )
            except Exception:  # a failed run must not cost the results of the others
                traceback.print_exc()
                print(f"{name}: failed", flush=True)
                failed += 1
                continue
            identity = {
                "variant": variant,
                "seed": seed,
                "setting": setting,
                "budget": budget.to_dict(),
            }
            how = {"compiled": compiled, "beside": options.beside}
            append_row(options.out, identity | {"environment": about | how} | found)
            last = time.perf_counter() - start
            print(f"{name}: done in {last:.0f} s", flush=True)
    return 1 if failed else 0


def _print_table(results: Path, budget: Budget) -> None:
    """Bits per byte of the test texts so far, the mean over seeds."""
    rows = [each for each in read_rows(results) if each["budget"] == budget.to_dict()]
    print(f"{'variant':20}{'setting':>8}{'seeds':>6}", *(f"{domain:>9}" for domain in DOMAINS))
    for setting in SETTINGS:
        for variant in VARIANTS:
            runs = [x for x in rows if (x["variant"], x["setting"]) == (variant, setting)]
            if runs:
                figures = (mean(context_scores(x, d).figure for x in runs) for d in DOMAINS)
                print(f"{variant:20}{setting:>8}{len(runs):>6}", *(f"{f:9.4f}" for f in figures))


if __name__ == "__main__":
    script(main)
