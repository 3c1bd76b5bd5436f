"""`merge_states`: attention over two sets of keys from the attention over each."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """O = (e^(LSE_a) O_a + e^(LSE_b) O_b) / (e^(LSE_a) + e^(LSE_b)): attention over both key sets.

    The key sets must be disjoint. Differentiable in all four arguments: with
    `prefix_attention(..., return_lse=True)` the gradients reach q, k and v of both calls.

    Args:
        out_a: (T, H, D) attention of T queries over one set of keys.
        lse_a: (H, T) its log-sum-exp, natural log; -inf where a query sees no key of the set.
        out_b: (T, H, D), the same queries over the other set.
        lse_b: (H, T).

    Returns:
        out (T, H, D) in the dtype of out_a and lse (H, T). Where both sets are empty for a query,
        its output is 0 and its log-sum-exp -inf.

    Raises:
        ValueError: if shapes or devices do not fit; it names them.

    Example:
        >>> out, lse = torch.randn(5, 2, 16), torch.randn(2, 5)
        >>> nothing = torch.full((2, 5), float("-inf"))
        >>> torch.equal(merge_states(out, lse, torch.zeros_like(out), nothing)[0], out)
        True
    """
    if out_a.dim() != 3 or out_b.shape != out_a.shape:
        raise ValueError(
            "out_a and out_b must have one shape (T, H, D), got "
            f"{tuple(out_a.shape)} and {tuple(out_b.shape)}"
        )
    heads = (out_a.shape[1], out_a.shape[0])
    if lse_a.shape != heads or lse_b.shape != heads:
        raise ValueError(
            f"lse_a and lse_b must have shape (H, T) = {heads}, got "
            f"{tuple(lse_a.shape)} and {tuple(lse_b.shape)}"
        )
    if len({x.device for x in (out_a, lse_a, out_b, lse_b)}) > 1:
        raise ValueError(
            f"out_a, lse_a, out_b and lse_b must be on one device, got {out_a.device}, "
            f"{lse_a.device}, {out_b.device} and {lse_b.device}"
        )
    # Only a shift: it cancels, so that no gradient runs through it.
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top.isneginf(), 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    # What an attention over no keys returns, NaN perhaps, has no weight.
    share_a, share_b = ((w / total).t()[..., None] for w in (weight_a, weight_b))
    out = share_a * out_a.masked_fill(share_a == 0, 0) + share_b * out_b.masked_fill(
        share_b == 0, 0
    )
    lse = torch.where(empty, float("-inf"), torch.log(total) + top)
    return out.to(out_a.dtype), lse
