"""The losses of policy optimisation, on log-probabilities of one row per completion.

Every loss is a sum over completions or groups, divided by a number that `denominator` replaces:
given that of the whole batch, the losses of its parts add up to that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.losses.checks import (
    constants,
    is_integer,
    number,
    one_of,
    positive,
    same_shape,
    tensors_on_one_device,
)
from prefix_attn.losses.pieces import (
    centred_in_groups,
    clamped,
    largest_log_ratio,
    log_ratio_of,
    sizes_of_groups,
    widened,
)

AGGREGATIONS = ("grpo", "dapo", "dr_grpo")


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    weights: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    aggregation: str = "grpo",
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean of -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL, token by token.

    r is the ratio of the token's probability to the old one, and KL the estimate
    `exp(d) - d - 1` with d the log-ratio of reference to policy, which is never negative.
    Log-ratios above 44 (5.5 in float16, 354 in float64) count as that and have no gradient, so
    that ratios and their gradients stay finite. Sources: GRPO
    (arXiv 2402.03300), DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783), dual clip
    (arXiv 1912.09729).

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,) or (B, L).
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        delta: upper bound of r itself, above 1 + clip_high, so that a negative advantage adds at
            most `delta |A|` to the loss (dual clip); None for no bound.
        weights: w, (B,) or (B, L) factors of the policy term: `importance_weights`, inverse
            probabilities of having been kept, weights of branches. The KL term and what is
            divided by stay as they are.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term.
        aggregation: "grpo" takes the mean over each completion's tokens, then over completions;
            "dapo" the mean over all tokens; "dr_grpo" divides by B times `max_length`.
        max_length: longest completion that sampling allows, for "dr_grpo".
        denominator: what the sum is divided by instead of what this batch holds, for batches
            that are run in parts: all completions ("grpo"), all tokens ("dapo"), all completions
            times `max_length` ("dr_grpo").

    Returns:
        Scalar in float32, or float64 where an input is. A completion without tokens adds zero,
        and counts as a completion.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, device or value is wrong; it names the value.

    Example:
        >>> log_probs, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> grpo_loss(log_probs, None, torch.tensor([1.0, -1.0]), mask).item()
        0.0
    """
    x = _checked(log_probs, old_log_probs, advantages, mask, weights, reference_log_probs, beta)
    loss = _clipped(x.ratio(x.log_ratio), x.advantages, clip_low, clip_high, delta)
    return _aggregated(_with_kl(loss, x), x.mask, aggregation, max_length, denominator)


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    delta: float | None = None,
    weights: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean over completions of -w min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + beta KL.

    s is the ratio of the completion's probabilities to the power of one over its length: the
    geometric mean of the token ratios. Its logarithm is bounded as in `grpo_loss`. Source: GSPO
    (arXiv 2507.18071).

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,), one per completion.
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        delta: upper bound of s itself, above 1 + clip_high; None for no bound.
        weights: w, (B,) factors of the policy term as in `grpo_loss`, or (B, L), of which the
            mean over a completion's tokens counts.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term, the mean over a completion's tokens.
        denominator: number of completions of a batch that is run in parts.

    Returns:
        Scalar in float32, or float64 where an input is. A completion without tokens adds zero,
        and counts as a completion.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, device or value is wrong; it names the value.

    Example:
        >>> log_probs, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> gspo_loss(log_probs, None, torch.tensor([1.0, 2.0]), mask).item()
        -1.5
    """
    x = _checked(log_probs, old_log_probs, advantages, mask, weights, reference_log_probs, beta)
    if advantages.dim() != 1:
        raise ValueError(
            f"advantages must have shape ({len(mask)},), one per completion, got "
            f"{tuple(advantages.shape)}"
        )
    lengths = _lengths(x.mask)
    ratio = x.ratio(x.log_ratio.sum(1) / lengths)
    loss = _clipped(ratio, x.advantages[:, 0], clip_low, clip_high, delta)
    if x.weights is not None:
        weights = x.weights.expand_as(x.mask).masked_fill(~x.mask, 0.0)
        loss = loss * (weights.sum(1) / lengths)
    if x.kl is not None:
        loss = loss + x.kl.sum(1) / lengths
    # A completion without tokens has no probability to change.
    loss = loss.masked_fill(~x.mask.any(1), 0.0)
    return _over(loss.sum(), denominator, len(mask), "completions")


def cispo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_high: float,
    clip_low: float = 1.0,
    weights: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    aggregation: str = "dapo",
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean of -w clip(r, 1 - clip_low, 1 + clip_high) A log p + beta KL, token by token.

    The clipped ratio r is a constant: it weighs the gradient of log p, the token's
    log-probability, and no token loses its gradient to the clip. Log-ratios are bounded as in
    `grpo_loss`. Source: CISPO (MiniMax-M1, arXiv 2506.13585), which averages over all tokens.

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,) or (B, L).
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_high: how far the ratio may rise above 1: a largest ratio of 5, as ScaleRL
            (arXiv 2510.13786) recommends, is 4 here.
        clip_low: how far it may fall below 1; by default there is no lower bound.
        weights: w, (B,) or (B, L) factors of the policy term, as in `grpo_loss`.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term, that of `grpo_loss`.
        aggregation: "dapo", "grpo" or "dr_grpo", as in `grpo_loss`.
        max_length: longest completion that sampling allows, for "dr_grpo".
        denominator: what the sum is divided by instead of what this batch holds, as in
            `grpo_loss`.

    Returns:
        Scalar in float32, or float64 where an input is. A completion without tokens adds zero.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, device or value is wrong; it names the value.

    Example:
        >>> log_probs, mask = torch.full((1, 2), -0.5), torch.ones(1, 2)
        >>> cispo_loss(log_probs, log_probs - 9, torch.tensor([1.0]), mask, clip_high=3.0).item()
        2.0
    """
    x = _checked(log_probs, old_log_probs, advantages, mask, weights, reference_log_probs, beta)
    low, high = _clip_range(clip_low, clip_high)
    factor = clamped(x.ratio(x.log_ratio.detach()), low, high) * x.advantages
    loss = -factor * x.log_probs
    return _aggregated(_with_kl(loss, x), x.mask, aggregation, max_length, denominator)


