"""The codec: data consistency, scale, any size and number of coils, saving and loading."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nirvana import InputError
from nirvana.model.backbone import fingerprint, load_backbone
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.model.checkpoint import load_codec, save_codec
from nirvana.mri.model.codec import CodecModel, brightness, slice_batches
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.layout import PATCH, pad_to_patches, to_channels
from nirvana.mri.model.layout import crop as crop_patches
from nirvana.mri.model.vit import ConvolutionalStem, Opposite, PatchEncoder
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss, to_columns
from nirvana.mri.physics.masks import Sampling, sampling_mask

SMALL = CodecConfig(
    backbone="none",
    maps="espirit",
    map_features=(2, 2),
    data_consistency="conjugate_gradient",
    consistency_steps=2,
    conditioning=4,
    sensitivity_features=(2, 2),
    cascade_features=(2, 2, 2),
    unet_features=(2, 2),
    encoder_cascades=1,
    image_cascades=1,
    vit_dim=8,
    vit_depth=1,
    vit_heads=2,
    decoder_features=(2, 2, 2, 2),
    token_dim=8,
)
GRADIENT = replace(
    SMALL, maps="network", map_features=(), conditioning=0, data_consistency="gradient"
)
INSTANCE = replace(
    GRADIENT,
    unet="instance",
    sensitivity_features=(2,) * 6,
    cascade_features=(2,) * 6,
    unet_features=(2,) * 6,
)


@pytest.fixture(
    params=[
        SMALL,
        INSTANCE,
        replace(SMALL, vit_stem="convolutions"),
        replace(SMALL, correction="unet", start="zero_filled"),
        replace(SMALL, correction="none", encoder_cascades=0, map_sets=2),
        replace(GRADIENT, correction="none", encoder_cascades=0),
    ],
    ids=["residual", "instance", "stem", "unet", "two-sets", "varnet"],
)
def small_codec(request) -> CodecModel:
    model = CodecModel(request.param, None).eval()
    with torch.no_grad():  # zero-initialised parts would do nothing
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


def kspace_of(slices: int, coils: int, H: int, W: int) -> torch.Tensor:
    image = torch.rand(slices, 1, H, W) * torch.randn(1, coils, 1, 1, dtype=torch.complex64)
    return fft2c(image)


@pytest.mark.parametrize(
    ("coils", "H", "W"),
    [(1, 33, 40), (3, 16, 24), (8, 50, 31), (2, 64, 48), (64, 20, 18), (1, 8, 16)],
)
def test_any_coils_and_size(small_codec, coils, H, W):
    kspace = kspace_of(2, coils, H, W)
    mask = sampling_mask("random", W, 3, 0.2, seed=1)
    image = small_codec.reconstruct(kspace, mask)
    assert image.shape == (2, H, W)
    assert image.dtype == torch.float32
    assert (image >= 0).all()
    assert image.isfinite().all()


def test_sampled_lines_are_kept(small_codec):
    """Hard data consistency: of one coil the magnitude's k-space holds the measured columns."""
    kspace = kspace_of(1, 1, 32, 40)
    full = torch.ones(40, dtype=torch.bool)
    expected = rss(ifft2c(kspace))
    torch.testing.assert_close(
        small_codec.reconstruct(kspace, full), expected, rtol=1e-4, atol=1e-5
    )
    mask = sampling_mask("equispaced", 40, 4, 0.1, seed=0)
    captured = {}
    part = small_codec.image_cascades[-1]
    part.register_forward_hook(lambda _, __, iterate: captured.update(k=iterate.coil_kspace))
    image = small_codec.reconstruct(kspace * mask, mask)
    scale = rss(ifft2c(kspace * mask)).max()
    # The cascades work with rows in image space and the middle of W first.
    k = torch.fft.fftshift(captured["k"] * scale, dim=-1)
    k = fft_rows(k)
    put_back = torch.where(mask, kspace, k)
    torch.testing.assert_close(image, rss(ifft2c(put_back)), rtol=1e-3, atol=1e-4)
    assert (k - kspace)[..., mask].abs().max() > 1e-3


def fft_rows(x: torch.Tensor) -> torch.Tensor:
    """Centred, along H."""
    shifted = torch.fft.ifftshift(x, dim=-2)
    return torch.fft.fftshift(torch.fft.fft(shifted, dim=-2, norm="ortho"), dim=-2)


@pytest.mark.parametrize("size", [(8, 10), (7, 9)])
def test_columns_are_between_the_spaces(size):
    kspace = torch.randn(2, 3, *size, dtype=torch.complex64)
    columns = to_columns(kspace)
    torch.testing.assert_close(fft_rows(torch.fft.fftshift(columns, dim=-1)), kspace)
    image = torch.fft.fftshift(torch.fft.ifft(columns, norm="ortho"), dim=-1)
    torch.testing.assert_close(image, ifft2c(kspace))


