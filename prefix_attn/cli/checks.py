"""Compares a backend with float64 on a small layout."""

from __future__ import annotations

from functools import partial

import torch

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing import Comparison, Inputs, attention_results, compare_attention


def check_gradients(
    layout: PrefixLayout,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> list[Comparison]:
    """Holds the output and the gradients of random inputs against the error budget."""
    inputs = Inputs.random(layout, (heads, kv_heads), (head_dim, head_dim), dtype)
    call = partial(prefix_attention, layout=layout, backend=backend)
    return compare_attention(layout, inputs, attention_results(call, inputs))
