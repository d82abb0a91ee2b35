"""What the studies compare: classical methods, and codecs of about as many trained parameters."""

from dataclasses import dataclass, replace

from nirvana.mri.data.simulation.config import REALISTIC, Simulation
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.train.config import StageSection

# Those with settings for each acceleration, by their field in `nirvana.mri.classical.peers.Peers`.
PEERS = {
    "sense": "sense",
    "bart_l2": "bart-sense",
    "grappa": "grappa",
    "l1_wavelet": "l1-wavelet",
    "bart_l1": "bart-l1-wavelet",
}
CLASSICAL = ("zero-filled", *PEERS.values())

# 8 cascades each; those of the codec are narrower, in exchange for ViT and image decoder.
TOKENS = CodecConfig(
    backbone="nirvana",
    sensitivity_features=(8, 16, 32),
    cascade_features=(32, 64, 96),
    image_cascades=8,
    vit_dim=96,
    vit_depth=2,
    vit_heads=4,
    decoder_features=(16, 32, 48, 64),
)
VARNET = replace(TOKENS, backbone="none", correction="none")

# Trained on scans of smooth phase, even coils and white noise.
SMOOTH: dict[str, CodecConfig] = {
    "unet": replace(VARNET, correction="unet", unet_features=(48, 96, 192, 288), image_cascades=0),
    "e2e-varnet": replace(VARNET, cascade_features=(32, 64, 112)),
    "none": replace(TOKENS, backbone="none"),
    "transformer": replace(TOKENS, backbone="transformer"),
    "gated_deltanet": replace(TOKENS, backbone="gated_deltanet"),
    "nirvana-without-trigger": replace(TOKENS, backbone="nirvana-without-trigger"),
    "nirvana": TOKENS,
}

# 12 cascades; those of the variants with tokens are a little narrower.
CODEC = CodecConfig(
    backbone="none",
    correction="none",
    maps="espirit",
    map_sets=2,
    map_features=(16, 32),
    data_consistency="conjugate_gradient",
    conditioning=32,
    cascade_features=(48, 96, 144),
    image_cascades=12,
)
SENSE_TOKENS = replace(
    CODEC, correction="tokens", cascade_features=(48, 96, 136), vit_dim=96, vit_depth=2
)
WIDE_VARNET = replace(VARNET, cascade_features=(48, 96, 144), image_cascades=12)

# Trained on scans that look measured.
MEASURED: dict[str, CodecConfig] = {
    "codec": CODEC,
    "measured-unet": replace(
        VARNET, correction="unet", unet_features=(84, 168, 336, 504), image_cascades=0
    ),
    "measured-e2e-varnet": WIDE_VARNET,
    "measured-none": SENSE_TOKENS,
    "measured-transformer": replace(SENSE_TOKENS, backbone="transformer"),
    "measured-gated_deltanet": replace(SENSE_TOKENS, backbone="gated_deltanet"),
    "measured-nirvana": replace(SENSE_TOKENS, backbone="nirvana"),
    # The codec without one of its parts each.
    "one-set": replace(CODEC, map_sets=1),
    "fixed-maps": replace(CODEC, map_features=()),
    "unconditioned": replace(CODEC, conditioning=0),
    "zero-filled-start": replace(CODEC, start="zero_filled"),
    "network-maps": replace(CODEC, maps="network", map_sets=1),
}

# Trained for a short time on scans that look measured, with as many parameters as those of
# `SMOOTH`: what is learned from is compared, not how long.
SHORT_CODEC = replace(CODEC, cascade_features=(32, 64, 96), image_cascades=8)
SHORT_TOKENS = replace(SENSE_TOKENS, cascade_features=(32, 64, 80), image_cascades=8)
SHORT: dict[str, CodecConfig] = {
    "short-codec": SHORT_CODEC,
    "short-e2e-varnet": SMOOTH["e2e-varnet"],
    "short-unet": SMOOTH["unet"],
    # Tokens through no backbone, the packaged one, and one of its architecture with random weights.
    "short-tokens": SHORT_TOKENS,
    "short-pretrained": replace(SHORT_TOKENS, backbone="nirvana"),
    "short-random": replace(SHORT_TOKENS, backbone="nirvana", weights="random"),
    "short-codec-prompts": replace(SHORT_CODEC, prompts=5, cascade_features=(32, 64, 92)),
    # The codec itself, trained otherwise: see `SHORT_RECIPES`.
    "short-codec-ssdu": SHORT_CODEC,
    "short-codec-points": SHORT_CODEC,
    "short-codec-sizes": SHORT_CODEC,
}

CODECS = {**SMOOTH, **MEASURED, **SHORT}


@dataclass(frozen=True)
class Recipe:
    """How codecs are trained.

    Attributes:
        batch_size: slices in a batch.
        sizes: H and W of batches.
        coils: numbers of coils of batches.
        lr: highest learning rate.
        stage: weights of the loss.
        simulation: of the scans.
        arrays: whether half of the coils are those of measured arrays.
        points: share of batches with masks of points.
    """

    batch_size: int
    sizes: tuple[tuple[int, int], ...]
    coils: tuple[int, ...]
    lr: float
    stage: StageSection
    simulation: Simulation
    arrays: bool
    points: float = 0.0


SMOOTH_RECIPE = Recipe(
    batch_size=16,
    sizes=((160, 128), (224, 192)),
    coils=(8, 8, 8, 4, 1),
    lr=1.5e-3,
    stage=StageSection(l1_weight=4.0),
    simulation=Simulation(gamma=(0.6, 1.6)),
    arrays=False,
)
MEASURED_RECIPE = Recipe(
    batch_size=12,
    sizes=((160, 128), (192, 176), (256, 224)),
    coils=(8, 8, 8, 4, 12, 1),
    lr=1e-3,
    stage=StageSection(l1_weight=2.0, l2_weight=4.0),
    simulation=REALISTIC,
    arrays=True,
)


# Few shapes, because every one of them costs the capture of a CUDA graph; small batches, because
# steps count for more than slices at the start of a training.
SHORT_RECIPE = replace(
    MEASURED_RECIPE, batch_size=4, sizes=((160, 128), (224, 192)), coils=(8, 8, 8, 4)
)
SHORT_RECIPES = {
    "short-codec-ssdu": replace(SHORT_RECIPE, stage=StageSection(loss="ssdu")),
    "short-codec-points": replace(SHORT_RECIPE, points=0.3),
    "short-codec-sizes": replace(
        SHORT_RECIPE, sizes=((96, 96), (160, 128), (224, 192), (320, 256))
    ),
}


def recipe_of(method: str) -> Recipe:
    """How the codec of a name is trained."""
    if method in SHORT:
        return SHORT_RECIPES.get(method, SHORT_RECIPE)
    return MEASURED_RECIPE if method in MEASURED else SMOOTH_RECIPE


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
