"""The case that arguments describe, and what its ratios decide."""

from __future__ import annotations

import argparse

from prefix_attn.api import MAX_HEAD_DIM, MIN_HEAD_DIM
from prefix_attn.cases import Case
from prefix_attn.cli.arguments import DTYPES
from prefix_attn.cli.terminal import UsageError

# Below this ratio `prefix_attn.enable` leaves a batch as it is, too.
WORTH_RATIO = 1.2


def case_of(args: argparse.Namespace) -> Case:
    """The case of the lengths, the heads and the type that are given.

    Raises:
        UsageError: for what a layout or attention refuses.
    """
    if args.heads % args.kv_heads:
        raise UsageError(
            f"--heads must be a multiple of --kv-heads, got {args.heads} and {args.kv_heads}"
        )
    if not MIN_HEAD_DIM <= args.head_dim <= MAX_HEAD_DIM:
        raise UsageError(
            f"--head-dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {args.head_dim}"
        )
    if not args.prefix + args.suffix:
        raise UsageError("--prefix and --suffix are both 0: there are no tokens")
    lengths = args.prefix, args.suffix, args.group
    heads = args.heads, args.kv_heads, args.head_dim
    try:
        return Case(*lengths, *heads, DTYPES[args.dtype])
    except ValueError as error:
        raise UsageError(f"--prefix, --suffix and --group: {error}") from None


def verdict(token_ratio: float, attention_ratio: float, layer_ratio: float | None = None) -> str:
    """Whether sharing is worth it, and why.

    A layer is attention, whose work shrinks by `attention_ratio`, and the rest, whose work shrinks
    by `token_ratio`. What both do together lies between the two.

    Args:
        token_ratio: repeated tokens over tokens.
        attention_ratio: the same for attention FLOPs.
        layer_ratio: FLOPs of whole layers, where they are known.
    """
    low, high = sorted((token_ratio, attention_ratio))
    if high == 1:
        return "Not worth it: no token is shared."
    if layer_ratio is not None:
        low = high = layer_ratio
    if f"{low:.2f}" == f"{high:.2f}":
        what = f"a layer's FLOPs fall {high:.2f}x"
    else:
        what = f"a layer's FLOPs fall between {low:.2f}x and {high:.2f}x"
    if high < WORTH_RATIO:
        return f"Not worth it: {what}, less than {WORTH_RATIO}x."
    if low >= WORTH_RATIO:
        return f"Worth it: {what}."
    return f"It depends on how much of the time is attention: {what}."
