"""The U-Net of residual blocks that refines complex images.

Blocks without normalisation and biases, as in DRUNet (Zhang et al., arXiv 2008.13751): the network
is homogeneous, f(a x) = a f(x) for a > 0, and launches half as many kernels as a normalised one.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + conv(relu(conv(x))), 3 x 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class ResidualUNet(nn.Module):
    """A U-Net whose finest level has half the resolution: pixels are first folded 2 x 2 into
    channels. The output of a new network is zero.

    Args:
        features: channels of the levels at 1/2, 1/4, 1/8 ... of the resolution.
        context: channels of a map that is added at the coarsest level; 0 for none.
    """

    def __init__(self, features: Sequence[int], context: int = 0):
        super().__init__()
        pairs = list(pairwise(features))
        self.read = nn.Conv2d(8, features[0], 3, padding=1, bias=False)
        self.before = nn.ModuleList(Block(a) for a, _ in pairs)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2, bias=False) for a, b in pairs)
        self.context = nn.Conv2d(context, features[-1], 1) if context else None
        self.middle = Block(features[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2, bias=False) for a, b in pairs)
        self.after = nn.ModuleList(Block(a) for a, _ in pairs)
        self.write = nn.Conv2d(features[0], 8, 3, padding=1, bias=False)
        nn.init.zeros_(self.write.weight)

    def forward(self, image: Tensor, context: Tensor | None = None) -> Tensor:
        """Applies the network.

        Args:
            image: `[B, 2, H, W]`, sides multiples of 2^levels.
            context: `[B, context, h, w]`, of the size of the coarsest level.

        Returns:
            `[B, 2, H, W]`.
        """
        x = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last)
        x = self.read(x)
        skips = []
        for block, down in zip(self.before, self.down, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        if self.context is not None and context is not None:
            x = x + self.context(context)
        x = self.middle(x)
        for up, block in zip(reversed(self.up), reversed(self.after), strict=True):
            x = block(up(x) + skips.pop())
        return F.pixel_shuffle(self.write(x), 2)