def test_every_slice_may_have_a_mask_of_its_own(small_codec):
    kspace = kspace_of(2, 3, 32, 48)
    masks = torch.stack([sampling_mask("random", 48, 3, 0.2, seed=seed) for seed in (1, 2)])
    scale = torch.ones(2)
    both = small_codec(kspace * masks[:, None, None], masks, masks, scale).image
    for i in range(2):
        alone = small_codec(kspace[i : i + 1] * masks[i], masks[i], masks[i], scale[:1]).image
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_points_of_whole_columns_are_columns(small_codec):
    """Patterns `[H, W]`, `[slices, W]` and `[slices, H, W]` that are constant along H."""
    kspace = kspace_of(3, 3, 32, 48)
    mask = sampling_mask("random", 48, 3, 0.2, seed=1)
    expected = small_codec.reconstruct(kspace, mask)
    for pattern in (mask.expand(32, 48), mask.expand(3, 48), mask.expand(3, 32, 48)):
        found = small_codec.reconstruct(kspace, pattern, batch_size=2)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_single_points_are_kept(small_codec):
    """Hard data consistency of a mask of points: of one coil the measured points stay."""
    kspace = kspace_of(1, 1, 32, 40)
    mask = torch.rand(32, 40, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[12:20, 16:24] = True
    (images,) = small_codec.images(Acquisition(kspace.numpy(), mask.numpy()))
    # The combined image is that of the coil.
    found = fft2c(images.combined)
    torch.testing.assert_close(found[:, mask], kspace[:, 0, mask], rtol=1e-3, atol=1e-3)
    assert (found - kspace[:, 0])[:, ~mask].abs().max() > 1e-3


def test_sensitivities_come_from_a_separate_scan(small_codec):
    """Without a sampled middle, and on any scale."""
    kspace = kspace_of(2, 3, 32, 48)
    mask = (torch.arange(48) % 2 == 1).numpy()
    reference = (kspace[:, :, 8:24, 12:36]).numpy()
    found = [
        torch.cat(
            [
                each.magnitude
                for each in small_codec.images(
                    Acquisition(kspace.numpy(), mask, reference=scale * reference)
                )
            ]
        )
        for scale in (1, 100)
    ]
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="at least 2 in the centre"):
        list(small_codec.images(Acquisition(kspace.numpy(), mask)))


def test_a_new_codec_keeps_the_measured_and_adds_nothing():
    """Corrections start at zero, so the image of gradient cascades is that of the zero-filled
    coils."""
    model = CodecModel(GRADIENT, None).eval()
    kspace, mask = kspace_of(1, 3, 32, 48), sampling_mask("random", 48, 3, 0.2, seed=1)
    image = model.reconstruct(kspace * mask, mask)
    torch.testing.assert_close(image, rss(ifft2c(kspace * mask)), rtol=1e-3, atol=1e-4)


def test_output_follows_the_inputs_scale(small_codec):
    kspace, mask = kspace_of(3, 4, 32, 48), sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    once = small_codec.reconstruct(kspace, mask)
    torch.testing.assert_close(
        small_codec.reconstruct(kspace * 1e-6, mask) * 1e6, once, rtol=1e-2, atol=1e-3
    )


def test_batches_change_nothing(small_codec):
    kspace, mask = kspace_of(5, 2, 32, 48), sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    counted = []
    one = small_codec.reconstruct(kspace, mask, batch_size=1, progress=counted.append)
    assert counted == [1] * 5
    torch.testing.assert_close(small_codec.reconstruct(kspace, mask, batch_size=5), one)


def images_of(model: CodecModel, kspace: torch.Tensor, mask: torch.Tensor):
    """Magnitude and combined images of a volume."""
    acquisition = Acquisition(kspace.numpy(), mask.numpy())
    magnitude, combined, _ = zip(*model.images(acquisition, batch_size=2), strict=True)
    return torch.cat(magnitude), torch.cat(combined)


@pytest.mark.parametrize("shape", [(32,), (25, 32)])
def test_a_scans_brightness_is_the_same_on_every_device(shape):
    generator = torch.Generator().manual_seed(0)
    kspace = torch.randn(3, 4, 25, 32, dtype=torch.complex64, generator=generator)
    kspace[1] *= 3
    pattern = (torch.rand(shape, generator=generator) < 0.5).numpy()
    mixed = torch.randn(2, 4, dtype=torch.complex64, generator=generator).numpy()
    acquisition = Acquisition(kspace.numpy(), pattern, mixed)
    found = brightness(slice_batches(acquisition, 2, torch.device("cpu")))
    assert float(found) == pytest.approx(acquisition.scale, rel=1e-5)
    empty = Acquisition(np.zeros_like(kspace.numpy()), pattern)
    assert float(brightness(slice_batches(empty, 2, torch.device("cpu")))) > 0


