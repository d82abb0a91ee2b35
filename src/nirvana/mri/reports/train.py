"""Stage 1 of a reporter: trains a codec's encoder until a frozen backbone writes the reports of
simulated lesions."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.config import require
from nirvana.cuda_graphs import TrainingGraphs
from nirvana.data.tokenizer import load_tokenizer
from nirvana.errors import InputError
from nirvana.model.backbone import backbone_folder, load_backbone
from nirvana.mri.anatomy.brain_slices import BrainSlices, load_brain_slices
from nirvana.mri.anatomy.lesions import LesionSettings
from nirvana.mri.anatomy.lobes import SIDES
from nirvana.mri.data.batch import choice, micro_batch_generator
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.model.checkpoint import read_weights
from nirvana.mri.model.codec import CodecModel, in_encoder
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.report_tokens import ReportTokens
from nirvana.mri.physics.masks import MaskKind, Sampling
from nirvana.mri.reports.auxiliary import AuxiliaryHeads, ReportLosses, by_fact, fact_values
from nirvana.mri.reports.grammar import WORDINGS
from nirvana.mri.reports.reporter import MAX_SLICES_AT_ONCE, Reporter, save_reporter
from nirvana.mri.reports.samples import ReportBatch, simulate_report_batch, undersample_alike
from nirvana.mri.reports.score import auc
from nirvana.packaged import resolve
from nirvana.train.checkpoint import latest, restore
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.loop import Outcome, check_run, fit_configured
from nirvana.train.task import Task

CODEC = "codec."  # prefix of the codec's parameters among those of `AuxiliaryHeads`
ADAPTER = "codec.specialist."  # parameters between tokens and backbone
CASCADES = "codec.encoder_cascades."
# parameters before the combined image
FRONTEND = ("codec.sensitivities.", "codec.conditioning.", CASCADES)


@dataclass(frozen=True)
class ReportSection:
    """[data]: brain slices, and how they are scanned and described."""

    brain_slices: str  # file that `brain_slices.save_brain_slices` wrote
    subjects: list[str]  # whose slices are used
    batch_size: int = 64  # slices in a micro batch
    coils: int = 4  # number of receive coils
    masks: list[MaskKind] = field(default_factory=lambda: ["equispaced", "random"])
    accelerations: list[float] = field(default_factory=lambda: [1.0, 4.0, 8.0])
    center_fractions: list[float] = field(default_factory=lambda: [0.08, 0.08, 0.04])
    wordings: list[int] = field(default_factory=lambda: [0, 1, 2, 3])  # of `grammar.WORDINGS`
    reuse: int = 1  # micro batches cut from one draw of slices, each with a mask of its own
    report_weight: float = 1.0  # of the reports' cross-entropy; 0 trains the encoder without text
    place_weight: float = 1.0  # of the loss of the lesion maps, predicted from the image tokens
    facts_weight: float = 1.0  # of the cross-entropy of the facts, predicted from the tokens' mean
    # of the mean absolute error of the combined image, by which alone its cascades are then
    # trained; 0 trains them by the reports
    image_weight: float = 1.0
    freeze_frontend: bool = False  # trains nothing before the combined image; steps are faster
    valid: list[str] = field(default_factory=list)  # subjects to validate on
    valid_slices: int = 256  # of them

    def __post_init__(self) -> None:
        for name in ("subjects", "masks", "accelerations", "wordings"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "not empty")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        require(self.reuse >= 1, "data.reuse", self.reuse, "at least 1")
        for name in ("report_weight", "place_weight", "facts_weight", "image_weight"):
            weight = getattr(self, name)
            require(weight >= 0, f"data.{name}", weight, "at least 0")
        learns = self.report_weight > 0 or self.place_weight > 0 or self.facts_weight > 0
        right = "above 0, or data.place_weight or facts_weight, or nothing is learned of lesions"
        require(learns, "data.report_weight", self.report_weight, right)
        right = f"numbers from 0 to {len(WORDINGS) - 1}"
        known = all(0 <= wording < len(WORDINGS) for wording in self.wordings)
        require(known, "data.wordings", self.wordings, right)
        require(self.valid_slices >= 1, "data.valid_slices", self.valid_slices, "at least 1")
        fractions = self.center_fractions
        right = "as many numbers as data.accelerations"
        fits = len(fractions) == len(self.accelerations)
        require(fits, "data.center_fractions", fractions, right)


@dataclass(frozen=True)
class ReportConfig:
    """All of a reporter's training."""

    data: ReportSection
    run: RunConfig
    codec: CodecConfig = field(default_factory=CodecConfig)
    simulation: Simulation = field(default_factory=lambda: Simulation(noise=(0.002, 0.01)))
    lesions: LesionSettings = field(default_factory=LesionSettings)
    optim: OptimConfig = field(default_factory=OptimConfig)


