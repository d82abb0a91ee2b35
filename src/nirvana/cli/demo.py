"""`nirvana demo`: the main job on real data that the dependencies carry, without a network."""

import pydoc
import re
import time
from collections.abc import Iterable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from nirvana.cli.console import output
from nirvana.errors import InputError
from nirvana.files import atomic_folder, replaceable_folder, write_json

BYTES_PER_TEXT = 24_000
PROMPT = "The magnetic resonance images of the brain show"
SEED = 0
NOISE = 0.005  # standard deviation over the brightest voxel
RESULTS = ("metrics.json", "mri.png", "reconstruction.h5")


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("out/demo"),
    text: Annotated[Path | None, typer.Option(help="A text file of your own to read, too.")] = None,
) -> None:
    """Reads real text with the Trigger on and off, and reconstructs a real brain volume."""
    from nirvana.text import read_documents

    started = time.perf_counter()
    out = replaceable_folder(out, RESULTS)
    texts = found_texts()
    if text is not None:
        texts[text.name] = _cut(read_documents(text))
        if not texts[text.name]:
            raise InputError(f"{text}: holds no text; give a file with some")
    console = output()
    language = _language(texts, console)
    mri, write_images = _mri(console)
    seconds = time.perf_counter() - started
    with atomic_folder(out) as folder:
        write_images(folder)
        write_json(
            folder / "metrics.json",
            {"language": language, "mri": mri, "seconds": round(seconds, 1)},
        )
    console.print(f"{out}: {', '.join(RESULTS)}; {seconds:.0f} seconds")


def found_texts() -> dict[str, list[str]]:
    """Three kinds of real text that every installation has, `BYTES_PER_TEXT` of each."""
    import pydoc_data.topics

    return {
        "licences": _cut(_licences()),
        "python_reference": _cut(pydoc_data.topics.topics.values()),
        "numpy_documentation": _cut(_docstrings(np)),
    }


def _licences() -> Iterator[str]:
    """Licence files of the packages that this one needs."""
    for requirement in metadata.requires("nirvana") or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:  # an extra that is not installed
            continue
        for file in files:
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                yield file.read_text(encoding="utf-8")


def _docstrings(module: Any) -> Iterator[str]:
    """Documentation of a module's public functions and classes, in the order of their names."""
    for name in sorted(module.__all__):
        described = getattr(module, name)
        if callable(described) and (doc := pydoc.getdoc(described)):
            yield doc


def _cut(documents: Iterable[str]) -> list[str]:
    """The first documents, a fourth of `BYTES_PER_TEXT` each at most, until that is reached."""
    pieces: list[str] = []
    size = 0
    for document in documents:
        if document.strip():
            pieces.append(document[: BYTES_PER_TEXT // 4])
            size += len(pieces[-1].encode("utf-8"))
        if size >= BYTES_PER_TEXT:
            break
    return pieces


def _language(texts: dict[str, list[str]], console: Console) -> dict[str, dict[str, float]]:
    """Bits per byte of each text with the Trigger on and off, and a continuation."""
    from nirvana.cli.language import continue_text
    from nirvana.evaluate.perplexity import Score, score_documents
    from nirvana.model.assets import load_language_model
    from nirvana.model.trigger import without_trigger

    model, tokenizer = load_language_model("tiny")
    table = Table("text", "documents", "bytes", "bits per byte", "Trigger off")
    figures = {}
    with console.status("reading") as status:
        for name, documents in texts.items():
            status.update(f"reading {name}")
            on = sum(score_documents(model, tokenizer, documents), Score())
            with without_trigger(model):
                off = sum(score_documents(model, tokenizer, documents), Score())
            figures[name] = {
                "bits_per_byte": on.bits_per_byte,
                "bits_per_byte_without_trigger": off.bits_per_byte,
                "bytes": on.bytes,
            }
            row = (f"{on.bits_per_byte:.4f}", f"{off.bits_per_byte:.4f}")
            table.add_row(name, str(on.documents), f"{on.bytes:,}", *row)
    console.print("[bold]Language[/]: the packaged model of 5.8 M parameters")
    console.print(table)
    console.print(f"[bold]Continuation[/] of: {PROMPT}")
    continue_text(model, tokenizer, PROMPT, max_new_tokens=48, seed=SEED)
    return figures


def _mri(console: Console) -> tuple[dict[str, dict[str, float]], Any]:
    """Scores of every method on nibabel's example volume, and what writes the pictures."""
    from nirvana.cli.mri import (
        NIRVANA,
        WAVELET,
        ZERO_FILLED,
        comparison,
        draw_middle,
        progress_bars,
        simulated,
    )
    from nirvana.mri import evaluate as ev
    from nirvana.mri.io import write_reconstruction
    from nirvana.mri.model import load_codec
    from nirvana.mri.physics import Sampling
    from nirvana.mri.simulate import Simulation

    # nibabel.testing names this folder, too, but cannot be imported without pytest.
    path = Path(str(resources.files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
    settings = Simulation(num_coils=8, noise=(NOISE, NOISE))
    scan = simulated(path, settings, SEED)
    sampling = Sampling("equispaced", acceleration=4, center_fraction=0.08)
    kspace, mask = ev.undersample(scan, sampling, SEED)
    slices, coils, rows, columns = kspace.shape
    sampled = float(mask.float().mean())
    console.print(
        f"\n[bold]MRI[/]: {slices} real slices of {rows} x {columns}, {coils} simulated coils, "
        f"noise {NOISE:.1%}, equispaced 4x, {sampled:.1%} of columns sampled"
    )
    with progress_bars() as progress:
        methods = comparison({NIRVANA: load_codec()}, True, progress, scan.name, slices)
        results = ev.run_methods(kspace, mask, methods)
    target = ev.target_of(scan)
    table = ev.score_rows(target, results, volume=scan.name, sampled=sampled)
    console.print(ev.rows_table(table))

    def write_images(folder: Path) -> None:
        images = {name: volume for name, (volume, _) in results.items()}
        draw_middle(folder / "mri.png", target, images, table, scan.name, sampled)
        write_reconstruction(
            folder / "reconstruction.h5", images[NIRVANA], scan, mask.numpy(), method="nirvana"
        )

    names = {ZERO_FILLED: "zero_filled", WAVELET: "wavelet", NIRVANA: "nirvana"}
    figures = {
        names[row["method"]]: {name: float(row[name]) for name in ev.FORMATS if name in row}
        for row in table
    }
    return figures, write_images
