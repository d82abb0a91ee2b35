"""Reconstruction from undersampled k-space on a frozen language model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.errors import InputError
from nirvana.files import atomic_folder
from nirvana.model.assets import load_language_model, resolve
from nirvana.model.specialist import Specialist, own_state_dict
from nirvana.mri.codec import (
    Cascade,
    CodecConfig,
    ImageDecoder,
    PatchEncoder,
    Sensitivities,
    crop,
    pad_to_patches,
    to_channels,
    to_complex,
)
from nirvana.mri.physics import (
    CartesianSense,
    calibration_columns,
    ifft2c,
    require_calibration,
    rss,
)
from nirvana.train.config import from_dict, to_dict


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
        self.sensitivities = Sensitivities(config.sensitivity_features)
        self.encoder_cascades = _cascades(config.encoder_cascades, config)
        self.encoder = PatchEncoder(config, dim)
        self.specialist = Specialist(backbone, dim)
        self.decoder = ImageDecoder(config, dim)
        self.image_cascades = _cascades(config.image_cascades, config)

    def forward(self, y: Tensor, mask: Tensor, calibration: Tensor, scale: Tensor) -> Tensor:
        """
        Args:
            y: complex `[B, coils, H, W]`, zero where not measured.
            mask: bool `[W]`, the measured columns.
            calibration: bool `[W]`, the central block of them; see `physics.calibration_columns`.
            scale: `[B]`, what brightness 1 is; `volume_scale` gives one for a whole volume.

        Returns: RSS image `[B, H, W]`, magnitude, scaled as the input.
        """
        scale = scale[:, None, None]
        y = y * mask / scale[:, None]
        sensitivities = self.sensitivities(y, calibration)
        k = y
        for cascade in self.encoder_cascades:
            k = cascade(k, y, mask, sensitivities)
        coils = CartesianSense(sensitivities)
        image, padding = pad_to_patches(to_channels(coils.adjoint(k)))
        hidden = self.specialist(self.encoder(image)).hidden
        correction = to_complex(crop(self.decoder(image, hidden), padding).float())
        k = k + coils.forward(correction)
        for cascade in self.image_cascades:
            k = cascade(k, y, mask, sensitivities)
        return rss(ifft2c(torch.where(mask, y, k))) * scale

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
        scale = volume_scale(kspace * mask.to(kspace.device)).to(device)
        images = []
        for part in kspace.split(batch_size):
            part = part.to(device, torch.complex64)
            image = self(part, mask, calibration, scale.expand(len(part)))
            images.append(image.float().cpu())
            if progress is not None:
                progress(len(part))
        return torch.cat(images)


def volume_scale(kspace: Tensor) -> Tensor:
    """The brightest pixel of the zero-filled RSS images of `[slices, coils, H, W]`, never zero."""
    brightest = torch.stack([rss(ifft2c(part)).max() for part in kspace.split(8)]).max()
    return brightest.clamp(min=torch.finfo(torch.float32).tiny)


def _cascades(count: int, config: CodecConfig) -> nn.ModuleList:
    return nn.ModuleList(Cascade(config.cascade_features) for _ in range(count))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, and the values in bfloat16, of a model's parameters.

    bfloat16, so that a checkpoint and its packaged bfloat16 copy are the same backbone.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_backbone(name: str, device: str | torch.device = "cpu") -> PreTrainedModel | None:
    """The language model called `name`; None for "none"."""
    return None if name == "none" else load_language_model(name, device)[0]


def save_codec(model: CodecModel, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes `config.json` and `model.safetensors`, the backbone's weights left out."""
    backbone = model.specialist.backbone
    config = {
        "codec": to_dict(model.config),
        "backbone_sha256": None if backbone is None else fingerprint(backbone),
    }
    state = {name: x.to("cpu", dtype).contiguous() for name, x in own_state_dict(model).items()}
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, temporary / "model.safetensors")


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
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}/model.safetensors cannot be read: {error}") from error
    backbone = load_backbone(config.backbone)
    if backbone is not None and fingerprint(backbone) != expected_backbone:
        raise InputError(
            f"the codec in {folder} was trained on another backbone than {config.backbone!r} is now"
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
