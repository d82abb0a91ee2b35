"""Coil sensitivities and cascades of E2E-VarNet (Sriram et al., arXiv 2004.06688)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.iterate import Iterate
from nirvana.mri.model.layout import crop, pad_to_patches, to_channels, to_complex
from nirvana.mri.model.operator import conjugate, expand, reduce
from nirvana.mri.model.unet import build_unet
from nirvana.mri.physics.fourier import ifft2c, rss


class Sensitivities(nn.Module):
    """Coil sensitivities from calibration samples, by one U-Net on each coil's image, scaled to
    sum_c |S_c|^2 = 1 in every pixel.

    A "residual" U-Net corrects that image, which is a first estimate; an "instance" one replaces
    it.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.net = ComplexNet(config, config.sensitivity_features)
        self.adds = config.unet == "residual"

    def forward(self, calibration: Tensor) -> Tensor:
        """Estimates the sensitivities.

        Args:
            calibration: complex `[B, coils, H, W]`, zero outside of the block around the origin
                that was fully sampled.

        Returns:
            Complex `[B, coils, H, W]`.
        """
        coils = ifft2c(calibration)
        maps = self.net(coils.flatten(0, 1)).view_as(coils)
        if self.adds:
            maps = coils + maps
        return maps / rss(maps).clamp(min=1e-8)[:, None]


class ComplexNet(nn.Module):
    """A U-Net on complex images, `[B, H, W]` to `[B, H, W]`, equivariant to their scale.

    MONAI's own ComplexUnet divides by a standard deviation, which is zero for an empty image.
    """

    def __init__(self, config: CodecConfig, features: tuple[int, ...]):
        super().__init__()
        self.net = build_unet(config, features)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # a residual U-Net is homogeneous, so the scale needs no gradient
            scale = torch.view_as_real(x).square().mean((-3, -2, -1)) * 2
            scale = scale.sqrt().clamp(min=1e-12)[:, None, None, None]
        channels, padding = pad_to_patches(to_channels(x))
        y = crop(self.net(channels / scale), padding).float() * scale
        return to_complex(y)


class Cascade(nn.Module):
    """One unrolled step on k-space k:

    k <- k - eta M (k - y) - F S U(S^H F^-1 k)
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.refine = ComplexNet(config, config.cascade_features)
        # A new cascade only pulls k towards y; a random correction would have to be unlearned.
        if config.unet == "instance":
            nn.init.zeros_(self.refine.net.final_conv.weight)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(self.refine.net.final_conv.bias)  # type: ignore[union-attr,arg-type]
        self.eta = nn.Parameter(torch.ones(()))

    def forward(self, iterate: Iterate) -> Iterate:
        """Applies the step."""
        k, measured, maps = iterate.k, iterate.measured, iterate.maps
        assert k is not None
        image = measured.from_middle(reduce(measured.images(k), conjugate(maps)))[:, 0]
        change = measured.to_middle(self.refine(image))[:, None]
        correction = measured.kspace(expand(change, maps))
        return replace(iterate, k=k - self.eta * measured.mask * (k - measured.y) - correction)
