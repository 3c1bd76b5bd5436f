"""PrefixLayout and its forest against definitions that walk every path by hand.

Schedules and kernels are compared with `layout.materialize`, and all three come from the forest. So
the definitions here read lengths and parents alone, and call neither.
"""

import copy
import dataclasses
import io
import itertools
import pickle
import re
import tracemalloc
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from prefix_attn.forest import HAS_QUERIES, SEES_ITSELF, Forest
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing import forests

TREE = ([4, 2, 1, 3], [-1, 0, 1, 0])  # two sequences, one of them three segments deep
NAN = float("nan")


@st.composite
def token_lists(draw):
    """Sequences over three tokens that often repeat or continue one another."""
    return draw(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=8))


def flags_of(forest):
    return st.lists(st.booleans(), min_size=len(forest[0]), max_size=len(forest[0]))


def rows_of_paths(lengths, parents):
    """For each leaf, in order, the packed rows from its root to its end."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    paths = []
    for leaf in range(len(lengths)):
        if leaf in parents:
            continue
        rows, segment = [], leaf
        while segment >= 0:
            rows = [*range(starts[segment], starts[segment] + lengths[segment]), *rows]
            segment = parents[segment]
        paths.append(rows)
    return paths


def mask_of_paths(total, paths, window=None, whole=()):
    """Row r attends key c iff some sequence holds c at or before r, or both lie in a whole segment.

    A window of W leaves those that are fewer than W places before the row in that sequence, and
    what lies behind it.
    """
    mask = torch.zeros(total, total, dtype=torch.bool)
    for rows in paths:
        for i, row in enumerate(rows):
            for j, key in enumerate(rows):
                ahead = any(row in segment and key in segment for segment in whole)
                near = window is None or i - j < window
                mask[row, key] |= near and (j <= i or ahead)
    return mask


def rows_of_whole(lengths, parents, causal=True, bidirectional=()):
    """The rows of each segment whose rows see all of it."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    whole = {i for i in range(len(lengths)) if not causal and i in parents}
    whole |= {i for i, flag in enumerate(bidirectional) if flag}
    return [range(starts[i], starts[i] + lengths[i]) for i in sorted(whole)]


