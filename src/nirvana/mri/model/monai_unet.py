"""U-Nets of MONAI's blocks with instance normalisation, as in the published E2E-VarNet."""

from monai.networks.nets.basic_unet import BasicUNet, Down, TwoConv, UpCat
from torch import Tensor, nn

ACTIVATION = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
NORM = ("instance", {"affine": True})


def instance_unet(features: tuple[int, ...]) -> BasicUNet:
    """MONAI's U-Net from two channels to two; six numbers of features in MONAI's order."""
    return BasicUNet(
        spatial_dims=2, in_channels=2, out_channels=2, features=features, act=ACTIVATION, norm=NORM
    )


class InstanceDecoder(nn.Module):
    """A U-Net with features at scales 1, 1/2, 1/4, 1/8, whose deepest level, 1/16, is an input."""

    def __init__(self, features: tuple[int, ...], context: int):
        super().__init__()
        first, second, third, fourth = features
        common = {"act": ACTIVATION, "norm": NORM, "bias": True}
        self.read = TwoConv(2, 2, first, **common)
        self.down = nn.ModuleList(
            Down(2, a, b, **common) for a, b in ((first, second), (second, third), (third, fourth))
        )
        self.tokens = nn.Conv2d(context, fourth, 1)
        self.up = nn.ModuleList(
            UpCat(2, a, b, b, halves=False, **common)
            for a, b in ((fourth, fourth), (fourth, third), (third, second), (second, first))
        )
        self.write = nn.Conv2d(first, 2, 1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, context: Tensor) -> Tensor:
        """A correction `[B, 2, H, W]` of images `[B, 2, H, W]`, given maps
        `[B, context, H/16, W/16]`."""
        levels = [self.read(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = self.tokens(context)
        for up, level in zip(self.up, reversed(levels), strict=True):
            x = up(x, level)
        return self.write(x)
