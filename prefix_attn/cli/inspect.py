"""Shows how much prefix the sequences of a rollout file share, as a tree."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from prefix_attn.cli import terminal
from prefix_attn.cli.costs import verdict
from prefix_attn.cli.terminal import UsageError, complain, counted
from prefix_attn.forest import Forest
from prefix_attn.layout import PrefixLayout
from prefix_attn.rollouts import ReadError, read

BAD_SHOWN = 5
MAX_DEPTH = 64
# Children of one segment that are drawn.
CHILDREN_SHOWN = 8
# Of these the largest are drawn always, others that save less than this share of all tokens not.
ALWAYS_SHOWN = 3
LEAST_SHARE = 0.01
PREVIEW_UNITS = 64
NAMES_SHOWN = 6


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Reads the file, merges equal prefixes, returns figures and the tree; exit code 0."""
    if args.depth > MAX_DEPTH:
        raise UsageError(f"--depth must be at most {MAX_DEPTH}, got {args.depth}")
    tokenizer = None if args.tokenizer is None else _tokenizer(args.tokenizer)
    try:
        rollouts = read(args.file, args.column, tokenizer, args.limit)
    except ReadError as error:
        raise UsageError(str(error)) from None
    for number, reason in rollouts.bad[:BAD_SHOWN]:
        complain(f"{rollouts.noun} {number} left out: {reason}")
    if (more := len(rollouts.bad) - BAD_SHOWN) > 0:
        complain(f"{counted(more, f'more {rollouts.noun}')} left out")
    sequences = rollouts.sequences
    batch = min(args.batch or len(sequences), len(sequences))
    batches = [sequences[i : i + batch] for i in range(0, len(sequences), batch)]
    sums = np.zeros(4, dtype=np.int64)
    drawing: list[str] = []
    for i, part in enumerate(batches):
        layout, ids = PrefixLayout.from_sequences(
            [torch.from_numpy(x.astype(np.int64)) for x in part]
        )
        tree = layout.forest
        sums += [
            *(tree.repeated_tokens, tree.num_tokens),
            *(tree.num_repeated_pairs, tree.num_pairs),
        ]
        if not i:
            drawing = _Drawing(tree, ids, rollouts.unit, tokenizer, args.depth).below()
    repeated, tokens, repeated_pairs, pairs = sums.tolist()
    if not tokens:
        raise UsageError(f"{args.file}: all {len(sequences)} sequences are empty")
    return {
        "file": args.file,
        "columns": [list(path) for path in rollouts.paths],
        "columns_not_read": rollouts.unread,
        "unit": rollouts.unit,
        "rendered_messages": rollouts.chat.is_plain,
        "message_fields_not_read": sorted(rollouts.chat.unread),
        "dropped_by_template": dict(+rollouts.chat.dropped),
        "media": rollouts.chat.media,
        "masked_tokens": rollouts.masked,
        "sequences": len(sequences),
        "batch": args.batch,
        "batches": len(batches),
        "tokens": {"repeated": repeated, "shared": tokens, "ratio": repeated / tokens},
        "attention_pairs": {
            "repeated": repeated_pairs,
            "shared": pairs,
            "ratio": repeated_pairs / pairs,
        },
        "saved_share_of_tokens": 1 - tokens / repeated,
        "saved_share_of_attention": 1 - pairs / repeated_pairs,
        "bad_lines": [{"line": number, "reason": reason} for number, reason in rollouts.bad],
        "tree": drawing,
        "verdict": verdict(repeated / tokens, repeated_pairs / pairs),
    }, 0


