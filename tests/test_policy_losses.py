"""The losses of policy optimisation against their definitions, in float64."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.losses import cispo_loss, dpo_loss, grpo_loss, gspo_loss, rebel_loss
from tests.test_log_probs import LargestTensor

LOSSES = [grpo_loss, gspo_loss, partial(cispo_loss, clip_high=0.5)]
LOSS_NAMES = ["grpo", "gspo", "cispo"]

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
    x: dict[str, Tensor],
    low: float,
    high: float,
    beta: float,
    *,
    sequence_level: bool,
    delta: float = math.inf,
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
        weights = x["weights"][i].expand(L)[:n] if "weights" in x else torch.ones(n)
        if sequence_level and n:
            weights = weights.mean().expand(n)
        surrogate = []
        for r, w in zip(ratio, weights, strict=True):
            bounded = 1 - low if r < 1 - low else 1 + high if r > 1 + high else r
            surrogate.append(w * min(min(r, delta) * advantage, bounded * advantage))
        kl = (ref - new).exp() - (ref - new) - 1
        losses.append(-torch.stack(surrogate) + beta * kl if n else new)
    return losses


def assert_same(actual: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    )


WEIGHTS = {
    "no weights": None,
    "weight of a completion": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64),
    "weight of a token": torch.linspace(0.0, 2.0, B * L, dtype=torch.float64).view(B, L),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("delta", [None, 1.4])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_weights_and_dual_clip_match_definition(beta, delta, weights):
    x = policy()
    if WEIGHTS[weights] is not None:
        x["weights"] = WEIGHTS[weights]
    bound = math.inf if delta is None else delta
    losses = by_definition(x, 0.2, 0.28, beta, sequence_level=False, delta=bound)
    expected = sum(tokens.mean() for tokens in losses if len(tokens)) / B
    actual = grpo_loss(**x, clip_high=0.28, beta=beta, delta=delta)
    assert_same(actual, expected, x["log_probs"])
    losses = by_definition(x, 0.05, 0.1, beta, sequence_level=True, delta=bound)
    expected = sum(tokens.mean() for tokens in losses if len(tokens)) / B
    actual = gspo_loss(**x, clip_low=0.05, clip_high=0.1, beta=beta, delta=delta)
    assert_same(actual, expected, x["log_probs"])


def test_dual_clip_bounds_the_loss_of_a_bad_completion():
    log_probs, mask = torch.zeros(1, 1), torch.ones(1, 1)
    args = log_probs, log_probs - math.log(50.0), torch.tensor([-2.0]), mask
    torch.testing.assert_close(grpo_loss(*args), torch.tensor(100.0))
    torch.testing.assert_close(grpo_loss(*args, delta=3.0), torch.tensor(6.0))


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cispo_loss_matches_definition(weights, beta, aggregation):
    x = policy()
    if WEIGHTS[weights] is not None:
        x["weights"] = WEIGHTS[weights]
    losses = []
    for i in range(B):
        n = int(x["mask"][i].sum())
        new, old, ref = (x[k][i, :n] for k in ("log_probs", "old_log_probs", "reference_log_probs"))
        factor = [min(max(r, 0.9), 1.2) for r in (new - old).exp().tolist()]
        weight = x["weights"][i].expand(L)[:n] if "weights" in x else torch.ones(n)
        kl = (ref - new).exp() - (ref - new) - 1
        policy_term = -weight * new.new_tensor(factor) * x["advantages"][i] * new
        losses.append(policy_term + beta * kl)
    expected = {
        "grpo": sum(tokens.mean() for tokens in losses if len(tokens)) / B,
        "dapo": torch.cat(losses).sum() / 18,
        "dr_grpo": torch.cat(losses).sum() / (B * 9),
    }[aggregation]
    options = {"beta": beta, "aggregation": aggregation, "max_length": 9}
    actual = cispo_loss(**x, clip_low=0.1, clip_high=0.2, **options)
    assert_same(actual, expected, x["log_probs"])


def test_cispo_loss_gives_every_token_a_gradient():
    x = policy()
    (cispo,) = torch.autograd.grad(cispo_loss(**x, clip_high=0.2), x["log_probs"])
    assert torch.equal(cispo != 0, x["mask"].bool())
    (grpo,) = torch.autograd.grad(grpo_loss(**x), x["log_probs"])
    assert (grpo[x["mask"].bool()] == 0).any()


# ---- REBEL --------------------------------------------------------------------------------------

GROUPS = [2, 1, 2]


def rebel_inputs() -> dict[str, Tensor]:
    x = policy()
    names = ("log_probs", "old_log_probs", "mask")
    return {k: x[k] for k in names} | {"rewards": x["advantages"], "group_sizes": GROUPS}


def double_sum(log_probs, old_log_probs, rewards, mask, group_sizes, eta) -> Tensor:
    """The definition of REBEL's loss: every pair of every group."""
    d = ((log_probs - old_log_probs) * mask).sum(1)
    total, start = d.new_zeros(()), 0
    for size in group_sizes:
        members = range(start, start + size)
        pairs = [(i, j) for i in members for j in members if i != j]
        squares = [(d[i] - d[j] - eta * (rewards[i] - rewards[j])) ** 2 for i, j in pairs]
        total = total + (sum(squares) / len(squares) if squares else 0.0)
        start += size
    return total / len(group_sizes)


