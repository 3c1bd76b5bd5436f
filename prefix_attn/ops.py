"""The operators that PyTorch sees: `torch.library` schemas and fakes, and the autograd function.

The layout travels as one small tensor on the CPU, `PrefixLayout.segments`. It is data, not
structure: graphs do not recompile when lengths change, and an operator means the same in a compiled
graph, under checkpointing and in another process.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from prefix_attn import backends
from prefix_attn.content import content_of
from prefix_attn.kernels.options import Options

# The `*call` behind the tensors of both operators: the fields of `Options`, then the backend.
CALL = (
    "float scale, float? softcap, int? window_size, bool prefix_causal, bool deterministic,"
    " str backend"
)
# Both read `segments` on the host: a CUDA graph that replays them would keep the layout of its
# capture, so that compiled programs leave them out of theirs.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
torch.library.define(
    "prefix_attn::forward",
    f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor segments, {CALL})"
    " -> (Tensor out, Tensor lse)",
    tags=TAGS,
)
torch.library.define(
    "prefix_attn::backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    f" Tensor? sinks, Tensor segments, {CALL})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=TAGS,
)


@torch.library.impl("prefix_attn::forward", "default")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor, *call: Any
) -> tuple[Tensor, Tensor]:
    *options, backend = call
    content = content_of(segments)
    for name, x, rows in (("q", q, content.num_queries), ("k", k, content.num_tokens)):
        if x.shape[0] != rows:
            raise ValueError(f"the layout has {rows} rows of {name}, got {tuple(x.shape)}")
    if q.numel() == 0:
        return _fake_forward(q, k, v)
    result: tuple[Tensor, Tensor] = backends.load(backend).forward(
        q, k, v, sinks, segments, Options(*options)
    )
    return result


@torch.library.register_fake("prefix_attn::forward")
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=dtype),
    )


@torch.library.impl("prefix_attn::backward", "default")
def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, (*options, backend) = arguments[:9], arguments[9:]
    _, q, k, v, _, _, _, sinks, _ = tensors
    if q.numel() == 0:
        dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dsinks
    dq, dk, dv, dsinks = backends.load(backend).backward(*tensors, Options(*options))
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("prefix_attn::backward")
def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, q, k, v, _, _, _, sinks, *_ = arguments
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@register_flop_formula(torch.ops.prefix_attn.forward, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, _: Any, segments: Tensor, *call: Any, out_val: Any
) -> int:
    """FLOPs of S = Q K^T and O = P V, over the pairs that the attention rule allows."""
    return 2 * _pairs(q, k, segments, *call) * q.shape[1] * (q.shape[2] + v.shape[2])


@register_flop_formula(torch.ops.prefix_attn.backward, get_raw=True)
def _backward_flops(*arguments: Any, out_val: Any) -> int:
    """FLOPs of S, dQ and dK, each D wide, and of dP and dV, each DV wide."""
    _, q, k, v, _, _, _, _, segments, *call = arguments
    return 2 * _pairs(q, k, segments, *call) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


def _pairs(q: Tensor, k: Tensor, segments: Tensor, *call: Any) -> int:
    """Allowed (query, key) pairs; all pairs where a fake tensor hides the layout."""
    if hasattr(segments, "to_local"):  # a DTensor, as the heads whose global shape is counted
        segments = segments.to_local()
    if isinstance(segments, FakeTensor) or segments.is_meta:
        return q.shape[0] * k.shape[0]
    options = Options(*call[:-1])
    return content_of(segments).forest(options.window_size, options.prefix_causal).num_pairs


# Dynamo wants the arguments of autograd functions by name.
class PrefixAttentionBackward(torch.autograd.Function):
    """The backward operator, whose own derivative is an error.

    `once_differentiable` alone would drop the second derivative in silence where the gradient of
    out is a constant, as that of `out.sum()` is.
    """

    @staticmethod
    def forward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dlse: Tensor | None, sinks: Tensor | None, segments: Tensor,
        scale: float, softcap: float | None, window_size: int | None, prefix_causal: bool,
        deterministic: bool, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        call = (scale, softcap, window_size, prefix_causal, deterministic, backend)
        return torch.ops.prefix_attn.backward(dout, q, k, v, out, lse, dlse, sinks, segments, *call)

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
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor,
        scale: float, softcap: float | None, window_size: int | None, prefix_causal: bool,
        deterministic: bool, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        call = (scale, softcap, window_size, prefix_causal, deterministic, backend)
        return torch.ops.prefix_attn.forward(q, k, v, sinks, segments, *call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, segments, *ctx.call = inputs
        ctx.save_for_backward(q, k, v, sinks, *output, segments)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, segments = ctx.saved_tensors
        rest = (None,) * (1 + len(ctx.call))
        if dout is None and dlse is None:
            return (None, None, None, None, *rest)
        if dout is None:
            dout = torch.zeros_like(out)
        # Only under create_graph=True, which turns gradients on here, does it matter what has no
        # derivative of its own.
        differentiate = torch.is_grad_enabled()
        backward = (
            PrefixAttentionBackward.apply if differentiate else torch.ops.prefix_attn.backward
        )
        *grads, dsinks = backward(dout, q, k, v, out, lse, dlse, sinks, segments, *ctx.call)
        return (*grads, None if sinks is None else dsinks, *rest)


class _Signature(inspect.Signature):
    """That of a function whose calls name no argument and leave none out.

    PyTorch binds the arguments of autograd functions by name in every call, since they may have
    defaults. It would also read the signature anew each time.
    """

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        if kwargs or len(args) != len(self.parameters):
            return super().bind(*args, **kwargs)
        return _AllArguments(self, OrderedDict(zip(self.parameters, args, strict=True)))


class _AllArguments(inspect.BoundArguments):
    """The arguments of such a call."""

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(self.arguments.values())

    @property
    def kwargs(self) -> dict[str, Any]:
        return {}

    def apply_defaults(self) -> None:
        pass


for function in (PrefixAttention.forward, PrefixAttentionBackward.forward):
    vars(function)["__signature__"] = _Signature.from_callable(function)
