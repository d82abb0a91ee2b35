"""Task files: saved and loaded = never saved; refused for another model; merged."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nirvana.adapt import AdaptConfig, adapt, load_task, merge_tasks, save_task
from nirvana.adapt.config import FILE, config_of, read_step_sizes
from nirvana.errors import InputError

CONFIG = AdaptConfig(parameters=("norm", "fast", "low_rank"), chunk=7, rank=3)


@pytest.fixture
def learned(small_model):
    model = small_model().float()
    tokens = torch.randint(61, (2, 30))
    return model, tokens, adapt(model, tokens, config=CONFIG).task


def test_saved_and_loaded_is_never_saved(learned, tmp_path):
    model, tokens, task = learned
    save_task(task.row(1), tmp_path / "a.safetensors")
    loaded = load_task(tmp_path / "a.safetensors")
    assert loaded.layout == task.layout
    assert loaded.config == CONFIG
    assert torch.equal(loaded.values, task.row(1).values)
    with task.row(1).applied(model):
        expected = model(tokens).logits
    with loaded.applied(model):
        assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(model(tokens).logits, expected)
    again, straight = (adapt(model, tokens, config=CONFIG, task=t) for t in (loaded, task.row(1)))
    assert torch.equal(again.nll, straight.nll)


def test_a_task_of_tiny_has_about_15_kilobytes(tmp_path):
    import nirvana

    model, _ = nirvana.load("tiny")
    task = adapt(model, torch.randint(8000, (1, 70))).task
    save_task(task, tmp_path / "a.safetensors")
    assert 14_000 < (tmp_path / "a.safetensors").stat().st_size < 20_000
    assert task.values.shape == (1, 17 * 192 + 6 * 4 * 16)


def test_another_model_is_refused(learned, small_model, tmp_path):
    model, tokens, task = learned
    save_task(task.row(0), tmp_path / "a.safetensors")
    loaded = load_task(tmp_path / "a.safetensors")
    with loaded.applied(model.bfloat16()):  # the same weights, rounded
        pass
    other = small_model().float()
    with pytest.raises(InputError, match="another model"), loaded.applied(other):
        pass
    with pytest.raises(InputError, match="another model"):
        adapt(other, tokens, config=CONFIG, task=loaded)


def test_a_task_that_is_trained_further_keeps_its_groups(learned):
    model, tokens, task = learned
    with pytest.raises(InputError, match=r"low_rank.*which is not adapted here"):
        adapt(model, tokens, config=AdaptConfig(parameters=("norm",)), task=task.row(0))
    other = AdaptConfig(parameters=CONFIG.parameters, rank=3, seed=1)
    with pytest.raises(InputError, match="fixed factors"):
        adapt(model, tokens, config=other, task=task.row(0))
    norm = adapt(model, tokens, config=AdaptConfig(parameters=("norm",), chunk=7)).task.row(0)
    longer = adapt(model, tokens, config=AdaptConfig(("norm", "fast"), steps=0), task=norm)
    with norm.applied(model):
        logits = model(tokens).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(longer.nll[:, 1:].float(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_merged(learned, small_model):
    model, tokens, task = learned
    first, second = task.row(0), task.row(1)
    mean = merge_tasks([first, second])
    torch.testing.assert_close(mean.values, (first.values + second.values) / 2)
    uneven = merge_tasks([first, second], [3, 1])
    torch.testing.assert_close(uneven.values, 0.75 * first.values + 0.25 * second.values)
    assert uneven.about["weights"] == [0.75, 0.25]
    norm = adapt(model, tokens, config=AdaptConfig(parameters=("norm",))).task.row(0)
    with pytest.raises(InputError, match="different task parameters"):
        merge_tasks([first, norm])
    other = adapt(small_model().float(), tokens, config=CONFIG).task.row(0)
    with pytest.raises(InputError, match="different models"):
        merge_tasks([first, other])
    with pytest.raises(InputError, match="2 tasks need as many finite weights"):
        merge_tasks([first, second], [1, -1])
    with pytest.raises(InputError, match="2 tasks need as many finite weights"):
        merge_tasks([first, second], [1, float("nan")])


def test_what_diverged_is_neither_saved_nor_applied(learned, tmp_path):
    model, _, task = learned
    diverged = replace(task.row(0), values=task.row(0).values / 0)
    with pytest.raises(InputError, match="the adaptation diverged"):
        save_task(diverged, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="the adaptation diverged"), diverged.applied(model):
        pass
    with pytest.raises(InputError, match="must be a finite number"):
        AdaptConfig(lr={"norm": float("nan")})


@pytest.mark.parametrize("damage", ["none", "text", "cut", "other", "nan", "config", "missing"])
def test_damaged_files_are_refused(learned, tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save_task(learned[2].row(0), path)
    if damage == "none":
        path.unlink()
    elif damage == "text":
        path.write_text("no task")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "other":
        save_file({"a": torch.zeros(3)}, path)
    else:
        tensors, task = load_file(path), learned[2].row(0)
        metadata = {
            "format": "nirvana task 1",
            "model": task.model,
            "order": json.dumps(task.layout.names),
            "config": "{}",
            "about": "{}",
        }
        if damage == "nan":
            tensors[task.layout.names[0]][0] = float("nan")
        elif damage == "config":
            metadata["config"] = '{"chunk": "seven"}'
        else:
            del tensors[task.layout.names[0]]
        save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=r"a\.safetensors|configuration: chunk"):
        load_task(path)


def test_settings_of_a_model_and_of_a_command(tmp_path):
    assert config_of(tmp_path) == AdaptConfig()
    own = {"parameters": ["norm", "fast"], "chunk": 64, "lr": {"norm": 0.02, "fast/a": 0.1}}
    (tmp_path / FILE).write_text(json.dumps(own))
    config = config_of(tmp_path)
    assert (config.chunk, config.step_size("norm/x")) == (64, 0.02)
    assert (config.step_size("fast/a"), config.step_size("fast/b")) == (0.1, 0.03)
    changed = config_of(tmp_path, chunk=32, steps=2, lr=read_step_sizes("fast=1"))
    assert (changed.chunk, changed.steps, changed.step_size("fast/a")) == (32, 2, 1)
    assert changed.step_size("norm/x") == 0.02
    assert config_of(tmp_path, ("norm",), lr=read_step_sizes("-0.5")).lr == {"norm": -0.5}
    for wrong in ("a", "norm=", "norm=1,fast"):
        with pytest.raises(InputError, match="must be a number, or norm"):
            read_step_sizes(wrong)
    for changes in ({"chunk": 0}, {"steps": -1}, {"parameters": ("gain",)}, {"parameters": ()}):
        with pytest.raises(InputError, match="configuration"):
            config_of(tmp_path, **changes)
    with pytest.raises(InputError, match="of an adapted group"):
        config_of(tmp_path, ("norm",), lr={"fast": 1.0})
