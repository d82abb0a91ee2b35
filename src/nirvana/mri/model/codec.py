"""The codec: multi-coil k-space to an image, through a frozen language model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.cuda_graphs import GraphCache, capturable
from nirvana.model.specialist import Specialist, own_state_dict
from nirvana.mri.classical.common import padded
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.model.conditioning import Conditioning
from nirvana.mri.model.config import START_STEPS, START_WEIGHT, CodecConfig
from nirvana.mri.model.iterate import Iterate
from nirvana.mri.model.layout import crop, pad_to_patches, to_channels, to_complex, token_map
from nirvana.mri.model.operator import MeasuredKspace, conjugate, reduce, solve
from nirvana.mri.model.sense_cascade import SenseCascade
from nirvana.mri.model.unet import build_decoder, build_unet
from nirvana.mri.model.varnet import Cascade, Sensitivities
from nirvana.mri.model.vit import PatchEncoder
from nirvana.mri.physics.calibration import soft_espirit
from nirvana.mri.physics.fourier import energy, fft2c, ifft2c, rss
from nirvana.mri.physics.partial_fourier import complete
from nirvana.mri.physics.pattern import Extent, central_block, checked_pattern, slice_patterns
from nirvana.mri.physics.sense import combine_coils, principal_coil

ENCODER_PARTS = ("sensitivities", "conditioning", "encoder_cascades", "encoder", "specialist")
"""Modules of a `CodecModel` before its image decoder: what stage 1 of a training trains."""


def in_encoder(name: str) -> bool:
    """Whether a parameter of a `CodecModel`, by its name, is part of the encoder."""
    return name.partition(".")[0] in ENCODER_PARTS


class KspaceEncoding(NamedTuple):
    """The state of a codec before the backbone."""

    iterate: Iterate
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


class CodecImages(NamedTuple):
    """Images of some slices, all of the same coil images and on the scale of the input."""

    magnitude: Tensor  # [B, H, W], root sum of squares
    # complex [B, H, W], by the first set of sensitivities, see `sense.combine_coils`
    combined: Tensor
    coils: Tensor  # complex [B, coils, H, W]


class SliceBatch(NamedTuple):
    """Some slices of a scan, as `CodecModel.forward` takes them."""

    kspace: Tensor  # complex64 [B, coils, H, W], zero where not measured
    mask: Tensor  # bool [W] or [B or 1, H or 1, W]
    calibration: Tensor  # bool of the same shape, or complex64 [B, coils, H, W]


class CodecModel(nn.Module):
    """Multi-coil k-space to an image:

        sensitivities -> cascades -> combined image -> ViT -> tokens -> frozen backbone -> image
        decoder -> correction per coil -> cascades -> data consistency -> root sum of squares

    Data consistency replaces the measured samples of the result by the measurement. Conjugate
    gradient cascades also leave empty what the scan did not acquire, see `operator.acquired`.

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
            mask: bool `[W]` or `[B, W]`, the measured columns, or `[B or 1, H, W]`, points.
            calibration: bool of the same shape, their central block, see
                `masks.calibration_columns`; or complex `[B, coils, H, W]`, samples of a separate
                scan from which the sensitivities are estimated.
            scale: `[B]`, the brightness that is treated as 1; `Acquisition.scale` is that of a
                whole volume.
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
        with torch.autocast(y.device.type, enabled=False):
            samples, region = _calibration_samples(y, calibration)
            return InitialMaps(*soft_espirit(samples, region, self.config.map_sets))

    def encode_kspace(
        self,
        y: Tensor,
        mask: Tensor,
        calibration: Tensor,
        scale: Tensor,
        initial: InitialMaps | None = None,
    ) -> KspaceEncoding:
        """Sensitivities, first cascades and combined image; arguments as of `forward`."""
        mask, y = _by_slice(mask), y / scale[:, None, None, None]
        measured = MeasuredKspace.of(y, mask)
        samples, region = _calibration_samples(y, calibration)
        if self.config.maps == "network":
            maps = self.sensitivities(samples * region[:, None])[:, None]
            initial = InitialMaps(maps, torch.ones_like(maps[:, :, 0].real))
        elif initial is None:
            initial = self.initial_maps(y, calibration)
        assert initial is not None
        scan = None if self.conditioning is None else self.conditioning(y, mask, region)
        maps = measured.to_middle(initial.maps)
        iterate = self._start(Iterate(measured, maps, initial.certainty, scan))
        for cascade in self.encoder_cascades:
            iterate = cascade(iterate)
        image, padding = pad_to_patches(to_channels(iterate.images[:, 0]))
        return KspaceEncoding(iterate, image, padding)

    def _start(self, iterate: Iterate) -> Iterate:
        """The iterate before the first cascade: the measured k-space, or an image."""
        measured, maps = iterate.measured, iterate.maps
        if self.config.data_consistency == "gradient":
            return replace(iterate, k=measured.y)
        if self.config.start == "zero_filled":
            x = reduce(measured.images(measured.y), conjugate(maps))
        else:
            zero = torch.zeros_like(maps[:, :, 0])
            weight = torch.full_like(zero[:, :1, :1, :1].real, START_WEIGHT)
            x = solve(measured, maps, weight, zero, START_STEPS)
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
        images = rss(self._coil_images(encoding, hidden))
        return encoding.iterate.measured.from_middle(images) * scale[:, None, None]

    def _coil_images(self, encoding: KspaceEncoding, hidden: Tensor | None) -> Tensor:
        """Complex `[B, coils, H, W]`, middle first, divided by the input's scale; see
        `decode_image`."""
        iterate, image, padding = encoding
        if self.config.correction != "none":
            maps = () if hidden is None else (token_map(hidden, image.shape[2]),)
            correction = to_complex(crop(self.decoder(image, *maps), padding).float())
            iterate = iterate.corrected(correction)
        for cascade in self.image_cascades:
            iterate = cascade(iterate)
        measured = iterate.measured
        k = torch.where(measured.mask, measured.y, iterate.coil_kspace)
        if self.config.data_consistency == "conjugate_gradient":
            k = measured.within_acquired(k)
        return measured.images(k)

    def coil_images(
        self,
        y: Tensor,
        mask: Tensor,
        calibration: Tensor,
        scale: Tensor,
        initial: InitialMaps | None = None,
    ) -> tuple[Tensor, Iterate]:
        """The images of all coils, complex `[B, coils, H, W]`, divided by `scale`, and the iterate
        before the correction; arguments as of `forward`."""
        encoding = self.encode_kspace(y, mask, calibration, scale, initial)
        hidden = None
        if self.config.correction == "tokens":
            hidden, _ = self.specialist(self.encoder(encoding.image), None)
        measured = encoding.iterate.measured
        return measured.from_middle(self._coil_images(encoding, hidden)), encoding.iterate

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
            mask: bool, see `physics.pattern`; what lies outside of it is ignored.
            batch_size: slices at once.
            progress: called with the number of slices just done.

        Returns:
            float32 `[slices, H, W]` on the CPU.

        Raises:
            InputError: the mask has another size, or no central block of two columns from which
                the coils could be calibrated.
        """
        pattern = checked_pattern(mask.cpu().numpy(), tuple(kspace.shape), "k-space")
        images = []
        for part in self.images(Acquisition(kspace.cpu().numpy(), pattern), batch_size):
            images.append(part.magnitude)
            if progress is not None:
                progress(len(part.magnitude))
        return torch.cat(images)

    @torch.inference_mode()
    def images(self, acquisition: Acquisition, batch_size: int = 4) -> Iterator[CodecImages]:
        """Reconstructs a scan, one batch of slices after another.

        Args:
            acquisition: the measured k-space.
            batch_size: slices at once.

        Yields:
            The images of each batch, float32 and complex64: on the CPU, those of the coils on the
            codec's device, where the next batch may overwrite them.

        Raises:
            InputError: the coils cannot be calibrated.
        """
        acquisition.require_calibration()
        device, extent = self.device, acquisition.extent
        batches: Iterable[SliceBatch] = slice_batches(acquisition, batch_size, device)
        if device.type == "cpu":
            scale = torch.tensor(acquisition.scale)
        else:  # the host takes longer for the scale than a GPU for the whole reconstruction
            one = [*batches] if len(acquisition) <= batch_size else None
            batches = one or slice_batches(acquisition, batch_size, device)
            scale = brightness(one or slice_batches(acquisition, batch_size, device))
        coil = principal_coil(torch.from_numpy(acquisition.coil_gram)).to(device)
        # The completion of a missing side moves windows to the device, which no graph may.
        graphed = device.type == "cuda" and capturable() and extent is None
        for batch in batches:
            inputs = (*batch, scale.expand(len(batch.kspace)), coil)
            inputs = (*inputs, *(self.initial_maps(batch.kspace, batch.calibration) or ()))
            if graphed:
                found = self._graphs(self, self.batch_images, *inputs)
            else:
                found = self.batch_images(*inputs, extent=extent)
            yield CodecImages(found.magnitude.float().cpu(), found.combined.cpu(), found.coils)

    def batch_images(
        self,
        y: Tensor,
        mask: Tensor,
        calibration: Tensor,
        scale: Tensor,
        coil: Tensor,
        *initial: Tensor,
        extent: Extent | None = None,
    ) -> CodecImages:
        """The images of a batch; arguments as of `forward`, `sense.combine_coils` and
        `partial_fourier.complete`, `initial` the fields of `InitialMaps`, if any."""
        given = InitialMaps(*initial) if initial else None
        coils, iterate = self.coil_images(y, mask, calibration, scale, given)
        if extent is not None:
            coils = torch.stack([ifft2c(complete(k, extent)) for k in fft2c(coils)])
        sensitivities = iterate.measured.from_middle(iterate.maps[:, 0])
        scale = scale[:, None, None]
        combined = combine_coils(coils, sensitivities, coil)
        return CodecImages(rss(coils) * scale, combined * scale, coils * scale[..., None])

    @property
    def device(self) -> torch.device:
        """Where the codec's parameters are."""
        return next(self.parameters()).device


