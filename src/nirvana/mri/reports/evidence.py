"""Which parts of a slice a reporter's finding rests on."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.mri.model.layout import PATCH
from nirvana.mri.reports.encode import image_tokens
from nirvana.mri.reports.reporter import Reporter

PLACES_AT_ONCE = 8
SPREAD = PATCH / 2  # standard deviation of the weight of a place, pixels
BLUR = 2 * PATCH + 1  # side of the mean that a place is replaced with, pixels
LEAST_WEIGHT = 1e-3  # smaller ones are 0
SMALLEST = 1e-9  # of a probability, so that its log-odds are finite


@torch.inference_mode()
def evidence_map(
    reporter: Reporter, image: Tensor, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """What each place of a slice adds to the log-odds of a finding (occlusion; Zeiler and Fergus,
    arXiv 1311.2901).

    One place after the other fades, with a Gaussian weight, into a blurred copy of the slice, which
    has no focal lesion. The map is

        log-odds of a finding in the slice - log-odds with the place faded

    in nats: positive where the place is evidence of a finding, zero where the slice is empty. It
    describes the reporter, not the patient.

    Args:
        reporter: whose evidence is mapped.
        image: `[2, H, W]`, of `ScanReport.combined`, sides multiples of `PATCH`.
        progress: called with the number of places just done.

    Returns:
        float64 `[H / PATCH, W / PATCH]`, a place for each patch.
    """
    model = reporter.model
    image = image.to(model.device)
    blurred = F.avg_pool2d(image, BLUR, 1, BLUR // 2, count_include_pad=False)
    weights = _weights(image.shape[-2], image.shape[-1]).to(image)
    empty = ((image * weights[:, None]).abs().amax((1, 2, 3)) == 0).cpu().numpy()

    def log_odds(images: Tensor) -> np.ndarray:
        p = reporter.findings(image_tokens(model, images, reporter.mirrored))
        p = np.clip(np.array(p), SMALLEST, 1 - SMALLEST)
        return np.log(p) - np.log1p(-p)

    whole, found = log_odds(image[None]), np.zeros(len(weights))
    for first in range(0, len(weights), PLACES_AT_ONCE):
        places = np.arange(first, min(first + PLACES_AT_ONCE, len(weights)))
        shown = places[~empty[places]]
        if len(shown):
            weight = weights[shown][:, None]
            found[shown] = whole - log_odds(image + weight * (blurred - image))
        if progress is not None:
            progress(len(places))
    return found.reshape(image.shape[-2] // PATCH, -1)


def _weights(height: int, width: int) -> Tensor:
    """`[places, H, W]`, the weight of each patch's place, 1 in its middle."""
    rows, columns = (
        torch.exp(-0.5 * ((torch.arange(n) - middle) / SPREAD) ** 2)
        for n, middle in (
            (n, torch.arange(n // PATCH)[:, None] * PATCH + (PATCH - 1) / 2)
            for n in (height, width)
        )
    )
    weights = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1)
    return weights.where(weights > LEAST_WEIGHT, 0)
