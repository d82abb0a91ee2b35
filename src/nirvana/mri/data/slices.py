"""Slices of magnitude volumes as training samples: random views, simulated acquisition, masks.

All slices lie on the training's device, where a batch takes a few operations; the host draws only
a handful of numbers for each slice.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.mri.anatomy.augment import draw_affines
from nirvana.mri.data.batch import MriBatch, Samplings, draw_masks
from nirvana.mri.data.report_texts import Reports, report_of
from nirvana.mri.data.simulate import simulate
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import read_volume

FILL = (0.75, 1.15)  # share of the field of view that a slice's longer side fills
FILL_WRAPPED = (1.0, 1.4)  # the same where the slice folds over along its shorter side
WIDE = 1.5  # columns of the view of such a slice, relative to those of the field of view


class SlicePool:
    """All slices of some volumes on one device, 8 bits a pixel, and random views of them.

    Args:
        volumes: uint8 `[slices, H, W]` each; every volume is drawn equally often, however many
            slices it has.
        device: where the slices lie and samples are made.
        reports: for every volume one text for each slice; empty without reports.

    Raises:
        InputError: there is no volume.
    """

    def __init__(
        self,
        volumes: Sequence[Tensor],
        device: torch.device,
        reports: Sequence[Sequence[str]] = (),
    ):
        if not volumes:
            raise InputError("no training volume was given")
        self.device = device
        self.reports = [text for texts in reports for text in texts]
        self.counts = torch.tensor([len(volume) for volume in volumes])
        self.first = self.counts.cumsum(0) - self.counts
        # [slices, 2]: height and width, before the slices are centred in one common size.
        self.sizes = torch.tensor([volume.shape[1:] for volume in volumes for _ in volume])
        height, width = (int(n) for n in self.sizes.amax(0))
        self.slices = torch.cat([_centred(v, height, width) for v in volumes]).to(device)

    @classmethod
    def read(
        cls,
        files: Iterable[str | Path],
        device: torch.device,
        content: float = 0.08,
        reports: Reports | None = None,
    ) -> "SlicePool":
        """The pool of some files.

        Args:
            files: NIfTI or npy magnitude volumes.
            device: where the slices lie.
            content: least share of pixels above 5 % of the volume's maximum for a slice to be used.
            reports: see `Reports`; None without reports.

        Raises:
            InputError: a file is no volume or has no slice with content, or a slice lacks its
                report.
        """
        volumes, texts = [], []
        for file in map(Path, files):
            magnitude = torch.from_numpy(read_volume(file))
            shown = (magnitude > 0.05).flatten(1).float().mean(1) > content
            if not shown.any():
                raise InputError(f"{file}: no slice shows anything above 5 % of the maximum")
            volumes.append((magnitude[shown] * 255).round().byte())
            if reports is not None:
                texts.append(
                    [report_of(reports, file, n) for n in shown.nonzero().flatten().tolist()]
                )
        return cls(volumes, device, texts)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Indices of `count` random slices, int64 `[count]` on the CPU."""
        which = torch.randint(len(self.counts), (count,), generator=generator)
        part = torch.rand(count, generator=generator)
        return self.first[which] + (part * self.counts[which]).long()

    def views(
        self,
        index: Tensor,
        size: tuple[int, int],
        generator: Generator,
        fill: tuple[float, float] = FILL,
    ) -> Tensor:
        """Random views of slices, by the affine maps of `augment.draw_affines`.

        Args:
            index: int64 `[B]`, of the slices.
            size: H and W of the views.
            generator: on the CPU.
            fill: range of the share of the view that a slice's longer side fills.

        Returns:
            float32 `[B, H, W]` in 0..1.
        """
        grid_size = (self.slices.shape[1], self.slices.shape[2])
        theta = draw_affines(self.sizes[index].float(), grid_size, size, generator, fill)
        grid = F.affine_grid(theta.to(self.device), [len(index), 1, *size], align_corners=False)
        slices = self.slices[index.to(self.device)][:, None].float() / 255
        return F.grid_sample(slices, grid, align_corners=False, padding_mode="zeros")[:, 0]


def simulate_batch(
    pool: SlicePool,
    batch_size: int,
    size: tuple[int, int],
    num_coils: int,
    samplings: Samplings,
    simulation: Simulation,
    generator: Generator,
    arrays: Sequence[Tensor] = (),
) -> MriBatch:
    """One training batch of simulated scans; every random number comes from `generator`.

    Args:
        pool: the slices.
        batch_size: number of samples.
        size: H and W of the samples.
        num_coils: number of receive coils.
        samplings: each slice gets a mask of its own from one of them, drawn uniformly.
        simulation: of the scans.
        generator: on the CPU.
        arrays: measured coil sensitivities, see `simulation.coils.coil_maps`.
    """
    index = pool.draw(batch_size, generator)
    height, width = size
    view, fill = size, FILL
    if simulation.wrap and torch.rand((), generator=generator) < simulation.wrap:
        view, fill = (height, round(WIDE * width)), FILL_WRAPPED
    images = pool.views(index, view, generator, fill)
    kspace = simulate(images, generator, simulation, coils=num_coils, width=width, arrays=arrays)
    masks = draw_masks(samplings, batch_size, size, generator)
    reports = tuple(pool.reports[i] for i in index.tolist()) if pool.reports else ()
    batch = MriBatch.fully_sampled(kspace, reports=reports)
    return batch.undersample(*masks).brighten(generator)


def _centred(volume: Tensor, height: int, width: int) -> Tensor:
    """A volume zero-padded evenly to `[slices, height, width]`."""
    rows, columns = height - volume.shape[1], width - volume.shape[2]
    return F.pad(volume, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
