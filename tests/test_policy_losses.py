"""The losses of policy optimisation against their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.losses import dpo_loss, group_advantages, grpo_loss, gspo_loss

B, L = 5, 7


def policy() -> dict[str, Tensor]:
    """Ragged completions (one of them empty) with ratios far beyond the clip range."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([7, 1, 4, 0, 6])
    log_probs = normal(B, L)
    return {
        "log_probs": log_probs.requires_grad_(),
        "old_log_probs": log_probs.detach() + 0.3 * normal(B, L),
        "advantages": normal(B),
        "mask": (torch.arange(L) < lengths[:, None]).long(),
        "reference_log_probs": log_probs.detach() + 0.5 * normal(B, L),
    }


def by_definition(
    x: dict[str, Tensor], low: float, high: float, beta: float, *, sequence_level: bool
) -> list[Tensor]:
    """Per completion the losses of its tokens, one scalar at a time."""
    losses = []
    for i in range(B):
        n = int(x["mask"][i].sum())
        new, old, ref = (x[k][i, :n] for k in ("log_probs", "old_log_probs", "reference_log_probs"))
        ratio = (new - old).exp()
        if sequence_level and n:
            ratio = ((new.sum() - old.sum()) / n).exp().expand(n)
        advantage = x["advantages"][i]
        surrogate = []
        for r in ratio:
            bounded = 1 - low if r < 1 - low else 1 + high if r > 1 + high else r
            surrogate.append(min(r * advantage, bounded * advantage))
        kl = (ref - new).exp() - (ref - new) - 1
        losses.append(-torch.stack(surrogate) + beta * kl if n else new)
    return losses


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_grpo_loss_matches_definition(aggregation, beta):
    x = policy()
    losses = by_definition(x, 0.2, 0.28, beta, sequence_level=False)
    expected = {
        "grpo": sum(tokens.mean() for tokens in losses if len(tokens)) / B,
        "dapo": torch.cat(losses).sum() / 18,
        "dr_grpo": torch.cat(losses).sum() / (B * 9),
    }[aggregation]
    actual = grpo_loss(**x, clip_high=0.28, beta=beta, aggregation=aggregation, max_length=9)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, x["log_probs"]), torch.autograd.grad(expected, x["log_probs"])
    )


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_gspo_loss_matches_definition(beta):
    x = policy()
    losses = by_definition(x, 0.05, 0.1, beta, sequence_level=True)
    expected = sum(tokens.mean() for tokens in losses if len(tokens)) / B
    actual = gspo_loss(**x, clip_low=0.05, clip_high=0.1, beta=beta)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, x["log_probs"]), torch.autograd.grad(expected, x["log_probs"])
    )


def test_policy_losses_pass_gradcheck():
    x = policy()
    log_probs = x.pop("log_probs")
    for loss in (grpo_loss, gspo_loss):
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, **x, beta=0.1), [log_probs])


