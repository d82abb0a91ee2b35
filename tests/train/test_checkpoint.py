"""Checkpoints are whole or absent, and damage is noticed."""

import resource

import pytest
import torch
from safetensors import safe_open
from torch import nn

from helpers.stand_in import ALONE, OPTIM, StandIn
from nirvana.errors import InputError
from nirvana.train import checkpoint
from nirvana.train.optim import build_optimizer


@pytest.fixture
def parts():
    task = StandIn()
    optimizer = build_optimizer(task.trainable(), OPTIM)
    task.loss(task.batch(0, 0))[0].backward()
    optimizer.step()
    return task, optimizer


def writer(run, model, named, optimizer, keep=9):
    return checkpoint.Writer(run, model, named, optimizer, {"a": 1}, keep, ALONE)


def save(run, step, parts, keep=9):
    task, optimizer = parts
    with writer(run, task.model, task.trainable(), optimizer, keep) as writing:
        return writing.save(step, {"row": 8})


def test_round_trip(tmp_path, parts):
    task, optimizer = parts
    save(tmp_path, 7, parts)
    other = StandIn()
    with torch.no_grad():
        for value in other.model.state_dict().values():
            value.add_(1)
    frozen = other.model[4].weight.clone()
    fresh = build_optimizer(other.trainable(), OPTIM)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.config, newest.position) == (7, {"a": 1}, {"row": 8})
    checkpoint.restore(newest, other.model, other.trainable(), fresh)
    for name, value in task.model[:4].state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    assert torch.equal(other.model[4].weight, frozen)
    for (_, a), (_, b) in zip(task.trainable(), other.trainable(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(fresh.state[b][key], value)
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]


def test_what_is_saved_is_the_state_of_that_moment(tmp_path, parts):
    """Training goes on while a checkpoint is being written."""
    task, optimizer = parts
    expected = task.model[0].weight.detach().clone()
    with writer(tmp_path, task.model, task.trainable(), optimizer) as writing:
        writing.save(1, {})
        with torch.no_grad():
            task.model[0].weight.zero_()
    other = StandIn()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    checkpoint.restore(newest, other.model, other.trainable())
    assert torch.equal(other.model[0].weight, expected)


def test_frozen_parameters_are_left_out_and_tied_ones_saved_once(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with writer(tmp_path, model, named, build_optimizer(named, OPTIM)) as writing:
        folder = writing.save(1, {})
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert list(tensors.keys()) == ["0.weight"]


@pytest.mark.parametrize("before", ["write_json", "publish_folder"])
def test_a_failure_while_writing_leaves_the_previous_one(tmp_path, parts, monkeypatch, before):
    save(tmp_path, 1, parts)

    def fail(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(checkpoint, before, fail)
    with pytest.raises(RuntimeError, match="step-00000002 could not be written"):
        save(tmp_path, 2, parts)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1


def test_a_full_disk_is_reported_in_one_line(tmp_path, parts):
    """The system refuses a write as it does on a full disk; the previous checkpoint stays."""
    save(tmp_path, 1, parts)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"step-00000002 cannot be written: File too large"):
            save(tmp_path, 2, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1


def test_remains_of_a_killed_save_are_cleared_away(tmp_path, parts):
    """A process that is killed outright cannot clean up after itself; the next save does."""
    remains = tmp_path / "checkpoints" / ".step-00000002.x.partial"
    remains.mkdir(parents=True)
    (remains / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 3, parts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["shard", "state"])
@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, parts, name, damage):
    save(tmp_path, 1, parts)
    folder = save(tmp_path, 2, parts)
    file = next(folder.glob(f"{name}*"))
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[content.index(b"1") if name == "state" else -1] ^= 2
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_all_damaged(tmp_path, parts):
    next(save(tmp_path, 1, parts).glob("shard-*")).unlink()
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path)


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_damaged_later_one_does_not_push_out_whole_ones(tmp_path, parts):
    save(tmp_path, 1, parts)
    next(save(tmp_path, 9, parts).glob("shard-*")).unlink()
    save(tmp_path, 2, parts, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_another_model_is_refused(tmp_path, parts):
    save(tmp_path, 1, parts)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    other = nn.Linear(3, 3)
    optimizer = build_optimizer(other.named_parameters(), OPTIM)
    with pytest.raises(InputError, match="give the configuration it was saved with"):
        checkpoint.restore(newest, other, other.named_parameters(), optimizer)
