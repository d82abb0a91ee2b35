"""Slices of measured, fully sampled k-space as training samples: fastMRI's training folders.

Only the undersampling is simulated. Scans stay on the disk; a batch reads its slices.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.mri.data.batch import MriBatch, Samplings, draw_masks
from nirvana.mri.data.report_texts import Reports, report_of
from nirvana.mri.io import hdf5
from nirvana.mri.io.scan import check_size
from nirvana.mri.physics.fourier import fft2c, ifft2c
from nirvana.mri.physics.masks import find_mask
from nirvana.mri.physics.pattern import has_gaps

SUFFIXES = (".h5", ".hdf5")


class ScanPool:
    """The slices of fastMRI files with given numbers of coils.

    Args:
        files: fastMRI HDF5, fully sampled; every file is drawn equally often, however many slices
            it has.
        device: where samples are made.
        coils: numbers of coils; files with another number are left out.
        reports: see `report_texts.Reports`; None without reports.

    Raises:
        InputError: a file is no such scan, no file has one of the numbers of coils, or a slice
            lacks its report.
    """

    def __init__(
        self,
        files: Iterable[str | Path],
        device: torch.device,
        coils: Sequence[int],
        reports: Reports | None = None,
    ):
        self.device = device
        self.files: dict[int, list[tuple[Path, int]]] = {count: [] for count in coils}
        self.reports: dict[tuple[Path, int], str] = {}
        for file in map(Path, files):
            num_slices, num_coils = _shape(file)
            if num_coils not in self.files:
                continue
            self.files[num_coils].append((file, num_slices))
            for number in range(num_slices if reports is not None else 0):
                assert reports is not None
                self.reports[file, number] = report_of(reports, file, number)
        for count, found in self.files.items():
            if not found:
                raise InputError(f"data.coils: no training scan has {count} coils")

    def batch(
        self,
        batch_size: int,
        size: tuple[int, int],
        num_coils: int,
        samplings: Samplings,
        generator: Generator,
    ) -> MriBatch:
        """One training batch; every random number comes from `generator`.

        Args:
            batch_size: number of samples.
            size: H and W that images are cropped or zero-padded to about their middle, which
                removes oversampling and equals a measurement with that field of view.
            num_coils: of the scans that slices are drawn from.
            samplings: each slice gets a mask of its own from one of them, drawn uniformly.
            generator: on the CPU.

        Raises:
            InputError: a slice cannot be read or is empty.
        """
        files = self.files[num_coils]
        which = torch.randint(len(files), (batch_size,), generator=generator).tolist()
        part = torch.rand(batch_size, generator=generator).tolist()
        chosen = [(files[i][0], int(u * files[i][1])) for i, u in zip(which, part, strict=True)]
        kspace = torch.stack([self._slice(*place, size) for place in chosen])
        masks = draw_masks(samplings, batch_size, size, generator)
        reports = tuple(self.reports[place] for place in chosen) if self.reports else ()
        batch = MriBatch.fully_sampled(kspace, reports=reports)
        return batch.undersample(*masks).brighten(generator)

    def _slice(self, file: Path, number: int, size: tuple[int, int]) -> Tensor:
        with hdf5.open_hdf5(file) as handle:
            found = hdf5.dataset(handle, "kspace", file)
            try:
                values = np.asarray(found[number], dtype=np.complex64)
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{file}: slice {number} cannot be read: {error}") from error
        values = values.reshape(-1, *values.shape[-2:])
        if not np.isfinite(values).all() or not values.any():
            raise InputError(f"{file}: slice {number} holds NaN, infinite values or nothing")
        if has_gaps(find_mask(values).numpy()):  # not every undersampled file has a mask
            raise InputError(f"{file} is undersampled: training needs fully sampled scans")
        return cut(torch.from_numpy(values).to(self.device), size)


def cut(kspace: Tensor, size: tuple[int, int]) -> Tensor:
    """K-space `[..., H, W]` of its image cropped or zero-padded to the middle `size`."""
    rows, columns = (have - want for have, want in zip(kspace.shape[-2:], size, strict=True))
    margins = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return fft2c(F.pad(ifft2c(kspace), [-margin for margin in margins]))


def _shape(file: Path) -> tuple[int, int]:
    """Numbers of slices and coils, from the header alone."""
    with hdf5.open_hdf5(file) as handle:
        found = hdf5.dataset(handle, "kspace", file)
        if found is None or found.dtype.kind != "c" or found.ndim not in (3, 4):
            raise InputError(f"{file}: no complex 'kspace' [slices, coils, H, W] in it")
        if "mask" in handle:
            raise InputError(f"{file} is undersampled: training needs fully sampled scans")
        shape = found.shape if found.ndim == 4 else (len(found), 1, *found.shape[1:])
        check_size(file, shape, 8)
        return shape[0], shape[1]
