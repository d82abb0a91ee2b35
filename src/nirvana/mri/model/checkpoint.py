"""Codecs on disk: `config.json` and `model.safetensors`, without the backbone's weights."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nirvana.config import from_dict, to_dict
from nirvana.errors import InputError
from nirvana.files import atomic_folder
from nirvana.model.assets import resolve
from nirvana.model.backbone import fingerprint, load_backbone
from nirvana.model.specialist import own_state_dict
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.config import CodecConfig


def save_codec(model: CodecModel, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a codec's folder, as a whole.

    Args:
        model: the codec.
        folder: where it is written; replaced if it exists.
        dtype: of the weights in the file.
    """
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
    """The weights in a codec's folder, without those of its backbone.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}/model.safetensors cannot be read: {error}") from error


def load_codec(name: str | Path = "codec", device: str | torch.device = "cpu") -> CodecModel:
    """A codec in eval mode, float32, with its backbone.

    Args:
        name: a folder, or "codec" for the packaged codec.
        device: where it is loaded.

    Raises:
        InputError: there is no codec of that name, its files do not fit each other, or it was
            trained on another backbone.
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
