"""Parameters that are sharded over processes: which part of them is here, and sums of a few numbers over all shards.

Mechanic needs nothing global except a few sums over all weights, which are additive over any partition of these. So
each process measures what it holds, and one `all_reduce` per step and sharding group adds the numbers up; with "auto" a
second one adds up the length of the update. What is replicated is counted once: a `DTensor` is summed over those
dimensions of its mesh over which it is sharded, and no other. Plain tensors are whole (as with DDP), unless the user
names the process group over which they are sharded.

Nothing large is gathered, and nothing is read by the host. This is the only file with collectives in it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter}  # asking them for an attribute that they lack takes long

# The process groups over which a tensor is sharded, outermost first; () for a whole tensor.
ShardGroups: TypeAlias = "tuple[dist.ProcessGroup, ...]"


def is_dtensor(tensor: Tensor) -> bool:
    """Return True for a `DTensor`, without importing its module where nobody uses it."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Any, like: Any = None) -> Tensor:
    """Return the shard of a tensor that lies in this process, which shares its memory; a plain tensor as it is.

    Args:
        tensor: a parameter, a gradient, or a tensor of state.
        like: the parameter it belongs to. A gradient that is placed in another way is brought to the same placement.
    """
    if is_dtensor(tensor):
        if like is not None and tensor.placements != like.placements:
            tensor = tensor.redistribute(placements=like.placements)
        tensor = tensor.to_local()
    shard: Tensor = tensor
    return shard


def shard_groups(param: Any) -> ShardGroups:
    """Return the process groups over which a `DTensor` is sharded."""
    mesh, placements = param.device_mesh, param.placements
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def whole(tensor: Any) -> Tensor:
    """Return all of a `ShardedTensor`, FSDP1's way to load a checkpoint in shards; any other tensor as it is.

    All processes must call this together, as all load a checkpoint together.
    """
    if not hasattr(tensor, "local_shards"):
        plain: Tensor = tensor
        return plain
    mine = [(shard.metadata.shard_offsets, shard.tensor) for shard in tensor.local_shards()]
    gathered = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    out = torch.empty(tensor.size(), dtype=tensor.dtype)
    for offsets, shard in (each for shards in gathered for each in shards):
        out[tuple(slice(start, start + n) for start, n in zip(offsets, shard.shape, strict=True))] = shard
    return out


def sum_over_processes(partial: Mapping[ShardGroups, Tensor], all_groups: Collection[ShardGroups]) -> Tensor:
    """Add up partial sums over the processes that hold the other shards; the same bits come out in each of them.

    What is sharded over (a, b) is summed over b, joins what is sharded over (a,) alone, and is summed over a: as many
    calls as there are distinct groups.

    Args:
        partial: this process's sums, of one shape, by how the tensors behind them are sharded; at least that of ().
        all_groups: how each parameter of the optimizer is sharded, whether it has a gradient here or not; the same in
            all processes, so that all make the same calls.
    """
    if not any(all_groups):
        return partial[()]
    zero = torch.zeros_like(partial[()])
    pending = dict.fromkeys(all_groups, zero) | dict(partial)
    while True:
        longest = sorted(pending, key=len)[-1]
        total = pending.pop(longest)
        if not longest:
            return total
        total = total.clone()
        dist.all_reduce(total, group=longest[-1])
        rest = longest[:-1]
        pending[rest] = pending.get(rest, zero) + total


def check_shards(who: str, params: Iterable[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Refuse what is known to be a shard of something larger, if it would be taken for something whole.

    Raises:
        ValueError: the group of such shards was not named, or DeepSpeed steps through them one after the other.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for param in params:
        if hasattr(param, "ds_id"):
            raise ValueError(
                f"{who}: all parameters must be stepped together. ZeRO stage 3 of DeepSpeed steps them one at a time. "
                "Remedy: use stage 1 or 2, or FSDP2."
            )
        fsdp = getattr(param, "_fsdp_flattened", False)
        deepspeed = "deepspeed" in sys.modules and param.ndim == 1 and not isinstance(param, torch.nn.Parameter)
        if (fsdp or deepspeed) and process_group is None:
            raise ValueError(
                f"{who}: process_group must be given for parameters that are shards of larger ones. Got None and "
                f"parameters cut by {'FSDP1' if fsdp else 'DeepSpeed'}. Remedy: "
                "mechanize(..., process_group=torch.distributed.group.WORLD)."
            )


def check_agreement(who: str, options: Mapping[str, object], all_groups: Iterable[ShardGroups]) -> None:
    """Compare the options of all processes that share a tuner; once, before the first step.

    Raises:
        ValueError: they differ. All processes of the group raise, so that none waits for the others.
    """
    for group in {group: None for groups in all_groups for group in groups}:
        gathered: list[Mapping[str, object]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(gathered, dict(options), group=group)
        differences = [
            f"{name} is {gathered[0][name]} in rank {dist.get_global_rank(group, 0)} "
            f"and {other[name]} in rank {dist.get_global_rank(group, i)}"
            for i, other in enumerate(gathered)
            for name in options
            if other[name] != gathered[0][name]
        ]
        if differences:
            raise ValueError(
                f"{who}: processes that share parameters must share their options. Got: {'; '.join(differences)}. "
                "Remedy: pass mechanize the same options everywhere, and with per_group=True as many parameter groups, "
                "of which some may be empty."
            )
