"""Exact attention for sequences that share prefixes, each prefix computed once.

import prefix_attn
from prefix_attn import PrefixLayout, prefix_attention
"""

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout

__all__ = ["PrefixLayout", "__version__", "prefix_attention"]
__version__ = "0.1.0"
