"""`nirvana bench`: speed and memory, beside the peers that are installed."""

import sys
from typing import Annotated, Any

import typer

from nirvana.cli.console import JsonOption, output
from nirvana.errors import InputError
from nirvana.files import write_json

PARTS = ("train", "prefill", "decode", "trigger")
PEERS = ("gated_deltanet", "llama", "llama_compiled")
DTYPES = ("bfloat16", "float32")


def bench(
    preset: Annotated[str, typer.Option(help="Size of the models.")] = "1.3b",
    parts: Annotated[str, typer.Option(help="What to measure.")] = ",".join(PARTS),
    train: Annotated[
        list[str] | None,
        typer.Option(help="Batch x tokens of a training step; again for more.  [4x4096, 1x16384]"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 65536,
    decode_contexts: Annotated[str, typer.Option(help="Tokens before decoding.")] = "1024,65536",
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 128,
    steps: Annotated[int, typer.Option(help="Repetitions that count, after the warm-up.")] = 10,
    peers: Annotated[
        str, typer.Option(help=f"installed, none, or some of {','.join(PEERS)}.")
    ] = "installed",
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES))] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    layers: Annotated[int | None, typer.Option(help="Depth instead of the preset's.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
    json: JsonOption = None,
) -> None:
    """Measures training, prefill, decoding and the Trigger's share, beside peers.

    First the fast path is checked against float32; where that fails there are no figures.
    """
    import torch

    from nirvana.bench import gate
    from nirvana.bench.measure import environment
    from nirvana.bench.peers import OURS
    from nirvana.bench.run import Options, measure
    from nirvana.bench.tables import rows_table
    from nirvana.device import choose_device

    for name, value in (("context", context), ("new-tokens", new_tokens), ("steps", steps)):
        if value < 1:
            raise InputError(f"--{name} = {value} must be at least 1")
    chosen = {"installed": list(PEERS), "none": []}.get(peers)
    options = Options(
        preset=preset,
        parts=tuple(_some_of(parts, PARTS, "parts")),
        train=tuple(_size(text) for text in train or ("4x4096", "1x16384")),
        context=context,
        decode_contexts=tuple(_count(text) for text in decode_contexts.split(",")),
        new_tokens=new_tokens,
        steps=steps,
        peers=tuple(_some_of(peers, PEERS, "peers") if chosen is None else chosen),
        dtype=getattr(torch, _some_of(dtype, DTYPES, "dtype")[0]),
        device=choose_device(device),
        layers=layers,
        compiled=not eager,
    )
    _ = options.config  # a wrong preset or depth is told before anything runs
    console = output()
    machine = environment(options.device)
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    console.print(f"{machine['device']}; {versions}; commit {machine['commit']}", soft_wrap=True)
    with console.status("checking values and gradients"):
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
    with console.status("measuring") as status:
        for row in measure(options):
            results["rows"].append(row)
            status.update(f"measured {row['part']} of {row['model']}")
            if json is not None:  # after every row: what was measured outlives an interruption
                write_json(json, results)
    # By part, for the eye; the file has them as they were measured.
    console.print(
        rows_table(sorted(results["rows"], key=lambda row: options.parts.index(row["part"])))
    )
    if any("failed" in row and row["model"] == OURS for row in results["rows"]):
        raise typer.Exit(1)


def _some_of(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"--{option} {name!r} is unknown: give some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _size(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) > 0 and int(length) > 1):
        raise InputError(f"--train {text!r} must be batch x tokens, as 4x4096")
    return int(batch), int(length)


def _count(text: str) -> int:
    if not (text.strip().isdecimal() and int(text) > 0):
        raise InputError(f"--decode-contexts {text!r} must be numbers of tokens, as 1024,65536")
    return int(text)