def rebel_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    rewards: Tensor,
    mask: Tensor,
    group_sizes: int | Sequence[int],
    *,
    eta: float = 1.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean over groups of the mean over pairs i != j of ((D_i - D_j) - eta (r_i - r_j))^2.

    D is a completion's sum of log-ratios. Differences of log-ratios regress to those of rewards,
    so no advantages are needed. The mean over all ordered pairs is twice the sample variance of
    D - eta r, which takes time linear in the members. Source: REBEL (arXiv 2404.16767), whose
    loss is this one over eta^2.

    Args:
        log_probs: (B, L) of the policy, the members of a group next to one another.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        rewards: (B,).
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        group_sizes: members of each group: one number for all groups, or one per group.
        eta: nats of log-ratio per unit of reward.
        denominator: number of groups of a batch that is run in parts. Each part holds whole
            groups, since a group's members are compared with one another.

    Returns:
        Scalar in float32, or float64 where an input is. A group of one has no pair and adds
        zero; a completion without tokens has D = 0 and is compared like any other.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, device or value is wrong; it names the value.

    Example:
        >>> log_probs = torch.tensor([[-1.0], [-2.0]])
        >>> rewards, mask = torch.tensor([3.0, 0.0]), torch.ones(2, 1)
        >>> rebel_loss(log_probs, torch.zeros(2, 1), rewards, mask, 2).item()
        4.0
    """
    tensors_on_one_device(
        {"log_probs": log_probs, "rewards": rewards, "mask": mask},
        {"old_log_probs": old_log_probs},
    )
    same_shape(log_probs, {"old_log_probs": old_log_probs, "mask": mask})
    if tuple(rewards.shape) != (len(log_probs),):
        raise ValueError(f"rewards must have shape ({len(log_probs)},), got {tuple(rewards.shape)}")
    constants({"old_log_probs": old_log_probs, "rewards": rewards})
    sizes = sizes_of_groups("completions", len(rewards), group_sizes)
    log_ratios = log_ratio_of(log_probs, old_log_probs, mask.bool()).sum(1)
    error = log_ratios - positive("eta", eta, log_ratios.dtype) * widened(rewards)
    if not sizes:
        return _over(error.sum(), denominator, 0, "groups")
    centred, count, _ = centred_in_groups(error, sizes)
    pairs = 2 * centred.square().sum(1) / (count[:, 0] - 1).clamp(min=1)
    return _over(pairs.sum(), denominator, len(sizes), "groups")


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    reference_chosen_log_probs: Tensor,
    reference_rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean of -log sigmoid(beta (chosen - rejected)), log-ratios to the reference policy.

    Source: DPO (arXiv 2305.18290).

    Args:
        chosen_log_probs: (B,) of whole completions: `completion_log_probs(...).log_probs.sum(1)`.
        rejected_log_probs: (B,).
        reference_chosen_log_probs: (B,) of the reference policy.
        reference_rejected_log_probs: (B,).
        beta: how far the policy may move from the reference; larger is less.
        label_smoothing: how often the labels are taken to be the wrong way round, 0 to 0.5.
        denominator: number of pairs of a batch that is run in parts.

    Returns:
        Scalar in float32, or float64 where an input is.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, device or value is wrong; it names the value.

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
    tensors_on_one_device(tensors)
    for name, x in tensors.items():
        if x.dim() != 1 or x.shape != chosen_log_probs.shape:
            raise ValueError(
                f"{name} must have shape (B,), as chosen_log_probs "
                f"{tuple(chosen_log_probs.shape)}, got {tuple(x.shape)}"
            )
    constants({name: x for name, x in tensors.items() if name.startswith("reference")})
    chosen, rejected, reference_chosen, reference_rejected = map(widened, tensors.values())
    beta = positive("beta", beta, chosen.dtype)
    label_smoothing = number("label_smoothing", label_smoothing, 0, 0.5)
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:  # which is infinite where the rejected completion is impossible
        loss = loss - label_smoothing * F.logsigmoid(-margin)
    return _over(loss.sum(), denominator, len(loss), "pairs")


class _Checked(NamedTuple):
    """What a loss of ratios and advantages reads, widened.

    Attributes:
        log_probs: (B, L), zero at padding.
        log_ratio: (B, L), zero at padding.
        largest: what log-ratios are bounded by.
        advantages: (B, 1) or (B, L).
        mask: (B, L) bool.
        weights: (B, 1), (B, L) or None.
        kl: (B, L), beta times the estimate, zero at padding; or None.
    """

    log_probs: Tensor
    log_ratio: Tensor
    largest: float
    advantages: Tensor
    mask: Tensor
    weights: Tensor | None
    kl: Tensor | None

    def ratio(self, log_ratio: Tensor) -> Tensor:
        """Its exponential; above the bound it is constant."""
        return log_ratio.clamp(max=self.largest).exp()


def _checked(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    reference_log_probs: Tensor | None,
    beta: float,
) -> _Checked:
    """Refuses what does not fit together."""
    by_token = {"old_log_probs": old_log_probs, "reference_log_probs": reference_log_probs}
    tensors_on_one_device(
        {"log_probs": log_probs, "advantages": advantages, "mask": mask},
        {**by_token, "weights": weights},
    )
    same_shape(log_probs, {**by_token, "mask": mask})
    shape = tuple(log_probs.shape)
    factors: dict[str, Tensor | None] = {"advantages": advantages, "weights": weights}
    for name, x in factors.items():
        if x is not None and tuple(x.shape) not in (shape, shape[:1]):
            raise ValueError(f"{name} must have shape {shape[:1]} or {shape}, got {tuple(x.shape)}")
    constants({**by_token, **factors, "mask": mask})
    beta = number("beta", beta, 0)
    if beta and reference_log_probs is None:
        raise ValueError(f"beta is {beta}: reference_log_probs are needed")
    mask = mask.bool()
    largest = largest_log_ratio(log_probs.dtype)
    # Once for all: gradients of half types add up before they are rounded.
    log_probs = torch.where(mask, widened(log_probs), 0.0)
    kl = None
    if beta:
        # exp(d) - d - 1, the "k3" estimate of KL(policy, reference)
        d = -log_ratio_of(log_probs, reference_log_probs, mask).clamp(min=-largest)
        kl = beta * (torch.expm1(d) - d)
    log_ratio = log_ratio_of(log_probs, old_log_probs, mask)
    advantages = widened(advantages[:, None] if advantages.dim() == 1 else advantages)
    if weights is not None:
        weights = widened(weights[:, None] if weights.dim() == 1 else weights)
    return _Checked(log_probs, log_ratio, largest, advantages, mask, weights, kl)


def _clip_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    return 1 - number("clip_low", clip_low, 0, 1), 1 + number("clip_high", clip_high, 0, math.inf)


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, delta: float | None
) -> Tensor:
    low, high = _clip_range(clip_low, clip_high)
    clipped = clamped(ratio, low, high)
    if delta is not None:
        delta = number("delta", delta, 1, math.inf)
        if delta <= high:
            raise ValueError(f"delta must be above 1 + clip_high, {high:g}, got {delta:g}")
        ratio = clamped(ratio, 0, delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _with_kl(loss: Tensor, x: _Checked) -> Tensor:
    """The policy term, weighted, and the KL term, which is not."""
    loss = loss if x.weights is None else loss * x.weights
    return loss if x.kl is None else loss + x.kl


def _aggregated(
    loss: Tensor,
    mask: Tensor,
    aggregation: str,
    max_length: int | None,
    denominator: float | Tensor | None,
) -> Tensor:
    one_of("aggregation", aggregation, AGGREGATIONS)
    loss = loss.masked_fill(~mask, 0.0)
    if aggregation == "grpo":
        means = loss.sum(1) / _lengths(mask)
        return _over(means.sum(), denominator, len(mask), "completions")
    if aggregation == "dapo":
        return _over(loss.sum(), denominator, mask.sum().clamp(min=1), "tokens")
    if not is_integer(max_length) or int(max_length) < 1:
        raise ValueError(f"aggregation 'dr_grpo' needs a positive max_length, got {max_length!r}")
    return _over(loss.sum(), denominator, len(mask) * int(max_length), "completions")


def _lengths(mask: Tensor) -> Tensor:
    """Tokens of each completion, at least 1 so as to divide by."""
    return mask.sum(1).clamp(min=1)


def _over(
    total: Tensor, denominator: float | Tensor | None, default: int | Tensor, what: str
) -> Tensor:
    """The total over the denominator, by default over what the batch holds."""
    if denominator is None:
        if not isinstance(default, Tensor) and not default:
            raise ValueError(f"the batch has no {what} to take the mean of: pass denominator")
        return total / default
    if not isinstance(denominator, Tensor):
        return total / positive("denominator", denominator, total.dtype)
    if denominator.numel() != 1 or denominator.requires_grad:
        raise ValueError(
            f"denominator must be a number or a tensor of one without gradients, got shape "
            f"{tuple(denominator.shape)}, requires_grad={denominator.requires_grad}"
        )
    divisor = denominator.reshape(()).to(total)
    # A look at it waits for the device, and a compiled graph can't look.
    if not torch.compiler.is_compiling() and not 0 < divisor < math.inf:
        raise ValueError(f"denominator must be positive and finite, got {denominator.item()}")
    return total / divisor
