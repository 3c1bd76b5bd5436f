"""The dense oracle: plain PyTorch, any device, quadratic in memory.

Autograd is its backward, as often as it is asked for: it is called without an operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefix_attn.layout import PrefixLayout


def why_not(device_type: str, dtype: torch.dtype, options: Sequence[str]) -> None:
    """No reason: it serves every call, on every device."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention under the dense mask of a layout, in float32 or better.

    Args:
        q: (Tq, Hq, D).
        k: (T, Hkv, D).
        v: (T, Hkv, DV).
        layout: of T tokens, Tq of them queries.
        scale: factor of the scores.
        window_size: a query sees this many positions, its own included.
        softcap: scores s become softcap * tanh(s / softcap).
        sinks: (Hq,), one more logit in each softmax denominator.
        prefix_causal: False lets the rows of a segment that others continue see all of it.

    Returns:
        out (Tq, Hq, DV) in the dtype of q, and lse (Hq, Tq), natural log, sinks included.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keep = layout.materialize(window_size=window_size, prefix_causal=prefix_causal)
    with torch.autocast(q.device.type, enabled=False):  # it would round the products
        k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("mhd,nhd->hmn", q.to(dtype), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~keep, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(dtype)[:, None])
        out = torch.einsum("hmn,nhd->mhd", torch.exp(scores - lse[..., None]), v)
    return out.to(q.dtype), lse