def test_of_one_coil_the_combined_image_is_the_coils(small_codec):
    """The coil's phase is not taken away with its sensitivity."""
    kspace = kspace_of(3, 1, 32, 48) * 1e-3
    full = torch.ones(48, dtype=torch.bool)
    magnitude, combined = images_of(small_codec, kspace, full)
    assert torch.equal(magnitude, small_codec.reconstruct(kspace, full, batch_size=2))
    torch.testing.assert_close(combined, ifft2c(kspace)[:, 0], rtol=1e-4, atol=1e-7)


def test_the_combined_image_has_one_phase_reference(small_codec):
    """Its phase is the object's plus one of a fixed combination of the coils, in every slice, and
    a phase of the coils changes nothing but that."""
    image = torch.rand(3, 32, 48) + 0.2
    phase = torch.linspace(-1, 1, 48).expand(3, 32, 48) + torch.tensor([0.0, 1, 2])[:, None, None]
    coils = torch.rand(4) + 0.5
    object_ = torch.polar(image, phase)
    kspace = fft2c(object_[:, None] * coils[:, None, None])
    full = torch.ones(48, dtype=torch.bool)
    magnitude, combined = images_of(small_codec, kspace, full)
    assert (combined.abs() <= magnitude * (1 + 1e-5)).all()
    difference = (combined / object_).angle()
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-4)
    turned = torch.polar(torch.ones(4), torch.tensor([0.3, -1, 2, 0.1]))[:, None, None]
    _, other = images_of(small_codec, kspace * turned, full)
    shift = (other / combined).angle()
    torch.testing.assert_close(shift, shift.flatten()[0].expand_as(shift), rtol=0, atol=1e-4)


def test_empty_slices_stay_finite(small_codec):
    kspace, mask = kspace_of(2, 2, 32, 48), sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    kspace[1] = 0
    assert small_codec.reconstruct(kspace, mask).isfinite().all()
    assert small_codec.reconstruct(torch.zeros_like(kspace), mask).isfinite().all()


def test_unmeasured_columns_are_not_looked_at(small_codec):
    kspace, mask = kspace_of(1, 2, 32, 48), sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    expected = small_codec.reconstruct(kspace * mask, mask)
    torch.testing.assert_close(small_codec.reconstruct(kspace, mask), expected)


def test_wrong_masks_are_refused(small_codec):
    kspace = kspace_of(1, 2, 32, 48)
    with pytest.raises(InputError, match=r"mask is \(40,\); k-space of 1 slices of 32 x 48 takes"):
        small_codec.reconstruct(kspace, torch.ones(40, dtype=torch.bool))
    with pytest.raises(InputError, match="centre"):
        small_codec.reconstruct(kspace, torch.arange(48) < 10)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 47), (128, 96)])
def test_patch_padding_is_undone(size):
    image = torch.randn(2, *size)
    padded, padding = pad_to_patches(image)
    assert all(n % 16 == 0 and n >= 32 for n in padded.shape[-2:])
    assert torch.equal(crop_patches(padded, padding), image)


@pytest.mark.parametrize("stem", ["patches", "convolutions"])
def test_tokens_lie_where_their_patches_do(stem):
    """What moves by a patch moves by a place in the stem's map, but for what padding reaches."""
    stem = PatchEncoder(replace(SMALL, vit_stem=stem), 8).patches
    image = torch.zeros(1, 2, 512, 544)
    image[..., 256:272, 272:288] = torch.randn(1, 2, PATCH, PATCH)
    vectors = stem(image)
    assert vectors.shape == (1, 8, 32, 34)
    rolled = stem(image.roll((PATCH, -PATCH), (2, 3)))
    torch.testing.assert_close(rolled[..., 11:23, 11:22], vectors[..., 10:22, 12:23])
    assert (vectors[..., 16, 17] - vectors[..., 2, 2]).abs().max() > 1e-3


def test_the_convolutional_stem_does_not_see_the_phase():
    stem = ConvolutionalStem(16)
    image = torch.randn(2, 48, 64, dtype=torch.complex64)
    turned = image * torch.exp(1j * torch.randn(2, 48, 64))
    fine, vectors = stem.maps(to_channels(image))
    assert (fine.shape, vectors.shape) == ((2, 8, 12, 16), (2, 16, 3, 4))
    torch.testing.assert_close(stem(to_channels(turned)), vectors)
    image = torch.zeros(1, 2, 32, 32, requires_grad=True)
    stem(image).sum().backward()
    assert image.grad is not None
    assert not image.grad.isnan().any()


