"""Coil sensitivities and cascades of E2E-VarNet (Sriram et al., arXiv 2004.06688).

The networks work on k-space that is in image space along H (`fourier.to_columns`): the transform
along H commutes with the sampling of whole columns and is done once, and a cascade transforms along
W alone, unless single points are sampled. Along W both spaces begin with their middle, which saves
a copy of all coils before and after every transform.
"""

import torch
from torch import Tensor, nn

from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.layout import crop, pad_to_patches, to_channels, to_complex
from nirvana.mri.model.unet import build_unet
from nirvana.mri.physics.fourier import from_middle, keep_sampled, rss, to_middle
from nirvana.mri.physics.sense import sens_expand, sens_reduce


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
            calibration: complex `[B, coils, H, W]`, in image space along H, zero outside of the
                block around the origin that was fully sampled.

        Returns:
            Complex `[B, coils, H, W]`, the middle of W first.
        """
        coils = from_middle(torch.fft.ifft(calibration, norm="ortho"))
        maps = self.net(coils.flatten(0, 1)).view_as(coils)
        if self.adds:
            maps = coils + maps
        return to_middle(maps / rss(maps).clamp(min=1e-8)[:, None])


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

    def forward(self, k: Tensor, y: Tensor, mask: Tensor, sensitivities: Tensor) -> Tensor:
        """Applies the step.

        Args:
            k: complex `[B, coils, H, W]`, in image space along H.
            y: the measured k-space, likewise.
            mask: bool `[B or 1, 1, H or 1, W]`, see `fourier.points_first`.
            sensitivities: of `Sensitivities`.
        """
        correction = self.refine(sens_reduce(k, sensitivities))
        return k - self.eta * keep_sampled(k - y, mask) - sens_expand(correction, sensitivities)
