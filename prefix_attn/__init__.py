"""Exact attention for sequences that share prefixes, each prefix computed once.

import prefix_attn
from prefix_attn import PrefixLayout, prefix_attention
"""

from typing import TYPE_CHECKING, Any

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.merge import merge_states

if TYPE_CHECKING:
    from prefix_attn.integrations.transformers import disable, enable, stats

__all__ = [
    "PrefixLayout",
    "__version__",
    "disable",
    "enable",
    "merge_states",
    "prefix_attention",
    "stats",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is first used."""
    if name not in ("disable", "enable", "stats"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from prefix_attn.integrations import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"prefix_attn.{name} needs transformers: pip install prefix-attn[hf]"
        ) from error
    return getattr(transformers, name)
