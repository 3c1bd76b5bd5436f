"""Every allowed (row, key) pair is covered exactly once, and full tiles hold no forbidden one."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_attn.backends import schedule
from prefix_attn.backends.schedule import (
    KeyTiles,
    QueryTiles,
    backward_order,
    balanced_key_tiles,
)
from prefix_attn.forest import Forest
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing import forests

# Columns that count visited tiles.
FULL_VISITS = [schedule.NUM_LISTED, schedule.NUM_OWN]
QUERY_VISITS = [*FULL_VISITS, schedule.NUM_MASKED]
KEY_VISITS = [schedule.NUM_FULL, schedule.NUM_BEFORE, schedule.NUM_AFTER]
BLOCKS = [(4, 4), (8, 4), (4, 8), (6, 5), (16, 8)]


def _some_segments(forest: tuple[list[int], list[int]]) -> st.SearchStrategy[list[int] | None]:
    indices = st.lists(st.integers(0, len(forest[0]) - 1), unique=True)
    return st.none() | indices


def _drawn(data: st.DataObject, forest: tuple[list[int], list[int]]) -> list[list[int] | None]:
    """Segments with queries, and bidirectional ones."""
    return [data.draw(_some_segments(forest)), data.draw(_some_segments(forest))]


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """Which keys are seen, beyond the segments: the arguments of `Forest.from_segments`."""
    return {
        "window_size": draw(st.none() | st.integers(1, 60)),
        "prefix_causal": draw(st.booleans()),
    }


def _forest(
    lengths: list[int],
    parents: list[int],
    rule: dict[str, Any] | None = None,
    query_segments: list[int] | None = None,
    bidirectional: list[int] | None = None,
) -> tuple[Forest, np.ndarray]:
    """The forest and the dense (Tq, T) mask; both lists name segments."""
    flags = [i in (bidirectional or ()) for i in range(len(lengths))]
    layout = PrefixLayout.from_tree(lengths, parents, bidirectional=flags)
    if query_segments is not None:
        layout = layout.queries_for(query_segments)
    rule = rule or {}
    return (
        Forest.from_segments(layout.segments.numpy(), **rule),
        layout.materialize(**rule).numpy(),
    )


def _cover_queries(tiles: QueryTiles, mask: np.ndarray, block_n: int) -> np.ndarray:
    """Counts the visits of every pair by query tiles; asserts that full tiles are full."""
    visits = np.zeros(mask.shape, dtype=int)
    for row0, row1, query0, list0, listed, own0, own, masked0, masked in tiles.items.tolist():
        queries = slice(query0, query0 + row1 - row0)
        full = tiles.columns[list0 : list0 + listed].tolist()
        full += [own0 + j * block_n for j in range(own)]
        for c in full:
            assert c + block_n <= mask.shape[1], "a full tile reaches past the last key"
            assert mask[queries, c : c + block_n].all(), f"forbidden pair in tile {row0}, {c}"
            visits[queries, c : c + block_n] += 1
        for c, end in tiles.masked[masked0 : masked0 + masked].tolist():
            assert c < end <= c + block_n
            visits[queries, c:end] += mask[queries, c:end]
    return visits


def _cover_keys(tiles: KeyTiles, mask: np.ndarray, block_m: int, window: bool) -> np.ndarray:
    """Counts the visits of every pair by key tiles; asserts that full tiles are full."""
    visits = np.zeros(mask.shape, dtype=int)

    def queries_of(begin: int, count: int) -> list[int]:
        if window:
            return tiles.queries[begin : begin + count].tolist()
        return [begin + i * block_m for i in range(count)]

    for item in tiles.items.tolist():
        col0, col1, full0, num_full, before0, num_before, after0, num_after, _ = item
        for row in queries_of(full0, num_full):
            assert row + block_m <= mask.shape[0]
            assert mask[row : row + block_m, col0:col1].all()
            visits[row : row + block_m, col0:col1] += 1
        for row in queries_of(before0, num_before) + queries_of(after0, num_after):
            visits[row : row + block_m, col0:col1] += mask[row : row + block_m, col0:col1]
    return visits


@settings(max_examples=2000, deadline=None)
@given(data=st.data(), forest=forests(12, 23), rule=rules(), blocks=st.sampled_from(BLOCKS))
def test_query_tiles_cover_every_allowed_pair_once(data, forest, rule, blocks):
    tree, mask = _forest(*forest, rule, *_drawn(data, forest))
    tiles = QueryTiles.from_forest(tree, *blocks)
    np.testing.assert_array_equal(_cover_queries(tiles, mask, blocks[1]), mask)


@settings(max_examples=2000, deadline=None)
@given(
    data=st.data(),
    forest=forests(12, 23),
    rule=rules(),
    blocks=st.sampled_from(BLOCKS),
    chunk=st.sampled_from([None, 1, 3]),
)
def test_key_tiles_cover_every_allowed_pair_once(data, forest, rule, blocks, chunk):
    tree, mask = _forest(*forest, rule, *_drawn(data, forest))
    tiles = KeyTiles.from_forest(tree, *blocks, max_chunk=chunk)
    covered = _cover_keys(tiles, mask, blocks[0], window=rule["window_size"] is not None)
    np.testing.assert_array_equal(covered, mask)


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    forest=forests(12, 23),
    rule=rules(),
    blocks=st.sampled_from(BLOCKS),
    chunk=st.sampled_from([None, 1, 3]),
)
def test_key_tiles_own_every_key_once_and_every_slot_once(data, forest, rule, blocks, chunk):
    tree, mask = _forest(*forest, rule, *_drawn(data, forest))
    tiles = KeyTiles.from_forest(tree, *blocks, max_chunk=chunk)
    owned = np.zeros(mask.shape[1], dtype=int)
    for item in tiles.items[tiles.items[:, schedule.SLOT] < 0].tolist():
        owned[item[0] : item[1]] += 1
    slots = np.sort(tiles.items[tiles.items[:, schedule.SLOT] >= 0, schedule.SLOT])
    np.testing.assert_array_equal(slots, np.arange(tiles.num_slots))
    for col0, col1, begin, stop in tiles.splits.tolist():
        owned[col0:col1] += 1
        part = tiles.items[
            (tiles.items[:, schedule.SLOT] >= begin) & (tiles.items[:, schedule.SLOT] < stop)
        ]
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
        np.testing.assert_array_equal(_cover_keys(keys, mask, block_m, window=False), mask)


def test_work_lists_are_longest_first():
    tree, _ = _forest([40, 9, 70, 17, 3], [-1, 0, 0, 0, 0])
    queries = QueryTiles.from_forest(tree, 8, 4)
    keys = balanced_key_tiles(tree, 4, 8, heads=2, group=4, processors=4)
    order, costs = backward_order(keys, queries, 32, 32, group=4)
    for work in (queries.costs, keys.costs, costs):
        assert (np.diff(work) <= 0).all()
    entries = {tuple(e) for e in order.tolist()}
    assert len(entries) == len(order) == len(keys.items) + 4 * len(queries.items)


def test_balanced_key_tiles_look_for_pairs_once(monkeypatch):
    """They are most of the work under a window; a second cut of the tiles needs no others."""
    found = []
    pairs = schedule._window_pairs
    monkeypatch.setattr(schedule, "_window_pairs", lambda *a: found.append(1) or pairs(*a))
    tree, _ = _forest([40, 9, 70, 17, 3], [-1, 0, 0, 0, 0], {"window_size": 20})
    balanced_key_tiles(tree, 4, 8, heads=2, group=4, processors=4)
    assert found == [1]


@pytest.mark.parametrize(("fused", "products"), [(False, (3, 2, 3)), (True, (4, 2))])
def test_order_of_the_backward_weighs_each_kind_by_its_products(fused, products):
    tree, _ = _forest([40, 9, 70, 17, 3], [-1, 0, 0, 0, 0], {})
    keys, values = (KeyTiles.from_forest(tree, m, 8) for m in (4, 16))
    queries = QueryTiles.from_forest(tree, 8, 4)
    order, costs = backward_order(
        keys, None if fused else queries, 4 * 8, 8 * 4, 3, values=values, value_area=16 * 8
    )
    assert (np.diff(costs) <= 0).all()
    kinds = [(keys, 32, 3), (values, 128, 3), (queries, 32, 1)]
    first = 0
    for (tiles, area, heads), count in zip(kinds, products, strict=not fused):
        mine = (order[:, 0] >= first) & (order[:, 0] < first + len(tiles.items))
        expected = tiles.costs[order[mine, 0] - first] * area * heads * count
        assert np.allclose(costs[mine], expected)
        first += len(tiles.items)
    assert order[:, 0].max() == first - 1


def test_tables_grow_linearly_with_tokens():
    sizes = []
    for groups in (4, 8, 16):
        layout = PrefixLayout.from_lengths([1024] * groups, [[128] * 8] * groups)
        tree = Forest.from_segments(layout.segments.numpy())
        queries = QueryTiles.from_forest(tree, 128, 64)
        keys = balanced_key_tiles(tree, 64, 128, heads=8, group=4, processors=132)
        sizes.append(
            (queries.items.size + queries.columns.size + queries.masked.size, keys.items.size)
        )
    for before, after in pairwise(sizes):
        assert all(b <= 2.1 * a for a, b in zip(before, after, strict=True))


def test_short_segments_of_a_deep_tree_share_masked_tiles():
    """A comb: each of 200 segments has a leaf and the next segment, 8 tokens each."""
    depth = 200
    lengths, parents = [8] * (2 * depth), [-1]
    for i in range(1, 2 * depth):
        parents.append(i - 1 if i % 2 else i - 2)
    tree, mask = _forest(lengths, parents)
    tiles = QueryTiles.from_forest(tree, 128, 64)
    np.testing.assert_array_equal(_cover_queries(tiles, mask, 64), mask)
    # Half of the keys before a tile belong to leaves that its rows do not see.
    visited = 128 * 64 * tiles.items[:, QUERY_VISITS].sum()
    assert visited <= 3 * mask.sum()


def _comb(depth: int) -> tuple[list[int], list[int]]:
    """Segments of one token: each has a leaf, and behind it the segment that goes on."""
    parents = [-1]
    for i in range(depth):
        parents += [2 * i, 2 * i]
    return [1] * len(parents), parents


def _caterpillar(depth: int) -> tuple[list[int], list[int]]:
    """A prefix of 500 tokens, and a comb of short segments with seven leaves each below it."""
    parents = [-1]
    for i in range(depth // 4):
        parents += [8 * i] * 8
    return [500] + [1, 2] * (len(parents) // 2), parents


def _chain(depth: int) -> tuple[list[int], list[int]]:
    return [1] * depth, list(range(-1, depth - 1))


def _rake(depth: int) -> tuple[list[int], list[int]]:
    """A comb of full tiles, a leaf of one token beside each."""
    lengths, parents = _comb(depth)
    return [16 if i % 2 == 0 else 1 for i in range(len(lengths))], parents


def _effort(function: Callable[[], object]) -> tuple[int, int]:
    """Lines of Python that a call runs, and the bytes that it holds at most."""
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    tracemalloc.start()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return lines, peak


@pytest.mark.parametrize("shape", [_comb, _caterpillar, _chain, _rake])
@pytest.mark.parametrize("window", [None, 8, 10**9])
def test_building_takes_no_more_than_its_segments_and_tiles(shape, window):
    efforts, sizes = [], []
    for depth in (150, 600):
        lengths, parents = shape(depth)
        segments = np.stack([lengths, parents, np.ones_like(lengths)])
        forest = Forest.from_segments(segments, window_size=window)
        tiles: list[Any] = []
        effort = _effort(
            lambda forest=forest, tiles=tiles: tiles.extend(
                [QueryTiles.from_forest(forest, 16, 16), KeyTiles.from_forest(forest, 16, 16)]
            )
        )
        visits = tiles[0].items[:, QUERY_VISITS].sum() + tiles[1].items[:, KEY_VISITS].sum()
        efforts.append(effort)
        sizes.append(len(lengths) + visits)
        lines, peak = effort
        assert lines <= 100 * (len(lengths) + visits)
        assert peak <= 1000 * (len(lengths) + visits)
        assert len(tiles[0].columns) + len(tiles[0].masked) <= visits
    assert efforts[1][0] <= 1.5 * efforts[0][0] * sizes[1] / sizes[0]


def test_full_tiles_of_one_path_are_listed_once():
    """A prefix above a comb: every tile of the comb visits it, and one list serves all."""
    lengths, parents = _rake(100)
    lengths[0] = 1600
    tree, mask = _forest(lengths, parents)
    tiles = QueryTiles.from_forest(tree, 16, 16)
    np.testing.assert_array_equal(_cover_queries(tiles, mask, 16), mask)
    assert len(tiles.columns) <= mask.shape[1] // 16
    assert tiles.items[:, schedule.NUM_LISTED].sum() > 100 * 100


def test_tables_of_an_empty_forest_are_empty():
    for lengths, parents in (([], []), ([0, 0], [-1, 0])):
        tree, _ = _forest(lengths, parents)
        assert len(QueryTiles.from_forest(tree, 8, 8).items) == 0
        assert len(KeyTiles.from_forest(tree, 8, 8).items) == 0


def test_a_window_costs_what_it_sees():
    """Tiles visited fall with the window, whatever the length of the path."""
    layout = PrefixLayout.from_lengths([4096], [[512] * 8])
    counts = []
    for window in (None, 2048, 1024, 512, 128):
        tree = Forest.from_segments(layout.segments.numpy(), window_size=window)
        queries, keys = QueryTiles.from_forest(tree, 128, 64), KeyTiles.from_forest(tree, 64, 128)
        counts.append(
            (queries.items[:, QUERY_VISITS].sum(), keys.items[:, KEY_VISITS].sum(), window)
        )
    rows = layout.num_tokens
    for by_query, by_key, window in counts[1:]:
        # Every row sees at most `window` keys; a tile's edges add at most one tile on each side.
        assert by_query <= rows / 128 * ((window + 128) / 64 + 2)
        assert by_key <= rows / 128 * ((window + 128) / 64 + 2)
        assert by_query < counts[0][0]
        assert by_key < counts[0][1]


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    forest=forests(12, 23),
    window=st.integers(1, 60),
    causal=st.booleans(),
    blocks=st.sampled_from(BLOCKS),
)
def test_every_tile_under_a_window_holds_an_allowed_pair(data, forest, window, causal, blocks):
    rule = {"window_size": window, "prefix_causal": causal}
    tree, mask = _forest(*forest, rule, *_drawn(data, forest))
    tiles, (block_m, block_n) = QueryTiles.from_forest(tree, *blocks), blocks
    for row0, row1, query0, list0, listed, _, _, masked0, masked in tiles.items.tolist():
        seen = mask[query0 : query0 + row1 - row0]
        firsts = tiles.columns[list0 : list0 + listed].tolist()
        bounds = [(c, c + block_n) for c in firsts]
        bounds += tiles.masked[masked0 : masked0 + masked].tolist()
        assert all(seen[:, c:end].any() for c, end in bounds)
    keys = KeyTiles.from_forest(tree, *blocks)
    for col0, col1, full0, full, before0, before, *_ in keys.items.tolist():
        for begin, count in ((full0, full), (before0, before)):
            for query in keys.queries[begin : begin + count].tolist():
                assert mask[query : query + block_m, col0:col1].any()


def test_a_window_longer_than_every_path_changes_no_visit():
    layout = PrefixLayout.from_lengths([200, 0], [[50, 70], [33, 1]])
    plain, wide = (
        Forest.from_segments(layout.segments.numpy(), window_size=w) for w in (None, 10**9)
    )
    a, b = (QueryTiles.from_forest(x, 16, 8) for x in (plain, wide))
    assert a.items[:, FULL_VISITS].sum() == b.items[:, FULL_VISITS].sum()


def test_queries_for_suffixes_cost_nothing_for_the_prefix():
    layout = PrefixLayout.from_lengths([4096, 4096], [[128] * 4, [128] * 4])
    some = layout.queries_for([1, 2, 3, 4, 6, 7, 8, 9])
    whole, part = (
        QueryTiles.from_forest(Forest.from_segments(x.segments.numpy()), 128, 64)
        for x in (layout, some)
    )
    below = whole.items[(whole.items[:, schedule.ROW0] % 4608) >= 4096]  # tiles of suffixes
    assert len(part.items) == len(below) == 8
    assert part.items[:, QUERY_VISITS].sum() == below[:, QUERY_VISITS].sum()
