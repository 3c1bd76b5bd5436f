"""Every allowed (row, key) pair is covered exactly once, and full tiles hold no forbidden one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_attn.layout import PrefixLayout
from prefix_attn.schedule import (
    Forest,
    KeyTiles,
    QueryTiles,
    backward_order,
    balanced_key_tiles,
)

BLOCKS = [(4, 4), (8, 4), (4, 8), (6, 5), (16, 8)]


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Random forests in depth-first order, empty segments included."""
    count = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, 23), min_size=count, max_size=count))
    parents, path = [], []
    for i in range(count):
        keep = draw(st.integers(0, len(path)))
        path = path[:keep]
        parents.append(path[-1] if path else -1)
        path.append(i)
    return lengths, parents


def _forest(lengths: list[int], parents: list[int]) -> tuple[Forest, np.ndarray]:
    layout = PrefixLayout.from_tree(lengths, parents)
    return Forest.from_segments(*layout.segments.numpy()), layout.materialize().numpy()


def _cover_queries(tiles: QueryTiles, mask: np.ndarray, block_n: int) -> np.ndarray:
    """Counts the visits of every pair by query tiles; asserts that full tiles are full."""
    visits = np.zeros(mask.shape, dtype=int)
    for row0, row1, list0, listed, own0, own, masked0, masked in tiles.items.tolist():
        full = tiles.columns[list0 : list0 + listed].tolist()
        full += [own0 + j * block_n for j in range(own)]
        for c in full:
            assert c + block_n <= mask.shape[1], "a full tile reaches past the last key"
            assert mask[row0:row1, c : c + block_n].all(), f"forbidden pair in tile {row0}, {c}"
            visits[row0:row1, c : c + block_n] += 1
        for c, end in tiles.masked[masked0 : masked0 + masked].tolist():
            assert c < end <= c + block_n
            visits[row0:row1, c:end] += mask[row0:row1, c:end]
    return visits


def _cover_keys(tiles: KeyTiles, mask: np.ndarray, block_m: int) -> np.ndarray:
    """Counts the visits of every pair by key tiles; asserts that full tiles are full."""
    visits = np.zeros(mask.shape, dtype=int)
    for item in tiles.items.tolist():
        col0, col1, full0, num_full, before0, num_before, after0, num_after, _ = item
        rows = slice(full0, full0 + num_full * block_m)
        if num_full:
            assert rows.stop <= mask.shape[0]
            assert mask[rows, col0:col1].all()
            visits[rows, col0:col1] += 1
        for start, count in ((before0, num_before), (after0, num_after)):
            rows = slice(start, start + count * block_m)
            visits[rows, col0:col1] += mask[rows, col0:col1]
    return visits


@settings(max_examples=1500, deadline=None)
@given(forest=forests(), blocks=st.sampled_from(BLOCKS))
def test_query_tiles_cover_every_allowed_pair_once(forest, blocks):
    tree, mask = _forest(*forest)
    tiles = QueryTiles.from_forest(tree, *blocks)
    np.testing.assert_array_equal(_cover_queries(tiles, mask, blocks[1]), mask)


@settings(max_examples=1500, deadline=None)
@given(forest=forests(), blocks=st.sampled_from(BLOCKS), chunk=st.sampled_from([None, 1, 3]))
def test_key_tiles_cover_every_allowed_pair_once(forest, blocks, chunk):
    tree, mask = _forest(*forest)
    tiles = KeyTiles.from_forest(tree, *blocks, max_chunk=chunk)
    np.testing.assert_array_equal(_cover_keys(tiles, mask, blocks[0]), mask)


@settings(max_examples=500, deadline=None)
@given(forest=forests(), blocks=st.sampled_from(BLOCKS), chunk=st.sampled_from([None, 1, 3]))
def test_key_tiles_own_every_key_once_and_every_slot_once(forest, blocks, chunk):
    tree, mask = _forest(*forest)
    tiles = KeyTiles.from_forest(tree, *blocks, max_chunk=chunk)
    owned = np.zeros(len(mask), dtype=int)
    for item in tiles.items[tiles.items[:, 8] < 0].tolist():
        owned[item[0] : item[1]] += 1
    slots = np.sort(tiles.items[tiles.items[:, 8] >= 0, 8])
    np.testing.assert_array_equal(slots, np.arange(tiles.num_slots))
    for col0, col1, begin, stop in tiles.splits.tolist():
        owned[col0:col1] += 1
        part = tiles.items[(tiles.items[:, 8] >= begin) & (tiles.items[:, 8] < stop)]
        assert (part[:, :2] == (col0, col1)).all()
        assert len(part) == stop - begin > 1
    assert (owned == 1).all()


@pytest.mark.parametrize("prefix", range(1, 34))
def test_query_tiles_at_every_offset_of_a_suffix_in_a_block(prefix):
    tree, mask = _forest([prefix, 9, 0, 17, 3], [-1, 0, 0, 0, 0])
    for block_m, block_n in ((16, 16), (32, 16), (16, 32)):
        tiles = QueryTiles.from_forest(tree, block_m, block_n)
        np.testing.assert_array_equal(_cover_queries(tiles, mask, block_n), mask)
        keys = KeyTiles.from_forest(tree, block_m, block_n)
        np.testing.assert_array_equal(_cover_keys(keys, mask, block_m), mask)


def test_work_lists_are_longest_first():
    tree, _ = _forest([40, 9, 70, 17, 3], [-1, 0, 0, 0, 0])
    queries = QueryTiles.from_forest(tree, 8, 4)
    keys = balanced_key_tiles(tree, 4, 8, heads=2, group=4, processors=4)
    order, costs = backward_order(keys, queries, 32, 32, group=4)
    for work in (queries.costs, keys.costs, costs):
        assert (np.diff(work) <= 0).all()
    entries = {tuple(e) for e in order.tolist()}
    assert len(entries) == len(order) == len(keys.items) + 4 * len(queries.items)


def test_tables_grow_linearly_with_tokens():
    sizes = []
    for groups in (4, 8, 16):
        layout = PrefixLayout.from_lengths([1024] * groups, [[128] * 8] * groups)
        tree = Forest.from_segments(*layout.segments.numpy())
        queries = QueryTiles.from_forest(tree, 128, 64)
        keys = balanced_key_tiles(tree, 64, 128, heads=8, group=4, processors=132)
        sizes.append(
            (queries.items.size + queries.columns.size + queries.masked.size, keys.items.size)
        )
    for before, after in pairwise(sizes):
        assert all(b <= 2.1 * a for a, b in zip(before, after, strict=True))


def test_tables_of_an_empty_forest_are_empty():
    for lengths, parents in (([], []), ([0, 0], [-1, 0])):
        tree, _ = _forest(lengths, parents)
        assert len(QueryTiles.from_forest(tree, 8, 8).items) == 0
        assert len(KeyTiles.from_forest(tree, 8, 8).items) == 0
