"""Auxiliary heads and losses that train an encoder on reports; they are discarded afterwards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.layout import PATCH
from nirvana.mri.model.report_tokens import report_entropy
from nirvana.mri.model.vit import ConvolutionalStem
from nirvana.mri.physics.fourier import rss
from nirvana.mri.reports.grammar import SLOTS, Facts
from nirvana.mri.reports.reporter import CHOICES
from nirvana.ops.cross_entropy import IGNORE

PRIOR_LOGIT = -4.0  # initial logit of a lesion at a place: few places have one
FACT_CLASSES: dict[str, tuple] = {
    "finding": (False, True),
    **{slot: CHOICES[slot] for slot in SLOTS},
}
"""Fact -> its possible values, in the order of the logits."""


class AuxiliaryOutput(NamedTuple):
    """The outputs of `AuxiliaryHeads`."""

    image: Tensor  # [B, 2, H, W], combined
    tokens: Tensor  # [B, N, D], of the image
    patch: Tensor  # [B, N], logits of a lesion in each patch
    fine: Tensor | None  # [B, H/4, W/4], of one in each 4 x 4 pixels; None without a fine map
    facts: Tensor  # [B, C], logits of the values of all facts, see `FACT_CLASSES`


class AuxiliaryHeads(nn.Module):
    """A codec with linear heads on its encoder, for the training alone: lesions from each image
    token and from each vector of the stem's map of a quarter of the resolution, and the slice's
    facts from the mean of the tokens.

    Their gradient reaches the encoder directly, while that of a report passes the whole backbone.

    Args:
        codec: the model to train.
        detach_image: the gradient of reports and heads ends at the combined image. To the cascades
            before it that gradient is noise beside the gradient of the image's own error.
        freeze_frontend: nothing before the combined image is trained.
    """

    def __init__(self, codec: CodecModel, detach_image: bool, freeze_frontend: bool = False):
        super().__init__()
        self.codec = codec
        self.detach_image = detach_image
        self.freeze_frontend = freeze_frontend
        width = codec.encoder.projection.out_features
        self.place = nn.Linear(width, 1)
        nn.init.constant_(self.place.bias, PRIOR_LOGIT)
        self.facts = nn.Linear(width, sum(map(len, FACT_CLASSES.values())))
        stem = codec.encoder.patches
        if isinstance(stem, ConvolutionalStem):
            self.fine = nn.Conv2d(stem.fine_channels, 1, 1)
            nn.init.constant_(self.fine.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(
        self, kspace: Tensor, mask: Tensor, calibration: Tensor, scale: Tensor
    ) -> AuxiliaryOutput:
        """Arguments as of `CodecModel.forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_frontend):
            image = self.codec.encode_kspace(kspace, mask, calibration, scale).image
        encoder, fine = self.codec.encoder, None
        read = image.detach() if self.detach_image else image
        if isinstance(encoder.patches, ConvolutionalStem):
            quarter, vectors = encoder.patches.maps(read)
            tokens, fine = encoder.tokens(vectors), self.fine(quarter)[:, 0]
        else:
            tokens = encoder(read)
        facts = self.facts(tokens.mean(1))
        return AuxiliaryOutput(image, tokens, self.place(tokens)[..., 0], fine, facts)


class ReportLosses(nn.Module):
    """The losses of a batch as a function of tensors alone, which a CUDA graph can capture."""

    def __init__(self, heads: AuxiliaryHeads):
        super().__init__()
        self.heads = heads

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
        """The report's loss and the auxiliary losses.

        Args:
            kspace: this and the next five as in `ReportBatch`.
            mask: see above.
            calibration: see above.
            scale: see above.
            coverage: see above.
            target: see above.
            values: int64 `[B, facts]`, of `fact_values`.
            ids: int64 `[B, M]`, of `ReportTokens`; None without reports.
            labels: int64 `[B, M]`, likewise.

        Returns:
            Four scalars: the reports' cross-entropy in nats, 0 without reports; the loss of the
            lesion maps; the cross-entropy of the facts; the mean absolute error of the image.
        """
        found = self.heads(kspace, mask, calibration, scale)
        with torch.autocast(kspace.device.type, enabled=False):
            place = lesion_map_loss(found.patch, found.fine, coverage)
            facts = facts_entropy(found.facts, values)
            error = F.l1_loss(rss(found.image.float()), target / scale[:, None, None])
        if ids is None or labels is None:
            return torch.zeros_like(place), place, facts, error
        logits = self.heads.codec.specialist(found.tokens, ids).logits
        return report_entropy(logits, labels), place, facts, error


def fact_values(facts: Sequence[Facts], device: torch.device | None = None) -> Tensor:
    """The classes of the facts, int64 `[B, facts]`: the index of each value in `FACT_CLASSES`;
    `IGNORE` for the facts that a normal slice lacks."""
    return torch.tensor(
        [
            [
                IGNORE if getattr(each, name) is None else values.index(getattr(each, name))
                for name, values in FACT_CLASSES.items()
            ]
            for each in facts
        ],
        device=device,
    )


def by_fact(logits: Tensor) -> dict[str, Tensor]:
    """Fact -> logits `[B, values]`, of the logits `[B, C]` of all facts side by side."""
    parts = logits.float().split([len(each) for each in FACT_CLASSES.values()], dim=1)
    return dict(zip(FACT_CLASSES, parts, strict=True))


def facts_entropy(logits: Tensor, values: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over the slices that have a fact and then over the facts.

    Args:
        logits: `[B, C]`, of all facts side by side.
        values: int64 `[B, facts]`, of `fact_values`.
    """
    losses = []
    for part, wanted in zip(by_fact(logits).values(), values.unbind(1), strict=True):
        total = F.cross_entropy(part, wanted, ignore_index=IGNORE, reduction="sum")
        losses.append(total / (wanted != IGNORE).sum().clamp(min=1))
    return torch.stack(losses).mean()


def lesion_map_loss(patch: Tensor, fine: Tensor | None, coverage: Tensor) -> Tensor:
    """Cross-entropy of the patches with a lesion, plus cross-entropy and Dice of the finer map.

    Args:
        patch: `[B, N]`, of `AuxiliaryOutput`.
        fine: `[B, H/4, W/4]` or None, likewise.
        coverage: `[B, H, W]`, of `ReportBatch`.
    """
    loss = weighted_entropy(patch, lesion_patches(coverage))
    if fine is not None:
        share = F.avg_pool2d(coverage, 4)
        loss = loss + weighted_entropy(fine, share) + dice_loss(fine, share)
    return loss


def weighted_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy with a weight of 5 on lesions: they take few places, and unweighted the
    best constant answer is none."""
    weight = wanted.new_full((), 5.0)
    return F.binary_cross_entropy_with_logits(logits.float(), wanted, pos_weight=weight)


def dice_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 - Dice of the probabilities and the wanted shares over the whole batch (Milletari et al.,
    arXiv 1606.04797), to which the many empty places contribute nothing."""
    likely = logits.float().sigmoid()
    return 1 - (2 * (likely * wanted).sum() + 1) / (likely.sum() + wanted.sum() + 1)


def lesion_patches(coverage: Tensor) -> Tensor:
    """The patches with a lesion on more than 1/16 of their area or more than half of one pixel.

    Args:
        coverage: `[B, H, W]`, sides multiples of 16.

    Returns:
        0 or 1, float32 `[B, N]`, row by row.
    """
    share = F.avg_pool2d(coverage[:, None], PATCH).flatten(1)
    small = F.max_pool2d(coverage[:, None], PATCH).flatten(1) > 0.5
    return ((share > 1 / 16) | small).float()
