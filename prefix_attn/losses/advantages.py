"""From rewards to advantages, which completions are worth training on, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prefix_attn.losses.checks import (
    finite,
    number,
    one_of,
    positive,
    same_shape,
    tensors_on_one_device,
)
from prefix_attn.losses.pieces import (
    centred_in_groups,
    clamped,
    deviation,
    largest_log_ratio,
    log_ratio_of,
    members_of_groups,
    sizes_of_groups,
    widened,
)

SCALES = ("group", "batch", "none")
LEVELS = ("token", "sequence")
MODES = ("truncate", "mask")


def group_advantages(
    rewards: Tensor,
    group_sizes: int | Sequence[int],
    *,
    normalize: bool = True,
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """(reward - mean of its group) / (standard deviation + eps).

    Source: GRPO (arXiv 2402.03300); without the division Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards: (B,), the members of a group next to one another.
        group_sizes: members of each group: one number for all groups, or one per group.
        normalize: False leaves the division out, as `scale="none"` does.
        scale: whose standard deviation it is, that of a sample (n - 1): the reward's "group", or
            the "batch", all of `rewards`; "none" leaves the division out.
        eps: added to the standard deviation.

    Returns:
        (B,) in the dtype of `rewards`. The only member of a group gets zero, and so does every
        member of a group with equal rewards.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is wrong, a reward that is not finite among them.

    Example:
        >>> group_advantages(torch.tensor([0.0, 1.0, 5.0]), [2, 1], normalize=False).tolist()
        [-0.5, 0.5, 0.0]
    """
    sizes = _check_rewards(rewards, group_sizes)
    one_of("scale", scale, SCALES)
    if not normalize and scale == "batch":
        raise ValueError("normalize is False, so scale must not be 'batch'")
    eps = number("eps", eps, 0)
    if not sizes:
        return rewards
    wide = widened(rewards)
    centred, count, inside = centred_in_groups(wide, sizes)
    if normalize and scale != "none":
        if scale == "group":
            divisor = deviation(centred, count) + eps
        else:
            divisor = deviation(*centred_in_groups(wide, [len(wide)])[:2]) + eps
        centred = centred / torch.where(divisor == 0, 1.0, divisor)
    return centred[inside].to(rewards.dtype)


def kalman_advantages(
    rewards: Tensor,
    group_sizes: int | Sequence[int],
    *,
    process_variance: float = 1e-5,
    measurement_variance: float = 1e-2,
) -> Tensor:
    """(reward - x) / (sqrt(P) + 1e-8), x and P the state of a Kalman filter over the group.

    The filter starts at x = 0, P = 1 in each group and reads its rewards in their order:

        P += Q;  K = P / (P + R);  x += K (reward - x);  P *= 1 - K
        A = (reward - x) / (sqrt(P) + 1e-8)

    **The order matters**: a reward is measured against a baseline that knows the rewards before
    it and itself, not those behind it. So the advantages of a group neither sum to zero nor stay
    the same when its members change places. Source: KRPO (arXiv 2505.07527).

    Args:
        rewards: (B,), the members of a group next to one another, in the order to be read.
        group_sizes: members of each group: one number for all groups, or one per group.
        process_variance: Q, by how much the baseline may move from a reward to the next, in
            squared units of the reward.
        measurement_variance: R, how noisy a reward is, in the same units.

    Returns:
        (B,) in the dtype of `rewards`. The only member of a group does not get zero but, with
        the default variances, a tenth of its reward.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is wrong, a reward that is not finite among them.

    Example:
        >>> kalman_advantages(torch.tensor([0.0, 1.0, 1.0]), 3).tolist()
        [0.0, 7.118606090545654, 5.80888032913208]
    """
    sizes = _check_rewards(rewards, group_sizes)
    dtype = widened(rewards).dtype
    noise = positive("measurement_variance", measurement_variance, dtype)
    drift = number("process_variance", process_variance, 0, 1 / torch.finfo(dtype).tiny ** 0.5)
    if not sizes:
        return rewards
    index, inside = members_of_groups(sizes, rewards.device)
    group = widened(rewards)[index]
    x, variance = torch.zeros_like(group[:, 0]), 1.0  # the variance hangs on no reward
    columns = []
    for reward in group.unbind(1):
        variance += drift
        gain = variance / (variance + noise)
        x = x + gain * (reward - x)
        variance *= 1 - gain
        columns.append((reward - x) / (math.sqrt(variance) + 1e-8))
    return torch.stack(columns, 1)[inside].to(rewards.dtype)


def prune_completions(
    advantages: Tensor, rate: float, *, group_sizes: int | Sequence[int] | None = None
) -> Tensor:
    """Indices of the completions that are left without the floor(n rate) smallest |advantage|.

    A small advantage moves the policy little. Source: CPPO (arXiv 2503.22342).

    Args:
        advantages: (B,).
        rate: share to drop, 0 to below 1. At least one completion stays.
        group_sizes: with it, n is the size of each group and every group is pruned alone; without
            it, n is B and groups may be left empty.

    Returns:
        (k,) int64, ascending, to index the batch with. Of equal advantages the first are dropped.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is wrong, an advantage that is not finite among them.

    Example:
        >>> prune_completions(torch.tensor([0.1, -2.0, 1.0, 0.0]), 0.5).tolist()
        [1, 2]
    """
    tensors_on_one_device({"advantages": advantages})
    if advantages.dim() != 1:
        raise ValueError(f"advantages must have shape (B,), got {tuple(advantages.shape)}")
    finite("advantages", advantages)
    rate = number("rate", rate, 0)
    if rate >= 1:
        raise ValueError(f"rate must be below 1, got {rate:g}: no completion would be left")
    count = len(advantages)
    sizes = [count]
    if group_sizes is not None:
        sizes = sizes_of_groups("advantages", count, group_sizes)
    left, start = [torch.zeros(0, dtype=torch.int64, device=advantages.device)], 0
    for group in advantages.abs().split(sizes):
        # 0.29 of 100 is 29, though their product in floating point is a little less.
        keep = max(1, len(group) - math.floor(round(len(group) * rate, 9)))
        left.append(start + group.argsort(stable=True)[-keep:])
        start += len(group)
    return torch.cat(left).sort().values


def importance_weights(
    log_probs: Tensor,
    engine_log_probs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """exp(log_probs - engine_log_probs), truncated or masked: `weights` of the policy losses.

    An inference engine samples with other kernels and roundings than the trainer computes with;
    these weights correct for it. Sources: truncated importance sampling
    (https://fengyao.notion.site/off-policy-rl), and IcePop's masked weights (arXiv 2510.18855).

    Args:
        log_probs: (B, L) of the sampled tokens by the trainer's policy at the time of sampling:
            the `old_log_probs` of a loss.
        engine_log_probs: (B, L) of the same tokens as the engine reported them. NaN says that it
            reported none: such a token counts as equal.
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        level: "token" gives each token the ratio of its own probabilities, "sequence" each
            completion the product of its tokens' ratios.
        mode: "truncate" moves a weight that lies outside of `low` to `high` to the nearer of
            them, "mask" sets it to zero.
        low: lower bound.
        high: upper bound; `math.inf` for none.

    Returns:
        (B, L), zero at padding, or with `level="sequence"` (B,), 1 for an empty completion;
        without gradients, in float32 (float64 where an input is).

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, device or value is wrong.

    Example:
        >>> policy, engine = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -5.0]])
        >>> importance_weights(policy, engine, torch.ones(1, 2)).tolist()
        [[1.0, 2.0]]
        >>> importance_weights(policy, engine, torch.ones(1, 2), mode="mask").tolist()
        [[1.0, 0.0]]
    """
    tensors_on_one_device(
        {"log_probs": log_probs, "engine_log_probs": engine_log_probs, "mask": mask}
    )
    same_shape(log_probs, {"engine_log_probs": engine_log_probs, "mask": mask})
    one_of("level", level, LEVELS)
    one_of("mode", mode, MODES)
    low = number("low", low, 0, 1)
    high = number("high", high, 1, math.inf)
    mask = mask.bool()
    with torch.no_grad():
        known = mask & ~engine_log_probs.isnan()
        log_ratio = log_ratio_of(log_probs, engine_log_probs, known)
        log_ratio = log_ratio.sum(1) if level == "sequence" else log_ratio
        weights = log_ratio.clamp(max=largest_log_ratio(log_ratio.dtype)).exp()
        if mode == "truncate":
            weights = clamped(weights, low, high)
        else:
            weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
        return weights if level == "sequence" else weights.masked_fill(~mask, 0.0)


def _check_rewards(rewards: Tensor, group_sizes: int | Sequence[int]) -> list[int]:
    """Refuses rewards that are none; returns the size of each group."""
    tensors_on_one_device({"rewards": rewards})
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be a floating-point tensor of shape (B,), got {rewards.dtype} "
            f"{tuple(rewards.shape)}"
        )
    finite("rewards", rewards)
    return sizes_of_groups("rewards", len(rewards), group_sizes)
