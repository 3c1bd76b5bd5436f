"""`prefix_attention`: checks the call, chooses a backend, runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from prefix_attn import backends
from prefix_attn.backends import reference
from prefix_attn.checks import flag, window
from prefix_attn.layout import PrefixLayout
from prefix_attn.ops import PrefixAttention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of all backends together; `max_head_dim` knows those of a device.
MIN_HEAD_DIM, MAX_HEAD_DIM = 1, 512


@overload
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = ...,
    window_size: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    prefix_causal: bool = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = ...,
    window_size: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    prefix_causal: bool = ...,
    return_lse: Literal[True],
    deterministic: bool | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_causal: bool = True,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Row r attends key c iff `c <= r < subtree_end[c]`: softmax(scale Q K^T) V over those keys.

    The result and the gradients are those of running every sequence whole; the gradient of a
    shared row is the sum over all sequences that share it.

    Args:
        q: (Tq, Hq, D) queries on the packed axis, Tq = T but for `layout.queries_for`; D from 1
            to 512, in backend "triton" to 256. Strides are free except that the last dimension is
            contiguous.
        k: (T, Hkv, D) keys; Hq is a multiple of Hkv.
        v: (T, Hkv, DV) values; DV is in the same range as D.
        layout: where the segments lie, T tokens, on the device of q.
        scale: factor of the scores, `D ** -0.5` by default; at most 2**23 in size, for float64
            2**52.
        window_size: a query sees this many keys back on its path, itself included (positions, not
            packed rows).
        softcap: scores s become `softcap * tanh(s / softcap)`; 5.4e-20 to 1.8e19, for float64
            7.5e-155 to 1.3e154.
        sinks: (Hq,), one more logit per query head in the softmax denominator, differentiable.
        prefix_causal: False lets the rows of every segment that others continue see all of it, as
            prefix language models do; a window still ends what they see behind them.
        return_lse: also return the log-sum-exp of the scores, sinks included.
        deterministic: True or None gives bitwise equal gradients in every run. False lets the
            Triton kernels sum dQ in any order where that is faster (not yet run on a GPU), unless
            `torch.use_deterministic_algorithms` or FLASH_ATTENTION_DETERMINISTIC=1 forbids it.
        backend: "triton" (CUDA, or any device under TRITON_INTERPRET=1), "cpu", "reference"
            (dense), or "auto": triton on CUDA, cpu on the CPU. None falls back to another one.

    Returns:
        out (Tq, Hq, DV) in the dtype of q; with `return_lse` also lse (Hq, Tq), natural log,
        float32 (float64 for float64 inputs), differentiable.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, dtype, device or value is wrong; it names the value.
        NotImplementedError: if the backend can't serve the call; it lists the reasons of all.

    Example:
        >>> layout = PrefixLayout.from_lengths([3], [[2, 1]])
        >>> q, k, v = torch.randn(3, 6, 2, 16).unbind()
        >>> prefix_attention(q, k, v, layout).shape
        torch.Size([6, 2, 16])
    """
    _check_tensors(q, k, v, layout, sinks)
    scale = q.shape[2] ** -0.5 if scale is None else _number("scale", scale)
    precision = torch.finfo(torch.promote_types(q.dtype, torch.float32))
    if abs(scale) * precision.eps > 1:
        raise ValueError(
            f"scale must be at most {1 / precision.eps:.3g} in size for {q.dtype}, got {scale}: "
            "rounding would decide the result, and exponentials overflow to NaN"
        )
    window_size = window(window_size)
    if window_size is not None and window_size >= layout.max_length:
        window_size = None  # it hides nothing
    if softcap is not None:
        softcap = _number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
        largest = precision.max**0.5  # so that neither scale / softcap nor its inverse overflows
        if not 1 / largest <= softcap <= largest:
            raise ValueError(
                f"softcap must be {1 / largest:.3g} to {largest:.3g} for {q.dtype}, got {softcap}: "
                "scores would overflow to NaN"
            )
    prefix_causal = flag("prefix_causal", prefix_causal)
    return_lse = flag("return_lse", return_lse)
    if deterministic is not None:
        deterministic = flag("deterministic", deterministic, "True, False or None")
    options = [
        name
        for name, used in (
            ("window_size", window_size is not None),
            ("softcap", softcap is not None),
            ("sinks", sinks is not None),
            ("prefix_causal=False", not prefix_causal),
        )
        if used
    ]
    backend = choose_backend(backend, q.device.type, q.dtype, options, (q.shape[2], v.shape[2]))
    if backend == "reference":
        out, lse = reference.forward(
            q,
            k,
            v,
            layout,
            scale=scale,
            window_size=window_size,
            softcap=softcap,
            sinks=sinks,
            prefix_causal=prefix_causal,
        )
    else:
        out, lse = PrefixAttention.apply(
            q,
            k,
            v,
            sinks,
            layout.segments,
            scale,
            softcap,
            window_size,
            prefix_causal,
            deterministic is not False,
            backend,
        )
    return (out, lse) if return_lse else out


