"""Pieces that the losses share: bounded ratios, and ragged groups in one rectangle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefix_attn.losses.checks import integer, integers, is_integer


def widened(x: Tensor) -> Tensor:
    """Half types as float32: a log-ratio is a difference of close numbers."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_ratio_of(log_probs: Tensor, old_log_probs: Tensor | None, mask: Tensor) -> Tensor:
    """(B, L) log(new / old), zero at padding; without old ones a zero that has a gradient."""
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    # Chosen before the difference: what stands at padding may be infinite.
    return torch.where(mask, widened(log_probs), 0.0) - torch.where(mask, widened(old), 0.0)


def largest_log_ratio(dtype: torch.dtype) -> float:
    """Half the logarithm of the largest number: 44 in float32, 5.5 in float16, 354 in float64.

    So neither the exponential overflows nor its product with a factor: an infinite exponential
    would turn the zero gradient of a clipped ratio into NaN.
    """
    return math.log(torch.finfo(dtype).max) / 2


def clamped(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio within bounds, of which the upper one may lie beyond its dtype."""
    return ratio.clamp(low, min(high, torch.finfo(ratio.dtype).max))


def right_padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged rows as (N, L), padded with zeros, and the mask of what is not padding."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    index = torch.zeros(0, 0, dtype=torch.int64, device=device)
    if rows:
        index = pad_sequence(list(rows), batch_first=True)
    return index, torch.arange(index.shape[1], device=device) < lengths[:, None]


def sizes_of_groups(name: str, count: int, group_sizes: int | Sequence[int]) -> list[int]:
    """The size of each group of `count` things, which `name` names in the plural."""
    if is_integer(group_sizes):
        size = integer("group_sizes", group_sizes)
        if size < 1 or count % size:
            raise ValueError(f"{count} {name} don't make groups of {size}")
        return [size] * (count // size)
    sizes = integers("group_sizes", group_sizes)
    if sum(sizes) != count or min(sizes, default=1) < 1:
        raise ValueError(f"group_sizes {sizes} must be positive and sum to {count}")
    return sizes


def members_of_groups(sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, G) number of each group's members, padded with zeros, and the mask of what is one."""
    return right_padded(torch.arange(sum(sizes), device=device).split(sizes), device)


def centred_in_groups(values: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What remains of values without the mean of their group.

    Args:
        values: (B,), the members of a group next to one another.
        sizes: of each group; at least one group.

    Returns:
        (N, G) differences, exactly zero in a group of equal values and at padding; the (N, 1)
        members of each group; the (N, G) mask of what is a member.
    """
    index, inside = members_of_groups(sizes, values.device)
    count = inside.sum(1, keepdim=True)
    group = values[index]
    # Relative to one of them: the mean of equal values may differ from them by a rounding.
    group = (group - group[:, :1]).masked_fill(~inside, 0.0)
    mean = group.sum(1, keepdim=True) / count
    return (group - mean).masked_fill(~inside, 0.0), count, inside


def deviation(centred: Tensor, count: Tensor) -> Tensor:
    """(N, 1) standard deviation of samples, from their (N, G) differences to the (N, 1) mean.

    Differences are squared relative to the largest, since their own squares may leave the dtype.
    """
    largest = centred.abs().amax(1, keepdim=True)
    shares = centred / torch.where(largest == 0, 1.0, largest)
    return largest * (shares.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
