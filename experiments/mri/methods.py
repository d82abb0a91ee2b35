"""What the study compares: classical methods, and codecs of about as many trained parameters."""

from dataclasses import replace

from nirvana.mri.model.config import CodecConfig

CLASSICAL = ("zero-filled", "sense", "bart-sense", "grappa", "l1-wavelet", "bart-l1-wavelet")

# 8 cascades each; those of the codec are narrower, in exchange for ViT and image decoder.
CODEC = CodecConfig(
    backbone="nirvana",
    sensitivity_features=(8, 16, 32),
    cascade_features=(32, 64, 96),
    image_cascades=8,
    vit_dim=96,
    vit_depth=2,
    vit_heads=4,
    decoder_features=(16, 32, 48, 64),
)
WITHOUT_TOKENS = replace(CODEC, backbone="none", correction="none")

CODECS: dict[str, CodecConfig] = {
    "unet": replace(
        WITHOUT_TOKENS, correction="unet", unet_features=(48, 96, 192, 288), image_cascades=0
    ),
    "e2e-varnet": replace(WITHOUT_TOKENS, cascade_features=(32, 64, 112)),
    "none": replace(CODEC, backbone="none"),
    "transformer": replace(CODEC, backbone="transformer"),
    "gated_deltanet": replace(CODEC, backbone="gated_deltanet"),
    "nirvana-without-trigger": replace(CODEC, backbone="nirvana-without-trigger"),
    "nirvana": CODEC,
}


def tiny(codec: CodecConfig) -> CodecConfig:
    """The same in a size that any machine trains in seconds, to try the study."""
    return replace(
        codec,
        sensitivity_features=(4, 4),
        cascade_features=(4, 8),
        unet_features=(4, 8),
        image_cascades=min(codec.image_cascades, 2),
        vit_dim=16,
        vit_depth=1,
        decoder_features=(4, 4, 8, 8),
    )