def shared_prefix_length(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def distinct_prefixes(sequences):
    return {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}


def check_sharing(layout, sequences):
    """Two sequences share as many rows as they share leading tokens, and no other."""
    assert layout.num_sequences == len(sequences)
    assert layout.num_tokens == len(distinct_prefixes(sequences))
    assert layout.repeated_tokens == sum(map(len, sequences))
    rows = [layout.sequence_rows(i).tolist() for i in range(len(sequences))]
    for i, j in itertools.combinations(range(len(sequences)), 2):
        shared = shared_prefix_length(sequences[i], sequences[j])
        assert rows[i][:shared] == rows[j][:shared]
        assert not set(rows[i][shared:]) & set(rows[j][shared:])
    assert torch.equal(layout.materialize(), mask_of_paths(layout.num_tokens, rows))


@given(forests(9, 4, min_segments=0))
def test_from_tree_matches_paths(forest):
    lengths, parents = forest
    layout = PrefixLayout.from_tree(lengths, parents)
    paths = rows_of_paths(lengths, parents)
    assert [layout.sequence_rows(i).tolist() for i in range(len(paths))] == paths
    assert layout.num_sequences == len(paths)
    assert layout.num_tokens == sum(lengths)
    assert layout.num_segments == len(lengths)
    assert layout.num_groups == parents.count(-1)
    assert layout.cu_seqlens.tolist() == list(itertools.accumulate(lengths, initial=0))
    assert layout.parents.tolist() == parents
    assert layout.repeated_tokens == sum(map(len, paths))
    for rows in paths:
        assert layout.position_ids[rows].tolist() == list(range(len(rows)))


@settings(max_examples=300)
@given(forests(9, 4, min_segments=0), st.none() | st.integers(1, 15), st.booleans(), st.data())
def test_materialize_matches_paths(forest, window, causal, data):
    flags = data.draw(st.none() | flags_of(forest))
    layout = PrefixLayout.from_tree(*forest, bidirectional=flags)
    whole = rows_of_whole(*forest, causal, flags or ())
    expected = mask_of_paths(layout.num_tokens, rows_of_paths(*forest), window, whole)
    actual = layout.materialize(window_size=window, prefix_causal=causal)
    assert torch.equal(actual, expected)


@settings(max_examples=300)
@given(forests(9, 4, min_segments=0), st.none() | st.integers(1, 15), st.booleans(), st.data())
def test_forest_counts_the_pairs_of_paths(forest, window, causal, data):
    lengths, parents = forest
    has_queries, flags = data.draw(flags_of(forest)), data.draw(flags_of(forest))
    paths = rows_of_paths(*forest)
    whole = rows_of_whole(*forest, causal, flags)
    queries = np.repeat(np.array(has_queries, dtype=bool), lengths)
    shared = mask_of_paths(sum(lengths), paths, window, whole)[queries].sum()
    each = [mask_of_paths(sum(lengths), [rows], window, whole)[queries].sum() for rows in paths]
    bits = [HAS_QUERIES * a + SEES_ITSELF * b for a, b in zip(has_queries, flags, strict=True)]
    segments = np.array([lengths, parents, bits], dtype=np.int32)
    counted = Forest.from_segments(segments, window_size=window, prefix_causal=causal)
    assert (counted.num_pairs, counted.num_repeated_pairs) == (int(shared), sum(map(int, each)))


def test_forest_counts_more_pairs_than_fit_in_64_bits():
    segments = np.array([[2**30] + [0] * 99, [-1] + [0] * 99, [1] * 100])
    forest = Forest.from_segments(segments)
    assert forest.num_pairs == 2**29 * (2**30 + 1)
    assert forest.num_repeated_pairs == 99 * forest.num_pairs > 2**63


@given(forests(9, 4, min_segments=0))
def test_forest_knows_its_paths(forest):
    lengths, parents = forest
    paths = rows_of_paths(*forest)
    actual = Forest.from_tree(np.array(lengths, dtype=int), np.array(parents, dtype=int))
    assert [rows.tolist() for rows in actual.sequence_rows] == paths
    assert [actual.path_rows(leaf).tolist() for leaf in actual.leaves] == paths
    assert actual.sequence_lengths.tolist() == [len(rows) for rows in paths]
    assert actual.num_sequences == len(paths)
    assert actual.repeated_tokens == sum(map(len, paths))
    assert actual.max_length == max(map(len, paths), default=0)
    for segment, (start, length) in enumerate(zip(actual.starts, lengths, strict=True)):
        if length:
            through = [start in rows for rows in paths]
            assert actual.sharers[segment] == sum(through)
    # The runs of a path, from the leaf up, are its rows.
    for leaf, rows in zip(actual.leaves.tolist(), paths, strict=True):
        found, node = [], leaf
        while node >= 0:
            found = [*range(actual.run_start[node], actual.ends[node]), *found]
            node = actual.anchor[node]
        assert found == rows


def test_forest_takes_an_order_of_sequences():
    forest = PrefixLayout.from_sequences([[1, 2, 3], [4], [1, 2, 5]])[0].forest
    assert forest.sequence_lengths.tolist() == [3, 1, 3]
    assert [rows.tolist() for rows in forest.sequence_rows] == [[0, 1, 2], [4], [0, 1, 3]]
    assert forest.sharers.tolist() == [2, 1, 1, 1]
    assert (forest.num_pairs, forest.num_repeated_pairs) == (3 + 3 + 3 + 1, 6 + 1 + 6)


@given(forests(9, 4, min_segments=0))
def test_subtree_end_bounds_descendants(forest):
    lengths, parents = forest
    layout = PrefixLayout.from_tree(lengths, parents)
    ends = list(itertools.accumulate(lengths))
    expected = []
    for i, length in enumerate(lengths):
        below = {i}
        for j in range(i + 1, len(parents)):
            if parents[j] in below:
                below.add(j)
        expected += [max(ends[j] for j in below)] * length
    assert layout.subtree_end.tolist() == expected


@settings(max_examples=20)
@given(forests(9, 4, min_length=1))
def test_mask_mod_matches_materialize(forest):
    layout = PrefixLayout.from_tree(*forest)
    t = layout.num_tokens
    mask = create_mask(layout.mask_mod(), None, None, t, t, device="cpu")
    assert torch.equal(mask[0, 0], layout.materialize())


@given(forests(9, 4, min_segments=0))
def test_flop_ratio_counts_pairs(forest):
    layout = PrefixLayout.from_tree(*forest)
    whole = sum(len(rows) * (len(rows) + 1) // 2 for rows in rows_of_paths(*forest))
    shared = int(layout.materialize().sum())
    assert layout.flop_ratio == (pytest.approx(whole / shared) if shared else 1.0)


@given(forests(9, 4, min_segments=0))
def test_predictor_index_is_the_token_before(forest):
    layout = PrefixLayout.from_tree(*forest)
    pairs = {
        (after, before)
        for rows in rows_of_paths(*forest)
        for before, after in itertools.pairwise(rows)
    }
    found = zip(layout.target_index.tolist(), layout.predictor_index.tolist(), strict=True)
    assert list(found) == sorted(pairs)


def test_predictor_index_repeats_the_fork():
    layout = PrefixLayout.from_lengths([3], [[2, 0, 1]])
    assert layout.target_index.tolist() == [1, 2, 3, 4, 5]
    assert layout.predictor_index.tolist() == [0, 1, 2, 3, 2]


@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 3), max_size=4)), max_size=4))
def test_from_lengths_matches_from_tree(groups):
    lengths: list[int] = []
    parents: list[int] = []
    for prefix, suffixes in groups:
        parents += [-1] + [len(lengths)] * len(suffixes)
        lengths += [prefix, *suffixes]
    layout = PrefixLayout.from_lengths([p for p, _ in groups], [s for _, s in groups])
    expected = PrefixLayout.from_tree(lengths, parents)
    for name in ("segments", "cu_seqlens", "parents", "position_ids", "subtree_end"):
        assert torch.equal(getattr(layout, name), getattr(expected, name)), name
    assert torch.equal(layout.sequence_leaves, expected.sequence_leaves)


