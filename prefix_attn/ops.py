"""The operators that PyTorch sees: `torch.library` schemas and fakes, and the autograd function.

The layout travels as one small tensor on the CPU, (2, S) lengths and parents. It is data, not
structure: graphs do not recompile when lengths change, and an operator means the same in a compiled
graph, under checkpointing and in another process.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prefix_attn import cpu, triton_backend

BACKENDS: dict[str, ModuleType] = {"triton": triton_backend, "cpu": cpu}

torch.library.define(
    "prefix_attn::forward",
    "(Tensor q, Tensor k, Tensor v, Tensor segments, float scale, str backend)"
    " -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "prefix_attn::backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    " Tensor segments, float scale, str backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("prefix_attn::forward", "default")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    tokens = int(segments[0].sum())
    if tokens != q.shape[0]:
        raise ValueError(f"the layout has {tokens} tokens, q has {q.shape[0]}")
    if q.numel() == 0:
        return _fake_forward(q, k, v, segments, scale, backend)
    return BACKENDS[backend].forward(q, k, v, segments, scale)


@torch.library.register_fake("prefix_attn::forward")
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float, backend: str
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
    segments: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        return _fake_backward(dout, q, k, v, out, lse, dlse, segments, scale, backend)
    return BACKENDS[backend].backward(dout, q, k, v, out, lse, dlse, segments, scale)


@torch.library.register_fake("prefix_attn::backward")
def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    segments: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
        segments: Tensor,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.prefix_attn.backward(
            dout, q, k, v, out, lse, dlse, segments, scale, backend
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
    """Binds the two operators: `(q, k, v, segments, scale, backend) -> (out, lse)`."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.prefix_attn.forward(q, k, v, segments, scale, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, segments, scale, backend = inputs
        ctx.save_for_backward(q, k, v, *output, segments)
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, segments = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        if dout is None:
            dout = torch.zeros_like(out)
        grads = PrefixAttentionBackward.apply(
            dout, q, k, v, out, lse, dlse, segments, ctx.scale, ctx.backend
        )
        return (*grads, None, None, None)
