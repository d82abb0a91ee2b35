"""The codec: multi-coil k-space to an image, through a frozen language model."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.cuda_graphs import GraphCache, capturable
from nirvana.errors import InputError
from nirvana.model.specialist import Specialist, own_state_dict
from nirvana.mri.model.conditioning import Conditioning
from nirvana.mri.model.config import START_STEPS, START_WEIGHT, CodecConfig
from nirvana.mri.model.iterate import Iterate
from nirvana.mri.model.layout import crop, pad_to_patches, to_channels, to_complex, token_map
from nirvana.mri.model.operator import Measurement, acquired, conjugate, reduce, solve
from nirvana.mri.model.sense_cascade import SenseCascade
from nirvana.mri.model.unet import build_decoder, build_unet
from nirvana.mri.model.varnet import Cascade, Sensitivities
from nirvana.mri.model.vit import PatchEncoder
from nirvana.mri.physics.calibration import soft_espirit
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import calibration_columns, require_calibration

ENCODER_PARTS = ("sensitivities", "conditioning", "encoder_cascades", "encoder", "specialist")
"""Modules of a `CodecModel` before its image decoder: what stage 1 of a training trains."""


def in_encoder(name: str) -> bool:
    """Whether a parameter of a `CodecModel`, by its name, is part of the encoder."""
    return name.partition(".")[0] in ENCODER_PARTS


class KspaceEncoding(NamedTuple):
    """The state of a codec before the backbone."""

    iterate: Iterate
    rows: Tensor  # bool [B or 1, H], those that the scan acquired; the others are zero-padding
    columns: Tensor  # bool [B or 1, W], likewise
    image: Tensor  # [B, 2, H', W'], combined (the first set), padded to patches
    padding: tuple[int, int, int, int]  # of the image, for `layout.crop`


class InitialMaps(NamedTuple):
    """Coil sensitivities before any training, see `calibration.soft_espirit`."""

    maps: Tensor  # complex [B, sets, coils, H, W]
    certainty: Tensor  # [B, sets, H, W]


class CodecOutput(NamedTuple):
    """The outputs of a codec."""

    # [B, H, W], root sum of squares, on the scale of the input; None if it was not requested
    image: Tensor | None
    # [B, M, vocabulary], at position i of text token i + 1; None without text
    logits: Tensor | None


class CodecModel(nn.Module):
    """Multi-coil k-space to an image:

        sensitivities -> cascades -> combined image -> ViT -> tokens -> frozen backbone -> image
        decoder -> correction per coil -> cascades -> data consistency -> root sum of squares

    Data consistency replaces the measured samples of the result by the measurement, and sets
    those to zero that lie outside of what the scan acquired (`operator.acquired`).

    Args:
        config: the parts and their sizes.
        backbone: the frozen language model; None is the identity.
    """

    def __init__(self, config: CodecConfig, backbone: PreTrainedModel | None):
        super().__init__()
        self.config = config
        dim = config.token_dim if backbone is None else backbone.config.hidden_size
        if config.maps == "network":
            self.sensitivities = Sensitivities(config)
        self.conditioning = Conditioning(config.conditioning) if config.conditioning else None
        self.encoder_cascades = _cascades(config.encoder_cascades, config)
        if config.correction == "tokens":
            self.encoder = PatchEncoder(config, dim)
            self.specialist = Specialist(backbone, dim)
            self.decoder = build_decoder(config, dim)
        elif config.correction == "unet":
            self.decoder = build_unet(config, config.unet_features)
        self.image_cascades = _cascades(config.image_cascades, config)
        self._graphs = GraphCache()

    @property
    def num_trained(self) -> int:
        """Number of the codec's own parameters, without those of the backbone."""
        own = own_state_dict(self)
        return sum(p.numel() for name, p in self.named_parameters() if name in own)

    @property
    def backbone(self) -> PreTrainedModel | None:
        """The frozen language model, or None."""
        return self.specialist.backbone if self.config.correction == "tokens" else None

    def forward(
        self,
        y: Tensor,
        mask: Tensor,
        calibration: Tensor,
        scale: Tensor,
        text: Tensor | None = None,
        image: bool = True,
        initial: InitialMaps | None = None,
    ) -> CodecOutput:
        """Reconstructs a batch of slices, and predicts the tokens of a text about them.

        Args:
            y: complex `[B, coils, H, W]`, zero where not measured.
            mask: bool `[W]` or `[B, W]`, the measured columns, or `[B, H, W]`, the measured
                samples.
            calibration: bool of the same shape, their central block, see
                `masks.calibration_columns`.
            scale: `[B]`, the brightness that is treated as 1; `volume_scale` gives that of a whole
                volume.
            text: int64 `[B, M]`, token ids of prompt and report, which the backbone reads after the
                image.
            image: whether the image is computed.
            initial: of `initial_maps`, which a CUDA graph cannot compute; computed here if None.

        Raises:
            ValueError: there is text, but the codec's correction uses no tokens.
        """
        encoding = self.encode_kspace(y, mask, calibration, scale, initial)
        hidden = logits = None
        if self.config.correction == "tokens":
            hidden, logits = self.specialist(self.encoder(encoding.image), text)
        elif text is not None:
            raise ValueError("text needs tokens: this codec's correction reads none")
        return CodecOutput(self.decode_image(encoding, hidden, scale) if image else None, logits)

    @torch.no_grad()
    def initial_maps(self, y: Tensor, calibration: Tensor) -> InitialMaps | None:
        """The sensitivities that the cascades start from; None where a network estimates them.

        Arguments are as of `forward`.
        """
        if self.config.maps == "network":
            return None
        calibration = calibration if calibration.ndim > 1 else calibration[None]
        with torch.autocast(y.device.type, enabled=False):
            return InitialMaps(*soft_espirit(y, calibration, self.config.map_sets))

    def encode_kspace(
        self,
        y: Tensor,
        mask: Tensor,
        calibration: Tensor,
        scale: Tensor,
        initial: InitialMaps | None = None,
    ) -> KspaceEncoding:
        """Sensitivities, first cascades and combined image; arguments as of `forward`."""
        mask, calibration = (m if m.ndim > 1 else m[None] for m in (mask, calibration))
        y = y / scale[:, None, None, None]
        if self.config.maps == "espirit" and initial is None:
            initial = self.initial_maps(y, calibration)
        measurement = Measurement.of(y, mask)
        if initial is None:
            region = Measurement.of(y, calibration).mask
            maps = self.sensitivities(measurement, region)[:, None]
            certainty = torch.ones_like(maps[:, :, 0].real)
        else:
            maps, certainty = measurement.to_middle(initial.maps), initial.certainty
        scan = None if self.conditioning is None else self.conditioning(y, mask, calibration)
        iterate = self._start(Iterate(measurement, maps, certainty, scan))
        for cascade in self.encoder_cascades:
            iterate = cascade(iterate)
        image, padding = pad_to_patches(to_channels(iterate.images[:, 0]))
        sampled = mask if mask.ndim == 2 else mask.any(1)
        rows, columns = acquired((y != 0).any(1).any(-1)), acquired(sampled)
        return KspaceEncoding(iterate, rows, columns, image, padding)

    def _start(self, iterate: Iterate) -> Iterate:
        """The iterate before the first cascade: the measured k-space, or an image."""
        measurement, maps = iterate.measurement, iterate.maps
        if self.config.data_consistency == "gradient":
            return replace(iterate, k=measurement.y)
        if self.config.start == "zero_filled":
            x = reduce(measurement.images(measurement.y), conjugate(maps))
        else:
            zero = torch.zeros_like(maps[:, :, 0])
            weight = torch.full_like(zero[:, :1, :1, :1].real, START_WEIGHT)
            x = solve(measurement, maps, weight, zero, START_STEPS)
        return replace(iterate, x=x, z=x)

    def decode_image(
        self, encoding: KspaceEncoding, hidden: Tensor | None, scale: Tensor
    ) -> Tensor:
        """Correction, last cascades and data consistency.

        Args:
            encoding: of `encode_kspace`.
            hidden: `[B, N, D]`, the backbone's hidden states of the image's tokens; None unless the
                correction uses tokens.
            scale: `[B]`, as of `forward`.

        Returns:
            Magnitude images, real `[B, H, W]`.
        """
        iterate, rows, columns, image, padding = encoding
        if self.config.correction != "none":
            maps = () if hidden is None else (token_map(hidden, image.shape[2]),)
            correction = to_complex(crop(self.decoder(image, *maps), padding).float())
            iterate = iterate.corrected(correction)
        for cascade in self.image_cascades:
            iterate = cascade(iterate)
        measurement = iterate.measurement
        k = torch.where(measurement.mask, measurement.y, iterate.coil_kspace)
        coils = measurement.images(measurement.within(k, rows, columns))
        return measurement.from_middle(rss(coils)) * scale[:, None, None]

    @torch.inference_mode()
    def reconstruct(
        self,
        kspace: Tensor,
        mask: Tensor,
        batch_size: int = 4,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Reconstructs a volume, a batch of slices at a time.

        Args:
            kspace: complex `[slices, coils, H, W]`.
            mask: bool `[W]`; columns outside it are ignored.
            batch_size: slices at once.
            progress: called with the number of slices just done.

        Returns:
            float32 `[slices, H, W]` on the CPU.

        Raises:
            InputError: the mask has another width, or no central block of two columns from which
                the coils could be calibrated.
        """
        if mask.shape != kspace.shape[-1:]:
            raise InputError(
                f"the mask has {tuple(mask.shape)} columns, k-space has {kspace.shape[-1]}"
            )
        require_calibration(mask, "the mask")
        device = next(self.parameters()).device
        calibration = calibration_columns(mask).to(device)
        mask = mask.to(device)
        scale = volume_scale(kspace, mask)

        def image_of(*inputs: Tensor) -> Tensor:
            return self(*inputs[:4], initial=InitialMaps(*inputs[4:]) if inputs[4:] else None).image

        graphed = device.type == "cuda" and capturable()
        images = []
        for part in kspace.split(batch_size):
            part = part.to(device, torch.complex64) * mask
            inputs = (part, mask, calibration, scale.expand(len(part)))
            inputs = (*inputs, *(self.initial_maps(part, calibration) or ()))
            image = self._graphs(self, image_of, *inputs) if graphed else image_of(*inputs)
            images.append(image.float().cpu())
            if progress is not None:
                progress(len(part))
        return torch.cat(images)


def volume_scale(kspace: Tensor, mask: Tensor) -> Tensor:
    """The brightest pixel of a volume's zero-filled root-sum-of-squares images.

    Args:
        kspace: complex `[slices, coils, H, W]`.
        mask: bool `[W]`, on the device where this is computed.

    Returns:
        A float32 scalar above 0.
    """
    parts = (part.to(mask.device, torch.complex64) * mask for part in kspace.split(8))
    brightest = torch.stack([rss(ifft2c(part)).max() for part in parts]).max()
    return brightest.clamp(min=torch.finfo(torch.float32).tiny)


def _cascades(count: int, config: CodecConfig) -> nn.ModuleList:
    kind = Cascade if config.data_consistency == "gradient" else SenseCascade
    return nn.ModuleList(kind(config) for _ in range(count))
