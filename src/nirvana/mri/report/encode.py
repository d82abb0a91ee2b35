"""From a scan to image tokens: the codec's k-space encoder, on the grid of the reports.

Reports need what k-space alone does not tell: how large a pixel is, and which way the patient lay.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.codec import crop
from nirvana.mri.io import Scan
from nirvana.mri.io.geometry import spacing_of
from nirvana.mri.model import CodecModel, volume_scale
from nirvana.mri.physics import calibration_columns, rss
from nirvana.mri.report.heads import GRID, PIXEL
from nirvana.mri.report.reporter import Reporter


@dataclass(frozen=True)
class View:
    """How a scan's images become pictures in radiological convention.

    Attributes:
        spacing: of slices, rows and columns in mm.
        flip_rows, flip_columns: whether the first row is at the back, the first column on the
            patient's left.
        known: whether the scan itself tells where the patient lay; otherwise it is taken for
            granted that the images stand as pictures do.
    """

    spacing: tuple[float, float, float]
    flip_rows: bool = False
    flip_columns: bool = False
    known: bool = True


def view_of(scan: Scan) -> View:
    """The view of a scan, by its affine or, without one, its spacing.

    Raises:
        InputError: for a scan without either, or one whose slices are not axial.
    """
    if scan.affine is None:
        if scan.spacing is None:
            raise InputError(
                f"{scan.name}: the size of its pixels is unknown, and sizes in mm need it; give a "
                "NIfTI volume or a scan with a header"
            )
        return View(scan.spacing, known=False)
    directions = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    slices, rows, columns = directions.T
    if min(abs(slices[2]), abs(rows[1]), abs(columns[0])) < 0.7 or slices[2] < 0:
        raise InputError(
            f"{scan.name}: its slices are not axial from bottom to top; reports are of axial slices"
        )
    return View(spacing_of(scan.affine), bool(rows[1] > 0), bool(columns[0] > 0))


def encode(
    model: CodecModel,
    kspace: Tensor,
    mask: Tensor,
    calibration: Tensor,
    scale: Tensor,
    view: View | None = None,
    mirrored: bool = False,
) -> tuple[Tensor, Tensor]:
    """The codec's k-space encoder: arguments as of `CodecModel.forward`.

    Args:
        view: brings the combined image to `GRID` and the reports' pixel before tokens are made of
            it; None leaves it, padded to patches.
        mirrored: makes tokens of the mirror image, too, left for right.

    Returns: tokens `[B, N, D]`, or with the mirror image's `[B, 2, N, D]`, as `Reporter.read` takes
        them; and the combined image that they are of, `[B, 2, H', W']`.
    """
    seen = model.see(kspace, mask, calibration, scale)
    image = seen.image if view is None else to_grid(crop(seen.image, seen.padding), view)
    if not mirrored:
        return model.encoder(image), image
    both = torch.stack([image, image.flip(-1)], dim=1)
    return model.encoder(both.flatten(0, 1)).unflatten(0, (-1, 2)), image


def to_grid(image: Tensor, view: View) -> Tensor:
    """Images `[B, 2, H, W]` turned, resampled to `PIXEL` and cut or padded to `GRID`."""
    flipped = [dim for dim, flip in ((2, view.flip_rows), (3, view.flip_columns)) if flip]
    image = image.flip(flipped)
    size = [
        max(1, round(n * mm / PIXEL))
        for n, mm in zip(image.shape[2:], view.spacing[1:], strict=True)
    ]
    image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    missing = [want - have for want, have in zip(GRID, size, strict=True)]
    # Negative padding cuts.
    rows, columns = ((n // 2, n - n // 2) for n in missing)
    return F.pad(image, (*columns, *rows))


@torch.inference_mode()
def encode_scan(
    reporter: Reporter,
    kspace: Tensor,
    mask: Tensor,
    view: View,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and magnitude pictures of a scan, a batch of slices after the other.

    Args:
        reporter: whose codec makes the tokens, of mirror images, too, if it reads them.
        kspace: complex `[slices, coils, H, W]`, zero outside the mask, bool `[W]`.
        view: see `View`.
        progress: called with the number of slices just encoded.

    Yields: tokens as of `encode` on the model's device, and float32 `[B, *GRID]` on the CPU, the
        brightest pixel of the zero-filled scan 1.
    """
    model = reporter.model
    device = next(model.parameters()).device
    calibration = calibration_columns(mask).to(device)
    mask = mask.to(device)
    scale = volume_scale(kspace, mask)
    for part in kspace.split(batch_size):
        part = part.to(device, torch.complex64)
        inputs = (part, mask, calibration, scale.expand(len(part)))
        tokens, image = encode(model, *inputs, view, reporter.mirrored)
        yield tokens, rss(image).float().cpu()
        if progress is not None:
            progress(len(part))
