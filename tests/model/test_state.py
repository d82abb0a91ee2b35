"""The state as a value: reading in chunks is reading the whole text, gradients included."""

import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from helpers.adopted_settings import ADOPTED
from nirvana import NirvanaConfig, NirvanaForCausalLM, without_trigger
from nirvana.generate.graph_decoder import Decoder
from nirvana.model.state import State

VARIANTS = [
    {},
    {"trigger_decay": 0.0},
    {"interpolation": "independent", "trigger_gradient": "truncated", "sliding_window": None},
    {"rope_theta": 10000.0, "trigger_decay": [0.0, 0.9], "conv_size": 2},
    {"num_prelude_layers": 0, "tie_word_embeddings": False, "sliding_window": 2},
    {"trigger_step": "normalised"},
    {"gate": "input"},
    {"branches": "linear"},
    {"branches": "window", "num_prelude_layers": 0, "rope_theta": 10000.0, "sliding_window": None},
    {"branches": "window", "num_prelude_layers": 1},
    *ADOPTED,
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
CHUNKS = [1, 2, 70, 5, 64, 8]


def tokens_of(B, T, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randint(1, 61, (B, T), generator=generator, device="cpu")
    return tokens.to(torch.get_default_device())


def read(model, tokens, chunks, state=None, between=lambda state: state, **arguments):
    """The logits of all chunks side by side, and the last state; arguments are cut like tokens."""
    parts, begin = [], 0
    for length in chunks:
        here = slice(begin, begin + length)
        given = {name: x[:, here] for name, x in arguments.items()}
        out = model(tokens[:, here], state=state, return_state=True, **given)
        assert out.past_key_values is None
        state = between(out.state)
        parts.append(out.logits)
        begin += length
    assert begin == tokens.shape[1]
    return torch.cat(parts, dim=1), state


def tensors(state):
    return [x for x in pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]


def gradients(model, outputs):
    """Of a random sum of the outputs, by name."""
    generator = torch.Generator(outputs.device).manual_seed(1)
    weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((outputs * weights).sum(), parameters, retain_graph=True)
    return dict(zip(names, grads, strict=True))


@pytest.mark.usefixtures("device")
@variants
def test_chunks_are_the_whole_text(small_model, variant):
    model, tokens = small_model(**variant), tokens_of(2, sum(CHUNKS))
    whole = model(tokens).logits
    chunked, state = read(model, tokens, CHUNKS)
    torch.testing.assert_close(chunked, whole)
    # The Trigger's steps amplify rounding: on a GPU one number in 6,144 differed by 1.7e-7.
    bounds = {"rtol": 1e-6, "atol": 1e-7} if tokens.is_cuda else {}
    torch.testing.assert_close(gradients(model, chunked), gradients(model, whole), **bounds)
    assert state.position.tolist() == [150, 150]
    assert not state.ragged


@variants
def test_a_start_of_zeros_is_no_state(small_model, variant):
    """And the shapes of its parts stay the same, where there is a window or no window branch."""
    model, tokens = small_model(**variant), tokens_of(2, 30)
    start = State.start(model.config, 2, dtype=torch.float64)
    chunked, last = read(model, tokens, [1, 20, 9], start)
    torch.testing.assert_close(chunked, model(tokens).logits)
    shapes = [[x.shape for x in tensors(state)] for state in (start, last)]
    if model.config.sliding_window is not None:
        assert shapes[0] == shapes[1]


@variants
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_no_state(small_model, variant, side):
    """Rows end in different chunks; a row's state is that of its own tokens alone."""
    model, chunks = small_model(**variant), [7, 20, 16]
    lengths = [(7, 20, 16), (7, 9, 0), (3, 0, 5), (0, 1, 2)]
    tokens, mask = tokens_of(4, 43, seed=3), torch.zeros(4, 43, dtype=torch.long)
    for row, reals in enumerate(lengths):
        begin = 0
        for length, real in zip(chunks, reals, strict=True):
            first = {"left": length - real, "right": 0, "inside": (length - real) // 2}[side]
            mask[row, begin + first : begin + first + real] = 1
            begin += length
    if side == "inside":  # some padding between the tokens of a row's chunk, too
        mask[0, 30] = 0
    logits, state = read(model, tokens, chunks, attention_mask=mask)
    for row in range(4):
        real = mask[row].bool()
        alone, expected = read(model, tokens[row : row + 1, real], [int(real.sum())])
        torch.testing.assert_close(logits[row, real], alone[0])
        following = tokens_of(1, 5, seed=9)
        torch.testing.assert_close(
            model(following, state=state.select([row])).logits,
            model(following, state=expected).logits,
        )
        assert state.position[row] == real.sum()


@variants
def test_gradients_of_padded_chunks_are_those_of_the_rows(small_model, variant):
    model, tokens = small_model(**variant), tokens_of(2, 40, seed=3)
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0
    logits, _ = read(model, tokens, [16, 16, 8], attention_mask=mask)
    rows = [model(tokens[:1]).logits, model(tokens[1:, :25]).logits]
    alone = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (0, 0, 0, 15))])
    shown = mask[..., None]
    torch.testing.assert_close(gradients(model, logits * shown), gradients(model, alone * shown))


