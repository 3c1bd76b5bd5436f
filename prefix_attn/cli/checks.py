"""Compares a backend with float64 on a small layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing import assert_within_budget, repeated_attention


@dataclass(frozen=True)
class Check:
    """Errors of one tensor against float64.

    Attributes:
        name: out, dq, dk or dv.
        error: largest absolute error of `prefix_attention`.
        pytorch: the same of PyTorch with every sequence run whole, at the same dtype.
        ok: whether the error is within twice that of PyTorch.
    """

    name: str
    error: float
    pytorch: float
    ok: bool


def check_gradients(
    layout: PrefixLayout,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> list[Check]:
    """Runs forward and backward on random inputs: the backend, PyTorch, and float64 densely."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        x = torch.randn(layout.num_tokens, count, head_dim, generator=generator)
        return x.to(layout.device, dtype)

    q, k, v, dout = (normal(count) for count in (heads, kv_heads, kv_heads, heads))
    wide = [x.double() for x in (q, k, v, dout)]
    actual = _tensors(layout, backend, q, k, v, dout)
    pytorch = _tensors(layout, None, q, k, v, dout)
    exact = _tensors(layout, "reference", *wide)
    checks = []
    for name, ours, theirs, right in zip(
        ("out", "dq", "dk", "dv"), actual, pytorch, exact, strict=True
    ):
        try:
            assert_within_budget(name, ours, right, theirs)
            ok = True
        except AssertionError:
            ok = False
        error, budget = (float((x.double() - right).abs().max()) for x in (ours, theirs))
        checks.append(Check(name, error, budget, ok))
    return checks


def _tensors(
    layout: PrefixLayout, backend: str | None, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Tensor]:
    """Output and gradients of a backend, or of PyTorch with the prefix repeated."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    if backend is None:
        out = repeated_attention(q, k, v, layout)
    else:
        out = prefix_attention(q, k, v, layout, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
