"""The Triton backend: picks tiles, fetches the work lists of a layout, launches the kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from prefix_attn.backends import FORWARD_VARIABLE, tuning
from prefix_attn.backends.tables import Tables, Wanted, tables_of
from prefix_attn.content import Content, content_of
from prefix_attn.kernels.backward import BackwardLaunch
from prefix_attn.kernels.config import INTERPRETER, Config, select_config, why_no_tiles
from prefix_attn.kernels.forward import ForwardLaunch
from prefix_attn.kernels.options import Options
from prefix_attn.kernels.primitives import INTERPRETED, dot_precision

# Offsets inside a tile are 32-bit: rows further apart than this are copied together first.
MAX_STRIDE = 2**23
# With 1 in this one every attention of a program is deterministic, as transformers knows it.
DETERMINISTIC_VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, DV) and lse (Hq, Tq) of packed q, k, v under the layout of `segments`."""
    with_backward = q.requires_grad or k.requires_grad or v.requires_grad
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    sinks = None if sinks is None else sinks.contiguous()
    content = content_of(segments)
    kind = (forward, *_kind(options, (q, v, k), (sinks,)))
    with _current(q):
        kept: _Kept | None = content.kept.get(kind)
        if kept is None:
            plan = _plan(q, v, sinks, content, options)
            tables = _tables(plan, q, k, content, options, with_backward=with_backward)
            launch = plan.forward(q, k, v, sinks, tables.forward, plan.options, plan.config)
            kept = content.kept[kind] = _Kept(tables, launch)
        kept.tables.use()
        found: tuple[Tensor, Tensor] = kept.launch(q, k, v, sinks)
        return found


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
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    dout, out, lse = _addressable(dout), _addressable(out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    content = content_of(segments)
    kind = (backward, *_kind(options, (q, v, k, dout, out), (sinks, lse, dlse)))
    with _current(q):
        kept: _Kept | None = content.kept.get(kind)
        if kept is None:
            plan = _plan(q, v, sinks, content, options)
            tables = _tables(plan, q, k, content, options, with_backward=True)
            like = (dout, q, k, v, out, dlse, tables.backward)
            launch = BackwardLaunch(*like, plan.options, plan.config, fused=plan.fused)
            kept = content.kept[kind] = _Kept(tables, launch)
        kept.tables.use()
        arguments = (dout, q, k, v, out, lse, dlse, sinks)
        found: tuple[Tensor, Tensor, Tensor, Tensor | None] = kept.launch(*arguments)
        return found


class _Kept(NamedTuple):
    """What the calls of one kind share.

    Attributes:
        tables: of the layout.
        launch: the kernels of a pass, with all their arguments but the tensors.
    """

    tables: Tables
    launch: Callable[..., Any]


def _kind(
    options: Options, tensors: Sequence[Tensor], contiguous: Sequence[Tensor | None]
) -> tuple[Hashable, ...]:
    """All that decides what is launched for a call on one layout, but addresses.

    Args:
        options: of the call.
        tensors: q, v and others.
        contiguous: those whose shapes follow from theirs, as far as there are such.
    """
    q, v = tensors[:2]
    return (
        options,
        config_for(q, v),
        dot_precision(q.dtype),
        os.environ.get(FORWARD_VARIABLE, "triton"),
        _any_order(options),
        q.device,
        *[(x.dtype, x.shape, x.stride()) for x in tensors],
        *[None if x is None else x.dtype for x in contiguous],
    )


class _Plan(NamedTuple):
    """What both passes of a call launch.

    Attributes:
        forward: makes the launch of the forward pass.
        options: as kernels see them.
        config: for both passes, with the tile of keys that suits the options.
        fused: whether programs that own keys add up dQ.
    """

    forward: Callable[..., Callable[..., tuple[Tensor, Tensor]]]
    options: Options
    config: Config
    fused: bool


def _plan(q: Tensor, v: Tensor, sinks: Tensor | None, content: Content, options: Options) -> _Plan:
    options = _as_kernels_see(content, options)
    forward, config = _forward_kernel(q, v, sinks, options)
    fused = config.fused is not None and _any_order(options)
    softcap_window = options.softcap is not None and options.window_size is not None
    keys = config.keys_for(fused=fused, softcap_window=softcap_window)
    if keys is not config.keys:
        config = replace(config, keys=keys)
    return _Plan(forward, options, config, fused)


def _forward_kernel(
    q: Tensor, v: Tensor, sinks: Tensor | None, options: Options
) -> tuple[Callable[..., Callable[..., tuple[Tensor, Tensor]]], Config]:
    """What `PREFIX_ATTN_FORWARD` names, "triton" by default, and its configuration."""
    config, name = config_for(q, v), os.environ.get(FORWARD_VARIABLE, "triton")
    if name == "triton":
        return ForwardLaunch, config
    if name != "gluon":
        raise ValueError(f"{FORWARD_VARIABLE} must be triton or gluon, got {name!r}")
    try:
        from prefix_attn.kernels import gluon_forward
    except ImportError as error:
        raise NotImplementedError(
            f"{FORWARD_VARIABLE}=gluon: this Triton has no such Gluon ({error})"
        ) from error
    arch = arch_of(q.device) if q.is_cuda else 0
    reason = gluon_forward.why_not(arch, q.dtype, q.shape[2], v.shape[2], options, sinks)
    if reason is not None:
        raise NotImplementedError(f"{FORWARD_VARIABLE}=gluon can't serve this call: {reason}")
    tile = gluon_forward.select_tile(q.shape[2], v.shape[2])

    def launch(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *fixed: Any
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *tensors: gluon_forward.launch_gluon_forward(*tensors, *fixed)

    return launch, replace(config, forward=tile)


def _as_kernels_see(content: Content, options: Options) -> Options:
    """To kernels `prefix_causal` says that no segment at all is bidirectional.

    Otherwise they read from where on a key is seen.
    """
    forest = content.forest(options.window_size, options.prefix_causal)
    causal = not forest.bidirectional.any()
    return options if causal == options.prefix_causal else options._replace(prefix_causal=causal)


def _tables(
    plan: _Plan, q: Tensor, k: Tensor, content: Content, options: Options, *, with_backward: bool
) -> Tables:
    kv_heads = k.shape[1]
    wanted = Wanted(
        q.device,
        plan.config,
        options.window_size,
        options.prefix_causal,
        kv_heads,
        q.shape[1] // kv_heads,
        plan.fused,
    )
    return tables_of(content, wanted, with_backward=with_backward)


def _any_order(options: Options) -> bool:
    """Whether nobody asks for gradients with the same bits in every run."""
    return not (
        options.deterministic
        or torch.are_deterministic_algorithms_enabled()
        or os.environ.get(DETERMINISTIC_VARIABLE) == "1"
    )


def why_not(device_type: str, dtype: torch.dtype, options: Sequence[str]) -> str | None:
    """The reason why this backend can't serve a call, or None; see `api.choose_backend`."""
    if INTERPRETED:
        return _why_not_interpreted(dtype)
    if device_type != "cuda":
        return f"needs CUDA tensors, or TRITON_INTERPRET=1 on any device; got {device_type} tensors"
    if dtype == torch.float64:
        return "float64 runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return _why_not_current_gpu()


# A compiled program runs on the GPU that it was compiled for.
@torch.compiler.assume_constant_result
def _why_not_current_gpu() -> str | None:
    """The reason why there are no tiles for the current GPU; None where there is no GPU at all."""
    return _why_not_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else None


@lru_cache
def _why_not_gpu(index: int) -> str | None:
    return why_no_tiles(arch_of(torch.device("cuda", index)))


def _why_not_interpreted(dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16 and not getattr(InterpreterBuilder, "prefix_attn_fixed", False):
        return (
            "Triton's interpreter computes bfloat16 wrong: call "
            "prefix_attn.testing.fix_interpreter() first, or use float32"
        )
    return None


def _addressable(x: Tensor) -> Tensor:
    """A tensor with a contiguous last dimension and rows near enough for 32-bit tile offsets."""
    near = x.stride(-1) == 1 and 0 <= x.stride(0) <= MAX_STRIDE
    return x if near or x.numel() == 0 else x.contiguous()


def _current(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of x the current one: Triton launches on that, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def config_for(q: Tensor, v: Tensor) -> Config:
    """What is launched for q and v; sweeps and tests put functions of their own in its place."""
    if q.device.type != "cuda":
        return INTERPRETER
    tf32 = dot_precision(q.dtype) == "tf32"
    tiles = os.environ.get(tuning.VARIABLE)
    return _gpu_config(q.device, q.dtype, q.shape[2], v.shape[2], tf32, tiles)


@lru_cache
def _gpu_config(
    device: torch.device, dtype: torch.dtype, d: int, dv: int, tf32: bool, tiles: str | None
) -> Config:
    """The configuration of a GPU; `tiles` is the file of `tuning`, or None."""
    if reason := _why_not_gpu(device.index):
        raise NotImplementedError(f"backend 'triton' can't serve {device}: {reason}")
    properties, arch = torch.cuda.get_device_properties(device), arch_of(device)
    config = select_config(
        arch=arch,
        head_dim=d,
        dtype=dtype,
        processors=properties.multi_processor_count,
        head_dim_v=dv,
        tf32=tf32,
    )
    if tiles:
        config = tuning.apply(tiles, tuning.key_of(arch, dtype, d, dv), config)
    return replace(config, l2_bytes=properties.L2_cache_size)


def arch_of(device: torch.device) -> int | str:
    """The architecture of a GPU, as `select_config` takes it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return int(properties.major * 10 + properties.minor)
    # Such as gfx942:sramecc+:xnack-.
    return str(properties.gcnArchName.split(":")[0])
