"""Slices of magnitude volumes as training samples: geometry, simulated acquisition, masks.

All slices lie on the training's device, and a batch is made there in a few operations; the host
draws only a handful of numbers for each slice.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.mri.io import read_volume
from nirvana.mri.physics import Sampling, calibration_columns, ifft2c, rss
from nirvana.mri.simulate import Simulation, simulate
from nirvana.seeds import mixed_seed

T = TypeVar("T")

MASK_SEEDS = 256  # different masks of each kind and width
Reports = Mapping[tuple[str, int | None], str]


@dataclass(frozen=True)
class MriBatch:
    """Undersampled slices and what they should become.

    Attributes:
        kspace: complex64 `[B, coils, H, W]`, zero where not measured.
        mask: bool `[B, W]`.
        calibration: bool `[B, W]`, its central block.
        target: `[B, H, W]`, RSS of the fully sampled k-space.
        scale: `[B]`, what brightness 1 is.
        reports: one text for each slice; empty without reports.
    """

    kspace: Tensor
    mask: Tensor
    calibration: Tensor
    target: Tensor
    scale: Tensor
    reports: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a codec reads: k-space, mask, calibration, scale."""
        return self.kspace, self.mask, self.calibration, self.scale


class SlicePool:
    """All slices of some volumes on one device, 8 bits a pixel, and random views of them.

    Args:
        volumes: uint8 `[slices, H, W]` each; every one counts the same, however many slices.
        device: where slices lie and samples are made.
        reports: of every volume, one text for each slice.

    Raises:
        InputError: without a volume.
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
        # [slices, 2]: height and width, before they are laid into the middle of one common size.
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
            content: least share of pixels above 5 % of the volume's maximum for a slice to be used.
            reports: of (file name, slice) or (file name, None) for all slices of a volume.

        Raises:
            InputError: for a file that is no volume, one without a slice that shows anything, or a
                slice without a report when there are any.
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
        """`count` random slices: their numbers, `[count]` on the CPU."""
        which = torch.randint(len(self.counts), (count,), generator=generator)
        part = torch.rand(count, generator=generator)
        return self.first[which] + (part * self.counts[which]).long()

    def views(self, index: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        """Random views of the slices `index` `[B]`, as `[B, *size]` in 0..1.

        Each is turned up to 15 degrees, scaled so that its longer side fills 75 to 115 % of the
        field of view, stretched up to 10 %, moved up to 8 % and mirrored half of the time.
        """
        theta = self._placements(index, size, generator).to(self.device)
        grid = F.affine_grid(theta, [len(index), 1, *size], align_corners=False)
        slices = self.slices[index.to(self.device)][:, None].float() / 255
        return F.grid_sample(slices, grid, align_corners=False, padding_mode="zeros")[:, 0]

    def _placements(self, index: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
        """Affine maps `[B, 2, 3]` from a view's coordinates, -1..1, to those of the slices."""
        u = torch.rand(6, len(index), generator=generator)
        angle = (2 * u[0] - 1) * torch.pi / 12
        fill, stretch = 0.75 + 0.4 * u[1], 0.9 + 0.2 * u[2]
        sides = self.sizes[index].float()
        # Pixels of the slice per pixel of the view, so that its proportions stay.
        zoom = (sides / torch.tensor(size)).amax(1) / fill
        flip = torch.where(u[3] < 0.5, -1.0, 1.0)
        across, along = size[1] * zoom * flip / stretch, size[0] * zoom * stretch
        to_pixels = torch.diag_embed(torch.stack([across, along], dim=1))
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
        height, width = self.slices.shape[1:]
        to_grid = torch.tensor([1 / width, 1 / height])
        linear = to_grid[:, None] * (turn.view(-1, 2, 2) @ to_pixels)
        shift = 0.16 * (u[4:].T - 0.5) * sides.flip(1) * to_grid
        return torch.cat([linear, shift[:, :, None]], dim=2)


