"""Sliding-window attention of half-precision CUDA tensors: cuDNN where its frontend is installed,
else PyTorch's own FlashAttention. Both take the window as a bound, not as a mask, and packed
documents as lengths and places."""

import threading
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nirvana.ops.launch import padded

HAS_CUDNN = find_spec("cudnn") is not None
"""Whether nvidia-cudnn-frontend is installed."""
ROUND = 256
"""Rows whose length is a multiple of this go to cuDNN."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, K]`, and the logarithms of the softmax's sums, `[B H T]`, for `backward`.

    Args:
        q: `[B, T, H, K]`; k, v: `[B, S, H, K]`, the last T of them the queries' own.
        window: tokens that a token sees, itself included; None means all before it.
        cu_seqlens: `[documents + 1]`, int32, where documents start and end in the batch laid out
            as one row; then S = T.
    """
    if _cudnn_fits(q):
        o = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:3].numel(), dtype=torch.float32)
        graph = _forward_graph(_shape(cu_seqlens, q, k, v), window)
        graph.run({"q": q, "k": k, "v": v, "o": o, "lse": lse}, cu_seqlens)
        return o, lse
    q_, k_, v_ = (x if cu_seqlens is None else x.flatten(0, 1) for x in (q, k, v))
    how, more = _flash_arguments(q, k, window, cu_seqlens)
    o, lse, *_ = torch.ops.aten._flash_attention_forward(q_, k_, v_, *how, False, **more)
    return o.view(q.shape), lse.flatten()


