"""The functions of recurrent mixers, along the paths of a packed row.

A mixer of transformers is projections and norms, which see each token alone, around a few functions
without parameters, which read a row in order. Those functions are global names of its modeling file
and are looked up in every call. `watch` puts a dispatcher in front of each: while a mixer runs with
a layout in the same thread, the function follows the tree, else the call goes through unchanged.
Whatever stands behind the name does the work, transformers' own code or a kernel.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.integrations.transformers.attention import PackedMask
from prefix_attn.integrations.transformers.mixers.kernels import CUT, check_kernel, takes_bounds
from prefix_attn.layout import PrefixLayout
from prefix_attn.recurrence import convolve, fork_states, whole_sequences

# (original, layout, arguments of the call) -> what the original returns
Along = Callable[..., Any]


class Running(threading.local):
    """The mixer that runs with a layout in this thread.

    Attributes:
        layout: of its packed row, None while there is no such mixer.
        called: the functions that it called so far.
    """

    layout: PrefixLayout | None = None
    called: frozenset[str] = frozenset()


running = Running()


def watch(module: ModuleType, name: str) -> None:
    """Puts a dispatcher in front of a function of a modeling file, once and for good."""
    original = getattr(module, name)
    if hasattr(original, "prefix_attn_original"):
        return
    dispatch = _keeping_mask(original) if name == MASK else _dispatcher(original, name)
    dispatch.prefix_attn_original = original  # type: ignore[attr-defined]
    setattr(module, name, dispatch)


def _dispatcher(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    along = functools.partial(FUNCTIONS[name], original)

    @functools.wraps(original, updated=())
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        layout = running.layout
        if layout is None or not _fits(args, layout):
            return original(*args, **kwargs)
        running.called = running.called | {name}
        return along(layout, *args, **kwargs)

    return dispatch


def _fits(args: tuple[Any, ...], layout: PrefixLayout) -> bool:
    """Whether a call is of the packed row, and not of a model that runs within the mixer."""
    shape = args[0].shape if args and isinstance(args[0], Tensor) else ()
    return len(shape) > 1 and shape[0] == 1 and layout.num_tokens in shape[1:]


def _keeping_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hands the mask of a packed row on to the mixers, some of which get no other keyword."""

    @functools.wraps(original, updated=())
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        return mask if isinstance(mask, PackedMask) else original(*args, **kwargs)

    return dispatch


def convolution(
    original: Callable[..., Tensor],
    layout: PrefixLayout,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> Tensor:
    """`causal_conv1d_fn` along paths: x (1, C, T), weight (C, width) -> (1, C, T)."""

    def follow(rows: Tensor) -> Tensor:
        return original(rows.t()[None], weight, bias, activation=activation)[0].t()

    return convolve(follow, x[0].t(), layout, weight.shape[-1] - 1).t()[None]


def delta_rule(
    original: Callable[..., Any],
    layout: PrefixLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule and KDA along paths: (1, T, ...) each -> (1, T, H, DV).

    With g = beta = k = v = 0 a token leaves the state alone: so segments may be padded.
    """
    _refuse_states(initial_state, output_final_state)
    bounds = takes_bounds(original)
    check_kernel(original, _delta_step, (query, key, value, g, beta), options, _draw_delta)

    def step(
        parts: Sequence[Tensor], states: Tensor | None, extents: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not bounds:
            return _delta_step(original, parts, states, options)
        out, final = _delta_step(
            original, [x[None] for x in parts], states, {**options, "cu_seqlens": extents}
        )
        return out[0], final

    inputs = [x[0] for x in (query, key, value, g, beta)]
    return fork_states(step, inputs, layout, padded=not bounds)[None], None


def _delta_step(
    original: Callable[..., Any],
    parts: Sequence[Tensor],
    states: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = parts
    if states is not None:
        states = states.to(torch.promote_types(states.dtype, torch.float32))
    out, final = original(
        q, k, v, g=g, beta=beta, initial_state=states, output_final_state=True, **options
    )
    return out, final


def _draw_delta(i: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if i < 3:
        return torch.randn(shape, generator=generator)
    drawn = torch.rand(shape, generator=generator)
    return -drawn / CUT if i == 3 else drawn  # little decay: the state is felt to the end


def mamba2_scan(
    original: Callable[..., Any],
    layout: PrefixLayout,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    z: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Mamba 2's scan along paths: x (1, T, H, P), dt (1, T, H), B and C (1, T, groups, N).

    With dt = 0 a token leaves the state alone, so segments may be padded: bias, softplus and limit
    come before.
    """
    _refuse_states(initial_states, return_final_states)
    if z is not None:
        raise NotImplementedError("a gate z within Mamba 2's scan is not supported")
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    options = {**options, "A": A, "D": D}
    check_kernel(original, _mamba2_step, (x, dt, B, C), options, _draw_mamba2)

    def step(
        parts: Sequence[Tensor], states: Tensor | None, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _mamba2_step(original, parts, states, options)

    return fork_states(step, [x[0], dt[0], B[0], C[0]], layout)[None]


def _mamba2_step(
    original: Callable[..., Any],
    parts: Sequence[Tensor],
    states: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    x, dt, B, C = parts
    options = dict(options)
    A = options.pop("A")
    out, final = original(
        x, dt, A, B, C, initial_states=states, return_final_states=True, **options
    )
    return out, final


def _draw_mamba2(i: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if i == 1:
        return torch.rand(shape, generator=generator) / CUT
    return torch.randn(shape, generator=generator)


def mamba1_scan(
    original: Callable[..., Any],
    layout: PrefixLayout,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    return_last_state: bool = False,
    **options: Any,
) -> Tensor:
    """Mamba 1's scan: x, dt and z (1, channels, T), B and C (1, N, T) -> (1, channels, T).

    It starts from zero in every implementation, so it runs whole sequences.
    """
    _refuse_states(None, return_last_state)
    gate = [] if z is None else [z]

    def scan(parts: Sequence[Tensor]) -> Tensor:
        x, dt, B, C, *gate = (part.transpose(1, 2) for part in parts)
        z = gate[0] if gate else None
        return original(x, dt, A, B, C, D=D, z=z, **options).transpose(1, 2)

    inputs = [part[0].t() for part in (x, dt, B, C, *gate)]
    return whole_sequences(scan, inputs, layout).t()[None]


def _refuse_states(initial: Tensor | None, final: bool) -> None:
    if initial is not None or final:
        raise RuntimeError("a packed row starts without a cache and leaves none")


def no_shortcut(original: Callable[..., Any], layout: PrefixLayout, *args: Any, **kw: Any) -> None:
    """A fused kernel for a whole mixer is not available: its mixer goes on without it."""


MASK = "create_recurrent_attention_mask"
CONVOLUTION = "causal_conv1d_fn"
SCANS: dict[str, Along] = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
    "mamba_selective_scan": mamba1_scan,
}
SHORTCUTS: dict[str, Along] = {
    "mamba2_split_conv1d_scan_combined": no_shortcut,
    "mamba_inner_fn": no_shortcut,
}
FUNCTIONS: dict[str, Along] = {CONVOLUTION: convolution, **SCANS, **SHORTCUTS}
