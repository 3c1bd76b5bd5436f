"""Deals the queries of a packed row to ranks, so that few keys and values have to travel.

A rank needs the keys of the paths of its queries. What stays on one rank shares its path: so whole
subtrees are dealt first, by their work. One that no rank has room for goes to as few ranks as have
it together: its children are dealt among these, and its own rows follow in tiles. Keys and values
of rows that only one rank needs then stay where they are.

    prefix  0 1 2 3 | 4 5 6 7      tiles, to the ranks with the least work so far
      suffix  8 9                  in one piece
      suffix  10 11                in one piece

Rows may differ in work by more than ranks should. Subtrees that don't fit half a rank are then
spread over all ranks, where that is not enough those that don't fit a quarter, and so on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from prefix_attn.forest import CACHED_LAYOUTS, Forest

TILE = 128  # rows of a piece at most, and a quarter of a rank's where these are few
# How much more than the mean a rank may have to do, before subtrees are spread over all ranks.
UNEVEN = 0.05


@lru_cache(CACHED_LAYOUTS)
def deal(forest: Forest, ranks: int) -> tuple[Forest, np.ndarray]:
    """Deals segments to ranks: even in work, and even in rows to within two tiles.

    Args:
        forest: of T rows.
        ranks: their number.

    Returns:
        The same rows with shorter segments, and (S,) the rank of each of these.
    """
    dealing = _Dealing(forest, ranks)
    most = dealing.limit // 2
    while not dealing.is_even() and 2 * most > dealing.tile:
        dealing = _Dealing(forest, ranks, most)
        most //= 2
    return dealing.pieces()


def path_segments(forest: Forest, chosen: np.ndarray) -> np.ndarray:
    """(S,) bool: the segments that are chosen, and all above them."""
    keep = chosen.tolist()
    for i, parent in reversed(list(enumerate(forest.parents.tolist()))):
        if keep[i] and parent >= 0:
            keep[parent] = True
    return np.array(keep, dtype=bool)


def moved_rows(forest: Forest, ranks: int) -> int:
    """How many rows, over all ranks, have keys and values that another rank needs."""
    pieces, rank = deal(forest, ranks)
    each = (path_segments(pieces, rank == r) & (rank != r) for r in range(ranks))
    return sum(int(pieces.lengths[others].sum()) for others in each)


def keys_move_less(forest: Forest, ranks: int, heads: int, kv_heads: int) -> bool:
    """Whether the keys and values that are needed are fewer bytes than the heads of all rows.

    Per layer, over all ranks, in numbers of D (N ranks, T rows):

        keys     moved_rows * 2 Hkv
        heads    (N - 1) * T / N * (2 Hq + 2 max(Hkv, N))

    Of one group with P shared rows the first are (N - 1) P.
    """
    traded = (ranks - 1) * forest.num_tokens * (heads + max(kv_heads, ranks))
    return moved_rows(forest, ranks) * kv_heads * ranks < traded


class _Dealing:
    """One way to deal.

    Attributes:
        rank: (T,) of each row.
        load: (N,) pairs of a query and a key, of each rank.
        tile: rows of a piece at most, where a segment is cut.
        limit: rows of a rank.
    """

    def __init__(self, forest: Forest, ranks: int, most: int | None = None) -> None:
        """Deals all rows.

        Args:
            forest: of T rows.
            ranks: their number.
            most: rows of a subtree that is dealt whole; larger ones are spread over all ranks. None
                is those of a rank, and larger ones go to as few ranks as have room for them.
        """
        each = -(-forest.num_tokens // ranks)
        self._forest, self._nearby = forest, most is None
        self._work_before = np.concatenate([[0], np.cumsum(forest.positions + 1)])
        self.rank = np.full(forest.num_tokens, -1)
        self.load = np.zeros(ranks, dtype=np.int64)
        self.tile = max(1, min(TILE, -(-each // 4)))
        self.limit = -(-each // self.tile) * self.tile
        self._most = self.limit if most is None else most
        tiles = self._deal_subtrees(np.full(ranks, self.limit))
        for start, end, room in sorted(tiles, key=lambda tile: -self._work(*tile[:2])):
            fits = room >= end - start
            rank = self._least_loaded(fits) if fits.any() else int(room.argmax())
            self._give(start, end, rank, room)

    def _deal_subtrees(self, room: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """Deals whole subtrees, most work first; returns the tiles of all others.

        Args:
            room: (N,) how many rows each rank takes.

        Returns:
            First row and end of each, and the room that is left for it and others.
        """
        forest = self._forest
        starts, ends = forest.starts.tolist(), forest.ends.tolist()
        subtree_ends = forest.subtree_ends.tolist()
        below: dict[int, list[int]] = {}  # -1 are the roots
        for segment, parent in enumerate(forest.parents.tolist()):
            below.setdefault(parent, []).append(segment)
        tiles: list[tuple[int, int, np.ndarray]] = []
        waiting: list[tuple[int, np.ndarray]] = []

        def add(parent: int, room: np.ndarray) -> None:
            """The most work comes last, and so next."""
            segments = below.get(parent, [])
            segments.sort(key=lambda i: self._work(starts[i], subtree_ends[i]))
            waiting.extend((i, room) for i in segments if subtree_ends[i] > starts[i])

        add(-1, room)
        while waiting:
            segment, room = waiting.pop()
            start, end = starts[segment], subtree_ends[segment]
            fits = room >= end - start
            if end - start <= self._most and fits.any():
                self._give(start, end, self._least_loaded(fits), room)
                continue
            if self._nearby:
                room = _take(room, end - start)
            add(segment, room)
            own = range(start, ends[segment], self.tile)
            tiles += [(a, min(a + self.tile, ends[segment]), room) for a in own]
        return tiles

    def _work(self, start: int, end: int) -> int:
        return int(self._work_before[end] - self._work_before[start])

    def _least_loaded(self, fits: np.ndarray) -> int:
        return int(np.where(fits, self.load, np.iinfo(np.int64).max).argmin())

    def _give(self, start: int, end: int, rank: int, room: np.ndarray) -> None:
        self.rank[start:end] = rank
        self.load[rank] += self._work(start, end)
        room[rank] -= end - start

    def is_even(self) -> bool:
        """Whether no rank has much more rows or work than the others."""
        tile_work = self.tile * self._forest.max_length
        mean, most = self.load.mean(), self.load.max(initial=0)
        rows = np.bincount(self.rank, minlength=1).max()
        return rows <= self.limit + self.tile and most <= mean + max(UNEVEN * mean, tile_work)

    def pieces(self) -> tuple[Forest, np.ndarray]:
        """The forest, cut where another rank begins, and the rank of each segment.

        That of an empty segment is its parent's, so that no key travels for it.
        """
        pieces = self._forest.cut(np.flatnonzero(np.diff(self.rank, prepend=-1)))
        filled, parents = pieces.lengths > 0, pieces.parents
        rank = np.zeros(pieces.num_segments, dtype=np.int64)
        rank[filled] = self.rank[pieces.starts[filled]]
        for i in np.flatnonzero(~filled & (parents >= 0)).tolist():
            rank[i] = rank[parents[i]]
        return pieces, rank


def _take(room: np.ndarray, need: int) -> np.ndarray:
    """Takes room of as few ranks as have it together, the last of them where it just fits."""
    taken = np.zeros_like(room)
    while need > 0:
        fits = room >= need
        largest = np.iinfo(room.dtype).max
        rank = np.where(fits, room, largest).argmin() if fits.any() else room.argmax()
        part = min(need, int(room[rank])) if room[rank] > 0 else need
        taken[rank] += part
        room[rank] -= part
        need -= part
    return taken
