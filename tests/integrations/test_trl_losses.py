"""The policy losses against those of TRL's own trainers: values and gradients in float64.

`_compute_loss` of a trainer runs on log-probabilities that are given to it, without a model.
"""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer

from prefix_attn.losses import (
    cispo_loss,
    dpo_loss,
    grpo_loss,
    gspo_loss,
    importance_weights,
)

B, L, MAX_LENGTH = 6, 7, 9
LENGTHS = torch.tensor([7, 1, 4, 0, 6, 7])
TOKENS = int(LENGTHS.sum())
MASK = (torch.arange(L) < LENGTHS[:, None]).long()


def inputs() -> dict[str, Tensor]:
    """Ratios far beyond the clip range, and an empty completion."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_probs = normal(B, L) - 2
    return {
        "log_probs": log_probs.clone().requires_grad_(),
        "old_log_probs": log_probs + 0.4 * normal(B, L),
        "advantages": normal(B),
        "mask": MASK,
        "reference_log_probs": log_probs + 0.5 * normal(B, L),
    }


class OneProcess:
    """What the trainer asks of accelerate."""

    num_processes = 1
    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def grpo_of_trl(
    x: dict[str, Tensor],
    loss_type: str,
    *,
    low: float,
    high: float,
    beta: float,
    level: str = "token",
    delta: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`GRPOTrainer._compute_loss` of TRL with these options and log-probabilities."""
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            x["log_probs"],
            torch.zeros(B, L, dtype=torch.float64),
            None,
        ),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=OneProcess(),
        args=types.SimpleNamespace(
            use_bias_correction_kl=False, delta=delta, steps_per_generation=1
        ),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=low,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        model=types.SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
    )
    ids = torch.zeros(B, L, dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": MASK,
        "advantages": x["advantages"],
        "old_per_token_logps": x["old_log_probs"],
        "ref_per_token_logps": x["reference_log_probs"],
        "num_items_in_batch": torch.tensor(TOKENS),
        "importance_sampling_ratio": weights,
    }
    return GRPOTrainer._compute_loss(trainer, trainer.model, batch)


def assert_same(actual: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    )


WEIGHTS = [None, "token", "sequence"]


def weights_of(kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    engine = inputs()["old_log_probs"] + torch.linspace(-0.7, 0.7, B * L).view(B, L)
    return importance_weights(inputs()["old_log_probs"], engine, MASK, level=kind, high=1.5)


def columns(weights: Tensor | None) -> Tensor | None:
    """TRL keeps a weight of a completion as (B, 1)."""
    return weights[:, None] if weights is not None and weights.dim() == 1 else weights


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_grpo_loss_is_that_of_trl(aggregation, beta, delta, weights):
    x, weights = inputs(), weights_of(weights)
    options = {"beta": beta, "delta": delta}
    actual = grpo_loss(
        **x,
        **options,
        clip_low=0.2,
        clip_high=0.28,
        weights=weights,
        aggregation=aggregation,
        max_length=MAX_LENGTH,
    )
    expected = grpo_of_trl(x, aggregation, low=0.2, high=0.28, weights=columns(weights), **options)
    assert_same(actual, expected, x["log_probs"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gspo_loss_is_that_of_trl(beta, weights):
    x, weights = inputs(), weights_of(weights)
    actual = gspo_loss(**x, clip_low=0.05, clip_high=0.1, beta=beta, weights=weights)
    expected = grpo_of_trl(
        x,
        "grpo",
        low=0.05,
        high=0.1,
        beta=beta,
        level="sequence",
        weights=columns(weights),
    )
    assert_same(actual, expected, x["log_probs"])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_cispo_loss_is_that_of_trl(beta, weights):
    """TRL's `epsilon_high` is the largest ratio itself."""
    x, weights = inputs(), weights_of(weights)
    actual = cispo_loss(**x, clip_high=0.5, beta=beta, weights=weights)
    expected = grpo_of_trl(x, "cispo", low=0.2, high=1.5, beta=beta, weights=columns(weights))
    assert_same(actual, expected, x["log_probs"])


def test_dpo_loss_is_that_of_trl():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, *reference = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    chosen.requires_grad_()
    rejected.requires_grad_()

    def model(**_: Any) -> types.SimpleNamespace:
        # One completion token per row: its log-probability is that of the completion.
        rows = torch.cat([chosen, rejected])[:, None]
        return types.SimpleNamespace(
            log_probs=rows,
            entropy=torch.zeros_like(rows),
            mean_logits=torch.zeros_like(rows),
            is_top1=rows > 0,
        )

    model.training = True
    trainer = types.SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=OneProcess(),
        aux_loss_enabled=False,
        beta=0.3,
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=model,
        precompute_ref_logps=True,
        use_weighting=False,
    )
    batch = {
        "input_ids": torch.zeros(6, 2, dtype=torch.int64),
        "attention_mask": torch.ones(6, 2),
        "completion_mask": torch.tensor([[0, 1]]).expand(6, 2),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    expected = DPOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    actual = dpo_loss(chosen, rejected, *reference, beta=0.3)
    assert_same(actual, expected, chosen, rejected)