def render(results: dict[str, Any]) -> str:
    """What was read, what is saved, and the tree."""
    unit = results["unit"]
    rows = [
        [
            name,
            f"{results[key]['repeated']:,}",
            f"{results[key]['shared']:,}",
            f"{results[key]['ratio']:.2f}x",
            f"{100 * results[share]:.1f} %",
        ]
        for name, key, share in (
            (unit, "tokens", "saved_share_of_tokens"),
            ("attention, query-key pairs", "attention_pairs", "saved_share_of_attention"),
        )
    ]
    title = "tree of the first batch" if results["batches"] > 1 else "tree"
    return "\n\n".join(
        [
            terminal.pairs(_facts(results)),
            terminal.table(["", "repeated", "shared", "ratio", "saved"], rows),
            terminal.paragraph(
                f"{results['verdict']} FLOPs are proportional to pairs; they are not time."
            ),
            "\n".join([f"{title}: sequences x {unit} of a shared prefix", *results["tree"]]),
        ]
    )


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What was read and how, and all that was not."""
    columns = " and ".join(" + ".join(path) for path in results["columns"]) or "whole lines"
    facts = [("sequences", f"{results['sequences']:,}"), ("read from", columns)]
    if results["columns_not_read"]:
        more = len(results["columns_not_read"]) - NAMES_SHOWN
        names = ", ".join(results["columns_not_read"][:NAMES_SHOWN])
        facts.append(("not read", f"{names} and {more} more" if more > 0 else names))
    if results["unit"] == "tokens":
        facts.append(("compared by", "token ids"))
    else:
        facts.append(("compared by", "bytes of UTF-8; --tokenizer gives figures of tokens"))
    if results["rendered_messages"]:
        text = "written out, each after its role, for want of a chat template"
        if fields := results["message_fields_not_read"]:
            text += f"; without {', '.join(fields)}"
        facts.append(("messages", text))
    for name, count in results["dropped_by_template"].items():
        facts.append(("NOT COUNTED", f"{name} of {counted(count, 'message')}: the chat template "
                      "leaves it out"))  # fmt: skip
    if results["media"]:
        media = counted(results["media"], "picture or such part")
        facts.append(("NOT COUNTED", f"{media}: each stands as a short digest"))
    if results["masked_tokens"]:
        masked = counted(results["masked_tokens"], "token")
        facts.append(("padding", f"{masked} left out, as the mask or the length says"))
    if results["bad_lines"]:
        facts.append(("left out", counted(len(results["bad_lines"]), "bad line")))
    if results["batch"] is not None:
        facts.append(("batches", f"{results['batches']:,}; prefixes are shared inside each"))
    elif results["sequences"] > 1:
        text = "across the whole file, the most there can be; training shares inside a micro-batch"
        facts.append(("shared", f"{text} alone, which --batch N counts"))
    return facts


def _tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(
            f"--tokenizer needs transformers: pip install transformers ({error})"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds: no such folder, no network, a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--tokenizer {name!r} can't be loaded: {reason}") from None


class _Drawing:
    """Draws a tree: segments that several sequences share, those that save most first."""

    def __init__(
        self, tree: Forest, ids: torch.Tensor, unit: str, tokenizer: Any, depth: int
    ) -> None:
        self.tree, self.ids, self.unit, self.tokenizer = tree, ids, unit, tokenizer
        self.depth = depth
        self.saved = tree.lengths * (tree.sharers - 1)
        self.children: list[list[int]] = [[] for _ in range(len(tree.parents) + 1)]
        for i, parent in enumerate(tree.parents.tolist()):
            self.children[parent].append(i)  # -1 is the last list, the roots
        self.branch, self.corner, self.bar = (
            ("├─ ", "└─ ", "│  ") if terminal.can_print("├─└│") else ("|- ", "`- ", "|  ")
        )

    def below(self, node: int = -1, indent: str = "", level: int = 0) -> list[str]:
        """Lines of what continues a segment; of the whole tree by default."""
        items = self._items(node, level)
        lines = []
        for place, (label, child) in enumerate(items):
            is_last = place == len(items) - 1
            line = indent + (self.corner if is_last else self.branch) + label
            lines.append(terminal.cut(line, terminal.width()))
            if child >= 0:
                lines += self.below(child, indent + ("   " if is_last else self.bar), level + 1)
        return lines

    def _items(self, node: int, level: int) -> list[tuple[str, int]]:
        """Labels, with the segment whose children come below, or -1."""
        children, tree = self.children, self.tree
        forks = sorted((i for i in children[node] if children[i]), key=lambda i: -self.saved[i])
        if level == self.depth and forks:
            return [(f"{self._segments_below(node):,} segments below", -1)]
        least = LEAST_SHARE * tree.repeated_tokens
        drawn = [
            fork
            for place, fork in enumerate(forks[:CHILDREN_SHOWN])
            if place < ALWAYS_SHOWN or self.saved[fork] >= least
        ]
        items = [
            (f"{tree.sharers[i]:,} x {tree.lengths[i]:,}  {self._preview(i)}", i) for i in drawn
        ]
        if hidden := forks[len(drawn) :]:
            count = int(tree.sharers[hidden].sum())
            noun = "prefix" if len(hidden) == 1 else "prefixes"
            items.append((f"{count:,} sequences under {len(hidden):,} more shared {noun}", -1))
        if ends := [i for i in children[node] if not children[i]]:
            items.append((self._ends(tree.lengths[ends], is_alone=node < 0), -1))
        return items

    def _segments_below(self, node: int) -> int:
        stack, count = list(self.children[node]), 0
        while stack:
            count += 1
            stack += self.children[stack.pop()]
        return count

    def _ends(self, lengths: np.ndarray, is_alone: bool) -> str:
        low, high = int(lengths.min()), int(lengths.max())
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        span += f" {self.unit.removesuffix('s') if high == 1 else self.unit}"
        is_one = len(lengths) == 1
        count = counted(len(lengths), "sequence")
        if is_alone:
            return f"{count} that {'shares' if is_one else 'share'} nothing, {span}"
        verb, whose = ("ends", "its") if is_one else ("end", "their")
        return f"{count} {verb}, {span} of {whose} own"

    def _preview(self, node: int) -> str:
        start, length = self.tree.starts[node], self.tree.lengths[node]
        ids = self.ids[start : start + min(PREVIEW_UNITS, length)].tolist()
        if self.unit == "bytes":
            return f'"{terminal.visible(bytes(ids).decode(errors="ignore"))}"'
        if self.tokenizer is not None:
            return f'"{terminal.visible(self.tokenizer.decode(ids))}"'
        return " ".join(map(str, ids))
