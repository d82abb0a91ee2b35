"""Checkpoints are whole or absent, and damage is noticed."""

import pytest
import torch
from stand_in import OPTIM, StandIn
from torch import nn

from nirvana.errors import InputError
from nirvana.train import checkpoint
from nirvana.train.optim import build_optimizer


@pytest.fixture
def parts():
    task = StandIn()
    optimizer = build_optimizer(task.trainable(), OPTIM)
    task.loss(0, 0)[0].backward()
    optimizer.step()
    return task, optimizer


def save(run, step, parts, keep=9):
    task, optimizer = parts
    return checkpoint.save(run, step, task.model, task.trainable(), optimizer, {"a": 1}, keep)


def test_round_trip(tmp_path, parts):
    task, optimizer = parts
    save(tmp_path, 7, parts)
    expected = torch.rand(3)
    other = StandIn()
    fresh = build_optimizer(other.trainable(), OPTIM)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.config) == (7, {"a": 1})
    checkpoint.restore(newest, other.model, other.trainable(), fresh)
    assert torch.equal(torch.rand(3), expected)
    for name, value in task.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    for a, b in zip(task.model.parameters(), other.model.parameters(), strict=True):
        if a.requires_grad:
            for key, value in optimizer.state[a].items():
                assert torch.equal(fresh.state[b][key], value)
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]


def test_frozen_parameters_are_left_out_and_tied_ones_saved_once(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    folder = checkpoint.save(tmp_path, 1, model, named, build_optimizer(named, OPTIM), {}, 1)
    from safetensors.torch import load_file

    assert list(load_file(folder / "model.safetensors")) == ["0.weight"]


@pytest.mark.parametrize("after", ["model", "optimizer", "random"])
def test_a_kill_between_files_leaves_the_previous_one(tmp_path, parts, monkeypatch, after):
    save(tmp_path, 1, parts)
    original = checkpoint.save_file

    def killed(tensors, path):
        original(tensors, path)
        if path.name == f"{after}.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, parts)
    monkeypatch.undo()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1


def test_remains_of_a_killed_save_are_cleared_away(tmp_path, parts):
    """A process that is killed outright cannot clean up after itself; the next save does."""
    remains = tmp_path / "checkpoints" / ".step-00000002.x.partial"
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 3, parts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "state"])
@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, parts, name, damage):
    save(tmp_path, 1, parts)
    folder = save(tmp_path, 2, parts)
    file = next(folder.glob(f"{name}.*"))
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[0 if name == "state" else -1] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_all_damaged(tmp_path, parts):
    (save(tmp_path, 1, parts) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path)


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_damaged_later_one_does_not_push_out_whole_ones(tmp_path, parts):
    save(tmp_path, 1, parts)
    (save(tmp_path, 9, parts) / "model.safetensors").unlink()
    save(tmp_path, 2, parts, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_another_model_is_refused(tmp_path, parts):
    save(tmp_path, 1, parts)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    other = nn.Linear(3, 3)
    optimizer = build_optimizer(other.named_parameters(), OPTIM)
    with pytest.raises(InputError, match="resume with the configuration it was saved with"):
        checkpoint.restore(newest, other, other.named_parameters(), optimizer)
