"""A converted checkpoint computes what the authors' code computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nirvana import InputError, NirvanaConfig, NirvanaForCausalLM
from nirvana.model.convert import (
    FOLDED,
    RELEASED,
    convert,
    released_config,
    released_shapes,
    to_own,
    to_released,
)
from nirvana.model.trigger import Trigger


@pytest.fixture(scope="module")
def parity(data_folder: Path) -> Path:
    folder = data_folder.parent / "parity" / "tiny"
    if not folder.is_dir():
        pytest.skip(f"no parity data at {folder}")
    return folder


@pytest.fixture(scope="module")
def converted(parity: Path, tmp_path_factory) -> NirvanaForCausalLM:
    source = tmp_path_factory.mktemp("released")
    config = json.loads((parity / "released_config.json").read_text())
    config["model_type"] = "transformer_rnn"
    (source / "config.json").write_text(json.dumps(config))
    shutil.copyfile(parity / "released_state_dict.safetensors", source / "model.safetensors")
    folder = convert(source, tmp_path_factory.mktemp("ours"))  # expected has the window of 24
    return AutoModelForCausalLM.from_pretrained(folder)


def test_law_8_values(converted, parity):
    expected = load_file(parity / "expected.safetensors")
    tasks = []
    for module in converted.modules():
        if isinstance(module, Trigger):
            module.register_forward_hook(lambda _, __, out: tasks.append(out[0]))
    tokens = expected["input_ids"]
    with torch.no_grad():
        out = converted(tokens, labels=tokens, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected["logits"], rtol=0, atol=2e-4)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.stack(tasks), expected["task"], rtol=2e-5, atol=2e-4)
    for i, hidden in enumerate(out.hidden_states):
        torch.testing.assert_close(hidden, expected[f"hidden_states.{i}"], rtol=2e-5, atol=2e-4)


def test_law_8_gradients(converted, parity):
    expected = load_file(parity / "expected.safetensors")
    tokens = expected["input_ids"]
    converted.zero_grad()
    converted(tokens, labels=tokens).loss.backward()
    own = {name: p.grad for name, p in converted.named_parameters()}
    C = converted.config.task_dim
    actual = to_released(own, converted.config)
    for name, gradient in actual.items():
        if name.endswith(FOLDED):  # both blocks of h add up, so each has the sum's gradient
            gradient[:, -C:] = gradient[:, -2 * C : -C]
    compared = [name for name in expected if name.startswith("grad.")]
    assert len(compared) == 4
    for name in compared:
        a, b = actual[name.removeprefix("grad.")], expected[name]
        assert (a - b).norm() <= 1e-3 * b.norm(), name


def make(**overrides) -> NirvanaForCausalLM:
    fields = {
        **RELEASED,
        "vocab_size": 31,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "sliding_window": 8,
        "task_dim": 6,
        "bank_size": 3,
        **overrides,
    }
    model = NirvanaForCausalLM(NirvanaConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False, "sliding_window": None},
        {"hidden_size": 48, "num_attention_heads": 4, "task_dim": 5, "bank_size": 1},
        {"num_hidden_layers": 3, "intermediate_size": 256, "vocab_size": 7},
    ],
)
@torch.no_grad()
def test_there_and_back(shape, tmp_path):
    model = make(**shape)
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "ours", tmp_path / "theirs", reverse=True)
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    released = load_file(tmp_path / "theirs" / "model.safetensors")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == "transformer_rnn"
    assert {name: tuple(x.shape) for name, x in released.items()} == released_shapes(model.config)
    convert(tmp_path / "theirs", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.sliding_window == model.config.sliding_window
    tokens = torch.randint(0, model.config.vocab_size, (2, 20))
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_blocks_of_h_fold():
    config = make().config
    released = {name: torch.randn(shape) for name, shape in released_shapes(config).items()}
    name = "model.layers.2.Task_Aware_Delta_Net." + FOLDED
    own = to_own(released, config)["model.layers.2.updater.zeta.0.weight"]
    b, a, h = torch.randn(5, 32), torch.randn(5, 32), torch.randn(5, 6)
    theirs = torch.cat([b, a, h, h], 1) @ released[name].T
    torch.testing.assert_close(torch.cat([b, a, h], 1) @ own.T, theirs, rtol=1e-4, atol=1e-4)


def released_folder(folder: Path, **config) -> dict[str, torch.Tensor]:
    model = make()
    model.save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "src", reverse=True)
    written = json.loads((folder / "src" / "config.json").read_text()) | config
    (folder / "src" / "config.json").write_text(json.dumps(written))
    return load_file(folder / "src" / "model.safetensors")


def test_shards_are_read(tmp_path):
    state = released_folder(tmp_path)
    convert(tmp_path / "src", tmp_path / "whole")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / "src" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "src" / "model.safetensors").unlink()
    (tmp_path / "src" / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(tmp_path / "src", tmp_path / "sharded")
    whole, sharded = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    index["weight_map"][names[0]] = "../ours/model.safetensors"
    (tmp_path / "src" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not in"):
        convert(tmp_path / "src", tmp_path / "outside")


def test_all_wrong_tensors_stand_in_one_error(tmp_path):
    state = released_folder(tmp_path)
    del state["model.norm.weight"]
    state["model.extra"] = torch.zeros(1)
    state["model.rnn_router.bias_ln"] = torch.zeros(6, 4)
    save_file(state, tmp_path / "src" / "model.safetensors")
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    message = str(caught.value)
    assert "model.extra is not of this model" in message
    assert "model.rnn_router.bias_ln is [6, 4], not [6, 3]" in message
    assert "model.norm.weight is missing" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_heads": 5}, r"hidden_size = 32 must be a multiple of num_attention_heads = 5"),
        ({"concept_dim": 7}, "the weights do not fit"),
    ],
)
def test_wrong_configurations_are_named(tmp_path, config, message):
    released_folder(tmp_path, **config)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_input_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        convert(tmp_path, tmp_path / "out")
    released_folder(tmp_path)
    (tmp_path / "src" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="unreadable weights"):
        convert(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        convert(tmp_path / "src", tmp_path / "out")
    with pytest.raises(InputError, match="concept_dim is missing"):
        released_config(
            {"hidden_size": 8, "num_heads": 1, "num_hidden_layers": 3, "vocab_size": 9}
            | {"logit_dim": 2, "norm_eps": 1e-6},
            "config.json",
        )


@pytest.mark.parametrize(
    "change",
    [
        {"trigger_decay": 0.5},
        {"interpolation": "convex"},
        {"rope_theta": 10000.0},
        {"gate": "input"},
        {"branches": "window"},
        {"trigger_step": "normalised"},
    ],
)
def test_what_the_authors_code_cannot_express_is_not_reversed(tmp_path, change):
    make(**change).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=next(iter(change))):
        convert(tmp_path / "ours", tmp_path / "out", reverse=True)
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="needs a Nirvana model of ours"):
        convert(tmp_path / "ours", tmp_path / "out", reverse=True)


def test_the_source_is_never_replaced(tmp_path):
    state = released_folder(tmp_path)
    for destination in (tmp_path / "src", tmp_path / "ours" / ".." / "src"):
        with pytest.raises(InputError, match=r"src contains the input .*; give another place"):
            convert(tmp_path / "src", destination)
    assert load_file(tmp_path / "src" / "model.safetensors").keys() == state.keys()


def test_a_model_of_ours_requires_reverse(tmp_path):
    released_folder(tmp_path)
    with pytest.raises(InputError, match="this is a model of ours; --reverse converts those"):
        convert(tmp_path / "ours", tmp_path / "out")


def test_the_window_can_be_chosen(tmp_path):
    released_folder(tmp_path)
    for window, expected in (("configured", 8), (5, 5), (None, None)):
        folder = convert(tmp_path / "src", tmp_path / "out", window=window)
        assert NirvanaConfig.from_pretrained(folder).sliding_window == expected
