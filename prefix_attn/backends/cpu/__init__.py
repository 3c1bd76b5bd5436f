"""The CPU backend: PyTorch's own CPU flash kernels, merged by log-sum-exp.

`plan` cuts a layout into calls, `attend` runs them. No flash kernel knows a softcap: `formula`
writes it out, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.backends.cpu import attend, formula
from prefix_attn.backends.cpu.plan import Call, plan
from prefix_attn.content import content_of
from prefix_attn.kernels.options import Options


def why_not(device_type: str, dtype: torch.dtype, options: Sequence[str]) -> str | None:
    """The reason why this backend can't serve a call, or None; see `api.choose_backend`."""
    return None if device_type == "cpu" else f"needs CPU tensors, got {device_type} tensors"


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, DV) and lse (Hq, Tq) of packed q, k, v under the layout of `segments`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor, scale = _factors(options.scale, dtype)
    width = max(q.shape[2], v.shape[2])
    qw, kw, vw = (_widen(x, dtype, width) for x in (q, k, v))
    qw = qw if factor == 1 else qw * factor
    of_queries, of_keys, kernel = [qw], [kw, vw], _kernel(options)
    calls = _plan(segments, options, dense=options.softcap is not None)
    is_masked = _is_masked(calls)
    out, lse = attend.forward(of_queries, of_keys, calls, kernel, scale)
    # A query reaches its own row alone, and what it should not meet shows in its log-sum-exp.
    # Without masks a value reaches those who see it alone, and so does a key; but of NaN keys
    # PyTorch's kernels leave out those that fill what a row sees of a tile.
    wild: list[_Group] = []
    if not _are_small([*of_keys, lse] if is_masked else [kw], width, scale):
        wild = _wild_groups(segments, scale, of_queries, of_keys)
        if is_masked:
            silenced = _silenced(wild, of_queries, of_keys)
            out, lse = attend.forward(*silenced, calls, kernel, scale)
    for group in wild:
        calls = _plan(group.segments, options, dense=True, crossing=False)
        own, keys = [qw[group.queries]], [kw[group.keys], vw[group.keys]]
        found = attend.forward(own, keys, calls, formula.kernel(options.softcap, wild=True), scale)
        out[group.queries], lse[group.queries] = found
    if sinks is not None:
        merged = torch.logaddexp(lse, sinks.to(dtype))
        out.mul_((lse - merged).exp_()[..., None])
        lse = merged
    return out[..., : v.shape[2]].to(q.dtype).contiguous(), lse.t().contiguous()


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
    factor, scale = _factors(options.scale, dtype)
    # dS = P (dP - delta + dLSE): one more column, with dO = 1 and O = -dLSE, says so to a kernel
    # that knows delta only as sum(dO * O).
    width = max(q.shape[2], v.shape[2]) + (dlse is not None)
    qw, kw, vw, dow, ow = (_widen(x, dtype, width) for x in (q, k, v, dout, out))
    qw = qw if factor == 1 else qw * factor
    if dlse is not None:
        dow[..., -1] = 1.0
        ow[..., -1] = -dlse.t().to(dtype)
    of_queries, of_keys, kernel = [dow, qw, ow, lse.t()], [kw, vw], _kernel(options)
    calls = _plan(segments, options, dense=options.softcap is not None)
    dq, dk, dv = attend.backward(of_queries, of_keys, calls, kernel, scale)
    wild: list[_Group] = []
    # What a query, a value or a gradient hands to keys that it should not reach shows in theirs.
    if _is_masked(calls) and not _are_small([kw, dk, dv], width, scale):
        # Of the output the column of dLSE alone: the others are means of values.
        given = [dow, qw, lse.t(), *([] if dlse is None else [ow[..., -1:]])]
        wild = _wild_groups(segments, scale, given, of_keys)
        silenced = _silenced(wild, of_queries, of_keys)
        dq, dk, dv = attend.backward(*silenced, calls, kernel, scale)
    for group in wild:
        calls = _plan(group.segments, options, dense=True, crossing=False)
        own = [x[group.queries] for x in (dow, qw, ow, lse.t())]
        keys = [x[group.keys] for x in (kw, vw)]
        found = attend.backward(own, keys, calls, formula.kernel(options.softcap, wild=True), scale)
        dq[group.queries], dk[group.keys], dv[group.keys] = found
    dsinks = None
    if sinks is not None:
        delta = (dow * ow).sum(-1)
        dsinks = -(torch.exp(sinks.to(dtype) - lse.t()) * delta).sum(0).to(sinks.dtype)
    dq = dq if factor == 1 else dq * factor
    return (
        dq[..., : q.shape[2]].to(q.dtype).contiguous(),
        dk[..., : k.shape[2]].to(k.dtype).contiguous(),
        dv[..., : v.shape[2]].to(v.dtype).contiguous(),
        dsinks,
    )


