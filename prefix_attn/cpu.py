"""The CPU backend: PyTorch's own CPU flash kernels, merged by log-sum-exp.

Every segment attends itself causally, and all rows below a segment attend it in one call: the
prefix is read once for all members. With the merged output and LSE the backward of each part is
exact, since P = exp(S - LSE) and delta = sum(dO * O) are those of the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.schedule import forest_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Part:
    """`count` segments of `length` tokens end to end from `start`, and the end of their subtree."""

    start: int
    length: int
    count: int
    subtree_end: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.count

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    @property
    def rows_below(self) -> slice:
        return slice(self.end, self.subtree_end)


def _parts(segments: Tensor) -> Iterator[_Part]:
    """The filled segments in packed order; neighbouring leaves of one length go together."""
    forest = forest_of(segments.numpy().tobytes())
    lengths = (forest.ends - forest.starts).tolist()
    starts, ends = forest.starts.tolist(), forest.subtree_ends.tolist()
    pending: _Part | None = None
    for start, length, end in zip(starts, lengths, ends, strict=True):
        if not length:
            continue
        leaf = end == start + length
        if pending and leaf and pending.length == length:
            pending = _Part(pending.start, length, pending.count + 1, end)
            continue
        if pending:
            yield pending
        pending = _Part(start, length, 1, end) if leaf else None
        if not leaf:
            yield _Part(start, length, 1, end)
    if pending:
        yield pending


def forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, DV) and lse (Hq, T) of packed q, k, v under the layout of `segments`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if scale <= 0:  # the kernels multiply masked scores, -inf, by the scale
        out, lse = forward(q.to(dtype) * scale, k.to(dtype), v.to(dtype), segments, 1.0)
        return out.to(q.dtype), lse
    head_dim_v = v.shape[2]
    group = q.shape[1] // k.shape[1]
    width = max(q.shape[2], head_dim_v)
    qw, kw, vw = (_widen(x, dtype, width) for x in (q, k, v))
    out = torch.empty_like(qw, memory_format=torch.contiguous_format)
    lse = qw.new_empty(q.shape[1], q.shape[0])
    parts = list(_parts(segments))
    finite = bool(torch.isfinite(qw.sum() + kw.sum()))
    for part in parts:
        rows = part.rows
        o, o_lse = _flash(
            _batch(qw[rows], part),
            _batch(_repeat(kw[rows], group), part),
            _batch(_repeat(vw[rows], group), part),
            0.0,
            True,
            scale=scale,
        )
        o_lse = o_lse if finite else _without_hidden(o, o_lse)
        out[rows] = _unbatch(o)
        lse[:, rows] = o_lse.transpose(0, 1).flatten(1)
    for part in parts:
        if part.end == part.subtree_end:
            continue
        rows, below = part.rows, part.rows_below
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
    segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; the gradient of a prefix is summed over its members and query heads."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if scale <= 0:
        dout, qw, kw, vw, out = (x.to(dtype) for x in (dout, q, k, v, out))
        dq, dk, dv = backward(dout, qw * scale, kw, vw, out, lse, dlse, segments, 1.0)
        return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
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
    dk = torch.empty_like(kw, memory_format=torch.contiguous_format)
    dv = torch.empty_like(vw, memory_format=torch.contiguous_format)
    parts = list(_parts(segments))
    for part in parts:
        rows = part.rows
        grads = _flash_backward(
            _batch(dow[rows], part),
            _batch(qw[rows], part),
            _batch(_repeat(kw[rows], group), part),
            _batch(_repeat(vw[rows], group), part),
            _batch(ow[rows], part),
            lse[:, rows].unflatten(1, (part.count, part.length)).transpose(0, 1),
            0.0,
            True,
            scale=scale,
        )
        dq[rows] = _unbatch(grads[0])
        dk[rows] = _sum_repeats(_unbatch(grads[1]), group)
        dv[rows] = _sum_repeats(_unbatch(grads[2]), group)
    for part in parts:
        if part.end == part.subtree_end:
            continue
        rows, below = part.rows, part.rows_below
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
    return (
        dq[..., : q.shape[2]].to(q.dtype).contiguous(),
        dk[..., : k.shape[2]].to(k.dtype).contiguous(),
        dv[..., : v.shape[2]].to(v.dtype).contiguous(),
    )


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why this backend can't serve tensors of a device and dtype, or None."""
    return None if device_type == "cpu" else f"needs CPU tensors, got {device_type} tensors"


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
        for start in range(part.start, part.end, part.length):
            end = start + part.length if part.count > 1 else part.subtree_end
            rows = slice(start, end)
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
