"""Parallelism, applied to a model from outside and in one order: recompute, compile, shard.

The model knows nothing of it. Parameters, gradients and the optimiser's state are cut into equal
parts over the processes of a mesh (FSDP2); each block is gathered while it computes. With
`parallel.shard` below the number of processes, groups of that many hold a whole copy each, and
gradients are also summed across groups (hybrid sharding): gathering then stays within a machine.

Parameters without a dimension (the Trigger's learned step size and decay) cannot be cut: every
process keeps them, and `reduce_gradients` sums their gradients.

Where autocast would round the weights of linear maps for every product, they are rounded before
they are gathered: half the bytes travel, and the products are the same. All else in a block is
small and keeps its precision, so every process keeps it whole, too.
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
from nirvana.train.world import World


def parallelize(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    config: ParallelConfig,
    world: World,
    compiled: bool,
    rounded: torch.dtype | None,
) -> None:
    """Changes `model` in place into one that trains on all processes of `world`.

    Args:
        model: whole, with the same weights in every process, on the process's device.
        blocks: its large repeated parts, each of which calls no other.
        compiled: compile each block.
        rounded: what autocast computes products in, None without autocast.

    Raises:
        InputError: for a mesh that the number of processes does not allow.
    """
    recompute_blocks(blocks, config.recompute)
    if compiled:
        compile_blocks(blocks)
    if world.size > 1:
        shard(model, blocks, config, world, rounded)


def recompute_blocks(blocks: Sequence[nn.Module], every: int) -> None:
    """Activation checkpointing of every n-th block: its inside is computed again in the backward
    pass instead of being kept. 0: of none."""
    for index, block in enumerate(blocks):
        if every and index % every == 0:
            # The library's own switch for its layers, which leaves parameter names as they are.
            setattr(block, "gradient_checkpointing", True)  # noqa: B010
            setattr(  # noqa: B010
                block, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False)
            )


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    config: ParallelConfig,
    world: World,
    rounded: torch.dtype | None = None,
) -> None:
    """FSDP2 of each block, and of the rest of the model around them; see `parallelize`."""
    mesh = make_mesh(config, world)
    whole: set[Any] = {p for p in model.parameters() if p.ndim == 0}
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard}
    if rounded is not None:
        # What enters a block stays as it is: autocast decides about that.
        options["mp_policy"] = MixedPrecisionPolicy(rounded, torch.float32, None, False)
    for block in blocks:
        if rounded is not None:
            whole |= set(block.parameters()) - linear_weights(block)
        fully_shard(block, ignored_params=whole, **options)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The losses are already divided by the number of micro batches: a plain sum is what
            # one process alone would accumulate, to the bit for two summands.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def linear_weights(module: nn.Module) -> set[Tensor]:
    """The matrices in it that autocast rounds."""
    return {part.weight for part in module.modules() if isinstance(part, nn.Linear)}


def make_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """All processes in one row, or `[copies, parts of a copy]` with hybrid sharding.

    Raises:
        InputError: when the processes cannot be arranged so.
    """
    parts = config.shard or world.size
    if world.size % parts:
        raise InputError(
            f"configuration: parallel.shard = {parts} must divide the {world.size} processes"
        )
    kind = world.device.type
    if parts == world.size:
        return init_device_mesh(kind, (parts,), mesh_dim_names=("shard",))
    shape = (world.size // parts, parts)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def synchronize_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass ends in a reduction over the processes: only that of a step's
    last micro batch has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reduce_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sums the gradients that FSDP does not: those of the parameters that are not cut."""
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if world.size == 1 or not whole:
        return
    flat = torch.cat([gradient.flatten() for gradient in whole])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in whole])
    summed = [part.view_as(g) for part, g in zip(parts, whole, strict=True)]
    torch._foreach_copy_(whole, summed)  # type: ignore[reportPrivateImportUsage]


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The Euclidean norm of the whole gradient, which is then scaled down to `largest`.

    On the CPU cut gradients are gathered first: a norm summed part by part would depend, in its
    last bits, on the number of parts, and with it every weight.

    Args:
        largest: 0 leaves the gradient as it is.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    cut = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    if cut and gradients[0].device.type == "cpu":
        norm = nn.utils.get_total_norm(
            [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        )
    elif cut:
        norm = nn.utils.get_total_norm(cut).full_tensor()  # type: ignore[union-attr]
        norm = torch.hypot(norm, nn.utils.get_total_norm(whole).to(norm))
    else:
        norm = nn.utils.get_total_norm(whole)
    if largest > 0:
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(parts, factor)  # type: ignore[reportPrivateImportUsage]
    return norm
