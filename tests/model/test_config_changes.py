"""Fields that are set on a configuration that exists: what follows from them follows."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from nirvana import InputError, NirvanaConfig, NirvanaForCausalLM, preset
from nirvana.model.config import MAKE_LAYER_TYPES

TOKENS = torch.arange(1, 81).reshape(2, 40) % 61
KINDS = (
    {},
    {"sliding_window": None},
    {"branches": "window", "num_prelude_layers": 0},
    {"branches": "window", "num_prelude_layers": 0, "sliding_window": None},
    {"branches": "linear"},
    {"num_sinks": 2},
    {"branches": "window", "num_prelude_layers": 0, "num_sinks": 2},
)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("window", [None, 3, 9])
def test_another_window_computes_what_a_new_model_does(small_model, tmp_path, kind, window):
    if window is None and "num_sinks" in kind:
        pytest.skip("refused, see below")
    model = small_model(**kind)
    model.config.sliding_window = window
    expected = NirvanaForCausalLM(
        NirvanaConfig(**{**model.config.to_dict(), **kind, "sliding_window": window})
    )
    expected = expected.double().eval()
    expected.load_state_dict(model.state_dict())
    assert model.config.layer_types == expected.config.layer_types
    logits = expected(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, logits)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in TOKENS.split([17, 1, 22], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits)
    model.generation_config.pad_token_id = 0
    arguments = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(TOKENS, **arguments)
    assert torch.equal(found, expected.generate(TOKENS, **arguments, pad_token_id=0))
    model.config.save_pretrained(tmp_path)
    assert NirvanaConfig.from_pretrained(tmp_path).layer_types == expected.config.layer_types


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(({}, "sliding_window", wrong) for wrong in (1, 0, -3)),
        ({"branches": "linear"}, "sliding_window", 1),
        ({"num_sinks": 2}, "sliding_window", None),
        ({"sliding_window": None}, "num_sinks", 2),
        ({"branches": "linear"}, "num_sinks", 2),
        ({}, "num_sinks", -1),
    ],
)
def test_a_window_that_no_model_has_is_refused_and_changes_nothing(kind, name, value):
    config = preset("tiny", **kind)
    before = config.to_dict()
    with pytest.raises(InputError, match=r"^\w+ = .* must be .*$"):
        setattr(config, name, value)
    assert config.to_dict() == before


def test_the_other_name_of_a_field_is_checked_like_it():
    config = preset("tiny")
    config.window_size = None
    assert config.to_dict() == preset("tiny", sliding_window=None).to_dict()
    with pytest.raises(StrictDataclassError, match="sliding_window"):
        config.window_size = "8"
    assert config.sliding_window is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 5),
        ("num_prelude_layers", 3),
        ("branches", "window"),
        ("branches", "linear"),
        ("sliding_window", None),
        ("num_sinks", 4),
    ],
)
def test_layer_types_follow(tmp_path, name, value):
    """Of fields that are set, and of those that replace the values of a saved configuration."""
    assert name in MAKE_LAYER_TYPES
    config = preset("tiny")
    config.save_pretrained(tmp_path)
    setattr(config, name, value)
    expected = preset("tiny", **{name: value})
    assert config.layer_types == expected.layer_types
    assert config.to_dict() == expected.to_dict()
    read = NirvanaConfig.from_pretrained(tmp_path, **{name: value})
    assert read.layer_types == expected.layer_types


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kind", [{}, {"num_sinks": 2}, {"branches": "window"}], ids=str)
def test_a_cache_of_another_window_is_refused(small_model, kind, window):
    if window is None and "num_sinks" in kind:
        pytest.skip("refused, see above")
    model = small_model(**kind)
    cache = model(TOKENS[:, :20], use_cache=True).past_key_values
    model.config.sliding_window = window
    with pytest.raises(ValueError, match=r"keeps a window of \d+ tokens, .* DynamicCache"):
        model(TOKENS[:, 20:], past_key_values=cache)