@pytest.mark.usefixtures("device")
@variants
@pytest.mark.parametrize("chunks", [[30], [3, 2, 16, 2, 7], [20, 10], [1] * 30])
def test_packed_samples_go_on_by_their_positions(small_model, variant, chunks):
    """A chunk may end and begin anywhere in a sample, also at its border. The second sample is
    longer than the window."""
    model, lengths = small_model(**variant), [5, 15, 2, 8]
    tokens = tokens_of(1, 30)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    separate = torch.cat([model(piece).logits for piece in tokens.split(lengths, dim=1)], dim=1)
    packed, state = read(model, tokens, chunks, position_ids=positions)
    torch.testing.assert_close(packed, separate)
    torch.testing.assert_close(gradients(model, packed), gradients(model, separate))
    assert state.position.tolist() == [8]


def test_the_first_chunk_takes_every_form_of_packing(small_model):
    model, lengths = small_model(), [7, 23, 5, 15]
    tokens = tokens_of(1, 50)
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(lengths))[None]
    separate = torch.cat([model(piece).logits for piece in tokens.split(lengths, dim=1)], dim=1)
    blocks = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    for given in (
        {"attention_mask": numbers},
        {"attention_mask": blocks},
        {"seq_idx": numbers},
        {"cu_seqlens": borders},
    ):
        out = model(tokens, return_state=True, **given)
        torch.testing.assert_close(out.logits, separate)
        more = tokens_of(1, 9, seed=5)
        expected = model(torch.cat([tokens[:, 35:], more], 1)).logits[:, 15:]
        torch.testing.assert_close(model(more, state=out.state).logits, expected)


def test_a_detached_state_is_a_constant(small_model):
    """The gradient of a chunk behind a detached state is that with the state's values fixed."""
    model, tokens = small_model(), tokens_of(2, 40)
    _, state = read(model, tokens[:, :30], [30])
    assert any(x.requires_grad for x in tensors(state))
    with torch.no_grad():
        _, fixed = read(model, tokens[:, :30], [30])
    behind = [model(tokens[:, 30:], state=each).logits for each in (state.detach(), fixed, state)]
    torch.testing.assert_close(gradients(model, behind[0]), gradients(model, behind[1]))
    whole, truncated = gradients(model, behind[2]), gradients(model, behind[0])
    assert (whole["model.bank.weight"] - truncated["model.bank.weight"]).abs().max() > 1e-6


def test_sixteen_chunks_train_as_the_whole_text():
    """The loss and its gradients in float32, to 1e-4; labels of a chunk's end are in the next."""
    torch.manual_seed(2)
    config = NirvanaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        sliding_window=24,
        task_dim=16,
        bank_size=8,
        trigger_decay=0.9,
    )
    model = NirvanaForCausalLM(config)
    tokens = torch.randint(300, (2, 512))
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    whole = model(tokens, labels=tokens, skip_logits=True).loss
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    state, total = None, 0.0
    for chunk, shifted in zip(tokens.chunk(16, 1), labels.chunk(16, 1), strict=True):
        out = model(
            chunk,
            shift_labels=shifted,
            num_items_in_batch=2 * 511,
            skip_logits=True,
            state=state,
            return_state=True,
        )
        state, total = out.state, total + out.loss
    assert abs(total - whole).item() < 1e-4
    total.backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error < 1e-4, name


class _Saved:
    """One tensor that autograd keeps, counted while it does."""

    alive = 0

    def __init__(self, x):
        self.x = x.detach()  # an output would keep the node that keeps it
        size = x.numel() * x.element_size()
        _Saved.alive += size
        weakref.finalize(self, _Saved.release, size)

    @staticmethod
    def release(size):
        _Saved.alive -= size


