"""What the study compares: classical methods, and codecs of about as many trained parameters."""

from dataclasses import replace

from nirvana.mri.model.config import CodecConfig

CLASSICAL = ("zero-filled", "sense", "bart-sense", "l1-wavelet", "bart-l1-wavelet")

# 12 cascades; those of the variants with tokens are a little narrower.
CODEC = CodecConfig(
    backbone="none",
    correction="none",
    map_sets=2,
    cascade_features=(48, 96, 144),
    image_cascades=12,
)
WITH_TOKENS = replace(
    CODEC,
    correction="tokens",
    cascade_features=(48, 96, 136),
    vit_dim=96,
    vit_depth=2,
    vit_heads=4,
    decoder_features=(16, 32, 48, 64),
)
# E2E-VarNet: sensitivities by a network, gradient steps on k-space.
VARNET = replace(
    CODEC,
    maps="network",
    map_sets=1,
    map_features=(),
    data_consistency="gradient",
    start="zero_filled",
    conditioning=0,
)

CODECS: dict[str, CodecConfig] = {
    "unet": replace(VARNET, correction="unet", unet_features=(84, 168, 336, 504), image_cascades=0),
    "e2e-varnet": VARNET,
    "tokens": WITH_TOKENS,
    "transformer": replace(WITH_TOKENS, backbone="transformer"),
    "gated_deltanet": replace(WITH_TOKENS, backbone="gated_deltanet"),
    "nirvana": replace(WITH_TOKENS, backbone="nirvana"),
    "codec": CODEC,
    # The codec without one of its parts each.
    "one-set": replace(CODEC, map_sets=1),
    "fixed-maps": replace(CODEC, map_features=()),
    "unconditioned": replace(CODEC, conditioning=0),
    "zero-filled-start": replace(CODEC, start="zero_filled"),
    "network-maps": replace(CODEC, maps="network", map_sets=1),
}


def tiny(codec: CodecConfig) -> CodecConfig:
    """The same in a size that any machine trains in seconds, to try the study."""
    return replace(
        codec,
        sensitivity_features=(4, 4),
        cascade_features=(4, 8),
        map_features=codec.map_features and (4, 4),
        unet_features=(4, 8),
        image_cascades=min(codec.image_cascades, 2),
        vit_dim=16,
        vit_depth=1,
        decoder_features=(4, 4, 8, 8),
    )
