"""From a scan to image tokens on the grid that reporters are trained on.

K-space alone gives neither the size of a pixel nor the patient's orientation, which reports need;
both come from the scan's affine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.anatomy.brain_slices import GRID, PIXEL
from nirvana.mri.io import Scan
from nirvana.mri.io.geometry import spacing_of
from nirvana.mri.model.codec import CodecModel, volume_scale
from nirvana.mri.model.layout import crop
from nirvana.mri.physics.fourier import rss
from nirvana.mri.physics.masks import calibration_columns
from nirvana.mri.reports.reporter import Reporter


@dataclass(frozen=True)
class View:
    """How a scan's images are brought to radiological convention.

    Attributes:
        spacing: of slices, rows and columns in mm.
        flip_rows: whether the first row is posterior.
        flip_columns: whether the first column is on the patient's left.
        known: whether the scan has an orientation; otherwise its images are assumed to be in
            radiological convention.
    """

    spacing: tuple[float, float, float]
    flip_rows: bool = False
    flip_columns: bool = False
    known: bool = True


def view_of(scan: Scan) -> View:
    """The view of a scan by its affine or, without one, by its spacing.

    Raises:
        InputError: the scan has neither, or its slices are not axial from bottom to top.
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
    """Image tokens by a codec's encoder.

    Args:
        model: the codec.
        kspace: this and the next three as of `CodecModel.forward`.
        mask: see above.
        calibration: see above.
        scale: see above.
        view: by which the combined image is resampled to `GRID` and `PIXEL` before the ViT; None
            leaves it padded to patches.
        mirrored: also encode the image mirrored about its middle column.

    Returns:
        Tokens `[B, N, D]`, or `[B, 2, N, D]` with those of the mirrored image, as `Reporter.read`
        takes them; and the combined image `[B, 2, H', W']` before the ViT.
    """
    encoding = model.encode_kspace(kspace, mask, calibration, scale)
    image = encoding.image
    if view is not None:
        image = to_grid(crop(image, encoding.padding), view)
    if not mirrored:
        return model.encoder(image), image
    both = torch.stack([image, image.flip(-1)], dim=1)
    return model.encoder(both.flatten(0, 1)).unflatten(0, (-1, 2)), image


def to_grid(image: Tensor, view: View) -> Tensor:
    """Images `[B, 2, H, W]` flipped, resampled to `PIXEL` and cropped or zero-padded to `GRID`."""
    flipped = [dim for dim, flip in ((2, view.flip_rows), (3, view.flip_columns)) if flip]
    image = image.flip(flipped)
    size = [
        max(1, round(n * mm / PIXEL))
        for n, mm in zip(image.shape[2:], view.spacing[1:], strict=True)
    ]
    image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    missing = [want - have for want, have in zip(GRID, size, strict=True)]
    # Negative padding crops.
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
    """Tokens and magnitude images of a scan, a batch of slices at a time.

    Args:
        reporter: whose codec encodes the slices, also mirrored if it reads both.
        kspace: complex `[slices, coils, H, W]`, zero outside the mask.
        mask: bool `[W]`.
        view: of the scan.
        batch_size: slices at once.
        progress: called with the number of slices just encoded.

    Yields:
        Tokens as of `encode`, on the model's device, and float32 `[B, *GRID]` on the CPU, the
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
