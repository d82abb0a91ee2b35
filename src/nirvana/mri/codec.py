"""The networks around the backbone: k-space to tokens, and tokens' hidden states to an image.

They work between the two spaces: rows are transformed once, so that a column of k-space stays a
column, and only columns are transformed in every cascade. Along W both spaces begin with their
middle (`physics.to_columns`), which spares a copy of all coils before and after every transform.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.model.backbone import DEFAULT, Backbone
from nirvana.mri.physics import from_middle, rss, to_middle
from nirvana.mri.residual import ResidualUNet

PATCH = 16


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec.

    Attributes:
        backbone: kind of the frozen language model; "none" is the identity.
        weights: of the backbone: a folder or a packaged name, see `load_backbone`.
        unet: "residual" (`residual.ResidualUNet`), or "instance", MONAI's U-Net with instance
            normalisation, of which every U-Net of the codec is made.
        correction: what corrects the combined image between the cascades: "tokens" (ViT, backbone,
            image decoder), "unet" (a U-Net that sees no tokens) or "none".
        sensitivity_features: channels of the sensitivity U-Net: of the levels 1/2, 1/4 ... of the
            resolution (at most four), or the six numbers of MONAI's U-Net.
        cascade_features: of every cascade's U-Net, likewise.
        encoder_cascades: E2E-VarNet cascades before the tokens.
        image_cascades: cascades after the image decoder.
        vit_dim, vit_depth, vit_heads: the ViT that reads patches of 16 x 16 pixels.
        vit_stem: what makes vectors of the patches: "patches", one linear map of each, or
            "convolutions", see `convolutional_stem`.
        decoder_features: channels of the image decoder at four levels, down to 1/16 ("residual") or
            1/8 ("instance") of the resolution.
        unet_features: of the U-Net of correction "unet".
        token_dim: size of a token when there is no backbone to give it.
    """

    backbone: Backbone = "nirvana"
    weights: str = DEFAULT
    unet: Literal["residual", "instance"] = "residual"
    correction: Literal["tokens", "unet", "none"] = "tokens"
    sensitivity_features: tuple[int, ...] = (8, 16, 32)
    cascade_features: tuple[int, ...] = (32, 64, 96)
    encoder_cascades: int = 0
    image_cascades: int = 6
    vit_dim: int = 128
    vit_depth: int = 2
    vit_heads: int = 4
    vit_stem: Literal["patches", "convolutions"] = "patches"
    decoder_features: tuple[int, ...] = (16, 32, 48, 64)
    unet_features: tuple[int, ...] = (32, 64, 128, 256)
    token_dim: int = 192

    def __post_init__(self) -> None:
        for name in ("sensitivity_features", "cascade_features", "decoder_features"):
            self._check_features(name)
        if self.correction == "unet":
            self._check_features("unet_features")
        for name in ("encoder_cascades", "image_cascades"):
            if getattr(self, name) < 0:
                raise InputError(f"codec.{name} = {getattr(self, name)} must be at least 0")
        if self.vit_dim % 4 or self.vit_dim % self.vit_heads:
            raise InputError(
                f"codec.vit_dim = {self.vit_dim} must be a multiple of 4 and of vit_heads"
            )
        if self.vit_stem == "convolutions" and self.vit_dim % 8:
            raise InputError(
                f"codec.vit_dim = {self.vit_dim} must be a multiple of 8 with convolutions as stem"
            )
        if self.correction != "tokens" and self.backbone != "none":
            raise InputError(
                f"codec.backbone = {self.backbone!r} needs codec.correction = 'tokens', which "
                f"brings it tokens, not {self.correction!r}"
            )

    def _check_features(self, name: str) -> None:
        features = getattr(self, name)
        if name == "decoder_features":
            fits, right = len(features) == 4, "4"
        elif self.unet == "instance":
            fits, right = len(features) == 6, "6"
        else:
            fits, right = 1 <= len(features) <= 4, "1 to 4"
        if not fits or min(features) < 1:
            raise InputError(
                f"codec.{name} = {features} must be {right} numbers of channels, at least 1 each"
            )


def build_unet(config: CodecConfig, features: tuple[int, ...]) -> nn.Module:
    """A U-Net on two channels of the kind that the configuration asks for."""
    if config.unet == "residual":
        return ResidualUNet(features)
    from nirvana.mri.instance import instance_unet

    return instance_unet(features)


