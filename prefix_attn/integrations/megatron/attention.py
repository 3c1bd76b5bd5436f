"""Attention of Megatron-core over a packed row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from prefix_attn.api import prefix_attention
from prefix_attn.integrations.packing import Packing


@dataclass
class PrefixSeqParams(PackedSeqParams):
    """Says what the packed row is to those who know it, and one long sequence to everyone else.

    Layers hand `packed_seq_params` down to whatever they recompute, so it arrives where a variable
    set around the forward would be gone. The row claims to be one sequence of T rows with a rotary
    table of a row for each token, which every rotary kernel then takes in order.

    Attributes:
        packing: of the batch.
        positions: (T + padding,) int64, the row of the ordinary rotary table for each packed row.
        padding: (B, S) bool, True at padding, which routers leave out, or None without any.
    """

    packing: Packing | None = None
    positions: Tensor | None = None
    padding: Tensor | None = None


def row_params(
    packing: Packing, positions: Tensor, padding_mask: Tensor | None, rows: int
) -> PrefixSeqParams:
    """The `packed_seq_params` of a packed row.

    Args:
        packing: of the batch.
        positions: (T,) int64, of each packed row.
        padding_mask: (B, S) of the caller, True at padding, or None.
        rows: T and the rows of padding behind it.
    """
    bounds = torch.tensor([0, rows], dtype=torch.int32, device=positions.device)
    padding = packing.row_index < 0
    if padding_mask is not None:
        padding = padding | padding_mask.bool()
    return PrefixSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=rows,
        max_seqlen_kv=rows,
        packing=packing,
        positions=torch.nn.functional.pad(positions, (0, rows - len(positions))),
        padding=padding if bool(padding.any()) else None,
    )


def run_core_attention(
    attention: Attention,
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    packed_seq_params: PackedSeqParams | None = None,
    **kwargs: Any,
) -> Tensor:
    """The forward of `core_attention`: query (T, Hq, D), key and value (T, Hkv, D) -> (T, Hq D)."""
    if not isinstance(packed_seq_params, PrefixSeqParams):
        return original(
            query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
        )
    packing = packed_seq_params.packing
    assert packing is not None
    layout = packing.layout
    tokens = layout.num_tokens
    core = attention.core_attention
    sinks = getattr(core, "softmax_offset", None)
    out = prefix_attention(
        query[:tokens],
        key[:tokens],
        value[:tokens],
        layout,
        scale=_scale(attention),
        window_size=_window(attention),
        sinks=None if sinks is None else sinks.flatten(),
    ).flatten(1)
    return torch.nn.functional.pad(out, (0, 0, 0, query.shape[0] - tokens))


def _scale(attention: Attention) -> float | None:
    """What the attention gave to its core, which need not keep it: Transformer Engine's doesn't."""
    if isinstance(attention, MLASelfAttention):
        return attention.softmax_scale
    return attention.config.softmax_scale


def _window(attention: Attention) -> int | None:
    """Keys that a query sees: Megatron counts those to its left, without its own."""
    config = attention.config
    here = is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, attention.layer_number
    )
    if not here or config.window_size[0] < 0:
        return None
    return int(config.window_size[0]) + 1


def run_latent_projections(
    attention: Attention,
    original: Callable[..., Any],
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    position_ids: Tensor | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    **kwargs: Any,
) -> Any:
    """`get_query_key_value_tensors` of MLA, which makes its rotary table itself."""
    if isinstance(packed_seq_params, PrefixSeqParams):
        attention._prefix_positions = packed_seq_params.positions
    try:
        return original(hidden_states, key_value_states, position_ids, packed_seq_params, **kwargs)
    finally:
        attention._prefix_positions = None


def make_latent_table(
    attention: Attention, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The rotary table of MLA, with a row for each packed row: (T, ...), or several of them."""
    table = original(*args, **kwargs)
    positions = getattr(attention, "_prefix_positions", None)
    if positions is None:
        return table
    if isinstance(table, Tensor):
        return table[positions]
    # Other parts are numbers, such as the concentration of YaRN.
    return tuple(x[positions] if isinstance(x, Tensor) and x.dim() > 1 else x for x in table)