def _plan(segments: Tensor, options: Options, dense: bool, crossing: bool = True) -> list[Call]:
    rule = options.window_size, options.prefix_causal
    return plan(content_of(segments), *rule, dense, crossing)


def _is_masked(calls: Sequence[Call]) -> bool:
    """Whether rows that do not see each other are in one block."""
    return any(call.mask is not None for call in calls)


def _kernel(options: Options) -> attend.Kernel:
    return attend.FLASH if options.softcap is None else formula.kernel(options.softcap)


def _factors(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """What q and what the scores are multiplied by, together `scale`.

    The kernels multiply masked scores, -inf, by theirs, so that has to be positive.
    """
    return (scale, 1.0) if scale < torch.finfo(dtype).tiny else (1.0, scale)


def _widen(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """x in `dtype` with zero columns up to `width`; contiguous where the kernels want it."""
    x = x.to(dtype)
    if x.shape[2] < width:
        return F.pad(x, (0, width - x.shape[2]))
    return x if x.stride(-1) == 1 and x.stride(0) > 0 else x.contiguous()


# ---- values that are not finite -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Group:
    """A root and all below it: its places in q, its rows of k and v, its part of the layout."""

    queries: slice
    keys: slice
    segments: Tensor


def _wild_groups(
    segments: Tensor, scale: float, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> list[_Group]:
    """The groups with values that are not finite, or whose products might not be.

    A block holds rows that do not see each other, and hides a score by adding -inf: NaN and inf
    would leave their group, or reach other members. Such groups run by themselves.
    """
    width = of_keys[0].shape[-1]
    return [
        group
        for group in _groups(segments)
        if not all(
            _are_small([x[rows] for x in part], width, scale)
            for rows, part in ((group.queries, of_queries), (group.keys, of_keys))
        )
    ]


def _are_small(tensors: Sequence[Tensor], width: int, scale: float) -> bool:
    """Whether products of any two of these, over `width` columns and times `scale`, are finite."""
    limit = (torch.finfo(tensors[0].dtype).max / (width * max(1.0, scale))) ** 0.5
    # The norm is at least the largest size of an element, and not finite where one is not.
    return all(torch.linalg.vector_norm(x).item() < limit for x in tensors)


def _silenced(
    groups: Sequence[_Group], of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Copies with zeros in the rows of some groups."""
    queries, keys = [x.clone() for x in of_queries], [x.clone() for x in of_keys]
    for group in groups:
        for x in queries:
            x[group.queries] = 0
        for x in keys:
            x[group.keys] = 0
    return queries, keys


def _groups(segments: Tensor) -> Iterator[_Group]:
    forest = content_of(segments).forest(None, True)
    roots = [*(forest.parents < 0).nonzero()[0].tolist(), forest.num_segments]
    for first, last in pairwise(roots):
        rows = slice(int(forest.starts[first]), int(forest.subtree_ends[first]))
        places = forest.queries_before[[rows.start, rows.stop]].tolist()
        part = segments[:, first:last].clone()
        part[1] = (part[1] - first).clamp(min=-1)
        if places[0] < places[1]:
            yield _Group(slice(*places), rows, part.contiguous())
