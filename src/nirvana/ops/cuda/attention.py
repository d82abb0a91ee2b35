"""Sliding-window attention of half-precision CUDA tensors: cuDNN where its frontend is installed,
else PyTorch's own FlashAttention. Both take the window as a bound, not as a mask, and packed
documents as lengths and offsets."""

import threading
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nirvana.ops.cuda.launch import padded

HAS_CUDNN = find_spec("cudnn") is not None
"""Whether nvidia-cudnn-frontend is installed."""
CUDNN_MULTIPLE = 256
"""Rows whose length is a multiple of this are computed by cuDNN."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, S, G, K]`, the last T of them the queries' own; each of the G heads for H / G of q.
        v: `[B, S, G, K]`.
        window: tokens that a token attends to, itself included; None means all before it.
        cu_seqlens: `[documents + 1]`, int32, where documents start and end in the batch laid out
            as one row; then S = T.

    Returns:
        o `[B, T, H, K]`, and the logarithms of the softmax's sums, `[B H T]`, float32, for
        `backward`.
    """
    q, k, v = _read(q, k, v, cu_seqlens)
    if _cudnn_fits(q):
        o = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:3].numel(), dtype=torch.float32)
        graph = _forward_graph(_shape(cu_seqlens, q, k, v), window)
        graph.run({"q": q, "k": k, "v": v, "o": o, "lse": lse}, cu_seqlens)
        return o, lse
    q_, k_, v_ = (x if cu_seqlens is None else x.flatten(0, 1) for x in (q, k, v))
    options, bounds = _flash_arguments(q, k, window, cu_seqlens)
    o, lse, *_ = torch.ops.aten._flash_attention_forward(q_, k_, v_, *options, False, **bounds)
    return o.view(q.shape).contiguous(), lse.flatten()


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    grads: tuple[Tensor, ...],
) -> None:
    """Writes the gradients of `forward`.

    If the softmax has further keys, whose gradients are computed elsewhere, o and lse are those of
    the whole: the gradients of q, k and v depend on the further keys through these alone.

    Args:
        do: `[B, T, H, K]`, contiguous.
        q: `[B, T, H, K]`.
        k: `[B, S, G, K]`.
        v: `[B, S, G, K]`.
        o: `[B, T, H, K]`, contiguous, of `forward`.
        lse: `[B H T]`, of `forward`.
        window: as of `forward`.
        cu_seqlens: as of `forward`.
        grads: receive dq, dk and dv, in the shapes of q, k and v; rows may have gaps between them.
    """
    q, k, v = _read(q, k, v, cu_seqlens)
    B, T, H, _ = q.shape
    past = k.shape[1] - T
    if past:  # the kernels take one query for each key: zeros, whose gradients are zero
        q, o, do = (F.pad(x, (0, 0, 0, 0, past, 0)) for x in (q, o, do))
        lse = F.pad(lse.view(B, H, T), (past, 0)).flatten()
        dq = torch.empty_like(q)
        backward(do, q, k, v, o, lse, window, cu_seqlens, (dq, *grads[1:]))
        grads[0].copy_(dq[:, past:])
        return
    if _cudnn_fits(q):
        graph = _backward_graph(_shape(cu_seqlens, q, k, v, *grads), window)
        given = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "do": do}
        graph.run(given | dict(zip(("dq", "dk", "dv"), grads, strict=True)), cu_seqlens)
        return
    rows = [x if cu_seqlens is None else x.flatten(0, 1) for x in (do, q, k, v, o)]
    options, bounds = _flash_arguments(q, k, window, cu_seqlens)
    lse = lse.view(B, H, T) if cu_seqlens is None else lse.view(H, B * T)
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's state, unused
    found = torch.ops.aten._flash_attention_backward(*rows, lse, *options, random, random, **bounds)
    for grad, each in zip(grads, found, strict=True):
        grad.copy_(each.view(grad.shape))


