"""The policy losses against verl's own functions: values and gradients in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import (
    agg_loss,
    compute_grpo_outcome_advantage,
    get_policy_loss_fn,
    kl_penalty,
)
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

from prefix_attn.losses import (
    cispo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    importance_weights,
)

B, L, MAX_LENGTH = 6, 7, 9
LENGTHS = torch.tensor([7, 1, 4, 2, 6, 7])
MASK = (torch.arange(L) < LENGTHS[:, None]).double()
# What verl calls them: its names leave completions without tokens out of the count.
MODES = {"grpo": "seq-mean-token-mean", "dapo": "token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


def inputs() -> dict[str, Tensor]:
    """Ratios far beyond the clip range."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_probs = normal(B, L) - 2
    return {
        "log_probs": log_probs.clone().requires_grad_(),
        "old_log_probs": log_probs + 0.8 * normal(B, L),
        "advantages": normal(B),
        "mask": MASK,
    }


def loss_of_verl(
    name: str, x: dict[str, Tensor], mode: str, weights: Tensor | None, **options: float
) -> Tensor:
    actor = ActorConfig(
        strategy="fsdp",
        rollout_n=2,
        ppo_mini_batch_size=B,
        ppo_micro_batch_size_per_gpu=B,
        global_batch_info={"loss_scale_factor": MAX_LENGTH},
        **options,
    )
    return get_policy_loss_fn(name)(
        old_log_prob=x["old_log_probs"],
        log_prob=x["log_probs"],
        advantages=x["advantages"][:, None].expand(B, L),
        response_mask=MASK,
        loss_agg_mode=mode,
        config=actor,
        rollout_is_weights=weights,
    )[0]


def assert_same(actual: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    # verl adds 1e-8 to the number of tokens.
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=2e-8)
    close(actual, expected)
    close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


def engine_log_probs() -> Tensor:
    return inputs()["old_log_probs"] + torch.linspace(-1.2, 1.2, B * L).view(B, L)


def weights_of(kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    return importance_weights(inputs()["old_log_probs"], engine_log_probs(), MASK, level=kind)


def columns(weights: Tensor | None) -> Tensor | None:
    return weights[:, None] if weights is not None and weights.dim() == 1 else weights


@pytest.mark.parametrize("weights", [None, "token", "sequence"])
@pytest.mark.parametrize("delta", [1.5, 3.0])
@pytest.mark.parametrize("aggregation", MODES)
def test_grpo_loss_is_that_of_verl(aggregation, delta, weights):
    """verl always has the dual clip."""
    x, weights = inputs(), weights_of(weights)
    actual = grpo_loss(
        **x,
        clip_low=0.2,
        clip_high=0.28,
        delta=delta,
        weights=weights,
        aggregation=aggregation,
        max_length=MAX_LENGTH,
    )
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": delta}
    expected = loss_of_verl("vanilla", x, MODES[aggregation], columns(weights), **options)
    assert_same(actual, expected, x["log_probs"])


@pytest.mark.parametrize("weights", [None, "token", "sequence"])
def test_gspo_loss_is_that_of_verl(weights):
    x, weights = inputs(), weights_of(weights)
    actual = gspo_loss(**x, clip_low=0.05, clip_high=0.1, weights=weights)
    options = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}
    expected = loss_of_verl("gspo", x, MODES["grpo"], columns(weights), **options)
    if weights is None or weights.dim() == 1:
        assert_same(actual, expected, x["log_probs"])
        return
    # verl weighs the gradient of each token by its own weight. Here, as in TRL, a completion's
    # ratio has one gradient, weighed by their mean: equal in sum over the tokens.
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad(loss, x["log_probs"])[0].sum(1) for loss in (actual, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("weights", [None, "token", "sequence"])
@pytest.mark.parametrize("aggregation", MODES)
def test_cispo_loss_is_that_of_verl(aggregation, weights):
    x, weights = inputs(), weights_of(weights)
    options = {"weights": weights, "aggregation": aggregation, "max_length": MAX_LENGTH}
    actual = cispo_loss(**x, clip_low=0.3, clip_high=0.5, **options)
    clips = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.5}
    expected = loss_of_verl("cispo", x, MODES[aggregation], columns(weights), **clips)
    assert_same(actual, expected, x["log_probs"])


def test_kl_term_is_that_of_verl():
    x = inputs()
    reference = x["old_log_probs"] - 0.3
    nothing = x | {"advantages": torch.zeros(B, dtype=torch.float64)}
    actual = grpo_loss(**nothing, reference_log_probs=reference, beta=1.0, aggregation="dapo")
    expected = agg_loss(kl_penalty(x["log_probs"], reference, "low_var_kl"), MASK, "token-mean")
    assert_same(actual, expected, x["log_probs"])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"mode": "truncate", "high": 1.7}, 1.7),
        ({"mode": "mask", "low": 0.5, "high": 1.7}, "0.5_1.7"),
    ],
)
def test_importance_weights_are_those_of_verl(level, options, threshold):
    old, engine = inputs()["old_log_probs"], engine_log_probs()
    actual = importance_weights(old, engine, MASK, level=level, **options)
    expected, _ = compute_rollout_correction_weights(
        old - engine, MASK, rollout_is=level, rollout_is_threshold=threshold
    )
    torch.testing.assert_close(columns(actual) * MASK, expected)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_group_advantages_are_those_of_verl(scale):
    rewards = torch.tensor([1.0, 0.0, 0.5, 4.0, 2.0, 5.0], dtype=torch.float64)
    at_the_end = torch.zeros(B, L, dtype=torch.float64)
    at_the_end[:, 0] = rewards
    expected, _ = compute_grpo_outcome_advantage(
        at_the_end,
        torch.ones(B, L, dtype=torch.float64),
        np.array(["a", "a", "a", "b", "b", "b"]),
        norm_adv_by_std_in_grpo=scale == "group",
    )
    actual = group_advantages(rewards, 3, scale=scale, eps=1e-6)
    torch.testing.assert_close(actual, expected[:, 0])
