"""The operators on two gloo ranks: DTensor rules and Ulysses' all-to-all against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.integrations.distributed import (
    register_dtensor_rules,
    replicate_layout,
    ulysses_attention,
)
from prefix_attn.testing import assert_within_budget, repeated_attention
from tests.ranks import on_ranks

RANKS = 2
LAYOUTS = [
    PrefixLayout.from_lengths([5, 3], [[2, 4], [1, 0, 8]]),  # ragged, an empty suffix, T odd
    PrefixLayout.from_tree([7, 2, 1, 3, 4], [-1, 0, 1, 0, -1]),  # a tree
]


@cache
def mesh_of(group: Any) -> DeviceMesh:
    """The ranks as a mesh whose DTensors know the operators; torch.compile fails after several."""
    register_dtensor_rules()  # again, which changes nothing
    return init_device_mesh("cpu", (group.size(),), mesh_dim_names=("tp",))


def inputs(layout: PrefixLayout, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """q (T, Hq, 16), k (T, Hkv, 16), v (T, Hkv, 24), the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 16), (kv_heads, 16), (kv_heads, 24)]
    return [torch.randn(layout.num_tokens, *s, generator=generator) for s in shapes]


def weights(layout: PrefixLayout, heads: int = 4) -> Tensor:
    return torch.randn(layout.num_tokens, heads, 24, generator=torch.Generator().manual_seed(1))


