"""A language-model head whose vocabulary is sharded over ranks, as tensor parallelism does it.

Each rank reads its own rows of the head. Four numbers per row travel forward, and the gradient of
the hidden states backward.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # it takes seconds to import
    from torch.distributed.tensor import DTensor


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over ranks. Where one is, DTensor has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the head that this rank holds.

    Attributes:
        first: number of the first of them in the vocabulary.
        group: the ranks that hold all of them.
    """

    first: int
    group: dist.ProcessGroup

    @classmethod
    def from_head(
        cls, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
    ) -> VocabularyShard:
        """Refuses heads that are sharded in another way.

        Raises:
            ValueError: with what to do instead.
        """
        if not is_dtensor(hidden) or not is_dtensor(weight):
            raise ValueError(
                f"hidden is {_placed(hidden)}, weight {_placed(weight)}. Under FSDP2 call "
                "token_log_probs in a method of the sharded module that is registered with "
                "torch.distributed.fsdp.register_fsdp_forward_method, so that FSDP gathers the "
                "weight and reduces its gradient; where the weight needs no gradient pass "
                "weight.full_tensor(). Under tensor parallelism pass hidden as a DTensor that is "
                "replicated over the mesh of the weight"
            )
        mesh = weight.device_mesh
        right = [_is_placed(hidden, mesh), _is_placed(weight, mesh, dim=0)]
        if bias is not None:
            right.append(_is_placed(bias, mesh, dim=0))
        if is_dtensor(targets):
            right.append(_is_placed(targets, mesh))
        if mesh.ndim != 1 or not all(right):
            raise ValueError(
                "a head that is sharded over its vocabulary needs weight and bias with "
                "placements [Shard(0)], hidden and targets replicated, on one mesh of one "
                f"dimension; got weight {_placed(weight)}, bias {_placed(bias)}, hidden "
                f"{_placed(hidden)}, targets {_placed(targets)}"
            )
        group = mesh.get_group()
        # A sharded dimension is cut as torch.chunk does it.
        rows = -(-weight.shape[0] // group.size())
        return cls(min(group.rank() * rows, weight.shape[0]), group)

    def combine(
        self, top: Tensor, total: Tensor, moment: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The state of the online softmax over all ranks, from that of each.

        Args:
            top: (T,) largest logit.
            total: (T,) sum of exp(logit - top).
            moment: (T,) sum of exp(logit - top) (logit - top).
            chosen: (T,) logit of the target, zero on ranks that don't hold it.
        """
        new_top = top.clone()
        dist.all_reduce(new_top, dist.ReduceOp.MAX, group=self.group)
        zero = new_top.masked_fill(new_top == -torch.inf, 0.0)
        shift = (top - zero).masked_fill(top == -torch.inf, 0.0)
        sums = torch.stack([total, moment + shift * total])
        sums = torch.cat([shift.exp() * sums, chosen[None]])
        total, moment, chosen = self.sum(sums)
        return new_top, total, moment, chosen

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, with its gradient."""
    return x.to_local() if is_dtensor(x) else x


def placed_like(hidden: Tensor, x: Tensor) -> Tensor:
    """A result that every rank has, as a DTensor where the hidden states are one."""
    if not is_dtensor(hidden):
        return x
    return type(hidden).from_local(x, hidden.device_mesh, hidden.placements, run_check=False)


def _is_placed(x: Any, mesh: Any, dim: int | None = None) -> bool:
    """Whether it is sharded along `dim` over a mesh of one dimension, or replicated."""
    if not is_dtensor(x) or x.device_mesh != mesh:
        return False
    placement = x.placements[0]
    if dim is None:
        return placement.is_replicate()
    return type(placement).__name__ == "Shard" and placement.is_shard(dim)  # and not strided


def _placed(x: Any) -> str:
    if x is None:
        return "None"
    return f"a DTensor with placements {list(x.placements)}" if is_dtensor(x) else "a plain tensor"
