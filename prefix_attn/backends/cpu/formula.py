"""Attention of a block as models write it out: for a softcap, and for values that are not finite.

The backward pass computes the scores of its block once more, so that memory is that of a block.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prefix_attn.backends.cpu.attend import Kernel
from prefix_attn.backends.cpu.plan import Mask


def kernel(softcap: float | None) -> Kernel:
    """Takes blocks with a mask alone."""
    return Kernel(partial(_forward, softcap), partial(_backward, softcap))


def _forward(
    softcap: float | None, q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    with torch.autocast("cpu", enabled=False):  # it would round the products
        q, hidden = _as_rows(q, k.shape[1]), ~mask.to(torch.bool)
        scores, _ = _scores(softcap, q, k, scale)
        _as_heads(scores, heads).masked_fill_(hidden, float("-inf"))
        lse = scores.logsumexp(-1)
        out = scores.sub_(lse[..., None]).exp_() @ v
    return _as_heads(out, heads), _as_heads(lse, heads)


def _backward(
    softcap: float | None,
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
    heads = q.shape[1]
    with torch.autocast("cpu", enabled=False):
        dout, q, out, lse = (_as_rows(x, k.shape[1]) for x in (dout, q, out, lse))
        scores, tanh = _scores(softcap, q, k, scale)
        p = scores.sub_(lse[..., None]).exp_()
        _as_heads(p, heads).masked_fill_(~mask.to(torch.bool), 0.0)
        dv = p.transpose(2, 3) @ dout
        # dS = P * (dP - delta)
        delta = (dout * out).sum(-1, keepdim=True)
        ds = (dout @ v.transpose(2, 3)).sub_(delta).mul_(p)
        if tanh is not None:
            ds.mul_(tanh.square_().neg_().add_(1.0))
        ds.mul_(scale)
        return _as_heads(ds @ k, heads), ds.transpose(2, 3) @ q, dv


def _scores(
    softcap: float | None, q: Tensor, k: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """S = softcap(scale Q K^T), and tanh(scale Q K^T / softcap) where there is a cap."""
    scores = q @ k.transpose(2, 3)
    if softcap is None:
        return scores.mul_(scale), None
    tanh = scores.mul_(scale / softcap).tanh_()
    return tanh * softcap, tanh


def _as_rows(x: Tensor, kv_heads: int) -> Tensor:
    """(n, Hq, L, ...) -> (n, Hkv, Hq / Hkv L, ...): keys that heads share need no copies."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _as_heads(x: Tensor, heads: int) -> Tensor:
    """(n, Hkv, Hq / Hkv L, ...) -> (n, Hq, L, ...), a view."""
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)
