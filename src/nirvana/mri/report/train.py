"""Stage 1: the k-space encoder learns to make a frozen backbone write reports."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.config import require, to_dict
from nirvana.data.tokenizer import load_tokenizer
from nirvana.errors import InputError
from nirvana.model.assets import resolve
from nirvana.model.backbone import backbone_folder, load_backbone
from nirvana.mri.codec import CodecConfig
from nirvana.mri.data import choice, micro_batch_generator
from nirvana.mri.graphs import capture_training
from nirvana.mri.lesions import LesionSettings
from nirvana.mri.lobes import SIDES
from nirvana.mri.model import CodecModel, read_weights
from nirvana.mri.physics import MaskKind, Sampling
from nirvana.mri.report.grammar import WORDINGS
from nirvana.mri.report.heads import Heads, load_heads
from nirvana.mri.report.learner import Learner, Losses, by_fact, fact_values
from nirvana.mri.report.reporter import READING, Reporter, save_reporter
from nirvana.mri.report.samples import ReportBatch, scanned, undersampled
from nirvana.mri.report.score import auc
from nirvana.mri.report.targets import ReportTargets
from nirvana.mri.simulate import Simulation
from nirvana.train.checkpoint import latest, restore
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import ProcessContext, init_distributed
from nirvana.train.loop import Outcome, check_run, fit
from nirvana.train.task import Task

AROUND = "codec.specialist."  # parameters around the tokens
CASCADES = "codec.encoder_cascades."


@dataclass(frozen=True)
class ReportSection:
    """[data]: slices of heads, and how they are scanned and described."""

    heads: str  # file that `heads.save_heads` wrote
    subjects: list[str]  # whose slices are used
    batch_size: int = 64  # slices in a micro batch
    coils: int = 4  # number of receive coils
    masks: list[MaskKind] = field(default_factory=lambda: ["equispaced", "random"])
    accelerations: list[float] = field(default_factory=lambda: [1.0, 4.0, 8.0])
    center_fractions: list[float] = field(default_factory=lambda: [0.08, 0.08, 0.04])
    wordings: list[int] = field(default_factory=lambda: [0, 1, 2, 3])  # of `grammar.WORDINGS`
    reuse: int = 1  # micro batches that are cut from one draw of slices, each with its own mask
    words_weight: float = 1.0  # of the reports' cross-entropy; 0: the encoder only learns to see
    place_weight: float = 1.0  # of a loss on where lesions are, asked of the image tokens alone
    facts_weight: float = 1.0  # of the cross-entropy of the facts, asked of the tokens' mean
    image_weight: float = 1.0  # of the mean absolute error of the image behind the tokens, from
    # which alone its cascades then learn; 0: they learn from the reports
    keep_image: bool = False  # what is before that image stays as it is, and a step takes less time
    start: str = ""  # what this run begins with: the folder of another one, whose backbone may be
    # of another kind, of the same width; or a codec that learned reports, "reporter" the packaged
    valid: list[str] = field(default_factory=list)  # subjects to validate on
    valid_slices: int = 256  # of them

    def __post_init__(self) -> None:
        for name in ("subjects", "masks", "accelerations", "wordings"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "not empty")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        require(self.reuse >= 1, "data.reuse", self.reuse, "at least 1")
        for name in ("words_weight", "place_weight", "facts_weight", "image_weight"):
            weight = getattr(self, name)
            require(weight >= 0, f"data.{name}", weight, "at least 0")
        learns = self.words_weight > 0 or self.place_weight > 0 or self.facts_weight > 0
        right = "above 0, or data.place_weight or facts_weight, or nothing is learned of lesions"
        require(learns, "data.words_weight", self.words_weight, right)
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
    """Undersampled k-space to a report, cross-entropy of its tokens.

    Args:
        config: of the whole run.
        device: where the model lies and scans are simulated.

    Raises:
        InputError: for heads that cannot be read or a codec without a backbone.
    """

    unit = "slices"

    def __init__(self, config: ReportConfig, device: torch.device):
        self.config = config
        heads, valid = load_heads(config.data.heads), config.data.valid
        self.heads = heads.of_subjects(config.data.subjects).to(device)
        self.valid = heads.of_subjects(valid).to(device) if valid else None
        backbone = load_backbone(config.codec.backbone, config.codec.weights)
        if backbone is None:
            raise InputError("codec.backbone = 'none' has no words; reports need a language model")
        self.tokenizer: Any = load_tokenizer(backbone_folder(config.codec.weights), required=())
        self.targets = ReportTargets(self.tokenizer)
        apart, kept = config.data.image_weight > 0, config.data.keep_image
        self.learner = Learner(CodecModel(config.codec, backbone), apart, kept).to(device)
        self.model: nn.Module = self.learner
        self.units_per_step = config.data.batch_size * config.optim.accumulation
        self.drawn: tuple[int, list[ReportBatch]] = (-1, [])  # the last draw, and its number
        self._losses_of: dict[int, Callable[..., tuple[Tensor, ...]]] = {}

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The encoder's parameters, the start and end vectors, and the units of the aids; what
        comes before the combined image unless it is kept."""
        kept = ("codec.sensitivities.", CASCADES)
        learning = self._encoding()
        if not self.config.data.keep_image:
            return learning
        return ((name, p) for name, p in learning if not name.startswith(kept))

    def _encoding(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All but what comes after the backbone, and that itself."""
        later = ("codec.decoder.", "codec.image_cascades.")
        return (
            (name, p)
            for name, p in self.model.named_parameters()
            if p.requires_grad and not name.startswith(later)
        )

    def prepare(self, world: ProcessContext, compiled: bool) -> None:
        """Begins with another encoder, if one is given; not with what surrounds its tokens, which
        must be as loud as this backbone's words."""
        super().prepare(world, compiled)
        start = self.config.data.start
        if not start:
            return
        found = latest(start)
        if found is None:
            return self._begin_with(start)
        around = [p for name, p in self._encoding() if name.startswith(AROUND)]
        own = [p.detach().clone() for p in around]
        try:
            restore(found, self.model, self._encoding())
        except InputError as error:
            raise InputError(f"data.start = {start!r} has another encoder: {error}") from error
        with torch.no_grad():
            for parameter, value in zip(around, own, strict=True):
                parameter.copy_(value)

    def _begin_with(self, start: str) -> None:
        """Takes the encoder of a codec; the units of the aids begin anew, and so do the cascades
        after its own, which at first only put back what was measured."""
        where = f"data.start = {start!r}"
        try:
            saved = read_weights(resolve(start, "MRI reporter"))
        except InputError as error:
            raise InputError(f"{where}: there is no checkpoint, and {error}") from error
        known = {name.split(".")[1] for name in saved if name.startswith("encoder_cascades.")}
        with torch.no_grad():
            for name, parameter in self._encoding():
                if not name.startswith("codec.") or name.startswith(AROUND):
                    continue
                new = name.startswith(CASCADES) and name.split(".")[2] not in known
                if new and not self.config.data.keep_image:
                    continue
                value = saved.get(name.removeprefix("codec."))
                if value is None or value.shape != parameter.shape:
                    raise InputError(f"{where} has another encoder: {name} does not fit")
                parameter.copy_(value)

    def batch(self, step: int, micro: int) -> ReportBatch:
        """Slices scanned and described as seed, step and micro batch say."""
        data, accumulation = self.config.data, self.config.optim.accumulation
        number, part = divmod(step * accumulation + micro, data.reuse)
        if number != self.drawn[0]:
            generator = micro_batch_generator(self.config.run.seed, number)
            sizes = (data.batch_size, data.reuse)
            self.drawn = number, list(self._batches(self.heads, *sizes, generator))
        return self.drawn[1][part]

    def _batches(
        self, heads: Heads, count: int, parts: int, generator: torch.Generator, vary: bool = True
    ) -> Iterator[ReportBatch]:
        """`parts` batches of one draw: many small kernels are launched once for all of them."""
        data, config = self.config.data, self.config
        whole = scanned(
            heads,
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
            yield undersampled(part, sampling, generator)

    def loss(self, batch: ReportBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the report, and the weighted aids of the encoder."""
        data, device = self.config.data, batch.kspace.device
        told = self.targets(batch.reports, device) if data.words_weight else ()
        values = fact_values(batch.facts, device)
        tensors = (*batch.inputs, batch.coverage, batch.target, values, *told)
        length = told[0].shape[1] if told else 0  # in tokens
        if length not in self._losses_of:
            self._losses_of[length] = self._losses(tensors)
        losses = self._losses_of[length](*tensors)
        parts = dict(zip(("words", "place", "facts", "image"), losses, strict=True))
        weighted = [getattr(data, f"{name}_weight") * x for name, x in parts.items()]
        loss = torch.stack(weighted).sum()
        return loss, {name: x.detach() for name, x in parts.items()}

    def _losses(self, tensors: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        """`Losses`; on a GPU as a CUDA graph, for their thousands of kernels take longer to launch
        than to run."""
        losses = Losses(self.learner)
        if tensors[0].is_cuda and self.config.optim.accumulation == 1:
            return capture_training(losses, tensors)
        return losses

    def validate(self) -> dict[str, float]:
        """How well slices with and without a lesion are told apart, by the words, by the most
        suspicious patch and by the fact asked of the tokens' mean (area under the curve, 0.5 for
        chance), and the share of right sides that the latter says where there is a finding."""
        if self.valid is None:
            return {}
        present: list[bool] = []
        right: list[bool] = []
        scores: dict[str, list[float]] = {"words": [], "place": [], "facts": []}
        reporter = self._reporter()
        data = self.config.data
        size = min(data.batch_size, READING)
        for first in range(0, data.valid_slices, size):
            count = min(size, data.valid_slices - first)
            generator = torch.Generator().manual_seed(first)
            (batch,) = self._batches(self.valid, count, 1, generator, False)
            seen = self.learner(*batch.inputs)
            facts = by_fact(seen.facts)
            scores["words"] += reporter.findings(seen.tokens) if data.words_weight else []
            scores["place"] += seen.patch.amax(1).tolist()
            scores["facts"] += facts["finding"].diff(dim=1)[:, 0].tolist()
            present += [each.finding for each in batch.facts]
            said = facts["side"].argmax(1).tolist()
            pairs = zip(batch.facts, said, strict=True)
            right += [each.side == SIDES[side] for each, side in pairs if each.finding]
        figures = {f"{name}_auc": auc(x, present) for name, x in scores.items() if x}
        figures["facts_side"] = sum(right) / len(right) if right else math.nan
        # Few slices may all be of one kind, and then there is nothing to tell.
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def export(self, folder: Path) -> None:
        """Writes a codec that `load_reporter` reads."""
        save_reporter(self._reporter(), folder, self.config.run.export_dtype)

    def _reporter(self) -> Reporter:
        wording = self.config.data.wordings[0]
        return Reporter(self.learner.codec, self.tokenizer, wording=wording)


def train_reporter(config: ReportConfig, resume: bool = False) -> Outcome:
    """Trains a codec's encoder on reports; see `nirvana.train.language.train`.

    Raises:
        InputError: for whatever is wrong in the configuration, the heads or the run's folder.
    """
    read = [config.data.heads, config.data.start or None, config.codec.weights]
    check_run(config.run.out, None, read)
    with init_distributed(config.run.device) as world:
        torch.manual_seed(config.run.seed)
        task = ReportTask(config, world.device)
        return fit(task, config.optim, config.run, to_dict(config), resume, world)
