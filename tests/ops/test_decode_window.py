"""The window branch of one token computes attention: over several programs, with shared heads, with
sinks, of which some texts still see none; without a GPU, in Triton's interpreter."""

import pytest
import torch

from nirvana import NirvanaConfig
from nirvana.model.attention import Rotary, attend, frequencies, rotate

pytest.importorskip("triton")
from triton import knobs

from nirvana.ops.cuda import decode_window

W, T, K, RANK = 150, 170, 32, 5
COUNTS = (169, 151, 150, 149, 1)
"""Tokens read before the one of each text: 3, 2, 1, 0 and 0 of its sinks have left the window."""


@pytest.fixture(autouse=True)
def _where_triton_runs(device):
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton is compiled for the GPU here")


@pytest.mark.parametrize(
    ("programs", "parts"), [(528, 64), (528, 1), (1, 64)], ids=["many", "in turn", "one"]
)
@pytest.mark.parametrize(("H", "G"), [(2, 2), (6, 2), (17, 1)])
@pytest.mark.parametrize("theta", [None, 50.0])
def test_one_token_is_attention(monkeypatch, programs, parts, H, G, theta):
    monkeypatch.setattr(decode_window, "PROGRAMS", programs)
    monkeypatch.setattr(decode_window, "PARTS", parts)
    config = NirvanaConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        sliding_window=W,
        num_sinks=3,
        rope_theta=theta,
    )
    rotary, B, wide = Rotary.of(config), len(COUNTS), (H + 2 * G) * K
    x, factors = torch.randn(B, T, wide), torch.randn(B, T, 3 * RANK)
    up = torch.randn(3, RANK, H * K) if H == G else torch.randn(RANK, wide)
    q, k, v = with_low_rank(*(y.double() for y in (x, factors, up)), H, G)
    positions = torch.arange(T)[None]
    masks = dict.fromkeys(("segments", "cu_seqlens", "lengths", "window"))
    masks |= {"positions": positions, "index": positions}
    expected = attend(q, k, v, config, rotary, masks, None, None, 0)

    if rotary is not None:
        k = rotate(k, positions, rotary)
    rings, count = torch.zeros(2, B, G, W, K), torch.tensor(COUNTS)
    sinks = torch.zeros(B, 2, G, K, 3)
    for b, read in enumerate(COUNTS):
        for ring, y, kept in zip(rings, (k, v), sinks.unbind(1), strict=True):
            seen = torch.arange(max(0, read - W), read)
            ring[b][:, seen % W] = y[b, seen].transpose(0, 1).float()
            first = min(3, read)
            kept[b, ..., :first] = y[b, :first].permute(1, 2, 0).float()
    turns = None
    if rotary is not None:
        turns = torch.empty(B, 2, K)
        frequency = frequencies(rotary, K, x.device)
        decode_window.rotary(count, frequency, rotary.factor, turns, W + 3 - 1)
    rows = torch.arange(B)
    row, out = torch.cat([x, factors], 2)[rows, count], torch.empty(B, H * K)
    scratch = decode_window.window_scratch(rings[0], H)
    kept = (*rings, sinks.view(B, 2 * G * K, 3), count, turns, W)
    for _ in range(2):  # the second call finds what the first one left
        out.fill_(torch.nan)
        decode_window.window(row, row[:, wide:], up, *kept, scratch, out)
        actual = out.double().view(B, H, K)
        torch.testing.assert_close(actual, expected[rows, count], rtol=0, atol=1e-4)
    written = torch.stack([k[-1, 1], v[-1, 1]]).float()  # the last text's second token
    torch.testing.assert_close(sinks[-1, ..., 1], written, rtol=0, atol=1e-4)
    torch.testing.assert_close(rings[:, -1, :, 1], written, rtol=0, atol=1e-4)
    assert not sinks[-1, ..., 2].any()


def with_low_rank(x, factors, up, H, G):
    parts = []
    for part, (plain, factor) in enumerate(
        zip(x.split([H * K, G * K, G * K], 2), factors.chunk(3, 2), strict=True)
    ):
        own = up[part] if up.ndim == 3 else up.split([H * K, G * K, G * K], 1)[part]
        parts.append((plain + factor @ own).unflatten(2, (-1, K)))
    return parts
