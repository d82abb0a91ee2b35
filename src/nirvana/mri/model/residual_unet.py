"""The U-Net of residual blocks that refines complex images.

Blocks without normalisation and biases, as in DRUNet (Zhang et al., arXiv 2008.13751): the network
is homogeneous, f(a x) = a f(x) for a > 0, and launches half as many kernels as a normalised one.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.mri.model.prompts import Prompt


class Block(nn.Module):
    """x + conv(g relu(conv(x))), 3 x 3, with a gain g for each channel, 1 unless given."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        hidden = F.relu(self.first(x))
        return x + self.second(hidden if gain is None else hidden * gain.to(hidden.dtype))


class ResidualUNet(nn.Module):
    """A U-Net whose finest level has half the resolution: pixels are first folded 2 x 2 into
    channels. The output of a new network is zero.

    Args:
        features: channels of the levels at 1/2, 1/4, 1/8 ... of the resolution.
        context: channels of a map that is added at the coarsest level; 0 for none.
        in_channels: of the image.
        out_channels: of the result.
        prompts: learned components of a `Prompt` at every level of the way up; 0 for none.

    Attributes:
        num_gains: channels of all blocks together.
    """

    def __init__(
        self,
        features: Sequence[int],
        context: int = 0,
        in_channels: int = 2,
        out_channels: int = 2,
        prompts: int = 0,
    ):
        super().__init__()
        pairs = list(pairwise(features))
        self.read = nn.Conv2d(4 * in_channels, features[0], 3, padding=1, bias=False)
        self.before = nn.ModuleList(Block(a) for a, _ in pairs)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2, bias=False) for a, b in pairs)
        self.context = nn.Conv2d(context, features[-1], 1) if context else None
        self.middle = Block(features[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2, bias=False) for a, b in pairs)
        self.prompts = nn.ModuleList(Prompt(prompts, a) for a, _ in pairs) if prompts else None
        self.after = nn.ModuleList(Block(a) for a, _ in pairs)
        self.write = nn.Conv2d(features[0], 4 * out_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.write.weight)
        self.num_gains = 2 * sum(features) - features[-1]

    def forward(
        self, image: Tensor, context: Tensor | None = None, gains: Tensor | None = None
    ) -> Tensor:
        """Applies the network.

        Args:
            image: `[B, in_channels, H, W]`, sides multiples of 2^levels.
            context: `[B, context, h, w]`, of the size of the coarsest level.
            gains: `[B, num_gains]`, of the blocks' channels in the order of their use; None for 1.

        Returns:
            `[B, out_channels, H, W]`.
        """
        gain_of = self._gains(gains)
        x = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last)
        x = self.read(x)
        skips = []
        for block, down in zip(self.before, self.down, strict=True):
            x = block(x, next(gain_of))
            skips.append(x)
            x = down(x)
        if self.context is not None and context is not None:
            x = x + self.context(context)
        x = self.middle(x, next(gain_of))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x) + skips.pop()
            if self.prompts is not None:
                x = self.prompts[level](x)
            x = self.after[level](x, next(gain_of))
        return F.pixel_shuffle(self.write(x), 2)

    def _gains(self, gains: Tensor | None) -> Iterator[Tensor | None]:
        """The gains of each block, `[B, channels, 1, 1]`, in the order of their use."""
        if gains is None:
            yield from repeat(None)
            return
        blocks = [*self.before, self.middle, *reversed(self.after)]
        sizes = [block.channels for block in blocks]  # type: ignore[union-attr]
        yield from gains[..., None, None].split(sizes, dim=1)  # type: ignore[arg-type]
