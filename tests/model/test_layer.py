"""One layer alone: initialised, equal to the model's, with its own masks, states and bank."""

import logging

import pytest
import torch

from nirvana import InputError, NirvanaConfig, NirvanaLayer, NirvanaModel, ops
from nirvana.model.attention import Attention
from nirvana.model.masks import create_masks
from nirvana.model.trigger import WeightBank
from nirvana.model.updater import Updater

VARIANTS = [
    {},
    {"trigger_decay": 0.8, "trigger_decay_learnable": True, "trigger_lr_learnable": True},
    {"interpolation": "independent", "rope_theta": 10000.0},
    {"gate": "input"},
    {"gate": "constant"},
    {"branches": "linear"},
    {"branches": "window"},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
SIZES = {"task_dim": 8, "bank_size": 4}


def make(**settings):
    """A float64 layer whose zero-initialised factors are filled."""
    layer = NirvanaLayer(48, 3, **{"sliding_window": 12, **SIZES, **settings}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return layer


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def _empty_is_nan():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_empty_is_nan")
@variants
def test_constructors_initialise(variant):
    assert torch.empty(3).isnan().all()
    layer = NirvanaLayer(48, 3, **variant)
    settings = {"hidden_size": 48, "num_attention_heads": 3, "num_prelude_layers": 1}
    config = NirvanaConfig(num_hidden_layers=3, **settings, **variant)
    others = [(Attention if config.branches == "window" else Updater)(config, i) for i in (0, 2)]
    for module in (layer, *others, WeightBank(config)):
        for name, parameter in module.named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.abs().max() < 20, name


@variants
def test_initial_values_are_those_of_a_model(variant):
    """Mean and spread of every parameter, within four standard errors."""
    settings = {"hidden_size": 96, "num_attention_heads": 3, "task_dim": 32, "bank_size": 16}
    layer = NirvanaLayer(96, 3, **{"task_dim": 32, "bank_size": 16, **variant})
    config = NirvanaConfig(
        vocab_size=8, num_hidden_layers=1, num_prelude_layers=0, **settings, **variant
    )
    model = NirvanaModel(config)
    inside = {f"updater.{n}": p for n, p in model.layers[0].updater.named_parameters()}
    inside |= {f"bank.{n}": p for n, p in model.bank.named_parameters()}
    alone = dict(layer.named_parameters())
    assert alone.keys() == inside.keys()
    for name, a in alone.items():
        b = inside[name]
        assert a.shape == b.shape
        if a.numel() < 50:
            continue
        spread = b.std().item()
        assert abs(a.mean() - b.mean()).item() <= 6 * spread / a.numel() ** 0.5 + 1e-9, name
        assert a.std().item() == pytest.approx(spread, rel=0.3), name


@variants
def test_a_layer_is_the_models(variant):
    layer, x = make(**variant), normal(2, 40, 48)
    fast = layer.bank.start(x) + normal(*layer.bank.start(x).shape) / 10
    masks = create_masks(layer.config, x, None, None, None)
    expected = layer.updater(x, fast, layer.bank, masks)
    y, fast_next, state = layer(x, fast)
    torch.testing.assert_close((y, fast_next), expected)
    assert state is None
    ones = layer.updater(x, layer.bank.start(x), layer.bank, masks)
    torch.testing.assert_close(layer(x)[:2], ones)


@variants
def test_layers_in_a_row_read_in_chunks_and_padded(variant):
    first = make(**variant)
    second = NirvanaLayer(48, 3, 12, bank=first.bank, **SIZES, **variant).double()
    x = normal(2, 40, 48)

    def read(x, states=(None, None), **mask):
        y, fast, low = first(x, state=states[0], return_state=True, **mask)
        z, _, high = second(x + y, fast, state=states[1], return_state=True, **mask)
        return x + y + z, (low, high)

    whole, _ = read(x)
    parts, states = [], (None, None)
    for chunk in x.split([1, 20, 0, 19], dim=1):
        y, states = read(chunk, states)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    mask = torch.ones(2, 40)
    mask[1, :17] = 0
    padded, _ = read(x, attention_mask=mask)
    torch.testing.assert_close(padded[0], whole[0])
    torch.testing.assert_close(padded[1:, 17:], read(x[1:, 17:])[0])
    packed, _ = read(x, position_ids=torch.cat([torch.arange(17), torch.arange(23)])[None])
    alone = torch.cat([read(x[:, :17])[0], read(x[:, 17:])[0]], dim=1)
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(read(x, cu_seqlens=[0, 17, 40, 57, 80])[0], alone)


def test_a_shared_bank_is_one_module():
    first = NirvanaLayer(48, 3, **SIZES)
    second = NirvanaLayer(48, 3, bank=first.bank, **SIZES)
    network = torch.nn.ModuleList([first, second])
    names = [name for name, _ in network.named_parameters()]
    assert second.bank is first.bank
    assert sum(name.endswith("bank.weight") for name in names) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 50, "num_heads": 3}, InputError, "NirvanaLayer: hidden_size = 50 must be"),
        ({"heads": 3}, TypeError, "unknown setting 'heads': there are branches"),
        ({"num_hidden_layers": 3}, TypeError, "unknown setting 'num_hidden_layers'"),
        (
            {"bank": "small"},
            InputError,
            r"task_dim and bank_size are \(8, 4\), needed are \(64, 32",
        ),
        ({"bank": "small", "branches": "linear"}, InputError, "needed are None"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    if "bank" in arguments:
        arguments = {**arguments, "bank": NirvanaLayer(48, 3, **SIZES).bank}
    with pytest.raises(error, match=message):
        NirvanaLayer(**{"hidden_size": 48, "num_heads": 3, **arguments})


def test_wrong_shapes_are_refused():
    layer = make()
    with pytest.raises(ValueError, match=r"x is \[2, 40, 32\]; it must be \[B, T, 48\]"):
        layer(normal(2, 40, 32))
    with pytest.raises(ValueError, match=r"the fast parameters are \[2, 40, 4, 3\]; .*one bank"):
        layer(normal(2, 40, 48), normal(2, 40, 4, 3))
    state = layer(normal(2, 40, 48), return_state=True).state
    with pytest.raises(ValueError, match="the state holds 2 rows, the batch has 3"):
        layer(normal(3, 40, 48), state=state)


def test_a_head_size_without_kernels_warns_once(monkeypatch, caplog):
    """Where the kernels would be used, that is, not on this CPU."""
    x = torch.randn(1, 5, 48)
    layer = NirvanaLayer(48, 3, **SIZES)
    model = NirvanaModel(layer.config)
    with caplog.at_level(logging.WARNING, "nirvana"):
        layer(x)
        assert not caplog.records
        monkeypatch.setattr(ops.dispatch, "suits_kernels", lambda x: True)
        ops.warn_without_kernels(x, 64)
        for _ in range(2):
            ops.warn_without_kernels(x, 16)
    assert [record.getMessage() for record in caplog.records] == [
        "no GPU kernel takes heads of 16: PyTorch computes them; there are kernels for 32, 64, 128"
    ]
    seen = []
    monkeypatch.setattr(ops.dispatch, "suits_kernels", lambda x: False)
    for module in ("layer", "nirvana"):
        name = f"nirvana.model.{module}.warn_without_kernels"
        monkeypatch.setattr(name, lambda x, head_dim, others: seen.append((head_dim, others)))
    layer(x)
    model(torch.zeros(1, 3, dtype=torch.long))
    assert seen == [(16, ())] * 2


def test_a_compiled_layer_is_eager():
    torch._dynamo.reset()
    layer, x = make(trigger_decay=0.5), normal(2, 30, 48)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[:2], layer(x)[:2])
