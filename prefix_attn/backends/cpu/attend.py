"""Runs the calls of a plan: attention over parts of the keys, merged, and its gradients.

With the merged output and LSE the backward of each call is exact: P = exp(S - LSE) and
delta = sum(dO * O) are those of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.backends.cpu.plan import Call, Grid, Mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Kernel(NamedTuple):
    """Attention of a batch (n, Hq, L, D) over (n, Hkv, K, D), K and V of one width.

    Attributes:
        forward: (q, k, v, mask, causal, scale) to out and lse (n, Hq, L).
        backward: (dout, q, k, v, out, lse, mask, causal, scale) to dq, dk, dv.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    added = None if mask is None else mask.to(q.dtype)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    return out, lse


def _flash_backward_call(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    added = None if mask is None else mask.to(q.dtype)
    dq, dk, dv = _flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale)
    return dq, dk, dv


FLASH = Kernel(_flash_forward_call, _flash_backward_call)


def forward(
    of_queries: Sequence[Tensor],
    of_keys: Sequence[Tensor],
    calls: list[Call],
    kernel: Kernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, D) and lse (Tq, Hq) of q (Tq, Hq, D), k and v (T, Hkv, D)."""
    (q,), (k, v) = of_queries, of_keys
    out = None
    lse = q.new_empty(q.shape[1], len(q)).t()  # in memory as the operator returns it
    for call in calls:
        queries, keys = call.queries, call.keys
        parts = queries.take(q), keys.take(k), keys.take(v)
        o, o_lse = kernel.forward(*parts, call.mask, call.causal, scale)
        if call.first:
            out = _written(out, len(q), queries, o)
            queries.put(lse, o_lse)
            continue
        assert out is not None
        before, whole = queries.take(lse), queries.take(out)
        merged = torch.logaddexp(before, o_lse)
        whole.mul_((before - merged).exp_()[..., None])
        whole.addcmul_(o, o_lse.sub_(merged).exp_()[..., None])
        queries.put(lse, merged)
        if not queries.is_view:
            queries.put(out, whole)
    assert out is not None
    return out, lse


def backward(
    of_queries: Sequence[Tensor],
    of_keys: Sequence[Tensor],
    calls: list[Call],
    kernel: Kernel,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of dout, q and out (Tq, Hq, D), lse (Tq, Hq); k and v (T, Hkv, D)."""
    (dout, q, out, lse), (k, v) = of_queries, of_keys
    own = [call for call in calls if call.first and call.mask is None]
    dq = dk = dv = None
    if sum(call.keys.size for call in own) < len(k):
        # Keys that no query of their own segment sees start from zero.
        dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for call in calls:
        queries, keys = call.queries, call.keys
        d_out = queries.take(dout)
        if call.mask is None:  # which hides keys from the rows that fill a line
            d_out = queries.cleared(d_out)
        parts = queries.take(q), keys.take(k), keys.take(v), queries.take(out), queries.take(lse)
        grads = kernel.backward(d_out, *parts, call.mask, call.causal, scale)
        if call.first:
            dq = _written(dq, len(q), queries, grads[0])
        else:
            assert dq is not None
            queries.add(dq, grads[0])
        if call.first and call.mask is None:
            dk, dv = (
                _written(x, len(k), keys, y) for x, y in zip((dk, dv), grads[1:], strict=True)
            )
        else:
            assert dk is not None
            assert dv is not None
            keys.add(dk, grads[1])
            keys.add(dv, grads[2])
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return dq, dk, dv


def _written(x: Tensor | None, num_rows: int, grid: Grid, values: Tensor) -> Tensor:
    """x, (T, H, ...), with the values of a grid; it is made for the first of them.

    Values that are all of it become it, without a copy.
    """
    if x is None:
        if grid.is_all(num_rows):
            return values.transpose(1, 2).flatten(0, 1)
        x = values.new_empty(num_rows, values.shape[1], *values.shape[3:])
    grid.put(x, values)
    return x
