"""Finds the prefixes that sequences of token ids share, at any depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from prefix_attn.forest import Forest


def find_prefixes(sequences: Sequence[np.ndarray]) -> Forest:
    """Merges equal prefixes: a radix tree with a leaf of its own for every sequence.

    Sorted sequences hold every shared prefix side by side, so the tree follows from the common
    prefix lengths of neighbours. Children are put back in the callers' order.

    Args:
        sequences: N sequences (L_i,) of int64, not negative.
    """
    count = len(sequences)
    if not count:
        nothing = np.empty(0, dtype=np.int64)
        return Forest(nothing, nothing, nothing.astype(bool), nothing)
    sizes = [len(a) for a in sequences]
    # Ids have one width, so their bytes sort equal prefixes next to each other, the shorter first.
    content = [a.tobytes() for a in sequences]
    order = sorted(range(count), key=content.__getitem__)
    common = [0]  # tokens that each shares with the one before it in this order
    for a, b in pairwise(order):
        shorter = min(sizes[a], sizes[b])
        differs = sequences[a][:shorter] != sequences[b][:shorter]
        common.append(int(differs.argmax()) if differs.any() else shorter)

    # Nodes by the depth at which they end; one opens when a sequence leaves the current path.
    node_end: list[int] = []
    node_parent: list[int] = []
    leaf_of = np.empty(count, dtype=np.int64)

    def new_node(end: int, parent: int) -> int:
        node_end.append(end)
        node_parent.append(parent)
        return len(node_end) - 1

    path: list[int] = []  # nodes from the root to the last sequence's, none of them empty
    for rank, (sequence, shared) in enumerate(zip(order, common, strict=True)):
        left = -1
        while path and node_end[path[-1]] > shared:
            left = path.pop()
        fork = path[-1] if path else -1
        if left >= 0 and shared > (node_end[fork] if path else 0):
            # The node that was left is cut in two at the fork.
            fork = new_node(shared, fork)
            node_parent[left] = fork
            path.append(fork)
        elif left < 0 and path:
            # The sequence before ends at the fork: it gets an empty leaf of its own.
            before = order[rank - 1]
            if leaf_of[before] == fork:
                leaf_of[before] = new_node(shared, fork)
        leaf_of[sequence] = new_node(sizes[sequence], fork)
        if sizes[sequence] > shared:
            path.append(int(leaf_of[sequence]))
    return _depth_first(node_end, node_parent, leaf_of)


def _depth_first(node_end: list[int], node_parent: list[int], leaf_of: np.ndarray) -> Forest:
    """Orders the nodes of a radix tree depth first, siblings by their first sequence."""
    count = len(node_end)
    first = np.full(count, len(leaf_of), dtype=np.int64)
    for sequence, node in enumerate(leaf_of.tolist()):
        while node >= 0 and first[node] > sequence:
            first[node] = sequence
            node = node_parent[node]
    children: list[list[int]] = [[] for _ in range(count + 1)]
    for node in np.argsort(-first, kind="stable").tolist():
        children[node_parent[node]].append(node)  # -1 is the last list, the roots
    lengths, parents = np.empty(count, np.int64), np.empty(count, np.int64)
    place = np.full(count + 1, -1, dtype=np.int64)
    stack = list(children[-1])
    position = 0
    while stack:
        node = stack.pop()
        parent = node_parent[node]
        place[node] = position
        parents[position] = place[parent]
        lengths[position] = node_end[node] - (node_end[parent] if parent >= 0 else 0)
        position += 1
        stack += children[node]
    return Forest(lengths, parents, np.ones(count, dtype=bool), place[leaf_of])