def slice_batches(
    acquisition: Acquisition, batch_size: int, device: torch.device
) -> Iterator[SliceBatch]:
    """The slices of a scan, some at a time.

    Args:
        acquisition: the measured k-space.
        batch_size: slices at once.
        device: where they are put.
    """
    pattern = acquisition.pattern
    for first in range(0, len(acquisition), batch_size):
        indices = range(first, min(first + batch_size, len(acquisition)))
        mask = pattern if pattern.ndim == 1 else slice_patterns(pattern)
        if pattern.ndim == 3 and len(pattern) > 1:
            mask = pattern[first : indices.stop]
        if acquisition.reference is None:
            calibration = _central(mask, acquisition.size[0])
        else:
            blocks = [padded(acquisition.calibration(i), acquisition.size) for i in indices]
            calibration = np.stack(blocks)
        samples = np.stack([acquisition.samples(index) for index in indices])
        arrays = (samples, np.array(mask), calibration)
        samples, mask, calibration = (torch.from_numpy(x).to(device) for x in arrays)
        yield SliceBatch(samples * _by_slice(mask)[:, None], mask, calibration)


def brightness(batches: Iterable[SliceBatch]) -> Tensor:
    """`Acquisition.scale` of the slices of some batches, computed where they are: a scalar."""
    # Where the middle of an axis lies changes phases and places, but no magnitude.
    squares = [energy(torch.fft.ifft2(each.kspace, norm="ortho"), 1).amax() for each in batches]
    return torch.stack(squares).amax().sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def _central(masks: np.ndarray, height: int) -> np.ndarray:
    """The central blocks of masks `[W]` or `[B, H or 1, W]`, bool of the same shape."""
    central = np.zeros_like(masks)
    parts = zip(masks, central, strict=True) if masks.ndim == 3 else [(masks[None], central[None])]
    for mask, block in parts:
        rows, columns = central_block(mask, height)
        block[rows if len(mask) > 1 else slice(None), columns] = True
    return central


def _by_slice(mask: Tensor) -> Tensor:
    """A mask of `CodecModel.forward` as `[B or 1, H or 1, W]`."""
    return mask if mask.ndim == 3 else mask.view(-1, 1, mask.shape[-1])


def _calibration_samples(y: Tensor, calibration: Tensor) -> tuple[Tensor, Tensor]:
    """The k-space `[B, coils, H, W]` that calibrates the coils, and its bool region
    `[B or 1, H or 1, W]`; arguments as of `CodecModel.forward`."""
    if calibration.is_complex():
        return calibration, (calibration != 0).any(1)
    return y, _by_slice(calibration)


def _cascades(count: int, config: CodecConfig) -> nn.ModuleList:
    kind = Cascade if config.data_consistency == "gradient" else SenseCascade
    return nn.ModuleList(kind(config) for _ in range(count))
