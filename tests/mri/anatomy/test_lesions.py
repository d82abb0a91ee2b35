"""Lesions: partial volume, size, contrast by sequence, statistics, sides."""

import math
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers.drawn_brain import drawn_brain_slices
from nirvana import InputError
from nirvana.mri.anatomy import lesions
from nirvana.mri.anatomy.lesions import (
    MAX_COUNT,
    NORMAL_SHARE,
    SEQUENCES,
    TYPES,
    Anatomy,
    Lesions,
    LesionSettings,
    draw_lesions,
    paint,
)
from nirvana.mri.anatomy.lobes import LOBES, SIDES, brain_mask, frame_of, lobe_map
from nirvana.mri.io import read_spacing, read_volume

SICK = LesionSettings(normal_share=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anatomy(count: int, seed: int = 0, vary: bool = False) -> Anatomy:
    return drawn_brain_slices().draw(count, generator(seed), vary)[0]


def one_lesion(where: Anatomy, **changes) -> Lesions:
    """A smooth ellipsoid in the middle of the right half of every picture."""
    B, H, W = where.images.shape
    ones = torch.ones(B, 1)
    given = Lesions(
        present=ones.bool(),
        kind=torch.zeros(B, dtype=torch.int64),
        row=ones * H * 0.5,
        column=ones * W * 0.65,
        size=ones * 20,
        elongation=ones * 1.4,
        angle=ones * 0.5,
        waves=torch.zeros(B, 1, 3, 2),
        offset=ones * 0.3,
        thickness=torch.full((B,), 4.0),
        contrast=torch.full((B,), 0.5),
        texture=torch.zeros(B, H, W),
        lobe=torch.zeros(B, dtype=torch.int64),
        side=torch.ones(B, dtype=torch.int64),
    )
    return replace(given, **changes)


@pytest.mark.parametrize("size", [6.0, 20.0])
@pytest.mark.parametrize("offset", [0.0, 0.55])
@pytest.mark.parametrize("thickness", [0.5, 4.0])
def test_partial_volume_is_the_volume_of_the_ellipsoid_in_the_slice(size, offset, thickness):
    where = anatomy(1)
    ones = torch.ones(1, 1)
    lesion = one_lesion(
        where, size=size * ones, offset=offset * ones, thickness=torch.tensor([thickness])
    )
    coverage = paint(where, lesion)[1]
    a = size / 2 / math.sqrt(1 - offset**2)
    b = a / 1.4
    c = math.sqrt(a * b)
    low, high = (max(-c, min(c, offset * c + s * thickness / 2)) for s in (-1, 1))
    volume = math.pi * a * b * ((high - low) - (high**3 - low**3) / (3 * c * c))
    measured = float(coverage.sum()) * where.pixel**2 * thickness
    assert measured == pytest.approx(volume, rel=0.02)


def test_a_tenth_of_a_pixel_moves_the_lesion_by_a_tenth():
    where = anatomy(1)
    columns = torch.arange(where.images.shape[2], dtype=torch.float32)
    before = one_lesion(where, size=torch.full((1, 1), 8.0))
    after = replace(before, column=before.column + 0.1)
    centres = [
        float((paint(where, lesion)[1].sum(1) * columns).sum() / paint(where, lesion)[1].sum())
        for lesion in (before, after)
    ]
    assert centres[1] - centres[0] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("size", [10.0, 18.0, 30.0])
def test_the_size_is_the_longest_diameter_in_the_slices_middle(size):
    where = anatomy(1)
    thin = one_lesion(where, size=torch.full((1, 1), size), thickness=torch.tensor([0.01]))
    rows, columns = np.nonzero(paint(where, thin)[1][0].numpy() > 0.5)
    points = np.stack([rows, columns], 1) * where.pixel
    longest = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    assert longest == pytest.approx(size, abs=1.5 * where.pixel)


def test_signal_follows_sequence_and_type():
    where = anatomy(60)
    for kind, described in enumerate(TYPES):
        lesion = one_lesion(where, kind=torch.full((60,), kind))
        change = paint(where, lesion)[0] - where.images
        middle = change[:, where.images.shape[1] // 2, int(where.images.shape[2] * 0.65)]
        brightest = change.amax((1, 2))
        for number, sequence in enumerate(SEQUENCES):
            chosen = where.sequence == number
            signal = described.signal(sequence)
            if signal == "hypointense":
                assert (middle[chosen] < -0.1).all()
                assert (brightest[chosen] < 1e-6).all()
            elif signal == "hyperintense":
                assert (middle[chosen] > 0.1).all()
            else:
                assert (middle[chosen] < -0.1).all()
                assert (brightest[chosen] > 0.1).all()
    assert TYPES[0].signal("T1") == "hypointense"
    assert TYPES[0].signal("T2") == TYPES[0].signal("FLAIR") == "hyperintense"


def test_texture_is_in_the_lesion_and_nowhere_else():
    where = anatomy(40, vary=True)
    lesions = draw_lesions(where, generator(3), replace(SICK, weights=(0.0, 1.0, 0.0, 0.0)))
    images, coverage = paint(where, lesions)
    outside = coverage == 0
    assert torch.equal(images[outside], where.images[outside])
    flat = paint(where, replace(lesions, texture=torch.zeros_like(lesions.texture)))[0]
    full = coverage > 0.99
    assert float((images - flat)[full].std()) > 0.03


def test_normal_slices_stay_as_they_are():
    where = anatomy(8)
    lesions = draw_lesions(where, generator(), LesionSettings(normal_share=1.0))
    assert not lesions.count.any()
    assert torch.equal(paint(where, lesions)[0], where.images)


def test_a_draw_is_a_function_of_its_generator():
    where = anatomy(8)
    first, again, other = (draw_lesions(where, generator(s), SICK) for s in (1, 1, 2))
    assert torch.equal(paint(where, first)[0], paint(where, again)[0])
    assert not torch.equal(paint(where, first)[0], paint(where, other)[0])


def test_every_lesion_counted_is_distinct():
    where = anatomy(120, vary=True)
    settings = replace(SICK, size=(12.0, 20.0), weights=(1.0, 0.0, 0.0, 0.0), contrast=(0.5, 0.5))
    lesions = draw_lesions(where, generator(5), settings)
    coverage = paint(where, lesions)[1]
    shape = np.ones((3, 3))
    seen = [ndimage.label(part.numpy() > 0.3, shape)[1] for part in coverage]
    assert (np.array(seen) == lesions.count.numpy()).mean() > 0.95
    assert int(lesions.count.max()) == MAX_COUNT
    largest = torch.where(lesions.present, lesions.size, 0.0).argmax(1)
    assert not largest.any()


def test_frequencies_are_those_of_fastmri_plus():
    many = 2500
    where = drawn_brain_slices((64, 52)).draw(many, generator(), vary=False)[0]
    lesions = draw_lesions(where, generator(7))
    normal = float((lesions.count == 0).float().mean())
    assert normal == pytest.approx(NORMAL_SHARE, abs=0.04)
    total = sum(kind.slices for kind in TYPES)
    for number, kind in enumerate(TYPES):
        share = float((lesions.kind == number).float().mean())
        assert share == pytest.approx(kind.slices / total, abs=0.03)
    several = lesions.present[:, 1][(lesions.kind == 0) & lesions.present[:, 0]].float().mean()
    counts = TYPES[0].counts
    assert float(several) == pytest.approx(1 - counts[0] / sum(counts), abs=0.07)


def test_sizes_are_log_normal_between_the_limits():
    where = anatomy(400)
    for number, kind in enumerate(TYPES):
        weights = tuple(float(i == number) for i in range(len(TYPES)))
        size = draw_lesions(where, generator(number), replace(SICK, weights=weights)).size[:, 0]
        assert float(size.min()) >= kind.limits[0] - 0.01
        assert float(size.max()) <= kind.limits[1] + 0.01
        inside = (math.log(kind.limits[0]), math.log(kind.limits[1]))
        draws = np.random.default_rng(0).normal(*kind.size, 200_000)
        draws = draws[(draws > inside[0]) & (draws < inside[1])]
        assert float(size.median()) == pytest.approx(math.exp(np.median(draws)), rel=0.2)


def test_lobes_and_sides_are_equally_frequent():
    where = drawn_brain_slices((96, 80)).draw(1500, generator(), vary=False)[0]
    lesions = draw_lesions(where, generator(2), replace(SICK, size=(6.0, 8.0)))
    left = (lesions.side == SIDES.index("left")).float().mean()
    assert float(left) == pytest.approx(0.5, abs=0.05)
    shares = torch.bincount(lesions.lobe, minlength=len(LOBES)) / len(lesions.lobe)
    assert (shares > 0.15).all()


def test_the_patients_left_is_on_the_right_of_the_picture(tmp_path):
    """A mark on the patient's left, in files of both handednesses, and the picture mirrored."""
    head = np.zeros((120, 150, 100), np.float32)
    x, y, z = np.ogrid[-1:1:120j, -1:1:150j, -1:1:100j]
    head[x**2 + y**2 + z**2 < 0.8] = 0.5
    head[25:35, 70:80, 45:55] = 1.0  # x rises to the patient's right: this is left
    volumes = {"ras": head, "las": head[::-1]}
    for name, array in volumes.items():
        affine = np.diag([1.0 if name == "ras" else -1.0, 1, 1, 1])
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    for name in volumes:
        path = tmp_path / f"{name}.nii.gz"
        volume, spacing = read_volume(path), read_spacing(path)
        assert spacing is not None
        frame = frame_of(brain_mask(volume, spacing, stripped=True), spacing)
        u = frame.coordinates(volume.shape[1:])[0].expand(*volume.shape[1:])
        middle = volume[len(volume) // 2]
        marked = torch.from_numpy(middle > 0.9)
        assert u[marked].mean() > 0.3
        assert marked.nonzero()[:, 1].float().mean() > middle.shape[1] / 2
        mirrored = marked.flip(1)
        assert u[mirrored].mean() < -0.3


def test_windows_around_lesions_hold_all_of_them(monkeypatch):
    """As if whole slices were computed, but for rounding; lesions at the border, too."""
    where = anatomy(32, vary=True)
    drawn = draw_lesions(where, generator(1), SICK)
    drawn.row[0], drawn.column[1] = 1.0, where.images.shape[2] - 1.0
    found = paint(where, drawn)
    H, W = where.images.shape[1:]

    def everywhere(anatomy, lesions, slices, numbers):
        rows, columns = torch.arange(H)[:, None], torch.arange(W)
        return rows.expand(len(slices), H, 1), columns.expand(len(slices), 1, W)

    monkeypatch.setattr(lesions, "_window", everywhere)
    for ours, whole in zip(found, paint(where, drawn), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


def test_the_side_is_where_the_lesion_is_painted():
    where = drawn_brain_slices().draw(64, generator(4), vary=True)[0]
    lesions = draw_lesions(where, generator(9), replace(SICK, weights=(0.0, 1.0, 0.0, 0.0)))
    alone = replace(lesions, present=lesions.present & (torch.arange(MAX_COUNT) == 0))
    coverage = paint(where, alone)[1]
    found = alone.present[:, 0]
    mean_u = (coverage * where.u).sum((1, 2)) / coverage.sum((1, 2)).clamp(min=1e-6)
    left = lesions.side == SIDES.index("left")
    assert torch.equal((mean_u > 0)[found], left[found])
    assert {True, False} == set(left[found].tolist())
    columns = torch.arange(where.images.shape[2])
    mean_column = (coverage * columns).sum((1, 2)) / coverage.sum((1, 2)).clamp(min=1e-6)
    lateral = found & (mean_u.abs() > 0.4)  # brains are rotated and shifted a little
    assert torch.equal((mean_column > where.images.shape[2] / 2)[lateral], left[lateral])


def test_lobes_lie_where_they_should():
    def lobe(u: float, v: float, w: float) -> str | None:
        number = int(lobe_map(torch.tensor(u), torch.tensor(v), torch.tensor(w)))
        return None if number == 0 else LOBES[number - 1]

    assert lobe(0.4, 0.7, 0.3) == "frontal"
    assert lobe(-0.5, -0.35, 0.2) == "parietal"
    assert lobe(0.8, 0.0, 0.47) == "temporal"
    assert lobe(-0.2, -0.85, 0.4) == "occipital"
    assert lobe(0.1, 0.1, 0.45) is None  # thalamus
    assert lobe(0.4, -0.5, 0.7) is None  # cerebellum
    assert lobe(1.5, 0.0, 0.3) is None  # scalp


def test_the_brain_is_found_in_a_head():
    z, y, x = np.ogrid[-1:1:50j, -1:1:120j, -1:1:100j]
    radius = np.sqrt((z / 0.9) ** 2 + (y / 0.9) ** 2 + (x / 0.9) ** 2)
    head = np.where(radius < 0.8, 0.5, np.where(radius < 0.9, 0.02, np.where(radius < 1, 0.9, 0)))
    spacing = (3.0, 1.5, 1.5)
    found = brain_mask(head.astype(np.float32), spacing)
    true = radius < 0.8
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.93
    frame = frame_of(found, spacing)
    assert frame.half_length == pytest.approx(0.72 * 60, abs=2)
    assert frame.depth(frame.top - 10) == pytest.approx(10 * 3 / (2 * frame.half_length * 1.5))
    with pytest.raises(InputError, match="no brain"):
        brain_mask(np.where(radius < 0.05, 1.0, 0.0), spacing)
    with pytest.raises(InputError, match="no slice"):
        frame_of(np.zeros_like(found), spacing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normal_share": 1.5}, "normal_share"),
        ({"weights": (1.0,)}, "weights"),
        ({"weights": (0.0,) * 4}, "weights"),
        ({"contrast": (0.5, 0.2)}, "contrast"),
        ({"thickness": (0.0, 1.0)}, "thickness"),
        ({"size": (0.0, 1.0)}, "size"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        LesionSettings(**changes)


@pytest.mark.gpu
def test_the_gpu_paints_what_the_cpu_paints(device):
    heads = drawn_brain_slices()
    drawn = []
    for where in ("cpu", device):
        torch.set_default_device(None)
        view = heads.to(where).draw(16, generator(1))[0]
        drawn.append(paint(view, draw_lesions(view, generator(2), SICK))[0].cpu())
    torch.testing.assert_close(drawn[0], drawn[1], atol=2e-3, rtol=0)
