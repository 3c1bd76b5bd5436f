"""Dealing the rows of a layout to ranks: nothing lost, even, and few keys that travel."""

from __future__ import annotations

import numpy as np
import pytest

from prefix_attn import PrefixLayout
from prefix_attn.dealing import TILE, UNEVEN, deal, keys_move_less, moved_rows, path_segments

LAYOUTS = {
    "one group": PrefixLayout.from_lengths([4096], [[512] * 8]),
    "ragged": PrefixLayout.from_lengths([3000], [[700, 1, 0, 333, 90, 1200]]),
    "several groups": PrefixLayout.from_lengths([900, 0, 40], [[300, 200], [64] * 5, [7, 9]]),
    "a tree": PrefixLayout.from_tree([700, 20, 300, 150, 400], [-1, 0, 1, 1, 0]),
    "one sequence": PrefixLayout.from_lengths([2048], [[]]),
    "independent sequences": PrefixLayout.from_lengths([0], [[4000] * 5]),
    "long and short": PrefixLayout.from_lengths([0, 0], [[16384], [128] * 128]),
    "short and twice as long": PrefixLayout.from_lengths([0], [[2000] * 2 + [4000] * 3]),
    "two and a pair": PrefixLayout.from_tree([1000] * 4, [-1, -1, -1, 2]),
    "large groups": PrefixLayout.from_lengths([2048, 700, 1500], [[400] * 6, [900] * 5, [90] * 9]),
    "an empty tail": PrefixLayout.from_lengths([500, 0], [[300, 0], [0]]),
    "fewer tokens than ranks": PrefixLayout.from_lengths([3], [[1, 0, 1]]),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_are_the_same_rows(name: str, ranks: int) -> None:
    """Cutting segments changes nobody's keys, and every row has a rank."""
    forest = LAYOUTS[name].forest
    pieces, rank = deal(forest, ranks)
    assert pieces.num_tokens == forest.num_tokens
    assert pieces.positions.tolist() == forest.positions.tolist()
    assert pieces.row_subtree_ends.tolist() == forest.row_subtree_ends.tolist()
    assert len(rank) == pieces.num_segments
    assert set(rank.tolist()) <= set(range(ranks))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_work_are_even(name: str, ranks: int) -> None:
    """Rows to within two tiles, and work to within that of a tile or a twentieth."""
    forest = LAYOUTS[name].forest
    pieces, rank = deal(forest, ranks)
    rows = np.bincount(rank, weights=pieces.lengths, minlength=ranks)
    work = np.bincount(rank, weights=pieces.segment_pairs, minlength=ranks)
    assert rows.max() <= forest.num_tokens / ranks + 2 * TILE
    assert work.max() <= work.mean() + max(UNEVEN * work.mean(), TILE * forest.max_length)


SYSTEM = (
    [200, *[4096, *[512] * 8] * 4],
    [-1, *[x for i in range(4) for x in [0, *[9 * i + 1] * 8]]],
)


@pytest.mark.parametrize(
    ("layout", "ranks", "moved"),
    [
        (PrefixLayout.from_lengths([4096] * 4, [[512] * 8] * 4), 4, 0),
        (PrefixLayout.from_lengths([4096] * 4, [[512] * 8] * 4), 8, 4 * 4096),
        (PrefixLayout.from_lengths([8192] * 2, [[1024] * 8] * 2), 8, 2 * 3 * 8192),
        (PrefixLayout.from_tree(*SYSTEM), 4, 3 * 200),
        (PrefixLayout.from_lengths([4096] * 4, [[512] * 8 + [0]] * 4), 4, 0),
        # Work per row differs too much: both groups are spread over both ranks.
        (PrefixLayout.from_lengths([0, 0], [[16384], [128] * 128]), 2, 16384),
    ],
    ids=[
        "one to a rank",
        "two ranks each",
        "four ranks each",
        "a system prompt",
        "empty ends",
        "uneven work",
    ],
)
def test_groups_are_dealt_to_few_ranks(layout: PrefixLayout, ranks: int, moved: int) -> None:
    """Keys of a prefix go to the other ranks of its group, not to all."""
    found = moved_rows(layout.forest, ranks)
    tiles = TILE * layout.num_groups * ranks  # what does not fit, and its path
    assert abs(found - moved) <= tiles + 0.02 * layout.num_tokens, found


def test_few_ranks_to_a_group_let_keys_move_less() -> None:
    """Of four groups on four ranks nothing moves, though they share most of their rows."""
    groups = PrefixLayout.from_lengths([4096] * 4, [[128] * 4] * 4).forest
    one = PrefixLayout.from_lengths([4 * 4096], [[128] * 16]).forest
    assert keys_move_less(groups, 4, heads=8, kv_heads=8)
    assert not keys_move_less(one, 4, heads=8, kv_heads=8)


def test_deep_trees_are_dealt() -> None:
    """A chain of more turns than Python's stack is deep."""
    turns = 3000
    layout = PrefixLayout.from_tree([3] * turns, list(range(-1, turns - 1)))
    pieces, rank = deal(layout.forest, 4)
    rows = np.bincount(rank, weights=pieces.lengths)
    assert rows.max() <= layout.num_tokens / 4 + 2 * TILE


def test_small_subtrees_stay_in_one_piece() -> None:
    layout = LAYOUTS["one group"]
    pieces, rank = deal(layout.forest, 4)
    rank_of_rows = np.repeat(rank, pieces.lengths)
    for start in range(4096, layout.num_tokens, 512):
        assert len(set(rank_of_rows[start : start + 512].tolist())) == 1
    many = PrefixLayout.from_lengths([64] * 16, [[32] * 4] * 16)  # groups of 192 rows
    pieces, rank = deal(many.forest, 4)
    for r in range(4):  # so no key travels
        assert (rank[path_segments(pieces, rank == r)] == r).all()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rule_compares_what_each_way_moves(ranks: int) -> None:
    """The rule against bytes counted row by row: keys of shared rows, heads of all rows."""
    heads, kv_heads = 32, 8
    for prompt, response in ((4096, 64), (1024, 1024), (256, 2048), (0, 512)):
        layout = PrefixLayout.from_lengths([prompt], [[response] * 8])
        pieces, rank = deal(layout.forest, ranks)
        received = [
            pieces.lengths[path_segments(pieces, rank == r) & (rank != r)].sum()
            for r in range(ranks)
        ]
        keys = np.mean(received) * 2 * kv_heads
        rows = layout.num_tokens / ranks
        traded = rows * (ranks - 1) / ranks * (2 * heads + 2 * max(kv_heads, ranks))
        if not 0.9 < keys / traded < 1.1:
            assert keys_move_less(layout.forest, ranks, heads, kv_heads) == (keys < traded)
