"""The ViT that makes tokens of the combined image, and its convolutional stem."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.layout import PATCH


class PatchEncoder(nn.Module):
    """ViT (Dosovitskiy et al., arXiv 2010.11929): patches of 16 x 16 pixels to tokens of size D,
    with either of two stems.

    The positional encoding consists of sines and cosines of row and column, so it fits any number
    of patches.
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
        """Tokens `[B, (H/16) (W/16), D]`, row by row, of images `[B, 2, H, W]`, sides multiples of
        16."""
        return self.tokens(self.patches(image))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens of the stem's map `[B, dim, H/16, W/16]`; see `forward`."""
        positions = _sincos(x.shape[2], x.shape[3], x.shape[1], x.device)
        x = self.blocks(x.flatten(2).mT + positions)
        return self.projection(self.norm(x))


class ConvolutionalStem(nn.Module):
    """Four residual stages (He et al., arXiv 1512.03385) of 3 x 3 convolutions, each at half the
    resolution of the one before, and a feature pyramid back to a quarter of the full resolution
    (Lin et al., arXiv 1612.03144): `[B, 2, H, W]` to `[B, dim, H/16, W/16]`.

    The pyramid combines a stage's wide receptive field with the finer map, so that small lesions
    are classified before 16 x 16 pixels are reduced to one vector. Each of its levels also compares
    every position with its mirror image (`Opposite`): the brain is nearly symmetric, so a sulcus
    has a counterpart on the other side and a lesion does not.

    The stem reads the magnitude, because the smooth phase carries no information about lesions.
    Group normalisation treats each image alone; with batch normalisation a slice's tokens would
    depend on the other slices of its batch. The output is layer-normalised: sums of ReLU maps have
    about 20 times the norm of the positional encoding, and without this the ViT loses position,
    that is, the side of a lesion.

    Attributes:
        fine_channels: channels of the map of a quarter of the resolution.
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
        """The two outputs of the stem.

        Args:
            image: `[B, 2, H, W]`, sides multiples of 16.

        Returns:
            The map of a quarter of the resolution, `[B, fine_channels, H/4, W/4]`, and the patches'
            vectors, `[B, dim, H/16, W/16]`.
        """
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
    """A strided convolution to half the resolution and a residual block."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.halve = _normalised(before, after, stride=2)
        self.block = ResidualBlock(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.relu(self.halve(x)))


class Merge(nn.Module):
    """Merges a map of `deep` channels, upsampled to twice its resolution, into a finer map of
    `fine` channels."""

    def __init__(self, deep: int, fine: int):
        super().__init__()
        self.narrow = nn.Conv2d(deep, fine, 1)
        self.mix = _normalised(fine, fine)
        self.block = ResidualBlock(fine)

    def forward(self, deep: Tensor, fine: Tensor) -> Tensor:
        wide = F.interpolate(self.narrow(deep), scale_factor=2.0, mode="nearest")
        return self.block(F.relu(self.mix(fine + wide)))


class Opposite(nn.Module):
    """x + convolutions of x and its mirror image about the middle column.

    A new layer is the identity.
    """

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
    convert the input to float32 and double the memory traffic."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def _normalised(before: int, after: int, stride: int = 1) -> nn.Module:
    """A convolution and a group normalisation of gcd(8, channels) groups."""
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, Norm(math.gcd(8, after), after))


def _sincos(rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """The positional encoding `[rows * columns, dim]`: half of the channels encode the row, the
    others the column."""
    frequency = torch.exp(
        -math.log(1000.0) * torch.arange(dim // 4, device=device) / max(1, dim // 4)
    )

    def wave(count: int) -> Tensor:
        angle = torch.arange(count, device=device)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    by_row = wave(rows)[:, None].expand(-1, columns, -1)
    by_column = wave(columns)[None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