def alone(
    layout: PrefixLayout, tensors: list[Tensor], scale: float | None = None, lse: bool = True
) -> list[Tensor]:
    """out, lse, dq, dk, dv in one process."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, out_lse = prefix_attention(*leaves, layout, scale=scale, return_lse=True)
    loss = (out * weights(layout, leaves[0].shape[1]).to(out.dtype)).sum()
    loss = loss + out_lse.sin().sum() if lse else loss
    return [out.detach(), out_lse.detach(), *torch.autograd.grad(loss, leaves)]


def sharded(
    layout: PrefixLayout,
    tensors: list[Tensor],
    mesh: DeviceMesh,
    placements: list,
    scale: float | None = None,
    lse: bool = True,
    attention: Callable = prefix_attention,
) -> list[DTensor]:
    """The same with q, k, v as DTensors."""
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for x in tensors]
    replicated = replicate_layout(layout, mesh)
    out, out_lse = attention(*leaves, replicated, scale=scale, return_lse=True)
    everywhere = [Replicate()] * mesh.ndim
    loss = (out * distribute_tensor(weights(layout, leaves[0].shape[1]), mesh, everywhere)).sum()
    loss = loss + out_lse.sin().sum() if lse else loss
    loss.backward()
    return [out.detach(), out_lse.detach(), *(x.grad for x in leaves)]


def assert_exact(
    actual: list[Tensor], layout: PrefixLayout, tensors: list[Tensor], **options: float | bool
) -> None:
    """At most twice as far from float64 as one process in float32 is."""
    exact = alone(layout, [x.double() for x in tensors], **options)
    single = alone(layout, tensors, **options)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, a, e, s in zip(names, actual, exact, single, strict=True):
        assert_within_budget(name, a.full_tensor(), e, s)


# ---- DTensor ----------------------------------------------------------------------------------


@on_ranks(RANKS)
def test_dtensors_need_the_rules(group: Any) -> None:
    """Runs first, before the rules are registered."""
    mesh = init_device_mesh("cpu", (group.size(),))
    with pytest.raises(Exception, match="sharding strategy"):
        sharded(LAYOUTS[0], inputs(LAYOUTS[0]), mesh, [Shard(1)])


@on_ranks(RANKS)
def test_dtensors_match_one_process(group: Any) -> None:
    mesh = mesh_of(group)
    for layout in LAYOUTS:
        tensors = inputs(layout)
        for placement in (Shard(1), Replicate(), Shard(0)):
            for lse in (True, False):
                actual = sharded(layout, tensors, mesh, [placement], lse=lse)
                assert_exact(actual, layout, tensors, lse=lse)


@on_ranks(RANKS)
def test_heads_stay_sharded(group: Any) -> None:
    """Nothing is gathered: rows become heads by an all-to-all."""
    mesh = mesh_of(group)
    for placement in (Shard(1), Shard(0)):
        out, lse, *_ = sharded(LAYOUTS[0], inputs(LAYOUTS[0]), mesh, [placement])
        assert out.placements == (Shard(1),)
        assert lse.placements == (Shard(0),)
        assert out.to_local().shape[1] == 2


@on_ranks(RANKS)
def test_every_call_has_its_own_scale(group: Any) -> None:
    """DTensor caches what it decides: the numbers of a call must not be among it."""
    mesh = mesh_of(group)
    layout = LAYOUTS[0]
    tensors = inputs(layout)
    for placement in (Shard(1), Shard(0)):
        for scale in (0.1, 0.7):
            actual = sharded(layout, tensors, mesh, [placement], scale=scale)
            assert_exact(actual, layout, tensors, scale=scale)


@on_ranks(RANKS)
def test_one_kv_head_is_replicated(group: Any) -> None:
    mesh = mesh_of(group)
    layout = LAYOUTS[0]
    tensors = inputs(layout, heads=4, kv_heads=1)
    queries = distribute_tensor(tensors[0], mesh, [Shard(1)]).requires_grad_()
    keys, values = (distribute_tensor(x, mesh, [Replicate()]).requires_grad_() for x in tensors[1:])
    out = prefix_attention(queries, keys, values, replicate_layout(layout, mesh))
    assert out.placements == (Shard(1),)
    (out * distribute_tensor(weights(layout), mesh, [Replicate()])).sum().backward()
    assert keys.grad.placements == (Partial(),)  # a rank has the gradient of its own queries
    actual = [out.detach(), *(x.grad for x in (queries, keys, values))]
    leaves = [x.double().requires_grad_() for x in tensors]
    pytorch = [x.clone().requires_grad_() for x in tensors]
    results = []
    for function, ends in ((prefix_attention, leaves), (repeated_attention, pytorch)):
        o = function(*ends, layout)
        results.append([o, *torch.autograd.grad((o * weights(layout)).sum(), ends)])
    for name, a, e, p in zip(("out", "dq", "dk", "dv"), actual, *results, strict=True):
        assert_within_budget(name, a.full_tensor(), e, p)


def sinks_gradient(layout: PrefixLayout, leaves: list[Tensor], sinks: Tensor) -> list[Tensor]:
    """out, dq, dsinks of attention with sinks."""
    out = prefix_attention(*leaves, layout, sinks=sinks)
    weight = weights(layout)
    if isinstance(out, DTensor):
        weight = distribute_tensor(weight, out.device_mesh, [Replicate()])
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [leaves[0], sinks])]


@on_ranks(RANKS)
def test_sinks_are_sharded_with_their_heads(group: Any) -> None:
    mesh = mesh_of(group)
    layout = LAYOUTS[0]
    tensors = [*inputs(layout), torch.tensor([0.5, -1.0, 2.0, 0.0])]
    results = []
    for dtype in (torch.float64, torch.float32):
        *leaves, sinks = (x.to(dtype).requires_grad_() for x in tensors)
        results.append(sinks_gradient(layout, leaves, sinks))
    for placement in (Shard(1), Replicate()):
        leaves = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in tensors[:3]]
        sinks = distribute_tensor(tensors[3], mesh, [Replicate()]).requires_grad_()
        actual = sinks_gradient(replicate_layout(layout, mesh), leaves, sinks)
        for name, a, e, s in zip(("out", "dq", "dsinks"), actual, *results, strict=True):
            assert_within_budget(name, a.full_tensor(), e, s)


@on_ranks(RANKS)
def test_flop_counter_counts_whole_tensors(group: Any) -> None:
    """As it does for PyTorch's own operators: what all ranks do together."""
    mesh = mesh_of(group)
    layout, counted = LAYOUTS[0], []
    for replicated in (replicate_layout(layout, mesh), layout):
        tensors = inputs(layout)
        if replicated is not layout:
            tensors = [distribute_tensor(x, mesh, [Shard(1)]) for x in tensors]
        with FlopCounterMode(display=False) as counter:
            prefix_attention(*tensors, replicated)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@on_ranks(RANKS)
def test_some_queries_with_heads_sharded(group: Any) -> None:
    """Queries for the suffixes of the first group only."""
    mesh = mesh_of(group)
    layout = LAYOUTS[0].queries_for([1, 2])
    q, k, v = inputs(LAYOUTS[0])
    q = q[layout.query_rows]
    tensors = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    actual = prefix_attention(*tensors, replicate_layout(layout, mesh))
    single = prefix_attention(q, k, v, layout)
    exact = prefix_attention(q.double(), k.double(), v.double(), layout)
    assert actual.placements == (Shard(1),)
    assert_within_budget("out", actual.full_tensor(), exact, single)


