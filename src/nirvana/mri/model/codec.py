"""The codec: multi-coil k-space to an image, through a frozen language model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.cuda_graphs import GraphCache, capturable
from nirvana.errors import InputError
from nirvana.model.specialist import Specialist, own_state_dict
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.layout import crop, pad_to_patches, to_channels, to_complex, token_map
from nirvana.mri.model.unet import build_decoder, build_unet
from nirvana.mri.model.varnet import Cascade, Sensitivities
from nirvana.mri.model.vit import PatchEncoder
from nirvana.mri.physics.fourier import from_middle, ifft2c, rss, to_columns, to_middle
from nirvana.mri.physics.masks import calibration_columns, require_calibration
from nirvana.mri.physics.sense import sens_expand, sens_reduce

ENCODER_PARTS = ("sensitivities", "encoder_cascades", "encoder", "specialist")
"""Modules of a `CodecModel` before its image decoder: what stage 1 of a training trains."""


def in_encoder(name: str) -> bool:
    """Whether a parameter of a `CodecModel`, by its name, is part of the encoder."""
    return name.partition(".")[0] in ENCODER_PARTS


class KspaceEncoding(NamedTuple):
    """The state of a codec before the backbone."""

    k: Tensor  # complex [B, coils, H, W], in image space along H, see `fourier.to_columns`
    y: Tensor  # the measured k-space, likewise, zero where not measured
    mask: Tensor  # bool [B or 1, 1, 1, W], the middle of W first
    sensitivities: Tensor  # complex [B, coils, H, W], the middle of W first
    image: Tensor  # [B, 2, H', W'], combined, padded to patches
    padding: tuple[int, int, int, int]  # of the image, for `layout.crop`


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

    Data consistency replaces the measured columns of the result by the measurement.

    Args:
        config: the parts and their sizes.
        backbone: the frozen language model; None is the identity.
    """

    def __init__(self, config: CodecConfig, backbone: PreTrainedModel | None):
        super().__init__()
        self.config = config
        dim = config.token_dim if backbone is None else backbone.config.hidden_size
        self.sensitivities = Sensitivities(config)
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
    ) -> CodecOutput:
        """Reconstructs a batch of slices, and predicts the tokens of a text about them.

        Args:
            y: complex `[B, coils, H, W]`, zero where not measured.
            mask: bool `[W]` or `[B, W]`, the measured columns.
            calibration: bool of the same shape, their central block, see
                `masks.calibration_columns`.
            scale: `[B]`, the brightness that is treated as 1; `volume_scale` gives that of a whole
                volume.
            text: int64 `[B, M]`, token ids of prompt and report, which the backbone reads after the
                image.
            image: whether the image is computed.

        Raises:
            ValueError: there is text, but the codec's correction uses no tokens.
        """
        encoding = self.encode_kspace(y, mask, calibration, scale)
        hidden = logits = None
        if self.config.correction == "tokens":
            hidden, logits = self.specialist(self.encoder(encoding.image), text)
        elif text is not None:
            raise ValueError("text needs tokens: this codec's correction reads none")
        return CodecOutput(self.decode_image(encoding, hidden, scale) if image else None, logits)

    def encode_kspace(
        self, y: Tensor, mask: Tensor, calibration: Tensor, scale: Tensor
    ) -> KspaceEncoding:
        """Sensitivities, first cascades and combined image; arguments as of `forward`."""
        mask, calibration = (to_middle(m).view(-1, 1, 1, m.shape[-1]) for m in (mask, calibration))
        y = to_columns(y) * mask / scale[:, None, None, None]
        sensitivities = self.sensitivities(y, calibration)
        k = y
        for cascade in self.encoder_cascades:
            k = cascade(k, y, mask, sensitivities)
        image, padding = pad_to_patches(to_channels(sens_reduce(k, sensitivities)))
        return KspaceEncoding(k, y, mask, sensitivities, image, padding)

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
        k, y, mask, sensitivities, image, padding = encoding
        if self.config.correction != "none":
            maps = () if hidden is None else (token_map(hidden, image.shape[2]),)
            correction = to_complex(crop(self.decoder(image, *maps), padding).float())
            k = k + sens_expand(correction, sensitivities)
        for cascade in self.image_cascades:
            k = cascade(k, y, mask, sensitivities)
        coils = torch.fft.ifft(torch.where(mask, y, k), norm="ortho")
        return from_middle(rss(coils)) * scale[:, None, None]

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
            return self(*inputs).image

        graphed = device.type == "cuda" and capturable()
        images = []
        for part in kspace.split(batch_size):
            part = part.to(device, torch.complex64)
            inputs = (part, mask, calibration, scale.expand(len(part)))
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
    return nn.ModuleList(Cascade(config) for _ in range(count))