@pytest.mark.parametrize("eta", [1.0, 2.5])
@pytest.mark.parametrize("sizes", [[5], [2, 1, 2], [1, 4], [1] * 5, 5])
def test_rebel_loss_matches_the_sum_over_pairs(sizes, eta):
    x = rebel_inputs() | {"group_sizes": sizes}
    definition = x | {"group_sizes": [5] if sizes == 5 else sizes}
    expected = double_sum(**definition, eta=eta) + 0 * x["log_probs"].sum()
    assert_same(rebel_loss(**x, eta=eta), expected, x["log_probs"])


def test_rebel_loss_is_twice_the_variance():
    rewards = torch.rand(8, dtype=torch.float64)
    log_ratios = 0.1 * torch.randn(8, 1, dtype=torch.float64)
    mask = torch.ones(8, 1)
    actual = rebel_loss(log_ratios, torch.zeros_like(log_ratios), rewards, mask, 8, eta=2.0)
    torch.testing.assert_close(actual, 2 * (log_ratios[:, 0] - 2 * rewards).var())


def test_rebel_loss_of_equal_errors_is_zero():
    """Also where their mean is rounded."""
    for size in range(1, 12):
        x = torch.zeros(size, 1), None, torch.full((size,), 0.7), torch.ones(size, 1), size
        assert rebel_loss(*x).item() == 0.0


def test_rebel_loss_of_a_group_of_one_and_of_no_tokens():
    x = rebel_inputs() | {"group_sizes": [1] * 5}
    loss = rebel_loss(**x)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, x["log_probs"])[0].any()
    nothing = rebel_inputs() | {"mask": torch.zeros(B, L), "group_sizes": 5}
    torch.testing.assert_close(rebel_loss(**nothing), 2 * nothing["rewards"].var())


def test_rebel_loss_takes_memory_linear_in_the_group():
    log_probs = torch.randn(3000, 2, requires_grad=True)
    with LargestTensor() as largest:
        rebel_loss(log_probs, None, torch.randn(3000), torch.ones(3000, 2), 3000).backward()
    assert largest.elements == 6000


# ---- GRPO and GSPO ------------------------------------------------------------------------------


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
    assert_same(actual, expected, x["log_probs"])


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_gspo_loss_matches_definition(beta):
    x = policy()
    losses = by_definition(x, 0.05, 0.1, beta, sequence_level=True)
    expected = sum(tokens.mean() for tokens in losses if len(tokens)) / B
    actual = gspo_loss(**x, clip_low=0.05, clip_high=0.1, beta=beta)
    assert_same(actual, expected, x["log_probs"])


