"""Prompts: a mixture that the features choose, nothing at first, and homogeneous."""

from dataclasses import replace

import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.prompts import Prompt
from nirvana.mri.model.residual_unet import ResidualUNet
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import Sampling

CONFIG = CodecConfig(
    backbone="none",
    correction="none",
    maps="espirit",
    data_consistency="conjugate_gradient",
    cascade_features=(2, 4, 4),
    image_cascades=1,
)


def prompt() -> Prompt:
    torch.manual_seed(0)
    found = Prompt(3, 4)
    torch.nn.init.normal_(found.write.weight)
    return found


def test_a_prompt_is_a_mixture_of_its_components():
    """With one component left, the prompt is that one, at the level of the features."""
    layer = prompt()
    x = torch.randn(2, 4, 6, 6)  # of the components' size, so that nothing is resized
    with torch.no_grad():
        layer.components[1:] = layer.components[:1]
        found = layer(x) - x
    expected = torch.einsum("oc,chw->ohw", layer.write.weight[..., 0, 0], layer.components[0])
    level = x.abs().mean((1, 2, 3))[:, None, None, None]
    torch.testing.assert_close(found, level * expected)


def test_the_features_choose_the_mixture_and_scale_it():
    layer = prompt()
    x = torch.randn(1, 4, 8, 10)
    other = x * torch.tensor([4.0, 0.1, 0.1, 0.1])[:, None, None]
    with torch.no_grad():
        mixed, again = layer(x) - x, (layer(other) - other)
        direction = [each / each.norm() for each in (mixed, again)]
        assert (direction[0] - direction[1]).abs().max() > 1e-3
        torch.testing.assert_close(layer(5 * x), 5 * layer(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(torch.zeros_like(x)), torch.zeros_like(x))


def test_only_levels_on_the_way_up_of_cascades_have_prompts():
    plain, model = (CodecModel(replace(CONFIG, prompts=n), None) for n in (0, 3))
    more = set(model.state_dict()) - set(plain.state_dict())
    parts = ("components", "mix.weight", "write.weight")
    expected = {f"image_cascades.0.net.prompts.{n}.{part}" for n in range(2) for part in parts}
    assert more == expected


def test_a_new_prompt_changes_nothing_and_learns():
    torch.manual_seed(0)
    net = ResidualUNet((2, 4), prompts=3)
    torch.nn.init.normal_(net.write.weight)
    plain = ResidualUNet((2, 4))
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "prompts" not in k})
    image = torch.randn(2, 2, 16, 16)
    torch.testing.assert_close(net(image), plain(image))
    net(image).square().sum().backward()
    assert net.prompts is not None
    assert net.prompts[0].write.weight.grad.abs().max() > 0


def test_a_codec_with_prompts_reconstructs_any_size():
    model = CodecModel(replace(CONFIG, prompts=2), None).eval()
    for size in ((40, 48), (33, 30)):
        mask = Sampling("random", 2.0, 0.3).mask(size[1], 0)
        kspace = fft2c(torch.rand(1, 3, *size).to(torch.complex64)) * mask
        assert model.reconstruct(kspace, mask).isfinite().all()


def test_wrong_prompts_are_refused():
    with pytest.raises(InputError, match="prompts = -1"):
        replace(CONFIG, prompts=-1)
    with pytest.raises(InputError, match=r"prompts = 2 needs codec\.data_consistency"):
        CodecConfig(prompts=2)
