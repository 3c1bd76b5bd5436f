"""pack_bins: micro-batches that are charged their shared prefixes once."""

from __future__ import annotations

import time
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.bins import STEPS, first_fit
from prefix_attn import PrefixLayout, pack_bins
from prefix_attn.micro import Plan
from prefix_attn.radix import find_prefixes

TOKENS = st.lists(st.integers(0, 1), max_size=6)  # two ids: prefixes meet at every depth
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=8)


def unique_tokens(sequences, indices):
    """By sets of prefixes, apart from the radix tree."""
    return len({tuple(sequences[i][: n + 1]) for i in indices for n in range(len(sequences[i]))})


def least_bins(sequences, order, max_tokens):
    """The fewest contiguous bins of an order, and the fewest tokens with them: all cuts tried."""
    count = len(order)
    for cuts in range(count):
        costs = []
        for chosen in combinations(range(1, count), cuts):
            bins = [order[a:b] for a, b in pairwise([0, *chosen, count])]
            sizes = [unique_tokens(sequences, one) for one in bins]
            if max(sizes) <= max_tokens:
                costs.append(sum(sizes))
        if costs:
            return cuts + 1, min(costs)
    raise AssertionError


@given(SEQUENCES, st.integers(6, 20), st.integers(1, 8))
def test_pack_bins_holds_every_index_once_within_its_tokens(sequences, max_tokens, asked):
    num_bins = min(asked, len(sequences))
    bins = pack_bins(sequences, max_tokens, num_bins=num_bins)
    assert sorted(i for one in bins for i in one) == list(range(len(sequences)))
    assert all(bins)
    assert len(bins) >= num_bins
    assert max(unique_tokens(sequences, one) for one in bins) <= max_tokens
    fewest = pack_bins(sequences, max_tokens)
    assert len(bins) == max(num_bins, len(fewest))


@given(SEQUENCES, st.integers(6, 20), st.integers(1, 4))
def test_pack_bins_in_order_hold_no_more_than_one_of_them(sequences, max_tokens, min_tokens):
    """In micro-groups, where prefixes are held from their first bin to their last."""
    bins = pack_bins(sequences, max_tokens)
    batch_of = np.repeat(np.arange(len(bins)), [len(one) for one in bins])
    forest = find_prefixes([np.array(sequences[i], dtype=np.int64) for one in bins for i in one])
    plan = Plan(forest, batch_of, len(bins), min_tokens=min_tokens)
    assert plan.tokens_held <= plan.tokens_apart <= max_tokens


@given(SEQUENCES, st.integers(6, 20))
def test_pack_bins_walks_depth_first(sequences, max_tokens):
    order = [i for one in pack_bins(sequences, max_tokens) for i in one]
    for prefix in {tuple(x[:n]) for x in sequences for n in range(1, len(x) + 1)}:
        inside = [tuple(sequences[i][: len(prefix)]) == prefix for i in order]
        first, behind = inside.index(True), len(inside) - inside[::-1].index(True)
        assert all(inside[first:behind])


@given(SEQUENCES, st.integers(6, 20))
def test_pack_bins_cuts_its_order_best(sequences, max_tokens):
    bins = pack_bins(sequences, max_tokens)
    tokens = sum(unique_tokens(sequences, one) for one in bins)
    order = [i for one in bins for i in one]
    assert (len(bins), tokens) == least_bins(sequences, order, max_tokens)
    leaves = PrefixLayout.from_sequences(sequences)[0].sequence_leaves
    assert (len(bins), tokens) <= least_bins(sequences, leaves.argsort().tolist(), max_tokens)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_pack_bins_needs_no_more_bins_than_first_fit(step):
    sequences = step.draw(np.random.default_rng(1))
    bins = pack_bins(sequences, step.max_tokens)
    assert len(bins) <= len(first_fit([len(x) for x in sequences], step.max_tokens))


def test_pack_bins_repeats_no_group_that_fits():
    groups = [[[g] * 5 + [g, i] for i in range(3)] for g in range(4)]  # 11 unique tokens each
    sequences = [group[i] for i in range(3) for group in groups]  # interleaved
    bins = pack_bins(sequences, 23)
    assert sorted(sorted(sequences[i][0] for i in one) for one in bins) == [
        [0, 0, 0, 1, 1, 1],
        [2, 2, 2, 3, 3, 3],
    ]


def test_pack_bins_makes_further_cuts_between_groups():
    sequences = [[g, g, i] for g in range(4) for i in range(2)]
    assert pack_bins(sequences, 100) == [list(range(8))]
    assert pack_bins(sequences, 100, num_bins=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pack_bins(sequences, 100, num_bins=8) == [[i] for i in range(8)]


def test_pack_bins_takes_tensors_empty_sequences_and_none():
    assert pack_bins([], 5) == []
    assert pack_bins([[], torch.tensor([1, 2]), np.array([1, 2, 3])], 3) == [[0, 1, 2]]


def test_pack_bins_takes_long_chains():
    sequences = [[1] * n for n in range(1, 1500)]
    assert pack_bins(sequences, 1499) == [list(range(1499))]


def test_pack_bins_is_fast():
    rng = np.random.default_rng(0)
    sequences = [np.append(np.full(500, i // 8), rng.integers(0, 9, 100)) for i in range(1000)]
    sequences = [x.tolist() for x in sequences]
    start = time.process_time()
    pack_bins(sequences, 8192)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1], [1, 2, 3]], 2), {}, r"sequences\[1\] alone has 3 tokens, .* max_tokens=2"),
        (([[1], [2]], 2), {"num_bins": 3}, "num_bins=3 bins need as many sequences, .* got 2"),
        (([], 2), {"num_bins": 1}, "num_bins=1 bins"),
        (([[1]], 0), {}, "max_tokens must be a positive integer, got 0"),
        (([[1]], 2.5), {}, "max_tokens must be a positive integer, got 2.5"),
        (([[1]], None), {}, "max_tokens must be a positive integer, got None"),
        (([[1]], 2), {"num_bins": True}, "num_bins must be a positive integer, got True"),
        (("text", 2), {}, "sequences must be lists of token ids"),
        (([[1], [-1]], 2), {}, r"sequences\[1\]\[0\] must be at least 0, got -1"),
    ],
)
def test_pack_bins_names_what_is_wrong(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        pack_bins(*arguments, **options)
