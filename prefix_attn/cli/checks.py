"""Compares a backend with float64 on a small layout."""

from __future__ import annotations

from functools import partial

import torch

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing import Comparison, Inputs, attention_results, compare_attention


def check_gradients(
    layout: PrefixLayout, heads: tuple[int, int], *, head_dim: int, dtype: torch.dtype
) -> list[Comparison]:
    """Holds output and gradients of backend "auto" on random inputs against the error budget.

    Args:
        layout: small enough for dense scores.
        heads: Hq and Hkv.
        head_dim: D.
        dtype: of the inputs.
    """
    inputs = Inputs.random(layout, heads, (head_dim, head_dim), dtype)
    call = partial(prefix_attention, layout=layout)
    return compare_attention(layout, inputs, attention_results(call, inputs))
