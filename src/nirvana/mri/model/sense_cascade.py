"""Cascades on combined images: a U-Net, then data consistency by conjugate gradients."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.iterate import Iterate
from nirvana.mri.model.layout import crop, pad_to_patches
from nirvana.mri.model.operator import MeasuredKspace, expand, solve
from nirvana.mri.model.residual_unet import ResidualUNet
from nirvana.mri.model.unet import build_unet
from nirvana.mri.physics.fourier import energy

COARSE = 4  # sides of the pixels on which sensitivities are refined


class SenseCascade(nn.Module):
    """One step of MoDL (Aggarwal et al., IEEE Transactions on Medical Imaging 38, 2019) with
    sensitivities that are refined:

        S <- refine(S, x, y)
        z <- x + U(x, z, certainty; scan)
        x <- argmin || M F S x - y ||^2 + lambda || x - z ||^2

    lambda depends on the scan's conditioning, so that noisy data weigh less.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        sets = config.map_sets
        self.steps = config.consistency_steps
        self.net = build_unet(config, config.cascade_features, 5 * sets, 2 * sets, config.prompts)
        self.maps = MapRefinement(config.map_features) if config.map_features else None
        self.log_weight = nn.Parameter(torch.tensor(-2.5))
        self.gains = self.weight_of = None
        if config.conditioning:
            self.gains = nn.Linear(config.conditioning, self.net.num_gains)  # type: ignore[arg-type]
            self.weight_of = nn.Linear(config.conditioning, 1)
            for layer in (self.gains, self.weight_of):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, iterate: Iterate) -> Iterate:
        """Applies the step."""
        scan, maps, x, z = iterate.measured, iterate.maps, iterate.x, iterate.z
        assert x is not None and z is not None  # noqa: PT018
        if self.maps is not None:
            maps = self.maps(maps, x, scan)
        gains, log_weight = None, self.log_weight.view(1, 1)
        if self.gains is not None and self.weight_of is not None and iterate.scan is not None:
            gains = 1 + self.gains(iterate.scan).float()
            log_weight = log_weight + self.weight_of(iterate.scan).float()
        weight = log_weight.exp()[..., None, None]
        z = x + self._refined(x, z, iterate.certainty, scan, gains)
        x = solve(scan, maps, weight, z, self.steps)
        return replace(iterate, x=x, z=z, maps=maps)

    def _refined(
        self,
        x: Tensor,
        z: Tensor,
        certainty: Tensor,
        measured: MeasuredKspace,
        gains: Tensor | None,
    ) -> Tensor:
        """The U-Net's correction of x; the network is homogeneous in the images' scale."""
        sets = x.shape[1]
        both = measured.from_middle(torch.cat([x, z], dim=1))
        with torch.no_grad():
            scale = torch.view_as_real(both[:, :sets]).square().mean((1, 2, 3, 4)) * 2
            scale = scale.sqrt().clamp(min=1e-12)[:, None, None, None]
        both = both / scale
        channels = torch.cat([both.real, both.imag, certainty], dim=1)
        padded, padding = pad_to_patches(channels)
        change = crop(self.net(padded, gains=gains), padding).float() * scale
        real, imaginary = change.chunk(2, dim=1)
        return measured.to_middle(torch.complex(real.contiguous(), imaginary.contiguous()))


class MapRefinement(nn.Module):
    """A correction of the sensitivities from what they leave of the measured.

    With the residual r = F^-1 M (y - F S x) in image space, the least-squares change of a coil's
    sensitivity in a small area is sum conj(x) r / sum |x|^2. A U-Net reads it, the sensitivity and
    the image's magnitude, on pixels of `COARSE` x `COARSE`, coil by coil, and adds a correction;
    the norm over the coils stays as it was.

    Args:
        features: channels of the U-Net's levels.
    """

    def __init__(self, features: tuple[int, ...]):
        super().__init__()
        self.net = ResidualUNet(features, in_channels=5)

    def forward(self, maps: Tensor, x: Tensor, measured: MeasuredKspace) -> Tensor:
        """Refines sensitivities `[B, sets, coils, H, W]` by images `[B, sets, H, W]`, both middle
        first."""
        batch, sets, coils, height, width = maps.shape
        modelled = measured.kspace(expand(x, maps))
        residual = measured.images(measured.mask * (measured.y - modelled))
        residual = measured.from_middle(residual)
        image, centred = measured.from_middle(x), measured.from_middle(maps)

        def coarse(part: Tensor) -> Tensor:
            padded, _ = pad_to_patches(part)
            return F.avg_pool2d(padded, COARSE)

        power = coarse(torch.view_as_real(image).square().sum(-1))[:, :, None]
        mean = power.mean((1, 2, 3, 4), keepdim=True)
        product = image.conj()[:, :, None] * residual[:, None]
        channels = (centred.real, centred.imag, product.real, product.imag)
        flat = torch.stack([coarse(each.flatten(1, 2)) for each in channels], dim=2)
        flat = flat.unflatten(1, (sets, coils))
        change = flat[:, :, :, 2:] / (power[:, :, :, None] + 0.01 * mean[..., None] + 1e-12)
        magnitude = (power / mean.clamp(min=1e-12) + 1e-6).sqrt()[:, :, :, None]
        inputs = [flat[:, :, :, :2], change, magnitude.expand(-1, -1, coils, -1, -1, -1)]
        correction = self.net(torch.cat(inputs, dim=3).flatten(0, 2)).float()
        correction = F.interpolate(
            correction, scale_factor=COARSE, mode="bilinear", align_corners=False
        )
        _, padding = pad_to_patches(image.real)
        correction = crop(correction, padding).view(batch, sets, coils, 2, height, width)
        correction = torch.complex(
            correction[:, :, :, 0].contiguous(), correction[:, :, :, 1].contiguous()
        )
        # The lower bounds keep the gradients of the roots finite where there is no sensitivity.
        square = energy(centred, dim=2).clamp(min=1e-30)
        refined = centred + square.sqrt() * correction
        changed = energy(refined, dim=2).clamp(min=1e-16)
        return measured.to_middle(refined * (square / changed).sqrt())