class ReportTask(Task):
    """Undersampled k-space to a report: cross-entropy of its tokens, and auxiliary losses.

    Args:
        config: of the whole run.
        device: where the model lies and scans are simulated.

    Raises:
        InputError: the brain slices cannot be read, or the codec has no backbone.
    """

    unit = "slices"

    def __init__(self, config: ReportConfig, device: torch.device):
        self.config = config
        slices, valid = load_brain_slices(config.data.brain_slices), config.data.valid
        self.slices = slices.of_subjects(config.data.subjects).to(device)
        self.valid = slices.of_subjects(valid).to(device) if valid else None
        backbone = load_backbone(config.codec.backbone, config.codec.weights)
        if backbone is None:
            raise InputError("codec.backbone = 'none' has no words; reports need a language model")
        self.tokenizer: Any = load_tokenizer(backbone_folder(config.codec.weights), required=())
        self.tokens_and_labels = ReportTokens(self.tokenizer)
        detach_image = config.data.image_weight > 0
        codec = CodecModel(config.codec, backbone)
        self.heads = AuxiliaryHeads(codec, detach_image, config.data.freeze_frontend).to(device)
        self.model: nn.Module = self.heads
        losses = ReportLosses(self.heads)
        # A backward of the graph overwrites the gradients that accumulation would sum.
        graphed = device.type == "cuda" and config.optim.accumulation == 1
        self._losses: Callable[..., tuple[Tensor, ...]] = (
            TrainingGraphs(losses) if graphed else losses
        )
        self.units_per_step = config.data.batch_size * config.optim.accumulation
        self.drawn: tuple[int, list[ReportBatch]] = (-1, [])  # number of the last draw, its batches

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters of the encoder, of the start and end vectors and of the auxiliary heads;
        without those before the combined image if they are frozen."""
        if not self.config.data.freeze_frontend:
            return self._encoder()
        return ((name, p) for name, p in self._encoder() if not name.startswith(FRONTEND))

    def _encoder(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters but the backbone's and those after it."""
        return (
            (name, p)
            for name, p in self.model.named_parameters()
            if p.requires_grad
            and (not name.startswith(CODEC) or in_encoder(name.removeprefix(CODEC)))
        )

    def initialize(self, initial: str) -> None:
        """Starts from another encoder: the folder of a run, whose backbone may be of another kind
        and the same width, or a codec that was trained on reports ("reporter" is the packaged one).

        The parameters between tokens and backbone, which are scaled to this backbone's embeddings,
        are kept. See `Task.initialize`.
        """
        checkpoint = latest(initial)
        if checkpoint is None:
            return self._start_from_codec(initial)
        adapter = [p for name, p in self._encoder() if name.startswith(ADAPTER)]
        own = [p.detach().clone() for p in adapter]
        try:
            restore(checkpoint, self.model, self._encoder())
        except InputError as error:
            raise InputError(f"run.initial = {initial!r} has another encoder: {error}") from error
        with torch.no_grad():
            for parameter, value in zip(adapter, own, strict=True):
                parameter.copy_(value)

    def _start_from_codec(self, initial: str) -> None:
        """Takes the encoder of a saved codec. The auxiliary heads start anew, and so do cascades
        beyond those of the saved codec, which initially only restore the measured columns."""
        where = f"run.initial = {initial!r}"
        try:
            saved = read_weights(resolve(initial, "MRI reporter"))
        except InputError as error:
            raise InputError(f"{where}: there is no checkpoint, and {error}") from error
        known = {name.split(".")[1] for name in saved if name.startswith("encoder_cascades.")}
        with torch.no_grad():
            for name, parameter in self._encoder():
                if not name.startswith(CODEC) or name.startswith(ADAPTER):
                    continue
                new = name.startswith(CASCADES) and name.split(".")[2] not in known
                if new and not self.config.data.freeze_frontend:
                    continue
                value = saved.get(name.removeprefix(CODEC))
                if value is None or value.shape != parameter.shape:
                    raise InputError(f"{where} has another encoder: {name} does not fit")
                parameter.copy_(value)

    def batch(self, step: int, micro: int) -> ReportBatch:
        """Slices scanned and described, a function of the seed, the step and the micro batch."""
        data, accumulation = self.config.data, self.config.optim.accumulation
        number, part = divmod(step * accumulation + micro, data.reuse)
        if number != self.drawn[0]:
            generator = micro_batch_generator(self.config.run.seed, number)
            sizes = (data.batch_size, data.reuse)
            self.drawn = number, list(self._batches(self.slices, *sizes, generator))
        return self.drawn[1][part]

    def _batches(
        self,
        slices: BrainSlices,
        count: int,
        parts: int,
        generator: torch.Generator,
        vary: bool = True,
    ) -> Iterator[ReportBatch]:
        """`parts` batches of `count` slices from one draw, whose many small kernels are launched
        once for all of them."""
        data, config = self.config.data, self.config
        whole = simulate_report_batch(
            slices,
            count * parts,
            generator,
            config.simulation,
            data.coils,
            config.lesions,
            data.wordings,
            vary,
        )
        pairs = list(zip(data.accelerations, data.center_fractions, strict=True))
        for part in whole.split(count):
            acceleration, fraction = choice(pairs, generator)
            sampling = Sampling(choice(data.masks, generator), acceleration, fraction)
            yield undersample_alike(part, sampling, generator)

    def loss(self, batch: ReportBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the report's cross-entropy and the auxiliary losses."""
        data, device = self.config.data, batch.kspace.device
        text = self.tokens_and_labels(batch.reports, device) if data.report_weight else ()
        values = fact_values(batch.facts, device)
        losses = self._losses(*batch.inputs, batch.coverage, batch.target, values, *text)
        weights = (data.report_weight, data.place_weight, data.facts_weight, data.image_weight)
        loss = torch.stack([w * x for w, x in zip(weights, losses, strict=True)]).sum()
        names = ("report_nats", "place", "facts", "image")
        return loss, {name: x.detach() for name, x in zip(names, losses, strict=True)}

    def validate(self) -> dict[str, float]:
        """How well slices with and without a lesion are separated by the report, by the most
        suspicious patch and by the facts' head (areas under the curve, 0.5 for chance), and the
        share of right sides of the facts' head where there is a finding."""
        if self.valid is None:
            return {}
        present: list[bool] = []
        right: list[bool] = []
        scores: dict[str, list[float]] = {"report": [], "place": [], "facts": []}
        reporter = self._reporter()
        data = self.config.data
        size = min(data.batch_size, MAX_SLICES_AT_ONCE)
        for first in range(0, data.valid_slices, size):
            count = min(size, data.valid_slices - first)
            generator = torch.Generator().manual_seed(first)
            (batch,) = self._batches(self.valid, count, 1, generator, False)
            found = self.heads(*batch.inputs)
            facts = by_fact(found.facts)
            scores["report"] += reporter.findings(found.tokens) if data.report_weight else []
            scores["place"] += found.patch.amax(1).tolist()
            scores["facts"] += facts["finding"].diff(dim=1)[:, 0].tolist()
            present += [each.finding for each in batch.facts]
            sides = facts["side"].argmax(1).tolist()
            pairs = zip(batch.facts, sides, strict=True)
            right += [each.side == SIDES[side] for each, side in pairs if each.finding]
        figures = {f"{name}_auc": auc(x, present) for name, x in scores.items() if x}
        # With few slices all may be of one kind, and areas or sides are then undefined.
        figures["facts_side"] = sum(right) / len(right) if right else math.nan
        return figures

    def export(self, folder: Path) -> None:
        """Writes a codec that `load_reporter` reads."""
        save_reporter(self._reporter(), folder, self.config.run.export_dtype)

    def _reporter(self) -> Reporter:
        wording = self.config.data.wordings[0]
        return Reporter(self.heads.codec, self.tokenizer, wording=wording)


def train_reporter(config: ReportConfig, resume: bool = False) -> Outcome:
    """Trains a codec's encoder on reports; see `nirvana.train.loop.fit`.

    Args:
        config: of the whole run.
        resume: continue the run in `config.run.out`.

    Raises:
        InputError: the configuration, the brain slices or the run's folder is wrong.
    """
    read = [config.data.brain_slices, config.run.initial or None, config.codec.weights]
    check_run(config.run.out, None, read)
    return fit_configured(config, ReportTask, resume)
