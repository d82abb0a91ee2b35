"""`nirvana bench`: speed and memory, beside the peers that are installed."""

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nirvana.cli.console import DeviceOption, JsonOption, output
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.progress import ProgressLines

if TYPE_CHECKING:
    from nirvana.bench.run import Options

PARTS = ("train", "prefill", "decode", "trigger")
START = "start"  # a part that is measured on request: it compiles everything once more
PEERS = ("gated_deltanet", "llama", "llama_compiled")
DTYPES = ("bfloat16", "float32")
DECODE = ("1x1024", "8x1024", "32x1024", "64x1024", "1x65536", "8x65536")


def bench(
    preset: Annotated[str, typer.Option(help="Size of the models.")] = "1.3b",
    parts: Annotated[
        str, typer.Option(help=f"What to measure; also {START}: the first text of a new process.")
    ] = ",".join(PARTS),
    train: Annotated[
        list[str] | None,
        typer.Option(help="Batch x tokens of a training step; again for more.  [4x4096, 1x16384]"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 65536,
    decode: Annotated[
        list[str] | None,
        typer.Option(
            help="Batch x tokens before decoding; again for more.  "
            "[1, 8, 32 and 64 x 1024, 1 and 8 x 65536]"
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 128,
    steps: Annotated[int, typer.Option(help="Repetitions that count, after the warm-up.")] = 10,
    peers: Annotated[
        str, typer.Option(help=f"installed, none, or some of {','.join(PEERS)}.")
    ] = "installed",
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES))] = "bfloat16",
    device: DeviceOption = "auto",
    layers: Annotated[int | None, typer.Option(help="Depth instead of the preset's.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Fill the caches of compiled kernels, measure nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Measures training, prefill, decoding and the Trigger's share, beside peers.

    First the fast path is checked against float32; if it is wrong, nothing is measured.
    """
    for name, value in (("context", context), ("new-tokens", new_tokens), ("steps", steps)):
        if value < 1:
            raise InputError(f"--{name} = {value} must be at least 1")
    if warm and (eager or json is not None):
        raise InputError("--warm compiles and measures nothing: leave out --eager and --json")
    chosen = {"installed": list(PEERS), "none": []}.get(peers)
    selected_peers = _some_of(peers, PEERS, "peers") if chosen is None else chosen
    selected_parts = _some_of(parts, (*PARTS, START), "parts")
    sizes = tuple(_size(text, "train") for text in train or ("4x4096", "1x16384"))
    contexts = tuple(_size(text, "decode") for text in decode or DECODE)
    dtypes = _some_of(dtype, DTYPES, "dtype")
    if len(dtypes) > 1:
        raise InputError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")

    # Everything above is checked before torch is imported, which takes seconds.
    import torch

    from nirvana.bench import gate
    from nirvana.bench.measure import environment
    from nirvana.bench.peers import OURS
    from nirvana.bench.run import Options, measure
    from nirvana.bench.tables import rows_table
    from nirvana.device import choose_device

    options = Options(
        preset=preset,
        parts=tuple(selected_parts),
        train=sizes,
        context=context,
        decode=contexts,
        new_tokens=new_tokens,
        steps=steps,
        peers=tuple(selected_peers),
        dtype=getattr(torch, dtypes[0]),
        device=choose_device(device),
        layers=layers,
        compiled=not eager,
    )
    _ = options.config  # refuses a wrong preset or depth before anything runs
    console = output()
    machine = environment(options.device)
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    console.print(f"{machine['device']}; {versions}; commit {machine['commit']}", soft_wrap=True)
    if warm:
        _warm(options)
        return
    with ProgressLines("{task.description}") as progress:
        progress.add_task("checking values and gradients")
        checked = gate.check(preset, options.device, options.dtype, options.compiled)
    if not checked.passed:
        message = "values or gradients are wrong, so there are no figures"
        print(f"nirvana: {message}: {checked}", file=sys.stderr)
        raise typer.Exit(1)
    console.print(f"values and gradients agree with float32: {checked}", soft_wrap=True)
    results: dict[str, Any] = {
        "environment": machine,
        "options": options.to_dict(),
        "gate": checked.to_dict(),
        "rows": [],
    }
    with ProgressLines("{task.description}") as progress:
        progress.add_task("measuring")
        for row in measure(options):
            results["rows"].append(row)
            progress.add_task(f"measured {row['part']} of {row['model']}")
            if json is not None:  # after every row, so that an interruption loses only one
                write_json(json, results)
    # The table is sorted by part; the file keeps the order of measurement.
    console.print(
        rows_table(sorted(results["rows"], key=lambda row: options.parts.index(row["part"])))
    )
    if any("failed" in row and row["model"] == OURS for row in results["rows"]):
        raise typer.Exit(1)


def _warm(options: "Options") -> None:
    """Runs our model once for every size, which compiles its kernels into their caches."""
    from nirvana.bench.measure import kernel_caches
    from nirvana.bench.run import measure

    console = output()
    parts = tuple(part for part in options.parts if part != START)
    once = replace(options, parts=parts, peers=(), steps=1, new_tokens=1)
    began, failed = time.perf_counter(), False
    for row in measure(once):
        now = time.perf_counter()
        size = f"{row['part']}, {row['batch']} x {row['tokens']:,}"
        outcome = row.get("failed", f"{now - began:.0f} s")
        console.print(f"{size}: {outcome}", soft_wrap=True)
        began, failed = now, failed or "failed" in row
    for name, folder in kernel_caches().items():
        console.print(f"{name} keeps its kernels in {folder}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _some_of(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"--{option} {name!r} is unknown: give some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _size(text: str, option: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) > 0 and int(length) > 1):
        raise InputError(f"--{option} {text!r} must be batch x tokens, as 4x4096")
    return int(batch), int(length)
