"""`nirvana demo`: the main job on real data that the dependencies carry, without a network."""

import pydoc
import re
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nirvana.cli.console import output
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder, write_json
from nirvana.progress import ProgressLines

BYTES_PER_TEXT = 24_000
PROMPT = "The magnetic resonance images of the brain show"
SEED = 0
REPORTS = 6
ABOVE = 40.0  # mm of brain above the volume's last slice, by the height of its ventricles
LESIONS = (12.0, 30.0)  # mm, sizes of those that are simulated
RESULTS = ("metrics.json", "mri.png", "reconstruction.h5", "report.png")


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("out/demo"),
    text: Annotated[Path | None, typer.Option(help="A text file of your own to read, too.")] = None,
) -> None:
    """Reads real text with the Trigger on and off, reconstructs a real brain volume, and reports
    lesions that were simulated in it."""
    from nirvana.data.documents import read_documents

    started = time.perf_counter()
    check_outputs({"--out": out}, [text])
    out = replaceable_folder(out, RESULTS)
    texts = found_texts()
    if text is not None:
        texts[text.name] = _cut(read_documents(text))
        if not texts[text.name]:
            raise InputError(f"{text}: holds no text; give a file with some")
    console = output()
    language = _language(texts, console)
    mri, write_images = _mri(console)
    reports, write_report = _reports(console)
    seconds = time.perf_counter() - started
    with atomic_folder(out) as folder:
        write_images(folder)
        write_report(folder)
        figures = {"language": language, "mri": mri, "reports": reports}
        write_json(folder / "metrics.json", {**figures, "seconds": round(seconds, 1)})
    console.print(f"{out}: {', '.join(RESULTS)}; {seconds:.0f} seconds")


def found_texts() -> dict[str, list[str]]:
    """Three kinds of real text that every installation has, `BYTES_PER_TEXT` of each."""
    import pydoc_data.topics

    import numpy as np

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
    from nirvana.generate.text import prompt_tokens
    from nirvana.model.assets import load_language_model
    from nirvana.model.trigger import without_trigger

    model, tokenizer = load_language_model("tiny")
    table = Table("text", "documents", "bytes", "bits per byte", "Trigger off")
    figures = {}
    with ProgressLines("{task.description}") as progress:
        for name, documents in texts.items():
            progress.add_task(f"reading {name}")
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
    tokens = prompt_tokens(tokenizer, PROMPT)
    continue_text(model, tokenizer, tokens, max_new_tokens=48, seed=SEED)
    return figures


def _mri(console: Console) -> tuple[dict[str, dict[str, float]], Any]:
    """Scores of every method on nibabel's example volume, and a function that writes the
    pictures."""
    from nirvana.cli.mri import progress_bars, slice_counters
    from nirvana.mri.data.example import NOISE, SIMULATION, example_volume
    from nirvana.mri.evaluate.compare import run_methods, score_rows
    from nirvana.mri.evaluate.tables import FORMATS, rows_table
    from nirvana.mri.io import write_reconstruction
    from nirvana.mri.methods import NIRVANA, WAVELET, ZERO_FILLED, comparison_methods
    from nirvana.mri.model.checkpoint import load_codec
    from nirvana.mri.physics.masks import Sampling
    from nirvana.mri.pipeline import Preparation, prepare
    from nirvana.mri.results import TARGET, draw_middle

    sampling = Sampling("equispaced", acceleration=4, center_fraction=0.08)
    prepared = prepare(example_volume(), Preparation(SIMULATION, sampling), SEED)
    scan, target, sampled = prepared.scan, prepared.target, prepared.sampled
    assert target is not None  # of a simulated scan
    slices, coils, rows, columns = scan.kspace.shape
    console.print(
        f"\n[bold]MRI[/]: {slices} real slices of {rows} x {columns}, {coils} simulated coils, "
        f"noise {NOISE:.1%}, equispaced 4x, {sampled:.1%} of columns sampled"
    )
    with progress_bars() as progress:
        counters = slice_counters(progress, scan.name, slices)
        methods = comparison_methods({NIRVANA: load_codec()})
        results = run_methods(prepared.measurement, methods, counters)
    table = score_rows(target, results, volume=scan.name, sampled=sampled)
    console.print(rows_table(table))

    def write_images(folder: Path) -> None:
        images = {name: result.images for name, result in results.items()}
        draw_middle(folder / "mri.png", {TARGET: target, **images}, scan, sampled)
        write_reconstruction(
            folder / "reconstruction.h5", images[NIRVANA], scan, prepared.pattern, method="nirvana"
        )

    names = {ZERO_FILLED: "zero_filled", WAVELET: "wavelet", NIRVANA: "nirvana"}
    figures = {
        names[row["method"]]: {name: float(row[name]) for name in FORMATS if name in row}
        for row in table
    }
    return figures, write_images


def _reports(console: Console) -> tuple[list[dict[str, Any]], Any]:
    """Reports of slices of the same volume, to some of which a lesion is added before they are
    scanned, and a function that writes the picture of one."""
    import torch

    from nirvana.mri.anatomy.brain_slices import slices_of
    from nirvana.mri.anatomy.lesions import LesionSettings
    from nirvana.mri.data.example import NOISE, example_volume
    from nirvana.mri.data.simulation.config import Simulation
    from nirvana.mri.physics.fourier import rss
    from nirvana.mri.physics.masks import Sampling
    from nirvana.mri.reports.encode import encode
    from nirvana.mri.reports.figure import report_panel
    from nirvana.mri.reports.grammar import write
    from nirvana.mri.reports.localize import region_in
    from nirvana.mri.reports.reporter import DISCLAIMER, load_reporter
    from nirvana.mri.reports.samples import Scanner, report_batch
    from nirvana.packaged import packaged

    reporter = load_reporter(packaged("reporter"))
    # Fluid is bright in echo-planar images, too.
    slices = slices_of(example_volume(), "T2", "demo", above=ABOVE)
    scanner = Scanner(Sampling("equispaced", 4.0, 0.08), Simulation(noise=(NOISE, NOISE)), 8)
    generator = torch.Generator().manual_seed(SEED)
    lesions = LesionSettings(size=LESIONS)
    wording = reporter.wording
    batch = report_batch(slices, REPORTS, generator, scanner, lesions, [wording], vary=False)
    with torch.inference_mode():
        tokens, images = encode(reporter.model, *batch.inputs, mirrored=reporter.mirrored)
    readings = reporter.read(tokens)
    console.print(
        "\n[bold]Reports[/] of slices at 4x, in some of which lesions are simulated; the reporter "
        "learned from no echo-planar images like these"
    )
    table = Table("simulated", "reported", "probability of a finding")
    for facts, reading in zip(batch.facts, readings, strict=True):
        table.add_row(write(facts, wording), reading.text, f"{reading.finding:.0%}")
    console.print(table)
    console.print(DISCLAIMER)

    shown = next(i for i, facts in enumerate(batch.facts) if facts.finding)
    view = slices.views(batch.index[shown : shown + 1], generator, vary=False)
    brain = (view.depth[0] > 0).numpy()
    marked = region_in(view.u[0], view.v[0], view.w[0], brain, readings[shown].facts)
    title = f"simulated: {write(batch.facts[shown], wording)}"

    def write_report(folder: Path) -> None:
        picture = rss(images[shown : shown + 1])[0].numpy()
        report_panel(folder / "report.png", picture, readings[shown], marked, title)

    rows = zip(batch.facts, readings, strict=True)
    return [
        {"simulated": facts.to_dict(), **reading.to_dict()} for facts, reading in rows
    ], write_report
