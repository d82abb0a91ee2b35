"""Reports by a model: probabilities, generation, training, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.drawn_brain import drawn_brain_slices
from helpers.small_codec import small_backbone, small_config
from nirvana import InputError
from nirvana.model.backbone import load_backbone
from nirvana.mri.anatomy.augment import blur, vary_contrast
from nirvana.mri.anatomy.brain_slices import GRID, PIXEL, load_brain_slices, save_brain_slices
from nirvana.mri.anatomy.lesions import SEQUENCES, TYPES, LesionSettings
from nirvana.mri.anatomy.lobes import SIDES
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import Scan
from nirvana.mri.model.checkpoint import save_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.report_tokens import report_entropy
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import Sampling, sampling_mask
from nirvana.mri.reports.encode import View, encode, encode_scan, to_grid, view_of
from nirvana.mri.reports.grammar import SLOTS, WORDINGS, Facts, parse_wording, rounded, write
from nirvana.mri.reports.reporter import CHOICES, Reporter, load_reporter, save_reporter
from nirvana.mri.reports.samples import Scanner, report_batch
from nirvana.ops.cross_entropy import IGNORE
from nirvana.packaged import resolve

SCANNER = Scanner(Sampling("equispaced", 4.0, 0.08), Simulation(noise=(0.002, 0.002)), 2)
MASS = Facts(True, 2, "mass", "left", "frontal", 12, "hyperintense")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def reporter(backbone: str) -> Reporter:
    torch.manual_seed(2)
    from transformers import AutoTokenizer

    model = CodecModel(small_config(backbone), load_backbone("nirvana", backbone)).eval()
    return Reporter(model, AutoTokenizer.from_pretrained(backbone))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0))


def batch_of(count: int, seed: int = 0, **settings):
    generator = torch.Generator().manual_seed(seed)
    slices = drawn_brain_slices((96, 80))
    return report_batch(slices, count, generator, SCANNER, LesionSettings(**settings), [0, 1, 3])


def test_samples_describe_what_was_painted():
    batch = batch_of(24)
    again = batch_of(24)
    assert torch.equal(batch.kspace, again.kspace)
    assert batch.reports == again.reports
    assert not batch.kspace[..., ~batch.mask].any()
    slices = drawn_brain_slices((96, 80))
    wordings = set()
    for i, (facts, report) in enumerate(zip(batch.facts, batch.reports, strict=True)):
        read, wording = parse_wording(report)
        wordings.add(wording)
        assert read == facts
        assert facts.finding == bool(batch.coverage[i].any())
        if not facts.finding:
            assert batch.size[i] == batch.contrast[i] == 0
            continue
        assert facts.size == rounded(float(batch.size[i]))
        sequence = SEQUENCES[slices.sequence[batch.index[i]]]
        kind = next(kind for kind in TYPES if kind.name == facts.type)
        shown = {sequence, "T2"} if sequence == "T1" else {sequence}  # some are inverted
        assert facts.signal in {kind.signal(each) for each in shown}
    assert wordings == {0, 1, 3}


@torch.inference_mode()
def test_probabilities_from_the_cache_are_those_of_the_whole_text(reporter, tokens):
    """Every alternative in full through the backbone, without a cache."""
    for slot, wording in (("side", 0), ("size", 3), ("type", 2)):
        options = [replace(MASS, **{slot: value}) for value in CHOICES[slot]]
        fast = reporter._probabilities(*reporter._start(tokens), [options] * 3, slot, wording)
        slow = []
        for facts in options:
            length = len(reporter._up_to(facts, slot, wording))
            ids, labels = reporter.report_tokens([write(facts, wording)] * 3, tokens.device)
            first = int((labels[0] != IGNORE).nonzero()[0])
            logits = reporter.model.specialist(tokens, ids).logits.log_softmax(-1)
            part = slice(first, first + length)
            likelihood = logits[:, part].gather(-1, labels[:, part, None])
            slow.append(likelihood.sum((1, 2)))
        expected = torch.stack(slow, dim=1).double().softmax(1)
        torch.testing.assert_close(torch.tensor(fast).double(), expected, atol=1e-4, rtol=1e-3)


def test_readings_are_reports_with_probabilities(reporter, tokens):
    for wording in range(len(WORDINGS)):
        readings = reporter.read(tokens, wording)
        assert reporter.findings(tokens, wording) == pytest.approx([r.finding for r in readings])
        for reading in readings:
            assert parse_wording(reading.text) == (reading.facts, wording)
            assert reading.facts.finding == (reading.finding >= reporter.threshold)
            for slot in SLOTS:
                table = reading.probabilities[slot]
                assert tuple(table) == CHOICES[slot]
                assert sum(table.values()) == pytest.approx(1)
                if reading.facts.finding:
                    assert getattr(reading.facts, slot) == max(table, key=table.__getitem__)
            json.dumps(reading.to_dict(), allow_nan=False)


@torch.inference_mode()
def test_a_mirror_image_has_the_other_side(reporter, tokens):
    """Read together with it are the means of both, the sides of the second one exchanged."""
    other = tokens.flip(0)
    options = [[replace(MASS, side=side) for side in SIDES]] * 3

    def sides(read: torch.Tensor) -> torch.Tensor:
        return torch.tensor(reporter._probabilities(*reporter._start(read), options, "side", 0))

    mean = (sides(tokens) + sides(other).flip(1)) / 2
    assert (sides(tokens) - 0.5).abs().max() > 0.01
    torch.testing.assert_close(sides(torch.stack([tokens, other], 1)), mean, atol=1e-5, rtol=1e-4)

    both = reporter.read(torch.stack([tokens, other], 1))
    turned = reporter.read(torch.stack([other, tokens], 1))
    likely = zip(reporter.findings(tokens), reporter.findings(other), strict=True)
    for one, two, (first, second) in zip(both, turned, likely, strict=True):
        assert one.finding == pytest.approx((first + second) / 2, abs=1e-5)
        left, right = one.probabilities["side"]["left"], two.probabilities["side"]["right"]
        assert left == pytest.approx(right, abs=1e-5)
        for slot in ("count", "type"):  # stated before the side
            assert one.probabilities[slot] == pytest.approx(two.probabilities[slot], abs=1e-5)


def test_the_threshold_decides(reporter, tokens):
    for threshold, finding in ((0.0, True), (1.01, False)):
        strict = Reporter(reporter.model, reporter.tokenizer, threshold)
        assert all(reading.facts.finding == finding for reading in strict.read(tokens))


def test_a_batch_reads_as_its_slices_alone(reporter, tokens):
    together = reporter.read(tokens)
    for i, reading in enumerate(together):
        alone = reporter.read(tokens[i : i + 1])[0]
        assert alone.facts == reading.facts
        assert alone.finding == pytest.approx(reading.finding, abs=1e-4)


def test_free_writing_is_greedy(reporter, tokens):
    """The cached tokens are those of the whole text read again at every step."""
    written = reporter.write(tokens[:1], max_tokens=6)[0]
    ids = torch.tensor([reporter.report_tokens.before])
    start = ids.shape[1]
    for _ in range(6):
        with torch.no_grad():
            logits = reporter.model.specialist(tokens[:1], ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert written == reporter.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_only_the_encoder_learns(reporter):
    batch = batch_of(2)
    found = encode(reporter.model, *batch.inputs)[0]
    ids, labels = reporter.report_tokens(batch.reports, found.device)
    report_entropy(reporter.model.specialist(found, ids).logits, labels).backward()
    trained = {name for name, p in reporter.model.named_parameters() if p.grad is not None}
    reporter.model.zero_grad(set_to_none=True)
    assert {name.split(".")[0] for name in trained} == {"sensitivities", "encoder", "specialist"}
    assert not any("backbone" in name for name in trained)


def test_varied_slices_are_other_contrasts_of_the_same():
    """A T1 (fluid dark, white matter brightest) becomes a T2 (fluid brightest, white matter
    darkest) or a FLAIR (fluid dark, grey matter brightest); other sequences keep the order that
    they have, the background stays empty, and the scalp sometimes becomes so."""
    sequence = torch.arange(3).repeat(80)
    images = torch.zeros(240, 48, 48)
    images[:, 8:40, 8:40] = 0.5  # grey matter
    images[:, 15:33, 15:33] = 0.7  # white matter
    images[:, 20:28, 20:28] = 0.18  # fluid
    brain = images > 0
    images[:, 4:6] = 0.9  # scalp
    found, kinds = vary_contrast(images, brain, sequence, torch.Generator().manual_seed(0))
    assert found.min() >= 0
    assert 1 < found.max() < 1.4  # the shading makes brighter, and nothing is cut off
    assert found[:, 45:].max() < 2e-3
    stripped = found[:, 4, 24] < 0.01
    assert 24 <= int(stripped.sum()) <= 72
    fluid, white, grey = found[:, 24, 24], found[:, 30, 24], found[:, 36, 24]
    t2, flair = ((kinds == SEQUENCES.index(name)) & (kinds != sequence) for name in ("T2", "FLAIR"))
    kept = kinds == sequence
    assert torch.equal(kept, ~(t2 | flair))
    assert (sequence[~kept] == SEQUENCES.index("T1")).all()
    assert 3 <= int(t2.sum()) <= 18
    assert 3 <= int(flair.sum()) <= 18
    # Six pixels away from each other two places are shaded differently, too.
    assert (fluid[t2] > grey[t2]).all()
    assert (grey[t2] > white[t2]).float().mean() > 0.8
    assert (fluid[flair] < white[flair]).all()
    assert (grey[flair] > white[flair]).float().mean() > 0.8
    assert (fluid[kept] < grey[kept]).all()
    assert (grey[kept] < white[kept]).float().mean() > 0.8
    assert (fluid[kept] / white[kept]).std() > 0.03  # it differs from slice to slice
    again, _ = vary_contrast(images, brain, sequence, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_each_slice_is_blurred_by_its_own_gaussian():
    images = torch.zeros(3, 32, 24)
    images[:, 16, 12] = 1.0
    found = blur(images, torch.tensor([0.0, 0.8, 2.0]))
    assert torch.allclose(found[0], images[0], atol=1e-6)
    assert torch.allclose(found.sum((1, 2)), torch.ones(3), atol=1e-5)
    rows = torch.arange(32) - 16.0
    for image, deviation in zip(found[1:], (0.8, 2.0), strict=True):
        spread = (image.sum(1) * rows.square()).sum().sqrt()
        assert math.isclose(float(spread), deviation, rel_tol=1e-2)


def test_a_codec_without_reports_is_refused(reporter, tmp_path):
    save_codec(reporter.model, tmp_path / "codec")
    with pytest.raises(InputError, match="was not trained on reports"):
        load_reporter(tmp_path / "codec")
    with pytest.raises(InputError, match="was not trained on reports"):
        load_reporter(resolve("codec", "MRI codec"))
    chosen = Reporter(reporter.model, reporter.tokenizer, 0.3, 2, mirrored=True)
    save_reporter(chosen, tmp_path / "reporter")
    loaded = load_reporter(tmp_path / "reporter")
    assert (loaded.threshold, loaded.wording, loaded.mirrored) == (0.3, 2, True)
    for content in ("{}", "[]", '{"threshold": 2, "wording": 0}', '{"threshold": 0, "wording": 9}'):
        (tmp_path / "reporter" / "report.json").write_text(content)
        with pytest.raises(InputError, match=r"report\.json|wording 9"):
            load_reporter(tmp_path / "reporter")


def test_the_identity_has_no_words():
    model = CodecModel(replace(small_config("none"), token_dim=8), None)
    with pytest.raises(InputError, match="without a backbone"):
        Reporter(model, None)


def test_brain_slices_are_saved_and_chosen(tmp_path: Path):
    slices = drawn_brain_slices((64, 48), subjects=3)
    save_brain_slices(tmp_path / "slices.npz", slices)
    loaded = load_brain_slices(tmp_path / "slices.npz")
    assert loaded.names == slices.names
    assert torch.equal(loaded.images, slices.images)
    assert torch.equal(loaded.frame, slices.frame)
    some = loaded.of_subjects(["person2"])
    assert len(some) == 9
    with pytest.raises(InputError, match="no slices of someone"):
        slices.of_subjects(["someone"])
    save_brain_slices(tmp_path / "slices.npz", replace(slices, frame=slices.frame[:, :5]))
    with pytest.raises(InputError, match="frames of 5 numbers, not 6; make it anew"):
        load_brain_slices(tmp_path / "slices.npz")
    (tmp_path / "slices.npz").write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read"):
        load_brain_slices(tmp_path / "slices.npz")


def scan_with(affine: np.ndarray | None, spacing=None) -> Scan:
    return Scan(np.zeros((1, 1, 16, 16), np.complex64), None, None, "scan", spacing, affine=affine)


def test_views_turn_pictures_to_the_radiological_convention():
    # (slice, row, column) to right, front, top: rows to the back, columns to the left.
    radiological = np.array([[0, 0, -2, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]], float)
    assert view_of(scan_with(radiological)) == View((3.0, 1.0, 2.0))
    turned = radiological * np.array([1, -1, -1, 1])
    assert view_of(scan_with(turned)) == View((3.0, 1.0, 2.0), True, True)
    unknown = View((3.0, 1.0, 1.0), orientation="unknown")
    assert view_of(scan_with(None, (3.0, 1.0, 1.0))) == unknown
    assert not unknown.known
    assert view_of(scan_with(None, (3.0, 1.0, 1.0)), radiological=True).known
    with pytest.raises(InputError, match="not axial"):
        view_of(scan_with(radiological[:, [1, 0, 2, 3]]))
    with pytest.raises(InputError, match="size of its pixels"):
        view_of(scan_with(None))


def test_views_of_scans_encoded_along_rows_are_those_of_the_file():
    radiological = np.array([[0, 0, -2, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]], float)
    turned = replace(scan_with(radiological[:, [0, 2, 1, 3]]), phase_encode="rows")
    assert view_of(turned) == View((3.0, 1.0, 2.0), swapped=True)
    unknown = replace(scan_with(None, (3.0, 2.0, 1.0)), phase_encode="rows")
    assert view_of(unknown) == View((3.0, 1.0, 2.0), swapped=True, orientation="unknown")
    image = torch.rand(1, 2, 40, 64)
    placed = to_grid(image, View((3.0, 0.8, 0.6)))
    again = to_grid(image.transpose(2, 3), View((3.0, 0.8, 0.6), swapped=True))
    torch.testing.assert_close(again, placed)


@pytest.mark.parametrize("flip", [False, True])
def test_the_grid_keeps_places_and_sizes(flip):
    """A mark 30 mm to one side of the middle and 40 mm from front to back of it."""
    image = torch.zeros(1, 2, 256, 200)
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in image.shape[2:])
    inside = ((rows[:, None] - 50).abs() < 12) & ((columns - 50).abs() < 10)
    image[0, 0, inside] = 1.0
    placed = to_grid(image, View((1.0, 0.8, 0.6), False, flip))[0, 0]
    assert placed.shape == GRID
    row, column = (placed > 0.5).nonzero().float().mean(0).tolist()
    assert (row - (GRID[0] - 1) / 2) * PIXEL == pytest.approx(40, abs=1.0)
    assert (column - (GRID[1] - 1) / 2) * PIXEL == pytest.approx(-30 if flip else 30, abs=1.0)
    area = float(placed.sum()) * PIXEL**2
    assert area == pytest.approx(float(image.sum()) * 0.8 * 0.6, rel=0.03)


def test_a_scan_is_encoded_slice_by_slice(reporter):
    kspace = fft2c(torch.rand(5, 1, 64, 48) * torch.ones(1, 2, 1, 1, dtype=torch.complex64))
    mask = sampling_mask("equispaced", 48, 4, 0.1, seed=0)
    acquisition = Acquisition((kspace * mask).numpy(), mask.numpy())
    view = View((3.0, 2.0, 2.0))
    counted = []
    parts = list(encode_scan(reporter, acquisition, view, 2, counted.append))
    assert counted == [2, 2, 1]
    tokens = torch.cat([part for part, _ in parts])
    images = torch.cat([image for _, image in parts])
    assert tokens.shape == (5, GRID[0] * GRID[1] // 256, 32)
    assert images.shape == (5, 2, *GRID)
    once = torch.cat([x for x, _ in encode_scan(reporter, acquisition, view, 5)])
    torch.testing.assert_close(tokens, once, atol=1e-4, rtol=1e-3)
    twice = Reporter(reporter.model, reporter.tokenizer, mirrored=True)
    pairs = torch.cat([x for x, _ in encode_scan(twice, acquisition, view, 5)])
    torch.testing.assert_close(pairs[:, 0], tokens, atol=1e-4, rtol=1e-3)


def test_tokens_of_the_mirror_image(reporter):
    inputs = batch_of(3).inputs
    with torch.inference_mode():
        tokens, image = encode(reporter.model, *inputs, mirrored=True)
        torch.testing.assert_close(tokens[:, 0], encode(reporter.model, *inputs)[0])
        torch.testing.assert_close(tokens[:, 1], reporter.model.encoder(image.flip(-1)))
    assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=0.1)
