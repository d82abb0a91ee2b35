"""Masks: borders of samples within a row, padding, and the past keys that a query attends to."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from nirvana.model.cache import CacheContents, require_room, require_rows
from nirvana.model.config import NirvanaConfig
from nirvana.model.rows import RowLayout, chunk_layout, may_branch, may_sync, row_layout
from nirvana.model.state import State

Masks = dict[str, Tensor | None]
Borders = Tensor | Sequence[int]
"""Cumulative lengths of packed samples, `[samples + 1]`: a tensor, an array or a list."""


def create_masks(
    config: NirvanaConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    cu_seqlens: Borders | None = None,
    seq_idx: Tensor | None = None,
) -> Masks:
    """Creates the masks, once for all layers.

    Args:
        config: of the model.
        inputs_embeds: `[B, T, ...]`; only its shape and device are read.
        attention_mask: see `row_layout`.
        cache: the cache before this call.
        position_ids: `[B, T]` or `[1, T]`, see `row_layout`.
        cu_seqlens: see `row_layout`.
        seq_idx: see `row_layout`.

    Returns:
        a dictionary of

        - "order": `[B, T]`, the columns in the order in which the layers read them (padding first),
          or None for the given order. All other masks are in that order.
        - "segments": `[B, T]` or None, see `nirvana.ops`; padding is a sample of its own, so that
          it affects no other.
        - "window": `[B, 1, T, S]`, true where a query attends to a cached or new key. None where
          `window_attention` needs no mask, that is, unless a static cache has empty slots or
          padding and borders lie among cached keys.
        - "cu_seqlens": int32 `[samples + 1]`, the same borders and those of rows for the kernels;
          None without segments, and on other devices. Borders given on the CPU are completed there
          (`position_ids` beside them must agree), and those given on the GPU for one row are used
          unchanged; otherwise the borders are counted on the device, which the host waits for.
        - "lengths": None; see `create_state_masks`.
        - "positions": `[B, T]` or `[1, T]`, for rotary embeddings; packed samples start at 0.
        - "index": `[B, T]` or `[1, T]`, tokens of its sample before each token; None without sinks.

    Raises:
        ValueError: for masks and borders that `row_layout` rejects.
    """
    B, T = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past, num_keys, offset = 0, T, 0
    if cache is not None:
        counting = config.counting_layer
        past = cache.get_seq_length(counting)
        past = int(past) if may_sync() else past  # a static cache counts on the device
        num_keys, offset = cache.get_mask_sizes(T, counting)
    borders = None if cu_seqlens is None else torch.as_tensor(cu_seqlens)
    row = row_layout(
        attention_mask, position_ids, borders, seq_idx, B, T, past, device, cache is not None
    )
    if cache is not None and isinstance(past, int) and may_sync():
        require_room(config, cache, past, T)
        require_rows(config, cache, past, B)
        _note_contents(cache, row, past, position_ids is not None)
    new = torch.arange(past, past + T, device=device)
    segments = None if row.border is None else row.border.cumsum(1)
    began = _began(row.positions, new) if num_keys > T else None
    window = None
    static = cache is not None and cache.is_compileable
    bordered = any(x is not None for x in (row.numbers, segments, began))
    if static or (num_keys > T and bordered):
        keys = torch.arange(offset, offset + num_keys, device=device)
        window = keys <= new[:, None]
        if config.sliding_window is not None:
            window = window & (keys > new[:, None] - config.sliding_window)
        window = window[None]
        if row.numbers is not None:
            numbers = row.numbers
            padded = F.pad(numbers, (0, max(0, offset + num_keys - numbers.shape[1])))
            padded = padded[:, None, offset : offset + num_keys]
            window = window & (padded != 0) & (padded == numbers[:, -T:, None])
        if segments is not None:
            before = past - offset
            owner = F.pad(segments, (before, num_keys - before - T))
            window = window & (owner[:, None] == segments[:, :, None])
        if began is not None:
            window = window & (keys >= began[..., None])
        # A padded query attends to itself: the softmax of an empty row would be NaN.
        window = (window | (keys == new[:, None]))[:, None].expand(B, 1, -1, -1)
    positions = new[None] if row.positions is None else row.positions
    packed = borders is not None or seq_idx is not None
    if row.positions is None and row.border is not None and packed:
        positions = new - (new * row.border).cummax(1).values
    return {
        "order": row.order,
        "segments": segments,
        "cu_seqlens": _kernel_borders(row, borders, position_ids, seq_idx),
        "lengths": None,
        "window": window,
        "positions": positions,
        "index": _index(row, segments, new, past) if config.num_sinks else None,
    }


def create_state_masks(
    config: NirvanaConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    state: State | None,
    position_ids: Tensor | None,
    cu_seqlens: Borders | None = None,
    seq_idx: Tensor | None = None,
) -> Masks:
    """Creates the masks of a chunk that goes on from a `State`, or that returns one.

    Args:
        config: of the model.
        inputs_embeds: `[B, T, ...]`; only its shape and device are read.
        attention_mask: see `chunk_layout`.
        state: before the chunk; None before the first token.
        position_ids: see `chunk_layout`; they only mark where samples start.
        cu_seqlens: see `chunk_layout`.
        seq_idx: see `chunk_layout`.

    Returns:
        as of `create_masks`, with the padding last instead of first, and

        - "segments": `[B, T]` or None; the state belongs to segment 0.
        - "window": `[B, 1, T, n + T]` over the keys of the state and the new ones; None where
          `window_attention` needs no mask.
        - "lengths": `[B]` or None, see `nirvana.ops`.
        - "positions" and "index": `[B, T]`, counted within the samples.

    Raises:
        ValueError: for masks and borders that `chunk_layout` rejects.
    """
    B, T = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    borders = None if cu_seqlens is None else torch.as_tensor(cu_seqlens)
    row = chunk_layout(
        attention_mask, position_ids, borders, seq_idx, B, T, state is not None, device
    )
    place = torch.arange(T, device=device)
    begun = torch.zeros(B, dtype=torch.long, device=device) if state is None else state.position
    positions, segments, window = begun[:, None] + place, None, None
    if row.border is not None:
        segments = row.border.cumsum(1)
        first = torch.where(row.border, place, 0).cummax(1).values
        positions = torch.where(segments == 0, positions, place - first)
    n = 0 if state is None else state.number_of_keys(config)
    if n > 0 and state is not None and (state.ragged or segments is not None):
        keys = torch.arange(-n, T, device=device)
        window = keys <= place[:, None]
        if config.sliding_window is not None:
            window = window & (keys > place[:, None] - config.sliding_window)
        window = window & (keys >= -begun[:, None])[:, None]
        if segments is not None:
            window = window & (F.pad(segments, (n, 0))[:, None] == segments[:, :, None])
        window = window[:, None]
    return {
        "order": row.order,
        "segments": segments,
        "cu_seqlens": _kernel_borders(row, borders, position_ids, seq_idx),
        "lengths": row.lengths,
        "window": window,
        "positions": positions,
        "index": positions,
    }


def _index(row: RowLayout, segments: Tensor | None, new: Tensor, past: int | Tensor) -> Tensor:
    """Tokens of its sample before each new token, `[B, T]` or `[1, T]`, of which `past` are cached.

    The first sample may have begun among the cached tokens: position ids count from its start, an
    attention mask numbers its tokens, and without both it began with the row.
    """
    T, place = len(new), torch.arange(len(new), device=new.device)
    begun: Tensor | int = past
    if isinstance(past, Tensor) or past > 0:
        if row.positions is not None:
            begun = row.positions[:, :1]
        elif row.numbers is not None:
            cached = row.numbers[:, : row.numbers.shape[1] - T]
            last_sample = (cached == cached[:, -1:]).flip(1).long()
            begun = last_sample.cumprod(1).sum(1, keepdim=True)
    index = begun + place[None]
    if segments is None or row.border is None:
        return index
    first = torch.where(row.border, place, 0).cummax(1).values
    return torch.where(segments == 0, index, place - first)


def _note_contents(cache: Cache, row: RowLayout, past: int, positioned: bool) -> None:
    """Raises for calls that would misread the cached tokens; stores the cache's new contents."""
    before = CacheContents.of(cache, past)
    before.require(row.numbers is not None, positioned)
    numbers, border = row.numbers, row.border
    cache.contents = CacheContents(  # type: ignore[attr-defined]
        padding=before.padding or (numbers is not None and not bool(numbers.all())),
        packed=before.packed or (border is not None and bool(border.any())),
        ended=row.ended,
    )


