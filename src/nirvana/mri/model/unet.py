"""The choice between the two kinds of U-Net that a codec can be made of."""

from torch import nn

from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.residual_unet import ResidualUNet


def build_unet(
    config: CodecConfig,
    features: tuple[int, ...],
    in_channels: int = 2,
    out_channels: int = 2,
    prompts: int = 0,
) -> nn.Module:
    """A U-Net of the configured kind, from `[B, in_channels, H, W]` to `[B, out_channels, H, W]`.

    Args:
        config: of the codec.
        features: numbers of channels, see `CodecConfig.sensitivity_features`.
        in_channels: of the image.
        out_channels: of the result.
        prompts: see `ResidualUNet`; 0 for an "instance" U-Net.
    """
    if config.unet == "residual":
        return ResidualUNet(
            features, in_channels=in_channels, out_channels=out_channels, prompts=prompts
        )
    from nirvana.mri.model.monai_unet import instance_unet

    return instance_unet(features)


def build_decoder(config: CodecConfig, token_dim: int) -> nn.Module:
    """An image decoder of the configured kind: an image `[B, 2, H, W]` and a map of the tokens'
    hidden states `[B, token_dim, H/16, W/16]` to a correction `[B, 2, H, W]`."""
    if config.unet == "residual":
        return ResidualUNet(config.decoder_features, token_dim)
    from nirvana.mri.model.monai_unet import InstanceDecoder

    return InstanceDecoder(config.decoder_features, token_dim)
