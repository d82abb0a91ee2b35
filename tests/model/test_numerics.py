"""bfloat16 against float64, and values at their limits."""

import copy
from pathlib import Path

import pytest
import torch

from nirvana import NirvanaConfig, NirvanaForCausalLM, ops
from nirvana.model.assets import load_language_model
from nirvana.model.trigger import Trigger
from nirvana.model.updater import Updater

ROOT = Path(__file__).parents[2]


def deep_model(depth: int, num_tokens: int) -> tuple[NirvanaForCausalLM, torch.Tensor]:
    """Trained weights at any depth, and tokens of text.

    The prelude of the packaged `tiny`, then its other blocks in their order, each as often as the
    depth requires. Random matrices will not do: they amplify a perturbation of the embeddings
    twenty times within 22 layers, trained ones hardly at all.
    """
    tiny, tokenizer = load_language_model("tiny")
    prelude = tiny.config.num_prelude_layers
    fields = {"num_hidden_layers": depth, "layer_types": None}
    model = NirvanaForCausalLM(NirvanaConfig(**{**tiny.config.to_dict(), **fields}))
    source, target = tiny.model, model.model
    for part in ("embed_tokens", "bank", "norm"):
        getattr(target, part).load_state_dict(getattr(source, part).state_dict())
    trained = len(source.layers) - prelude
    for i, layer in enumerate(target.layers):
        j = i if i < prelude else prelude + (i - prelude) * trained // (depth - prelude)
        layer.load_state_dict(source.layers[j].state_dict())
    files = [ROOT / "README.md", *sorted((ROOT / "src/nirvana/model").glob("*.py"))]
    text = "".join(file.read_text() for file in files)
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]
    assert tokens.shape == (1, num_tokens)
    return model.eval(), tokens


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "num_tokens"), [(8, 4096), (22, 1024)])
@torch.no_grad()
def test_bfloat16_is_within_two_percent_of_float64(depth, num_tokens):
    """Frobenius norm of the logits' difference against that of the logits, over all tokens, of a
    long text and of a deep model: rounding adds up over blocks, not over tokens."""
    model, tokens = deep_model(depth, num_tokens)
    half = copy.deepcopy(model).bfloat16()
    for ours, theirs in zip(half.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs)  # so that only arithmetic differs
    expected = copy.deepcopy(model).double()(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens).logits
    for logits in (half(tokens).logits, mixed):
        assert logits.dtype == torch.bfloat16
        assert (logits.double() - expected).norm() < 0.02 * expected.norm()


def section(updater: Updater, index: int) -> torch.Tensor:
    """The rows of the input projection for 0 qkv, 1 gate, 2 beta, 3 alpha, 4 low rank, 5 task."""
    return updater.in_proj.weight.split(updater.sections)[index]


def scaled(index: int, scale: float):
    def change(model: NirvanaForCausalLM) -> None:
        for updater in updaters(model):
            if index < len(updater.sections):
                section(updater, index).mul_(scale)

    return change


def filled(name: str, value: float):
    def change(model: NirvanaForCausalLM) -> None:
        for updater in updaters(model):
            getattr(updater, name).fill_(value)

    return change


def saturated_gates(model: NirvanaForCausalLM) -> None:
    for updater in updaters(model):
        if updater.has_trigger:
            updater.gate_proj.weight.mul_(1e6)


def no_task(model: NirvanaForCausalLM) -> None:
    """Variance zero in the Trigger's normalisation."""
    scaled(5, 0.0)(model)
    model.model.bank.bias.zero_()


def constant_task(model: NirvanaForCausalLM) -> None:
    """The same value in all entries of z: variance zero again, around another mean."""
    bank = model.model.bank
    bank.weight.fill_(0.3)
    bank.bias.fill_(-2.0)


def great_steps(model: NirvanaForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Trigger):
            module.fixed_lr = 1e3


def updaters(model: NirvanaForCausalLM) -> list[Updater]:
    return [layer.updater for layer in model.model.layers]


EXTREMES = {
    "A_log = 20": filled("A_log", 20.0),
    "A_log = -20": filled("A_log", -20.0),
    "dt_bias = 1e4": filled("dt_bias", 1e4),
    "dt_bias = -1e4": filled("dt_bias", -1e4),
    "qkv": scaled(0, 1e4),
    "no qkv": scaled(0, 0.0),
    "gate": scaled(1, 1e4),
    "beta": scaled(2, 1e4),
    "alpha": scaled(3, 1e4),
    "low rank": scaled(4, 1e4),
    "task": scaled(5, 1e4),
    "no task": no_task,
    "constant task": constant_task,
    "saturated gates": saturated_gates,
    "step size 1e3": great_steps,
}
TEXTS = {
    "random": torch.randint(61, (2, 130), generator=torch.Generator().manual_seed(0)),
    "one token repeated": torch.full((1, 512), 5),
    "T = 1": torch.tensor([[5]]),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes_stay_finite(small_model, dtype, extreme, text):
    model = small_model()
    with torch.no_grad():
        EXTREMES[extreme](model)
    model.to(dtype)
    logits = model(TEXTS[text]).logits
    assert logits.isfinite().all()
    logits.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("log_alpha", [-1.0, -1e2, -1e4, -1e12, float("-inf")])
def test_forgetting_at_once_keeps_later_decays(log_alpha):
    """One token that forgets everything; what is written after it fades as it should."""
    q, k, v = torch.randn(3, 1, 100, 2, 8)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    beta, decay = torch.rand(1, 100, 2), torch.full((1, 100, 2), -0.05)
    decay[:, [3, 70]] = log_alpha
    inputs = [x.requires_grad_() for x in (q, k, v, decay, beta)]
    results = []
    for backend in ("chunked", "reference"):
        with ops.use_backend(backend):
            o, last = ops.gated_delta_rule(*inputs)
        results.append((o, last, torch.autograd.grad(o.square().sum(), inputs[:3] + inputs[4:])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_long_text_in_pieces_is_the_whole(small_model):
    model = small_model(
        hidden_size=16, num_attention_heads=1, num_hidden_layers=3, sliding_window=128
    ).float()
    tokens = torch.randint(61, (1, 131_072))
    whole = model(tokens).logits
    assert whole.isfinite().all()
    cache, parts = None, []
    for piece in tokens.split([65_537, 1, 7, *[1_024] * 63, 1_015], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
