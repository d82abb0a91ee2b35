"""The networks around the backbone: k-space to tokens, and tokens' hidden states to an image."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import BasicUNet, Down, TwoConv, UpCat
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.mri.physics import CartesianSense, ifft2c, rss

PATCH = 16
ACTIVATION = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
NORM = ("instance", {"affine": True})


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec.

    Attributes:
        backbone: folder or packaged name of the frozen language model, or "none" (identity).
        sensitivity_features: channels of the sensitivity U-Net, at six levels (MONAI's order).
        cascade_features: channels of every cascade's U-Net, likewise.
        encoder_cascades: E2E-VarNet cascades before the tokens.
        image_cascades: cascades after the image decoder.
        vit_dim, vit_depth, vit_heads: the ViT that reads patches of 16 x 16 pixels.
        decoder_features: channels of the image decoder at scales 1, 1/2, 1/4 and 1/8.
        token_dim: size of a token when there is no backbone to give it.
    """

    backbone: str = "tiny"
    sensitivity_features: tuple[int, int, int, int, int, int] = (8, 8, 16, 32, 32, 8)
    cascade_features: tuple[int, int, int, int, int, int] = (16, 16, 32, 64, 64, 16)
    encoder_cascades: int = 0
    image_cascades: int = 5
    vit_dim: int = 128
    vit_depth: int = 4
    vit_heads: int = 4
    decoder_features: tuple[int, int, int, int] = (16, 32, 48, 64)
    token_dim: int = 192

    def __post_init__(self) -> None:
        for name in ("sensitivity_features", "cascade_features", "decoder_features"):
            if min(getattr(self, name)) < 1:
                raise InputError(f"codec.{name} = {getattr(self, name)} must be at least 1 each")
        for name in ("encoder_cascades", "image_cascades"):
            if getattr(self, name) < 0:
                raise InputError(f"codec.{name} = {getattr(self, name)} must be at least 0")
        if self.vit_dim % 4 or self.vit_dim % self.vit_heads:
            raise InputError(
                f"codec.vit_dim = {self.vit_dim} must be a multiple of 4 and of vit_heads"
            )


class Sensitivities(nn.Module):
    """Coil sensitivities from the calibration lines: one U-Net over each coil's image.

    Scaled to sum_c |S_c|^2 = 1 at every pixel.
    """

    def __init__(self, features: tuple[int, ...]):
        super().__init__()
        self.net = ComplexNet(features)

    def forward(self, kspace: Tensor, calibration: Tensor) -> Tensor:
        """
        Args:
            kspace: complex `[B, coils, H, W]`.
            calibration: bool `[W]`, the central columns that were measured without a gap.

        Returns: complex `[B, coils, H, W]`.
        """
        coils = ifft2c(kspace * calibration)
        maps = self.net(coils.flatten(0, 1)).view_as(coils)
        return maps / rss(maps).clamp(min=1e-8)[:, None]


class ComplexNet(nn.Module):
    """MONAI's U-Net on a complex image, `[B, H, W]` to `[B, H, W]`, equivariant to its scale.

    MONAI's own ComplexUnet divides by a standard deviation that is zero for an empty image.
    """

    def __init__(self, features: tuple[int, ...]):
        super().__init__()
        self.net = BasicUNet(
            spatial_dims=2,
            in_channels=2,
            out_channels=2,
            features=features,
            act=ACTIVATION,
            norm=NORM,
        )

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.real.square() + x.imag.square()).mean((-2, -1), keepdim=True).sqrt()
        scale = scale.clamp(min=1e-12)[:, None]
        channels, padding = pad_to_patches(to_channels(x))
        y = crop(self.net(channels / scale), padding).float() * scale
        return to_complex(y)


