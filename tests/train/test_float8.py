"""Training in float8: the products, which maps have them, and runs. CPUs multiply in float8, too,
slowly, so that here only the check of the device is left out."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

from helpers.words import WORDS
from nirvana import NirvanaForCausalLM, preset
from nirvana.data.shards import tokenize
from nirvana.errors import InputError
from nirvana.train import float8
from nirvana.train.float8 import Float8Linear, use_float8
from nirvana.train.language import train
from nirvana.train.plan import estimate

# One head and 8 task components make in_proj 160 wide; that of the prelude is 130 wide.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "sliding_window": 16,
    "task_dim": 8,
    "bank_size": 2,
}
FORMATS = [(1.0, 1.0, 1.0), (1e4, 1e-3, 1e-9)]
"""Scales of inputs, weights and gradients."""


def relative(value, exact):
    return float(((value - exact).norm() / exact.norm()).detach())


def linear(wide=96, out=160):
    torch.manual_seed(0)
    return Float8Linear.of(nn.Linear(wide, out, bias=False))


@pytest.mark.parametrize("scales", FORMATS)
def test_values_and_gradients_are_those_of_float32_to_rounding(scales):
    """e4m3 rounds to 3 bits after the first, e5m2 to 2: root mean square errors of 2.6 and 5.2 %
    of a number, which products of independent numbers keep."""
    layer, (x_scale, w_scale, dy_scale) = linear(), scales
    x = (torch.randn(4, 16, 96) * x_scale).requires_grad_()
    with torch.no_grad():
        layer.weight.mul_(w_scale)
    dy = torch.randn(4, 16, 160) * dy_scale
    y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach()
    assert 0.01 < relative(y.detach(), x.detach() @ weight.T) < 0.045
    assert 0.01 < relative(x.grad, dy @ weight) < 0.07
    exact = torch.einsum("btn,btk->nk", dy, x.detach())
    assert 0.01 < relative(layer.weight.grad, exact) < 0.07


def test_zero_and_infinite_gradients():
    layer = linear()
    x = torch.randn(16, 96, requires_grad=True)
    layer(x).backward(torch.zeros(16, 160))
    assert not x.grad.any()
    layer.zero_grad()
    dy = torch.ones(16, 160)
    dy[3, 5] = torch.inf
    layer(x).backward(dy)
    assert not layer.weight.grad.isfinite().all()  # the loop then leaves the step out


def test_autocast_gives_its_dtype():
    layer, x = linear(), torch.randn(16, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), x @ layer.weight.T) < 0.045


def test_evaluation_and_odd_numbers_of_tokens_are_not_rounded():
    layer, x = linear(), torch.randn(16, 96)
    exact = nn.functional.linear(x, layer.weight)
    assert torch.equal(layer(x[:15]), exact[:15])
    assert not torch.equal(layer(x), exact)
    assert torch.equal(layer.eval()(x), exact)


def test_compiles_to_one_graph():
    layer, x = linear(), torch.randn(16, 96)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_large_maps_of_the_blocks_alone():
    model = NirvanaForCausalLM(preset("tiny", **SIZES))
    before = {name: id(p) for name, p in model.named_parameters()}
    assert use_float8(model.model.layers) == ["130 x 32"]
    assert {name: id(p) for name, p in model.named_parameters()} == before
    found = {name for name, part in model.named_modules() if type(part) is Float8Linear}
    shared = ("updater.out_proj", "mlp.gate_up_proj", "mlp.down_proj")
    expected = {f"model.layers.{i}.{part}" for i in range(3) for part in shared}
    assert found == expected | {"model.layers.2.updater.in_proj"}


def test_a_model_in_float8_has_about_the_same_loss_and_gradient():
    torch.manual_seed(0)
    plain = NirvanaForCausalLM(preset("tiny", **SIZES)).train()
    rounded = copy.deepcopy(plain)
    use_float8(rounded.model.layers)
    ids = torch.randint(plain.config.vocab_size, (2, 32))
    losses, gradients = [], []
    for model in (plain, rounded):
        loss = model(input_ids=ids, labels=ids, skip_logits=True).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert 0 < relative(*gradients[::-1]) < 0.05


def test_compiled_blocks_notice():
    """Even where PyTorch's guards skip modules that have the same objects as in the last call."""
    torch.manual_seed(0)
    plain = NirvanaForCausalLM(preset("tiny", **SIZES)).train()
    model = copy.deepcopy(plain)
    ids = torch.randint(plain.config.vocab_size, (2, 32))

    def losses():
        both = (model, plain)
        return [each(input_ids=ids, labels=ids, skip_logits=True).loss.item() for each in both]

    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        for block in model.model.layers:
            block.compile(backend="eager", dynamic=False)
        before = [losses() for _ in range(4)]
        assert all(ours == its for ours, its in before)
        for each in (model, plain):
            use_float8(each.model.layers)
        ours, its = losses()
    assert ours == its != before[0][1]


