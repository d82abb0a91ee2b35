"""Masks: the borders of samples within a row, padding, and the cached keys that a query attends to.

`row_layout` reads every form in which they are given; docs/packing.md lists its rules in a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from nirvana.model.cache import CacheContents, require_room, require_rows
from nirvana.model.config import NirvanaConfig

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
        - "positions": `[B, T]` or `[1, T]`, for rotary embeddings; packed samples start at 0.

    Raises:
        ValueError: for masks and borders that `row_layout` rejects.
    """
    B, T = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past, num_keys, offset = 0, T, 0
    if cache is not None:
        counting = config.counting_layer
        past = cache.get_seq_length(counting)
        past = int(past) if _may_sync() else past  # a static cache counts on the device
        num_keys, offset = cache.get_mask_sizes(T, counting)
    borders = None if cu_seqlens is None else torch.as_tensor(cu_seqlens)
    row = row_layout(
        attention_mask, position_ids, borders, seq_idx, B, T, past, device, cache is not None
    )
    if cache is not None and isinstance(past, int) and _may_sync():
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
        "window": window,
        "positions": positions,
    }


@dataclass(frozen=True)
class RowLayout:
    """The result of `row_layout`; all columns are in the order of `order`.

    Attributes:
        order: `[B, T]`, the given column that each column holds; None for the given order.
        numbers: `[B, past + T]`, 0 at padding, else the number of the sample; None without padding
            and numbers.
        positions: `[B, T]` or `[1, T]`, the given position ids.
        border: `[B, T]`, true where a sample or padding begins; None if none does.
        ended: whether a row ends with padding that was not moved to its front.
    """

    order: Tensor | None
    numbers: Tensor | None
    positions: Tensor | None
    border: Tensor | None
    ended: bool


def row_layout(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    B: int,
    T: int,
    past: int | Tensor,
    device: torch.device,
    cached: bool,
) -> RowLayout:
    """Decides where samples begin and end, and where padding is.

    A token starts a sample if any of the arguments marks it, relative to the row's previous token
    that is not padding. Padding is skipped: a sample continues after padding that interrupts it
    (prompt, padding, completion). To that end the columns are reordered with the padding first, and
    so is padding at the end of rows whose states a cache stores, unless gradients are on.

    Args:
        attention_mask: `[B, past + T]`, 0 at padding; other values number the samples (equal
            numbers side by side are one sample). Or `[B, 1, T, T]`, boolean or additive, if it
            is block-diagonal and causal within each block.
        position_ids: `[B, T]` or `[1, T]`; a sample starts where they do not increase by one, or
            by the number of columns in between.
        cu_seqlens: int `[samples + 1]`, ascending from 0 to B T, samples in the batch laid out as
            one row; equal borders are empty samples.
        seq_idx: `[B, T]` or `[1, T]`, a number for each sample.
        B: rows.
        T: new tokens of a row.
        past: cached tokens of a row.
        device: of the tokens.
        cached: whether a cache takes the states of this row.

    Returns:
        the layout.

    Raises:
        ValueError: for shapes and values outside of the above; for padding between a sample's
            cached and new tokens; for `cu_seqlens` or `seq_idx` after cached tokens.
    """
    columns = order = None
    ended = False
    numbers = attention_mask
    if numbers is not None:
        numbers = _sample_numbers(numbers.to(device), B, T, past)
    if position_ids is not None:
        position_ids = _per_token("position_ids", position_ids, B, T)
    starts = _starts(cu_seqlens, seq_idx, B, T, past, device)
    if numbers is not None:
        plain, reorder = False, True
        if _may_sync():
            plain, interrupted, ended = _padding_facts(numbers, T)
            if interrupted and numbers.shape[1] > T:
                raise ValueError(
                    "attention_mask has padding between a row's cached and its new tokens: "
                    "pad on the left"
                )
            reorder = interrupted or (cached and ended and not torch.is_grad_enabled())
        if plain:
            numbers = None
        elif reorder and isinstance(past, int) and past == 0:
            ended = False
            order = torch.argsort((numbers != 0).int(), dim=1, stable=True)
            numbers, columns = numbers.gather(1, order), order
            position_ids, starts = (
                None if x is None else x.expand(B, -1).gather(1, order)
                for x in (position_ids, starts)
            )
        elif isinstance(past, int) and past > 0:
            # The first tokens were reordered like this when they were read.
            first = numbers[:, :past]
            first = first.gather(1, torch.argsort((first != 0).int(), dim=1, stable=True))
            numbers = torch.cat([first, numbers[:, past:]], dim=1)
    border = _border(numbers, position_ids, starts, columns, B, T, past, device)
    return RowLayout(order, numbers, position_ids, border, ended)


def _border(
    numbers: Tensor | None,
    position_ids: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    B: int,
    T: int,
    past: int | Tensor,
    device: torch.device,
) -> Tensor | None:
    """True where a sample or padding begins, see `row_layout`; None if none does: `[B, T]`."""
    without_past = isinstance(past, int) and past == 0
    given = [x for x in (numbers, position_ids, starts) if x is not None]
    if not given or (T == 1 and without_past):
        return None
    border = torch.zeros(B, T, dtype=torch.bool, device=device)
    if starts is not None:
        border[:, 1:] |= starts[:, 1:] != starts[:, :-1]
    if position_ids is not None:
        step = position_ids.diff(dim=1)
        jumps = step != 1
        if columns is not None:
            jumps = jumps & (step != columns.diff(dim=1))
        border[:, 1:] |= jumps
        if not without_past:
            border[:, 0] |= position_ids[:, 0] == 0
    if numbers is not None:
        new = numbers[:, -T:]
        border[:, 1:] |= new[:, 1:] != new[:, :-1]
        if numbers.shape[1] > T:
            border[:, 0] |= new[:, 0] != numbers[:, -T - 1]
    return None if _may_branch() and not border.any() else border


