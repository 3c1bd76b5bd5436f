"""Blocks of a batch that see all of themselves, as the masks of an outer model have them.

Gemma 3 and Gemma 4 let the tokens of a picture see each other, PaliGemma those of a whole prompt.
transformers combines such rules from closures: they are read here, and a batch is packed where they
say no more than a bidirectional segment does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import masking_utils

from prefix_attn.integrations.transformers.code_names import closure_of

CAUSAL = "causal_mask_function"
SEVERAL = "packed_sequence_mask_function.<locals>.inner_mask"  # sequences in a row
WINDOW = "sliding_window_overlay.<locals>.inner_mask"
BLOCKS = "blockwise_overlay.<locals>.inner_mask"
REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"
AND, OR = "and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"


@dataclass(frozen=True, eq=False)
class Blocks:
    """What a mask function adds to the causal rule.

    Attributes:
        ids: (B, L) integers, equal where places see each other, -1 at all others; or None.
        window: whether there is a sliding window.
        outruns_window: whether the places of a block see each other beyond it, too.
        alone: whether the function says nothing but which places are of one block.
    """

    ids: Tensor | None = None
    window: bool = False
    outruns_window: bool = False
    alone: bool = False


def blocks_of(function: Callable[..., Any] | None) -> Blocks | None:
    """Reads a mask function; None if it says more than a layout with one set of blocks can."""
    said = _read(function)
    return None if said is None or said.alone else said


def _read(function: Callable[..., Any] | None) -> Blocks | None:
    if not inspect.isfunction(function) or function.__module__ != masking_utils.__name__:
        return None
    name, bound = function.__qualname__, closure_of(function)
    if name in (CAUSAL, SEVERAL):
        return Blocks()
    if name == WINDOW:
        return Blocks(window=True)
    if name == BLOCKS:
        return Blocks(ids=bound["block_sequence_ids"], alone=True)
    if name == REMAPPED:  # it looks blocks up at positions, not at places
        said = _read(bound["mask_function"])
        return None if said is None or said.ids is not None else said
    if name not in (AND, OR):
        return None
    parts = [_read(part) for part in bound["mask_functions"]]
    known = [part for part in parts if part is not None]
    holding = [part for part in known if part.ids is not None]
    if len(known) < len(parts) or len(holding) > 1:
        return None
    window = any(part.window for part in known)
    if not holding:
        return Blocks(window=window) if name == AND else None
    (blocks,) = holding
    if blocks.alone == (name == AND):  # "and" narrows a rule that holds blocks, "or" adds them
        return None
    outruns = blocks.outruns_window or (name == OR and window)
    return Blocks(blocks.ids, window, outruns)
