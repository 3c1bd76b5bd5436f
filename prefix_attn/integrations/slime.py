"""Hooks for slime: shared prefixes in the Megatron-core models that it trains and scores with.

--custom-megatron-before-train-step-hook-path prefix_attn.integrations.slime.before_train_step
--custom-megatron-before-log-prob-hook-path prefix_attn.integrations.slime.before_log_prob
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefix_attn.integrations.megatron import enable


def before_train_step(
    args: Any,
    rollout_id: int,
    step_id: int,
    model: Sequence[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
) -> None:
    """Enables the chunks of the model before their first step; later calls change nothing.

    Raises:
        NotImplementedError: if the model would be wrong on a packed row, with all reasons.
    """
    enable(model)


def before_log_prob(args: Any, model: Sequence[torch.nn.Module], store_prefix: str) -> None:
    """Enables the chunks of the model before log-probabilities are computed with them.

    Raises:
        NotImplementedError: if the model would be wrong on a packed row, with all reasons.
    """
    enable(model)
