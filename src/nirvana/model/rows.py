"""Rows: where samples begin and end, and where padding is, in every form in which it is given.

docs/packing.md lists the rules in a table.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
        lengths: `[B]`, the tokens of each row that padding follows; None without such padding.
    """

    order: Tensor | None
    numbers: Tensor | None
    positions: Tensor | None
    border: Tensor | None
    ended: bool
    lengths: Tensor | None = None


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
        attention_mask: `[B, past + T]`, of any dtype, 0 at padding; other values number the samples
            (equal numbers side by side are one sample). Or `[B, 1, T, T]`, boolean or additive, if
            it is block-diagonal and causal within each block.
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
        numbers = sample_numbers(numbers.to(device), B, T, past)
    if position_ids is not None:
        position_ids = _per_token("position_ids", position_ids, B, T)
    starts = _starts(cu_seqlens, seq_idx, B, T, past, device)
    if numbers is not None:
        plain, reorder = False, True
        if may_sync():
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


def chunk_layout(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    B: int,
    T: int,
    continued: bool,
    device: torch.device,
) -> RowLayout:
    """The layout of a chunk of rows that goes on from a `State`, or that returns one.

    The padding is moved behind a row's tokens, where it changes no state, and belongs to the last
    sample. The row's first token continues the row's sample, unless `position_ids` is 0 there.

    Args:
        attention_mask: `[B, T]`, of the new tokens alone; behind a state it is 0 at padding, else
            1. Without a state see `row_layout`.
        position_ids: `[B, T]` or `[1, T]`, see `row_layout`.
        cu_seqlens: see `row_layout`.
        seq_idx: see `row_layout`.
        B: rows.
        T: new tokens of a row.
        continued: whether there is a state.
        device: of the tokens.

    Returns:
        the layout; `numbers` is None.

    Raises:
        ValueError: see `row_layout`; behind a state, for masks of another form and for `cu_seqlens`
            and `seq_idx`.
    """
    past = int(continued)
    order = lengths = numbers = None
    if position_ids is not None:
        position_ids = _per_token("position_ids", position_ids, B, T).to(device)
    starts = _starts(cu_seqlens, seq_idx, B, T, past, device)
    if attention_mask is not None:
        numbers = _chunk_numbers(attention_mask.to(device), B, T, past)
        padded, several = True, True
        if may_sync():
            padded, several = _chunk_facts(numbers)
        if several and continued and may_sync():
            raise ValueError(
                "attention_mask numbers samples, which is for rows without a state: "
                "use position_ids"
            )
        if padded:
            lengths = (numbers != 0).sum(1)
            order = torch.argsort((numbers == 0).int(), dim=1, stable=True)
            numbers, position_ids, starts = (
                None if x is None else x.expand(B, -1).gather(1, order)
                for x in (numbers, position_ids, starts)
            )
        numbers = numbers if several else None
    border = _border(numbers, position_ids, starts, order, B, T, past, device)
    if border is not None and lengths is not None:
        border = border & (torch.arange(T, device=device) < lengths[:, None])
    if border is not None and may_sync() and not border.any():
        border = None
    return RowLayout(order, None, position_ids, border, ended=False, lengths=lengths)


def _chunk_numbers(mask: Tensor, B: int, T: int, past: int) -> Tensor:
    """The numbers of the samples of a chunk, 0 at padding, `[B, T]`."""
    if past and mask.ndim == 2 and mask.shape[1] != T:
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; behind a state it must be "
            f"[{B}, {T}] (the new tokens)"
        )
    return _from_blocks(mask, B, T, past) if mask.ndim == 4 else sample_numbers(mask, B, T, 0)


def _chunk_facts(numbers: Tensor) -> list[bool]:
    """Whether numbers `[B, T]` hold padding, and whether a row holds several samples. The host
    waits for the device once."""
    real = numbers != 0
    highest = numbers.amax(1, keepdim=True)
    return torch.stack([~real.all(), (real & (numbers != highest)).any()]).tolist()


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
        border |= starts != _previous(starts)
    if position_ids is not None:
        step = position_ids - _previous(position_ids)
        jumps = step != 1
        if columns is not None:
            jumps = jumps & (step != columns - _previous(columns))
        border |= jumps
        border[:, 0] = False if without_past else position_ids[:, 0] == 0
    if numbers is not None:
        new = numbers[:, -T:]
        border |= new != _previous(new)
        if numbers.shape[1] > T:
            border[:, 0] |= new[:, 0] != numbers[:, -T - 1]
    return None if may_branch() and not border.any() else border


def _previous(x: Tensor) -> Tensor:
    """What each column of x `[B, T]` has in the column before it; the first has itself."""
    return torch.cat([x[:, :1], x], dim=1)[:, :-1]


def may_sync() -> bool:
    """Whether the host may read tensors: not while a graph is traced or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def may_branch() -> bool:
    """Whether the host may wait for the device to leave out masks: not in a training step."""
    return not torch.is_grad_enabled() and may_sync()


def sample_numbers(mask: Tensor, B: int, T: int, past: int | Tensor) -> Tensor:
    """The attention mask as numbers of samples.

    Args:
        mask: see `row_layout`.
        B: rows.
        T: new tokens of a row.
        past: cached tokens of a row.

    Returns:
        integers, 0 at padding, `[B, past + T]`.

    Raises:
        ValueError: see `row_layout`.
    """
    if mask.ndim == 4:
        return _from_blocks(mask, B, T, past)
    total = past + T if isinstance(past, int) else mask.shape[-1]
    if mask.ndim != 2 or mask.shape[0] not in (1, B) or mask.shape[1] != total:
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; it must be [{B}, {total}] "
            "(cached and new tokens), or [B, 1, T, T] without cached tokens"
        )
    return _whole_numbers(mask).expand(B, -1)


def _whole_numbers(mask: Tensor) -> Tensor:
    """A mask of any dtype as integers of the same values."""
    if not mask.is_floating_point():
        return mask.int() if mask.dtype == torch.bool else mask
    # Beyond this neighbouring numbers of samples round to one.
    limit = 2 / torch.finfo(mask.dtype).eps
    if may_sync() and not ((mask >= 0) & (mask < limit) & (mask == mask.floor())).all():
        raise ValueError(
            f"attention_mask of {mask.dtype} must be 0 at padding, else 1 or the number of the "
            f"sample, below {limit:.0f}: additive masks are [B, 1, T, T]"
        )
    return mask.long()


def _from_blocks(mask: Tensor, B: int, T: int, past: int | Tensor) -> Tensor:
    """The numbers of samples `[B, T]` of a block-diagonal causal mask `[B, 1, T, T]`."""
    how = "it must be block-diagonal and causal within each block, without a window"
    if not may_sync():
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
        if on_host or may_branch():
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
