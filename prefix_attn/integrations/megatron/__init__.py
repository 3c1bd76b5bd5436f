"""Shares prefixes inside a Megatron-core GPTModel whose callers keep their ordinary batches."""

from prefix_attn.integrations.megatron.enable import disable, enable, stats
from prefix_attn.integrations.packing import PackingStats

__all__ = ["PackingStats", "disable", "enable", "stats"]