@pytest.mark.parametrize("integers", [torch.tensor, np.array, tuple])
def test_from_lengths_takes_any_integers(integers):
    layout = PrefixLayout.from_lengths(integers([3, 2]), [integers([2, 1]), integers([4])])
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 12]


def test_from_tree_handles_a_deep_chain():
    depth = 20_000  # no recursion, and no work that grows with the square of the depth
    layout = PrefixLayout.from_tree([1] * depth, range(-1, depth - 1))
    assert layout.position_ids.equal(torch.arange(depth))
    assert (layout.subtree_end == depth).all()


def test_deep_chains_of_empty_segments_keep_their_predecessors():
    depth = 20_000  # looked for one segment at a time, the last one that is filled takes minutes
    layout = PrefixLayout.from_tree([3, *[0] * depth, 2], range(-1, depth + 1))
    assert layout.target_index.tolist() == [1, 2, 3, 4]
    assert layout.predictor_index.tolist() == [0, 1, 2, 3]


def test_rows_of_one_sequence_need_no_other():
    depth = 20_000  # all sequences of this comb have 200 million rows
    parents = np.repeat(np.arange(depth) * 2, 2)
    layout = PrefixLayout.from_tree([1] * (2 * depth + 1), [-1, *parents])
    rows = layout.sequence_rows(depth - 1)
    assert rows.tolist() == [*range(0, 2 * depth, 2), 2 * depth - 1]


def test_tensors_have_documented_types():
    layout = PrefixLayout.from_tree(*TREE)
    assert layout.cu_seqlens.dtype == layout.parents.dtype == torch.int32
    assert layout.subtree_end.dtype == torch.int32
    assert layout.position_ids.dtype == torch.int64
    assert layout.sequence_rows(0).dtype == layout.target_index.dtype == torch.int64


def test_layout_is_frozen_and_compares_by_identity():
    layout, other = PrefixLayout.from_tree(*TREE), PrefixLayout.from_tree(*TREE)
    assert layout != other
    assert len({layout, other}) == 2
    with pytest.raises(AttributeError):
        layout.num_groups = 3


@given(forests(9, 4))
def test_pack_inverts_unpack(forest):
    layout = PrefixLayout.from_tree(*forest)
    x = torch.randn(layout.num_tokens, 2)
    parts = layout.unpack(x)
    for part, rows in zip(parts, rows_of_paths(*forest), strict=True):
        assert torch.equal(part, x[rows])
    assert torch.equal(layout.pack(parts), x)


def test_pack_takes_shared_rows_from_the_first():
    layout = PrefixLayout.from_lengths([2], [[1, 1]])
    packed = layout.pack([torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])])
    assert packed.tolist() == [1, 2, 3, 9]


