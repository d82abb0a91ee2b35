"""Reconstruction from undersampled k-space on a frozen language model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.config import from_dict, to_dict
from nirvana.errors import InputError
from nirvana.files import atomic_folder
from nirvana.model.assets import resolve
from nirvana.model.backbone import fingerprint, load_backbone
from nirvana.model.specialist import Specialist, own_state_dict
from nirvana.mri.codec import (
    Cascade,
    CodecConfig,
    PatchEncoder,
    Sensitivities,
    build_decoder,
    build_unet,
    combine,
    crop,
    pad_to_patches,
    spread,
    to_channels,
    to_complex,
    token_map,
)
from nirvana.mri.graphs import Graphs, capturable
from nirvana.mri.physics import (
    calibration_columns,
    from_middle,
    ifft2c,
    require_calibration,
    rss,
    to_columns,
    to_middle,
)


class Seen(NamedTuple):
    """What a codec has made of k-space before the backbone reads it."""

    k: Tensor  # complex [B, coils, H, W], between the spaces, see `physics.to_columns`
    y: Tensor  # the measured, likewise, zero where not measured
    mask: Tensor  # bool [B or 1, 1, 1, W], the middle of W first
    sensitivities: Tensor  # complex [B, coils, H, W], the middle of W first
    image: Tensor  # [B, 2, H', W'], combined, padded to patches
    padding: tuple[int, int, int, int]


class CodecOutput(NamedTuple):
    """What a codec gives."""

    image: Tensor | None  # [B, H, W], RSS, magnitude, scaled as the input; None if not wanted
    logits: (
        Tensor | None
    )  # [B, M, vocabulary]; those at i predict text token i + 1; None without text


class CodecModel(nn.Module):
    """Multi-coil k-space to an image, SPEC section 7's path:

    sensitivities -> cascades -> combined image -> ViT -> tokens -> frozen backbone -> image
    decoder -> correction per coil + y -> cascades -> the measured columns put back -> RSS.

    Args:
        config: sizes.
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
        self._graphs = Graphs()

    @property
    def num_trained(self) -> int:
        """Parameters of the codec's own, those of the backbone not counted."""
        own = own_state_dict(self)
        return sum(p.numel() for name, p in self.named_parameters() if name in own)

    @property
    def backbone(self) -> PreTrainedModel | None:
        """The frozen language model."""
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
        """
        Args:
            y: complex `[B, coils, H, W]`, zero where not measured.
            mask: bool `[W]` or `[B, W]`, the measured columns.
            calibration: the central block of them, of the same shape; see
                `physics.calibration_columns`.
            scale: `[B]`, what brightness 1 is; `volume_scale` gives one for a whole volume.
            text: `[B, M]`, token ids of prompt and report, read by the backbone after the image.
            image: whether the image is wanted.

        Raises:
            ValueError: text for a codec without a backbone.
        """
        seen = self.see(y, mask, calibration, scale)
        hidden = logits = None
        if self.config.correction == "tokens":
            hidden, logits = self.specialist(self.encoder(seen.image), text)
        elif text is not None:
            raise ValueError("text needs tokens: this codec's correction reads none")
        return CodecOutput(self.show(seen, hidden, scale) if image else None, logits)

    def see(self, y: Tensor, mask: Tensor, calibration: Tensor, scale: Tensor) -> Seen:
        """Sensitivities, first cascades and combined image; arguments as of `forward`."""
        mask, calibration = (to_middle(m).view(-1, 1, 1, m.shape[-1]) for m in (mask, calibration))
        y = to_columns(y) * mask / scale[:, None, None, None]
        sensitivities = self.sensitivities(y, calibration)
        k = y
        for cascade in self.encoder_cascades:
            k = cascade(k, y, mask, sensitivities)
        image, padding = pad_to_patches(to_channels(combine(k, sensitivities)))
        return Seen(k, y, mask, sensitivities, image, padding)

    def show(self, seen: Seen, hidden: Tensor | None, scale: Tensor) -> Tensor:
        """Correction, last cascades, and the measured columns put back: `[B, H, W]`.

        Args:
            hidden: `[B, N, D]` of the image's tokens; None unless the correction reads tokens.
            scale: `[B]`.
        """
        k, y, mask, sensitivities, image, padding = seen
        if self.config.correction != "none":
            maps = () if hidden is None else (token_map(hidden, image.shape[2]),)
            correction = to_complex(crop(self.decoder(image, *maps), padding).float())
            k = k + spread(correction, sensitivities)
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
        """A volume, slice by slice.

        Args:
            kspace: complex `[slices, coils, H, W]`.
            mask: bool `[W]`; columns outside it are not looked at.
            batch_size: slices at once.
            progress: called with the number of slices just done.

        Returns: float32 `[slices, H, W]` on the CPU.

        Raises:
            InputError: when the mask has another width or no central block of two columns, from
                which the coils could be calibrated.
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

        def show(*inputs: Tensor) -> Tensor:
            return self(*inputs).image

        graphed = device.type == "cuda" and capturable()
        images = []
        for part in kspace.split(batch_size):
            part = part.to(device, torch.complex64)
            inputs = (part, mask, calibration, scale.expand(len(part)))
            image = self._graphs(self, show, *inputs) if graphed else show(*inputs)
            images.append(image.float().cpu())
            if progress is not None:
                progress(len(part))
        return torch.cat(images)


def volume_scale(kspace: Tensor, mask: Tensor) -> Tensor:
    """The brightest pixel of the zero-filled RSS images of `[slices, coils, H, W]`, never zero;
    computed where the mask, bool `[W]`, lies."""
    parts = (part.to(mask.device, torch.complex64) * mask for part in kspace.split(8))
    brightest = torch.stack([rss(ifft2c(part)).max() for part in parts]).max()
    return brightest.clamp(min=torch.finfo(torch.float32).tiny)


def _cascades(count: int, config: CodecConfig) -> nn.ModuleList:
    return nn.ModuleList(Cascade(config) for _ in range(count))


def save_codec(model: CodecModel, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes `config.json` and `model.safetensors`, the backbone's weights left out."""
    backbone = model.backbone
    config = {
        "codec": to_dict(model.config),
        "backbone_sha256": None if backbone is None else fingerprint(backbone),
    }
    state = {name: x.to("cpu", dtype).contiguous() for name, x in own_state_dict(model).items()}
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, temporary / "model.safetensors")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a codec's folder, its backbone's not among them.

    Raises:
        InputError: for what cannot be read.
    """
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}/model.safetensors cannot be read: {error}") from error


def load_codec(name: str | Path = "codec", device: str | torch.device = "cpu") -> CodecModel:
    """A codec, in eval mode, with its backbone.

    Args:
        name: a folder, or "codec" for the packaged one.

    Raises:
        InputError: for what is no codec, or one that was trained on another backbone.
    """
    folder = resolve(name, "MRI codec")
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described, expected_backbone = saved["codec"], saved["backbone_sha256"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}/config.json does not describe an MRI codec: {error}") from error
    config = from_dict(CodecConfig, described, f"{folder}/config.json")
    state = read_weights(folder)
    backbone = load_backbone(config.backbone, config.weights)
    if backbone is not None and fingerprint(backbone) != expected_backbone:
        raise InputError(
            f"the codec in {folder} was trained on another backbone than {config.weights!r}, "
            f"{config.backbone}, is now"
        )
    model = CodecModel(config, backbone)
    expected = own_state_dict(model)
    wrong = sorted(set(expected) ^ set(state)) or sorted(
        name for name, x in expected.items() if x.shape != state[name].shape
    )
    if wrong:
        raise InputError(f"the weights in {folder} do not fit its config.json: {', '.join(wrong)}")
    model.load_state_dict({name: x.float() for name, x in state.items()}, strict=False)
    return model.eval().to(device)
