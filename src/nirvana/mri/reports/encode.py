"""From a scan to image tokens on the grid that reporters are trained on.

K-space alone gives neither the size of a pixel nor the patient's orientation, which reports need;
both come from the scan's affine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.anatomy.brain_slices import GRID, PIXEL
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.io import Scan, in_file_axes
from nirvana.mri.io.geometry import spacing_of
from nirvana.mri.model.codec import CodecModel, slice_batches
from nirvana.mri.model.layout import crop
from nirvana.mri.reports.reporter import Reporter


@dataclass(frozen=True)
class View:
    """How a scan's images are brought to radiological convention.

    Attributes:
        spacing: of slices, rows and columns in mm.
        flip_rows: whether the first row is posterior.
        flip_columns: whether the first column is on the patient's left.
        swapped: whether rows and columns are exchanged before that: of a scan whose phase encoding
            runs along the rows of its file, the axes are those of the file.
        orientation: where it is known from; images of unknown orientation are read as if they were
            in radiological convention, and nothing may be claimed about their sides.
    """

    spacing: tuple[float, float, float]
    flip_rows: bool = False
    flip_columns: bool = False
    swapped: bool = False
    orientation: Literal["of the scan", "as given", "unknown"] = "of the scan"

    @property
    def known(self) -> bool:
        """Whether sides of the images are sides of the patient."""
        return self.orientation != "unknown"


def view_of(scan: Scan, radiological: bool = False) -> View:
    """The view of a scan by its affine or, without one, by its spacing.

    Args:
        scan: the scan.
        radiological: the images of a scan without an orientation are in radiological convention.

    Raises:
        InputError: the scan has neither, or its slices are not axial from bottom to top.
    """
    swapped = scan.phase_encode == "rows"
    _, spacing, affine = in_file_axes(np.empty((0, 0, 0)), scan)
    if affine is None:
        if spacing is None:
            raise InputError(
                f"{scan.name}: the size of its pixels is unknown, and sizes in mm need it; give a "
                "NIfTI volume or a scan with a header"
            )
        orientation = "as given" if radiological else "unknown"
        return View(spacing, swapped=swapped, orientation=orientation)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    slices, rows, columns = directions.T
    if min(abs(slices[2]), abs(rows[1]), abs(columns[0])) < 0.7 or slices[2] < 0:
        raise InputError(
            f"{scan.name}: its slices are not axial from bottom to top; reports are of axial slices"
        )
    return View(spacing_of(affine), bool(rows[1] > 0), bool(columns[0] > 0), swapped)


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
    return image_tokens(model, image, mirrored), image


def image_tokens(model: CodecModel, image: Tensor, mirrored: bool) -> Tensor:
    """The tokens of combined images `[B, 2, H', W']`, see `encode`."""
    if not mirrored:
        return model.encoder(image)
    both = torch.stack([image, image.flip(-1)], dim=1)
    return model.encoder(both.flatten(0, 1)).unflatten(0, (-1, 2))


def to_grid(image: Tensor, view: View) -> Tensor:
    """Images `[B, 2, H, W]` turned, resampled to `PIXEL` and cropped or zero-padded to `GRID`."""
    if view.swapped:
        image = image.transpose(2, 3)
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
    acquisition: Acquisition,
    view: View,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and combined images of a scan, a batch of slices at a time.

    Args:
        reporter: whose codec encodes the slices, also mirrored if it reads both.
        acquisition: the measured k-space.
        view: of the scan.
        batch_size: slices at once.
        progress: called with the number of slices just encoded.

    Yields:
        Tokens as of `encode`, on the model's device, and float32 `[B, 2, *GRID]` on the CPU, real
        and imaginary part, the brightest pixel of the zero-filled scan 1.
    """
    model = reporter.model
    scale = torch.tensor(acquisition.scale, device=model.device)
    for batch in slice_batches(acquisition, batch_size, model.device):
        brightness = scale.expand(len(batch.kspace))
        tokens, image = encode(model, *batch, brightness, view, reporter.mirrored)
        yield tokens, image.float().cpu()
        if progress is not None:
            progress(len(batch.kspace))
