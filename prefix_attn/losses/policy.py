"""The losses of policy optimisation, on log-probabilities of one row per completion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.losses.checks import positive

AGGREGATIONS = ("grpo", "dapo", "dr_grpo")


def group_advantages(
    rewards: Tensor, group_sizes: int | Sequence[int], *, normalize: bool = True, eps: float = 1e-4
) -> Tensor:
    """(reward - mean of its group) / (standard deviation of its group + eps).

    Args:
        rewards: (B,), the members of a group next to one another.
        group_sizes: members of each group: one number for all groups, or one per group.
        normalize: False leaves the division out, as Dr. GRPO does.
        eps: added to the standard deviation, that of a sample (n - 1).

    Returns:
        (B,) in the dtype of `rewards`. The only member of a group gets zero.

    Example:
        >>> group_advantages(torch.tensor([0.0, 1.0, 5.0]), [2, 1], normalize=False).tolist()
        [-0.5, 0.5, 0.0]
    """
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be a floating-point tensor of shape (B,), got {rewards.dtype} "
            f"{tuple(rewards.shape)}"
        )
    if isinstance(group_sizes, int):
        if group_sizes < 1 or len(rewards) % group_sizes:
            raise ValueError(f"{len(rewards)} rewards don't make groups of {group_sizes}")
        sizes = [group_sizes] * (len(rewards) // group_sizes)
    else:
        sizes = list(group_sizes)
        if sum(sizes) != len(rewards) or min(sizes, default=1) < 1:
            raise ValueError(f"group_sizes {sizes} must be positive and sum to {len(rewards)}")
    advantages = []
    for group in rewards.split(sizes):
        centred = group - group.mean()
        scale = group.std() + eps if normalize and len(group) > 1 else 1.0
        advantages.append(centred / scale)
    return torch.cat(advantages) if advantages else rewards


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    aggregation: str = "grpo",
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL, token by token.

    r is the ratio of the token's probability to the old one, and KL the estimate
    `exp(d) - d - 1` with d the log-ratio of reference to policy, which is never negative.

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,) or (B, L).
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term.
        aggregation: "grpo" takes the mean over each completion's tokens, then over completions;
            "dapo" the mean over all tokens; "dr_grpo" divides by B times `max_length`.
        max_length: longest completion that sampling allows, for "dr_grpo".
        denominator: what the sum is divided by instead of what this batch holds, for batches
            that are run in parts: all completions ("grpo"), all tokens ("dapo"), all completions
            times `max_length` ("dr_grpo").

    Returns:
        Scalar.

    Example:
        >>> log_probs, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> grpo_loss(log_probs, None, torch.tensor([1.0, -1.0]), mask).item()
        0.0
    """
    mask = _check_policy(log_probs, old_log_probs, reference_log_probs, advantages, mask, beta)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {list(AGGREGATIONS)}, got {aggregation!r}")
    if aggregation == "dr_grpo" and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"aggregation 'dr_grpo' needs a positive max_length, got {max_length!r}")
    log_ratio = _log_ratio(log_probs, old_log_probs, mask)
    loss = _clipped(log_ratio.exp(), advantages, clip_low, clip_high)
    loss = loss + beta * _kl(log_probs, reference_log_probs, mask) if beta else loss
    loss = loss.masked_fill(~mask, 0.0)
    if aggregation == "grpo":
        return _over((loss.sum(1) / _lengths(mask)).sum(), denominator, len(mask))
    if aggregation == "dapo":
        return _over(loss.sum(), denominator, mask.sum().clamp(min=1))
    return _over(loss.sum(), denominator, len(mask) * (max_length or 1))


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean over completions of -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + beta KL.

    s is the ratio of the completion's probabilities to the power of one over its length: the
    geometric mean of the token ratios.

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,), one per completion.
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term, the mean over a completion's tokens.
        denominator: number of completions of a batch that is run in parts.

    Returns:
        Scalar.

    Example:
        >>> log_probs, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> gspo_loss(log_probs, None, torch.tensor([1.0, 2.0]), mask).item()
        -1.5
    """
    mask = _check_policy(log_probs, old_log_probs, reference_log_probs, advantages, mask, beta)
    if advantages.dim() != 1:
        raise ValueError(
            f"advantages must have shape ({len(mask)},), one per completion, got "
            f"{tuple(advantages.shape)}"
        )
    lengths = _lengths(mask)
    log_ratio = _log_ratio(log_probs, old_log_probs, mask).sum(1) / lengths
    loss = _clipped(log_ratio.exp(), advantages, clip_low, clip_high)
    if beta:
        loss = loss + beta * _kl(log_probs, reference_log_probs, mask).sum(1) / lengths
    # A completion without tokens has no probability to change.
    loss = loss.masked_fill(~mask.any(1), 0.0)
    return _over(loss.sum(), denominator, len(mask))


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    reference_chosen_log_probs: Tensor,
    reference_rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of -log sigmoid(beta (chosen - rejected)), log-ratios to the reference policy.

    Args:
        chosen_log_probs: (B,) of whole completions: `completion_log_probs(...).log_probs.sum(1)`.
        rejected_log_probs: (B,).
        reference_chosen_log_probs: (B,) of the reference policy.
        reference_rejected_log_probs: (B,).
        beta: how far the policy may move from the reference; larger is less.
        label_smoothing: how often the labels are taken to be the wrong way round, 0 to 0.5.

    Returns:
        Scalar.

    Example:
        >>> pair = torch.zeros(1)
        >>> round(dpo_loss(pair, pair, pair, pair).item(), 4)
        0.6931
    """
    tensors = {
        "chosen_log_probs": chosen_log_probs,
        "rejected_log_probs": rejected_log_probs,
        "reference_chosen_log_probs": reference_chosen_log_probs,
        "reference_rejected_log_probs": reference_rejected_log_probs,
    }
    for name, x in tensors.items():
        if x.dim() != 1 or x.shape != chosen_log_probs.shape or not len(x):
            raise ValueError(
                f"{name} must have shape (B,) with B at least 1, as chosen_log_probs "
                f"{tuple(chosen_log_probs.shape)}, got {tuple(x.shape)}"
            )
        if name.startswith("reference") and x.requires_grad:
            raise ValueError(f"{name} must not require gradients; detach it")
    beta = positive("beta", beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be 0 to 0.5, got {label_smoothing}")
    margin = beta * (
        (chosen_log_probs - reference_chosen_log_probs)
        - (rejected_log_probs - reference_rejected_log_probs)
    )
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()


# ---- pieces of the losses -----------------------------------------------------------------------


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor | None, mask: Tensor) -> Tensor:
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    # Chosen before the difference: what stands at padding may be infinite.
    return torch.where(mask, log_probs, 0.0) - torch.where(mask, old, 0.0)


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be 0 to 1, got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _kl(log_probs: Tensor, reference_log_probs: Tensor | None, mask: Tensor) -> Tensor:
    """exp(d) - d - 1, the "k3" estimate of KL(policy, reference): zero at padding."""
    d = -_log_ratio(log_probs, reference_log_probs, mask)
    return torch.expm1(d) - d


