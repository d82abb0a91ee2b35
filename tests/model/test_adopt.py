"""Adoption of pretrained Transformers: random checkpoints of every family, and a real one."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nirvana import InputError
from nirvana.data.tokenizer import copy_tokenizer
from nirvana.model.adopt import adopt, load_teacher
from nirvana.model.assets import load_language_model
from nirvana.packaged import packaged

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-no-groups": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 17, "head_dim": 8}),
    "mistral-no-window": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 20}),
}
SMOLLM2 = "NIRVANA_SMOLLM2"


def save_teacher(folder: Path, kind: str) -> torch.nn.Module:
    """A random model whose norms and biases matter, with a tokenizer."""
    model_class, config_class, fields = TEACHERS[kind]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 1.0))
    model.save_pretrained(folder)
    copy_tokenizer(packaged("tiny"), folder)
    return model


def tokens_of(B: int, T: int) -> torch.Tensor:
    return torch.randint(2, 8192, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", TEACHERS)
@torch.no_grad()
def test_attention_alone_is_the_teacher(tmp_path, kind):
    teacher, tokens = save_teacher(tmp_path / "teacher", kind), tokens_of(2, 70)
    report = adopt(tmp_path / "teacher", tmp_path / "out", "window")
    model, _ = load_language_model(tmp_path / "out")
    expected = teacher(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5
    assert report["new parameters"] == 0
    assert report["parameters"] == sum(p.numel() for p in teacher.parameters())
    used = [name for each in report["mapped"].values() for name in each["from"]]
    assert sorted(used) == sorted(dict(teacher.named_parameters()))
    assert json.loads((tmp_path / "out" / "adopt.json").read_text()) == report


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "llama-llama3"])
@torch.no_grad()
def test_untrained_it_is_the_teacher_within_the_window(tmp_path, kind):
    teacher, tokens = save_teacher(tmp_path / "teacher", kind), tokens_of(2, 40)
    report = adopt(tmp_path / "teacher", tmp_path / "out", "both", window=16)
    model, _ = load_language_model(tmp_path / "out")
    expected, found = teacher(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found[:, :16], expected[:, :16], rtol=0, atol=1e-4)
    assert (found[:, 16 + 8 :] - expected[:, 16 + 8 :]).abs().max() > 1e-2
    assert (model.config.sliding_window, model.config.num_sinks) == (16, 4)
    assert report["step 0"] == "the teacher, up to 16 tokens"
    assert 0 < report["new parameters"] < report["mapped parameters"]


@torch.no_grad()
def test_the_window_is_a_mask_on_the_teacher(tmp_path):
    """Beyond the window, too: without sinks it is the teacher with the same sliding window."""
    teacher, tokens = save_teacher(tmp_path / "teacher", "mistral"), tokens_of(2, 60)
    adopt(tmp_path / "teacher", tmp_path / "out", "both", window=None)
    model, _ = load_language_model(tmp_path / "out")
    torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_linear_branch_alone_starts_without_attention(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "llama")
    report = adopt(tmp_path / "teacher", tmp_path / "out", "linear")
    model, _ = load_language_model(tmp_path / "out")
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    tokens = tokens_of(2, 30)
    torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits, rtol=0, atol=1e-4)
    assert report["step 0"].startswith("not the teacher")


def test_the_linear_branch_learns_at_once(tmp_path):
    """Its output gate of zero has a gradient."""
    save_teacher(tmp_path / "teacher", "llama")
    adopt(tmp_path / "teacher", tmp_path / "out", window=8)
    model, _ = load_language_model(tmp_path / "out")
    model(tokens_of(1, 30), labels=tokens_of(1, 30)).loss.backward()
    size, (H, _, K) = model.config.qkv_size, model.config.head_sizes
    gradient = model.model.layers[0].updater.in_proj.weight.grad
    assert (gradient[size : size + H * K].abs().sum(1) > 0).all()


@torch.no_grad()
def test_precision_tokenizer_and_chat_template_are_kept(tmp_path):
    save_teacher(tmp_path / "teacher", "qwen2")
    (tmp_path / "teacher" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    report = adopt(tmp_path / "teacher", tmp_path / "out", precision="bf16")
    model, tokenizer = load_language_model(tmp_path / "out", dtype=torch.bfloat16)
    assert report["tokenizer"] == "the teacher's"
    assert model.config.dtype == torch.bfloat16
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "Hi!"
    text = "The patients were randomly assigned."
    assert tokenizer(text) == AutoTokenizer.from_pretrained(packaged("tiny"))(text)


def test_a_missing_bos_token_is_named(tmp_path):
    """Shards need one; Qwen's tokenizers have none."""
    save_teacher(tmp_path / "teacher", "qwen2")
    path = tmp_path / "teacher" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["bos_token"]
    path.write_text(json.dumps(settings))
    report = adopt(tmp_path / "teacher", tmp_path / "out")
    _, tokenizer = load_language_model(tmp_path / "out")
    assert tokenizer.bos_token == tokenizer.pad_token
    assert "as the BOS token that it lacks" in report["tokenizer"]


