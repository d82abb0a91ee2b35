"""Compiles the kernels that an adopted Transformer adds to a block for an H100 or H200; needs
Triton, and no GPU. Prints what `compile_decode` prints."""

import torch
from compile_decode import launch  # type: ignore[import-not-found]  (beside this file)

from nirvana.ops.cuda import conv, sinks, unit

T = 512
SIZES = [(9, 3, 64, 4), (4, 2, 128, 16)]
"""H, G and K, and the number of sinks: of SmolLM2-135M, and the largest that the kernels take."""


def main():
    for module in (conv, sinks, unit):
        module.launch = launch
    half = {"dtype": torch.bfloat16}
    for H, G, K, number in SIZES:
        x, weight = torch.zeros(1, T, (H + 2 * G) * K, **half), torch.zeros((H + 2 * G) * K, 4)
        heads = torch.zeros(1, T, H, K, **half)
        grads = (heads, heads, heads)
        unit.forward(x, K, H, silu=False)
        unit.backward(grads, x, K, silu=False)
        conv.forward(x, weight, K, H, None, None, silu=True)
        conv.backward(grads, x, weight, K, None, None, silu=True)
        keys, sums = torch.zeros(1, number + T, G, K, **half), torch.zeros(1, T, H)
        given = (sums, heads, keys, keys, 512, torch.zeros(1, T, dtype=torch.long))
        sinks.add(heads, *given)
        sinks.backward(heads, heads, *given)


if __name__ == "__main__":
    main()
