"""The CPU backend: PyTorch's own CPU flash kernels, merged by log-sum-exp.

Every segment attends itself causally, and all rows below a segment attend it in one call: the
prefix is read once for all members. With the merged output and LSE the backward of each part is
exact, since P = exp(S - LSE) and delta = sum(dO * O) are those of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.forest import forest_of
from prefix_attn.kernels.options import Options

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Part:
    """`count` neighbouring segments of `length` tokens from row `start` on.

    `queries` are the places of their rows in q, `below` those of all rows that continue them.
    """

    start: int
    length: int
    count: int
    causal: bool
    queries: slice
    below: slice

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length * self.count)


def _parts(segments: Tensor, options: Options) -> list[_Part]:
    """The filled segments in packed order; neighbouring leaves of one kind go together."""
    forest = forest_of(segments.numpy().tobytes(), None, options.prefix_causal)
    before = forest.queries_before.tolist()
    parts: list[_Part] = []
    for start, end, stop, has_queries, bidirectional in zip(
        forest.starts.tolist(),
        forest.ends.tolist(),
        forest.subtree_ends.tolist(),
        forest.has_queries.tolist(),
        forest.bidirectional.tolist(),
        strict=True,
    ):
        if start == end:
            continue
        queries, below = slice(before[start], before[end]), slice(before[end], before[stop])
        last = parts[-1] if parts else None
        if (
            last
            and has_queries
            and end == stop  # a leaf, like the last part, and its neighbour in q too
            and last.rows.stop == start
            and last.below == slice(queries.start, queries.start)
            and _length(last.queries)
            and last.length == end - start
            # One with empty children only is a leaf for its rows, and yet may be bidirectional.
            and last.causal is not bidirectional
        ):
            queries = slice(last.queries.start, queries.stop)
            parts[-1] = replace(last, count=last.count + 1, queries=queries, below=below)
            continue
        parts.append(_Part(start, end - start, 1, not bidirectional, queries, below))
    return parts


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, DV) and lse (Hq, Tq) of packed q, k, v under the layout of `segments`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = options.scale
    if scale < torch.finfo(dtype).tiny:  # the kernels multiply masked scores, -inf, by the scale
        scaled, positive = q.to(dtype) * scale, replace(options, scale=1.0)
        out, lse = forward(scaled, k.to(dtype), v.to(dtype), sinks, segments, positive)
        return out.to(q.dtype), lse
    head_dim_v = v.shape[2]
    group = q.shape[1] // k.shape[1]
    width = max(q.shape[2], head_dim_v)
    qw, kw, vw = (_widen(x, dtype, width) for x in (q, k, v))
    out = torch.empty_like(qw, memory_format=torch.contiguous_format)
    lse = qw.new_empty(q.shape[1], q.shape[0])
    parts = _parts(segments, options)
    finite = bool(torch.isfinite(qw.sum() + kw.sum()))
    for part in parts:
        rows, queries = part.rows, part.queries
        if not _length(queries):
            continue
        o, o_lse = _flash(
            _batch(qw[queries], part),
            _batch(_repeat(kw[rows], group), part),
            _batch(_repeat(vw[rows], group), part),
            0.0,
            part.causal,
            scale=scale,
        )
        o_lse = o_lse if finite else _without_hidden(o, o_lse)
        out[queries] = _unbatch(o)
        lse[:, queries] = o_lse.transpose(0, 1).flatten(1)
    for part in parts:
        rows, below = part.rows, part.below
        if not _length(below):
            continue
        o, o_lse = _flash(
            _fold(qw[below], group), _heads(kw[rows]), _heads(vw[rows]), 0.0, False, scale=scale
        )
        o_lse = o_lse if finite else _without_hidden(o, o_lse)
        o = _unfold(o, group)
        o_lse = o_lse.reshape(lse.shape[0], -1)
        merged = torch.logaddexp(lse[:, below], o_lse)
        out[below] *= (lse[:, below] - merged).exp_().t()[..., None]
        out[below] += o * (o_lse - merged).exp_().t()[..., None]
        lse[:, below] = merged
    if sinks is not None:
        merged = torch.logaddexp(lse, sinks.to(dtype)[:, None])
        out *= (lse - merged).exp_().t()[..., None]
        lse = merged
    if not finite:
        _restore_nan(out, lse, qw, kw, parts)
    return out[..., :head_dim_v].to(q.dtype).contiguous(), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    sinks: Tensor | None,
    segments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dsinks; the gradient of a prefix is summed over its members and query heads."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = options.scale
    if scale < torch.finfo(dtype).tiny:
        dout, qw, kw, vw, out = (x.to(dtype) for x in (dout, q, k, v, out))
        positive = replace(options, scale=1.0)
        dq, dk, dv, dsinks = backward(
            dout, qw * scale, kw, vw, out, lse, dlse, sinks, segments, positive
        )
        return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
    group = q.shape[1] // k.shape[1]
    width = max(q.shape[2], v.shape[2])
    # dS = P (dP - delta + dLSE): one more column, with dO = 1 and O = -dLSE, says so to a kernel
    # that knows delta only as sum(dO * O).
    padded = width if dlse is None else width + 1
    qw, kw, vw, dow, ow = (_widen(x, dtype, padded) for x in (q, k, v, dout, out))
    if dlse is not None:
        dow[..., -1] = 1.0
        ow[..., -1] = -dlse.t().to(dtype)
    dq = torch.empty_like(qw, memory_format=torch.contiguous_format)
    # Keys that no query of their own segment sees start from zero.
    dk = torch.zeros_like(kw, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(vw, memory_format=torch.contiguous_format)
    parts = _parts(segments, options)
    for part in parts:
        rows, queries = part.rows, part.queries
        if not _length(queries):
            continue
        grads = _flash_backward(
            _batch(dow[queries], part),
            _batch(qw[queries], part),
            _batch(_repeat(kw[rows], group), part),
            _batch(_repeat(vw[rows], group), part),
            _batch(ow[queries], part),
            lse[:, queries].unflatten(1, (part.count, part.length)).transpose(0, 1),
            0.0,
            part.causal,
            scale=scale,
        )
        dq[queries] = _unbatch(grads[0])
        dk[rows] = _sum_repeats(_unbatch(grads[1]), group)
        dv[rows] = _sum_repeats(_unbatch(grads[2]), group)
    for part in parts:
        rows, below = part.rows, part.below
        if not _length(below):
            continue
        grads = _flash_backward(
            _fold(dow[below], group),
            _fold(qw[below], group),
            _heads(kw[rows]),
            _heads(vw[rows]),
            _fold(ow[below], group),
            lse[:, below].reshape(1, k.shape[1], -1),
            0.0,
            False,
            scale=scale,
        )
        dq[below] += _unfold(grads[0], group)
        dk[rows] += grads[1][0].transpose(0, 1)
        dv[rows] += grads[2][0].transpose(0, 1)
    dsinks = None
    if sinks is not None:
        delta = (dow * ow).sum(-1).t()
        dsinks = -(torch.exp(sinks.to(dtype)[:, None] - lse) * delta).sum(1).to(sinks.dtype)
    return (
        dq[..., : q.shape[2]].to(q.dtype).contiguous(),
        dk[..., : k.shape[2]].to(k.dtype).contiguous(),
        dv[..., : v.shape[2]].to(v.dtype).contiguous(),
        dsinks,
    )


def why_not(device_type: str, dtype: torch.dtype, options: Sequence[str]) -> str | None:
    """The reason why this backend can't serve a call, or None; see `api.choose_backend`."""
    if device_type != "cpu":
        return f"needs CPU tensors, got {device_type} tensors"
    lacking = [name for name in options if name in ("window_size", "softcap")]
    return f"does not support {', '.join(lacking)}" if lacking else None