@pytest.mark.parametrize("detached", [True, False])
def test_memory_does_not_grow_with_the_chunks(small_model, detached):
    model, tokens = small_model(), tokens_of(2, 16 * 32)
    highest, loss, state = [], 0.0, None
    with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.x):
        for chunk in tokens.split(32, dim=1):
            out = model(chunk, labels=chunk, skip_logits=True, state=state, return_state=True)
            highest.append(_Saved.alive)
            if detached:
                out.loss.backward()
                state = out.state.detach()
                out = None
                assert _Saved.alive == 0
            else:
                loss, state = loss + out.loss, out.state
    if detached:
        assert max(highest) == pytest.approx(highest[1], rel=0.05)
    else:
        assert highest[15] > 12 * highest[0]
    out = loss = state = None
    assert _Saved.alive == 0


@torch.no_grad()
def test_a_state_holds_no_more_than_it_needs(small_model):
    """No view of a chunk's tensors, which would keep all of them."""
    model = small_model()
    _, state = read(model, tokens_of(2, 200), [100, 100])
    start = State.start(model.config, 2, dtype=torch.float64)
    size = [sum(x.untyped_storage().nbytes() for x in tensors(each)) for each in (state, start)]
    assert size[0] == size[1]


@torch.no_grad()
def test_rows_are_selected_and_sent_to_a_device(small_model):
    model, tokens, more = small_model(), tokens_of(3, 20), tokens_of(3, 9, seed=7)
    _, state = read(model, tokens, [20])
    expected = model(torch.cat([tokens, more], 1)).logits[:, 20:]
    order = [2, 0, 0, 1]
    chosen = state.select(torch.tensor(order))
    assert chosen.rows == 4
    torch.testing.assert_close(model(more[order], state=chosen).logits, expected[order])
    assert state.to("meta").position.device.type == "meta"
    keys = state.to("meta").layers[3].keys
    assert keys.device.type == "meta"


@torch.no_grad()
def test_a_state_is_a_value(small_model):
    """Nothing is written in place: one state can be gone on from twice."""
    model, tokens = small_model(), tokens_of(1, 30)
    _, state = read(model, tokens[:, :20], [20])
    first, second = (model(tokens[:, 20:], state=state, return_state=True) for _ in range(2))
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=0)
    torch.testing.assert_close(first.logits, model(tokens).logits[:, 20:])


