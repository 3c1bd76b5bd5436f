"""Which ranks run the same passes, because they gather one another's parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def sharing_groups(model: torch.nn.Module) -> list[dist.ProcessGroup]:
    """The groups of ranks that gather one another's parameters, so that all run the same passes.

    Of a mesh with several dimensions all: what is told along each in turn reaches every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return list(parameter.device_mesh.get_all_groups())
        if hasattr(parameter, "ds_id"):  # DeepSpeed's ZeRO-3
            return [dist.group.WORLD] if dist.group.WORLD is not None else []
    groups: dict[int, dist.ProcessGroup] = {}
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.process_group is not None:
            groups[id(module.process_group)] = module.process_group
    return list(groups.values())


def told_by_all(value: Any, groups: list[dist.ProcessGroup]) -> list[Any]:
    """What this rank and those of some groups say, without repeats.

    Args:
        value: of this rank; hashable, and small.
        groups: what one of them was told goes on to the next.
    """
    found = {value}
    for group in groups:
        of_ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(of_ranks, found, group)
        found = set().union(*of_ranks)
    return list(found)
