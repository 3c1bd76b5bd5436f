"""Tensor and sequence parallelism: DTensor rules for the operators, and Ulysses' all-to-all.

Attention is independent per head, so both shard the heads and keep the whole layout on every rank:

    DTensor rules   q, k, v arrive sharded over heads (or are redistributed to be)
    Ulysses         each rank has a slice of the packed rows; two all-to-alls trade rows for heads
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.experimental import register_sharding

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.shards import RowShard

# Where the operators' tensors carry query heads and KV heads; every other tensor is replicated.
QUERY_HEAD_DIM = {
    "q": 1,
    "out": 1,
    "dout": 1,
    "dq": 1,
    "lse": 0,
    "dlse": 0,
    "sinks": 0,
    "dsinks": 0,
}
KV_HEAD_DIM = {"k": 1, "v": 1, "dk": 1, "dv": 1}

Place = Callable[[str], Placement]
Rule = tuple[list[Placement | None], list[Placement | None]]


def register_dtensor_rules() -> None:
    """Teaches DTensor to run the operators with heads sharded. Calling it again does nothing new.

    After it, `prefix_attention` takes q, k and v as DTensors on a one-dimensional mesh, together
    with a layout from `replicate_layout`. The heads are sharded:

        q, out  Shard(1)    lse, sinks  Shard(0)    k, v  Shard(1), or Replicate for one KV head

    Other placements are redistributed to that one, rows sharded with Shard(0) by an all-to-all. If
    q, k and v are all replicated, so is the result. Heads that the mesh can't share evenly are
    refused.

    Example:
        >>> register_dtensor_rules()
    """
    for op in (torch.ops.prefix_attn.forward.default, torch.ops.prefix_attn.backward.default):
        register_sharding(op)(_rule_of(op))


def replicate_layout(layout: PrefixLayout, mesh: DeviceMesh) -> PrefixLayout:
    """The same layout for use with DTensors on `mesh`: for the attention call and nothing else.

    Every rank must pass the same layout. The description of the segments becomes a replicated
    DTensor; it stays on the CPU whatever the mesh, since the schedule is made there.
    """
    segments = layout.segments
    meta = TensorMeta(segments.shape, segments.stride(), segments.dtype)
    spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
    # `from_local` would move the tensor to the device of the mesh.
    replicated = DTensor(segments, spec, requires_grad=False)
    return dataclasses.replace(layout, segments=replicated)


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    group: dist.ProcessGroup | None = None,
    *,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`prefix_attention` for rows split over ranks: rows are traded for heads, and back.

    Args:
        q: (n, Hq, D), rows `[rank * n, (rank + 1) * n)` of the packed axis. The last ranks' rows
            beyond the T tokens of the layout are padding, whose output is zero.
        k: (n, Hkv, D).
        v: (n, Hkv, DV).
        layout: of all T tokens, the same on every rank.
        group: the ranks that share the rows; all of them by default.
        sinks: (Hq,), the same on every rank. Each rank's gradient holds its own heads and zeros:
            sum it over the group.
        **options: those of `prefix_attention`, except `return_lse`.

    Returns:
        (n, Hq, DV), the rank's rows.

    Raises:
        ValueError: if the ranks' rows don't cover the layout, or heads can't be split evenly.
        NotImplementedError: for `return_lse`, and for a layout from `queries_for`.
    """
    if options.get("return_lse"):
        raise NotImplementedError("ulysses_attention returns no LSE; call prefix_attention for it")
    if layout.num_queries != layout.num_tokens:
        raise NotImplementedError(
            f"ulysses_attention needs a query for each token, the layout has {layout.num_queries} "
            f"queries for {layout.num_tokens} tokens; use the layout from before queries_for"
        )
    if group is None:
        group = _get_default_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows, heads = q.shape[:2]
    kv_heads = k.shape[1]
    tokens = layout.num_tokens
    if rows * size < tokens:
        raise ValueError(
            f"{size} ranks of {rows} rows hold {rows * size} rows, the layout has {tokens} tokens; "
            f"pad the packed axis to a multiple of {size} before slicing it"
        )
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            f"Hq must be a multiple of the {size} ranks and Hkv a multiple or a divisor, got "
            f"Hq {heads}, Hkv {kv_heads}"
        )
    if kv_heads % size:  # each rank gets the one KV head of its query heads
        k, v = (x.repeat_interleave(size // kv_heads, dim=1) for x in (k, v))
    whole = [_rows_to_heads(x, size, group)[:tokens] for x in (q, k, v)]
    if sinks is not None:
        options["sinks"] = sinks.chunk(size)[rank]
    out = prefix_attention(whole[0], whole[1], whole[2], layout, **options)
    return _heads_to_rows(F.pad(out, (0, 0, 0, 0, 0, rows * size - tokens)), size, group)


def sharded_attention(q: Tensor, k: Tensor, v: Tensor, shard: RowShard, **options: Any) -> Tensor:
    """`prefix_attention` for the rows of a shard, on every rank of its group.

    Args:
        q: (n, Hq, D), one for each of `shard.rows`.
        k: (n, Hkv, D).
        v: (n, Hkv, DV).
        shard: of this rank.
        **options: those of `ulysses_attention`. The gradient of `sinks` is that of the rank's own
            heads, or of its own rows: sum it over the group.

    Returns:
        (n, Hq, DV), zero at padding.

    Raises:
        ValueError: if q, k and v are not of the rows of the shard, or heads can't be traded evenly.
        NotImplementedError: for `return_lse`.
    """
    rows = (shard.num_rows,) * 3
    if (q.shape[0], k.shape[0], v.shape[0]) != rows:
        raise ValueError(
            f"q, k and v must have {shard.num_rows} rows, those of the shard, got {q.shape[0]}, "
            f"{k.shape[0]} and {v.shape[0]}"
        )
    if shard.keys is None:
        return ulysses_attention(q, k, v, shard.layout, shard.group, **options)
    if options.get("return_lse"):
        raise NotImplementedError("sharded_attention returns no LSE; call prefix_attention for it")
    own, dim = shard.num_own, k.shape[2]
    both = shard.keys.exchange(torch.cat([k, v], dim=2)[:own])
    out = prefix_attention(q[:own], both[..., :dim], both[..., dim:], shard.keys.layout, **options)
    return F.pad(out, (0, 0, 0, 0, 0, shard.num_rows - own))


def _rows_to_heads(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """(n, H, D) rows of this rank -> (size * n, H / size, D), all rows of its heads."""
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    return all_to_all_single_autograd(parts, None, None, group)


def _heads_to_rows(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """(size * n, H / size, D) all rows of this rank's heads -> (n, H, D)."""
    parts = all_to_all_single_autograd(x.contiguous(), None, None, group)
    return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def _rule_of(op: torch._ops.OpOverload) -> Callable[..., list[Rule]]:
    """The acceptable placements of one operator, read off the names in its schema."""
    inputs = [argument.name for argument in op._schema.arguments]
    outputs = [value.name for value in op._schema.returns]

    def rule(*values: Any) -> list[Rule]:
        given = dict(zip(inputs, values, strict=True))
        tensors = {name for name, value in given.items() if isinstance(value, DTensorSpec)}
        q, k, v = given["q"], given["k"], given["v"]
        if q.mesh.ndim != 1:
            raise ValueError(
                f"prefix_attn needs DTensors on a one-dimensional mesh, got {q.mesh.ndim} "
                "dimensions; use the submesh that the heads are sharded over, such as mesh['tp']"
            )

        def acceptable(place: Place, place_result: Place) -> Rule:
            absent = () if "sinks" in tensors else ("dsinks",)
            return (
                [Replicate() if name in absent else place_result(name) for name in outputs],
                [place(name) if name in tensors else None for name in inputs],
            )

        heads, kv_heads, ranks = q.shape[1], k.shape[1], q.mesh.size()
        rules = []
        if heads % ranks == 0 and kv_heads % ranks == 0:
            rules.append(acceptable(_sharded, _sharded))
        elif heads % ranks == 0 and kv_heads == 1:
            rules.append(acceptable(_one_kv_head, _one_kv_head_result))
        elif any(spec.placements != (Replicate(),) for spec in (q, k, v)):
            raise ValueError(
                f"Hq {heads} and Hkv {kv_heads} can't be sharded evenly over {ranks} ranks; "
                "replicate q, k and v, or repeat the KV heads"
            )
        if all(spec.placements == (Replicate(),) for spec in (q, k, v)):
            # Only where nothing is sharded: for small tensors DTensor would rather gather than
            # exchange, and every rank would compute everything.
            rules.insert(0, acceptable(_replicated, _replicated))
        return rules

    return rule


def _replicated(name: str) -> Placement:
    return Replicate()


def _sharded(name: str) -> Placement:
    dim = {**QUERY_HEAD_DIM, **KV_HEAD_DIM}.get(name)
    return Replicate() if dim is None else Shard(dim)


def _one_kv_head(name: str) -> Placement:
    return Replicate() if name in KV_HEAD_DIM else _sharded(name)


def _one_kv_head_result(name: str) -> Placement:
    return Partial() if name in KV_HEAD_DIM else _sharded(name)
