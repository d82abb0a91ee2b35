"""torch.export: programs for any batch and length compute what the model computes."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim, ShapesCollection, export
from torch.utils import _pytree as pytree
from transformers import DynamicCache, StaticCache

from nirvana import NirvanaForSequenceClassification, State
from nirvana.generate.graph_decoder import Decoder

VARIANTS = [
    {},
    {"rope_theta": 10000.0, "conv_size": 2, "interpolation": "independent", "sliding_window": None},
    {"branches": "linear", "trigger_step": "normalised"},
    {"branches": "window"},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
TWO_LAYERS = {"num_hidden_layers": 2, "num_prelude_layers": 1}


def tokens_of(B, T):
    return torch.randint(1, 61, (B, T))


def program(model, lengths=(), **given):
    """The exported model: every batch size is dynamic, and the lengths of the named arguments."""
    shapes, long = ShapesCollection(), [id(given[name]) for name in lengths]
    for x in pytree.tree_leaves(given):
        if isinstance(x, torch.Tensor):
            shapes[x] = dict.fromkeys((0, 1) if id(x) in long else (0,), Dim.DYNAMIC)
    return export(model, (), given, dynamic_shapes=shapes.dynamic_shapes(model, (), given))


@variants
@torch.no_grad()
def test_any_batch_and_length(small_model, variant):
    model = small_model(**TWO_LAYERS, **variant)
    exported = program(model, ["input_ids"], input_ids=tokens_of(3, 130)).module()
    for B, T in ((1, 1), (2, 2), (1, 12), (5, 64), (2, 65), (1, 300)):
        tokens = tokens_of(B, T)
        torch.testing.assert_close(exported(input_ids=tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_padded_and_packed(small_model):
    model = small_model(**TWO_LAYERS)
    given = {
        name: torch.ones(3, 130, dtype=torch.long) for name in ("attention_mask", "position_ids")
    }
    exported = program(model, ["input_ids", *given], input_ids=tokens_of(3, 130), **given).module()
    for B, T in ((2, 2), (1, 33), (4, 150)):
        tokens, mask = tokens_of(B, T), torch.ones(B, T, dtype=torch.long)
        mask[0, : T // 3], mask[-1, T - T // 3 :] = 0, 0
        positions = torch.arange(T).repeat(B, 1)
        positions[:, T // 2 :] -= T // 2
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        real = mask.bool()
        torch.testing.assert_close(exported(**given).logits[real], model(**given).logits[real])


@variants
@torch.no_grad()
def test_steps_and_chunks_with_a_state(small_model, variant):
    """The step of one token, and chunks of any length, both with states of fixed shapes."""
    model = small_model(**TWO_LAYERS, **{**variant, "sliding_window": 12})
    start = State.start(model.config, 3, dtype=torch.float64)
    how = {"state": start, "return_state": True}
    chunk = program(model, ["input_ids"], input_ids=tokens_of(3, 70), **how).module()
    step = program(model, input_ids=tokens_of(3, 1), **how).module()
    for B in (1, 4):
        tokens, parts = tokens_of(B, 100), []
        state = State.start(model.config, B, dtype=torch.float64)
        for piece in tokens.split([1, 1, 66, 2, *[1] * 20, 10], dim=1):
            run = step if piece.shape[1] == 1 else chunk
            out = run(input_ids=piece, state=state, return_state=True)
            state = out.state
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits)


@torch.no_grad()
def test_a_saved_program_runs_without_the_package(small_model, tmp_path):
    model, tokens = small_model(**TWO_LAYERS), tokens_of(2, 90)
    expected, model.config.return_dict = model(tokens).logits, False
    saved = program(model, ["input_ids"], input_ids=tokens_of(3, 130))
    torch.export.save(saved, tmp_path / "program.pt2")
    torch.save(tokens, tmp_path / "tokens.pt")
    code = """
import sys
sys.modules["nirvana"] = sys.modules["transformers"] = None
import torch
program, tokens = torch.export.load("program.pt2").module(), torch.load("tokens.pt")
torch.save(program(input_ids=tokens)[0], "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@torch.no_grad()
def test_classifiers(small_model):
    trunk = small_model(**TWO_LAYERS, num_labels=3)
    model = NirvanaForSequenceClassification(trunk.config).double().eval()
    mask = torch.ones(3, 130, dtype=torch.long)
    given = {"input_ids": tokens_of(3, 130), "attention_mask": mask}
    exported = program(model, given, **given).module()
    tokens, mask = tokens_of(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :30] = 0
    found = exported(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(found, model(tokens, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static", "decoder", "loss"])
@torch.no_grad()
def test_what_cannot_be_exported_is_refused(small_model, kind):
    model = small_model(**TWO_LAYERS)
    tokens = tokens_of(2, 30)
    if kind == "loss":
        given = {"labels": tokens, "skip_logits": True}
        with pytest.raises(ValueError, match=r"torch.export needs logits"):
            export(model, (tokens,), given)
        return
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
        "decoder": lambda: Decoder(model, compiled=False),
    }[kind]()

    class Continued(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(tokens, past_key_values=cache).logits

    with pytest.raises(ValueError, match=r"torch.export cannot follow a .*(Cache|Decoder), which"):
        export(Continued(), (tokens,))
