"""Runs the study: every arm, seed and setting that is missing, one line of results for each.

    python experiments/language/prepare.py --data DATA
    python experiments/language/run.py                                         # all that is missing
    python experiments/language/run.py --arm nirvana --seed 0 --setting A      # one run
    python experiments/language/run.py --minutes 8 --jobs 3 --tokens 16000000
    python experiments/language/report.py

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
from typing import Any

import torch
from arms import ABLATIONS, ARMS, DOMAINS, PEERS, REFERENCE, SETTINGS, SIZES, Budget, parameters
from common import FOLDER, RESULTS, append_result, load_data, read_results
from study import run

from nirvana.bench.measure import environment
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs

SEEDS = (0, 1, 2)


def main() -> int:
    options = _options()
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
    arms = list(dict.fromkeys(arm for arm, _, _ in missing))
    for arm in arms:  # what cannot be made is told before anything runs
        share = parameters(arm, budget.size) / parameters(REFERENCE, budget.size)
        print(f"{arm}: {parameters(arm, budget.size):,} parameters, {share - 1:+.2%}", flush=True)
    if options.jobs > 1 and len(arms) > 1:
        code = _share_out(arms, options)
    else:
        code = _work(missing, options, budget)
    if options.beside == 1:
        _table(options.out, budget)
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs the study.")
    parser.add_argument("--arm", action="append", choices=[*ARMS], metavar="ARM", default=[])
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
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share out the arms")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--beside", type=int, default=1, help=argparse.SUPPRESS)  # of --jobs
    options = parser.parse_args()
    for name in ("tokens", "context", "rows", "jobs"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} = {getattr(options, name)} must be at least 1")
    return options


def _plan(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """(arm, seed, setting) in the order of their weight: peers, one seed of all before the next."""
    runs = []
    for arm in options.arm or ARMS:
        seeds = options.seed or (SEEDS if arm in PEERS else SEEDS[:1])
        for setting in options.setting or (("B", "A") if arm in PEERS else ("B",)):
            runs += [(arm, seed, setting) for seed in seeds]
    return sorted(runs, key=lambda each: (each[0] in ABLATIONS, each[1]))


def _missing(
    plan: Sequence[tuple[str, int, str]], results: Path, budget: Budget
) -> list[tuple[str, int, str]]:
    done = {
        (line["arm"], line["seed"], line["setting"])
        for line in read_results(results)
        if line["budget"] == budget.to_dict()
    }
    return [each for each in plan if each not in done]


def _share_out(arms: list[str], options: argparse.Namespace) -> int:
    """Lets processes run the arms side by side: one compiles while another one trains."""
    jobs = min(options.jobs, len(arms))
    given = {**vars(options), "jobs": 1, "beside": jobs}
    children = []
    for first in range(jobs):
        words = []
        for name, value in {**given, "arm": arms[first::jobs]}.items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            elif value is not None and value is not False:
                for each in value if isinstance(value, list) else [value]:
                    words += [flag, str(each)]
        children.append(subprocess.Popen([sys.executable, __file__, *words]))
    return max(child.wait() for child in children)


def _work(
    missing: Sequence[tuple[str, int, str]], options: argparse.Namespace, budget: Budget
) -> int:
    device = choose_device(options.device)
    compiled = device.type == "cuda" and not options.no_compile
    data = [options.data / name for name in ("train.tar.xz", "evaluation.json.xz")]
    check_outputs({"--out": options.out, "--save": options.save}, data)
    shards, evaluation, _ = load_data(options.data)
    about = environment(device)
    about["commit"] = about["commit"] or options.commit
    failed = 0
    # All arms' blocks are variants of the same code; one that ran uncompiled would be an error.
    limits: dict[str, Any] = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
    began = time.perf_counter()
    last = 0.0
    with torch._dynamo.config.patch(limits | {"fail_on_recompile_limit_hit": True}):
        for arm, seed, setting in missing:
            name = f"{arm}/{setting}/{seed}"
            start = time.perf_counter()
            if options.minutes and start - began + last > 60 * options.minutes:
                print(f"{name} and those after it are left for another call")
                break
            try:
                found = run(
                    arm,
                    seed,
                    setting,
                    budget,
                    shards,
                    evaluation,
                    device,
                    compiled,
                    lambda text, name=name: print(f"{name}: {text}", flush=True),
                    options.save / f"{arm}-{setting}-{seed}" if options.save else None,
                )
            except Exception:  # one arm's fault must not cost the results of the others
                traceback.print_exc()
                print(f"{name}: failed", flush=True)
                failed += 1
                continue
            identity = {"arm": arm, "seed": seed, "setting": setting, "budget": budget.to_dict()}
            how = {"compiled": compiled, "beside": options.beside}
            append_result(options.out, identity | {"environment": about | how} | found)
            last = time.perf_counter() - start
            print(f"{name}: done in {last:.0f} s", flush=True)
    return 1 if failed else 0


def _table(results: Path, budget: Budget) -> None:
    """Bits per byte of the test texts so far, the mean over seeds."""
    lines = [each for each in read_results(results) if each["budget"] == budget.to_dict()]
    print(f"{'arm':20}{'setting':>8}{'seeds':>6}", *(f"{domain:>9}" for domain in DOMAINS))
    for setting in SETTINGS:
        for arm in ARMS:
            runs = [x for x in lines if (x["arm"], x["setting"]) == (arm, setting)]
            if runs:
                figures = [sum(_bits(x, d) for x in runs) / len(runs) for d in DOMAINS]
                print(f"{arm:20}{setting:>8}{len(runs):>6}", *(f"{f:9.4f}" for f in figures))


def _bits(line: dict[str, Any], domain: str) -> float:
    """Per byte, of the tokens within the length that was trained on."""
    found = line["text"]["test"][domain]
    kept = sum(edge <= line["budget"]["context_length"] for edge in line["edges"]) - 1
    bits, size = (sum(sum(each[:kept]) for each in found[key]) for key in ("bits", "bytes"))
    return bits / size


if __name__ == "__main__":
    script(main)