@on_ranks(RANKS)
def test_uneven_heads_are_refused_by_name(group: Any) -> None:
    mesh = mesh_of(group)
    layout = LAYOUTS[0]
    tensors = inputs(layout, heads=6, kv_heads=3)
    with pytest.raises(Exception, match="Hq 6 and Hkv 3 can't be sharded evenly over 2 ranks"):
        sharded(layout, tensors, mesh, [Shard(1)])
    assert_exact(sharded(layout, tensors, mesh, [Replicate()]), layout, tensors)


@on_ranks(RANKS)
def test_larger_meshes_are_refused_by_name(group: Any) -> None:
    register_dtensor_rules()
    layout = LAYOUTS[1]
    square = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    with pytest.raises(Exception, match="one-dimensional mesh, got 2"):
        sharded(layout, inputs(layout), square, [Replicate(), Shard(1)])
    actual = sharded(layout, inputs(layout), square["tp"], [Shard(1)])
    assert_exact(actual, layout, inputs(layout))


# ---- Ulysses ----------------------------------------------------------------------------------


def assert_ulysses_matches(layout: PrefixLayout, tensors: list[Tensor]) -> None:
    """Compares this rank's rows of out, dq, dk, dv with those of one process."""
    rows = -(-layout.num_tokens // RANKS)
    mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)

    def local(x: Tensor) -> Tensor:
        padding = x.new_zeros(rows * RANKS - layout.num_tokens, *x.shape[1:])
        return torch.cat([x, padding])[mine]

    leaves = [local(x).requires_grad_() for x in tensors]
    out = ulysses_attention(*leaves, layout)
    loss = (out * local(weights(layout, tensors[0].shape[1]))).sum()
    actual = [out.detach(), *torch.autograd.grad(loss, leaves)]
    single = alone(layout, tensors, lse=False)
    exact = alone(layout, [x.double() for x in tensors], lse=False)
    del single[1], exact[1]
    for name, a, e, s in zip(("out", "dq", "dk", "dv"), actual, exact, single, strict=True):
        assert_within_budget(name, a, local(e), local(s))


@on_ranks(RANKS)
def test_ulysses_matches_one_process(group: Any) -> None:
    """An odd number of tokens too: the last rank's padding comes back as zeros."""
    for layout in LAYOUTS:
        assert_ulysses_matches(layout, inputs(layout))


@on_ranks(RANKS)
def test_ulysses_repeats_scarce_kv_heads(group: Any) -> None:
    assert_ulysses_matches(LAYOUTS[0], inputs(LAYOUTS[0], heads=4, kv_heads=1))


@on_ranks(RANKS)
def test_ulysses_splits_sinks(group: Any) -> None:
    """A rank's gradient of the sinks holds its own heads: their sum is that of one process."""
    layout = PrefixLayout.from_lengths([6], [[2, 4]])
    tensors = [*inputs(layout), torch.tensor([0.5, -1.0, 2.0, 0.0])]
    results = []
    for dtype in (torch.float64, torch.float32):
        *leaves, sinks = (x.to(dtype).requires_grad_() for x in tensors)
        results.append(sinks_gradient(layout, leaves, sinks)[-1])
    mine = slice(dist.get_rank() * 6, dist.get_rank() * 6 + 6)
    sinks = tensors[3].requires_grad_()
    out = ulysses_attention(*(x[mine] for x in tensors[:3]), layout, sinks=sinks)
    (grad,) = torch.autograd.grad((out * weights(layout)[mine]).sum(), [sinks])
    dist.all_reduce(grad)
    assert_within_budget("dsinks", grad, *results)


@on_ranks(RANKS)
def test_ulysses_refuses_by_name(group: Any) -> None:
    layout = LAYOUTS[0]
    q, k, v = (x[:11] for x in inputs(layout))
    with pytest.raises(ValueError, match="2 ranks of 11 rows hold 22 rows, the layout has"):
        ulysses_attention(q, k, v, layout)
    q, k, v = (x[:12] for x in inputs(layout, heads=6, kv_heads=3))
    with pytest.raises(ValueError, match="got Hq 6, Hkv 3"):
        ulysses_attention(q, k, v, layout)
    with pytest.raises(NotImplementedError, match="returns no LSE"):
        ulysses_attention(q, k, v, layout, return_lse=True)
    with pytest.raises(NotImplementedError, match="use the layout from before queries_for"):
        ulysses_attention(q, k, v, layout.queries_for([1]))


# ---- torch.compile ----------------------------------------------------------------------------


@on_ranks(RANKS)
def test_dtensors_compile_fullgraph(group: Any) -> None:
    mesh = mesh_of(group)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    for layout in LAYOUTS:
        tensors = inputs(layout)
        actual = sharded(layout, tensors, mesh, [Shard(1)], attention=compiled)
        assert_exact(actual, layout, tensors)
