"""Runs the report study: trains on simulated lesions, reads unseen people in unseen wordings.

    python -m experiments.report.prepare MRI_FOLDER brain_slices.npz
    python -m experiments.report.study brain_slices.npz OUT
    python -m experiments.report.page --study OUT

People are named role/person with the roles train, valid and test. An encoder is trained twice:
into OUT/see-CASCADES, where it learns to locate lesions and to reconstruct images, which needs no
backbone, and from there into OUT/NAME/tell, where it learns to make a backbone write. An
interrupted training continues where it stopped. Every finished cell of the study is one file in
OUT/rows, and is not read again.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common.program import make_parser
from experiments.report.rows import READ
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import atomic_file, write_json
from nirvana.mri.anatomy.brain_slices import BrainSlices, load_brain_slices
from nirvana.mri.anatomy.lesions import SEQUENCES, LesionSettings
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.reports.encode import encode
from nirvana.mri.reports.grammar import NORMAL, WORDINGS, Facts, parse
from nirvana.mri.reports.reporter import MAX_SLICES_AT_ONCE, Reporter, load_reporter, save_reporter
from nirvana.mri.reports.samples import ReportBatch, Scanner, report_batch
from nirvana.mri.reports.score import best_threshold
from nirvana.mri.reports.train import ReportConfig, ReportSection, train_reporter
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.report.study", __doc__)
    parser.add_argument("brain_slices", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbones", nargs="+", default=[CodecConfig().backbone])
    parser.add_argument("--weights", default=CodecConfig().weights)
    parser.add_argument("--start", default="", help="a reporter whose encoder is trained further")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--toy", action="store_true", help="at a size for a test")
    for size in fields(Study):
        name = size.name.replace("_", "-")
        parser.add_argument(
            f"--{name}", type=type(size.default), help=f"{size.default} if not given"
        )
    given = parser.parse_args(arguments)
    given_sizes = {size.name: getattr(given, size.name) for size in fields(Study)}
    given_sizes = {name: value for name, value in given_sizes.items() if value is not None}
    study = replace(TOY if given.toy else Study(), **given_sizes)
    brains = load_brain_slices(given.brain_slices)
    first = Path(given.backbones[0]).name
    write_json(given.out / "study.json", {"model": first, "start": given.start, **vars(study)})
    for name, backbone, cascades in models(given.backbones, study):
        seen = given.out / f"see-{cascades}"
        for folder, seeing in ((seen, True), (given.out / name / "tell", False)):
            if (folder / "model" / "report.json").is_file():
                continue
            start = given.start if seeing else str(seen)
            config = config_of(study, given, brains, folder, seeing, start, backbone, cascades)
            outcome = train_reporter(config, resume=True)
            if not outcome.finished:
                return  # interrupted; the next call continues
        evaluate(study, brains, given.out, name, choose_device(given.device), name != first)


def models(backbones: list[str], study: Study) -> Iterator[tuple[str, str, int]]:
    """Name, backbone and encoder cascades of every model: one for each backbone, and the first
    backbone again on the zero-filled image."""
    for backbone in backbones:
        yield Path(backbone).name, backbone, study.cascades
    yield "zero-filled", backbones[0], 0


def config_of(
    study: Study,
    given: argparse.Namespace,
    brains: BrainSlices,
    folder: Path,
    seeing: bool,
    start: str,
    backbone: str,
    cascades: int,
) -> ReportConfig:
    """The configuration of one of both trainings: of the encoder alone, or through the backbone."""
    codec: Any = {"backbone": backbone, "weights": given.weights}
    steps = study.see_steps if seeing else study.tell_steps
    lr = study.see_lr if seeing else study.tell_lr
    return ReportConfig(
        data=ReportSection(
            brain_slices=str(given.brain_slices),
            subjects=of_role(brains, "train"),
            batch_size=study.batch_size,
            coils=study.coils,
            accelerations=list(TRAINED),
            center_fractions=[CENTER[each] for each in TRAINED],
            wordings=list(SEEN),
            reuse=32,
            report_weight=0.0 if seeing else 1.0,
            place_weight=study.place_weight,
            image_weight=10.0 if cascades else 0.0,
            freeze_frontend=not seeing,
            valid=of_role(brains, "valid"),
            valid_slices=min(256, study.samples),
        ),
        run=RunConfig(
            out=str(folder),
            steps=steps,
            initial=start,
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
            decoder_features=(1, 1, 1, 1),  # unused: no image is decoded
            vit_dim=study.vit_dim,
            vit_depth=study.vit_depth,
            vit_heads=study.vit_heads,
            vit_stem="convolutions",
        ),
        simulation=SIMULATION,
        optim=OptimConfig(lr=lr, min_lr=lr / 20, warmup_steps=steps // 20),
    )


def of_role(brains: BrainSlices, role: str) -> list[str]:
    """The persons of a role."""
    names = [name for name in brains.names if name.startswith(f"{role}/")]
    if not names:
        raise InputError(f"nobody in the data has the role {role}")
    return names


def evaluate(
    study: Study, brains: BrainSlices, out: Path, name: str, device: torch.device, few: bool
) -> None:
    """Reads all cells of a model whose files are missing."""
    folder, kept = out / name / "reporter", out / name / "validation.json"
    if not kept.is_file():
        # The saved reporter is scored, in half precision.
        save_reporter(load_reporter(out / name / "tell" / "model"), folder, torch.float16)
        reporter = load_reporter(folder, device)
        valid = brains.of_subjects(of_role(brains, "valid")).to(device)
        write_json(kept, validated(study, reporter, valid))
    reporter, validation = load_reporter(folder, device), json.loads(kept.read_text())
    threshold = thresholds(validation, study.hallucinated)
    reporter.threshold, reporter.mirrored = threshold[f"wording {SEEN[0]}"], True
    save_reporter(reporter, folder, torch.float16)
    test = brains.of_subjects(of_role(brains, "test")).to(device)
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
                sequence = SEQUENCES[int(test.sequence[index])]
                about = {"subject": subject, "slice": int(index), "sequence": sequence}
                facts = {"model": name, **vars(cell), **about}
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
        """The name of its threshold: every way of reading has its own."""
        return f"wording {self.wording}" if self.mirrored else self.kind


def cells(few: bool) -> list[Cell]:
    """The cells of a model; of `few`, those of the main table."""
    main = [Cell("wording", a, w) for a in (4.0, 8.0) for w in (SEEN[0], *UNSEEN)]
    if few:
        return main
    controls = [Cell(kind, 4.0, 0) for kind in ("one view", "no image", "free")]
    controls.append(Cell("full image", 1.0, 0))
    curve = [Cell("curve", a, 0, c) for a in CENTER for c in CONTRASTS]
    return main + controls + curve


def batches(
    study: Study,
    brains: BrainSlices,
    acceleration: float,
    count: int,
    seed: int,
    contrast: float = 0.0,
) -> Iterator[ReportBatch]:
    """`count` samples: the same slices, lesions, coils and noise for every acceleration."""
    lesions = LesionSettings()
    if contrast:
        lesions = LesionSettings(normal_share=0.0, contrast=(contrast, contrast), size=(4.0, 40.0))
    sampling = Sampling("equispaced", acceleration, CENTER[acceleration])
    scanner = Scanner(sampling, SIMULATION, study.coils)
    step = min(MAX_SLICES_AT_ONCE, study.batch_size)
    for first in range(0, count, step):
        generator = torch.Generator().manual_seed(mixed_seed(seed, first))
        size = min(step, count - first)
        yield report_batch(brains, size, generator, scanner, lesions, SEEN, vary=False)


def read(reporter: Reporter, batch: ReportBatch, cell: Cell) -> Iterator[dict[str, Any]]:
    """What the model reports for each sample of a batch."""
    if cell.kind == "no image":
        batch = replace(batch, kspace=torch.zeros_like(batch.kspace))
    with torch.inference_mode():
        tokens, _ = encode(reporter.model, *batch.inputs, mirrored=cell.mirrored)
    valid = [True] * len(tokens)
    if cell.kind == "curve":
        finding = reporter.findings(tokens, cell.wording)
        reported: list[Facts | None] = [None] * len(tokens)
    elif cell.kind == "free":
        finding = [None] * len(tokens)
        reported = [parsed(text) for text in reporter.write(tokens)]
        valid = [facts is not None for facts in reported]
        reported = [facts or NORMAL for facts in reported]
    else:
        readings = reporter.read(tokens, cell.wording)
        finding = [reading.finding for reading in readings]
        reported = [reading.facts for reading in readings]
    for i, truth in enumerate(batch.facts):
        facts = reported[i]
        yield {
            "i": i,
            "truth": truth.to_dict(),
            READ: None if facts is None else facts.to_dict(),
            "valid": valid[i],
            "finding": finding[i],
            "size": float(batch.size[i]),
            "lesion_contrast": float(batch.contrast[i]),
        }


def parsed(text: str) -> Facts | None:
    """The facts of a free text; None for a text that the grammar does not have."""
    try:
        return parse(text)
    except InputError:
        return None


def validated(study: Study, reporter: Reporter, brains: BrainSlices) -> dict[str, Any]:
    """Of the validation's samples at 4x, whether there is a finding (`present`), and its
    probability in each way of reading (`finding`)."""
    ways = {cell.way: cell for cell in cells(few=False)}
    present: list[bool] = []
    finding: dict[str, list[float]] = {way: [] for way in ways}
    for batch in batches(study, brains, 4.0, study.samples, 1):
        with torch.inference_mode():
            tokens, _ = encode(reporter.model, *batch.inputs, mirrored=True)
        for way, cell in ways.items():
            read = tokens if cell.mirrored else tokens[:, 0]
            finding[way] += reporter.findings(read, cell.wording)
        present += [facts.finding for facts in batch.facts]
    return {"present": present, "finding": finding}


def thresholds(validation: dict[str, Any], most: float) -> dict[str, float]:
    """The threshold of each way of reading: an untrained wording is improbable with or without a
    finding, so that its probabilities need a threshold of their own."""
    present = validation["present"]
    return {
        way: best_threshold(present, values, most)["threshold"]
        for way, values in validation["finding"].items()
    }


if __name__ == "__main__":
    script(main)
