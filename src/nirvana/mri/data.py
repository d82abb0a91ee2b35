"""Slices of magnitude volumes as training samples: geometry, simulated acquisition, mask."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.mri.io import read_volume
from nirvana.mri.physics import Sampling, calibration_columns, ifft2c, rss
from nirvana.mri.simulate import Simulation, simulate


@dataclass(frozen=True)
class MriBatch:
    """Undersampled slices and what they should become.

    Attributes:
        kspace: complex64 `[B, coils, H, W]`, zero where not measured.
        mask: bool `[W]`, one for the batch.
        calibration: bool `[W]`, its central block.
        target: `[B, H, W]`, RSS of the fully sampled k-space.
        scale: `[B]`, what brightness 1 is.
    """

    kspace: Tensor
    mask: Tensor
    calibration: Tensor
    target: Tensor
    scale: Tensor


class SlicePool:
    """All slices of some volumes on one device, 8 bits a pixel, and random views of them.

    Args:
        files: NIfTI or npy magnitude volumes; every one counts the same, however many slices.
        device: where slices lie and samples are made.
        content: least share of pixels above 5 % of the volume's maximum for a slice to be used.

    Raises:
        InputError: for a file that is no volume, or one without a slice that shows anything.
    """

    def __init__(self, files: Iterable[str | Path], device: torch.device, content: float = 0.08):
        self.device = device
        self.volumes: list[Tensor] = []
        for file in files:
            magnitude = torch.from_numpy(read_volume(file))
            shown = (magnitude > 0.05).flatten(1).float().mean(1) > content
            if not shown.any():
                raise InputError(f"{file}: no slice shows anything above 5 % of the maximum")
            self.volumes.append((magnitude[shown] * 255).round().byte().to(device))
        if not self.volumes:
            raise InputError("no training volume was given")

    def views(self, count: int, size: tuple[int, int], generator: Generator) -> Tensor:
        """`count` random slices as `[count, *size]` in 0..1.

        Each is turned up to 15 degrees, scaled so that its longer side fills 75 to 115 % of the
        field of view, stretched up to 10 %, moved up to 8 % and mirrored half of the time.
        """
        images = []
        for _ in range(count):
            which = torch.randint(len(self.volumes), (), generator=generator).item()
            volume = self.volumes[int(which)]
            index = int(torch.randint(len(volume), (), generator=generator).item())
            images.append(_view(volume[index].float() / 255, size, generator))
        return torch.stack(images)


def _view(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    u = torch.rand(7, generator=generator).tolist()
    angle = torch.tensor((2 * u[0] - 1) * torch.pi / 12)
    fill, stretch = 0.75 + 0.4 * u[1], 0.9 + 0.2 * u[2]
    # Pixels of the slice per pixel of the view, so that its proportions stay.
    zoom = max(image.shape[0] / size[0], image.shape[1] / size[1]) / fill
    flip = -1.0 if u[3] < 0.5 else 1.0
    to_pixels = torch.tensor(
        [[size[1] * zoom * flip / stretch, 0.0], [0.0, size[0] * zoom * stretch]]
    )
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    to_grid = torch.tensor([[1 / image.shape[1], 0.0], [0.0, 1 / image.shape[0]]])
    shift = torch.tensor([[0.16 * (u[4] - 0.5)], [0.16 * (u[5] - 0.5)]])
    theta = torch.cat([to_grid @ turn @ to_pixels, shift], dim=1)[None].to(image.device)
    grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
    view = F.grid_sample(image[None, None], grid, align_corners=False, padding_mode="zeros")
    return view[0, 0]


def simulate_batch(
    pool: SlicePool,
    batch_size: int,
    size: tuple[int, int],
    num_coils: int,
    sampling: Sampling,
    simulation: Simulation,
    generator: Generator,
) -> MriBatch:
    """One training batch; every random number comes from `generator`."""
    images = pool.views(batch_size, size, generator)
    kspace = simulate(images, generator, simulation, coils=num_coils)
    target = rss(ifft2c(kspace))
    seed = int(torch.randint(2**31, (), generator=generator).item())
    mask = sampling.mask(size[1], seed)
    calibration = calibration_columns(mask).to(pool.device)
    mask = mask.to(pool.device)
    kspace = kspace * mask
    scale = rss(ifft2c(kspace)).amax((-2, -1))
    # A slice is rarely the brightest of its volume, whose maximum is the scale in use.
    brighter = 1 + 0.5 * torch.rand(batch_size, generator=generator).to(scale)
    return MriBatch(kspace, mask, calibration, target, scale * brighter)
