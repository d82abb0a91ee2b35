"""What learns in stage 1: a codec's encoder, with aids that are thrown away afterwards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.mri.codec import PATCH, ConvolutionalStem
from nirvana.mri.model import CodecModel
from nirvana.mri.physics import rss
from nirvana.mri.report.grammar import SLOTS, Facts
from nirvana.mri.report.reporter import CHOICES
from nirvana.mri.report.targets import report_entropy
from nirvana.ops.cross_entropy import IGNORE

RARE = -4.0  # logit of a lesion at a place before anything is learned: few places have one
ASKED: dict[str, tuple] = {"finding": (False, True), **{slot: CHOICES[slot] for slot in SLOTS}}
"""What can be said of a slice: fact -> its values."""


class LearnerOutput(NamedTuple):
    """What a `Learner` makes of k-space."""

    image: Tensor  # [B, 2, H, W], combined
    tokens: Tensor  # [B, N, D], of the image
    patch: Tensor  # [B, N], logits of a lesion in each patch
    fine: Tensor | None  # [B, H/4, W/4], in each square of 4 x 4 pixels, where the stem has a map
    facts: Tensor  # [B, C], logits of the values of every fact, those of `ASKED` in their order


class Learner(nn.Module):
    """A codec and, for the training alone, linear units that tell lesions from an image token and,
    where the stem has one, from its map of a quarter of the resolution, and the facts of the slice
    from the mean of its tokens.

    Their gradient reaches the encoder at once, where that of a report's few words must be traced
    back through the backbone.

    Args:
        codec: what learns.
        apart: the reports' gradient ends at the combined image: it is noise to the cascades before
            it, next to what the image's own error tells them.
        kept: nothing learns before that image.
    """

    def __init__(self, codec: CodecModel, apart: bool, kept: bool = False):
        super().__init__()
        self.codec = codec
        self.apart = apart
        self.kept = kept
        width = codec.encoder.projection.out_features
        self.place = nn.Linear(width, 1)
        nn.init.constant_(self.place.bias, RARE)
        self.facts = nn.Linear(width, sum(map(len, ASKED.values())))
        stem = codec.encoder.patches
        if isinstance(stem, ConvolutionalStem):
            self.fine = nn.Conv2d(stem.fine_channels, 1, 1)
            nn.init.constant_(self.fine.bias, RARE)  # type: ignore[arg-type]

    def forward(
        self, kspace: Tensor, mask: Tensor, calibration: Tensor, scale: Tensor
    ) -> LearnerOutput:
        """Arguments as in `ReportBatch`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.kept):
            image = self.codec.see(kspace, mask, calibration, scale).image
        encoder, fine = self.codec.encoder, None
        read = image.detach() if self.apart else image
        if isinstance(encoder.patches, ConvolutionalStem):
            quarter, vectors = encoder.patches.maps(read)
            tokens, fine = encoder.tokens(vectors), self.fine(quarter)[:, 0]
        else:
            tokens = encoder(read)
        facts = self.facts(tokens.mean(1))
        return LearnerOutput(image, tokens, self.place(tokens)[..., 0], fine, facts)


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
        values: Tensor,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments as in `ReportBatch`, and of `fact_values`; ids and labels of `ReportTargets`,
        None without words.

        Returns: the reports' cross-entropy, 0 without words, and those of the aids: of places, of
            facts, and the mean absolute error of the image.
        """
        seen = self.learner(kspace, mask, calibration, scale)
        with torch.autocast(kspace.device.type, enabled=False):
            place = place_loss(seen.patch, seen.fine, coverage)
            facts = facts_entropy(seen.facts, values)
            error = F.l1_loss(rss(seen.image.float()), target / scale[:, None, None])
        if ids is None or labels is None:
            return torch.zeros_like(place), place, facts, error
        logits = self.learner.codec.specialist(seen.tokens, ids).logits
        return report_entropy(logits, labels), place, facts, error


def fact_values(facts: Sequence[Facts], device: torch.device | None = None) -> Tensor:
    """Which value each fact of `ASKED` has, int64 `[B, facts]`: its place among them; `IGNORE` for
    what a normal slice has none of."""
    return torch.tensor(
        [
            [
                IGNORE if getattr(each, name) is None else values.index(getattr(each, name))
                for name, values in ASKED.items()
            ]
            for each in facts
        ],
        device=device,
    )


def by_fact(logits: Tensor) -> dict[str, Tensor]:
    """Logits `[B, C]` of all facts side by side -> fact -> `[B, values]`."""
    parts = logits.float().split([len(each) for each in ASKED.values()], dim=1)
    return dict(zip(ASKED, parts, strict=True))


def facts_entropy(logits: Tensor, values: Tensor) -> Tensor:
    """The mean over facts of the mean cross-entropy where a slice has them: logits `[B, C]` of all
    facts side by side, values of `fact_values`."""
    losses = []
    for part, wanted in zip(by_fact(logits).values(), values.unbind(1), strict=True):
        total = F.cross_entropy(part, wanted, ignore_index=IGNORE, reduction="sum")
        losses.append(total / (wanted != IGNORE).sum().clamp(min=1))
    return torch.stack(losses).mean()


def place_loss(patch: Tensor, fine: Tensor | None, coverage: Tensor) -> Tensor:
    """Cross-entropy of the patches with a lesion, and that and Dice of the finer map; arguments as
    in `LearnerOutput`, coverage as in `ReportBatch`."""
    loss = place_entropy(patch, patches(coverage))
    if fine is not None:
        share = F.avg_pool2d(coverage, 4)
        loss = loss + place_entropy(fine, share) + dice_loss(fine, share)
    return loss


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
