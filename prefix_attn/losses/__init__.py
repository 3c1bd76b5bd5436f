"""Log-probabilities without logits, and the losses of policy optimisation on top of them."""

from prefix_attn.losses.advantages import (
    group_advantages,
    importance_weights,
    kalman_advantages,
    prune_completions,
)
from prefix_attn.losses.log_probs import (
    Completions,
    completion_log_probs,
    packed_log_probs,
    token_log_probs,
)
from prefix_attn.losses.policy import cispo_loss, dpo_loss, grpo_loss, gspo_loss, rebel_loss
from prefix_attn.shards import RowShard, shard_rows

__all__ = [
    "Completions",
    "RowShard",
    "cispo_loss",
    "completion_log_probs",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "gspo_loss",
    "importance_weights",
    "kalman_advantages",
    "packed_log_probs",
    "prune_completions",
    "rebel_loss",
    "shard_rows",
    "token_log_probs",
]