@given(forests(9, 4, min_segments=0))
def test_unpack_gradient_sums_over_sequences(forest):
    layout = PrefixLayout.from_tree(*forest)
    x = torch.zeros(layout.num_tokens, requires_grad=True)
    weight, expected = 1.0, torch.zeros(layout.num_tokens)
    loss = x.sum() * 0
    for part, rows in zip(layout.unpack(x), rows_of_paths(*forest), strict=True):
        loss = loss + weight * part.sum()
        expected[rows] += weight
        weight *= 2  # powers of two: every subset of sequences has a sum of its own
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_unpack_of_an_empty_layout_is_empty():
    layout = PrefixLayout.from_lengths([], [])
    assert layout.unpack(torch.empty(0, 4)) == []
    assert layout.num_tokens == layout.num_sequences == layout.repeated_tokens == 0
    assert layout.materialize().shape == (0, 0)


@settings(max_examples=500)
@given(token_lists())
def test_from_sequences_shares_what_is_equal(sequences):
    layout, ids = PrefixLayout.from_sequences(sequences)
    assert ids.dtype == torch.int64
    for i, sequence in enumerate(sequences):
        assert ids[layout.sequence_rows(i)].tolist() == sequence
    check_sharing(layout, sequences)
    # Each sequence has a leaf of its own.
    assert len(set(layout.sequence_leaves.tolist())) == len(sequences)
    assert not set(layout.sequence_leaves.tolist()) & set(layout.parents.tolist())
    # The forest is one that from_tree accepts.
    rebuilt = PrefixLayout.from_tree(*layout.segments[:2])
    assert torch.equal(rebuilt.subtree_end, layout.subtree_end)
    assert sorted(layout.sequence_leaves.tolist()) == rebuilt.sequence_leaves.tolist()


@pytest.mark.parametrize(
    ("sequences", "lengths", "parents"),
    [
        pytest.param([[1, 2]] * 3, [2, 0, 0, 0], [-1, 0, 0, 0], id="three times the same"),
        pytest.param([[1], [1, 2]], [1, 0, 1], [-1, 0, 0], id="prefix of another"),
        pytest.param([[1, 2], [1], [1]], [1, 1, 0, 0], [-1, 0, 0, 0], id="prefix, twice"),
        pytest.param([[], [1], [], [2]], [0, 1, 0, 1], [-1] * 4, id="empty is nobody's parent"),
        pytest.param([[], []], [0, 0], [-1, -1], id="only empty"),
        pytest.param(
            [[1, 2, 3], [4], [1, 2, 5]], [2, 1, 1, 1], [-1, 0, 0, -1], id="callers' order"
        ),
        pytest.param(
            [[1, 2, 3], [1, 4], [1, 2, 5]], [1, 1, 1, 1, 1], [-1, 0, 1, 1, 0], id="fork in a fork"
        ),
    ],
)
def test_from_sequences_builds_the_radix_tree(sequences, lengths, parents):
    layout, _ = PrefixLayout.from_sequences(sequences)
    assert layout.segments.tolist() == [lengths, parents, [1] * len(lengths)]


def test_from_sequences_needs_memory_for_its_tokens_alone():
    """Many short sequences and a long one, which all share their first token and no other."""
    long = np.arange(20_000)
    sequences = [*([0, -i % 2**40, i] for i in range(1, 3000)), long]
    tokens = sum(map(len, sequences))
    tracemalloc.start()
    layout, ids = PrefixLayout.from_sequences(sequences)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 8 * tokens  # padded to the longest they take 2,000 times their bytes
    assert layout.num_tokens == tokens - 2999
    np.testing.assert_array_equal(ids[layout.sequence_rows(2999)], long)


def test_from_sequences_orders_by_whole_tokens():
    """Ids whose lowest or highest bytes are equal, or sort in another order, are different ids."""
    sequences = [[256, 1], [1, 256], [2**40, 1], [1], [2**40 + 1], [255], [256]]
    layout, ids = PrefixLayout.from_sequences(sequences)
    for i, sequence in enumerate(sequences):
        assert ids[layout.sequence_rows(i)].tolist() == sequence
    check_sharing(layout, sequences)


