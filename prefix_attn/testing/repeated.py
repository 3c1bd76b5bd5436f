"""The yardstick of the budget: PyTorch on every sequence alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefix_attn.layout import PrefixLayout


def repeated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs every sequence whole, as PyTorch does: what sharing must reproduce.

    Without options each sequence is a call of `scaled_dot_product_attention`. With options, and
    where PyTorch has no fused kernel (D other than DV, a scale that is not positive, a dtype that
    this processor can't run), it is the formula that models write out. Its products have the dtype;
    they add up in float32 or better.

    Sequences are computed in `dtype`, gathered and summed in the dtype of q: with float64 tensors
    and another `dtype` the errors are those of one sequence, not of the sum over members. A shared
    row of the output is that of the first sequence that has it, and so is its gradient.

    Args:
        q: (Tq, Hq, D) on the packed axis.
        k: (T, Hkv, D).
        v: (T, Hkv, DV).
        layout: of T tokens.
        dtype: of the computation, that of q by default.
        scale: factor of the scores, `D ** -0.5` by default.
        window_size: a query sees this many keys back on its path, itself included.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        sinks: (Hq,), one more logit per query head.
        prefix_causal: False lets the rows of a segment that others continue see all of it.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        (Tq, Hq, DV) in the dtype of q; with `return_lse` also (Hq, Tq), in float32 or better.
    """
    dtype = q.dtype if dtype is None else dtype
    scale = q.shape[2] ** -0.5 if scale is None else scale
    segments = torch.arange(layout.num_segments, device=q.device)
    sees_itself = layout.bidirectional.to(q.device)
    if not prefix_causal:
        sees_itself = sees_itself | torch.isin(segments, layout.parents)
    plain = window_size is None and softcap is None and sinks is None and not sees_itself.any()
    plain = plain and not return_lse and q.shape[2] == v.shape[2] and _sdpa_runs(dtype, q.device)
    # PyTorch's causal kernels multiply the scores that they hide, -inf, by the scale.
    plain = plain and scale >= torch.finfo(torch.float32).tiny
    query_of = torch.full((layout.num_tokens,), -1, device=q.device)
    query_of[layout.query_rows] = torch.arange(layout.num_queries, device=q.device)
    segment_of = segments.repeat_interleave(layout.cu_seqlens.diff().long())
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(layout.num_queries, q.shape[1], v.shape[2])
    lse = torch.zeros(layout.num_queries, q.shape[1], dtype=wide, device=q.device)
    for i in range(layout.num_sequences):
        rows = layout.sequence_rows(i)
        queries = query_of[rows]
        new = queries >= 0
        query_of[rows] = -1  # later sequences share these rows
        keys, values = (x[rows].to(dtype) for x in (k, v))
        # Rows that are no queries of this sequence run as zeros and are dropped.
        one = torch.zeros(len(rows), *q.shape[1:], dtype=dtype, device=q.device)
        one = one.index_put((new,), q[queries[new]].to(dtype))
        if plain:
            one, keys, values = (x.transpose(0, 1)[None] for x in (one, keys, values))
            whole = torch.nn.functional.scaled_dot_product_attention(
                one, keys, values, is_causal=True, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)
        else:
            at = torch.arange(len(rows), device=q.device)
            segment = segment_of[rows]
            keep = at[None, :] <= at[:, None]
            keep |= (segment[:, None] == segment[None, :]) & sees_itself[segment]
            if window_size is not None:
                keep &= at[:, None] - at[None, :] < window_size
            whole, whole_lse = _eager(one, keys, values, keep, scale, softcap, sinks)
            lse = lse.index_put((queries[new],), whole_lse[new].to(wide))
        out = out.index_put((queries[new],), whole[new].to(q.dtype))
    return (out, lse.t()) if return_lse else out


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence: (L, Hq, DV) in the dtype of q, and its lse (L, Hq).

    As PyTorch's products, those here return the dtype of q, and so do their gradients.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (torch.einsum("mhd,nhd->hmn", q.to(wide), k) * scale).to(dtype).to(wide)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[:, None])
    weights = (scores - lse[..., None]).exp().to(dtype)
    return torch.einsum("hmn,nhd->mhd", weights.to(wide), v).to(dtype), lse.t()


def _sdpa_runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's attention runs: its bfloat16 kernel raises on some processors.

    Those with AMX whose ATEN_CPU_CAPABILITY is below avx512 are such.
    """
    x = torch.zeros(1, 1, 2, 16, dtype=dtype, device=device)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False
    return True
