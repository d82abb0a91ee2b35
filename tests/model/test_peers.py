"""The model's peers, which are settings of its own configuration."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana import InputError, NirvanaConfig, NirvanaForCausalLM, preset
from nirvana.generate.graph_decoder import Decoder

TRANSFORMER = {"branches": "window", "num_prelude_layers": 0, "rope_theta": 10000.0}


def llama_weights(model):
    """The weights of a model of attention alone under transformers' names for Llama."""
    own, weights = model.state_dict(), {}
    for name, tensor in own.items():
        stem, _, part = name.partition(".updater.in_proj")
        if part:
            for which, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{stem}.self_attn.{which}_proj.weight"] = third
        elif "mlp.gate_up_proj" in name:
            for which, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
                weights[name.replace("gate_up", which)] = half
        else:
            name = name.replace("updater.out_proj", "self_attn.o_proj")
            name = name.replace("updater_norm", "input_layernorm")
            weights[name.replace("mlp_norm", "post_attention_layernorm")] = tensor
    return weights


@torch.no_grad()
def test_the_transformer_is_transformers_llama(small_model):
    model = small_model(**TRANSFORMER, sliding_window=None)
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    )
    llama = llama.double().eval()
    missing, extra = llama.load_state_dict(llama_weights(model), strict=False)
    assert (missing, extra) == ([], [])
    assert sum(p.numel() for p in llama.parameters()) == sum(p.numel() for p in model.parameters())
    tokens = torch.randint(61, (2, 70))
    # Llama's angles are float32 whatever the model's dtype.
    torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["input", "constant"])
def test_no_trigger_means_no_bank_and_no_step(small_model, gate):
    model = small_model(gate=gate)
    assert not [name for name, _ in model.named_parameters() if "bank" in name or "trigger" in name]
    assert not model.config.has_memory
    assert model(torch.randint(61, (1, 9)), output_trigger=True).trigger == ()


@torch.no_grad()
def test_a_constant_gate_is_blind_to_the_text(small_model):
    model = small_model(gate="constant")
    updater = model.model.layers[-1].updater
    a, b = (updater.gates(torch.randn(2, 5, 0).double()) for _ in range(2))
    assert a.shape == (2, 5, 1)
    assert torch.equal(a, b)
    assert a.unique().numel() == 1


@torch.no_grad()
def test_the_decoder_reads_the_linear_peer(small_model):
    model, tokens = small_model(branches="linear"), torch.randint(61, (2, 30))
    decoder = Decoder(model)
    parts = [decoder.prefill(tokens[:, :20])]
    parts += [decoder.step(tokens[:, t : t + 1]) for t in range(20, 30)]
    torch.testing.assert_close(torch.stack(parts, 1), model(tokens).logits[:, 19:])


def test_a_gate_needs_two_branches():
    for branches in ("linear", "window"):
        with pytest.raises(InputError, match=r"gate = 'input' must be left out"):
            preset("tiny", branches=branches, gate="input")


def test_each_part_costs_only_those_that_have_it():
    """Against the count with everything, in which all else is equal."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 50, "sliding_window": 16}

    def rest(**fields):
        """FLOP of a token that are not products with weights."""
        config = NirvanaConfig(**sizes, num_hidden_layers=4, **fields)
        with torch.device("meta"):
            model = NirvanaForCausalLM(config)
        skipped = ("conv_weight", "bank.gain", "bank.bias", "bank.shift")
        weights = sum(
            p.numel()
            for n, p in model.named_parameters()
            if not n.endswith(skipped) and (p.ndim == 2 or n.endswith("window_up"))
        )
        return model.flops_per_token(64) / 6 - weights

    delta, bank = 3 * 64 * 32, 2 * 64 * 64 * 32
    window = 2 * (16 - 16 * 15 / 128) * 64
    assert rest() == pytest.approx(4 * delta + 2 * window + 2 * bank)
    assert rest(gate="input") == pytest.approx(4 * delta + 2 * window)
    assert rest(branches="linear") == pytest.approx(4 * delta)
    assert rest(branches="window") == pytest.approx(2 * delta + 2 * window)


def test_a_normalised_step_moves_every_vector_alike(small_model):
    """lr times the root of R, whatever the size of the gradient."""
    model = small_model(trigger_step="normalised", trigger_decay=0.0)
    (first, *_) = model(torch.randint(61, (2, 9)), output_trigger=True).trigger
    expected = 0.2 * (4 * model.config.bank_size) ** 0.5
    assert first.change == pytest.approx(torch.full((2, 9), expected).numpy(), rel=0.02)
