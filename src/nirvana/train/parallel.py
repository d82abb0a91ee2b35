"""Parallelism, applied to a model from outside and in a fixed order: recompute, compile, shard.

The model contains no parallel code. Parameters, gradients and the optimiser's state are sharded
evenly over the processes of a mesh (FSDP2); each block is gathered while it computes. With
`parallel.shard` below the number of processes, groups of that many processes hold a whole copy
each, and gradients are also summed across groups (hybrid sharding): gathering then stays within a
machine.

Parameters without a dimension (the Trigger's learned step size and decay) cannot be sharded: every
process keeps them, and `reduce_gradients` sums their gradients.

Where autocast rounds the weights of linear maps for every product, they are rounded before they are
gathered: half the bytes are sent, and the products are the same. The other parameters of a block
are small and keep their precision, so every process keeps them whole.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from nirvana.errors import InputError
from nirvana.model.nirvana import compile_blocks
from nirvana.train.config import ParallelConfig
from nirvana.train.distributed import ProcessContext


def parallelize(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    config: ParallelConfig,
    processes: ProcessContext,
    compiled: bool,
    rounded: torch.dtype | None,
) -> None:
    """Prepares `model`, in place, to be trained on all processes.

    Args:
        model: unsharded, with the same weights in every process, on the process's device.
        blocks: its large repeated modules, none within another.
        config: sharding and recomputation.
        processes: the processes of the run.
        compiled: whether to compile each block.
        rounded: the type in which autocast computes products, None without autocast.

    Raises:
        InputError: when `config.shard` does not divide the number of processes.
    """
    recompute_blocks(blocks, config.recompute)
    if compiled:
        compile_blocks(blocks)
    if processes.size > 1:
        shard(model, blocks, config, processes, rounded)


def recompute_blocks(blocks: Sequence[nn.Module], every: int) -> None:
    """Enables activation checkpointing: the blocks are recomputed in the backward pass.

    Args:
        blocks: all blocks of the model.
        every: recompute every n-th block, from the first; 0: none.
    """
    for index, block in enumerate(blocks):
        if every and index % every == 0:
            # The switch of transformers for its layers: parameter names stay the same.
            setattr(block, "gradient_checkpointing", True)  # noqa: B010
            setattr(  # noqa: B010
                block, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False)
            )


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    config: ParallelConfig,
    processes: ProcessContext,
    rounded: torch.dtype | None = None,
) -> None:
    """Applies FSDP2 to each block and to the rest of the model.

    Args:
        model: see `parallelize`.
        blocks: see `parallelize`.
        config: sharding.
        processes: the processes of the run, more than one.
        rounded: see `parallelize`.

    Raises:
        InputError: see `make_mesh`.
    """
    mesh = make_mesh(config, processes)
    whole: set[Any] = {p for p in model.parameters() if p.ndim == 0}
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard}
    if rounded is not None:
        # Inputs of a block are not cast: autocast does that.
        options["mp_policy"] = MixedPrecisionPolicy(rounded, torch.float32, None, False)
    for block in blocks:
        if rounded is not None:
            whole |= set(block.parameters()) - linear_weights(block)
        fully_shard(block, ignored_params=whole, **options)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The losses are already divided by the number of micro batches: a plain sum equals what
            # one process would accumulate, bitwise for two summands.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def linear_weights(module: nn.Module) -> set[Tensor]:
    """Returns the weights of all linear layers of a module: those that autocast rounds.

    Args:
        module: searched recursively.
    """
    return {part.weight for part in module.modules() if isinstance(part, nn.Linear)}


def shard_size(config: ParallelConfig, size: int) -> int:
    """Returns the number of processes over which one copy of the state is sharded.

    Args:
        config: `shard`.
        size: number of processes.

    Raises:
        InputError: when `shard` does not divide `size`.
    """
    parts = config.shard or size
    if size % parts:
        raise InputError(
            f"configuration: parallel.shard = {parts} must divide the {size} processes"
        )
    return parts


def make_mesh(config: ParallelConfig, processes: ProcessContext) -> DeviceMesh:
    """Arranges the processes in a mesh.

    Args:
        config: `shard`, processes over which one copy is sharded; 0: all.
        processes: the processes of the run.

    Returns:
        A mesh ("shard",) of all processes, or ("replicate", "shard") with hybrid sharding.

    Raises:
        InputError: when `shard` does not divide the number of processes.
    """
    parts = shard_size(config, processes.size)
    kind = processes.device.type
    if parts == processes.size:
        return init_device_mesh(kind, (parts,), mesh_dim_names=("shard",))
    shape = (processes.size // parts, parts)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def synchronize_gradients(model: nn.Module, enabled: bool) -> None:
    """Sets whether the next backward pass reduces gradients over the processes.

    Args:
        model: sharded or not.
        enabled: needed in the last micro batch of a step only.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reduce_gradients(parameters: Iterable[nn.Parameter], processes: ProcessContext) -> None:
    """Sums, in place, the gradients that FSDP does not: those of unsharded parameters.

    Args:
        parameters: all trained parameters.
        processes: the processes of the run.
    """
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if processes.size == 1 or not whole:
        return
    flat = torch.cat([gradient.flatten() for gradient in whole])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in whole])
    summed = [part.view_as(g) for part, g in zip(parts, whole, strict=True)]
    torch._foreach_copy_(whole, summed)  # type: ignore[reportPrivateImportUsage]


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Clips the gradient to a Euclidean norm of `largest`, in place.

    On the CPU sharded gradients are gathered first: the last bits of a norm summed shard by shard,
    and with them every weight, would depend on the number of shards.

    Args:
        parameters: all trained parameters.
        largest: norm above which the gradient is scaled down; 0: never.

    Returns:
        The norm before clipping, a scalar.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    if sharded and gradients[0].device.type == "cpu":
        norm = nn.utils.get_total_norm(
            [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        )
    elif sharded:
        norm = nn.utils.get_total_norm(sharded).full_tensor()  # type: ignore[union-attr]
        norm = torch.hypot(norm, nn.utils.get_total_norm(whole).to(norm))
    else:
        norm = nn.utils.get_total_norm(whole)
    if largest > 0:
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(parts, factor)  # type: ignore[reportPrivateImportUsage]
    return norm
