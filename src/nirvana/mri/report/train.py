"""Stage 1: the k-space encoder learns to make a frozen backbone write reports."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.model.backbone import load_backbone, load_tokenizer
from nirvana.mri.codec import PATCH, CodecConfig, ConvolutionalStem
from nirvana.mri.data import choice, micro_batch_generator
from nirvana.mri.graphs import capture_training
from nirvana.mri.lesions import LesionSettings
from nirvana.mri.model import CodecModel
from nirvana.mri.physics import MaskKind, Sampling, rss
from nirvana.mri.report.grammar import WORDINGS
from nirvana.mri.report.heads import Heads, load_heads
from nirvana.mri.report.reporter import READING, Reporter, save_reporter
from nirvana.mri.report.samples import ReportBatch, scanned, undersampled
from nirvana.mri.report.score import auc
from nirvana.mri.report.targets import ReportTargets, report_entropy
from nirvana.mri.simulate import Simulation
from nirvana.train.checkpoint import latest, restore
from nirvana.train.config import OptimConfig, RunConfig, require, to_dict
from nirvana.train.loop import Outcome, fit
from nirvana.train.task import Task
from nirvana.train.world import World, join

RARE = -4.0  # logit of a lesion at a place before anything is learned: few places have one


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
    image_weight: float = 1.0  # of the mean absolute error of the image behind the tokens, from
    # which alone its cascades then learn; 0: they learn from the reports
    start: str = ""  # folder of a run whose encoder this one begins with; their backbones may be
    # of other kinds, of the same width
    valid: list[str] = field(default_factory=list)  # subjects to validate on
    valid_slices: int = 256  # of them

    def __post_init__(self) -> None:
        for name in ("subjects", "masks", "accelerations", "wordings"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "not empty")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        require(self.reuse >= 1, "data.reuse", self.reuse, "at least 1")
        for name in ("words_weight", "place_weight", "image_weight"):
            weight = getattr(self, name)
            require(weight >= 0, f"data.{name}", weight, "at least 0")
        learns = self.words_weight > 0 or self.place_weight > 0
        right = "above 0, or data.place_weight, or nothing is learned of lesions"
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


class Learner(nn.Module):
    """A codec and, for the training alone, linear units that tell lesions from an image token and,
    where the stem has one, from its map of a quarter of the resolution.

    Their gradient reaches every place at once, where that of a report's few words must be traced
    back through the backbone.

    Args:
        codec: what learns.
        apart: the reports' gradient ends at the combined image: it is noise to the cascades before
            it, next to what the image's own error tells them.
    """

    def __init__(self, codec: CodecModel, apart: bool):
        super().__init__()
        self.codec = codec
        self.apart = apart
        self.place = nn.Linear(codec.encoder.projection.out_features, 1)
        nn.init.constant_(self.place.bias, RARE)
        stem = codec.encoder.patches
        if isinstance(stem, ConvolutionalStem):
            self.fine = nn.Conv2d(stem.fine_channels, 1, 1)
            nn.init.constant_(self.fine.bias, RARE)  # type: ignore[arg-type]

    def forward(
        self, kspace: Tensor, mask: Tensor, calibration: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Arguments as in `ReportBatch`.

        Returns: the combined image `[B, 2, H, W]`, its tokens `[B, N, D]`, and the logits of a
            lesion in each patch, `[B, N]`, and in each square of 4 x 4 pixels, `[B, H/4, W/4]`.
        """
        image = self.codec.see(kspace, mask, calibration, scale).image
        encoder, fine = self.codec.encoder, None
        read = image.detach() if self.apart else image
        if isinstance(encoder.patches, ConvolutionalStem):
            quarter, vectors = encoder.patches.maps(read)
            tokens, fine = encoder.tokens(vectors), self.fine(quarter)[:, 0]
        else:
            tokens = encoder(read)
        return image, tokens, self.place(tokens)[..., 0], fine