@pytest.fixture
def settings(tmp_path):
    """A small training; `run.out` is "run"."""
    torch.manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,))) for _ in range(30)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    tokenize([tmp_path / "a.jsonl"], tmp_path / "shards", None, 300)
    path = tmp_path / "config.toml"
    lines = ["[model]", *(f"{name} = {value}" for name, value in SIZES.items())]
    lines += ["[data]", f"train.a = '{tmp_path / 'shards'}'"]
    lines += ["context_length = 16", "batch_size = 2"]
    lines += ["[optim]", "lr = 0.01", "warmup_steps = 1"]
    lines += ["[run]", "steps = 6", "device = 'cpu'", "precision = 'fp8'", "compile = false"]
    lines += ["log_interval = 1", f"out = '{tmp_path / 'run'}'"]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def float8_anywhere(monkeypatch):
    monkeypatch.setattr(float8, "has_float8", lambda device: True)


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def test_training_resumes_bitwise_and_only_in_its_precision(
    settings, float8_anywhere, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        assert train(settings).finished
    assert "products of 130 x 32 stay in bf16: float8 needs multiples of 16" in caplog.messages
    in_float8 = losses(tmp_path / "run")
    plain = [f"--run.out={tmp_path / 'plain'}", "--run.precision=float32"]
    train(settings, plain)
    assert in_float8 != losses(tmp_path / "plain")
    assert in_float8 == pytest.approx(losses(tmp_path / "plain"), rel=0.01)
    steps = [f"--run.out={tmp_path / 'parts'}", "--run.checkpoint_interval=3"]
    train(settings, steps)
    last = tmp_path / "parts/checkpoints/step-00000006"
    last.rename(tmp_path / "last")
    with pytest.raises(InputError, match=r"run\.precision: fp8 -> float32"):
        train(settings, [*steps, "--run.precision=float32"], resume=True)
    train(settings, steps, resume=True)
    assert losses(tmp_path / "parts")[:3] + losses(tmp_path / "parts")[-3:] == in_float8


def test_odd_micro_batches_are_logged(settings, float8_anywhere, tmp_path, caplog):
    odd = ["--data.context_length=9", "--run.steps=1"]
    with caplog.at_level(logging.WARNING):
        train(settings, odd)
    assert "products of 18 tokens stay in bf16: float8 needs multiples of 16" in caplog.messages
    train(settings, [*odd, "--run.precision=float32", f"--run.out={tmp_path / 'plain'}"])
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_devices_without_float8_are_refused(settings):
    for call in (train, estimate):
        with pytest.raises(InputError, match="'fp8': cpu has no matrix products in float8"):
            call(settings)
    with pytest.raises(InputError, match="'fp8': A100 has no matrix products in float8"):
        estimate(settings, device_name="A100")
    in_float8 = estimate(settings, device_name="H100")
    in_bf16 = estimate(settings, ["--run.precision=bf16"], device_name="H100")
    # Shares of the peak are of that in bf16.
    assert in_float8 == in_bf16
    assert "seconds per step, at 40% MFU" in in_float8