def _began(position_ids: Tensor | None, new: Tensor) -> Tensor | None:
    """The column in which each new token's sample began, `[B, T]`; None if all began with the row.
    Cached keys before that column are of other samples."""
    if position_ids is None:
        return None
    began = new - position_ids
    return None if may_branch() and not (began > 0).any() else began


def _kernel_borders(
    row: RowLayout, given: Tensor | None, position_ids: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    border = row.border
    if border is None or not border.is_cuda or torch.compiler.is_compiling():
        return None
    changed = row.numbers is not None or row.order is not None or seq_idx is not None
    if given is None or changed:
        borders = _counted(border)
    elif given.device.type == "cpu":
        borders = _completed(given, *border.shape)
    elif position_ids is not None or len(border) > 1 or may_branch():
        borders = _counted(border)
    else:
        borders = given
    borders = borders.to(border.device, torch.int32)
    # Blocks are compiled once for any number of documents, not again for each.
    torch._dynamo.maybe_mark_dynamic(borders, 0)
    return borders


def _counted(border: Tensor) -> Tensor:
    """Starts and ends of samples and rows, `[samples + 1]`; on a GPU the host waits for them."""
    starts = border.clone()
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel())


def _completed(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Adds the borders of rows to the given ones of samples."""
    return torch.cat([cu_seqlens, torch.arange(0, B * T + 1, T, device="cpu")]).unique()
