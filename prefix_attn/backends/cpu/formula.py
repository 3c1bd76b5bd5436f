"""Attention of a block as models write it out: for a softcap, and for values that are not finite.

The backward pass computes the scores of its block once more, so that memory is that of a block.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prefix_attn.backends.cpu.attend import Kernel
from prefix_attn.backends.cpu.plan import Mask


def kernel(softcap: float | None, wild: bool = False) -> Kernel:
    """Takes blocks with a mask alone; `wild` says that scores may be infinite or NaN."""
    return Kernel(partial(_forward, softcap, wild), partial(_backward, softcap, wild))


def _forward(
    softcap: float | None,
    wild: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads = q.shape[:2]
    with torch.autocast("cpu", enabled=False):  # it would round the products
        q, k, v = _as_rows(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
        scores, _ = _scores(softcap, q, k, scale)
        _hide(_as_heads(scores, batch, heads), mask, wild)
        if wild:
            lse = scores.logsumexp(-1)
            p = scores.sub_(lse[..., None]).exp_()
        else:  # fewer passes
            p = scores.softmax(-1)
            lse = scores.amax(-1) - p.amax(-1).log_()
        return _as_heads(p @ v, batch, heads), _as_heads(lse, batch, heads)


def _backward(
    softcap: float | None,
    wild: bool,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads), kv_heads = q.shape[:2], k.shape[1]
    with torch.autocast("cpu", enabled=False):
        dout, q, out, lse = (_as_rows(x, kv_heads) for x in (dout, q, out, lse))
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        scores, tanh = _scores(softcap, q, k, scale)
        p = scores.sub_(lse[..., None])
        _hide(_as_heads(p, batch, heads), mask, wild).exp_()
        dv = p.transpose(1, 2) @ dout
        # dS = P * (dP - delta)
        delta = (dout * out).sum(-1, keepdim=True)
        ds = torch.baddbmm(-delta, dout, v.transpose(1, 2)).mul_(p)
        if tanh is not None:
            ds = torch.ops.aten.tanh_backward(ds, tanh)
        dq, dk = (ds @ k).mul_(scale), (ds.transpose(1, 2) @ q).mul_(scale)
        return _as_heads(dq, batch, heads), *(x.unflatten(0, (batch, kv_heads)) for x in (dk, dv))


def _scores(
    softcap: float | None, q: Tensor, k: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """S = softcap(scale Q K^T), and tanh(scale Q K^T / softcap) where there is a cap."""
    factor = scale if softcap is None else scale / softcap
    # Some kernels multiply q or k by alpha, which makes large ones infinite unless it is small.
    alpha = min(factor, 1.0)
    products = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=alpha)
    if alpha < factor:
        products.mul_(factor)
    if softcap is None:
        return products, None
    return products.tanh_() * softcap, products


def _hide(scores: Tensor, mask: Mask, wild: bool) -> Tensor:
    """-inf in the places of (n, Hq, L, K) scores that the mask hides."""
    if wild:  # where adding -inf leaves NaN; it takes several times as long
        return scores.masked_fill_(~mask.to(torch.bool), float("-inf"))
    return scores.add_(mask.to(scores.dtype))


def _as_rows(x: Tensor, kv_heads: int) -> Tensor:
    """(n, Hq, L, ...) -> (n Hkv, Hq / Hkv L, ...): keys that heads share need no copies."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)


def _as_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    """(n Hkv, Hq / Hkv L, ...) -> (n, Hq, L, ...), a view."""
    return x.view(batch, heads, -1, *x.shape[2:])