def _without_hidden(out: Tensor, lse: Tensor) -> Tensor:
    """The LSE with -inf for rows whose scores are all -inf, where the kernels return 0 and 0."""
    return lse.masked_fill((lse == 0) & (out == 0).all(-1), float("-inf"))


def _restore_nan(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, parts: list[_Part]) -> None:
    """Writes NaN to the rows whose scores against a segment's first key are NaN.

    The kernels take a row without any comparable score for a masked one, and return 0 for it. All
    rows of a segment and below attend its first key.
    """
    group = q.shape[1] // k.shape[1]
    for part in parts:
        for i in range(part.count):
            start = part.start + i * part.length
            own = part.queries.start + i * part.length
            stop = own + part.length if part.count > 1 else part.below.stop
            rows = slice(own, stop)
            bad = (q[rows] * _repeat(k[start : start + 1], group)).sum(-1).isnan()
            out[rows].masked_fill_(bad[..., None], float("nan"))
            lse[:, rows].masked_fill_(bad.t(), float("nan"))


def _widen(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """x in `dtype` with zero columns up to `width`; contiguous where the kernels want it."""
    x = x.to(dtype)
    if x.shape[2] < width:
        return F.pad(x, (0, width - x.shape[2]))
    return x if x.stride(-1) == 1 and x.stride(0) > 0 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    """(n, H, D) -> (1, H, n, D)."""
    return x.transpose(0, 1)[None]


def _batch(x: Tensor, part: _Part) -> Tensor:
    """(count * length, H, D) -> (count, H, length, D)."""
    return x.unflatten(0, (part.count, part.length)).transpose(1, 2)


def _unbatch(x: Tensor) -> Tensor:
    """(count, H, length, D) -> (count * length, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _fold(x: Tensor, group: int) -> Tensor:
    """(n, Hq, D) -> (1, Hkv, group * n, D): query heads become rows, which is fine unmasked."""
    return x.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)[None]


def _unfold(x: Tensor, group: int) -> Tensor:
    """(1, Hkv, group * n, D) -> (n, Hq, D)."""
    return x[0].unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2)


def _repeat(x: Tensor, group: int) -> Tensor:
    """(n, Hkv, D) -> (n, Hq, D)."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _sum_repeats(x: Tensor, group: int) -> Tensor:
    """(n, Hq, D) -> (n, Hkv, D)."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2)
