"""What may see what within a row: sample borders, padding, and the window over cached keys."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from nirvana.model.config import NirvanaConfig

Masks = dict[str, Tensor | None]


def create_masks(
    config: NirvanaConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Masks:
    """Made once for all layers.

    Returns:
        segments: `[B, T]` or None, see `nirvana.ops`; padding is a sample of its own, so that it
            reaches nothing.
        window: `[B, 1, T, S]`, true where a query sees a cached or new key; None where
            `window_attention` finds that out itself: unless a static cache has empty places, or
            padding and borders lie among cached keys.
        cu_seqlens: int32 `[samples + 1]`, the same borders and those of rows for the GPU's kernels;
            None without segments, and on other devices. What was given on the CPU is completed
            there (`position_ids` beside it must say the same), and what was given for one row is
            taken as it is; otherwise it is counted on the device, and the host waits for that.
        positions: `[B, T]` or `[1, T]`, for rotary embeddings; packed samples start at 0 again.

    Raises:
        ValueError: when padding would come to stand between a sample's cached and new tokens, and
            for `cu_seqlens` that does not go from the batch's first token to its end.
    """
    B, T = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past, num_keys, offset = 0, T, 0
    if past_key_values is not None:
        first = config.counting_layer
        past = past_key_values.get_seq_length(first)
        num_keys, offset = past_key_values.get_mask_sizes(T, first)
    if attention_mask is not None and _may_look() and attention_mask.all():
        attention_mask = None
    if attention_mask is not None and past_key_values is not None and _may_look():
        _refuse_padding_inside(attention_mask, T)
    new = torch.arange(past, past + T, device=device)
    border = _borders(attention_mask, position_ids, cu_seqlens, B, T, past, device)
    segments = None if border is None else border.cumsum(1)
    began = _began(position_ids, new) if num_keys > T else None
    window = None
    static = past_key_values is not None and past_key_values.is_compileable
    bordered = any(x is not None for x in (attention_mask, segments, began))
    if static or (num_keys > T and bordered):
        keys = torch.arange(offset, offset + num_keys, device=device)
        window = keys <= new[:, None]
        if config.sliding_window is not None:
            window = window & (keys > new[:, None] - config.sliding_window)
        window = window[None]
        if attention_mask is not None:
            padded = F.pad(attention_mask, (0, max(0, offset + num_keys - attention_mask.shape[1])))
            window = window & padded[:, None, offset : offset + num_keys].bool()
        if segments is not None:
            before = past - offset
            owner = F.pad(segments, (before, num_keys - before - T))
            window = window & (owner[:, None] == segments[:, :, None])
        if began is not None:
            window = window & (keys >= began[..., None])
        # A padded query sees itself: a row that sees nothing would be NaN.
        window = (window | (keys == new[:, None]))[:, None].expand(B, 1, -1, -1)
    positions = new[None] if position_ids is None else position_ids
    if position_ids is None and cu_seqlens is not None and border is not None:
        positions = new - (new * border).cummax(1).values
    return {
        "segments": segments,
        "cu_seqlens": _cu_seqlens(border, attention_mask, position_ids, cu_seqlens),
        "window": window,
        "positions": positions,
    }


def _may_look() -> bool:
    """Inference looks at the masks' values; a training step must not wait for the device, and a
    compiled one cannot branch."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _refuse_padding_inside(attention_mask: Tensor, T: int) -> None:
    """The states in the cache are those of a row's last column, padding or not."""
    seen = attention_mask.cumsum(1) > 0
    inside = seen[:, :-1] & (attention_mask[:, :-1] == 0) & (attention_mask[:, 1:] != 0)
    if attention_mask.shape[1] > T and inside[:, -T:].any():
        raise ValueError(
            "attention_mask has padding between a row's cached and its new tokens: pad on the left"
        )


def _began(position_ids: Tensor | None, new: Tensor) -> Tensor | None:
    """The column in which each new token's sample began `[B, T]`; None if all began the row. The
    cached keys before it are of other samples."""
    if position_ids is None:
        return None
    began = new - position_ids
    return None if _may_look() and not (began > 0).any() else began


def _borders(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    B: int,
    T: int,
    past: int,
    device: torch.device,
) -> Tensor | None:
    """True where a token starts a sample, or padding begins `[B, T]`; None where none does."""
    given = [x for x in (attention_mask, position_ids, cu_seqlens) if x is not None]
    if not given or (T == 1 and past == 0):
        return None
    border = torch.zeros(B, T, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        on_host = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host or _may_look():
            first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
            if (first, last) != (0, B * T):
                message = f"cu_seqlens goes from {first} to {last}, not from 0 to {B} x {T} tokens"
                raise ValueError(message)
        starts = border.new_zeros(B * T + 1)
        starts[cu_seqlens.to(device, torch.long)] = True
        border[:, 1:] |= starts[:-1].view(B, T)[:, 1:]
    if position_ids is not None:
        border[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        if past > 0:
            border[:, 0] |= position_ids[:, 0] == 0
    if attention_mask is not None:
        local = attention_mask[:, -T:]
        border[:, 1:] |= local[:, 1:] != local[:, :-1]
    return None if _may_look() and not border.any() else border


def _cu_seqlens(
    border: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    given: Tensor | None,
) -> Tensor | None:
    if border is None or not border.is_cuda or torch.compiler.is_compiling():
        return None
    if given is None or attention_mask is not None:
        borders = _counted(border)
    elif given.device.type == "cpu":
        borders = _completed(given, *border.shape)
    else:
        borders = given if position_ids is None and len(border) == 1 else _counted(border)
    borders = borders.to(border.device, torch.int32)
    # Blocks are compiled once for any number of documents, not again for each.
    torch._dynamo.maybe_mark_dynamic(borders, 0)
    return borders


def _counted(border: Tensor) -> Tensor:
    """Where samples and rows start and end; on a GPU the host waits for it."""
    starts = border.clone()
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel())


def _completed(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Where samples and rows start and end, of what may leave out that rows do."""
    return torch.cat([cu_seqlens, torch.arange(0, B * T + 1, T, device="cpu")]).unique()