def build_decoder(config: CodecConfig, token_dim: int) -> nn.Module:
    """The image decoder, likewise: image `[B, 2, H, W]` and a map of the tokens' hidden states
    `[B, D, H/16, W/16]` to a correction `[B, 2, H, W]`."""
    if config.unet == "residual":
        return ResidualUNet(config.decoder_features, token_dim)
    from nirvana.mri.instance import InstanceDecoder

    return InstanceDecoder(config.decoder_features, token_dim)


class Sensitivities(nn.Module):
    """Coil sensitivities from the calibration lines: one U-Net over each coil's image.

    The "residual" one adds to that image, which is a first estimate already. Scaled to
    sum_c |S_c|^2 = 1 at every pixel.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.net = ComplexNet(config, config.sensitivity_features)
        self.adds = config.unet == "residual"

    def forward(self, k: Tensor, calibration: Tensor) -> Tensor:
        """
        Args:
            k: complex `[B, coils, H, W]`, between the spaces.
            calibration: bool `[B or 1, 1, 1, W]`, the central columns, measured without a gap.

        Returns: complex `[B, coils, H, W]`, the middle of W first.
        """
        coils = from_middle(torch.fft.ifft(k * calibration, norm="ortho"))
        maps = self.net(coils.flatten(0, 1)).view_as(coils)
        if self.adds:
            maps = coils + maps
        return to_middle(maps / rss(maps).clamp(min=1e-8)[:, None])


class ComplexNet(nn.Module):
    """A U-Net on a complex image, `[B, H, W]` to `[B, H, W]`, equivariant to its scale.

    MONAI's own ComplexUnet divides by a standard deviation that is zero for an empty image.
    """

    def __init__(self, config: CodecConfig, features: tuple[int, ...]):
        super().__init__()
        self.net = build_unet(config, features)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # a residual network's output does not depend on it
            scale = torch.view_as_real(x).square().mean((-3, -2, -1)) * 2
            scale = scale.sqrt().clamp(min=1e-12)[:, None, None, None]
        channels, padding = pad_to_patches(to_channels(x))
        y = crop(self.net(channels / scale), padding).float() * scale
        return to_complex(y)


def combine(k: Tensor, sensitivities: Tensor) -> Tensor:
    """x = S^H F^-1 k: `[B, coils, H, W]` between the spaces to a combined image `[B, H, W]`."""
    return from_middle((sensitivities.conj() * torch.fft.ifft(k, norm="ortho")).sum(1))


def spread(image: Tensor, sensitivities: Tensor) -> Tensor:
    """F S x, the adjoint of `combine`."""
    return torch.fft.fft(sensitivities * to_middle(image)[:, None], norm="ortho")


class Cascade(nn.Module):
    """One unrolled step of E2E-VarNet (Sriram et al., arXiv 2004.06688), on k-space k:

    k <- k - eta M (k - y) - F S U(S^H F^-1 k)
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.refine = ComplexNet(config, config.cascade_features)
        # A new cascade only pulls k towards y; random corrections would have to be unlearned.
        if config.unet == "instance":
            nn.init.zeros_(self.refine.net.final_conv.weight)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(self.refine.net.final_conv.bias)  # type: ignore[union-attr,arg-type]
        self.eta = nn.Parameter(torch.ones(()))

    def forward(self, k: Tensor, y: Tensor, mask: Tensor, sensitivities: Tensor) -> Tensor:
        """k, y: complex `[B, coils, H, W]` between the spaces; mask: bool `[B or 1, 1, 1, W]`;
        sensitivities: of `Sensitivities`."""
        correction = self.refine(combine(k, sensitivities))
        return k - self.eta * mask * (k - y) - spread(correction, sensitivities)


class PatchEncoder(nn.Module):
    """ViT (Dosovitskiy et al., arXiv 2010.11929): patches of 16 x 16 to tokens of size D, with
    either of two stems.

    Positions are sines and cosines of row and column, so any number of patches will do.
    """

    def __init__(self, config: CodecConfig, token_dim: int):
        super().__init__()
        dim = config.vit_dim
        self.patches = (
            ConvolutionalStem(dim)
            if config.vit_stem == "convolutions"
            else nn.Conv2d(2, dim, PATCH, stride=PATCH)
        )
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
        return self.tokens(self.patches(image))

    def tokens(self, x: Tensor) -> Tensor:
        """The stem's map `[B, dim, H/16, W/16]` to tokens."""
        positions = _sincos(x.shape[2], x.shape[3], x.shape[1], x.device)
        x = self.blocks(x.flatten(2).mT + positions)
        return self.projection(self.norm(x))