def sums_by_token(lse: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sums of `forward` as a view `[B, T, H]`: rows hold them head by head, and of packed
    documents cuDNN holds them token by token."""
    B, T, H, _ = q.shape
    if cu_seqlens is None:
        return lse.view(B, H, T).transpose(1, 2)
    return lse.view(B, T, H) if _cudnn_fits(q) else lse.view(H, B, T).permute(1, 2, 0)


def _read(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """q, k and v as the kernels read them: numbers of a head side by side, and the tokens of packed
    documents one stride apart from row to row; copies where they are not so."""
    return tuple(
        x
        if x.stride(3) == 1 and (cu_seqlens is None or x.stride(0) == x.shape[1] * x.stride(1))
        else x.contiguous()
        for x in (q, k, v)
    )


def _flash_arguments(
    q: Tensor, k: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, int | float]]:
    left = -1 if window is None else window - 1
    options = (cu_seqlens, cu_seqlens, q.shape[1], k.shape[1], 0.0, True)
    bounds = {"scale": q.shape[-1] ** -0.5, "window_size_left": left, "window_size_right": 0}
    return options, bounds


def _cudnn_fits(q: Tensor) -> bool:
    """Whether cuDNN computes this shape. Building a graph takes up to a second for each shape,
    which is too long for texts of arbitrary length."""
    return HAS_CUDNN and q.shape[1] % CUDNN_MULTIPLE == 0 and q.shape[-1] in (64, 128)


class _Shape(NamedTuple):
    """The arguments that a graph is specific to."""

    dims: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    documents: int | None  # capacity for packed documents; None: rows


def _shape(cu_seqlens: Tensor | None, *tensors: Tensor) -> _Shape:
    documents = None
    if cu_seqlens is not None:  # a power of two, so that few graphs are built
        documents = padded(cu_seqlens.numel() - 1, 16)
    return _Shape(
        tuple(tuple(x.shape) for x in tensors),
        tuple(x.stride() for x in tensors),
        tensors[0].dtype,
        tensors[0].device,
        documents,
    )


class _Offsets:
    """Lengths of packed documents, and where each begins in tensors of any row stride."""

    def __init__(self, cu_seqlens: Tensor, documents: int) -> None:
        spare = documents + 1 - cu_seqlens.numel()
        self.version = _version(cu_seqlens)
        self.starts = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(spare)]).long()
        self.lengths = self.starts.diff().int()
        self.rows: dict[int, Tensor] = {}

    def of_row(self, row: int) -> Tensor:
        """Starts of the documents, in elements, where tokens lie `row` elements apart."""
        if row not in self.rows:
            self.rows[row] = self.starts * row
        return self.rows[row]


_OFFSETS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By `cu_seqlens`, which all layers of a step share: offsets are computed once."""


def _version(x: Tensor) -> int:
    """PyTorch's count of in-place writes to x; inference tensors have none."""
    return 0 if x.is_inference() else x._version


def _offsets(cu_seqlens: Tensor, documents: int) -> _Offsets:
    known = _OFFSETS.get(cu_seqlens)
    if known is None or known.version != _version(cu_seqlens):
        known = _OFFSETS[cu_seqlens] = _Offsets(cu_seqlens, documents)
    return known


@cache
def _handle(device: torch.device, thread: int) -> Any:
    with torch.cuda.device(device):
        return import_module("cudnn").create_handle()


def _current_handle(device: torch.device) -> Any:
    """This thread's handle, set to its current stream. A shared handle could be set to another
    thread's stream before it is used."""
    handle = _handle(device, threading.get_ident())
    stream = torch.cuda.current_stream(device).cuda_stream
    import_module("cudnn").set_stream(handle=handle, stream=stream)
    return handle


class _Graph:
    """A cuDNN graph, and its tensors by name: `[B, T, H, K]` here, `[B, H, T, K]` in cuDNN.

    Packed documents are the graph's batch, filled up to its capacity with documents of length zero.
    The offset of each in a tensor, in elements, is an input of the graph.
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
        self.starts: dict[int, Any] = {}  # by the stride of a token's row
        self.lengths: Any = None
        if shape.documents is not None:
            self.lengths = self._integers("lengths", shape.documents, cudnn.data_type.INT32)

    def _integers(self, name: str, count: int, kind: Any) -> Any:
        return self.graph.tensor(
            name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind
        )

    def _set_offsets(self, tensor: Any, row: int) -> None:
        """Sets where packed documents begin in a tensor whose tokens lie `row` elements apart."""
        if self.shape.documents is None:
            return
        if row not in self.starts:
            kind = self.cudnn.data_type.INT64
            self.starts[row] = self._integers(f"row {row}", self.shape.documents + 1, kind)
        tensor.set_ragged_offset(self.starts[row])

    def input(self, name: str, dims: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """Adds an input, `[B, T, H, K]` with these strides, and returns cuDNN's tensor."""
        (b, t, h, c), (sb, st, sh, sc) = dims, strides
        self.tensors[name] = self.graph.tensor(
            name=name,
            dim=[self.shape.documents or b, h, t, c],
            stride=[sb, sh, st, sc],
            data_type=self.half,
        )
        self._set_offsets(self.tensors[name], st)
        return self.tensors[name]

    def output(
        self, name: str, tensor: Any, dims: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        """Marks an output, `[B, T, H, K]` with these strides."""
        (b, t, h, c), (sb, st, sh, sc) = dims, strides
        tensor.set_output(True).set_dim([self.shape.documents or b, h, t, c])
        tensor.set_stride([sb, sh, st, sc])
        self._set_offsets(tensor, st)
        self.tensors[name] = tensor

    def statistics(self) -> dict[str, list[int]]:
        """Shape and strides of the softmax's statistics: head-major in rows, token-major in packed
        ones."""
        b, t, h, _ = self.shape.dims[0]
        packed = self.shape.documents
        stride = [h * t, t, 1, 1] if packed is None else [h * t, 1, h, 1]
        return {"dim": [packed or b, h, t, 1], "stride": stride}

    def add_statistics(self, tensor: Any) -> None:
        """Registers the softmax's statistics as the tensor "lse"."""
        self._set_offsets(tensor, self.shape.dims[0][2])
        self.tensors["lse"] = tensor

    def band(self, window: int | None) -> dict[str, Any]:
        """cuDNN's options for scale, causality, window and lengths."""
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
        """Builds the graph."""
        modes = self.cudnn.heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace_bytes = max(1, self.graph.get_workspace_size())
        return self

    def run(self, given: dict[str, Tensor], cu_seqlens: Tensor | None) -> None:
        """Executes the graph on tensors by name; outputs are written in place."""
        device = self.shape.device
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        pack = {
            self.tensors[name]: x if name == "lse" else x.transpose(1, 2)
            for name, x in given.items()
        }
        if cu_seqlens is not None and self.shape.documents is not None:
            offsets = _offsets(cu_seqlens, self.shape.documents)
            pack[self.lengths] = offsets.lengths
            pack |= {tensor: offsets.of_row(row) for row, tensor in self.starts.items()}
        with torch.cuda.device(device):
            self.graph.execute(pack, workspace, handle=_current_handle(device))


@lru_cache(maxsize=32)
def _forward_graph(shape: _Shape, window: int | None) -> _Graph:
    made = _Graph(shape)
    q, k, v = (made.input(*x) for x in zip("qkv", shape.dims, shape.strides, strict=True))
    o, lse = made.graph.sdpa(name="window", q=q, k=k, v=v, generate_stats=True, **made.band(window))
    made.output("o", o, shape.dims[0], _dense(shape.dims[0]))
    statistics = made.statistics()
    lse.set_output(True).set_dim(statistics["dim"]).set_stride(statistics["stride"])
    lse.set_data_type(made.cudnn.data_type.FLOAT)
    made.add_statistics(lse)
    return made.finish()


@lru_cache(maxsize=32)
def _backward_graph(shape: _Shape, window: int | None) -> _Graph:
    made = _Graph(shape)
    sizes = list(zip(shape.dims, shape.strides, strict=True))  # of q, k and v, and their gradients
    q, k, v = (made.input(name, *size) for name, size in zip("qkv", sizes[:3], strict=True))
    b, t, _, _ = shape.dims[0]
    o, do = (made.input(name, shape.dims[0], _dense(shape.dims[0])) for name in ("o", "do"))
    kind = made.cudnn.data_type.FLOAT
    lse = made.graph.tensor(name="lse", **made.statistics(), data_type=kind)
    made.add_statistics(lse)
    band = made.band(window)
    if shape.documents is not None:  # else the workspace assumes that all have the longest length
        band |= {"max_total_seq_len_q": b * t, "max_total_seq_len_kv": b * t}
    grads = made.graph.sdpa_backward(
        name="window_backward", q=q, k=k, v=v, o=o, dO=do, stats=lse, **band
    )
    for name, grad, size in zip(("dq", "dk", "dv"), grads, sizes[3:], strict=True):
        made.output(name, grad, *size)
    return made.finish()


def _dense(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous `[B, T, H, K]`."""
    _, t, h, c = dims
    return t * h * c, h * c, c, 1
