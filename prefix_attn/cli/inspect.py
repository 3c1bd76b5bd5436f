"""Shows how much prefix the sequences of a rollout file share, as a tree."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefix_attn.cli.costs import verdict
from prefix_attn.cli.rollouts import Rollouts, read
from prefix_attn.cli.terminal import (
    UsageError,
    at_least,
    can_print,
    complain,
    counted,
    cut,
    pairs,
    paragraph,
    table,
    visible,
    width,
)
from prefix_attn.layout import PrefixLayout, depths_of

EXAMPLE = "inspect rollouts.jsonl --tokenizer Qwen/Qwen3-0.6B"
# Entries of the table in which a layout sorts its sequences.
MAX_TABLE = 2**27
BAD_SHOWN = 5
MAX_DEPTH = 64
# Children of one segment that are drawn.
CHILDREN_SHOWN = 8
# Of these the largest are drawn always, others that save less than this share of all tokens not.
ALWAYS_SHOWN = 3
LEAST_SHARE = 0.01
PREVIEW_UNITS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "file",
        metavar="FILE.jsonl",
        help="one JSON value per line, a list of token ids or an object, or one array of these; "
        "may be gzipped; - is standard input",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME",
        help="column with text, token ids or messages; several are put one after the other",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer of transformers, a name or a folder; without one text is compared by byte",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="read the first N lines")
    parser.add_argument(
        "--batch",
        type=at_least(1),
        metavar="N",
        help="share prefixes only among N neighbouring sequences, as in a batch of N (all)",
    )
    parser.add_argument(
        "--depth", type=at_least(1), default=3, metavar="N", help="levels of the tree to draw (3)"
    )


@dataclass(frozen=True, eq=False)
class _Tree:
    """The prefix tree of a batch, with what each segment holds and how many share it."""

    layout: PrefixLayout
    ids: np.ndarray
    lengths: np.ndarray
    parents: np.ndarray
    starts: np.ndarray
    sharers: np.ndarray

    @classmethod
    def from_sequences(cls, sequences: list[np.ndarray]) -> _Tree:
        tensors = [torch.from_numpy(np.array(x, dtype=np.int64)) for x in sequences]
        layout, ids = PrefixLayout.from_sequences(tensors)
        lengths, parents, _ = layout.segments.numpy().astype(np.int64)
        sharers = np.bincount(layout.sequence_leaves.numpy(), minlength=len(lengths))
        for i in reversed(range(len(parents))):
            if parents[i] >= 0:
                sharers[parents[i]] += sharers[i]
        starts = np.cumsum(lengths) - lengths
        return cls(layout, ids.numpy(), lengths, parents, starts, sharers)

    def pairs(self) -> tuple[int, int]:
        """Allowed (query, key) pairs with every sequence run whole, and with sharing."""
        before = depths_of(self.parents, self.lengths)
        each = self.lengths * before + self.lengths * (self.lengths + 1) // 2
        return int((each * self.sharers).sum()), int(each.sum())


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Reads the file, merges equal prefixes, returns figures and the tree; exit code 0."""
    if options.depth > MAX_DEPTH:
        raise UsageError(f"--depth must be at most {MAX_DEPTH}, got {options.depth}")
    tokenizer = _tokenizer(options.tokenizer) if options.tokenizer else None
    rollouts = read(options.file, options.column, tokenizer, options.limit)
    _report_bad(rollouts)
    sequences = rollouts.sequences
    batch = min(options.batch or len(sequences), len(sequences))
    batches = [sequences[i : i + batch] for i in range(0, len(sequences), batch)]
    _check_size(batches)
    tokens = repeated = shared_pairs = repeated_pairs = 0
    drawing: list[str] = []
    for i, part in enumerate(batches):
        tree = _Tree.from_sequences(part)
        whole, once = tree.pairs()
        repeated_pairs, shared_pairs = repeated_pairs + whole, shared_pairs + once
        tokens += tree.layout.num_tokens
        repeated += tree.layout.repeated_tokens
        if not i:
            drawing = _Drawing(tree, rollouts.unit, tokenizer, options.depth).lines()
    if not tokens:
        raise UsageError(f"{options.file}: all {len(sequences)} sequences are empty")
    token_ratio, attention_ratio = repeated / tokens, repeated_pairs / shared_pairs
    return {
        "file": options.file,
        "columns": [list(path) for path in rollouts.paths],
        "unit": rollouts.unit,
        "rendered_messages": rollouts.rendered,
        "masked_tokens": rollouts.masked,
        "sequences": len(sequences),
        "batch": options.batch,
        "batches": len(batches),
        "tokens": {"repeated": repeated, "shared": tokens, "ratio": token_ratio},
        "attention_pairs": {
            "repeated": repeated_pairs,
            "shared": shared_pairs,
            "ratio": attention_ratio,
        },
        "saved_share_of_tokens": 1 - tokens / repeated,
        "saved_share_of_attention": 1 - shared_pairs / repeated_pairs,
        "bad_lines": [{"line": number, "reason": reason} for number, reason in rollouts.bad],
        "tree": drawing,
        "verdict": verdict(token_ratio, attention_ratio),
    }, 0