@given(token_lists(), st.sampled_from(["left", "right"]), st.integers(0, 2))
def test_from_padded_shares_what_is_equal(sequences, side, extra):
    width = max(map(len, sequences), default=0) + extra
    ids = torch.full((len(sequences), width), -100)  # padding may hold anything
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        start = width - len(sequence) if side == "left" else 0
        ids[i, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[i, start : start + len(sequence)] = 1
    layout, source_index, row_index = PrefixLayout.from_padded(ids, mask)
    check_sharing(layout, sequences)
    assert torch.equal(row_index >= 0, mask.bool())
    packed = ids.flatten()[source_index]
    for i, sequence in enumerate(sequences):
        assert row_index[i][mask[i].bool()].tolist() == layout.sequence_rows(i).tolist()
        assert packed[layout.sequence_rows(i)].tolist() == sequence
    # The source of a row is the first place that holds it.
    places = row_index.flatten().tolist()
    assert source_index.tolist() == [places.index(row) for row in range(layout.num_tokens)]


def test_from_padded_agrees_with_from_sequences_on_a_boolean_mask():
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]], dtype=torch.int32)
    layout, source_index, _ = PrefixLayout.from_padded(ids, ids > 0)
    expected, packed = PrefixLayout.from_sequences([[5, 6, 7], [5, 6, 8, 9]])
    assert torch.equal(layout.segments, expected.segments)
    assert torch.equal(ids.flatten()[source_index].long(), packed)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_to_moves_every_tensor(device):
    layout = PrefixLayout.from_tree(*TREE).to(device)
    assert layout.device.type == device
    for name in ("cu_seqlens", "parents", "position_ids", "subtree_end", "target_index"):
        assert getattr(layout, name).device.type == device, name
    assert layout.sequence_rows(0).device.type == device
    assert (layout.num_tokens, layout.num_sequences, layout.num_groups) == (10, 2, 1)


@pytest.mark.parametrize("window", [0, -3, 1.5, np.float64(2), True, "2", np.array([1, 2])])
@pytest.mark.parametrize("method", ["mask_mod", "materialize"])
def test_mask_refuses_other_windows(method, window):
    message = f"window_size must be a positive integer or None, got {window!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(PrefixLayout.from_tree(*TREE), method)(window_size=window)