@pytest.mark.parametrize("loss", [grpo_loss, gspo_loss])
def test_first_step_is_the_policy_gradient(loss):
    """With the sampling policy itself every ratio is 1, but has a gradient."""
    x = policy()
    actual = loss(x["log_probs"], None, x["advantages"], x["mask"])
    same = loss(x["log_probs"], x["log_probs"].detach(), x["advantages"], x["mask"])
    torch.testing.assert_close(actual, same)
    lengths = x["mask"].sum(1).clamp(min=1)
    expected = -(x["advantages"] / lengths / B)[:, None] * x["mask"]
    (grad,) = torch.autograd.grad(actual, x["log_probs"])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("loss", [grpo_loss, gspo_loss])
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan])
def test_padding_has_no_influence(loss, garbage):
    x = policy()
    expected = loss(**x, beta=0.1)
    (expected_grad,) = torch.autograd.grad(expected, x["log_probs"])
    padding = x["mask"] == 0
    for name in ("log_probs", "old_log_probs", "reference_log_probs"):
        x[name] = x[name].detach().masked_fill(padding, garbage)
    x["log_probs"].requires_grad_()
    actual = loss(**x, beta=0.1)
    (grad,) = torch.autograd.grad(actual, x["log_probs"])
    assert torch.equal(actual, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize(
    ("loss", "options", "denominator"),
    [
        (grpo_loss, {"aggregation": "grpo"}, 5),
        (grpo_loss, {"aggregation": "dapo"}, torch.tensor(18.0)),
        (grpo_loss, {"aggregation": "dr_grpo", "max_length": 9}, 45),
        (gspo_loss, {}, 5),
    ],
)
def test_parts_of_a_batch_sum_to_the_whole(loss, options, denominator):
    x = policy()
    whole = loss(**x, **options)
    parts = [
        loss(**{k: v[rows] for k, v in x.items()}, **options, denominator=denominator)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_dapo_loss_without_tokens_is_zero():
    x = policy() | {"mask": torch.zeros(B, L)}
    assert grpo_loss(**x, aggregation="dapo").item() == 0.0


def test_token_advantages_are_taken_as_they_are():
    x = policy()
    expected = grpo_loss(**x)
    spread = x | {"advantages": x["advantages"][:, None].expand(B, L).clone()}
    torch.testing.assert_close(grpo_loss(**spread), expected)
    with pytest.raises(ValueError, match=r"advantages must have shape \(5,\), one per"):
        gspo_loss(**spread)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(B, 3)}, r"mask must have shape \(5, 7\).*got \(5, 3\)"),
        ({"advantages": torch.ones(3)}, r"advantages must have shape .* got \(3,\)"),
        ({"old_log_probs": torch.zeros(B, L, requires_grad=True)}, "old_log_probs must not req"),
        ({"reference_log_probs": None, "beta": 0.1}, "beta is 0.1: reference_log_probs"),
        ({"beta": -1.0}, "beta must be a number of at least 0, got -1.0"),
        ({"clip_low": 1.5}, "clip_low must be 0 to 1, got 1.5"),
        ({"clip_high": -0.1}, "clip_high must be at least 0, got -0.1"),
        ({"denominator": 0}, "denominator must be positive and finite, got 0"),
    ],
)
@pytest.mark.parametrize("loss", [grpo_loss, gspo_loss])
def test_policy_losses_refuse_wrong_values(loss, change, message):
    with pytest.raises(ValueError, match=message):
        loss(**(policy() | change))


def test_grpo_loss_refuses_wrong_aggregation():
    with pytest.raises(ValueError, match=r"one of \['grpo', 'dapo', 'dr_grpo'\], got 'mean'"):
        grpo_loss(**policy(), aggregation="mean")
    with pytest.raises(ValueError, match="needs a positive max_length, got None"):
        grpo_loss(**policy(), aggregation="dr_grpo")
    empty = torch.zeros(0, 3)
    with pytest.raises(ValueError, match="no completions to take the mean of"):
        grpo_loss(empty, None, torch.zeros(0), empty)


def test_group_advantages_match_each_group_alone():
    rewards = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0, 5.0], dtype=torch.float64)
    actual = group_advantages(rewards, [3, 1, 2])
    first = (rewards[:3] - rewards[:3].mean()) / (rewards[:3].std() + 1e-4)
    last = (rewards[4:] - 3.5) / (math.sqrt(4.5) + 1e-4)
    torch.testing.assert_close(actual, torch.cat([first, torch.zeros(1), last]))
    equal = group_advantages(torch.ones(4), 2)
    assert not equal.any()
    with pytest.raises(ValueError, match="6 rewards don't make groups of 4"):
        group_advantages(rewards, 4)
    with pytest.raises(ValueError, match=r"group_sizes \[3, 2\] must be positive and sum to 6"):
        group_advantages(rewards, [3, 2])


def test_dpo_loss_matches_definition():
    x = [v.detach() for v in torch.randn(4, 3, dtype=torch.float64)]
    chosen, rejected = (v.requires_grad_() for v in x[:2])
    margin = 0.3 * ((chosen - x[2]) - (rejected - x[3]))
    expected = (0.9 * F.softplus(-margin) + 0.1 * F.softplus(margin)).mean()
    actual = dpo_loss(chosen, rejected, x[2], x[3], beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, [chosen, rejected]),
        torch.autograd.grad(expected, [chosen, rejected]),
    )
    with pytest.raises(ValueError, match="reference_chosen_log_probs must not require gradients"):
        dpo_loss(x[2], x[3], chosen, rejected)
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 to 0\.5, got 0\.7"):
        dpo_loss(*x, label_smoothing=0.7)
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        dpo_loss(*x, beta=0)
