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