def test_policy_losses_pass_gradcheck():
    x = policy()
    log_probs = x.pop("log_probs")
    for loss in (grpo_loss, gspo_loss):  # CISPO's gradient is not that of its value
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, **x, beta=0.1), [log_probs])


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_NAMES)
def test_first_step_is_the_policy_gradient(loss):
    """With the sampling policy itself every ratio is 1, but has a gradient."""
    x = policy()
    actual = loss(x["log_probs"], None, x["advantages"], x["mask"])
    same = loss(x["log_probs"], x["log_probs"].detach(), x["advantages"], x["mask"])
    torch.testing.assert_close(actual, same)
    lengths = x["mask"].sum(1).clamp(min=1)
    if loss is LOSSES[2]:  # the mean over all tokens
        lengths = torch.tensor(18 / B)
    expected = -(x["advantages"] / lengths / B)[:, None] * x["mask"]
    (grad,) = torch.autograd.grad(actual, x["log_probs"])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_NAMES)
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
        (grpo_loss, {"aggregation": "grpo", "beta": 0.1}, 5),
        (grpo_loss, {"aggregation": "dapo"}, torch.tensor(18.0)),
        (grpo_loss, {"aggregation": "dr_grpo", "max_length": 9}, 45),
        (gspo_loss, {"beta": 0.1}, 5),
        (cispo_loss, {"clip_high": 0.2}, 18),
        (cispo_loss, {"clip_high": 0.2, "aggregation": "grpo"}, np.int64(5)),
    ],
)
def test_parts_of_a_batch_sum_to_the_whole(loss, options, denominator):
    x = policy() | {"weights": WEIGHTS["weight of a token"]}
    parts = [
        loss(**{k: v[rows] for k, v in x.items()}, **options, denominator=denominator)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert_same(sum(parts), loss(**x, **options), x["log_probs"])


def test_parts_of_rebel_loss_sum_to_the_whole():
    x = rebel_inputs()
    parts = [
        rebel_loss(
            **{k: v[rows] for k, v in x.items() if k != "group_sizes"},
            group_sizes=sizes,
            denominator=3,
        )
        for rows, sizes in ((slice(0, 3), [2, 1]), (slice(3, 5), [2]))
    ]
    assert_same(sum(parts), rebel_loss(**x), x["log_probs"])


def test_parts_of_dpo_loss_sum_to_the_whole():
    x = torch.randn(4, 5, dtype=torch.float64)
    chosen, rejected = x[0].clone().requires_grad_(), x[1].clone().requires_grad_()
    pairs = chosen, rejected, x[2], x[3]
    rows = slice(0, 2), slice(2, 5), slice(5, 5)  # a part may be empty
    parts = [dpo_loss(*(v[r] for v in pairs), denominator=5) for r in rows]
    assert_same(sum(parts), dpo_loss(*pairs), chosen, rejected)
    with pytest.raises(ValueError, match="no pairs to take the mean of: pass denominator"):
        dpo_loss(*(v[:0] for v in pairs))


def test_dpo_loss_of_an_impossible_completion_is_the_limit():
    """The policy or the reference gives it no probability, such as by a bias of -inf."""
    never, other = torch.tensor([-math.inf]), torch.tensor([-1.0])
    rejected = never.clone().requires_grad_()
    loss = dpo_loss(other, rejected, other, other)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, rejected)[0].item() == 0.0
    assert dpo_loss(other, other, never, other).item() == 0.0
    assert dpo_loss(never, other, other, other).item() == math.inf
    assert dpo_loss(other, never, other, other, label_smoothing=0.1).item() == math.inf


