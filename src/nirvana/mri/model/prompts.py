"""Prompts of a U-Net's decoder levels, after PromptMR (Xin et al., arXiv 2309.13839)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 6  # of the learned components, which are resized to the level


class Prompt(nn.Module):
    """Adds a mixture of learned maps to a level's features:

        x + m conv(resize(sum_n softmax(W a / m)_n P_n))

    with a the mean absolute features of each channel and m their mean, so that the level stays
    homogeneous. The mixture lets one network treat kinds of images and masks differently. A new
    prompt adds zero.

    Args:
        components: number of maps P_n.
        channels: of the level.
    """

    def __init__(self, components: int, channels: int):
        super().__init__()
        self.components = nn.Parameter(torch.randn(components, channels, SIDE, SIDE))
        self.mix = nn.Linear(channels, components, bias=False)
        self.write = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.write.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the prompt to features `[B, channels, h, w]`."""
        mean = x.float().abs().mean((2, 3))
        level = mean.mean(1, keepdim=True)
        weights = self.mix(mean / level.clamp(min=1e-12)).float().softmax(1)
        mixed = torch.einsum("bn,nchw->bchw", weights, self.components)
        prompt = F.interpolate(self.write(mixed).float(), x.shape[-2:], mode="bilinear")
        return x + (level[..., None, None] * prompt).to(x.dtype)
