"""Codecs of gradient cascades, which were saved before there were others, give the same images."""

import json

import numpy as np
import pytest
import torch

from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.model.checkpoint import load_codec, save_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.physics.fourier import fft2c

NEWER = ("maps", "map_sets", "map_features", "data_consistency", "consistency_steps", "start")
NEWER += ("conditioning", "prompts")

CONFIG = CodecConfig(
    backbone="none",
    sensitivity_features=(2, 2),
    cascade_features=(2, 2, 2),
    encoder_cascades=1,
    image_cascades=1,
    vit_dim=8,
    vit_depth=1,
    vit_heads=2,
    decoder_features=(2, 2, 2, 2),
    token_dim=8,
)

# Computed when there were gradient cascades alone: every eighth row, every tenth column.
IMAGES = {
    "columns": [
        [2.0619, 2.7415, 3.0135, 1.6669],
        [14.4147, 13.9127, 26.6267, 20.5843],
        [21.3600, 10.7758, 19.4212, 35.2053],
        [5.3622, 4.2219, 8.7529, 8.1900],
    ],
    "points": [
        [13.8754, 2.3382, 6.3548, 2.5605],
        [18.5905, 16.5426, 15.9938, 16.9061],
        [4.1860, 7.8367, 5.7317, 33.8055],
        [4.7807, 12.8302, 20.5384, 0.8538],
    ],
    "reference": [
        [1.6138, 3.3815, 3.8243, 3.7798],
        [8.5091, 10.5639, 17.0966, 6.5020],
        [15.5093, 6.8693, 15.8324, 20.1546],
        [4.4588, 4.8679, 5.6610, 1.0659],
    ],
}
COMBINED = {
    "columns": 318.5859 + 576.4108j,
    "points": 346.1845 + 666.8481j,
    "reference": 316.8221 + 498.7661j,
}


@pytest.fixture(scope="module")
def codec() -> CodecModel:
    model = CodecModel(CONFIG, None).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.sin(1.7 * torch.arange(p.numel()) + len(name)).view_as(p))
    return model


@pytest.fixture(scope="module")
def acquisitions() -> dict[str, Acquisition]:
    rows, columns = torch.arange(32)[:, None], torch.arange(40)
    image = torch.exp(-((rows - 15) ** 2 + (columns - 21) ** 2) / 80.0)
    image = image + 0.3 * torch.cos(0.7 * rows + 0.4 * columns)
    flat = torch.zeros(32, 40)
    magnitude = torch.stack(
        [1 + columns / 40 + flat, 2 - columns / 40 + flat, 1 + rows / 32 + flat]
    )
    phase = torch.stack([rows / 16 + flat, columns / 20 + flat, 1 + flat])
    kspace = fft2c(image * torch.polar(magnitude, phase))[None].numpy()
    line = (np.arange(40) % 3 == 1) | (abs(np.arange(40) - 20) < 4)
    points = (np.arange(32)[:, None] + 2 * np.arange(40)) % 3 == 0
    points[12:20, 16:24] = True
    return {
        "columns": Acquisition(kspace, line),
        "points": Acquisition(kspace, points),
        "reference": Acquisition(kspace, line, reference=kspace[:, :, 8:24, 10:30]),
    }


@pytest.mark.parametrize("kind", IMAGES)
def test_the_images_are_those_of_before(codec, acquisitions, kind):
    (found,) = codec.images(acquisitions[kind])
    expected = torch.tensor(IMAGES[kind])
    torch.testing.assert_close(found.magnitude[0, ::8, ::10], expected, rtol=1e-4, atol=1e-3)
    assert abs(complex(found.combined.sum()) - COMBINED[kind]) < 0.01


def test_a_folder_without_the_newer_keys_is_such_a_codec(codec, acquisitions, tmp_path):
    save_codec(codec, tmp_path / "codec")
    path = tmp_path / "codec" / "config.json"
    saved = json.loads(path.read_text())
    for key in NEWER:
        del saved["codec"][key]
    path.write_text(json.dumps(saved))
    (found,) = load_codec(tmp_path / "codec").images(acquisitions["columns"])
    (expected,) = codec.images(acquisitions["columns"])
    assert torch.equal(found.magnitude, expected.magnitude)
