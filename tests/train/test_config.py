"""Configurations: overrides, types, and errors that name the right key."""

import json
import tomllib
from dataclasses import fields

import pytest

from nirvana.config import changed_keys, load_config, to_dict
from nirvana.errors import InputError
from nirvana.packaged import packaged_config
from nirvana.train.config import DistillConfig, LanguageConfig

TEXT = """
[model]
preset = "tiny"
hidden_size = 96
[data]
train = { a = "shards/a", b = "shards/b" }
[optim]
lr = 1
min_lr = 0.5
betas = [0.8, 0.9]
[run]
out = "runs/x"
steps = 10
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(TEXT)
    return path


def test_file_and_defaults(path):
    config = load_config(LanguageConfig, path)
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.optim.betas == (0.8, 0.9)
    assert config.model.fields == {"hidden_size": 96}
    assert config.run.log_interval == 10


def test_overrides(path):
    arguments = "--optim.lr 1e3 --run.compile=false --data.train.c shards/c --run.out 7"
    arguments += " --model.sliding_window none --run.keep-checkpoints 3"
    arguments += " --model.trigger_lr [0,0.1,0.2,0.3,0.4,0.5]"
    config = load_config(LanguageConfig, path, arguments.split())
    assert config.optim.lr == 1000.0
    assert config.run.compile is False
    assert config.data.train["c"] == "shards/c"
    assert config.run.out == "7"
    assert config.run.keep_checkpoints == 3
    fields = {"hidden_size": 96, "sliding_window": None, "trigger_lr": [0, 0.1, 0.2, 0.3, 0.4, 0.5]}
    assert config.model.fields == fields


def test_saved_configuration_reads_back(path, tmp_path):
    config = load_config(LanguageConfig, path)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(config)))
    assert load_config(LanguageConfig, saved) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.learning 1", "unknown key optim.learning"),
        ("--optim.weigth_decay 1", "did you mean optim.weight_decay"),
        ("--opitm.lr 1", "did you mean optim"),
        ("--optim.lr fast", "optim.lr = 'fast' must be a number"),
        ("--optim.lr true", "optim.lr = True must be a number"),
        ("--optim.lr inf", "optim.lr = inf must be finite"),
        ("--run.seed 9223372036854775808", "run.seed = 9223372036854775808 must be from 0"),
        ("--run.steps 1.5", "run.steps = 1.5 must be a whole number"),
        ("--run.steps true", "run.steps = True must be a whole number"),
        ("--run.steps 0", "run.steps = 0 must be at least 1"),
        ("--run.compile 1", "run.compile = 1 must be true or false"),
        ("--run.precision fp4", "'bf16' or 'fp8' or 'float32'"),
        ("--optim.betas 0.9", "a list of 2"),
        ("--optim.betas [0.9,1.0]", "from 0 to below 1"),
        ("--optim 3", "must be a section"),
        ("--run.steps.more 3", "is a value, not a section"),
        ("--data.weights.z 1", "unknown key data.weights.z"),
        ("--data.weights.a 1", "given for every name"),
        ("--run.steps", "needs a value"),
        ("steps", "unexpected argument 'steps'"),
    ],
)
def test_errors(path, arguments, message):
    with pytest.raises(InputError) as error:
        load_config(LanguageConfig, path, arguments.split())
    assert message in str(error.value)


def test_missing_key_and_file(path, tmp_path):
    path.write_text(TEXT.replace("steps = 10", ""))
    with pytest.raises(InputError, match=r"run\.steps is missing"):
        load_config(LanguageConfig, path)
    path.write_text("[run\n")
    with pytest.raises(InputError, match="not a configuration file"):
        load_config(LanguageConfig, path)
    with pytest.raises(InputError, match="no such"):
        load_config(LanguageConfig, tmp_path / "none.toml")


def test_changed_keys():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 3}
    assert changed_keys(old, new) == ["a.c: 2 -> 5"]


@pytest.mark.parametrize("name", ["tiny", "60m", "340m", "1.3b", "1.3b-window-512", "distill"])
def test_shipped_configurations_name_and_explain_every_setting(name):
    """None of them is left to a default, and each line explains its meaning."""
    shipped = packaged_config(name)
    kind = DistillConfig if name == "distill" else LanguageConfig
    config = load_config(kind, shipped)
    tree = tomllib.loads(shipped.read_text())
    for section in fields(kind):
        if section.name != "model":
            known = {item.name for item in fields(type(getattr(config, section.name)))}
            assert set(tree[section.name]) == known
            for line in shipped.read_text().splitlines():
                assert "#" in line or line.partition(" = ")[0] not in known, line
    if name not in ("tiny", "distill"):
        data, optim = config.data, config.optim
        assert data.context_length * data.batch_size * optim.accumulation == 2**19
        assert optim.warmup_steps == round(config.run.steps / 100)
