"""Which program computes which tile: plain int32 work lists from the segments of a layout.

A query tile visits keys, for the forward pass and dQ; a key tile is visited by queries, for dK and
dV. Both cover every allowed (row, key) pair exactly once. A tile in which every pair is allowed is
"full" and needs no mask; the kernels apply the attention rule to the others.

Work lists are sorted longest first, because hardware starts programs in grid order. The forward
grid is (query tile, query head), the backward grid (entry of `backward_order`, KV head), the head
running fastest in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from prefix_attn.layout import subtree_ends_of

# In units of one full tile: what a masked tile costs, and what starting and ending an item costs.
MASKED_COST = 1.3
ITEM_COST = 2.0
# Matrix products per tile of the backward pass: S, dP, dV, dK in a key tile; S, dP, dQ in a query
# tile.
KEY_PRODUCTS = 4
QUERY_PRODUCTS = 3
# A key tile is cut into chunks of at most 1 / CHUNKS_PER_PROCESSOR of a processor's fair share.
CHUNKS_PER_PROCESSOR = 8
MIN_CHUNK = 16
# Layouts whose forests and tables are kept.
CACHED_LAYOUTS = 64


@dataclass(frozen=True, eq=False)
class Forest:
    """The segments of a layout on the host, (S,) int64 each, in depth-first order.

    A first child lies right behind its parent, so a path is a few contiguous runs of rows:
    `run_start` is where the run that a segment belongs to begins, `anchor` the segment above that
    run, or -1.
    """

    starts: np.ndarray
    ends: np.ndarray
    parents: np.ndarray
    subtree_ends: np.ndarray
    run_start: np.ndarray
    anchor: np.ndarray

    @classmethod
    def from_segments(cls, lengths: np.ndarray, parents: np.ndarray) -> Forest:
        """Derives rows and runs from (S,) lengths and parents."""
        lengths, parents = lengths.astype(np.int64), parents.astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        run_start, anchor = starts.tolist(), parents.tolist()
        for i in np.flatnonzero((parents >= 0) & (starts == ends[parents])).tolist():
            run_start[i], anchor[i] = run_start[parents[i]], anchor[parents[i]]
        return cls(
            starts=starts,
            ends=ends,
            parents=parents,
            subtree_ends=subtree_ends_of(parents, ends),
            run_start=np.array(run_start, dtype=np.int64),
            anchor=np.array(anchor, dtype=np.int64),
        )

    @property
    def num_tokens(self) -> int:
        """T, rows on the packed axis."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def row_subtree_ends(self) -> np.ndarray:
        """(T,) int64, end of the subtree of each row's segment."""
        return np.repeat(self.subtree_ends, self.ends - self.starts)


@lru_cache(CACHED_LAYOUTS)
def forest_of(content: bytes) -> Forest:
    """The forest of a layout's `segments`, given as bytes: derived once, not once per layer."""
    return Forest.from_segments(*np.frombuffer(content, dtype=np.int32).reshape(2, -1))


