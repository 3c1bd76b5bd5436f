"""The operators that PyTorch sees: `torch.library` schemas and fakes, and the autograd function.

The layout travels as one small tensor on the CPU, `PrefixLayout.segments`. It is data, not
structure: graphs do not recompile when lengths change, and an operator means the same in a compiled
graph, under checkpointing and in another process.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from prefix_attn import cpu, triton_backend
from prefix_attn.kernels.options import Options
from prefix_attn.schedule import forest_of

BACKENDS: dict[str, ModuleType] = {"triton": triton_backend, "cpu": cpu}

torch.library.define(
    "prefix_attn::forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor segments, float scale, float? softcap,"
    " int? window_size, bool prefix_causal, str backend) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "prefix_attn::backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    " Tensor? sinks, Tensor segments, float scale, float? softcap, int? window_size,"
    " bool prefix_causal, str backend, bool deterministic)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("prefix_attn::forward", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window_size: int | None,
    prefix_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lengths, _, has_queries = segments
    for name, x, rows in (("q", q, (lengths * has_queries).sum()), ("k", k, lengths.sum())):
        if x.shape[0] != int(rows):
            raise ValueError(f"the layout has {int(rows)} rows of {name}, got {tuple(x.shape)}")
    options = Options(scale, softcap, window_size, prefix_causal)
    if q.numel() == 0:
        return _fake_forward(
            q, k, v, sinks, segments, scale, softcap, window_size, prefix_causal, backend
        )
    return BACKENDS[backend].forward(q, k, v, sinks, segments, options)


@torch.library.register_fake("prefix_attn::forward")
def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window_size: int | None,
    prefix_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=dtype),
    )


@torch.library.impl("prefix_attn::backward", "default")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    sinks: Tensor | None,
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window_size: int | None,
    prefix_causal: bool,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dsinks
    options = Options(scale, softcap, window_size, prefix_causal, deterministic)
    dq, dk, dv, dsinks = BACKENDS[backend].backward(
        dout, q, k, v, out, lse, dlse, sinks, segments, options
    )
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("prefix_attn::backward")
def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    sinks: Tensor | None,
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window_size: int | None,
    prefix_causal: bool,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@register_flop_formula(torch.ops.prefix_attn.forward, get_raw=True)
def _forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window_size: int | None,
    prefix_causal: bool,
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of S = Q K^T and O = P V, over the pairs that the attention rule allows."""
    pairs = _pairs(q, k, segments, window_size, prefix_causal)
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


@register_flop_formula(torch.ops.prefix_attn.backward, get_raw=True)
def _backward_flops(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    sinks: Tensor | None,
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window_size: int | None,
    prefix_causal: bool,
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of S, dQ and dK, each D wide, and of dP and dV, each DV wide."""
    pairs = _pairs(q, k, segments, window_size, prefix_causal)
    return 2 * pairs * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


def _pairs(
    q: Tensor, k: Tensor, segments: Tensor, window_size: int | None, prefix_causal: bool
) -> int:
    """Allowed (query, key) pairs; all pairs where a fake tensor hides the layout."""
    if hasattr(segments, "to_local"):  # a DTensor, as the heads whose global shape is counted
        segments = segments.to_local()
    if isinstance(segments, FakeTensor) or segments.is_meta:
        return q.shape[0] * k.shape[0]
    return forest_of(segments.numpy().tobytes(), window_size, prefix_causal).num_pairs


class PrefixAttentionBackward(torch.autograd.Function):
    """The backward operator, whose own derivative is an error.

    `once_differentiable` alone would drop the second derivative in silence where the gradient of
    out is a constant, as that of `out.sum()` is.
    """

    @staticmethod
    def forward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        sinks: Tensor | None,
        segments: Tensor,
        scale: float,
        softcap: float | None,
        window_size: int | None,
        prefix_causal: bool,
        backend: str,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        options = (scale, softcap, window_size, prefix_causal, backend, deterministic)
        return torch.ops.prefix_attn.backward(
            dout, q, k, v, out, lse, dlse, sinks, segments, *options
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            "prefix_attention can be differentiated once; backend='reference' has more derivatives"
        )


class PrefixAttention(torch.autograd.Function):
    """Binds the two operators; arguments and results are theirs."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        segments: Tensor,
        scale: float,
        softcap: float | None,
        window_size: int | None,
        prefix_causal: bool,
        backend: str,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        options = (scale, softcap, window_size, prefix_causal, backend)
        return torch.ops.prefix_attn.forward(q, k, v, sinks, segments, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, segments, *options = inputs
        ctx.save_for_backward(q, k, v, sinks, *output, segments)
        ctx.options = options
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, segments = ctx.saved_tensors
        rest = (None,) * (1 + len(ctx.options))
        if dout is None and dlse is None:
            return (None, None, None, None, *rest)
        if dout is None:
            dout = torch.zeros_like(out)
        *grads, dsinks = PrefixAttentionBackward.apply(
            dout, q, k, v, out, lse, dlse, sinks, segments, *ctx.options
        )
        return (*grads, None if sinks is None else dsinks, *rest)