def max_head_dim(device_type: str) -> int:
    """The largest D and DV that backend "auto" serves on devices of a type."""
    return backends.MAX_HEAD_DIMS["triton" if device_type == "cuda" else "cpu"]


def choose_backend(
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    options: Sequence[str] = (),
    head_dims: Sequence[int] = (),
) -> str:
    """Returns the backend that serves a call.

    Args:
        backend: a name, or "auto".
        device_type: such as "cuda" or "cpu".
        dtype: dtype of q, k and v.
        options: names of the options in use.
        head_dims: D and DV, or nothing to ask for heads of any size that all backends serve.

    Raises:
        ValueError: if there is no such backend.
        NotImplementedError: if it can't serve the call, with the reason of every backend.
    """
    names = [*backends.NAMES]
    call = (device_type, dtype, options, head_dims)
    if backend not in ("auto", *names):
        raise ValueError(f"backend must be one of {['auto', *names]}, got {backend!r}")
    automatic = {"cuda": ["triton"], "cpu": ["cpu"]}.get(device_type, [])
    for name in automatic if backend == "auto" else [backend]:
        if backends.why_not(name, *call) is None:
            return name
    reasons = [f"{name}: {backends.why_not(name, *call) or 'serves it'}" for name in names]
    raise NotImplementedError(
        f"backend {backend!r} can't serve this call ({device_type}, {dtype}). {'; '.join(reasons)}"
    )


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, sinks: Tensor | None
) -> None:
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"layout must be a PrefixLayout, got {type(layout).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else x.layout
            raise ValueError(f"{name} must be a dense tensor of shape (T, H, D), got a {kind} one")
        if x.dim() != 3:
            raise ValueError(f"{name} must have shape (T, H, D), got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one dtype, got q {q.dtype}, {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device, got q on {q.device}, {name} on {x.device}"
            )
        if x.stride(2) != 1 and x.shape[2] > 1:
            raise ValueError(
                f"the last dimension of {name} must be contiguous, got strides {x.stride()}; "
                f"call {name}.contiguous()"
            )
    if layout.device != q.device:
        raise ValueError(
            f"the layout is on {layout.device}, q on {q.device}; use layout.to('{q.device}')"
        )
    queries, heads, head_dim = q.shape
    if layout.num_queries != queries:
        what = "tokens" if layout.num_queries == layout.num_tokens else "queries"
        raise ValueError(f"the layout has {layout.num_queries} {what}, q has {queries}")
    tokens, kv_heads = layout.num_tokens, k.shape[1]
    if k.shape[0] != tokens or k.shape[2] != head_dim:
        raise ValueError(f"k must have shape ({tokens}, Hkv, {head_dim}), got {tuple(k.shape)}")
    if v.shape[0] != tokens or v.shape[1] != kv_heads:
        raise ValueError(f"v must have shape ({tokens}, {kv_heads}, DV), got {tuple(v.shape)}")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"Hq must be a positive multiple of Hkv, got Hq {heads}, Hkv {kv_heads}")
    for name, size in (("D", head_dim), ("DV", v.shape[2])):
        if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {size}")
    if sinks is not None and not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a tensor or None, got {type(sinks).__name__}")
    if sinks is not None and not sinks.is_floating_point():
        raise ValueError(f"sinks must hold floating-point numbers, got {sinks.dtype}")
    if sinks is not None and (sinks.shape != (heads,) or sinks.device != q.device):
        raise ValueError(
            f"sinks must have shape ({heads},) on {q.device}, got {tuple(sinks.shape)} on "
            f"{sinks.device}"
        )


def _number(name: str, value: float) -> float:
    """A finite float, or an error that names the argument and its value."""
    if isinstance(value, np.floating):
        value = float(value)
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