class Cascade(nn.Module):
    """One unrolled step of E2E-VarNet (Sriram et al., arXiv 2004.06688), on k-space k:

    k <- k - eta M (k - y) - F S U(S^H F^-1 k)
    """

    def __init__(self, features: tuple[int, ...]):
        super().__init__()
        self.refine = ComplexNet(features)
        # A new cascade only pulls k towards y; random corrections would have to be unlearned.
        nn.init.zeros_(self.refine.net.final_conv.weight)
        nn.init.zeros_(self.refine.net.final_conv.bias)
        self.eta = nn.Parameter(torch.ones(()))

    def forward(self, k: Tensor, y: Tensor, mask: Tensor, sensitivities: Tensor) -> Tensor:
        """k, y, sensitivities: complex `[B, coils, H, W]`; mask: bool `[W]`."""
        coils = CartesianSense(sensitivities)
        correction = coils.forward(self.refine(coils.adjoint(k)))
        return k - self.eta * mask * (k - y) - correction


class PatchEncoder(nn.Module):
    """ViT (Dosovitskiy et al., arXiv 2010.11929): patches of 16 x 16 to tokens of size D.

    Positions are sines and cosines of row and column, so any number of patches will do.
    """

    def __init__(self, config: CodecConfig, token_dim: int):
        super().__init__()
        dim = config.vit_dim
        self.patches = nn.Conv2d(2, dim, PATCH, stride=PATCH)
        layer = nn.TransformerEncoderLayer(
            dim,
            config.vit_heads,
            4 * dim,
            dropout=0.0,
            activation=F.gelu,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.vit_depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, token_dim)

    def forward(self, image: Tensor) -> Tensor:
        """Image `[B, 2, H, W]`, sides multiples of 16, to `[B, (H/16) (W/16), D]`, row by row."""
        x = self.patches(image)
        positions = _sincos(x.shape[2], x.shape[3], x.shape[1], x.device)
        x = self.blocks(x.flatten(2).mT + positions)
        return self.projection(self.norm(x))


class ImageDecoder(nn.Module):
    """U-Net whose deepest level is the backbone's hidden states; it gives a correction."""

    def __init__(self, config: CodecConfig, token_dim: int):
        super().__init__()
        first, second, third, fourth = config.decoder_features
        common = {"act": ACTIVATION, "norm": NORM, "bias": True}
        self.read = TwoConv(2, 2, first, **common)
        self.down = nn.ModuleList(
            Down(2, a, b, **common) for a, b in ((first, second), (second, third), (third, fourth))
        )
        self.tokens = nn.Conv2d(token_dim, fourth, 1)
        self.up = nn.ModuleList(
            UpCat(2, a, b, b, halves=False, **common)
            for a, b in ((fourth, fourth), (fourth, third), (third, second), (second, first))
        )
        self.write = nn.Conv2d(first, 2, 1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Image `[B, 2, H, W]` and hidden states `[B, N, D]` to `[B, 2, H, W]`."""
        levels = [self.read(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        rows = image.shape[2] // PATCH
        x = self.tokens(hidden.mT.unflatten(2, (rows, -1)))
        for up, level in zip(self.up, reversed(levels), strict=True):
            x = up(x, level)
        return self.write(x)


def to_channels(x: Tensor) -> Tensor:
    """Complex `[B, H, W]` to real `[B, 2, H, W]`."""
    return torch.stack([x.real, x.imag], dim=1)


def to_complex(x: Tensor) -> Tensor:
    """Real `[B, 2, H, W]` to complex `[B, H, W]`."""
    return torch.complex(x[:, 0].contiguous(), x[:, 1].contiguous())


def pad_to_patches(image: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Zero-pads `[..., H, W]` evenly to multiples of 16, at least 32 (instance normalisation at
    the deepest level needs two pixels); also what `crop` needs to undo it."""
    rows, columns = (max(-n % PATCH, 2 * PATCH - n) for n in image.shape[-2:])
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(image, padding), padding


def crop(image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Undoes `pad_to_patches`."""
    left, right, top, bottom = padding
    H, W = image.shape[-2:]
    return image[..., top : H - bottom, left : W - right]


def _sincos(rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """Fixed positions `[rows * columns, dim]`: half of the channels for rows, half for columns."""
    frequency = torch.exp(
        -math.log(1000.0) * torch.arange(dim // 4, device=device) / max(1, dim // 4)
    )

    def wave(count: int) -> Tensor:
        angle = torch.arange(count, device=device)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    by_row = wave(rows)[:, None].expand(-1, columns, -1)
    by_column = wave(columns)[None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