def test_the_stem_is_as_loud_as_the_positions():
    """However bright the image and large its weights."""
    stem = ConvolutionalStem(16)
    with torch.no_grad():
        stem.gather.weight.mul_(100)
    vectors = stem(torch.randn(2, 2, 48, 64))
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(2, 3, 4), atol=1e-3, rtol=0)


def test_a_place_also_sees_the_one_opposite():
    opposite = Opposite(8)
    x = torch.randn(1, 8, 12, 20)
    assert torch.equal(opposite(x), x)
    torch.nn.init.normal_(opposite.out.weight)
    opposite.mix[1] = torch.nn.Identity()  # its statistics are of the whole map
    changed = x.clone()
    changed[..., 5, 3] += 1.0
    seen = (opposite(changed) != opposite(x)).any(1)[0]
    around = torch.zeros(12, 20, dtype=torch.bool)
    around[4:7, 2:5] = around[4:7, 15:18] = True
    assert seen[around].any()
    assert not seen[~around].any()
    assert seen[:, 10:].any()
    assert seen[:, :10].any()


def test_a_codec_from_before_the_stem_reads_patches(tmp_path):
    model = CodecModel(SMALL, None).eval()
    save_codec(model, tmp_path / "codec")
    path = tmp_path / "codec" / "config.json"
    saved = json.loads(path.read_text())
    assert saved["codec"].pop("vit_stem") == "patches"
    path.write_text(json.dumps(saved))
    loaded = load_codec(tmp_path / "codec")
    kspace, mask = kspace_of(1, 2, 32, 48), sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    assert torch.equal(loaded.reconstruct(kspace, mask), model.reconstruct(kspace, mask))
    saved["codec"]["vit_stem"] = "convolutions"
    path.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"do not fit its config\.json: encoder\.patches"):
        load_codec(tmp_path / "codec")


@pytest.mark.parametrize(
    ("backbone", "stem"),
    [
        ("none", "patches"),
        ("nirvana", "patches"),
        ("transformer", "patches"),
        ("none", "convolutions"),
    ],
)
def test_save_and_load(tmp_path, backbone, stem):
    config = replace(SMALL, backbone=backbone, vit_stem=stem)
    model = CodecModel(config, load_backbone(backbone)).eval()
    save_codec(model, tmp_path / "codec")
    loaded = load_codec(tmp_path / "codec")
    assert loaded.config == config
    kspace, mask = kspace_of(1, 2, 32, 48), sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    assert torch.equal(loaded.reconstruct(kspace, mask), model.reconstruct(kspace, mask))


def test_another_backbone_is_noticed(tmp_path):
    config = replace(SMALL, backbone="nirvana")
    backbone = load_backbone("nirvana")
    same = fingerprint(backbone)
    assert fingerprint(backbone.bfloat16().float()) == same
    with torch.no_grad():
        backbone.model.norm.weight[0] += 0.5
    save_codec(CodecModel(config, backbone), tmp_path / "codec")
    with pytest.raises(InputError, match="another backbone than 'default'"):
        load_codec(tmp_path / "codec")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{}", "does not describe an MRI codec"),
        ("config.json", b"[1]", "does not describe an MRI codec"),
        ("config.json", b'{"codec": {"vit_dim": "wide"}, "backbone_sha256": 0}', "vit_dim"),
        ("config.json", b'{"codec": {"vit_dims": 8}, "backbone_sha256": 0}', "did you mean"),
        (
            "config.json",
            b'{"codec": {"correction": "none"}, "backbone_sha256": 0}',
            "needs codec.correction = 'tokens'",
        ),
        ("model.safetensors", b"junk", "cannot be read"),
    ],
)
def test_damaged_codecs_are_named(tmp_path, name, content, message):
    save_codec(CodecModel(SMALL, None), tmp_path / "codec")
    (tmp_path / "codec" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_codec(tmp_path / "codec")


def test_the_packaged_codec_beats_zero_filling_by_far(head_slices: np.ndarray):
    """On a volume that no training saw."""
    scan = simulate_scan(head_slices, "head", 3, Simulation(noise=(0.005, 0.005)))
    mask = Sampling().mask(scan.kspace.shape[-1], seed=5)
    kspace = torch.from_numpy(scan.kspace) * mask
    ours = score(scan.target, load_codec().reconstruct(kspace, mask).numpy())
    empty = score(scan.target, zero_filled(kspace.numpy(), mask.numpy()))
    assert ours["psnr"] > empty["psnr"] + 3
    assert ours["ssim"] > empty["ssim"]
