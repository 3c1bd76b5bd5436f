"""Exact attention for sequences that share prefixes, each prefix computed once.

import prefix_attn
from prefix_attn import PrefixLayout, prefix_attention
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any


def _is_command() -> bool:
    """Whether this process is the command line: `--help` and `--version` need no PyTorch.

    `python -m` has "-m" for a script until it has found its module, which is after this import.
    """
    script = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    return script.removesuffix(".exe") == "prefix-attn" or (
        script == "-m" and "prefix_attn" in sys.orig_argv
    )


# Everyone else gets PyTorch's operators registered with the import, as for an exported program.
if TYPE_CHECKING or not _is_command():
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
_CORE = {"PrefixLayout": "layout", "merge_states": "merge", "prefix_attention": "api"}


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is first used, and all else in the command line."""
    if name in _CORE:
        return getattr(importlib.import_module(f"prefix_attn.{_CORE[name]}"), name)
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
