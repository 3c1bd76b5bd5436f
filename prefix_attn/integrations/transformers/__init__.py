"""Shares prefixes inside a transformers model whose callers keep their ordinary batches.

Importing it registers `attn_implementation="prefix_attn"`.
"""

from prefix_attn.integrations.packing import PackingStats
from prefix_attn.integrations.transformers.enable import disable, enable, stats
from prefix_attn.integrations.transformers.micro_groups import MicroGroups, micro_groups

__all__ = ["MicroGroups", "PackingStats", "disable", "enable", "micro_groups", "stats"]
