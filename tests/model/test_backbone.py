"""Backbones of every kind: built, the same every time, and distinguished."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana import InputError
from nirvana.data.tokenizer import load_tokenizer
from nirvana.model.backbone import backbone_folder, fingerprint, load_backbone
from nirvana.model.trigger import Trigger


@pytest.mark.parametrize("kind", ["gated_deltanet", "transformer"])
def test_random_backbones_are_the_same_every_time(kind):
    torch.manual_seed(1)
    one = load_backbone(kind)
    state = torch.get_rng_state()
    other = load_backbone(kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(one, None) == fingerprint(other, None)
    assert not one.training
    assert one.config.hidden_size == load_backbone("nirvana").config.hidden_size
    assert not any(isinstance(module, Trigger) for module in one.modules())
    x = torch.randn(2, 5, one.config.hidden_size)
    h = one.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
    changed = x.clone()
    changed[:, 3] += 1
    later = one.base_model(inputs_embeds=changed, use_cache=False).last_hidden_state
    torch.testing.assert_close(later[:, :3], h[:, :3])
    assert not torch.allclose(later[:, 4], h[:, 4])


def test_a_random_nirvana_has_the_architecture_of_the_packaged_one():
    packaged, one, other = (load_backbone("nirvana", w) for w in ("default", "random", "random"))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (packaged, one)]
    assert shapes[0] == shapes[1]
    assert fingerprint(one, None) == fingerprint(other, None)
    assert fingerprint(one, None) != fingerprint(packaged, None)
    assert not one.training
    without = load_backbone("nirvana-without-trigger", "random")
    assert fingerprint(without, None) == fingerprint(one, None)
    traces = without.model(torch.arange(20)[None], output_trigger=True).trigger
    assert all(not trace.change.any() for trace in traces)
    assert backbone_folder("random") == backbone_folder()


def test_without_trigger_no_step_is_taken():
    whole, without = load_backbone("nirvana"), load_backbone("nirvana-without-trigger")
    assert fingerprint(whole, None) == fingerprint(without, None)
    ids = torch.arange(20)[None]
    traces = without.model(input_ids=ids, output_trigger=True).trigger
    assert all(not trace.change.any() for trace in traces)
    assert any(trace.change.any() for trace in whole.model(ids, output_trigger=True).trigger)


def test_none_is_the_identity():
    assert load_backbone("none") is None


def test_foreign_weights_come_from_a_folder(tmp_path):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path / "llama")
    loaded = load_backbone("transformer", str(tmp_path / "llama"))
    assert fingerprint(loaded, None) == fingerprint(model, None)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(backbone_folder(str(tmp_path / "llama")))
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="does not hold a language model"):
        load_backbone("transformer", str(tmp_path / "llama"))
    with pytest.raises(InputError, match="give a folder"):
        load_backbone("gated_deltanet", "huge")


def test_a_nirvana_is_no_transformer(tmp_path):
    load_backbone("nirvana").save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="holds a nirvana"):
        load_backbone("transformer", str(tmp_path / "model"))


def test_fingerprints_distinguish_one_bit_on_request():
    model = torch.nn.Linear(2, 2)
    rounded, exact = fingerprint(model), fingerprint(model, None)
    with torch.no_grad():
        model.weight[0, 0] *= 1 + 2e-7
    assert fingerprint(model) == rounded
    assert fingerprint(model, None) != exact