@pytest.mark.parametrize("method", ["mask_mod", "materialize"])
def test_mask_refuses_other_flags(method):
    with pytest.raises(ValueError, match="prefix_causal must be True or False, got 'no'"):
        getattr(PrefixLayout.from_tree(*TREE), method)(prefix_causal="no")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([True] * 3, "bidirectional must have one entry per segment, got 3 for 4 segments"),
        ([True, 1, False, True], "bidirectional must hold bools, got 1 at bidirectional[1]"),
        (True, "bidirectional must be a flat list of bools, got True"),
        ("yes!", "bidirectional must be a flat list of bools, got 'yes!'"),
    ],
)
def test_from_tree_refuses_other_flags(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PrefixLayout.from_tree(*TREE, bidirectional=flags)


@pytest.mark.parametrize("made", [list, np.array, torch.tensor], ids=["list", "numpy", "tensor"])
def test_bidirectional_segments_stay_so(made):
    flags = [False, True, False, True]
    layout = PrefixLayout.from_tree(*TREE, bidirectional=made(flags))
    assert layout.segments.tolist() == [*map(list, TREE), [1, 3, 1, 3]]
    for same in (layout.to("cpu"), pickle.loads(pickle.dumps(layout)), layout.queries_for([0, 1])):
        assert same.bidirectional.tolist() == flags
        assert torch.equal(same.materialize(), layout.materialize()[same.query_rows])
    assert not PrefixLayout.from_tree(*TREE).bidirectional.any()


def test_methods_take_integers_and_flags_of_numpy():
    layout = PrefixLayout.from_tree(np.array(TREE[0], dtype=np.uint8), [*map(np.int16, TREE[1])])
    expected = PrefixLayout.from_tree(*TREE)
    options = {"window_size": np.int32(3), "prefix_causal": np.bool_(False)}
    plain = {"window_size": 3, "prefix_causal": False}
    assert torch.equal(layout.materialize(**options), expected.materialize(**plain))
    some = layout.queries_for(np.array([2, 1], dtype=np.int8))
    assert torch.equal(some.query_rows, expected.queries_for([1, 2]).query_rows)
    rows = layout.sequence_rows(np.uint16(1))
    assert torch.equal(rows, expected.sequence_rows(1))
    groups = PrefixLayout.from_lengths(np.array([3, 2]), np.array([[2, 1], [4, 0]]))
    assert groups.segments[0].tolist() == [3, 2, 1, 2, 4, 0]


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def test_layouts_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
        made = [
            PrefixLayout.from_tree(*TREE).to("cpu").queries_for([0, 1]),
            copy.deepcopy(PrefixLayout.from_tree(*TREE)),
            pickle.loads(pickle.dumps(PrefixLayout.from_tree(*TREE))),
            *PrefixLayout.from_sequences(ids, "cpu"),
            *PrefixLayout.from_padded(ids, torch.ones_like(ids)),
        ]
        layouts = [x for x in made if isinstance(x, PrefixLayout)]
        for layout in layouts:
            made += [layout.sequence_rows(0), layout.materialize()]
            # All that is derived on first use.
            for name, member in vars(PrefixLayout).items():
                if isinstance(member, cached_property):
                    getattr(layout, name)
    found = list(_tensors([*made, *(list(vars(x).values()) for x in layouts)]))
    assert len(found) > 40
    assert not any(x.is_inference() for x in found)
    weight = torch.ones(4, requires_grad=True)
    weight[made[4].clamp(max=3)].sum().backward()


def test_layouts_load_with_weights_only():
    layout, buffer = PrefixLayout.from_tree(*TREE), io.BytesIO()
    torch.save({"layout": layout}, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([PrefixLayout]), torch.inference_mode():
        loaded = torch.load(buffer, weights_only=True)["layout"]
    assert torch.equal(loaded.segments, layout.segments)
    assert torch.equal(loaded.materialize(), layout.materialize())
    assert not any(x.is_inference() for x in _tensors(list(vars(loaded).values())))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_used_layouts_hold_the_fields_alone(copied):
    layout = PrefixLayout.from_lengths([50, 0], [[9] * 40, [3, 0]]).queries_for([0, 1, 2])
    fresh = len(pickle.dumps(layout))
    layout.unpack(torch.zeros(layout.num_tokens))
    layout.materialize(prefix_causal=False)
    assert layout.predictor_index.numel() < layout.repeated_tokens
    assert len(pickle.dumps(layout)) == fresh
    other = copied(layout)
    assert set(vars(other)) == {field.name for field in dataclasses.fields(PrefixLayout)}
    for name, value in vars(other).items():
        mine = getattr(layout, name)
        assert torch.equal(value, mine) if isinstance(value, torch.Tensor) else value == mine
    assert torch.equal(other.predictor_index, layout.predictor_index)
    assert torch.equal(other.materialize(), layout.materialize())


def test_to_and_pin_memory_copy_every_tensor_of_the_device(monkeypatch):
    asked = []

    def pin(x):
        asked.append(x.data_ptr())
        return x.clone()

    def to(x, device, non_blocking=False):
        asked.append((x.data_ptr(), device, non_blocking))
        return x.clone()

    layout = PrefixLayout.from_tree(*TREE)
    names = ("cu_seqlens", "parents", "position_ids", "subtree_end", "query_rows")
    pointers = [getattr(layout, name).data_ptr() for name in names]
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    pinned = layout.pin_memory()
    assert asked == pointers
    asked.clear()
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = pinned.to("cpu", non_blocking=True)
    monkeypatch.undo()
    pointers = [getattr(pinned, name).data_ptr() for name in names]
    assert asked == [(pointer, torch.device("cpu"), True) for pointer in pointers]
    assert torch.equal(moved.materialize(), layout.materialize())


def test_pin_memory_refuses_other_devices():
    with pytest.raises(ValueError, match="only layouts on the CPU can be pinned, this one is on m"):
        PrefixLayout.from_tree(*TREE, device="meta").pin_memory()


@pytest.mark.parametrize("device", [torch.float16, "gpu", None, 1.5, torch.ones(2)])
def test_to_refuses_what_is_no_device(device):
    with pytest.raises(ValueError, match=re.escape(f"or its name, got {device!r}")):
        PrefixLayout.from_tree(*TREE).to(device)
    if device is not None:
        with pytest.raises(ValueError, match=re.escape(f"or its name, got {device!r}")):
            PrefixLayout.from_tree(*TREE, device=device)


def test_from_tree_builds_on_the_device():
    assert PrefixLayout.from_tree(*TREE, device="meta").subtree_end.device.type == "meta"


def test_repr_counts():
    assert repr(PrefixLayout.from_tree(*TREE)) == (
        "PrefixLayout(num_tokens=10, num_segments=4, num_groups=1, num_sequences=2, device='cpu')"
    )


def test_str_draws_small_layouts():
    drawing = str(PrefixLayout.from_lengths([3], [[2, 1]])).splitlines()
    assert drawing[:2] == [
        "1 groups, 2 sequences, 3 segments",
        "6 tokens instead of 9 repeated, attention FLOPs 1.32x fewer",
    ]
    assert drawing[2:] == [
        "# . . . . .",
        "# # . . . .",
        "# # # . . .",
        "# # # # . .",
        "# # # # # .",
        "# # # . . #",
    ]


def test_str_counts_large_layouts():
    text = str(PrefixLayout.from_lengths([1000], [[10] * 4]))
    assert "1040 tokens instead of 4040" in text
    assert "#" not in text


@pytest.mark.parametrize(
    ("prefix_lens", "suffix_lens", "message"),
    [
        ([3, -1], [[1], [1]], r"prefix_lens\[1\] must be at least 0, got -1"),
        ([3], [[1, -2]], r"suffix_lens\[0\]\[1\] must be at least 0, got -2"),
        ([3, 1.5], [[1], [1]], r"prefix_lens must hold integers, got 1.5 at prefix_lens\[1\]"),
        ([3, NAN], [[1], [1]], r"prefix_lens must hold integers, got nan"),
        ([3], [torch.tensor([1.0])], r"suffix_lens\[0\] must hold integers, got 1.0"),
        ([3], [torch.tensor([1.0]).bfloat16()], r"suffix_lens\[0\] must hold integers, got 1.0"),
        ([True], [[1]], r"prefix_lens must hold integers, got True"),
        (["3"], [[1]], r"prefix_lens must hold integers, got '3'"),
        ([None], [[1]], r"prefix_lens must hold integers, got None"),
        (3, [[1]], r"prefix_lens must be a flat list of integers, got 3"),
        ([[3]], [[1]], r"prefix_lens must be a flat list of integers, got \[\[3\]\]"),
        ([3], [[[1], [2, 3]]], r"suffix_lens\[0\] must be a flat list of integers"),
        ([3, 4], [[1]], r"one entry per group, got 2 prefixes and 1 groups"),
        ([3], 4, r"suffix_lens must be a sequence of sequences of lengths.*, got int"),
        ([3], "12", r"suffix_lens must be a sequence of sequences.*, got str"),
        ([3], np.array(4), r"suffix_lens must be a sequence of sequences.*, got ndarray"),
        ([3], torch.ones(1, 2), r"suffix_lens must be a sequence of sequences.*, got Tensor"),
        ([2**31 - 1], [[1]], r"a layout holds at most 2147483647 tokens, got 2147483648"),
        (
            [2**62] * 4,
            [[]] * 4,
            r"a layout holds at most 2147483647 tokens, got 18446744073709551616",
        ),
        ([2**63], [[]], r"prefix_lens\[0\] must be at most 9223372036854775807, got"),
        ([1, 2**80], [[], []], r"prefix_lens\[1\] must be at most 9223372036854775807, got"),
    ],
)
def test_from_lengths_refuses(prefix_lens, suffix_lens, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_lengths(prefix_lens, suffix_lens)


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([1, 1], [-1], r"one entry per segment, got 2 lengths and 1 parents"),
        ([1, -4], [-1, 0], r"lengths\[1\] must be at least 0, got -4"),
        ([1, 1], [-1, -2], r"parents\[1\] must be at least -1, got -2"),
        ([1, NAN], [-1, 0], r"lengths must hold integers, got nan at lengths\[1\]"),
        ([1, 1], [-1, 0.0], r"parents must hold integers, got 0.0"),
        ([1, 1, 1], [-1, 2, 1], r"parents\[1\] must be less than 1 \(or -1\), got 2"),
        ([1, 1], [-1, 1], r"parents\[1\] must be less than 1 \(or -1\), got 1"),
        ([1], [0], r"parents\[0\] must be less than 0 \(or -1\), got 0"),
        (
            [1] * 4,
            [-1, 0, 0, 1],
            r"depth-first order: parents\[3\] is 1, but the subtree of segment 1 ended before "
            r"segment 3",
        ),
        ([1] * 3, [-1, -1, 0], r"depth-first order: parents\[2\] is 0"),
    ],
)
def test_from_tree_refuses(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_tree(lengths, parents)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1], [2, -3]], r"sequences\[1\]\[1\] must be at least 0, got -3"),
        ([[1], 5], r"sequences\[1\] must be a flat list of integers, got 5"),
        ([[1, NAN]], r"sequences\[0\] must hold integers, got nan"),
        (5, r"sequences must be lists of token ids, got 5"),
        (None, r"sequences must be lists of token ids, got None"),
        ("abc", r"sequences must be lists of token ids, got 'abc'"),
        ([[[1] * 999] * 999], r"sequences\[0\] must be a flat list of integers, got .{9,200}$"),
    ],
)
def test_from_sequences_refuses(sequences, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_sequences(sequences)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            torch.ones(3),
            r"shape \(B, L\), got torch.int64 \(3,\)",
        ),
        (torch.zeros(2, 3), torch.ones(2, 3), r"integer tensor .* got torch.float32 \(2, 3\)"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 4),
            r"attention_mask must have the shape of input_ids \(2, 3\), got \(2, 4\)",
        ),
        (
            torch.tensor([[4, -1]]),
            torch.ones(1, 2),
            r"input_ids\[0\]\[1\] must be at least 0, got -1",
        ),
        (
            torch.ones(1, 2, dtype=torch.bool),
            torch.ones(1, 2),
            r"integer .* got torch.bool \(1, 2\)",
        ),
        (
            torch.ones(1, 2) * 1j,
            torch.ones(1, 2),
            r"integer tensor .* got torch.complex64 \(1, 2\)",
        ),
        ([[1]], torch.ones(1, 1), "input_ids must be a tensor, got list"),
        (torch.tensor([[1]]), None, "attention_mask must be a tensor, got NoneType"),
        (torch.tensor([[1]]), torch.ones(1, 1, device="meta"), "one device, got cpu and meta"),
    ],
)
def test_from_padded_refuses(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_padded(ids, mask)


@pytest.mark.parametrize("i", [-1, 2, 0.5, "a", True, np.float32(1), None])
def test_sequence_rows_refuses_unknown_sequences(i):
    with pytest.raises(ValueError, match=re.escape(f"sequence {i!r} does not exist, there are 2")):
        PrefixLayout.from_tree(*TREE).sequence_rows(i)


def test_pack_refuses_wrong_sequences():
    layout = PrefixLayout.from_tree(*TREE)
    with pytest.raises(ValueError, match="expected 2 sequences, got 1"):
        layout.pack([torch.zeros(7)])
    with pytest.raises(ValueError, match=r"sequence 1 must have 7 tokens, got \(6, 2\)"):
        layout.pack([torch.zeros(7, 2), torch.zeros(6, 2)])
    with pytest.raises(ValueError, match=r"sequence 0 must have 7 tokens, got \(\)"):
        layout.pack([torch.zeros(()), torch.zeros(7)])
    with pytest.raises(ValueError, match="sequence 0 must be a tensor, got list"):
        layout.pack([[1] * 7, torch.zeros(7)])
    with pytest.raises(ValueError, match=r"sequences must be a list of tensors.*, got 5"):
        layout.pack(5)
    with pytest.raises(ValueError, match=r"sequences must be a list.*, got tensor\(5\)"):
        layout.pack(torch.tensor(5))
    message = r"got \(7, 2\) on cpu and, in sequence 1, \(7, 3\) on cpu"
    with pytest.raises(ValueError, match=message):
        layout.pack([torch.zeros(7, 2), torch.zeros(7, 3)])
    message = r"got \(7,\) on cpu and, in sequence 1, \(7,\) on meta"
    with pytest.raises(ValueError, match=message):
        layout.pack([torch.zeros(7), torch.zeros(7, device="meta")])
    with pytest.raises(ValueError, match="an empty layout has nothing to pack"):
        PrefixLayout.from_lengths([], []).pack([])


@pytest.mark.parametrize("shape", [(), (9,), (11, 10)])
def test_unpack_refuses_wrong_rows(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(10, \.\.\.\), got \("):
        PrefixLayout.from_tree(*TREE).unpack(torch.zeros(shape))


def test_unpack_refuses_what_is_no_tensor():
    with pytest.raises(ValueError, match="x must be a tensor, got list"):
        PrefixLayout.from_tree(*TREE).unpack([0.0] * 10)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (1, "segments must be a flat list of integers, got 1"),
        ([0.0], r"segments must hold integers, got 0.0 at segments\[0\]"),
        ([True], r"segments must hold integers, got True"),
        ([-1], r"segments\[0\] must be at least 0, got -1"),
        ([0, 4], "segments must be less than 4, the number of segments, got 4"),
    ],
)
def test_queries_for_refuses(segments, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_tree(*TREE).queries_for(segments)