# ---- large ratios -------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("jump", [60.0, 100.0, 1000.0, math.inf], ids=str)
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_NAMES)
def test_one_large_ratio_leaves_loss_and_gradients_finite(loss, advantage, jump, dtype):
    """A ratio of one token that exp can't hold, and a reference that far above the policy."""
    log_probs = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
    old, reference = log_probs.detach().clone(), log_probs.detach().clone()
    old[0, 1] -= jump
    reference[1, 2] += min(jump, 1e4)
    x = old, torch.tensor([advantage, 1.0], dtype=dtype), torch.ones(2, 3)
    total = loss(log_probs, *x, reference_log_probs=reference, beta=0.1)
    (grad,) = torch.autograd.grad(total, log_probs)
    assert total.isfinite()
    assert grad.isfinite().all()
    # The other tokens learn what they would without it.
    reference[1, 2] = -1.0
    if loss is not gspo_loss:
        old[0, 1] = -1.0
    (calm,) = torch.autograd.grad(
        loss(log_probs, *x, reference_log_probs=reference, beta=0.1), log_probs
    )
    others = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(grad[others], calm[others])


@pytest.mark.parametrize("loss", [grpo_loss, gspo_loss])
@pytest.mark.parametrize(
    ("dtype", "log_ratio"), [(torch.float16, 5.5), (torch.float32, 44.0), (torch.float64, 354.0)]
)
def test_ratios_below_the_bound_are_exact(loss, dtype, log_ratio):
    log_probs = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    old = torch.full((1, 1), -log_ratio, dtype=dtype)
    total = loss(log_probs, old, -torch.ones(1, dtype=dtype), torch.ones(1, 1))
    (grad,) = torch.autograd.grad(total, log_probs)
    expected = torch.tensor(math.exp(log_ratio), dtype=total.dtype)
    torch.testing.assert_close(total.detach(), expected)
    torch.testing.assert_close(grad[0, 0], expected.to(dtype))


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_NAMES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_half_types_are_computed_in_float32(loss, dtype):
    x = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in policy().items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    leaves = x["log_probs"].requires_grad_(), wide["log_probs"].requires_grad_()
    actual, expected = loss(**x, beta=0.1), loss(**wide, beta=0.1)
    assert torch.equal(actual, expected)
    actual.backward()
    expected.backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad.to(dtype))