@variants
@torch.no_grad()
def test_a_state_becomes_a_cache(small_model, variant):
    """Generation goes on where chunks ended, rows of several lengths and packed rows included."""
    model, tokens = small_model(**variant), tokens_of(2, 40)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for length in (5, 30):
        _, state = read(model, tokens[:, : length - 1], [length - 1])
        found = model.generate(
            tokens[:, :length], past_key_values=state.to_cache(model.config), **settings
        )
        expected = model.generate(tokens[:, :length], **settings)
        torch.testing.assert_close(found, expected)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 9:] = 0
    _, state = read(model, tokens, [16, 16, 8], attention_mask=mask)
    last = tokens_of(2, 1, seed=8)
    prompt = torch.zeros(2, 41, dtype=torch.long)
    prompt[0], prompt[1, 31:] = torch.cat([tokens[0], last[0]]), torch.cat([tokens[1, :9], last[1]])
    shown = torch.cat([state.attention_mask(), torch.ones_like(last)], dim=1)
    assert shown.sum(1).tolist() == [41, 10]
    given = {"attention_mask": shown, **settings}
    found = model.generate(prompt, past_key_values=state.to_cache(model.config), **given)
    torch.testing.assert_close(found, model.generate(prompt, **given))
    positions = torch.cat([torch.arange(30), torch.arange(10)]).expand(2, -1)
    _, state = read(model, tokens, [16, 16, 8], position_ids=positions)
    prompt = torch.cat([tokens[:, 30:], last], dim=1)
    found = model.generate(prompt, past_key_values=state.to_cache(model.config), **settings)
    torch.testing.assert_close(found, model.generate(prompt, **settings))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_a_state(small_model, reentrant):
    model, tokens = small_model().train(), tokens_of(2, 40)
    expected = gradients(model, read(model, tokens, [16, 16, 8])[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(ValueError, match="no gradient in reentrant checkpointing"):
            read(model, tokens, [16, 16, 8])
        return
    torch.testing.assert_close(gradients(model, read(model, tokens, [16, 16, 8])[0]), expected)


def test_compiled_chunks_are_eager(small_model):
    """One whole graph for all chunks of one length, behind a start of fixed shapes."""
    torch._dynamo.reset()
    model, tokens = small_model(num_hidden_layers=3), tokens_of(2, 64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    start = State.start(model.config, 2, dtype=torch.float64)
    found, _ = read(compiled, tokens, [16] * 4, start)
    expected, _ = read(model, tokens, [16] * 4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected))
    assert counter.frame_count <= 2


@torch.no_grad()
def test_states_without_trigger(small_model):
    model, tokens = small_model(), tokens_of(2, 30)
    with without_trigger(model):
        torch.testing.assert_close(read(model, tokens, [11, 19])[0], model(tokens).logits)


@torch.no_grad()
def test_no_token_changes_nothing(small_model):
    model, tokens = small_model(), tokens_of(2, 30)
    logits, state = read(model, tokens, [0, 11, 0, 19])
    torch.testing.assert_close(logits, model(tokens).logits)
    assert state.position.tolist() == [30, 30]


@torch.no_grad()
def test_the_trunk_and_tuples_return_states(small_model):
    model, tokens = small_model(), tokens_of(2, 30)
    out = model.model(tokens[:, :20], return_state=True, output_trigger=True)
    assert len(out.trigger) == 2
    *_, state = model(tokens[:, :20], return_state=True, return_dict=False)
    assert isinstance(state, State)
    for each in (out.state, state):
        torch.testing.assert_close(
            model(tokens[:, 20:], state=each).logits, model(tokens).logits[:, 20:]
        )
    assert model(tokens, state=None).get("state") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": "cache"}, "state and cache are two ways to continue a text: give one"),
        ({"attention_mask": torch.ones(2, 30)}, r"has the shape \[2, 30\]; behind a state it must"),
        ({"attention_mask": torch.tensor([[1] * 5 + [2] * 5] * 2)}, "use position_ids"),
        ({"seq_idx": torch.zeros(2, 10)}, "seq_idx is for rows without cached tokens"),
        ({"cu_seqlens": [0, 10, 20]}, "cu_seqlens is for rows without cached tokens"),
        ({"attention_mask": torch.ones(2, 1, 10, 10).tril()}, "a 4D attention_mask is for rows"),
    ],
    ids=["cache", "mask of the past", "numbers", "seq_idx", "cu_seqlens", "4D"],
)
def test_what_a_state_does_not_take_is_refused(small_model, given, message):
    model, tokens = small_model(), tokens_of(2, 20)
    state = model(tokens, return_state=True).state
    if "cache" in given:
        given = {"cache": DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :10], state=state, **given)


def test_states_of_other_models_are_refused(small_model):
    model, tokens = small_model(), tokens_of(2, 20)
    state = model(tokens, return_state=True).state
    with pytest.raises(ValueError, match="the state holds 2 rows, the batch has 1"):
        model(tokens[:1], state=state)
    with pytest.raises(ValueError, match="the state has 4 layers, the model 3"):
        small_model(num_hidden_layers=3)(tokens, state=state)
    with pytest.raises(ValueError, match=r"conv of layer 0 of the state is .* another model's"):
        small_model(conv_size=3)(tokens, state=state)
    with pytest.raises(ValueError, match="not a loss and not a state"):
        model(tokens, return_state=True, past_key_values=Decoder(model, compiled=False))


@pytest.mark.parametrize("kind", [{}, {"num_sinks": 2}, {"branches": "linear"}], ids=str)
def test_gradients_through_a_cache_are_those_of_a_state(small_model, kind):
    """Though the library's caches overwrite the states that the backward needs."""
    model = small_model(**kind, trigger_decay_learnable=True)
    tokens = torch.arange(1, 61).reshape(2, 30) % 61
    chunks, grads = tokens.split([14, 1, 15], 1), []
    for cached in (True, False):
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        state, loss = None, torch.zeros(())
        for chunk in chunks:
            if cached:
                out = model(chunk, past_key_values=cache, use_cache=True)
            else:
                out = model(chunk, state=state, return_state=True)
                state = out.state
            loss = loss + out.logits.square().mean()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_a_cache_with_detached_states_truncates_the_gradient(small_model):
    model = small_model()
    tokens = torch.arange(1, 61).reshape(2, 30) % 61
    cache = model(tokens[:, :14], use_cache=True).past_key_values
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                setattr(layer, name, value.detach())
            elif isinstance(value, dict):
                setattr(
                    layer,
                    name,
                    {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in value.items()},
                )
    state = model(tokens[:, :14], return_state=True).state.detach()
    grads = []
    for past in ({"past_key_values": cache}, {"state": state}):
        model.zero_grad()
        model(tokens[:, 14:], **past).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)
