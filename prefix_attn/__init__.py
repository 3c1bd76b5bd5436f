"""Exact attention for sequences that share prefixes, each prefix computed once.

import prefix_attn
from prefix_attn import PrefixLayout, prefix_attention
"""

import importlib
import os
import sys
from importlib.util import find_spec
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
    from prefix_attn.bins import pack_bins
    from prefix_attn.layout import PrefixLayout
    from prefix_attn.merge import merge_states
if TYPE_CHECKING:
    from prefix_attn.integrations.transformers.enable import disable, enable, stats
    from prefix_attn.integrations.transformers.micro_groups import micro_groups

__version__ = "0.1.0"
__all__ = ["PrefixLayout", "__version__", "merge_states", "pack_bins", "prefix_attention"]
if TYPE_CHECKING or find_spec("transformers"):  # imported when they are first used
    __all__ += ["disable", "enable", "micro_groups", "stats"]
_CORE = {
    "PrefixLayout": "layout",
    "merge_states": "merge",
    "pack_bins": "bins",
    "prefix_attention": "api",
}


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is first used, and all else in the command line."""
    if name in _CORE:
        return getattr(importlib.import_module(f"prefix_attn.{_CORE[name]}"), name)
    if name not in ("disable", "enable", "micro_groups", "stats"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prefix_attn.integrations import OLDEST_TRANSFORMERS as OLDEST

    try:
        from prefix_attn.integrations import transformers
    except ImportError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        raise ImportError(
            f"prefix_attn.{name} needs transformers {OLDEST} or newer ({error}): pip install "
            f"'transformers>={OLDEST}', or pip install '.[hf]' in a checkout of prefix_attn"
        ) from error
    return getattr(transformers, name)


def __dir__() -> list[str]:
    """What is here, and what is imported when it is first used."""
    return sorted({*globals(), *__all__})
