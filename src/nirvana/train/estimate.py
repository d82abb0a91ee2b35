"""Estimates of what a training needs: floating-point operations, peak throughput, memory."""

import torch
from torch import nn

from nirvana.model.config import NirvanaConfig

# FLOP/s of dense bf16 matrix products from the data sheets, by a part of the device's name.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device, precision: str) -> float:
    """Returns the peak throughput of a device.

    Args:
        device: any device.
        precision: `run.precision`.

    Returns:
        bf16 FLOP/s; 0 for an unknown device, and for a run that does not compute in bf16.
    """
    if device.type != "cuda" or precision != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), 0.0)


def flops_per_token(model: nn.Module, config: NirvanaConfig, context_length: int) -> float:
    """Counts the useful floating-point operations of training per token.

    A forward and a backward pass; recomputation is not counted. Products with weights: 6 for each
    entry (the tied embedding counts once, as the head). Delta rule: three products with the state.
    Window attention: two products with the keys that a token attends to on average in a row of one
    document. Trigger: two products with the bank.

    Args:
        model: of `config`, also on the meta device.
        config: sizes of the model.
        context_length: T, tokens of a row.

    Returns:
        FLOP per token.
    """
    T, D, K = context_length, config.hidden_size, config.head_dim
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and not name.endswith(("conv_weight", "bank.gain", "bank.bias", "bank.shift"))
        and (config.tie_word_embeddings or "embed_tokens" not in name)
    )
    weights += sum(p.numel() for n, p in model.named_parameters() if n.endswith("window_up"))
    W = T if config.sliding_window is None else min(T, config.sliding_window)
    attended = W - W * (W - 1) / (2 * T)
    later = config.num_hidden_layers - config.num_prelude_layers
    linear = config.num_prelude_layers if config.branches == "window" else config.num_hidden_layers
    windows = 0 if config.branches == "linear" else later
    triggers = later if config.has_trigger else 0
    forward = 2 * weights
    forward += linear * 6 * D * K + windows * 4 * attended * D
    forward += triggers * 4 * config.task_dim**2 * config.bank_size
    return 3.0 * forward


def memory_bytes(
    model: nn.Module,
    config: NirvanaConfig,
    tokens: int,
    parts: int = 1,
    recompute: int = 0,
) -> dict[str, float]:
    """Estimates the memory of a training on each device.

    Args:
        model: of `config`, also on the meta device.
        config: sizes of the model.
        tokens: of a micro batch.
        parts: processes over which the state is sharded.
        recompute: every n-th block is recomputed; 0: none.

    Returns:
        Bytes. "state": float32 weights, gradients and two moments, 16 bytes a parameter.
        "activations": bfloat16 tensors that the blocks keep for the backward pass, about 12 D + 2 F
        numbers per token and layer (F: width of SwiGLU), for a recomputed block its input only; and
        the logits with their gradient.
    """
    D, F = config.hidden_size, config.intermediate_size or 0
    kept, whole = 4 * D + 16 * config.bank_size, 2 * (12 * D + 2 * F)
    layers = config.num_hidden_layers
    recomputed = -(-layers // recompute) if recompute else 0
    per_token = recomputed * kept + (layers - recomputed) * whole + (whole if recomputed else 0)
    return {
        "state": 16.0 * sum(p.numel() for p in model.parameters()) / parts,
        "activations": float(tokens * (per_token + 8 * config.vocab_size)),
    }
