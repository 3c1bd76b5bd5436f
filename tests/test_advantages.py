"""Advantages, pruning and importance weights against their definitions, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from prefix_attn.losses import (
    group_advantages,
    importance_weights,
    kalman_advantages,
    prune_completions,
)

REWARDS = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0, 5.0], dtype=torch.float64)


def test_group_advantages_match_each_group_alone():
    actual = group_advantages(REWARDS, [3, 1, 2])
    first = (REWARDS[:3] - REWARDS[:3].mean()) / (REWARDS[:3].std() + 1e-4)
    last = (REWARDS[4:] - 3.5) / (math.sqrt(4.5) + 1e-4)
    torch.testing.assert_close(actual, torch.cat([first, torch.zeros(1), last]))
    assert not group_advantages(torch.ones(4), 2).any()
    with pytest.raises(ValueError, match="6 rewards don't make groups of 4"):
        group_advantages(REWARDS, 4)
    with pytest.raises(ValueError, match=r"group_sizes \[3, 2\] must be positive and sum to 6"):
        group_advantages(REWARDS, [3, 2])


@pytest.mark.parametrize("sizes", [[3, 1, 2], np.array([3, 1, 2]), torch.tensor([3, 1, 2])])
def test_group_advantages_over_the_batch(sizes):
    centred = group_advantages(REWARDS, sizes, scale="none")
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0.0, -1.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(centred, expected)
    assert torch.equal(centred, group_advantages(REWARDS, sizes, normalize=False))
    actual = group_advantages(REWARDS, sizes, scale="batch", eps=0.1)
    torch.testing.assert_close(actual, expected / (REWARDS.std() + 0.1))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_single_ones_have_no_advantage(scale):
    assert group_advantages(torch.ones(4), 2, scale=scale, eps=0).tolist() == [0.0] * 4
    assert group_advantages(torch.ones(1), 1, scale=scale, eps=0).tolist() == [0.0]
    assert group_advantages(torch.ones(0), 4, scale=scale).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_whatever_they_are(scale, dtype):
    """Where the mean of a group, a rounded sum over a count, is not one of its rewards."""
    for size in range(1, 12):
        rewards = torch.tensor([0.1, 0.7, 98765.43, -1e30], dtype=torch.float64).to(dtype)
        rewards = rewards.nan_to_num(neginf=-3e4).repeat_interleave(size)
        assert not group_advantages(rewards, size, scale=scale, eps=0).any()


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("unit", [2.0**-90, 2.0**90])
def test_group_advantages_do_not_depend_on_the_unit_of_rewards(unit, scale):
    """Also where squares of rewards leave float32."""
    rewards = REWARDS.float()
    expected = group_advantages(rewards, [3, 1, 2], scale=scale, eps=0)
    actual = group_advantages(rewards * unit, [3, 1, 2], scale=scale, eps=0)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", [group_advantages, kalman_advantages])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_advantages_of_half_types_are_computed_in_float32(function, dtype):
    rewards = REWARDS.to(dtype)
    actual = function(rewards, np.int64(3))
    assert torch.equal(actual, function(rewards.float(), 3).to(dtype))


def kalman(rewards: list[float], drift: float, noise: float) -> list[float]:
    """The filter over one group, as it is written down."""
    x, p, advantages = 0.0, 1.0, []
    for reward in rewards:
        p += drift
        gain = p / (p + noise)
        x += gain * (reward - x)
        p *= 1 - gain
        advantages.append((reward - x) / (math.sqrt(p) + 1e-8))
    return advantages


@pytest.mark.parametrize("variances", [{}, {"process_variance": 0.3, "measurement_variance": 2}])
@pytest.mark.parametrize("sizes", [[6], [3, 1, 2], [1] * 6])
def test_kalman_advantages_match_definition(sizes, variances):
    drift, noise = variances.values() if variances else (1e-5, 1e-2)
    expected = [a for g in REWARDS.split(sizes) for a in kalman(g.tolist(), drift, noise)]
    actual = kalman_advantages(REWARDS, sizes, **variances)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_kalman_advantages_depend_on_the_order():
    forward = kalman_advantages(REWARDS, 6)
    assert not torch.allclose(forward, kalman_advantages(REWARDS.flip(0), 6).flip(0))
    assert kalman_advantages(torch.ones(0), 4).shape == (0,)


@pytest.mark.parametrize("function", [group_advantages, kalman_advantages])
@pytest.mark.parametrize(
    ("rewards", "sizes", "error", "message"),
    [
        ([1.0, 0.0], 2, TypeError, "rewards must be a tensor, got list"),
        (torch.ones(2, 2), 2, ValueError, r"rewards must be a floating-point tensor of shape \(B,"),
        (torch.tensor([0.0, math.nan]), 2, ValueError, r"rewards must be finite, got nan at \[1\]"),
        (torch.tensor([-math.inf, 0.0]), 2, ValueError, r"must be finite, got -inf at \[0\]"),
        (torch.ones(2), "2", TypeError, "group_sizes must be an integer or a sequence .* str '2'"),
        (torch.ones(2), [1, 1.0], TypeError, r"group_sizes\[1\] must be an integer, got float 1.0"),
        (torch.ones(2), True, TypeError, "group_sizes must be an integer .* got bool True"),
        (torch.ones(2), [2, 0], ValueError, r"group_sizes \[2, 0\] must be positive"),
    ],
)
def test_advantages_refuse_wrong_values(function, rewards, sizes, error, message):
    with pytest.raises(error, match=message):
        function(rewards, sizes)


def test_advantages_refuse_wrong_options():
    with pytest.raises(ValueError, match=r"one of \['group', 'batch', 'none'\], got 'all'"):
        group_advantages(REWARDS, 6, scale="all")
    with pytest.raises(ValueError, match="normalize is False, so scale must not be 'batch'"):
        group_advantages(REWARDS, 6, normalize=False, scale="batch")
    with pytest.raises(ValueError, match="eps must be at least 0 and finite, got nan"):
        group_advantages(REWARDS, 6, eps=math.nan)
    with pytest.raises(ValueError, match="measurement_variance must be positive and finite, got 0"):
        kalman_advantages(REWARDS, 6, measurement_variance=0)
    with pytest.raises(ValueError, match=r"process_variance must be .*, got -1"):
        kalman_advantages(REWARDS, 6, process_variance=-1)


# ---- pruning ------------------------------------------------------------------------------------

ADVANTAGES = torch.tensor([0.5, -3.0, 0.0, 1.0, -0.25, 2.0, 0.5])


@pytest.mark.parametrize(
    ("rate", "sizes", "expected"),
    [
        (0.5, None, [1, 3, 5, 6]),  # floor(3.5) dropped: 0, 0.25 and the first 0.5
        (0, None, list(range(7))),
        (0.99, None, [1]),
        (np.float32(0.5), [4, 1, 2], [1, 3, 4, 5]),  # two, none and one dropped
        (0.5, [1] * 7, list(range(7))),
        (0.34, torch.tensor([3, 4]), [0, 1, 3, 5, 6]),
    ],
)
def test_pruning_drops_the_smallest_advantages(rate, sizes, expected):
    kept = prune_completions(ADVANTAGES, rate, group_sizes=sizes)
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


def test_pruning_drops_as_many_as_the_rate_says():
    for percent in range(100):  # 100 * 0.29 is less than 29 in floating point
        assert len(prune_completions(torch.randn(100), percent / 100)) == 100 - percent
    assert len(prune_completions(torch.randn(7), 1 - 1e-12)) == 1
    for sizes in (None, 4, []):
        assert prune_completions(torch.ones(0), 0.5, group_sizes=sizes).tolist() == []


@pytest.mark.parametrize(
    ("advantages", "options", "error", "message"),
    [
        ([1.0], {"rate": 0.5}, TypeError, "advantages must be a tensor, got list"),
        (torch.ones(2, 2), {"rate": 0.5}, ValueError, r"must have shape \(B,\), got \(2, 2\)"),
        (torch.tensor([1.0, math.nan]), {"rate": 0.5}, ValueError, r"finite, got nan at \[1\]"),
        (torch.ones(2), {"rate": 1}, ValueError, "rate must be below 1, got 1: no completion"),
        (torch.ones(2), {"rate": -0.1}, ValueError, "rate must be at least 0 .* got -0.1"),
        (torch.ones(2), {"rate": math.nan}, ValueError, "rate must be at least 0 .* got nan"),
        (torch.ones(2), {"rate": "half"}, TypeError, "rate must be a number, got str 'half'"),
        (torch.ones(3), {"rate": 0.5, "group_sizes": 2}, ValueError, "3 advantages don't make"),
    ],
)
def test_pruning_refuses_wrong_values(advantages, options, error, message):
    with pytest.raises(error, match=message):
        prune_completions(advantages, **options)


# ---- importance weights -------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])


def engine_inputs() -> tuple[Tensor, Tensor]:
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.1, 7.0], [1.0, 2.0, 3.0]])
    ratio = torch.tensor([[0.25, 1.5, 8.0], [0.5, 1.0, math.inf], [math.nan, 1.0, 0.0]])
    return policy, policy - ratio.log()


def test_importance_weights_of_tokens():
    truncated = importance_weights(*engine_inputs(), MASK)
    expected = torch.tensor([[0.25, 1.5, 2.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(truncated, expected)
    masked = importance_weights(*engine_inputs(), MASK, mode="mask", low=0.4, high=5.0)
    torch.testing.assert_close(masked, torch.tensor([[0, 1.5, 0], [0.5, 1.0, 0], [0, 0, 0]]))
    bounded = importance_weights(*engine_inputs(), MASK, low=0.4, high=math.inf)
    torch.testing.assert_close(bounded, torch.tensor([[0.4, 1.5, 8], [0.5, 1.0, 0], [0, 0, 0]]))


def test_importance_weights_of_sequences():
    options = {"level": "sequence", "high": 2.5}
    truncated = importance_weights(*engine_inputs(), MASK, **options)
    torch.testing.assert_close(truncated, torch.tensor([2.5, 0.5, 1.0]))  # 0.25 * 1.5 * 8 = 3
    masked = importance_weights(*engine_inputs(), MASK, mode="mask", **options)
    torch.testing.assert_close(masked, torch.tensor([0.0, 0.5, 1.0]))


def test_importance_weights_are_constants_and_stay_finite():
    policy, engine = torch.zeros(1, 3, requires_grad=True), torch.tensor([[-1e4, math.nan, 1e4]])
    weights = importance_weights(policy, engine, torch.ones(1, 3), high=math.inf)
    assert not weights.requires_grad
    assert weights.isfinite().all()
    assert weights[0, 0] > 1e19
    assert weights[0, 1:].tolist() == [1.0, 0.0]  # the engine reported none, and a certain token
    mine = torch.full((1, 3), math.nan)
    assert importance_weights(mine, policy, torch.ones(1, 3)).isnan().all()  # nothing is hidden


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"engine_log_probs": [[0.0]]}, TypeError, "engine_log_probs must be a tensor, got list"),
        ({"engine_log_probs": torch.ones(2)}, ValueError, r"must have shape \(3, 3\), as log_prob"),
        ({"level": "word"}, ValueError, r"level must be one of \['token', 'sequence'\], got 'word"),
        ({"mode": "drop"}, ValueError, r"mode must be one of \['truncate', 'mask'\], got 'drop'"),
        ({"high": 0.5}, ValueError, "high must be at least 1, got 0.5"),
        ({"low": 1.5}, ValueError, "low must be 0 to 1, got 1.5"),
        ({"low": math.nan}, ValueError, "low must be 0 to 1, got nan"),
    ],
)
def test_importance_weights_refuse_wrong_values(change, error, message):
    policy, engine = engine_inputs()
    options = {"log_probs": policy, "engine_log_probs": engine, "mask": MASK} | change
    with pytest.raises(error, match=message):
        importance_weights(**options)
