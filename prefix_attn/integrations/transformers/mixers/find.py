"""Which modules of a decoder mix tokens otherwise than by attention, and how each is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version

from prefix_attn.integrations.transformers.code_names import code_names
from prefix_attn.integrations.transformers.mixers.functions import (
    CONVOLUTION,
    FUNCTIONS,
    SCANS,
    SHORTCUTS,
)

# From here on mixers look their stateful functions up as global names, in every call.
GLOBAL_FUNCTIONS_SINCE = "5.18"

# What recurrent mixers call on their cache.
KEEPS_INPUTS = "update_conv_state"
KEEPS_STATES = frozenset({"update_recurrent_state", "set_linear_cache"})


def has_global_functions() -> bool:
    """Whether this version of transformers has stateful functions that can be watched."""
    return Version(transformers.__version__) >= Version(GLOBAL_FUNCTIONS_SINCE)


@dataclass(frozen=True)
class Mixer:
    """A module that reads the tokens of a row in order.

    Attributes:
        name: in the decoder.
        module: itself.
        functions: the functions that follow the tree in its place; empty if it runs on whole
            sequences.
    """

    name: str
    module: torch.nn.Module
    functions: tuple[str, ...]


def find_mixers(decoder: torch.nn.Module) -> Iterator[Mixer]:
    """The outermost modules that keep inputs or states of earlier tokens, or convolve them."""
    found: list[str] = []
    for name, module in decoder.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if _mixes(module):
            found.append(name)
            yield Mixer(name, module, _functions_of(module))


def _mixes(module: torch.nn.Module) -> bool:
    if {KEEPS_INPUTS, *KEEPS_STATES} & code_names(module).attributes:
        return True
    return any(_convolves(child) for child in module.children())


def _convolves(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Conv1d) and module.kernel_size != (1,)


def _functions_of(module: torch.nn.Module) -> tuple[str, ...]:
    """The functions that do all that a mixer does across tokens; none if that is not known."""
    if not has_global_functions():
        return ()
    names = code_names(module)
    called = {name for name in FUNCTIONS if getattr(names.module_of(name), name, None) is not None}
    convolves = any(_convolves(child) for child in module.children())
    if CONVOLUTION not in called and (convolves or KEEPS_INPUTS in names.attributes):
        return ()
    if KEEPS_STATES & names.attributes and not called & SCANS.keys():
        return ()
    return tuple(sorted(called - SHORTCUTS.keys()))
