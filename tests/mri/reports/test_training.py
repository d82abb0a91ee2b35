"""Training on reports: which parameters change, draws of slices, and one run after another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.drawn_brain import drawn_brain_slices
from helpers.small_codec import small_config
from nirvana import InputError
from nirvana.cuda_graphs import capture_training
from nirvana.model.backbone import load_backbone
from nirvana.mri.anatomy.brain_slices import save_brain_slices
from nirvana.mri.anatomy.lesions import LesionSettings
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.reports.auxiliary import (
    FACT_CLASSES,
    AuxiliaryHeads,
    ReportLosses,
    dice_loss,
    fact_values,
    facts_entropy,
    lesion_patches,
)
from nirvana.mri.reports.encode import encode
from nirvana.mri.reports.grammar import NORMAL, Facts
from nirvana.mri.reports.reporter import load_reporter
from nirvana.mri.reports.samples import Scanner, report_batch
from nirvana.mri.reports.train import ReportConfig, ReportSection, ReportTask, train_reporter
from nirvana.ops.cross_entropy import IGNORE
from nirvana.train.config import OptimConfig, RunConfig


def scan_of(count: int) -> tuple[torch.Tensor, ...]:
    """K-space, mask, calibration and scale of some slices."""
    scanner = Scanner(Sampling("equispaced", 4.0, 0.08), Simulation(noise=(0.002, 0.002)), 2)
    generator = torch.Generator().manual_seed(0)
    slices = drawn_brain_slices((96, 80))
    batch = report_batch(slices, count, generator, scanner, LesionSettings(), [0])
    return batch.inputs


def config_of(folder: Path, out: str, steps: int, initial: str = "", **data) -> ReportConfig:
    """A small training on drawn brain slices."""
    slices = folder / "slices.npz"
    if not slices.is_file():
        save_brain_slices(slices, drawn_brain_slices((64, 64)))
    section = ReportSection(
        str(slices),
        ["person0"],
        batch_size=4,
        coils=2,
        wordings=[0, 1],
        valid=["person1"],
        valid_slices=6,
    )
    return ReportConfig(
        data=replace(section, **data),
        run=RunConfig(str(folder / out), steps, initial, log_interval=4, validation_interval=steps),
        codec=replace(small_config("tiny"), vit_stem="convolutions"),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
    )


def test_training_lowers_the_loss_and_exports(tmp_path):
    assert train_reporter(config_of(tmp_path, "run", 16)).finished
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [
        json.loads(line)["report_nats"] for line in lines if "report_nats" in json.loads(line)
    ]
    assert losses[-1] < 0.97 * losses[0]
    valid = json.loads(lines[-1])["valid"]
    assert set(valid) == {"report_auc", "place_auc", "facts_auc", "facts_side"}
    assert all(0 <= value <= 1 for value in valid.values())
    trained = load_reporter(tmp_path / "run" / "model")
    assert len(trained.read(encode(trained.model, *scan_of(2))[0])) == 2


def test_patches_that_hold_a_lesion():
    coverage = torch.zeros(1, 32, 48)
    coverage[0, 20, 40] = 1.0
    assert lesion_patches(coverage).nonzero().tolist() == [[0, 5]]


def test_dice_rewards_the_few_places_that_count():
    wanted = torch.zeros(2, 32, 32)
    wanted[0, :4, :4] = 1.0
    right, nowhere = torch.where(wanted > 0, 20.0, -20.0), torch.full_like(wanted, -20.0)
    assert dice_loss(right, wanted) < 1e-3
    assert dice_loss(nowhere, wanted) > 0.9
    assert dice_loss(nowhere, torch.zeros_like(wanted)) < 1e-3


def test_facts_count_only_where_a_slice_has_them():
    """Against the likelihood of every fact of every slice, one by one."""
    truth = [NORMAL, Facts(True, 2, "mass", "left", "frontal", 12, "hyperintense"), NORMAL]
    values = fact_values(truth)
    assert (values[0] == IGNORE).tolist() == [False, *[True] * 6]
    logits = torch.randn(3, sum(map(len, FACT_CLASSES.values())))
    likely, first = [], 0
    for fact, choices in FACT_CLASSES.items():
        part = logits[:, first : first + len(choices)].log_softmax(1)
        first += len(choices)
        having = [i for i in range(3) if getattr(truth[i], fact) is not None]
        likely.append(
            sum(part[i, choices.index(getattr(truth[i], fact))] for i in having) / len(having)
        )
    assert facts_entropy(logits, values) == pytest.approx(-sum(likely) / len(likely))
    logits.requires_grad_()
    facts_entropy(logits, fact_values([NORMAL] * 3)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 2:].any()


def test_a_frozen_frontend_does_not_change(tmp_path):
    """Cascades and sensitivities stay, the encoder after them changes, and a resumed run has them
    from its start."""
    cascades = replace(config_of(tmp_path, "", 4).codec, encoder_cascades=1)
    first = replace(config_of(tmp_path, "first", 4, report_weight=0.0), codec=cascades)
    assert train_reporter(first).finished
    second = config_of(tmp_path, "second", 4, initial=str(tmp_path / "first"), freeze_frontend=True)
    run = replace(second.run, checkpoint_interval=2)
    second = replace(second, codec=cascades, run=run)
    assert train_reporter(second).finished
    before, after = (
        load_reporter(tmp_path / name / "model").model.state_dict() for name in ("first", "second")
    )
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in learned} == {"encoder", "specialist"}
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "second" / "model")
    assert train_reporter(second, resume=True).finished
    again = load_reporter(tmp_path / "second" / "model").model.state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)


@pytest.mark.parametrize("detach_image", [True, False])
def test_reports_teach_the_cascades_only_where_the_image_does_not(detach_image):
    config = replace(small_config("tiny"), vit_stem="convolutions", encoder_cascades=1)
    heads = AuxiliaryHeads(CodecModel(config, load_backbone("nirvana")), detach_image)
    found = heads(*scan_of(2))
    assert found.fine is not None
    (found.tokens.square().sum() + found.fine.square().sum()).backward(retain_graph=True)
    cascades = list(heads.codec.encoder_cascades.parameters())
    assert all(p.grad is None for p in cascades) == detach_image
    found.image.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in cascades)


def test_batches_of_one_draw(tmp_path):
    """They are different slices of it under masks of their own, drawn in any order."""
    task = ReportTask(config_of(tmp_path, "run", 4, reuse=3), torch.device("cpu"))
    found = [task.batch(step, 0) for step in range(6)]
    assert [len(batch.reports) for batch in found] == [4] * 6
    for i in range(6):
        for j in range(i):
            assert not torch.equal(found[i].target, found[j].target)
    assert len({tuple(batch.mask.tolist()) for batch in found}) > 1
    for step in (4, 1):
        again = task.batch(step, 0)
        assert torch.equal(again.kspace, found[step].kspace)
        assert again.facts == found[step].facts


def test_one_run_begins_with_the_weights_of_another(tmp_path):
    """The first has no reports, so the parameters between tokens and backbone stay."""
    first = config_of(tmp_path, "first", 4, report_weight=0.0)
    assert train_reporter(first).finished
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line).get("report_nats", 0) == 0 for line in lines)
    assert set(json.loads(lines[-1])["valid"]) == {"place_auc", "facts_auc", "facts_side"}

    second = config_of(tmp_path, "second", 4, initial=str(tmp_path / "first"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        task = ReportTask(second, torch.device("cpu"))
    trained = load_reporter(tmp_path / "first" / "model").model.encoder.state_dict()
    before = {name: x.clone() for name, x in task.heads.codec.encoder.state_dict().items()}
    assert any(not torch.equal(before[name], trained[name]) for name in trained)
    with torch.no_grad():
        task.heads.codec.specialist.start.fill_(2.0)  # as of a backbone with larger embeddings
    task.initialize(task.config.run.initial)
    after = task.heads.codec.encoder.state_dict()
    assert all(torch.equal(after[name], trained[name]) for name in trained)
    assert (task.heads.codec.specialist.start == 2.0).all()
    assert train_reporter(second).finished


def test_a_training_begins_with_a_codec(tmp_path):
    """Its encoder is taken; the packaged reporter has another one than here."""
    first = config_of(tmp_path, "first", 4, report_weight=0.0)
    assert train_reporter(first).finished
    folder = tmp_path / "first" / "model"
    trained = load_reporter(folder).model
    task = ReportTask(config_of(tmp_path, "run", 4, initial=str(folder)), torch.device("cpu"))
    own = task.heads.codec.specialist.start.detach().clone()
    task.initialize(task.config.run.initial)
    for part in ("encoder", "sensitivities", "encoder_cascades"):
        wanted = getattr(trained, part).state_dict()
        found = getattr(task.heads.codec, part).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(task.heads.codec.specialist.start, own)
    with pytest.raises(InputError, match=r"run.initial = 'reporter'.* has another encoder"):
        train_reporter(config_of(tmp_path, "run", 4, initial="reporter"))


def test_new_cascades_follow_those_of_the_start(tmp_path):
    """They start as new ones do: they restore the measured columns and change nothing else."""
    first = config_of(tmp_path, "first", 4, report_weight=0.0)
    first = replace(first, codec=replace(first.codec, encoder_cascades=1))
    assert train_reporter(first).finished
    folder = tmp_path / "first" / "model"
    trained = load_reporter(folder).model
    longer = config_of(tmp_path, "run", 4, initial=str(folder))
    longer = replace(longer, codec=replace(first.codec, encoder_cascades=3))
    task = ReportTask(longer, torch.device("cpu"))
    task.initialize(task.config.run.initial)
    grown = task.heads.codec
    for name, value in trained.encoder_cascades.state_dict().items():
        assert torch.equal(grown.encoder_cascades.state_dict()[name], value)
    assert all((each.refine.net.write.weight == 0).all() for each in grown.encoder_cascades[1:])
    with torch.inference_mode():
        encoded = (model.encode_kspace(*scan_of(2)) for model in (trained, grown))
        before, after = (encoding.iterate for encoding in encoded)
    scan = before.measured
    assert torch.allclose(after.k, torch.where(scan.mask, scan.y, before.k), atol=1e-6)
    kept = replace(longer, data=replace(longer.data, freeze_frontend=True))
    with pytest.raises(InputError, match=r"another encoder: codec.encoder_cascades.1"):
        ReportTask(kept, torch.device("cpu")).initialize(kept.run.initial)
    assert train_reporter(longer).finished


def test_a_start_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run.initial = .*nowhere.*: there is no checkpoint"):
        train_reporter(config_of(tmp_path, "run", 4, initial=str(tmp_path / "nowhere")))


def test_a_training_that_learns_nothing_is_refused():
    with pytest.raises(InputError, match=r"data.report_weight = 0.* nothing is learned of lesions"):
        ReportSection("slices.npz", ["a"], report_weight=0.0, place_weight=0.0, facts_weight=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("cast", [False, True])
def test_a_graph_has_the_gradients_of_the_plain_training(tmp_path, cast, weight):
    """Also after the weights changed, and when reports of another length came in between."""
    config = config_of(tmp_path, "run", 4, report_weight=weight)
    device = torch.device("cuda")
    task = ReportTask(config, device)
    parameters = [p for _, p in task.trainable()]
    plain, graphs = ReportLosses(task.heads), {}
    for step in range(4):
        batch = task.batch(step, 0)
        tensors = (*batch.inputs, batch.coverage, batch.target, fact_values(batch.facts, device))
        if weight:
            ids, labels = task.tokens_and_labels(batch.reports, device)
            longer = (0, 32 * (step % 2))
            padded = F.pad(ids, longer, value=0), F.pad(labels, longer, value=IGNORE)
            tensors = (*tensors, *padded)
        shape = tensors[-1].shape
        found = []
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            if shape not in graphs:
                graphs[shape] = capture_training(ReportLosses(task.heads), tensors)
            for run in (plain, graphs[shape]):
                nats, place, facts, error = run(*tensors)
                task.heads.zero_grad()
                (weight * nats + place + facts + 10 * error).backward()
                found.append([p.grad.clone() for p in parameters if p.grad is not None])
        assert len(found[0]) == len(found[1]) > 0
        wanted, got = (torch.cat([g.flatten() for g in each]) for each in found)
        # Sums in another order; in bfloat16 they differ in the last of eight bits.
        assert (got - wanted).norm() < (0.02 if cast else 1e-4) * wanted.norm()
        with torch.no_grad():  # the graph reads the new weights
            for parameter in parameters:
                parameter.add_(0.01 * torch.randn_like(parameter))