def _may_sync() -> bool:
    """Whether the host may read tensors: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _may_branch() -> bool:
    """Whether the host may wait for the device to leave out masks: not in a training step."""
    return not torch.is_grad_enabled() and _may_sync()


def _sample_numbers(mask: Tensor, B: int, T: int, past: int | Tensor) -> Tensor:
    """The attention mask as numbers of samples, 0 at padding: `[B, past + T]`."""
    if mask.ndim == 4:
        return _from_blocks(mask, B, T, past)
    total = past + T if isinstance(past, int) else mask.shape[-1]
    if mask.ndim != 2 or mask.shape[0] not in (1, B) or mask.shape[1] != total:
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; it must be [{B}, {total}] "
            "(cached and new tokens), or [B, 1, T, T] without cached tokens"
        )
    mask = mask.expand(B, -1)
    return mask if not (mask.is_floating_point() or mask.dtype == torch.bool) else (mask != 0).int()


def _from_blocks(mask: Tensor, B: int, T: int, past: int | Tensor) -> Tensor:
    """The numbers of samples `[B, T]` of a block-diagonal causal mask `[B, 1, T, T]`."""
    how = "it must be block-diagonal and causal within each block, without a window"
    if not _may_sync():
        raise ValueError("a 4D attention_mask cannot be read in a compiled forward: use 2D masks")
    if not isinstance(past, int) or past > 0:
        raise ValueError("a 4D attention_mask is for rows without cached tokens: use 2D masks")
    if mask.shape[0] not in (1, B) or mask.shape[1] != 1 or mask.shape[2:] != (T, T):
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; it must be [{B}, 1, {T}, {T}]"
        )
    mask = mask.expand(B, -1, -1, -1)[:, 0]
    if mask.is_floating_point():
        visible = mask == 0
        if (~visible & (mask > -1e4)).any():
            raise ValueError(
                "a 4D attention_mask of floats must be additive: 0 where a token attends, "
                "else the lowest number"
            )
    else:
        visible = mask != 0
    place = torch.arange(T, device=mask.device)
    real = visible.any(-1)
    start = visible.int().argmax(-1)  # the first token that each one attends to
    block = (
        (place <= place[:, None]) & (place >= start[..., None]) & real[:, None] & real[..., None]
    )
    begun = torch.where(real, start, 0).cummax(1).values
    ordered = (start.gather(1, start) == start) & (start == begun)
    if not (torch.equal(visible, block) and (ordered | ~real).all()):
        raise ValueError(f"the 4D attention_mask has another form; {how}")
    return torch.where(real, start + 1, 0)


def _per_token(name: str, x: Tensor, B: int, T: int) -> Tensor:
    if x.ndim != 2 or x.shape[0] not in (1, B) or x.shape[1] != T:
        raise ValueError(f"{name} has the shape {list(x.shape)}; it must be [{B}, {T}] or [1, {T}]")
    return x


def _starts(
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    B: int,
    T: int,
    past: int | Tensor,
    device: torch.device,
) -> Tensor | None:
    """Numbers that change wherever a sample starts, `[B, T]`; None without `cu_seqlens` and
    `seq_idx`."""
    for name, given in (("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx)):
        if given is not None and isinstance(past, int) and past > 0:
            raise ValueError(f"{name} is for rows without cached tokens: use position_ids here")
    numbers = None
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens has the shape {list(cu_seqlens.shape)} and {cu_seqlens.dtype}; it "
                "must be [samples + 1] integers"
            )
        on_host = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host or _may_branch():
            first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
            if (first, last) != (0, B * T):
                message = f"cu_seqlens goes from {first} to {last}, not from 0 to {B} x {T} tokens"
                raise ValueError(message)
            if (cu_seqlens.diff() < 0).any():
                raise ValueError("cu_seqlens must ascend: it holds where samples start and end")
        starts = torch.zeros(B * T + 1, dtype=torch.long, device=device)
        starts[cu_seqlens.to(device, torch.long)] = 1
        numbers = starts[:-1].cumsum(0).view(B, T)
    if seq_idx is not None:
        seq_idx = _per_token("seq_idx", seq_idx, B, T).to(device).expand(B, -1)
        changes = F.pad(seq_idx.diff(dim=1) != 0, (1, 0)).long()
        if numbers is not None:
            changes = changes | F.pad(numbers.diff(dim=1) != 0, (1, 0)).long()
        numbers = changes.cumsum(1)
    return numbers


def _padding_facts(numbers: Tensor, T: int) -> list[bool]:
    """Three facts about numbers `[B, past + T]`: whether they are one sample without padding;
    whether padding interrupts a row; and whether a row ends with padding. The last two concern only
    padding among the new tokens. The host waits for the device once."""
    real = numbers != 0
    begun = real.cumsum(1) > 0
    behind = real.flip(1).cumsum(1).flip(1) > 0
    after = (begun & ~real)[:, -T:]
    facts = [
        real.all() & (numbers == numbers[:, :1]).all(),
        (after & behind[:, -T:]).any(),
        (after & ~behind[:, -T:]).any(),
    ]
    return torch.stack(facts).tolist()


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
    return None if _may_branch() and not (began > 0).any() else began


def _kernel_borders(
    row: RowLayout, given: Tensor | None, position_ids: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    border = row.border
    if border is None or not border.is_cuda or torch.compiler.is_compiling():
        return None
    if given is None or row.numbers is not None or seq_idx is not None:
        borders = _counted(border)
    elif given.device.type == "cpu":
        borders = _completed(given, *border.shape)
    elif position_ids is not None or len(border) > 1 or _may_branch():
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