def simulate_batch(
    pool: SlicePool,
    batch_size: int,
    size: tuple[int, int],
    num_coils: int,
    samplings: Sequence[Sampling],
    simulation: Simulation,
    generator: Generator,
) -> MriBatch:
    """One training batch; every random number comes from `generator`.

    Args:
        samplings: each slice gets a mask of its own from one of them, drawn evenly.
    """
    index = pool.draw(batch_size, generator)
    images = pool.views(index, size, generator)
    kspace = simulate(images, generator, simulation, coils=num_coils)
    masks = draw_masks(samplings, batch_size, size[1], generator).to(pool.device)
    reports = tuple(pool.reports[i] for i in index.tolist()) if pool.reports else ()
    return undersampled(kspace, masks, generator, reports)


def micro_batch_generator(seed: int, micro_batch: int) -> Generator:
    """Of everything random in a training's micro batch, numbered through all steps."""
    return Generator().manual_seed(mixed_seed(seed, micro_batch))


def choice(options: Sequence[T], generator: Generator) -> T:
    """One of the options, each as likely as the others."""
    return options[int(torch.randint(len(options), (), generator=generator).item())]


def draw_masks(
    samplings: Sequence[Sampling], count: int, width: int, generator: Generator
) -> Tensor:
    """Masks and their central blocks, bool `[2, count, W]`, each of a sampling drawn evenly."""
    which = torch.randint(len(samplings), (count,), generator=generator).tolist()
    seeds = torch.randint(MASK_SEEDS, (count,), generator=generator).tolist()
    columns = [_columns(samplings[i], width, seed) for i, seed in zip(which, seeds, strict=True)]
    return torch.stack(columns, dim=1)


def undersampled(
    kspace: Tensor, masks: Tensor, generator: Generator, reports: tuple[str, ...] = ()
) -> MriBatch:
    """The batch of fully sampled slices `[B, coils, H, W]` under the masks of `draw_masks`."""
    mask, calibration = masks
    target = rss(ifft2c(kspace))
    kspace = kspace * mask[:, None, None]
    scale = rss(ifft2c(kspace)).amax((-2, -1))
    # A slice is rarely the brightest of its volume, whose maximum is the scale in use.
    brighter = 1 + 0.5 * torch.rand(len(kspace), generator=generator).to(scale)
    return MriBatch(kspace, mask, calibration, target, scale * brighter, reports)


@cache
def _columns(sampling: Sampling, width: int, seed: int) -> Tensor:
    """A mask and its central block, bool `[2, W]`. Kept, because drawing one takes the host longer
    than everything else about a slice."""
    mask = sampling.mask(width, seed)
    return torch.stack([mask, calibration_columns(mask)])


def read_reports(path: str | Path) -> dict[tuple[str, int | None], str]:
    """Reports of slices: on each line `{"volume": file name, "slice": number, "report": text}`; one
    without "slice" is about every slice that has no line of its own.

    Raises:
        InputError: naming the line that is no such thing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of reports")
    reports: dict[tuple[str, int | None], str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            volume, where, text = entry["volume"], entry.get("slice"), entry["report"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            volume, where, text = None, None, None
        if not (isinstance(volume, str) and isinstance(text, str)) or not (
            where is None or type(where) is int
        ):
            raise InputError(
                f'{path}, line {number}: must be {{"volume": name, "slice": n, "report": text}}'
            )
        reports[volume, where] = text
    return reports


def report_of(reports: Reports, file: Path, number: int) -> str:
    """The report of a file's slice.

    Raises:
        InputError: when there is none.
    """
    text = reports.get((file.name, number), reports.get((file.name, None)))
    if text is None:
        raise InputError(f"{file}: slice {number} has no report")
    return text


def _centred(volume: Tensor, height: int, width: int) -> Tensor:
    rows, columns = height - volume.shape[1], width - volume.shape[2]
    return F.pad(volume, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