def test_unknown_architectures_are_refused_in_one_line(tmp_path):
    config = PhiConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    PhiForCausalLM(config).save_pretrained(tmp_path / "teacher")
    message = "type 'phi' cannot be adopted: supported are Llama .*, Mistral, Qwen2 .*, Qwen3"
    with pytest.raises(InputError, match=message):
        adopt(tmp_path / "teacher", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = true cannot be adopted"),
        ("llama", {"mlp_bias": True}, "mlp_bias = true cannot be adopted"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' must be 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = 'dynamic' cannot be adopted, only linear, llama3, yarn",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "layers with and without a sliding window",
        ),
    ],
)
def test_what_no_setting_expresses_is_refused(tmp_path, kind, fields, message):
    model_class, config_class, _ = TEACHERS[kind]
    model_class(config_class(**{**SIZES, **fields})).save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match=message):
        adopt(tmp_path / "teacher", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_damaged_and_missing_teachers_are_refused(tmp_path):
    with pytest.raises(InputError, match="no model"):
        adopt(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(b"not one")
    with pytest.raises(InputError, match=r"a\.gguf"):
        adopt(tmp_path / "a.gguf", tmp_path / "out")
    save_teacher(tmp_path / "teacher", "llama")
    with pytest.raises(InputError, match="lies in the input"):
        adopt(tmp_path / "teacher", tmp_path / "teacher" / "out")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="does not hold a language model"):
        adopt(tmp_path / "teacher", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "teacher"]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(tmp_path):
    """The real SmolLM2-135M-Instruct, from its GGUF file."""
    if SMOLLM2 not in os.environ:
        pytest.skip(f"needs SmolLM2-135M-Instruct: set {SMOLLM2} to its GGUF file")
    pytest.importorskip("gguf")
    path = Path(os.environ[SMOLLM2])
    tokens = torch.randint(2, 49152, (1, 96), generator=torch.Generator().manual_seed(2))
    teacher = load_teacher(path).model
    expected = teacher(tokens).logits
    for branches, window in (("window", None), ("both", 128)):
        adopt(path, tmp_path / branches, branches, window)
        model, tokenizer = load_language_model(tmp_path / branches)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    for each in (teacher, model):
        answer = each.generate(**prompt, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_precision_is_the_teachers(tmp_path, dtype):
    """float16 has another range than bfloat16, so it becomes float32."""
    save_teacher(tmp_path / "teacher", "llama").to(dtype).save_pretrained(tmp_path / "teacher")
    adopt(tmp_path / "teacher", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        found = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert found == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}


@torch.no_grad()
def test_a_head_beside_a_configuration_that_ties_it(tmp_path):
    """The library loads a head that is in the file, and so computes with it."""
    save_teacher(tmp_path / "teacher", "llama")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    tokens = tokens_of(2, 20)
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)(tokens)
    report = adopt(tmp_path / "teacher", tmp_path / "out", "window")
    model, _ = load_language_model(tmp_path / "out")
    torch.testing.assert_close(model(tokens).logits, expected.logits, rtol=0, atol=1e-4)
    assert "lm_head.weight" in report["mapped"]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "other"])
def test_quantised_weights_are_refused(tmp_path, method):
    save_teacher(tmp_path / "teacher", "llama")
    path = tmp_path / "teacher" / "config.json"
    quantized = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantized}))
    with pytest.raises(InputError, match=r"quantised weights .* cannot be adopted"):
        adopt(tmp_path / "teacher", tmp_path / "out")
    assert not (tmp_path / "out").exists()
