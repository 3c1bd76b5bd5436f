"""Layouts for the tries of AReaL's tree training."""

from __future__ import annotations

from typing import Any

import torch

from prefix_attn.layout import PrefixLayout


def layout_of_trie(
    trie: Any, num_rows: int | None = None, device: torch.device | str | None = None
) -> PrefixLayout:
    """The layout of a trie's packed row, whose tokens lie in the same order.

    Args:
        trie: a root `TrieNode` of `areal.models.tree_attn.tree`.
        num_rows: length of the row with padding behind it, which becomes a segment of its own; that
            of its tokens by default.
        device: of the layout's tensors.

    Returns:
        A layout of num_rows rows, which `prefix_attention` and `attn_implementation="prefix_attn"`
        take.

    Raises:
        ValueError: if this is no root, if its nodes leave gaps, or if num_rows is too small.
    """
    if not trie.is_root:
        raise ValueError("expected the root of a trie, got a node that holds tokens")
    nodes = sorted(trie.nodes, key=lambda node: node.start_idx)
    index = {id(node): i for i, node in enumerate(nodes)}
    lengths = [node.end_idx - node.start_idx + 1 for node in nodes]
    begin = 0
    for node, length in zip(nodes, lengths, strict=True):
        if node.start_idx != begin:
            raise ValueError(f"the nodes of the trie leave a gap: {begin} to {node.start_idx}")
        begin += length
    # Ancestors run from the root, which holds no tokens, down to the parent.
    above = ([index[id(x)] for x in node.ancestors if id(x) in index] for node in nodes)
    parents = [ancestors[-1] if ancestors else -1 for ancestors in above]
    padding = 0 if num_rows is None else num_rows - begin
    if padding < 0:
        raise ValueError(f"num_rows is {num_rows}, but the trie holds {begin} tokens")
    if padding:
        lengths.append(padding)
        parents.append(-1)
    return PrefixLayout.from_tree(lengths, parents, device=device)
