"""The Trigger's kernels against the definitions: values, gradients, and compilation.

On a machine without a GPU they run in Triton's interpreter (see conftest.py); on one with a GPU
they run there, and the interpreter's variants skip.
"""

import pytest
import torch

from nirvana import NirvanaForCausalLM, preset
from nirvana.ops import decayed_sum, dispatch, limits, reference

pytest.importorskip("triton")
from nirvana.ops.cuda import trigger as kernels

SIZES = [(3, 23, 8, 4), (1, 70, 13, 5), (2, 2, 32, 17), (1, 20, 100, 3)]  # B, T, C, R


@pytest.fixture(autouse=True)
def _where_triton_runs(device, monkeypatch):
    if device == "cpu":
        if not kernels.knobs.runtime.interpret:
            pytest.skip("Triton is compiled for the GPU here")
        # Programs without tokens take the interpreter as long as others.
        monkeypatch.setattr(kernels, "WEIGHT_PARTS", 3)


def make_inputs(B, T, C, R, dtype=torch.float32) -> dict[str, torch.Tensor]:
    inputs = {
        "qkv": torch.randn(B, T, 3 * C),
        "fast": 1 + torch.randn(B, T, 4, R) / 2,
        "weight": torch.randn(C, C, R) / (C * R) ** 0.5,
        "gain": torch.randn(C, R),
        "bias": torch.randn(C, R),
        "shift": torch.randn(C, R),
        "lr": torch.tensor(0.1),
        "decay": torch.tensor(0.8),
    }
    kept = ("fast", "lr", "decay")
    return {k: (x if k in kept else x.to(dtype)).requires_grad_() for k, x in inputs.items()}


def step(gradient, apply, qkv, fast, lr, decay, segments, **bank):
    """A step of the Trigger with memory if segments are given, through either implementation."""
    q, k, v = qkv.chunk(3, dim=-1)
    g = gradient(k, v, fast, **bank)
    if segments is not None:
        g = decayed_sum(g.flatten(2), decay, None, segments)[0].view_as(g)
    fast = fast - lr * g
    return apply(q, fast, **bank), fast


def kernel_step(inputs, exact=True, segments=None):
    def gradient(k, v, fast, **bank):
        return kernels.trigger_gradient(k, v, fast, **bank, exact=exact)

    return step(gradient, kernels.trigger_apply, **inputs, segments=segments)


def reference_step(inputs, exact=True, segments=None):
    def gradient(k, v, fast, **bank):
        return reference.trigger_gradient(k, v, fast, **bank, exact=exact)

    return step(gradient, reference.trigger_apply, **inputs, segments=segments)


def relative_errors(actual, expected, inputs):
    """By name, in norm. The gradients of lr and decay are inner products that cancel, so their
    errors are relative to the product of both norms, up to a factor of about one."""
    change = (expected["fast_after"] - inputs["fast"]).norm() * expected["fast"].norm()
    sizes = {name: y.norm() for name, y in expected.items()}
    sizes |= {"lr": change / inputs["lr"], "decay": change}
    return {name: ((actual[name] - y).norm() / sizes[name]).item() for name, y in expected.items()}


def values_and_gradients(run, inputs, exact, segments, dtype):
    """Of h and fast, weighted at random; the same weights at every call."""
    inputs = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    h, fast = run(inputs, exact, segments)
    generator = torch.Generator(h.device).manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device=x.device) for x in (h, fast)]
    loss = (h * weights[0]).sum() + (fast * weights[1]).sum()
    loss.backward()
    gradients = {name: x.grad for name, x in inputs.items() if x.grad is not None}
    return {"h": h, "fast_after": fast} | gradients


