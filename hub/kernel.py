"""Exact attention for sequences that share prefixes, each prefix computed once.

This file becomes the `__init__.py` of the kernel, beside a copy of the modules that it needs.
"""

import importlib
from typing import Any

from prefix_attn.api import prefix_attention
from prefix_attn.bins import pack_bins
from prefix_attn.layout import PrefixLayout
from prefix_attn.merge import merge_states

__all__ = [
    "PrefixLayout",
    "disable",
    "enable",
    "flash_attn_forward",
    "losses",
    "merge_states",
    "micro_groups",
    "pack_bins",
    "prefix_attention",
    "stats",
    "supports_flash_attn",
]

# transformers looks for this name, and then takes `flash_attn_forward` for an attention function.
supports_flash_attn = True


def __getattr__(name: str) -> Any:
    """Imports what needs transformers, and the losses, when they are first used."""
    if name == "losses":
        return importlib.import_module(".losses", __name__)
    if name == "flash_attn_forward":
        attention = importlib.import_module(".integrations.transformers.attention", __name__)
        return attention.ALL_ATTENTION_FUNCTIONS[attention.SDPA_NAME]
    if name in ("disable", "enable", "micro_groups", "stats"):
        return getattr(importlib.import_module(".integrations.transformers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
