"""Log-probabilities without logits, and the losses of policy optimisation on top of them."""

from prefix_attn.losses.log_probs import (
    Completions,
    completion_log_probs,
    packed_log_probs,
    token_log_probs,
)
from prefix_attn.losses.policy import dpo_loss, group_advantages, grpo_loss, gspo_loss

__all__ = [
    "Completions",
    "completion_log_probs",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "gspo_loss",
    "packed_log_probs",
    "token_log_probs",
]
