"""Which program computes which tile: plain int32 work lists from a forest.

A query tile visits keys, for the forward pass and dQ; a key tile is visited by queries, for dK and
dV. Both cover every allowed (row, key) pair exactly once. A tile in which every pair is allowed is
"full" and needs no mask; the kernels apply the attention rule to the others.

A sliding window is counted in positions, which start anew at every fork, so there the rows that see
a key are no range: tiles are listed one by one. Without a window most of a list is arithmetic.

Work lists are sorted longest first, because hardware starts programs in grid order. The forward
grid is (query tile, query head), the backward grid (entry of `backward_order`, KV head), the head
running fastest; where the heads' keys and values exceed the cache, sections of heads follow one
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prefix_attn.forest import Forest

# In units of one full tile: what a masked tile costs, by the model `bench.machine_code.walk`, and
# what starting and ending an item costs.
MASKED_COST = 1.4
ITEM_COST = 2.0
# Columns of the items of query tiles, and of key tiles.
ROW0, ROW1, QUERY0, LIST0, NUM_LISTED, OWN0, NUM_OWN, MASKED0, NUM_MASKED = range(9)
COL0, COL1, FULL0, NUM_FULL, BEFORE0, NUM_BEFORE, AFTER0, NUM_AFTER, SLOT = range(9)
# Matrix products per tile of the backward pass: S, dP, dV, dK in a key tile, or S, dP, dK in one
# kind of them and S, dV in another; S, dP, dQ in a query tile. Key tiles may add up dQ, too.
KEY_PRODUCTS = 4
DK_PRODUCTS = 3
DV_PRODUCTS = 2
QUERY_PRODUCTS = 3
# A key tile is cut into chunks of at most 1 / CHUNKS_PER_PROCESSOR of a processor's fair share.
CHUNKS_PER_PROCESSOR = 8
MIN_CHUNK = 16


@dataclass(frozen=True, eq=False)
class QueryTiles:
    """Work list of query tiles.

    Attributes:
        items: (n, 9) int32, longest first: row0, row1, query0, list0, num_listed, own0, num_own,
            masked0, num_masked. Rows [row0, row1) are the queries from query0 on. They visit in
            full the key tiles at `columns[list0 : list0 + num_listed]` and num_own tiles from key
            own0 on, then, masked, `masked[masked0 : masked0 + num_masked]`.
        columns: (m,) int32, first keys of full tiles; tiles below one ancestor share their list.
        masked: (k, 2) int32, first key and end of each masked tile.
        costs: (n,) float64, in full tiles.
    """

    items: np.ndarray
    columns: np.ndarray
    masked: np.ndarray
    costs: np.ndarray

    @classmethod
    def from_forest(cls, forest: Forest, block_m: int, block_n: int) -> QueryTiles:
        """Cuts the rows into tiles of block_m, whatever segments they span, but not across a gap.

        A gap is made of rows that are no queries.
        """
        rows = forest.query_rows
        # Tiles start anew behind each gap.
        cuts = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
        query0 = _arange_between(np.append(cuts, len(rows)), block_m)
        query1 = np.append(query0[1:], len(rows))
        row0 = rows[query0]
        row1 = row0 + query1 - query0
        items = np.zeros((len(row0), 9), dtype=np.int64)
        items[:, ROW0], items[:, ROW1], items[:, QUERY0] = row0, row1, query0
        fill = cls._fill_ranges if forest.window_size is None else cls._fill_window
        columns, masked = fill(forest, items, block_n)
        full = items[:, NUM_LISTED] + items[:, NUM_OWN]
        costs = ITEM_COST + full + MASKED_COST * items[:, NUM_MASKED]
        order = np.argsort(-costs, kind="stable")
        return cls(
            items=items[order].astype(np.int32),
            columns=columns.astype(np.int32),
            masked=masked.astype(np.int32).reshape(-1, 2),
            costs=costs[order],
        )

    @staticmethod
    def _fill_ranges(
        forest: Forest, items: np.ndarray, block_n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Completes the items without a window; returns columns and masked.

        Every key before a tile lies on the path of its first segment, since any other segment of
        the tile starts inside it or hangs below that path. Keys of the segments that all rows
        continue are the first ones on that path, and are visited in full.
        """
        ends, run_start, anchor, parents, subtree_ends, bidirectional = (
            x.tolist()
            for x in (
                forest.ends, forest.run_start, forest.anchor, forest.parents, forest.subtree_ends,
                forest.bidirectional,
            )
        )  # fmt: skip
        above = _PathTiles(forest, block_n)
        masked: list[tuple[int, int]] = []
        first = forest.segment_of(items[:, ROW0]).tolist()
        last = forest.segment_of(items[:, ROW1] - 1).tolist()
        bounds = items[:, [ROW0, ROW1]].tolist()
        for tile, ((low, high), segment, final) in enumerate(zip(bounds, first, last, strict=True)):
            # All segments that are left on the way up end in this tile, and in no other.
            shared = segment
            while shared >= 0 and subtree_ends[shared] < high:
                shared = parents[shared]
            top = anchor[shared] if shared >= 0 else -1
            list0, num_listed = above.listed(top)
            # Keys on the path before `full_end` are seen by every row of the tile.
            own0 = full_end = 0
            if shared >= 0:
                own0 = run_start[shared]
                full_end = ends[shared] if bidirectional[shared] else min(ends[shared], low)
            num_own = max(0, full_end - own0) // block_n
            ragged: list[tuple[int, int]] = []
            node, end = segment, ends[final] if bidirectional[final] else high
            while node != top:
                start = run_start[node]
                ragged.append((start + num_own * block_n if start == own0 else start, end))
                node = anchor[node]
                end = ends[node]
            pieces = above.masked(top)
            for start, end in reversed(ragged):
                _append_masked(pieces, start, end, block_n)
            items[tile, LIST0:] = list0, num_listed, own0, num_own, len(masked), len(pieces)
            masked += pieces
        return np.array(above.columns, dtype=np.int64), np.array(masked, dtype=np.int64)

    @staticmethod
    def _fill_window(
        forest: Forest, items: np.ndarray, block_n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Completes the items under a window; returns columns and masked."""
        col0, col1 = _key_cuts(forest, block_n)
        query0 = items[:, QUERY0]
        query1 = query0 + items[:, ROW1] - items[:, ROW0]
        tile, key_tile, full = _window_pairs(forest, query0, query1, col0, col1)
        full &= (col1 - col0)[key_tile] == block_n
        for kind, begin, number in ((full, LIST0, NUM_LISTED), (~full, MASKED0, NUM_MASKED)):
            count = np.bincount(tile[kind], minlength=len(items))
            items[:, begin], items[:, number] = np.cumsum(count) - count, count
        part = key_tile[~full]
        return col0[key_tile[full]], np.stack([col0[part], col1[part]], axis=1)


class _PathTiles:
    """The key tiles on the runs of a path that ends with an anchor, for anchors as they are asked.

    Attributes:
        columns: first keys of full tiles.
    """

    def __init__(self, forest: Forest, block_n: int):
        self.columns: list[int] = []
        self._block_n = block_n
        self._starts, self._ends, self._above = (
            x.tolist() for x in (forest.run_start, forest.ends, forest.anchor)
        )
        # Where the list of full tiles of a path lies in `columns`.
        self._lists: dict[int, tuple[int, int]] = {-1: (0, 0)}
        # The masked tiles of a path from the last one up: the tiles before it, first key and end.
        self._chains: dict[int, tuple[Any, int, int] | None] = {-1: None}

    def listed(self, anchor: int) -> tuple[int, int]:
        """Where the full tiles begin in `columns`, and how many there are."""
        for node in self._missing(anchor, self._lists):
            begin, count = self._lists[self._above[node]]
            own = (self._ends[node] - self._starts[node]) // self._block_n
            if own:
                if begin + count != len(self.columns):  # another path went on behind the list
                    begin, above = len(self.columns), self.columns[begin : begin + count]
                    self.columns += above
                start = self._starts[node]
                self.columns += range(start, start + own * self._block_n, self._block_n)
            self._lists[node] = begin, count + own
        return self._lists[anchor]

    def masked(self, anchor: int) -> list[tuple[int, int]]:
        """First key and end of the masked tiles, in the order of their keys."""
        for node in self._missing(anchor, self._chains):
            chain, end = self._chains[self._above[node]], self._ends[node]
            start = end - (end - self._starts[node]) % self._block_n
            if chain and start < end and end - chain[1] <= self._block_n:
                chain = chain[0], chain[1], end
            elif start < end:
                chain = chain, start, end
            self._chains[node] = chain
        chain, pieces = self._chains[anchor], []
        while chain:
            pieces.append(chain[1:])
            chain = chain[0]
        return pieces[::-1]

    def _missing(self, anchor: int, known: dict[int, Any]) -> list[int]:
        """The anchors on a path that are not known yet, from the top."""
        nodes = []
        while anchor not in known:
            nodes.append(anchor)
            anchor = self._above[anchor]
        return nodes[::-1]


def _append_masked(pieces: list[tuple[int, int]], start: int, end: int, block_n: int) -> None:
    """Adds the keys [start, end) to masked tiles of at most block_n keys."""
    if pieces and end - pieces[-1][0] <= block_n:
        # One tile for both: no row sees the keys between them, and a full tile, as wide as this
        # one, does not fit there.
        pieces[-1] = pieces[-1][0], end
    else:
        pieces += [(col, min(col + block_n, end)) for col in range(start, end, block_n)]


@dataclass(frozen=True, eq=False)
class KeyVisits:
    """The query tiles that visit each key tile, whole.

    Attributes:
        col0: (n,) first key of each tile.
        col1: (n,) its end.
        begins: (n, 3) where the query tiles before, full and after begin: queries, or under a
            window places in `queries`.
        counts: (n, 3) how many there are.
        queries: under a window the first queries of the tiles, else empty.
        step: from one query tile to the next, in the unit of `begins`.
    """

    col0: np.ndarray
    col1: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    queries: np.ndarray
    step: int

    @classmethod
    def from_forest(cls, forest: Forest, block_m: int, block_n: int) -> KeyVisits:
        """Cuts the keys into tiles of at most block_n."""
        col0, col1 = _key_cuts(forest, block_n)
        window = forest.window_size is not None
        fill = cls._fill_window if window else cls._fill_ranges
        return cls(col0, col1, *fill(forest, block_m, col0, col1), step=1 if window else block_m)

    @staticmethod
    def _fill_ranges(
        forest: Forest, block_m: int, col0: np.ndarray, col1: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the query tiles before, full and after begin, their (n, 3) counts, and no list.

        One contiguous range of rows sees a key: query tile j of a key tile starts block_m * j
        behind the first of them.
        """
        every, some = _seen_by_all(forest, col0), _seen_by_any(forest, col0)
        before = forest.queries_before
        begin = before[some[0]]
        to_full = -(-(before[every[0]] - begin) // block_m)
        num_full = np.maximum(0, (before[every[1]] - begin) // block_m - to_full)
        total = -(-(before[some[1]] - begin) // block_m)
        num_before = np.where(num_full > 0, to_full, total)
        counts = np.stack([num_before, num_full, total - num_before - num_full], axis=1)
        begins = begin[:, None] + (np.cumsum(counts, axis=1) - counts) * block_m
        return begins, counts, np.empty(0)

    @staticmethod
    def _fill_window(
        forest: Forest, block_m: int, col0: np.ndarray, col1: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, as places in a list of query tiles, and that list."""
        query0 = np.arange(0, len(forest.query_rows), block_m)
        query1 = np.minimum(query0 + block_m, len(forest.query_rows))
        row_tile, tile, full = _window_pairs(forest, query0, query1, col0, col1)
        full &= (query1 - query0)[row_tile] == block_m
        order = np.lexsort((row_tile, full, tile))
        counts = np.zeros((len(col0), 3), dtype=np.int64)
        counts[:, 0] = np.bincount(tile[~full], minlength=len(col0))
        counts[:, 1] = np.bincount(tile[full], minlength=len(col0))
        places = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
        return places, counts, query0[row_tile[order]]


@dataclass(frozen=True, eq=False)
class KeyTiles:
    """Work list of key tiles, and the query tiles that visit them.

    Attributes:
        items: (n, 9) int32, longest first: col0, col1, full0, num_full, before0, num_before,
            after0, num_after, slot. Keys [col0, col1) are visited in full by num_full tiles of
            queries from query full0 on, and masked by those from before0 and after0 on. Under a
            window full0 and before0 are places in `queries`, and num_after is 0. slot is -1 where
            the item alone owns its keys, else the index of its partial sum.
        queries: (k,) int32, under a window the first queries of the tiles, else empty.
        splits: (s, 4) int32, for each tile that was split: col0, col1, first slot, end slot.
        num_slots: partial sums in all.
        costs: (n,) float64, in full tiles of one query head.
    """

    items: np.ndarray
    queries: np.ndarray
    splits: np.ndarray
    num_slots: int
    costs: np.ndarray

    @classmethod
    def from_forest(
        cls, forest: Forest, block_m: int, block_n: int, max_chunk: int | None = None
    ) -> KeyTiles:
        """Cuts the keys into tiles of at most block_n, and their query tiles into chunks.

        Args:
            forest: the segments.
            block_m: queries in a query tile.
            block_n: keys in a key tile.
            max_chunk: query tiles in a chunk at most; None leaves every tile whole.
        """
        return cls.from_visits(KeyVisits.from_forest(forest, block_m, block_n), max_chunk)

    @classmethod
    def from_visits(cls, visits: KeyVisits, max_chunk: int | None) -> KeyTiles:
        """Cuts the query tiles of each key tile into chunks of at most max_chunk."""
        col0, col1, begins, counts = visits.col0, visits.col1, visits.begins, visits.counts
        # Chunk i of a tile owns those of its query tiles that are numbered [low, high).
        total = counts.sum(1)
        chunks = np.ones_like(total) if max_chunk is None else np.maximum(1, -(-total // max_chunk))
        tile = np.repeat(np.arange(len(col0)), chunks)
        first = np.cumsum(chunks) - chunks
        index = np.arange(len(tile)) - first[tile]
        low = index * total[tile] // chunks[tile]
        high = (index + 1) * total[tile] // chunks[tile]

        split = chunks[tile] > 1
        slot = np.where(split, np.cumsum(split) - 1, -1)
        items = np.zeros((len(tile), 9), dtype=np.int64)
        items[:, COL0], items[:, COL1], items[:, SLOT] = col0[tile], col1[tile], slot
        # Before, full and after follow each other in this numbering.
        number = np.zeros_like(low)
        columns = ((BEFORE0, NUM_BEFORE), (FULL0, NUM_FULL), (AFTER0, NUM_AFTER))
        for part, (first_column, count_column) in enumerate(columns):
            begin = np.maximum(number, low)
            stop = np.minimum(number + counts[tile, part], high)
            items[:, first_column] = begins[tile, part] + (begin - number) * visits.step
            items[:, count_column] = np.maximum(0, stop - begin)
            number = number + counts[tile, part]
        owners = np.flatnonzero(chunks > 1)
        stops = np.cumsum(chunks[owners])
        splits = np.stack([col0[owners], col1[owners], stops - chunks[owners], stops], axis=1)
        masked = items[:, NUM_BEFORE] + items[:, NUM_AFTER]
        costs = ITEM_COST + items[:, NUM_FULL] + MASKED_COST * masked
        order = np.argsort(-costs, kind="stable")
        return cls(
            items=items[order].astype(np.int32),
            queries=visits.queries.astype(np.int32),
            splits=splits.astype(np.int32),
            num_slots=int(split.sum()),
            costs=costs[order],
        )


def _arange_between(cuts: np.ndarray, step: int) -> np.ndarray:
    """Numbers from each cut to the next, `step` apart: (n,) int64."""
    pieces = [np.arange(a, b, step, dtype=np.int64) for a, b in pairwise(cuts.tolist())]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])


def _key_cuts(forest: Forest, block_n: int) -> tuple[np.ndarray, np.ndarray]:
    """First key and end of key tiles.

    Segments that others continue and that fill a tile start a tile of their own: otherwise their
    last keys would drag the neighbour's keys over all rows of the subtree.
    """
    broad = (forest.subtree_ends > forest.ends) & (forest.lengths >= block_n)
    cuts = [np.array([0, forest.num_tokens]), forest.starts[broad], forest.ends[broad]]
    col0 = _arange_between(np.unique(np.concatenate(cuts)), block_n)
    return col0, np.append(col0[1:], forest.num_tokens)[: len(col0)]


def _seen_by_all(forest: Forest, col0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The range of rows, for each key tile, that see every key of it (empty if none does)."""
    return _reduce(np.maximum, forest.row_seen_from, col0), _reduce(
        np.minimum, forest.row_subtree_ends, col0
    )


def _seen_by_any(forest: Forest, col0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest range of rows, for each key tile, outside of which none sees a key of it."""
    return _reduce(np.minimum, forest.row_seen_from, col0), _reduce(
        np.maximum, forest.row_subtree_ends, col0
    )


def _reduce(function: np.ufunc, values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """`function` over the values from each begin to the next."""
    return function.reduceat(values, begins) if len(begins) else values[:0]


def _window_pairs(
    forest: Forest, query0: np.ndarray, query1: np.ndarray, col0: np.ndarray, col1: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of a query tile and a key tile in which some pair is allowed.

    Args:
        forest: the segments; it has a window.
        query0: (n,) first query of each query tile, ascending.
        query1: (n,) its end.
        col0: (m,) first key of each key tile, ascending.
        col1: (m,) its end.

    Returns:
        Query tile, key tile, and whether every pair in them is allowed, sorted by query tile.
    """
    rows, positions, window = forest.query_rows, forest.positions, forest.window_size or 0
    if not len(rows):
        return col0[:0], col0[:0], np.empty(0, dtype=bool)
    # Neighbouring rows of one query tile. Their keys lie among them, where each row sees itself,
    # behind them in a bidirectional segment, and before them on the path of the first.
    begin = np.unique(np.concatenate([query0, np.flatnonzero(np.diff(rows, prepend=-2) > 1)]))
    low, high = rows[begin], rows[np.append(begin[1:], len(rows)) - 1] + 1
    final = forest.segment_of(high - 1)
    own_end = np.where(forest.bidirectional[final], forest.ends[final], high)
    path = _PathKeys(forest, np.repeat(np.arange(len(col0)), col1 - col0))
    bounds = (x.tolist() for x in (forest.segment_of(low), low, high, own_end))
    pieces = [path.seen_by(*x) for x in zip(*bounds, strict=True)]
    count = [len(x) for x in pieces]
    row_tile = np.searchsorted(query0, begin, side="right") - 1
    pairs = np.unique(np.repeat(row_tile, count) * len(col0) + np.concatenate(pieces))
    row_tile, key_tile = np.divmod(pairs, len(col0))

    every = _seen_by_all(forest, col0)
    last = _reduce(np.maximum, positions[rows], query0)[row_tile]
    full = (
        (every[0][key_tile] <= rows[query0][row_tile])
        & (rows[query1 - 1][row_tile] < every[1][key_tile])
        & (last - _reduce(np.minimum, positions, col0)[key_tile] < window)
    )
    return row_tile, key_tile, full


class _PathKeys:
    """The key tiles that rows see through a window, for rows in ascending order.

    Every key before some neighbouring rows that one of them sees lies on the path of the first.
    """

    def __init__(self, forest: Forest, key_tile: np.ndarray):
        """Takes the segments, with a window, and the key tile of each row (T,)."""
        self._key_tile, self._positions = key_tile, forest.positions
        self._window = forest.window_size or 0
        self._starts, self._ends, self._depths, self._parents, self._subtree_ends = (
            x.tolist()
            for x in (
                forest.starts, forest.ends, forest.depths, forest.parents, forest.subtree_ends
            )
        )  # fmt: skip
        # The key tiles on the current path, and for each position the place of its tile in them.
        # What is written at a depth stays until a later segment at that depth is written.
        self._tiles, self._place = np.empty((2, forest.max_length), dtype=np.int64)
        self._written = 0

    def seen_by(self, segment: int, low: int, high: int, end: int) -> np.ndarray:
        """The key tiles, ascending, that rows [low, high) see.

        Args:
            segment: that of the first row.
            low: the first row.
            high: the end of the rows.
            end: the end of the keys that the last row sees.
        """
        self._write_path(segment)
        # The first position among the rows so far: who sees the keys of a segment are the rows up
        # to the end of its subtree, and the one that lies least deep sees back furthest.
        least = np.minimum.accumulate(self._positions[low:high]) - self._window + 1
        # Positions on the path, [bottom, top), that are seen and not yet noted.
        bottom = top = above = int(self._positions[low])
        pieces = [np.arange(self._key_tile[low], self._key_tile[end - 1] + 1)]
        node, by_all = segment, False
        # All but the last of these segments end among these rows, and so among no others.
        while node >= 0 and not by_all:
            by_all = self._subtree_ends[node] >= high
            stop = min(high, self._subtree_ends[node])
            seen_from = max(0 if by_all else self._depths[node], int(least[stop - low - 1]))
            if seen_from < above:
                if bottom != above:
                    pieces.append(self._between(bottom, top))
                    top = above
                bottom = seen_from
            above, node = self._depths[node], self._parents[node]
        pieces.append(self._between(bottom, top))
        return np.concatenate(pieces[::-1])

    def _between(self, bottom: int, top: int) -> np.ndarray:
        """The key tiles that hold the positions [bottom, top) of the current path."""
        if bottom == top:
            return self._tiles[:0]
        return self._tiles[self._place[bottom] : self._place[top - 1] + 1]

    def _write_path(self, segment: int) -> None:
        """Writes what lies between the segment of the last call and this one."""
        for node in range(self._written, segment + 1):
            tiles = self._key_tile[self._starts[node] : self._ends[node]]
            if not len(tiles):
                continue
            depth = self._depths[node]
            place = tiles - tiles[0]
            if depth:
                last = self._place[depth - 1]
                place += last + (self._tiles[last] != tiles[0])
            self._place[depth : depth + len(tiles)] = place
            self._tiles[place] = tiles
        self._written = max(self._written, segment + 1)


def balanced_key_tiles(
    forest: Forest, block_m: int, block_n: int, *, heads: int, group: int, processors: int
) -> KeyTiles:
    """Key tiles cut so that no item outweighs the others.

    Args:
        forest: the segments.
        block_m: queries in a query tile.
        block_n: keys in a key tile.
        heads: KV heads.
        group: query heads per KV head.
        processors: programs that run at once.
    """
    visits = KeyVisits.from_forest(forest, block_m, block_n)
    whole = KeyTiles.from_visits(visits, max_chunk=None)
    share = whole.costs.sum() * heads * group / (CHUNKS_PER_PROCESSOR * processors)
    return KeyTiles.from_visits(visits, max_chunk=max(1, int(max(share, MIN_CHUNK) // group)))


def backward_order(
    keys: KeyTiles,
    queries: QueryTiles | None,
    key_area: int,
    query_area: int,
    group: int,
    *,
    values: KeyTiles | None = None,
    value_area: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Merges key tiles and query tiles into one work list for one launch.

    Args:
        keys: key tiles; a program serves all query heads of its KV head.
        queries: query tiles; a program serves one query head. None if key tiles add up dQ.
        key_area: block_m * block_n of the key tiles.
        query_area: block_m * block_n of the query tiles.
        group: query heads per KV head.
        values: key tiles of the programs that sum dV, if those of `keys` sum dK alone.
        value_area: block_m * block_n of these.

    Returns:
        (n, 2) int32, longest first: item and query head within the group. Items are numbered in
        this order: key tiles, those of values, query tiles. And their (n,) costs.
    """
    products = (KEY_PRODUCTS if values is None else DK_PRODUCTS) + (queries is None)
    costs = [keys.costs * group * key_area * products]
    if values is not None:
        costs.append(values.costs * group * value_area * DV_PRODUCTS)
    num_keys = sum(map(len, costs))
    items, heads = [np.arange(num_keys)], [np.zeros(num_keys)]
    if queries is not None:
        costs.append(np.repeat(queries.costs, group) * query_area * QUERY_PRODUCTS)
        num_queries = len(queries.items)
        items.append(num_keys + np.repeat(np.arange(num_queries), group))
        heads.append(np.tile(np.arange(group), num_queries))
    pairs = np.stack([np.concatenate(items), np.concatenate(heads)], axis=1)
    cost = np.concatenate(costs)
    order = np.argsort(-cost, kind="stable")
    return pairs[order].astype(np.int32), cost[order]
