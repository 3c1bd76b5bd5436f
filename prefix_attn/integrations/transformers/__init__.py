"""Shares prefixes inside a transformers model whose callers keep their ordinary batches.

Importing it registers `attn_implementation="prefix_attn"`.
"""

from prefix_attn.integrations.transformers.enable import PackingStats, disable, enable, stats

__all__ = ["PackingStats", "disable", "enable", "stats"]