def backward(
    o_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Gradients of q, k and v side by side, `[B, T, 3, H, K]`; S = T, o and o_bar have no gaps."""
    if _cudnn_fits(q):
        B, T, H, K = q.shape
        bars = q.new_empty(B, T, 3, H, K)
        graph = _backward_graph(_shape(cu_seqlens, q, k, v), window)
        given = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "o_bar": o_bar}
        given |= dict(zip(("q_bar", "k_bar", "v_bar"), bars.unbind(2), strict=True))
        graph.run(given, cu_seqlens)
        return bars
    rows = [x if cu_seqlens is None else x.flatten(0, 1) for x in (o_bar, q, k, v, o)]
    how, more = _flash_arguments(q, k, window, cu_seqlens)
    B, T, H, _ = q.shape
    lse = lse.view(B, H, T) if cu_seqlens is None else lse.view(H, B * T)
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    bars = torch.ops.aten._flash_attention_backward(*rows, lse, *how, random, random, **more)
    return torch.stack([bar.view(q.shape) for bar in bars], dim=2)


def _flash_arguments(
    q: Tensor, k: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, int | float]]:
    left = -1 if window is None else window - 1
    how = (cu_seqlens, cu_seqlens, q.shape[1], k.shape[1], 0.0, True)
    more = {"scale": q.shape[-1] ** -0.5, "window_size_left": left, "window_size_right": 0}
    return how, more


def _cudnn_fits(q: Tensor) -> bool:
    """A graph is built for one shape in up to a second: not for the lengths of texts as they
    come."""
    return HAS_CUDNN and q.shape[1] % ROUND == 0 and q.shape[-1] in (64, 128)


class _Shape(NamedTuple):
    """What a graph is built for."""

    dims: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    documents: int | None  # how many packed documents there is room for; None: rows


def _shape(cu_seqlens: Tensor | None, *tensors: Tensor) -> _Shape:
    documents = None
    if cu_seqlens is not None:  # powers of two, so that few graphs are built
        documents = padded(cu_seqlens.numel() - 1, 16)
    return _Shape(
        tuple(tuple(x.shape) for x in tensors),
        tuple(x.stride() for x in tensors),
        tensors[0].dtype,
        tensors[0].device,
        documents,
    )


class _Places:
    """Lengths of packed documents, and where each begins in tensors with rows of any width."""

    def __init__(self, cu_seqlens: Tensor, documents: int) -> None:
        spare = documents + 1 - cu_seqlens.numel()
        self.version = _version(cu_seqlens)
        self.starts = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(spare)]).long()
        self.lengths = self.starts.diff().int()
        self.rows: dict[int, Tensor] = {}

    def of_row(self, row: int) -> Tensor:
        if row not in self.rows:
            self.rows[row] = self.starts * row
        return self.rows[row]


_PLACES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""All layers of a step share one `cu_seqlens`: what follows from it is computed once."""


def _version(x: Tensor) -> int:
    """How often x was written to; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def _places(cu_seqlens: Tensor, documents: int) -> _Places:
    known = _PLACES.get(cu_seqlens)
    if known is None or known.version != _version(cu_seqlens):
        known = _PLACES[cu_seqlens] = _Places(cu_seqlens, documents)
    return known


@cache
def _handle(device: torch.device, thread: int) -> Any:
    with torch.cuda.device(device):
        return import_module("cudnn").create_handle()


def _current_handle(device: torch.device) -> Any:
    """This thread's, turned to its stream: another thread would turn it away before it is used."""
    handle = _handle(device, threading.get_ident())
    stream = torch.cuda.current_stream(device).cuda_stream
    import_module("cudnn").set_stream(handle=handle, stream=stream)
    return handle


class _Graph:
    """A cuDNN graph, and its tensors by name, each `[B, T, H, K]` here and `[B, H, T, K]` there.

    Packed documents are its batch: as many as there is room for, those that are too many of length
    zero. Where each begins in a tensor is handed in, in numbers before it.
    """

    def __init__(self, shape: _Shape) -> None:
        cudnn = import_module("cudnn")
        self.cudnn, self.shape = cudnn, shape
        half = cudnn.data_type.BFLOAT16 if shape.dtype == torch.bfloat16 else cudnn.data_type.HALF
        self.graph = cudnn.pygraph(
            io_data_type=half,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_current_handle(shape.device),
        )
        self.half = half
        self.tensors: dict[str, Any] = {}
        self.starts: dict[int, Any] = {}  # by the width of a token's row
        self.lengths: Any = None
        if shape.documents is not None:
            self.lengths = self._whole_numbers("lengths", shape.documents, cudnn.data_type.INT32)

    def _whole_numbers(self, name: str, count: int, kind: Any) -> Any:
        return self.graph.tensor(
            name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind
        )

    def _place(self, tensor: Any, row: int) -> None:
        """Says where packed documents begin in a tensor whose tokens lie `row` numbers apart."""
        if self.shape.documents is None:
            return
        if row not in self.starts:
            kind = self.cudnn.data_type.INT64
            self.starts[row] = self._whole_numbers(f"row {row}", self.shape.documents + 1, kind)
        tensor.set_ragged_offset(self.starts[row])

    def input(self, name: str, dims: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        (b, t, h, c), (sb, st, sh, sc) = dims, strides
        self.tensors[name] = self.graph.tensor(
            name=name,
            dim=[self.shape.documents or b, h, t, c],
            stride=[sb, sh, st, sc],
            data_type=self.half,
        )
        self._place(self.tensors[name], st)
        return self.tensors[name]

    def output(self, name: str, tensor: Any, beside: int = 1) -> None:
        """Of the queries' shape, in rows that hold `beside` such tensors."""
        b, t, h, c = self.shape.dims[0]
        row = beside * h * c
        tensor.set_output(True).set_dim([self.shape.documents or b, h, t, c])
        tensor.set_stride([t * row, c, row, 1])
        self._place(tensor, row)
        self.tensors[name] = tensor

    def statistics(self) -> dict[str, list[int]]:
        """Of the softmax: head by head in rows, token by token in packed ones."""
        b, t, h, _ = self.shape.dims[0]
        packed = self.shape.documents
        stride = [h * t, t, 1, 1] if packed is None else [h * t, 1, h, 1]
        return {"dim": [packed or b, h, t, 1], "stride": stride}

    def place_statistics(self, tensor: Any) -> None:
        self._place(tensor, self.shape.dims[0][2])
        self.tensors["lse"] = tensor

    def band(self, window: int | None) -> dict[str, Any]:
        queries, keys = self.shape.dims[0][1], self.shape.dims[1][1]
        corner = self.cudnn.diagonal_alignment
        band = {
            "attn_scale": self.shape.dims[0][-1] ** -0.5,
            "diagonal_alignment": corner.TOP_LEFT if queries == keys else corner.BOTTOM_RIGHT,
            "diagonal_band_right_bound": 0,
        }
        if window is not None:
            band["diagonal_band_left_bound"] = window
        if self.lengths is not None:
            band |= {"use_padding_mask": True, "seq_len_q": self.lengths}
            band["seq_len_kv"] = self.lengths
        return band

    def finish(self) -> "_Graph":
        modes = self.cudnn.heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace_bytes = max(1, self.graph.get_workspace_size())
        return self

    def run(self, given: dict[str, Tensor], cu_seqlens: Tensor | None) -> None:
        device = self.shape.device
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        pack = {
            self.tensors[name]: x if name == "lse" else x.transpose(1, 2)
            for name, x in given.items()
        }
        if cu_seqlens is not None and self.shape.documents is not None:
            places = _places(cu_seqlens, self.shape.documents)
            pack[self.lengths] = places.lengths
            pack |= {tensor: places.of_row(row) for row, tensor in self.starts.items()}
        with torch.cuda.device(device):
            self.graph.execute(pack, workspace, handle=_current_handle(device))


@lru_cache(maxsize=32)
def _forward_graph(shape: _Shape, window: int | None) -> _Graph:
    made = _Graph(shape)
    q, k, v = (made.input(*x) for x in zip("qkv", shape.dims, shape.strides, strict=True))
    o, lse = made.graph.sdpa(name="window", q=q, k=k, v=v, generate_stats=True, **made.band(window))
    made.output("o", o)
    statistics = made.statistics()
    lse.set_output(True).set_dim(statistics["dim"]).set_stride(statistics["stride"])
    lse.set_data_type(made.cudnn.data_type.FLOAT)
    made.place_statistics(lse)
    return made.finish()


@lru_cache(maxsize=32)
def _backward_graph(shape: _Shape, window: int | None) -> _Graph:
    made = _Graph(shape)
    q, k, v = (made.input(*x) for x in zip("qkv", shape.dims, shape.strides, strict=True))
    b, t, h, c = shape.dims[0]
    dense = (t * h * c, h * c, c, 1)
    o, o_bar = (made.input(name, shape.dims[0], dense) for name in ("o", "o_bar"))
    kind = made.cudnn.data_type.FLOAT
    lse = made.graph.tensor(name="lse", **made.statistics(), data_type=kind)
    made.place_statistics(lse)
    how = made.band(window)
    if shape.documents is not None:  # else the workspace is as if all were of the longest length
        how |= {"max_total_seq_len_q": b * t, "max_total_seq_len_kv": b * t}
    bars = made.graph.sdpa_backward(
        name="window_backward", q=q, k=k, v=v, o=o, dO=o_bar, stats=lse, **how
    )
    for name, bar in zip(("q_bar", "k_bar", "v_bar"), bars, strict=True):
        made.output(name, bar, beside=3)
    return made.finish()