def render(results: dict[str, Any]) -> str:
    """What was read, what is saved, and the tree."""
    unit = results["unit"]
    columns = " and ".join(" + ".join(path) for path in results["columns"]) or "whole lines"
    facts = [
        ("sequences", f"{results['sequences']:,}"),
        ("read from", columns),
        ("compared by", "token ids" if unit == "tokens" else "bytes of UTF-8, for want of tokens"),
    ]
    if unit == "bytes":
        facts.append(("", "These are figures of bytes; --tokenizer gives those of tokens."))
    if results["rendered_messages"]:
        facts.append(("messages", "written out as <role> and content, for want of a template"))
    if results["masked_tokens"]:
        masked = counted(results["masked_tokens"], "token")
        facts.append(("padding", f"{masked} left out, where the mask is 0"))
    if results["bad_lines"]:
        facts.append(("left out", counted(len(results["bad_lines"]), "bad line")))
    if results["batch"] is not None:
        facts.append(("batches", f"{results['batches']:,}; prefixes are shared inside each"))
    elif results["sequences"] > 1:
        facts.append(
            (
                "shared",
                "across the whole file, the most there can be; training shares inside a "
                "micro-batch alone, which --batch N counts",
            )
        )
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
            pairs(facts),
            table(["", "repeated", "shared", "ratio", "saved"], rows),
            paragraph(f"{results['verdict']} FLOPs are proportional to pairs; they are not time."),
            "\n".join([f"{title}: sequences x {unit} of a shared prefix", *results["tree"]]),
        ]
    )


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


def _report_bad(rollouts: Rollouts) -> None:
    for number, reason in rollouts.bad[:BAD_SHOWN]:
        complain(f"{rollouts.noun} {number} left out: {reason}")
    if len(rollouts.bad) > BAD_SHOWN:
        complain(f"{counted(len(rollouts.bad) - BAD_SHOWN, f'more {rollouts.noun}')} left out")


def _check_size(batches: list[list[np.ndarray]]) -> None:
    """Refuses what would fill the memory."""
    for part in batches:
        longest = max(len(x) for x in part)
        if len(part) * (longest + 1) > MAX_TABLE:
            raise UsageError(
                f"{len(part)} sequences of up to {longest} need too much memory at once; share "
                f"prefixes inside batches with --batch {max(1, MAX_TABLE // (longest + 1))} or "
                "less, or read fewer lines with --limit"
            )


class _Drawing:
    """Draws a tree: segments that several sequences share, those that save most first."""

    def __init__(self, tree: _Tree, unit: str, tokenizer: Any, depth: int) -> None:
        self.tree, self.unit, self.tokenizer, self.depth = tree, unit, tokenizer, depth
        self.children: list[list[int]] = [[] for _ in range(len(tree.parents) + 1)]
        for i, parent in enumerate(tree.parents.tolist()):
            self.children[parent].append(i)  # -1 is the last list, the roots
        self.branch, self.corner, self.bar = (
            ("├─ ", "└─ ", "│  ") if can_print("├─└│") else ("|- ", "`- ", "|  ")
        )

    def lines(self) -> list[str]:
        """The whole tree."""
        return self._below(-1, "", 0)

    def _below(self, node: int, indent: str, level: int) -> list[str]:
        tree = self.tree
        forks = [i for i in self.children[node] if self.children[i]]
        saved = tree.lengths * (tree.sharers - 1)
        forks.sort(key=lambda i: -int(saved[i]))
        ends = [i for i in self.children[node] if not self.children[i]]
        least = LEAST_SHARE * tree.layout.repeated_tokens
        drawn = [
            fork
            for place, fork in enumerate(forks[:CHILDREN_SHOWN])
            if place < ALWAYS_SHOWN or saved[fork] >= least
        ]
        hidden = forks[len(drawn) :]
        items = [(self._label(i), i) for i in drawn]
        if hidden:
            count = int(tree.sharers[hidden].sum())
            noun = "prefix" if len(hidden) == 1 else "prefixes"
            items.append((f"{count:,} sequences under {len(hidden):,} more shared {noun}", -1))
        if ends:
            items.append((self._ends(ends, alone=node < 0), -1))
        if level == self.depth and forks:
            count = self._segments_below(node)
            items = [(f"{count:,} segments below", -1)]
        lines = []
        for place, (label, child) in enumerate(items):
            last = place == len(items) - 1
            lines.append(cut(indent + (self.corner if last else self.branch) + label, width()))
            if child >= 0:
                deeper = indent + ("   " if last else self.bar)
                lines += self._below(child, deeper, level + 1)
        return lines

    def _segments_below(self, node: int) -> int:
        stack, count = list(self.children[node]), 0
        while stack:
            count += 1
            stack += self.children[stack.pop()]
        return count

    def _label(self, node: int) -> str:
        tree = self.tree
        return f"{tree.sharers[node]:,} x {tree.lengths[node]:,}  {self._preview(node)}"

    def _ends(self, nodes: list[int], alone: bool) -> str:
        lengths = self.tree.lengths[nodes]
        low, high = int(lengths.min()), int(lengths.max())
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        unit = self.unit.removesuffix("s") if high == 1 else self.unit
        one = len(nodes) == 1
        noun = "sequence" if one else "sequences"
        if alone:
            verb = "shares" if one else "share"
            return f"{len(nodes):,} {noun} that {verb} nothing, {span} {unit}"
        verb, whose = ("ends", "its") if one else ("end", "their")
        return f"{len(nodes):,} {noun} {verb}, {span} {unit} of {whose} own"

    def _preview(self, node: int) -> str:
        start = self.tree.starts[node]
        ids = self.tree.ids[start : start + min(PREVIEW_UNITS, self.tree.lengths[node])]
        if self.unit == "bytes":
            return f'"{visible(bytes(ids.tolist()).decode(errors="ignore"))}"'
        if self.tokenizer is not None:
            return f'"{visible(self.tokenizer.decode(ids.tolist()))}"'
        return " ".join(map(str, ids.tolist()))
