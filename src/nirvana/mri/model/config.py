"""The configuration of a codec: its parts and their sizes."""

from dataclasses import dataclass
from typing import Literal

from nirvana.errors import InputError
from nirvana.model.backbone import DEFAULT, Backbone

START_STEPS = 10  # conjugate-gradient steps before the first cascade
START_WEIGHT = 0.01  # of the squared norm in them


@dataclass(frozen=True)
class CodecConfig:
    """The parts of a codec and their sizes; `config.json` of a saved codec holds the same keys.

    The defaults are what files mean that lack a key. They are the cascades of E2E-VarNet; those on
    combined images, of the packaged codec, are ahead of them on measured scans.

    Attributes:
        backbone: kind of the frozen language model; "none" is the identity.
        weights: of the backbone: a folder or a packaged name, see `load_backbone`.
        unet: kind of every U-Net of the codec: "residual" (`residual_unet.ResidualUNet`) or
            "instance" (MONAI's U-Net with instance normalisation).
        correction: of the combined image between the cascades: "tokens" (ViT, backbone, image
            decoder), "unet" (a U-Net without tokens) or "none".
        maps: where the coil sensitivities come from: "espirit" (`calibration.soft_espirit`) or
            "network", a U-Net on each coil's calibration image, as in E2E-VarNet.
        map_sets: sets of sensitivities; two for objects that fold over into the field of view.
        map_features: channels of the U-Net by which every cascade refines the sensitivities; empty
            for none.
        data_consistency: of the cascades: "conjugate_gradient", on combined images
            (`sense_cascade.SenseCascade`), or "gradient", on k-space, as in E2E-VarNet.
        consistency_steps: conjugate-gradient steps of a cascade.
        start: of conjugate-gradient cascades: "sense", `START_STEPS` such steps, or "zero_filled".
        conditioning: size of the vector by which mask and noise level of a scan change the U-Nets'
            gains and the weight of the data; 0 for none.
        prompts: learned components that each decoder level of a conjugate-gradient cascade's U-Net
            mixes by its features and adds (`prompts.Prompt`); 0 for none.
        sensitivity_features: channels of the sensitivity U-Net: at 1/2, 1/4 ... of the resolution
            (at most four numbers), or the six numbers of MONAI's U-Net.
        cascade_features: of every cascade's U-Net, likewise.
        encoder_cascades: cascades before the tokens.
        image_cascades: cascades after the image decoder.
        vit_dim: width of the ViT on patches of 16 x 16 pixels, a multiple of 4 and of `vit_heads`.
        vit_depth: number of its layers.
        vit_heads: number of its attention heads.
        vit_stem: from patches to vectors: "patches", one linear map of each, or "convolutions"
            (`vit.ConvolutionalStem`).
        decoder_features: channels of the image decoder at four levels, down to 1/16 ("residual") or
            1/8 ("instance") of the resolution.
        unet_features: of the U-Net of correction "unet".
        token_dim: size of a token without a backbone, whose hidden size it otherwise is.

    Raises:
        InputError: sizes that are impossible or do not fit each other.
    """

    backbone: Backbone = "nirvana"
    weights: str = DEFAULT
    unet: Literal["residual", "instance"] = "residual"
    correction: Literal["tokens", "unet", "none"] = "tokens"
    maps: Literal["espirit", "network"] = "network"
    map_sets: int = 1
    map_features: tuple[int, ...] = ()
    data_consistency: Literal["conjugate_gradient", "gradient"] = "gradient"
    consistency_steps: int = 4
    start: Literal["sense", "zero_filled"] = "sense"
    conditioning: int = 0
    prompts: int = 0
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
        self._check_cascades()
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
                f"codec.backbone = {self.backbone!r} needs codec.correction = 'tokens', not "
                f"{self.correction!r}, which gives the backbone no tokens"
            )

    def _check_cascades(self) -> None:
        if self.data_consistency == "gradient":
            given = {"map_sets": 1, "map_features": (), "conditioning": 0, "prompts": 0}
            for name, right in given.items():
                if getattr(self, name) != right:
                    raise InputError(
                        f"codec.{name} = {getattr(self, name)} needs codec.data_consistency = "
                        f"'conjugate_gradient'; with 'gradient' it must be {right}"
                    )
        elif self.unet != "residual":
            raise InputError(
                "codec.data_consistency = 'conjugate_gradient' needs codec.unet = 'residual'"
            )
        if self.map_sets not in (1, 2) or (self.map_sets == 2 and self.maps == "network"):
            raise InputError(
                f"codec.map_sets = {self.map_sets} must be 1, or 2 with codec.maps = 'espirit'"
            )
        if self.consistency_steps < 1:
            raise InputError(
                f"codec.consistency_steps = {self.consistency_steps} must be at least 1"
            )
        for name in ("conditioning", "prompts"):
            if getattr(self, name) < 0:
                raise InputError(f"codec.{name} = {getattr(self, name)} must be at least 0")
        if len(self.map_features) > 2 or min(self.map_features, default=1) < 1:
            raise InputError(
                f"codec.map_features = {self.map_features} must be at most 2 numbers of channels, "
                "at least 1 each"
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