class ConvolutionalStem(nn.Module):
    """Four residual stages (He et al., arXiv 1512.03385) of 3 x 3 convolutions, each of half the
    resolution of the one before, and a way back to a quarter of it (Lin et al., arXiv 1612.03144):
    image `[B, 2, H, W]` to `[B, dim, H/16, W/16]`.

    The way back brings what a stage sees far around a place together with the finer map there, so
    that a small thing is known for what it is before 16 x 16 pixels become one vector.

    Every stage of the way back also sees what lies opposite, for a head has two sides that are much
    alike: a sulcus has its like there, a lesion has not.

    They read the magnitude: a smooth phase, which means nothing here, would have to be unlearned.
    Each image is normalised alone; with batch normalisation a slice's tokens would depend on the
    slices trained beside it. The vectors are normalised at last: sums of many rectified maps are
    twenty times as loud as the positions that a ViT adds to them, and what it does not hear of
    those is on which side a thing lies.

    Attributes:
        fine_channels: of the map of a quarter of the resolution.
    """

    def __init__(self, dim: int):
        super().__init__()
        channels = (dim // 4, dim // 2, 3 * dim // 4, dim)
        self.fine_channels = channels[1]
        self.stages = nn.ModuleList(Stage(a, b) for a, b in pairwise((1, *channels)))
        self.back = nn.ModuleList(Merge(b, a) for a, b in pairwise(channels[1:]))
        self.opposite = nn.ModuleList(Opposite(a) for a in channels[1:])
        self.gather = nn.Conv2d(channels[1], dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """A map of a quarter of the resolution, `[B, fine_channels, H/4, W/4]`, and the stem's
        vectors, `[B, dim, H/16, W/16]`."""
        x = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        _, quarter, eighth, deepest = found
        to_quarter, to_eighth = self.back
        at_quarter, at_eighth, at_deepest = self.opposite
        deepest = at_deepest(deepest)
        fine = at_quarter(to_quarter(at_eighth(to_eighth(deepest, eighth)), quarter))
        vectors = self.norm((deepest + self.gather(fine)).movedim(1, -1))
        return fine, vectors.movedim(-1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.maps(image)[1]


class Stage(nn.Module):
    """Half the resolution, and a residual block."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.halve = _normalised(before, after, stride=2)
        self.block = ResidualBlock(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.relu(self.halve(x)))


class Merge(nn.Module):
    """A map of `deep` channels, brought to twice its resolution, and a finer one of `fine`
    channels become one of `fine` channels."""

    def __init__(self, deep: int, fine: int):
        super().__init__()
        self.narrow = nn.Conv2d(deep, fine, 1)
        self.mix = _normalised(fine, fine)
        self.block = ResidualBlock(fine)

    def forward(self, deep: Tensor, fine: Tensor) -> Tensor:
        wide = F.interpolate(self.narrow(deep), scale_factor=2.0, mode="nearest")
        return self.block(F.relu(self.mix(fine + wide)))


class Opposite(nn.Module):
    """x + what a convolution makes of x and its mirror image in the middle column; x at first."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = _normalised(2 * channels, channels)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.mix(torch.cat([x, x.flip(-1)], dim=1))))


class ResidualBlock(nn.Module):
    """relu(x + two convolutions of x)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = _normalised(channels, channels)
        self.second = _normalised(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class Norm(nn.GroupNorm):
    """Group normalisation in the precision of its input, with moments in float32; autocast would
    make float32 of the input, and twice the traffic."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def _normalised(before: int, after: int, stride: int = 1) -> nn.Module:
    """A convolution and a normalisation of eight groups, or as many as divide its channels."""
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, Norm(math.gcd(8, after), after))


def token_map(hidden: Tensor, height: int) -> Tensor:
    """Hidden states `[B, N, D]` of an image of that height, laid out as `[B, D, H/16, W/16]`."""
    return hidden.mT.unflatten(2, (height // PATCH, -1))


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
