"""TRL's trainers in micro-groups: the gradients of the ordinary run, prompts run once a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3
from trl.trainer import grpo_trainer, rloo_trainer

import prefix_attn
from prefix_attn.integrations.trl import KeepGroupsMixin, MicroGroupsMixin
from tests.integrations import test_trl
from tests.integrations.test_trl import (  # noqa: F401
    exact_norm,
    make_trainer,
    model_path,
    plain_head,
    run,
    tokenizer,
)

ROUNDING = 1e4 * torch.finfo(torch.float64).eps

BASES = {trl.GRPOTrainer: trl.GRPOConfig, trl.RLOOTrainer: trl.RLOOConfig}


def step_of(
    mixin: type, base: type, places: tuple[Any, ...], patch: pytest.MonkeyPatch, **options: Any
) -> tuple[dict[str, Tensor], int]:
    """A float64 run of an enabled trainer, and how many tokens its model ran."""
    cls = type(base.__name__, (mixin, base), {"micro_group_options": {"min_tokens": 1}})
    patch.setattr(test_trl, "TRAINERS", {cls: BASES[base]})
    patch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    for module in (grpo_trainer, rloo_trainer):
        patch.setattr(module, "add_fused_lm_head", plain_head)
    trainer = make_trainer(cls, *places, torch.float64, **options)
    prefix_attn.enable(trainer.model, self_check=False)
    results = run(trainer, patch)
    return results, prefix_attn.stats(trainer.model).tokens_run


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (trl.GRPOTrainer, {"gradient_accumulation_steps": 8, "max_steps": 2}),
        (trl.RLOOTrainer, {"gradient_accumulation_steps": 4, "max_steps": 2}),
        (
            trl.GRPOTrainer,
            {"gradient_accumulation_steps": 4, "steps_per_generation": 8, "num_iterations": 2},
        ),
        (
            trl.GRPOTrainer,  # steps across generations, the last one incomplete
            {"gradient_accumulation_steps": 3, "steps_per_generation": 8, "max_steps": -1},
        ),
    ],
    ids=["GRPO", "RLOO", "iterations", "incomplete"],
)
def test_micro_groups_train_as_the_ordinary_run_does(
    base: type,
    options: dict[str, Any],
    model_path: str,  # noqa: F811
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "num_train_epochs": 1, **options}
    places = (model_path, tokenizer, tmp_path)
    expected, repeated = step_of(KeepGroupsMixin, base, places, monkeypatch, **settings)
    found, once = step_of(MicroGroupsMixin, base, places, monkeypatch, **settings)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= ROUNDING * value.abs().max(), name
    assert once < repeated