def _lengths(mask: Tensor) -> Tensor:
    """Tokens of each completion, at least 1 so as to divide by."""
    return mask.sum(1).clamp(min=1)


def _over(total: Tensor, denominator: float | Tensor | None, default: float | Tensor) -> Tensor:
    if denominator is None:
        denominator = default
        if isinstance(default, (int, float)) and default <= 0:
            raise ValueError("the batch has no completions to take the mean of: pass denominator")
    elif not isinstance(denominator, Tensor):
        denominator = positive("denominator", denominator)
    return total / denominator


# ---- checks -------------------------------------------------------------------------------------


def _check_policy(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    reference_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    beta: float,
) -> Tensor:
    """Refuses what does not fit together; returns the mask as bool."""
    if log_probs.dim() != 2 or not log_probs.is_floating_point():
        raise ValueError(
            f"log_probs must be a floating-point tensor of shape (B, L), got {log_probs.dtype} "
            f"{tuple(log_probs.shape)}"
        )
    shape = tuple(log_probs.shape)
    constants = {
        "old_log_probs": old_log_probs,
        "reference_log_probs": reference_log_probs,
        "mask": mask,
    }
    for name, x in constants.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, as log_probs, got {tuple(x.shape)}")
    if tuple(advantages.shape) not in (shape, shape[:1]):
        raise ValueError(
            f"advantages must have shape {shape[:1]} or {shape}, got {tuple(advantages.shape)}"
        )
    for name, x in {**constants, "advantages": advantages}.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} must not require gradients; detach it")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a number of at least 0, got {beta!r}")
    if beta and reference_log_probs is None:
        raise ValueError(f"beta is {beta}: reference_log_probs are needed")
    return mask.bool()
