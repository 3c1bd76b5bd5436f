"""Runs the calls of a plan: attention over parts of the keys, merged, and its gradients.

With the merged output and LSE the backward of each call is exact: P = exp(S - LSE) and
delta = sum(dO * O) are those of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_attn.backends.cpu.plan import Call

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Kernel(NamedTuple):
    """Attention of a batch (n, Hq, L, D) over (n, Hkv, K, D), K and V of one width.

    Attributes:
        forward: (q, k, v, keep, causal, scale) to out and lse (n, Hq, L); `keep` (n, 1, L, K) bool
            or None.
        backward: (dout, q, k, v, out, lse, keep, causal, scale) to dq, dk, dv.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward_call(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=_additive(keep, q.dtype), scale=scale)
    return out, lse


def _flash_backward_call(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _additive(keep, q.dtype)
    dq, dk, dv = _flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, dk, dv


def _additive(keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if keep is None:
        return None
    return torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, float("-inf"))


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
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2])
    for call in calls:
        queries = call.queries
        parts = [grid.take(x) for grid, x in ((queries, q), (call.keys, k), (call.keys, v))]
        heads_first = (x.transpose(1, 2) for x in parts)
        found = kernel.forward(*heads_first, _keep(call), call.causal, scale)
        o, o_lse = (x.transpose(1, 2) for x in found)
        if call.first:
            out, lse = queries.written(out, o), queries.written(lse, o_lse)
            continue
        before = queries.take(lse)
        merged = torch.logaddexp(before, o_lse)
        whole = queries.take(out)
        whole.mul_((before - merged).exp_()[..., None])
        whole.addcmul_(o, o_lse.sub_(merged).exp_()[..., None])
        lse = queries.written(lse, merged)
        if not queries.is_view:
            out = queries.written(out, whole)
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
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    own = [call for call in calls if call.first and call.mask is None]
    # Keys that no query of their own segment sees start from zero.
    new = torch.empty_like if sum(call.keys.size for call in own) == len(k) else torch.zeros_like
    dk, dv = (new(x, memory_format=torch.contiguous_format) for x in (k, v))
    for call in calls:
        queries, keys = call.queries, call.keys
        grids = ((queries, q), (keys, k), (keys, v), (queries, out), (queries, lse))
        d_out = queries.take(dout)
        if call.mask is None:  # which hides keys from the rows that fill a line
            d_out = queries.cleared(d_out)
        heads_first = (x.transpose(1, 2) for x in (d_out, *(grid.take(x) for grid, x in grids)))
        grads = kernel.backward(*heads_first, _keep(call), call.causal, scale)
        d_queries, d_keys, d_values = (x.transpose(1, 2) for x in grads)
        dq = queries.written(dq, d_queries) if call.first else queries.added(dq, d_queries)
        if call.first and call.mask is None:
            dk, dv = keys.written(dk, d_keys), keys.written(dv, d_values)
        else:
            dk, dv = keys.added(dk, d_keys), keys.added(dv, d_values)
    return dq, dk, dv


def _keep(call: Call) -> Tensor | None:
    """(n, 1, L, K) bool, or None."""
    return None if call.mask is None else call.mask.keep()[:, None]
