"""Deals the queries of a packed row to ranks, so that few keys and values have to travel.

A rank needs the keys of the paths of its queries. What stays in one piece shares its path: so whole
subtrees are dealt first, the largest that leave room for balance, and what lies above them follows
in tiles. Keys and values of rows that only one rank needs then stay where they are.

    prefix  0 1 2 3 | 4 5 6 7      tiles, to the ranks with the least work so far
      suffix  8 9                  in one piece
      suffix  10 11                in one piece
"""

from __future__ import annotations

import numpy as np

from prefix_attn.forest import Forest

TILE = 128  # rows of a piece at most, and a quarter of a rank's where these are few


def deal(forest: Forest, ranks: int) -> tuple[Forest, np.ndarray]:
    """Deals segments to ranks: even in work, and even in rows to within a piece.

    Args:
        forest: of T rows.
        ranks: their number.

    Returns:
        The same rows with shorter segments, and (S,) the rank of each of these.
    """
    tile = min(TILE, -(-forest.num_tokens // (4 * ranks)))
    whole = _whole_subtrees(forest, most=-(-forest.num_tokens // ranks) // 2)
    tops = [np.arange(a, b, tile) for a, b in _bounds(forest) if not whole[a]]
    pieces = forest.cut(np.concatenate([np.empty(0, np.int64), *tops]))
    kept = whole[np.minimum(pieces.starts, forest.num_tokens - 1)]
    units = _units(forest, pieces, kept)
    limit = -(-forest.num_tokens // (ranks * tile)) * tile  # rows of a rank
    rank = np.empty(pieces.num_segments, dtype=np.int64)
    rows, load = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for unit in units:
        need, work = int(pieces.lengths[unit].sum()), int(pieces.segment_pairs[unit].sum())
        fits = rows + need <= limit
        if fits.any():
            chosen = int(np.where(fits, load, np.iinfo(np.int64).max).argmin())
        else:
            chosen = int(rows.argmin())
        rank[unit] = chosen
        rows[chosen] += need
        load[chosen] += work
    return pieces, rank


def path_segments(forest: Forest, chosen: np.ndarray) -> np.ndarray:
    """(S,) bool: the segments that are chosen, and all above them."""
    keep = chosen.tolist()
    for i, parent in reversed(list(enumerate(forest.parents.tolist()))):
        if keep[i] and parent >= 0:
            keep[parent] = True
    return np.array(keep, dtype=bool)


def keys_move_less(forest: Forest, ranks: int, heads: int, kv_heads: int) -> bool:
    """Whether the keys and values of shared rows are fewer bytes than the heads of all rows.

    Per rank and layer, in numbers of D (N ranks, T rows, P of them shared):

        shared keys    (N - 1) / N * P * 2 Hkv
        heads          (N - 1) / N * T / N * (2 Hq + 2 max(Hkv, N))
    """
    shared = int(forest.lengths[forest.continued].sum())
    return shared * kv_heads * ranks < forest.num_tokens * (heads + max(kv_heads, ranks))


def _bounds(forest: Forest) -> list[tuple[int, int]]:
    """The first row of each segment that is not empty, and the one behind its last."""
    filled = forest.lengths > 0
    return list(zip(forest.starts[filled].tolist(), forest.ends[filled].tolist(), strict=True))


def _whole_subtrees(forest: Forest, most: int) -> np.ndarray:
    """(T,) bool: rows of subtrees of at most `most` rows. A subtree is one range of rows."""
    whole = np.zeros(forest.num_tokens, dtype=bool)
    for start, end in zip(forest.starts.tolist(), forest.subtree_ends.tolist(), strict=True):
        if end - start <= most:
            whole[start:end] = True
    return whole


def _units(forest: Forest, pieces: Forest, kept: np.ndarray) -> list[np.ndarray]:
    """The segments that go to one rank together: whole subtrees, then tiles, by their work."""
    top = np.arange(pieces.num_segments)
    for i, parent in enumerate(pieces.parents.tolist()):
        if parent >= 0 and kept[i] and kept[parent]:
            top[i] = top[parent]
    order = np.argsort(top, kind="stable")
    units = np.split(order, np.flatnonzero(np.diff(top[order])) + 1)
    work = {int(unit[0]): int(pieces.segment_pairs[unit].sum()) for unit in units}
    return sorted(units, key=lambda unit: (not kept[unit[0]], -work[int(unit[0])]))
