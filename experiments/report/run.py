"""The study of reports: trains on simulated lesions, reads unseen persons in unseen wordings.

    python experiments/report/prepare.py MRI_FOLDER heads.npz
    python experiments/report/run.py heads.npz OUT
    python experiments/report/report.py OUT docs/evidence-report.md

Persons are named role/person with the roles train, valid and test. An encoder is trained twice:
into OUT/see-CASCADES, where it learns to see lesions and images, which needs no backbone, and from
there into OUT/NAME/tell, where it learns to make a backbone write (an interrupted training goes on
where it stopped). Every cell of the study appends one file to OUT/rows when it is whole; those that
are there are not made again.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import atomic_file, check_outputs, write_json
from nirvana.mri.codec import CodecConfig
from nirvana.mri.lesions import LesionSettings
from nirvana.mri.physics import Sampling
from nirvana.mri.report.encode import encode
from nirvana.mri.report.grammar import NORMAL, WORDINGS, Facts, parse
from nirvana.mri.report.heads import Heads, load_heads
from nirvana.mri.report.reporter import READING, Reporter, load_reporter, save_reporter
from nirvana.mri.report.samples import ReportBatch, Scanner, report_batch
from nirvana.mri.report.score import best_threshold
from nirvana.mri.report.train import ReportConfig, ReportSection, train_reporter
from nirvana.mri.simulate import Simulation
from nirvana.seeds import mixed_seed
from nirvana.train.config import OptimConfig, RunConfig

SEEN, UNSEEN = (0, 1, 2, 3), (4, 5)
assert sorted(SEEN + UNSEEN) == list(range(len(WORDINGS)))
CENTER = {1.0: 0.08, 4.0: 0.08, 8.0: 0.04}
TRAINED = (1.0, 4.0, 4.0, 8.0)  # the study's targets are at 4x
SIMULATION = Simulation(noise=(0.002, 0.01))
CONTRASTS = (0.15, 0.3, 0.5, 0.8)


@dataclass(frozen=True)
class Study:
    """Sizes of the study."""

    see_steps: int = 10000
    tell_steps: int = 5000
    batch_size: int = 64
    samples: int = 1000  # of every cell
    curve: int = 400  # of every contrast and acceleration
    coils: int = 8
    cascades: int = 6
    vit_dim: int = 192
    vit_depth: int = 3
    vit_heads: int = 6
    see_lr: float = 2e-3
    tell_lr: float = 5e-4
    place_weight: float = 1.0  # see `ReportSection`
    hallucinated: float = 0.01  # share of the validation's normals that may get a finding

    def __post_init__(self) -> None:
        if not 0 <= self.hallucinated <= 1:
            raise InputError(f"--hallucinated {self.hallucinated} must be from 0 to 1")


TOY = Study(
    see_steps=2,
    tell_steps=2,
    batch_size=4,
    samples=8,
    curve=4,
    coils=2,
    cascades=1,
    vit_dim=16,
    vit_depth=1,
    vit_heads=2,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbones", nargs="+", default=[CodecConfig().backbone])
    parser.add_argument("--weights", default=CodecConfig().weights)
    parser.add_argument("--start", default="", help="a reporter whose encoder learns on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--toy", action="store_true", help="the same at a size for a test")
    for size in fields(Study):
        name = size.name.replace("_", "-")
        parser.add_argument(
            f"--{name}", type=type(size.default), help=f"{size.default} if not given"
        )
    given = parser.parse_args(arguments)
    asked = {size.name: getattr(given, size.name) for size in fields(Study)}
    asked = {name: value for name, value in asked.items() if value is not None}
    study = replace(TOY if given.toy else Study(), **asked)
    written = {f"OUT ({name})": given.out / name for name in ("rows", "shown", "study.json")}
    check_outputs(written, [given.heads, given.weights, given.start or None])
    heads = load_heads(given.heads)
    first = Path(given.backbones[0]).name
    write_json(given.out / "study.json", {"model": first, "start": given.start, **vars(study)})
    for name, backbone, cascades in models(given.backbones, study):
        seen = given.out / f"see-{cascades}"
        for folder, seeing in ((seen, True), (given.out / name / "tell", False)):
            if (folder / "model" / "report.json").is_file():
                continue
            start = given.start if seeing else str(seen)
            config = config_of(study, given, heads, folder, seeing, start, backbone, cascades)
            outcome = train_reporter(config, resume=True)
            if not outcome.finished:
                return  # interrupted; what there is goes on next time
        evaluate(study, heads, given.out, name, choose_device(given.device), name != first)


def models(backbones: list[str], study: Study) -> Iterator[tuple[str, str, int]]:
    """Name, backbone and encoder cascades of every model: one for each backbone, and the first
    backbone again on the zero-filled image."""
    for backbone in backbones:
        yield Path(backbone).name, backbone, study.cascades
    yield "zero-filled", backbones[0], 0


def config_of(
    study: Study,
    given: argparse.Namespace,
    heads: Heads,
    folder: Path,
    seeing: bool,
    start: str,
    backbone: str,
    cascades: int,
) -> ReportConfig:
    """What is trained into a folder: seeing, or telling."""
    codec: Any = {"backbone": backbone, "weights": given.weights}
    steps = study.see_steps if seeing else study.tell_steps
    lr = study.see_lr if seeing else study.tell_lr
    return ReportConfig(
        data=ReportSection(
            heads=str(given.heads),
            subjects=of_role(heads, "train"),
            batch_size=study.batch_size,
            coils=study.coils,
            accelerations=list(TRAINED),
            center_fractions=[CENTER[each] for each in TRAINED],
            wordings=list(SEEN),
            reuse=32,
            words_weight=0.0 if seeing else 1.0,
            place_weight=study.place_weight,
            image_weight=10.0 if cascades else 0.0,
            keep_image=not seeing,
            start=start,
            valid=of_role(heads, "valid"),
            valid_slices=min(256, study.samples),
        ),
        run=RunConfig(
            out=str(folder),
            steps=steps,
            device=given.device,
            precision=given.precision,
            compile=False,
            log_interval=max(1, steps // 100),
            validation_interval=max(1, steps // 10),
            checkpoint_interval=max(1, steps // 8),
            keep_checkpoints=1,
        ),
        codec=CodecConfig(
            **codec,
            encoder_cascades=cascades,
            image_cascades=0,
            decoder_features=(1, 1, 1, 1),  # unused: no image is asked for
            vit_dim=study.vit_dim,
            vit_depth=study.vit_depth,
            vit_heads=study.vit_heads,
            vit_stem="convolutions",
        ),
        simulation=SIMULATION,
        optim=OptimConfig(lr=lr, min_lr=lr / 20, warmup_steps=steps // 20),
    )


def of_role(heads: Heads, role: str) -> list[str]:
    """The persons of a role."""
    names = [name for name in heads.names if name.startswith(f"{role}/")]
    if not names:
        raise InputError(f"no person in the heads is of the role {role}")
    return names


def evaluate(
    study: Study, heads: Heads, out: Path, name: str, device: torch.device, few: bool
) -> None:
    """All cells of a model that are not there yet."""
    folder, kept = out / name / "reporter", out / name / "validation.json"
    if not kept.is_file():
        # What is read with is what is kept, half precision and all.
        save_reporter(load_reporter(out / name / "tell" / "model"), folder, torch.float16)
        reporter = load_reporter(folder, device)
        valid = heads.of_subjects(of_role(heads, "valid")).to(device)
        write_json(kept, validated(study, reporter, valid))
    reporter, validation = load_reporter(folder, device), json.loads(kept.read_text())
    threshold = thresholds(validation, study.hallucinated)
    reporter.threshold, reporter.mirrored = threshold[f"wording {SEEN[0]}"], True
    save_reporter(reporter, folder, torch.float16)
    test = heads.of_subjects(of_role(heads, "test")).to(device)
    for cell in cells(few):
        path = out / "rows" / f"{name}.{cell.name}.jsonl"
        if path.is_file():
            continue
        count = study.curve if cell.contrast else study.samples
        reporter.threshold = threshold[cell.way]
        rows = []
        for batch in batches(study, test, cell.acceleration, count, 2, cell.contrast):
            for row in read(reporter, batch, cell):
                index = batch.index[row.pop("i")]
                subject = test.names[int(test.subject[index])]
                facts = {"model": name, **vars(cell), "subject": subject, "slice": int(index)}
                rows.append({**facts, "threshold": reporter.threshold, **row})
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows", flush=True)


@dataclass(frozen=True)
class Cell:
    """One way of reading the test's samples."""

    kind: str  # "wording", "one view", "free", "no image", "full image" or "curve"
    acceleration: float
    wording: int
    contrast: float = 0.0

    @property
    def name(self) -> str:
        contrast = f".{self.contrast:g}" if self.contrast else ""
        kind = self.kind.replace(" ", "-")
        return f"{kind}.{self.acceleration:g}x.w{self.wording}{contrast}"

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image is read, too."""
        return self.kind != "one view"

    @property
    def way(self) -> str:
        """Which threshold it has: every way of reading has its own."""
        return f"wording {self.wording}" if self.mirrored else self.kind


def cells(few: bool) -> list[Cell]:
    """The cells of a model; those beside the first have the main ones alone."""
    main = [Cell("wording", a, w) for a in (4.0, 8.0) for w in (SEEN[0], *UNSEEN)]
    if few:
        return main
    controls = [Cell(kind, 4.0, 0) for kind in ("one view", "no image", "free")]
    controls.append(Cell("full image", 1.0, 0))
    curve = [Cell("curve", a, 0, c) for a in CENTER for c in CONTRASTS]
    return main + controls + curve


def batches(
    study: Study, heads: Heads, acceleration: float, count: int, seed: int, contrast: float = 0.0
) -> Iterator[ReportBatch]:
    """`count` samples, the same heads, lesions, coils and noise for every acceleration."""
    lesions = LesionSettings()
    if contrast:
        lesions = LesionSettings(normal_share=0.0, contrast=(contrast, contrast), size=(4.0, 40.0))
    sampling = Sampling("equispaced", acceleration, CENTER[acceleration])
    scanner = Scanner(sampling, SIMULATION, study.coils)
    step = min(READING, study.batch_size)
    for first in range(0, count, step):
        generator = torch.Generator().manual_seed(mixed_seed(seed, first))
        size = min(step, count - first)
        yield report_batch(heads, size, generator, scanner, lesions, SEEN, vary=False)


def read(reporter: Reporter, batch: ReportBatch, cell: Cell) -> Iterator[dict[str, Any]]:
    """What the model says of each sample of a batch."""
    if cell.kind == "no image":
        batch = replace(batch, kspace=torch.zeros_like(batch.kspace))
    with torch.inference_mode():
        tokens, _ = encode(reporter.model, *batch.inputs, mirrored=cell.mirrored)
    valid = [True] * len(tokens)
    if cell.kind == "curve":
        finding = reporter.findings(tokens, cell.wording)
        said: list[Facts | None] = [None] * len(tokens)
    elif cell.kind == "free":
        finding = [None] * len(tokens)
        said = [parsed(text) for text in reporter.write(tokens)]
        valid = [facts is not None for facts in said]
        said = [facts or NORMAL for facts in said]
    else:
        readings = reporter.read(tokens, cell.wording)
        finding = [reading.finding for reading in readings]
        said = [reading.facts for reading in readings]
    for i, truth in enumerate(batch.facts):
        facts = said[i]
        yield {
            "i": i,
            "truth": truth.to_dict(),
            "said": None if facts is None else facts.to_dict(),
            "valid": valid[i],
            "finding": finding[i],
            "size": float(batch.size[i]),
            "lesion_contrast": float(batch.contrast[i]),
        }


def parsed(text: str) -> Facts | None:
    """The facts of a free text, None where the grammar has no such text."""
    try:
        return parse(text)
    except InputError:
        return None


def validated(study: Study, reporter: Reporter, heads: Heads) -> dict[str, Any]:
    """Of the validation's samples at 4x, whether there is a finding (`present`), and its
    probability in each way of reading (`finding`)."""
    ways = {cell.way: cell for cell in cells(few=False)}
    present: list[bool] = []
    finding: dict[str, list[float]] = {way: [] for way in ways}
    for batch in batches(study, heads, 4.0, study.samples, 1):
        with torch.inference_mode():
            tokens, _ = encode(reporter.model, *batch.inputs, mirrored=True)
        for way, cell in ways.items():
            read = tokens if cell.mirrored else tokens[:, 0]
            finding[way] += reporter.findings(read, cell.wording)
        present += [facts.finding for facts in batch.facts]
    return {"present": present, "finding": finding}


def thresholds(validation: dict[str, Any], most: float) -> dict[str, float]:
    """Of each way of reading. A model that has never written a wording finds its words improbable
    whatever it sees; what a finding adds to their probability is still there."""
    present = validation["present"]
    return {
        way: best_threshold(present, values, most)["threshold"]
        for way, values in validation["finding"].items()
    }


if __name__ == "__main__":
    script(main)