# ---- what is taken and what is refused ----------------------------------------------------------


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
        ({"beta": -1.0}, "beta must be at least 0 and finite, got -1.0"),
        ({"clip_low": 1.5}, "clip_low must be 0 to 1, got 1.5"),
        ({"clip_high": -0.1}, "clip_high must be at least 0, got -0.1"),
        ({"clip_high": math.nan}, "clip_high must be at least 0, got nan"),
        ({"beta": math.inf}, "beta must be at least 0 and finite, got inf"),
        ({"weights": torch.ones(3)}, r"weights must have shape \(5,\) or \(5, 7\), got \(3,\)"),
        ({"weights": torch.ones(B, requires_grad=True)}, "weights must not require gradients"),
        ({"denominator": 0}, "denominator must be positive and finite, got 0"),
        ({"denominator": math.nan}, "denominator must be positive and finite, got nan"),
        ({"denominator": 1e-320}, "denominator must be .* for values of torch.float64, got 1"),
        ({"denominator": torch.tensor(0)}, "denominator must be positive and finite, got 0"),
        ({"denominator": torch.tensor(math.nan)}, "positive and finite, got nan"),
        ({"denominator": torch.ones(2)}, r"a tensor of one .* got shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_NAMES)
def test_policy_losses_refuse_wrong_values(loss, change, message):
    if isinstance(loss, partial):
        loss = loss.func
        change = {"clip_high": 0.5} | change
    with pytest.raises(ValueError, match=message):
        loss(**(policy() | change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("log_probs", [[1.0]], "log_probs must be a tensor, got list"),
        ("advantages", [1.0], "advantages must be a tensor, got list"),
        ("mask", None, "mask must be a tensor, got NoneType"),
        ("old_log_probs", [[1.0]], "old_log_probs must be a tensor, got list"),
        ("weights", 2.0, "weights must be a tensor, got float"),
        ("clip_low", "0.2", "clip_low must be a number, got str '0.2'"),
        ("beta", True, "beta must be a number, got bool True"),
        ("denominator", [5], r"denominator must be a number, got list \[5\]"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_NAMES)
def test_policy_losses_refuse_wrong_types(loss, name, value, message):
    with pytest.raises(TypeError, match=message):
        loss(**(policy() | {name: value}))


@pytest.mark.parametrize("loss", [grpo_loss, gspo_loss])
def test_dual_clip_below_the_clip_range_is_refused(loss):
    with pytest.raises(ValueError, match=r"delta must be above 1 \+ clip_high, 1\.5, got 1\.4"):
        loss(**policy(), clip_high=0.5, delta=1.4)
    with pytest.raises(ValueError, match="delta must be at least 1, got nan"):
        loss(**policy(), delta=math.nan)


def test_numbers_of_numpy_are_numbers():
    x = policy()
    python = {"clip_low": 0.25, "clip_high": 0.5, "beta": 0.5, "delta": 2.0, "denominator": 3}
    numpy = {k: np.float32(v) for k, v in python.items()} | {"denominator": np.int64(3)}
    options = {"aggregation": "dr_grpo", "max_length": np.int32(9)}
    actual = grpo_loss(**x, **numpy, **options)
    assert torch.equal(actual, grpo_loss(**x, **python, aggregation="dr_grpo", max_length=9))


def test_bounds_beyond_the_dtype_are_none():
    """In float32, where 1e300 is infinite."""
    x = {k: v.detach().float() if v.is_floating_point() else v for k, v in policy().items()}
    wide = grpo_loss(**x, clip_high=1e300)
    assert torch.equal(wide, grpo_loss(**x, clip_high=math.inf))
    assert wide.isfinite()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": [1.0] * 5}, TypeError, "rewards must be a tensor, got list"),
        (
            {"rewards": torch.ones(B, L)},
            ValueError,
            r"rewards must have shape \(5,\), got \(5, 7\)",
        ),
        ({"group_sizes": 2}, ValueError, "5 completions don't make groups of 2"),
        ({"group_sizes": 2.5}, TypeError, "group_sizes must be an integer or a sequence .* 2.5"),
        (
            {"group_sizes": [2.0, 3]},
            TypeError,
            r"group_sizes\[0\] must be an integer, got float 2",
        ),
        ({"eta": 0}, ValueError, "eta must be positive and finite, got 0"),
        ({"eta": math.nan}, ValueError, "eta must be positive and finite, got nan"),
        ({"denominator": 0}, ValueError, "denominator must be positive and finite, got 0"),
    ],
)
def test_rebel_loss_refuses_wrong_values(change, error, message):
    with pytest.raises(error, match=message):
        rebel_loss(**(rebel_inputs() | change))


@pytest.mark.parametrize("loss", [*LOSSES, rebel_loss], ids=[*LOSS_NAMES, "rebel"])
def test_losses_compile_into_one_graph(loss):
    x = rebel_inputs() if loss is rebel_loss else policy()
    denominator = torch.tensor(4.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(**x, denominator=denominator), loss(**x, denominator=denominator)
    assert_same(actual, expected, x["log_probs"])


def test_grpo_loss_refuses_wrong_aggregation():
    with pytest.raises(ValueError, match=r"one of \['grpo', 'dapo', 'dr_grpo'\], got 'mean'"):
        grpo_loss(**policy(), aggregation="mean")
    with pytest.raises(ValueError, match="needs a positive max_length, got None"):
        grpo_loss(**policy(), aggregation="dr_grpo")
    empty = torch.zeros(0, 3)
    with pytest.raises(ValueError, match="no completions to take the mean of"):
        grpo_loss(empty, None, torch.zeros(0), empty)


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
    with pytest.raises(TypeError, match="rejected_log_probs must be a tensor, got list"):
        dpo_loss(x[0], [0.0] * 3, x[2], x[3])