@dataclass(frozen=True, eq=False)
class QueryTiles:
    """Work list of query tiles.

    Attributes:
        items: (n, 8) int32, longest first: row0, row1, list0, num_listed, own0, num_own, masked0,
            num_masked. Rows [row0, row1) visit in full the key tiles at
            `columns[list0 : list0 + num_listed]` and num_own tiles from key own0 on, then, masked,
            `masked[masked0 : masked0 + num_masked]`.
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
        """Cuts the rows into tiles of block_m, whatever segments they span.

        Every key before a tile lies on the path of its first segment, since any other segment of
        the tile starts inside it or hangs below that path. Keys of the segments that all rows
        continue are the first ones on that path, and are visited in full.
        """
        total = forest.num_tokens
        row0 = np.arange(0, total, block_m, dtype=np.int64)
        filled = np.flatnonzero(forest.ends > forest.starts)
        first = filled[np.searchsorted(forest.starts[filled], row0, side="right") - 1]
        ends, run_start, anchor = (
            x.tolist() for x in (forest.ends, forest.run_start, forest.anchor)
        )
        parents, subtree_ends = forest.parents.tolist(), forest.subtree_ends.tolist()

        columns: list[int] = []
        # Per anchor: where its list of full tiles lies in `columns`, and its masked tails.
        lists: dict[int, tuple[int, int, list[tuple[int, int]]]] = {-1: (0, 0, [])}

        def path_list(node: int) -> tuple[int, int, list[tuple[int, int]]]:
            chain = []
            while node not in lists:
                chain.append(node)
                node = anchor[node]
            for node in reversed(chain):
                above0, above_count, above_tails = lists[anchor[node]]
                count = (ends[node] - run_start[node]) // block_n
                begin, tail = len(columns), run_start[node] + count * block_n
                columns.extend(columns[above0 : above0 + above_count])
                columns.extend(range(run_start[node], tail, block_n))
                tails = [*above_tails, (tail, ends[node])] if tail < ends[node] else above_tails
                lists[node] = (begin, above_count + count, tails)
            return lists[node]

        items = np.zeros((len(row0), 8), dtype=np.int32)
        masked: list[tuple[int, int]] = []
        for tile, (low, segment) in enumerate(zip(row0.tolist(), first.tolist(), strict=True)):
            high = min(low + block_m, total)
            shared = segment
            while shared >= 0 and subtree_ends[shared] < high:
                shared = parents[shared]
            # Keys on the path before `full_end` are seen by every row of the tile.
            list0, num_listed, tails = lists[-1]
            own0 = full_end = 0
            if shared >= 0:
                list0, num_listed, tails = path_list(anchor[shared])
                own0, full_end = run_start[shared], min(ends[shared], low)
            num_own = max(0, full_end - own0) // block_n
            ragged = list(tails)
            node, end = segment, high
            while node != (anchor[shared] if shared >= 0 else -1):
                start = run_start[node]
                ragged.append((start + num_own * block_n if start == own0 else start, end))
                node = anchor[node]
                end = ends[node]
            pieces = [
                (col, min(col + block_n, end))
                for start, end in ragged
                for col in range(start, end, block_n)
            ]
            items[tile] = (
                low, high, list0, num_listed, own0, num_own, len(masked), len(pieces),
            )  # fmt: skip
            masked += pieces
        costs = ITEM_COST + items[:, 3] + items[:, 5] + MASKED_COST * items[:, 7]
        order = np.argsort(-costs, kind="stable")
        return cls(
            items=items[order],
            columns=np.array(columns, dtype=np.int32),
            masked=np.array(masked, dtype=np.int32).reshape(-1, 2),
            costs=costs[order],
        )


@dataclass(frozen=True, eq=False)
class KeyTiles:
    """Work list of key tiles, each visited by one contiguous range of query rows.

    Attributes:
        items: (n, 9) int32, longest first: col0, col1, full0, num_full, before0, num_before,
            after0, num_after, slot. Keys [col0, col1) are visited in full by num_full row tiles
            from row full0 on, and masked by those from before0 and after0 on. slot is -1 where the
            item alone owns its keys, else the index of its partial sum.
        splits: (s, 4) int32, for each tile that was split: col0, col1, first slot, end slot.
        num_slots: partial sums in all.
        costs: (n,) float64, in full tiles of one query head.
    """

    items: np.ndarray
    splits: np.ndarray
    num_slots: int
    costs: np.ndarray

    @classmethod
    def from_forest(
        cls, forest: Forest, block_m: int, block_n: int, max_chunk: int | None = None
    ) -> KeyTiles:
        """Cuts the keys into tiles of at most block_n, and their row ranges into chunks.

        Segments that others continue and that fill a tile start a tile of their own: otherwise
        their last keys would drag the neighbour's keys over all rows of the subtree.

        Args:
            forest: the segments.
            block_m: rows in a row tile.
            block_n: keys in a key tile.
            max_chunk: row tiles in a chunk at most; None leaves every tile whole.
        """
        total = forest.num_tokens
        broad = (forest.subtree_ends > forest.ends) & (forest.ends - forest.starts >= block_n)
        cuts = np.unique(np.concatenate([[0, total], forest.starts[broad], forest.ends[broad]]))
        col0 = np.concatenate(
            [np.arange(a, b, block_n) for a, b in pairwise(cuts)] or [np.empty(0, dtype=np.int64)]
        ).astype(np.int64)
        if not len(col0):
            empty = np.empty((0, 9), dtype=np.int32)
            return cls(empty, np.empty((0, 4), dtype=np.int32), 0, np.empty(0))
        col1 = np.append(col0[1:], total)
        row_ends = forest.row_subtree_ends()
        all_end = np.minimum.reduceat(row_ends, col0)  # rows before this see every key
        any_end = np.maximum.reduceat(row_ends, col0)  # rows from this on see none
        diagonal = -(-(col1 - col0) // block_m)
        num_full = np.maximum(0, (all_end - col0) // block_m - diagonal)
        num_rows = -(-(any_end - col0) // block_m)
        num_before = np.where(num_full > 0, diagonal, num_rows)

        # Row tile j of a key tile starts at col0 + j * block_m; a chunk owns tiles [low, high).
        chunks = np.ones_like(num_rows) if max_chunk is None else -(-num_rows // max_chunk)
        tile = np.repeat(np.arange(len(col0)), chunks)
        first = np.cumsum(chunks) - chunks
        index = np.arange(len(tile)) - first[tile]
        low = index * num_rows[tile] // chunks[tile]
        high = (index + 1) * num_rows[tile] // chunks[tile]
        full_begin, full_stop = num_before[tile], (num_before + num_full)[tile]

        split = chunks[tile] > 1
        slot = np.where(split, np.cumsum(split) - 1, -1)
        items = np.zeros((len(tile), 9), dtype=np.int64)
        items[:, 0], items[:, 1], items[:, 8] = col0[tile], col1[tile], slot
        parts = ((full_begin, full_stop), (0, full_begin), (full_stop, num_rows[tile]))
        for field, (begin, stop) in zip((2, 4, 6), parts, strict=True):
            begin, stop = np.maximum(begin, low), np.minimum(stop, high)
            items[:, field] = col0[tile] + begin * block_m
            items[:, field + 1] = np.maximum(0, stop - begin)
        owners = np.flatnonzero(chunks > 1)
        stops = np.cumsum(chunks[owners])
        splits = np.stack([col0[owners], col1[owners], stops - chunks[owners], stops], axis=1)
        costs = ITEM_COST + items[:, 3] + MASKED_COST * (items[:, 5] + items[:, 7])
        order = np.argsort(-costs, kind="stable")
        return cls(
            items=items[order].astype(np.int32),
            splits=splits.astype(np.int32),
            num_slots=int(split.sum()),
            costs=costs[order],
        )


def balanced_key_tiles(
    forest: Forest, block_m: int, block_n: int, *, heads: int, group: int, processors: int
) -> KeyTiles:
    """Key tiles cut so that no item outweighs the others.

    Args:
        forest: the segments.
        block_m: rows in a row tile.
        block_n: keys in a key tile.
        heads: KV heads.
        group: query heads per KV head.
        processors: programs that run at once.
    """
    whole = KeyTiles.from_forest(forest, block_m, block_n)
    share = whole.costs.sum() * heads * group / (CHUNKS_PER_PROCESSOR * processors)
    return KeyTiles.from_forest(
        forest, block_m, block_n, max_chunk=max(1, int(max(share, MIN_CHUNK) // group))
    )


def backward_order(
    keys: KeyTiles, queries: QueryTiles, key_area: int, query_area: int, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merges key tiles and query tiles into one work list for one launch.

    Args:
        keys: key tiles; a program serves all query heads of its KV head.
        queries: query tiles; a program serves one query head.
        key_area: block_m * block_n of the key tiles.
        query_area: block_m * block_n of the query tiles.
        group: query heads per KV head.

    Returns:
        (n, 2) int32, longest first: item and query head within the group; items from
        `len(keys.items)` on are query tiles. And their (n,) costs.
    """
    num_keys, num_queries = len(keys.items), len(queries.items)
    item = np.concatenate(
        [np.arange(num_keys), num_keys + np.repeat(np.arange(num_queries), group)]
    )
    head = np.concatenate([np.zeros(num_keys), np.tile(np.arange(group), num_queries)])
    costs = np.concatenate(
        [
            keys.costs * group * key_area * KEY_PRODUCTS,
            np.repeat(queries.costs, group) * query_area * QUERY_PRODUCTS,
        ]
    )
    order = np.argsort(-costs, kind="stable")
    return np.stack([item, head], axis=1)[order].astype(np.int32), costs[order]