class Losses(nn.Module):
    """The losses of a batch, of tensors alone: what a CUDA graph can be made of."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner

    def forward(
        self,
        kspace: Tensor,
        mask: Tensor,
        calibration: Tensor,
        scale: Tensor,
        coverage: Tensor,
        target: Tensor,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments as in `ReportBatch`; ids and labels of `ReportTargets`, None without words.

        Returns: the reports' cross-entropy, 0 without words, and the two `aids`.
        """
        image, tokens, patch, fine = self.learner(kspace, mask, calibration, scale)
        place, error = aids(image, patch, fine, coverage, target / scale[:, None, None])
        if ids is None or labels is None:
            return torch.zeros_like(place), place, error
        logits = self.learner.codec.specialist(tokens, ids).logits
        return report_entropy(logits, labels), place, error


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
        self.tokenizer: Any = load_tokenizer(config.codec.weights)
        self.targets = ReportTargets(self.tokenizer)
        apart = config.data.image_weight > 0
        self.learner = Learner(CodecModel(config.codec, backbone), apart).to(device)
        self.model: nn.Module = self.learner
        self.units_per_step = config.data.batch_size * config.optim.accumulation
        self.drawn: tuple[int, list[ReportBatch]] = (-1, [])  # the last draw, and its number
        self._losses_of: dict[int, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The encoder's parameters, the start and end vectors, and the unit of places; what comes
        after the backbone stays as it is."""
        later = ("codec.decoder.", "codec.image_cascades.")
        return (
            (name, p)
            for name, p in self.model.named_parameters()
            if p.requires_grad and not name.startswith(later)
        )

    def prepare(self, world: World, compiled: bool) -> None:
        """Begins with the encoder of another run, if one is given; not with what surrounds its
        tokens, which must be as loud as this backbone's words."""
        super().prepare(world, compiled)
        start = self.config.data.start
        if start:
            found = latest(start)
            if found is None:
                raise InputError(f"data.start = {start!r}: there is no checkpoint")
            around = [p for name, p in self.trainable() if name.startswith("codec.specialist.")]
            own = [p.detach().clone() for p in around]
            try:
                restore(found, self.model, self.trainable())
            except InputError as error:
                raise InputError(f"data.start = {start!r} has another encoder: {error}") from error
            with torch.no_grad():
                for parameter, value in zip(around, own, strict=True):
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
        """Cross-entropy of the report, and the two weighted aids of the encoder."""
        data = self.config.data
        told = self.targets(batch.reports, batch.kspace.device) if data.words_weight else ()
        tensors = (*batch.inputs, batch.coverage, batch.target, *told)
        length = told[0].shape[1] if told else 0  # in tokens
        if length not in self._losses_of:
            self._losses_of[length] = self._losses(tensors)
        words, place, error = self._losses_of[length](*tensors)
        loss = data.words_weight * words + data.place_weight * place + data.image_weight * error
        parts = {"words": words, "place": place, "image": error}
        return loss, {name: x.detach() for name, x in parts.items()}

    def _losses(self, tensors: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """`Losses`; on a GPU as a CUDA graph, for their thousands of kernels take longer to launch
        than to run."""
        losses = Losses(self.learner)
        if tensors[0].is_cuda and self.config.optim.accumulation == 1:
            return capture_training(losses, tensors)
        return losses

    def validate(self) -> dict[str, float]:
        """How well slices with and without a lesion are told apart, by the words and by the most
        suspicious patch: the area under the curve, 0.5 for chance."""
        if self.valid is None:
            return {}
        present: list[bool] = []
        words: list[float] = []
        places: list[float] = []
        reporter = self._reporter()
        data = self.config.data
        size = min(data.batch_size, READING)
        for first in range(0, data.valid_slices, size):
            count = min(size, data.valid_slices - first)
            generator = torch.Generator().manual_seed(first)
            (batch,) = self._batches(self.valid, count, 1, generator, False)
            _, tokens, patch, _ = self.learner(*batch.inputs)
            words += reporter.findings(tokens) if data.words_weight else []
            places += patch.amax(1).tolist()
            present += [facts.finding for facts in batch.facts]
        figures = {"place_auc": auc(places, present)}
        if words:
            figures["finding_auc"] = auc(words, present)
        # Few slices may all be of one kind, and then there is nothing to tell.
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def export(self, folder: Path) -> None:
        """Writes a codec that `load_reporter` reads."""
        save_reporter(self._reporter(), folder, self.config.run.export_dtype)

    def _reporter(self) -> Reporter:
        wording = self.config.data.wordings[0]
        return Reporter(self.learner.codec, self.tokenizer, wording=wording)


def aids(
    image: Tensor, patch: Tensor, fine: Tensor | None, coverage: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses beside the words: of where lesions are, and of the combined image.

    Args:
        image, patch, fine: as `Learner` returns them.
        coverage: as in `ReportBatch`.
        target: `[B, H, W]`, in the units of the image.
    """
    with torch.autocast(image.device.type, enabled=False):
        place = place_entropy(patch, patches(coverage))
        if fine is not None:
            share = F.avg_pool2d(coverage, 4)
            place = place + place_entropy(fine, share) + dice_loss(fine, share)
        return place, F.l1_loss(rss(image.float()), target)


def place_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of places; a lesion takes few of many, and without the weight on those the
    answer would be: nowhere."""
    weight = wanted.new_full((), 5.0)
    return F.binary_cross_entropy_with_logits(logits.float(), wanted, pos_weight=weight)


def dice_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 - Dice of the probabilities and what is wanted, over the whole batch (Milletari et al.,
    arXiv 1606.04797): the empty rest, of which nearly all consists, does not count."""
    likely = logits.float().sigmoid()
    return 1 - (2 * (likely * wanted).sum() + 1) / (likely.sum() + wanted.sum() + 1)


def patches(coverage: Tensor) -> Tensor:
    """Which patches a lesion takes a sixteenth of, or half of a pixel: `[B, H, W]`, sides multiples
    of 16, to 0/1 `[B, N]`, row by row."""
    share = F.avg_pool2d(coverage[:, None], PATCH).flatten(1)
    small = F.max_pool2d(coverage[:, None], PATCH).flatten(1) > 0.5
    return ((share > 1 / 16) | small).float()


def train_reporter(config: ReportConfig, resume: bool = False) -> Outcome:
    """Trains a codec's encoder on reports; see `nirvana.train.language.train`.

    Raises:
        InputError: for whatever is wrong in the configuration, the heads or the run's folder.
    """
    with join(config.run.device) as world:
        torch.manual_seed(config.run.seed)
        task = ReportTask(config, world.device)
        return fit(task, config.optim, config.run, to_dict(config), resume, world)
