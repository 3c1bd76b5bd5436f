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
    """Attention of a batch (n, H, L, D) over (n, H, K, D), K and V of one width.

    Attributes:
        forward: (q, k, v, keep, causal, scale) to out and lse (n, H, L); `keep` (n, 1, L, K) bool
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
    group = q.shape[1] // k.shape[1]
    for call in calls:
        queries = call.queries
        heads = _Heads(call, group)
        o, o_lse = kernel.forward(
            heads.queries(queries.take(q)),
            heads.keys(call.keys.take(k)),
            heads.keys(call.keys.take(v)),
            heads.keep(call),
            call.causal,
            scale,
        )
        o, o_lse = heads.out(o), heads.out(o_lse[..., None])[..., 0]
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
    group = q.shape[1] // k.shape[1]
    for call in calls:
        queries, keys = call.queries, call.keys
        heads = _Heads(call, group)
        grads = kernel.backward(
            heads.queries(queries.take(dout)),
            heads.queries(queries.take(q)),
            heads.keys(keys.take(k)),
            heads.keys(keys.take(v)),
            heads.queries(queries.take(out)),
            heads.queries(queries.take(lse)[..., None])[..., 0],
            heads.keep(call),
            call.causal,
            scale,
        )
        d_queries, d_keys, d_values = heads.out(grads[0]), heads.sum(grads[1]), heads.sum(grads[2])
        dq = queries.written(dq, d_queries) if call.first else queries.added(dq, d_queries)
        if call.first and call.mask is None:
            dk, dv = keys.written(dk, d_keys), keys.written(dv, d_values)
        else:
            dk, dv = keys.added(dk, d_keys), keys.added(dv, d_values)
    return dq, dk, dv


class _Heads:
    """How the query heads of a KV head reach a kernel that knows one kind of heads.

    They become rows, one behind the other, so that keys and values need no copies. Under the
    kernel's own causal mask, which counts rows, keys and values are repeated instead.
    """

    def __init__(self, call: Call, group: int) -> None:
        self.rows = 1 if call.causal else group
        self.repeats = group if call.causal else 1

    def queries(self, x: Tensor) -> Tensor:
        """(n, L, Hq, D) -> (n, H, L', D)."""
        if self.rows == 1:
            return x.transpose(1, 2)
        return x.unflatten(2, (-1, self.rows)).permute(0, 2, 1, 3, 4).flatten(2, 3)

    def out(self, x: Tensor) -> Tensor:
        """(n, H, L', D) -> (n, L, Hq, D)."""
        if self.rows == 1:
            return x.transpose(1, 2)
        return x.unflatten(2, (-1, self.rows)).permute(0, 2, 1, 3, 4).flatten(2, 3)

    def keys(self, x: Tensor) -> Tensor:
        """(n, K, Hkv, D) -> (n, H, K, D)."""
        if self.repeats > 1:
            x = x.repeat_interleave(self.repeats, dim=2)
        return x.transpose(1, 2)

    def sum(self, x: Tensor) -> Tensor:
        """(n, H, K, D) -> (n, K, Hkv, D)."""
        x = x.transpose(1, 2)
        return x if self.repeats == 1 else x.unflatten(2, (-1, self.repeats)).sum(3)

    def keep(self, call: Call) -> Tensor | None:
        """(n, 1, L', K) bool, or None."""
        if call.mask is None:
            return None
        keep = call.mask.keep()
        return (keep if self.rows == 1 else keep.repeat_interleave(self.rows, dim=1))[:, None]