@pytest.mark.parametrize(
    ("exact", "memory"),
    [(True, False), (False, False), (True, True)],
    ids=["exact", "truncated", "memory"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition_in_float64(size, dtype, tolerance, exact, memory):
    inputs = make_inputs(*size, dtype)
    B, T, _, _ = size
    segments = torch.randint(0, 2, (B, T)).cumsum(1) if memory else None
    actual = values_and_gradients(kernel_step, inputs, exact, segments, None)
    expected = values_and_gradients(reference_step, inputs, exact, segments, torch.float64)
    assert actual.keys() == expected.keys() >= {"qkv", "fast", "weight", "gain", "bias", "lr"}
    assert ("decay" in actual) == memory
    assert actual["h"].dtype == actual["qkv"].dtype == actual["weight"].dtype == dtype
    assert actual["fast_after"].dtype == torch.float32
    errors = relative_errors(actual, expected, inputs)
    assert max(errors.values()) < tolerance, errors


def test_bf16_tokens_meet_a_float32_bank():
    inputs = make_inputs(1, 20, 8, 4)
    inputs["qkv"] = inputs["qkv"].bfloat16()
    actual = values_and_gradients(kernel_step, inputs, True, None, None)
    expected = values_and_gradients(reference_step, inputs, True, None, torch.float64)
    errors = relative_errors(actual, expected, inputs)
    assert actual["weight"].dtype == torch.float32
    assert max(errors.values()) < 1e-2, errors


def test_a_frozen_bank_gets_no_gradient():
    inputs = make_inputs(1, 10, 8, 4)
    for name in ("weight", "gain", "bias", "shift"):
        inputs[name].requires_grad_(False)
    h, _ = kernel_step(inputs)
    h.sum().backward()
    assert inputs["weight"].grad is None
    assert inputs["qkv"].grad.any()


def test_more_tokens_than_one_program_of_the_weights_gradient_takes(monkeypatch, device):
    if device == "cpu":  # where each block takes the interpreter a while, whatever its size
        monkeypatch.setattr(kernels, "WEIGHT_BLOCK", 16)
    tokens = kernels.WEIGHT_BLOCK * kernels.WEIGHT_PARTS + 3
    inputs = make_inputs(1, tokens, 4, 2)
    actual = values_and_gradients(kernel_step, inputs, True, None, None)
    expected = values_and_gradients(reference_step, inputs, True, None, torch.float64)
    errors = relative_errors(actual, expected, inputs)
    assert max(errors.values()) < 1e-5, errors


def test_without_gradients_and_in_inference_mode():
    inputs = make_inputs(1, 10, 8, 4)
    expected = kernel_step(inputs)[0].detach()
    with torch.no_grad():
        torch.testing.assert_close(kernel_step(inputs)[0], expected)
    with torch.inference_mode():
        torch.testing.assert_close(kernel_step(inputs)[0], expected)


def test_compiles_without_graph_breaks(device):
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(kernel_step, fullgraph=True, backend=backend)
    inputs = make_inputs(2, 9, 8, 4)
    segments = torch.tensor([[0] * 4 + [1] * 5] * 2)
    torch.set_default_device(None)  # which Dynamo cannot trace through
    actual = values_and_gradients(compiled, inputs, True, segments, None)
    expected = values_and_gradients(kernel_step, inputs, True, segments, None)
    errors = relative_errors(actual, expected, inputs)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", ["gradient", "apply", "weight"])
def test_is_a_proper_operation(name):
    inputs = make_inputs(1, 5, 8, 4)
    qkv, fast = inputs["qkv"].detach()[0], inputs["fast"].detach()[0]
    q, k, v = (x.requires_grad_() for x in qkv.chunk(3, dim=-1))
    bank = [inputs["weight"].detach().permute(2, 0, 1).contiguous().requires_grad_()]
    bank += [inputs[x] for x in ("gain", "bias", "shift")]
    if name == "gradient":
        torch.library.opcheck(kernels._gradient, (k, v, fast, *bank, True))
    elif name == "apply":
        torch.library.opcheck(kernels._apply, (q, fast.requires_grad_(), *bank))
    else:
        q, k, v = (x.detach().contiguous() for x in (q, k, v))
        args = (q, bank[0].detach(), fast, k, fast, v)
        torch.library.opcheck(kernels._weight_gradient, args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("task_dim", [128, 129])
def test_task_vectors_too_wide_for_the_kernels_are_computed_by_pytorch(task_dim):
    """Both learn, one with the kernels."""
    config = preset("tiny", task_dim=task_dim, bank_size=4, num_hidden_layers=3, vocab_size=64)
    model = NirvanaForCausalLM(config).to("cuda", torch.bfloat16)
    ids = torch.randint(64, (1, 40), device="cuda")
    model(ids, labels=ids).loss.backward()
    assert model.model.bank.weight.grad.isfinite().all()
    with dispatch.recorded_backends() as used, torch.no_grad():
        model(ids)
    name = "cuda" if task_dim <= limits.MAX_TASK_DIM else "chunked"
    assert used["trigger_gradient"] == used["trigger_apply"] == [name]
