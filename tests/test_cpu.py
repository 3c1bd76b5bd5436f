"""The CPU backend against float64, with PyTorch's own attention per sequence as the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.backends.cpu.plan import plan
from prefix_attn.content import content_of
from prefix_attn.testing import (
    Inputs,
    assert_all,
    attention_results,
    check_attention,
    compare_attention,
    forests,
    repeated_attention,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = {
    "two ragged groups": PrefixLayout.from_lengths([37, 12], [[5, 9, 1], [20, 3]]),
    "one member": PrefixLayout.from_lengths([19], [[11]]),
    "no member": PrefixLayout.from_lengths([23], [[]]),
    "empty prefix": PrefixLayout.from_lengths([0], [[7, 13, 1]]),
    "empty suffixes": PrefixLayout.from_lengths([9], [[0, 6, 0]]),
    "prefix of one": PrefixLayout.from_lengths([1], [[1, 8, 3]]),
    "one token": PrefixLayout.from_lengths([1], [[]]),
    # Neighbouring leaves of one length go to the kernel as one batch, here across two groups.
    "equal members": PrefixLayout.from_lengths([10, 4], [[6, 6, 6], [6, 6, 5]]),
    "roots only": PrefixLayout.from_tree([4, 4, 0, 9], [-1, -1, -1, -1]),
    "ragged tree": PrefixLayout.from_tree(
        [13, 5, 3, 0, 7, 2, 11, 1, 6], [-1, 0, 1, 1, 3, 3, 0, -1, 7]
    ),
    "chain": PrefixLayout.from_tree([3, 1, 4, 1, 5], [-1, 0, 1, 2, 3]),
    # PyTorch's kernel works in tiles of 512 keys and of 32 to 256 queries: beyond both.
    "longer than a tile": PrefixLayout.from_lengths([530], [[40, 261]]),
}


def on_cpu(layout: PrefixLayout, **options: Any) -> Callable[..., Any]:
    """The backend under test, bound to a layout."""
    return partial(prefix_attention, layout=layout, backend="cpu", **options)


def check(layout: PrefixLayout, inputs: Inputs, scale: float | None = None) -> None:
    """Against the dense float64, with PyTorch's own attention per sequence as the yardstick."""
    check_attention(layout, inputs, backend="cpu", scale=scale)


@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_cpu_matches_float64(layout: PrefixLayout, dtype: torch.dtype, lse: bool) -> None:
    check(layout, Inputs.random(layout, dtype=dtype, lse=lse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(
    "dims",
    # Powers of two, others, odd ones, DV on either side of D, both limits.
    [(16, 16), (64, 64), (80, 80), (96, 96), (17, 33), (192, 128), (16, 256), (256, 256),
     (1, 1), (2, 8), (7, 3), (16, 512), (512, 1), (512, 512)],
    ids=str,
)  # fmt: skip
def test_cpu_heads_and_dims_match_float64(
    dims: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    layout = LAYOUTS["ragged tree"]
    for lse in (False, True):
        check(layout, Inputs.random(layout, heads, dims, dtype, lse=lse))


@settings(max_examples=60)
@given(
    forest=forests(max_segments=10, max_length=21),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dims=st.tuples(st.sampled_from([2, 16, 24, 80, 96]), st.sampled_from([1, 16, 40, 80])),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_cpu_random_forests_match_float64(
    forest: tuple[list[int], list[int]],
    kv_heads: int,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    layout = PrefixLayout.from_tree(*forest)
    for lse in (False, True):
        check(layout, Inputs.random(layout, (kv_heads * group, kv_heads), dims, dtype, lse=lse))


@pytest.mark.parametrize("start", range(1, 41))
def test_cpu_every_suffix_start_matches_float64(start: int) -> None:
    """A fork after each of the first 40 rows, past the query tile of 32 rows."""
    layout = PrefixLayout.from_lengths([start], [[9, 2]])
    check(layout, Inputs.random(layout, seed=start))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-300, 1e-3, 0.5, 2.5])
def test_cpu_scale_matches_float64(scale: float) -> None:
    """Scales that are not positive, which PyTorch's causal kernels can't take; nearly one-hot."""
    layout = LAYOUTS["two ragged groups"]
    check(layout, Inputs.random(layout, lse=True), scale)


def test_packed_matches_each_sequence_alone() -> None:
    """Without the reference: every sequence alone, in float64, by PyTorch."""
    layout = LAYOUTS["ragged tree"]
    inputs = Inputs.random(layout)
    alone = partial(repeated_attention, layout=layout)
    exact = attention_results(alone, inputs.map(Tensor.double))
    actual = attention_results(on_cpu(layout), inputs)
    assert_all(compare_attention(layout, inputs, actual, exact=exact))


def test_dk_accumulates_over_members() -> None:
    """The prefix gradients are the sum of those of every member run alone."""
    prefix, members = 21, [5, 17, 1, 8]
    layout = PrefixLayout.from_lengths([prefix], [members])
    inputs = Inputs.random(layout)
    inputs.dout[:prefix] = 0  # else every member alone counts the prefix rows once more
    total: dict[str, Tensor] = {}
    for i in range(layout.num_sequences):
        rows = layout.sequence_rows(i)
        one = inputs.map(lambda x, rows=rows: x[rows].double())
        alone = partial(repeated_attention, layout=PrefixLayout.from_lengths([len(rows)], [[]]))
        for name, x in attention_results(alone, one).items():
            at = total.setdefault(name, torch.zeros(layout.num_tokens, *x.shape[1:]).double())
            at[rows] = x if name == "out" else at[rows] + x
    actual = attention_results(on_cpu(layout), inputs)
    assert_all(compare_attention(layout, inputs, actual, exact=total))


def test_chain_of_only_continuations_is_one_run() -> None:
    """Bit by bit: no merging, whose error would grow with the number of segments."""
    whole = PrefixLayout.from_lengths([60], [[]])
    chain = PrefixLayout.from_tree([1] * 59 + [0, 1], range(-1, 60))
    inputs = Inputs.random(whole, lse=True)
    expected = attention_results(on_cpu(whole), inputs)
    for name, x in attention_results(on_cpu(chain), inputs).items():
        assert torch.equal(x, expected[name]), name


@settings(max_examples=25)
@given(
    # On either side of what makes a segment long: a block.
    forest=forests(max_segments=9, lengths=[1, 16, 70, 128, 129, 150]),
    window_size=st.sampled_from([None, 3, 70, 200]),
    softcap=st.sampled_from([None, None, 2.0]),
    prefix_causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (3, 1)]),
)
def test_cpu_long_and_short_segments_match_each_sequence_alone(
    forest: tuple[list[int], list[int]], heads: tuple[int, int], **options: Any
) -> None:
    layout = PrefixLayout.from_tree(*forest)
    inputs = Inputs.random(layout, heads, (8, 8), torch.float64, lse=True)
    alone = partial(repeated_attention, layout=layout, **options)
    actual = attention_results(on_cpu(layout, **options), inputs)
    exact = attention_results(alone, inputs)
    # Both are float64: neither is exact.
    for name, x in exact.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-12, atol=1e-12)


def planned(layout: PrefixLayout, window_size: int | None = None, dense: bool = False) -> list[Any]:
    """The calls of a layout."""
    return plan(content_of(layout.segments), window_size, True, dense, True)


def test_cpu_work_under_a_window_is_linear_in_tokens() -> None:
    for tokens in (4000, 32000):
        layout = PrefixLayout.from_lengths([tokens // 2], [[tokens // 8] * 4])
        shapes = [(call.queries.shape, call.keys.shape) for call in planned(layout, 256)]
        pairs = sum(count * length * keys for (count, length), (_, keys) in shapes)
        assert pairs <= layout.num_tokens * (256 + 2 * 128)
        # And so is the memory of a call.
        assert max(count * length * keys for (count, length), (_, keys) in shapes) <= 2**19


@pytest.mark.parametrize("first", ["tooth", "spine"])
def test_cpu_calls_of_a_comb_are_fewer_than_its_segments(first: str) -> None:
    teeth = 200
    tooth_first = [x for i in range(teeth) for x in (2 * i - 2, 2 * i)]
    tooth_first[0] = -1
    spine_first = [*range(-1, teeth - 1), *reversed(range(teeth))]
    parents = tooth_first if first == "tooth" else spine_first
    assert len(planned(PrefixLayout.from_tree([16] * 2 * teeth, parents))) <= teeth // 3


def test_cpu_many_small_groups_are_few_calls() -> None:
    layout = PrefixLayout.from_lengths([16] * 512, [[4, 4]] * 512)
    assert len(planned(layout)) <= 4


@pytest.mark.parametrize("options", [{}, {"window_size": 20}, {"dense": True}], ids=str)
def test_cpu_members_behind_a_short_prefix_are_read_in_place(options: dict[str, Any]) -> None:
    calls = planned(PrefixLayout.from_lengths([1], [[64] * 16]), **options)
    assert len(calls) <= 2
    assert all(call.queries.is_view for call in calls)
    # Members are alike, so that they share one mask; the prefix and the first one are one run.
    masks = [call.mask.to(torch.bool).shape for call in calls if call.mask is not None]
    assert masks[0][:2] == (1, 1)
    assert len(masks) == (1 if not options else 2)


def test_cpu_calls_with_equal_masks_keep_one() -> None:
    """However many calls the members fill: what is kept depends on shapes alone."""
    calls = planned(PrefixLayout.from_lengths([600], [[256] * 24]), window_size=600)
    masks = [call.mask for call in calls if call.mask is not None and call.queries.shape[0] > 1]
    shared = [mask for mask in masks if len(mask.seen_from) == 1]
    assert len(shared) > 4
    assert len(set(shared)) == 1


def test_cpu_blocks_with_equal_small_masks_keep_one() -> None:
    """Blocks with so many keys are calls by themselves."""
    calls = planned(PrefixLayout.from_lengths([2100], [[100, 30] * 8]), dense=True)
    masks = [call.mask for call in calls if call.mask is not None and call.queries.shape == (1, 30)]
    assert len(masks) == 8
    assert len(set(masks)) == 1


def test_cpu_masks_are_made_once_where_they_are_small_or_shared() -> None:
    def made(members: list[int]) -> list[tuple[Tensor, Tensor]]:
        calls = planned(PrefixLayout.from_lengths([20], [members]), dense=True)
        masks = [call.mask for call in calls if call.mask is not None]
        return [(mask.to(torch.float32), mask.to(torch.float32)) for mask in masks]

    assert all(first is again for first, again in made([8, 9, 7]))
    assert all(first is again for first, again in made([128] * 8))
    # Each token would hold some hundred numbers.
    assert any(first is not again for first, again in made(list(range(90, 128))))


@pytest.mark.parametrize("prefix", [1, 100])
def test_cpu_members_behind_a_short_prefix_are_not_merged(prefix: int) -> None:
    """Of a tile of keys PyTorch's kernels compute all: a mask is cheaper than another call."""
    calls = planned(PrefixLayout.from_lengths([prefix], [[200, 300, 200]]))
    assert all(call.first for call in calls)
    # Beyond a tile a causal call leaves keys out.
    assert not all(x.first for x in planned(PrefixLayout.from_lengths([100], [[500, 500]])))


def test_cpu_sequences_of_one_length_are_neither_copied_nor_read_twice() -> None:
    layout = PrefixLayout.from_lengths([0], [[32] * 8])
    inputs = Inputs.random(layout, (4, 2), (16, 16))
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        prefix_attention(q, k, v, layout, backend="cpu").backward(inputs.dout)
    read = {
        (event.name, tuple(map(tuple, event.input_shapes[:1])))
        for event in profiler.events()
        if event.name in ("aten::copy_", "aten::index_select", "aten::linalg_vector_norm")
    }
    # The log-sum-exp gets heads first, and the keys are checked.
    assert {math.prod(shape) for _, (shape,) in read} <= {4 * 256, 256 * 2 * 16}
    assert ("aten::copy_", ((256, 2, 16),)) not in read


def test_cpu_odd_member_is_no_reason_to_copy_the_others() -> None:
    """A call of its own costs less than copies of all queries; short rows go together."""
    long = planned(PrefixLayout.from_lengths([20], [[100] * 8 + [99]]))
    assert sum(call.queries.size for call in long if call.queries.is_view) >= 700
    assert len(planned(PrefixLayout.from_lengths([9], [[5, 6, 7, 8] * 4]))) <= 2


def test_cpu_heads_that_share_keys_take_no_copies_of_them() -> None:
    """The backward pass holds gradients of K and V once, not once for each query head."""
    layout = PrefixLayout.from_lengths([0], [[300] * 4])
    peaks = {}
    for heads in ((8, 8), (8, 1)):
        inputs = Inputs.random(layout, heads, (64, 64))
        q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            prefix_attention(q, k, v, layout, backend="cpu").backward(inputs.dout)
        events = profiler.profiler.kineto_results.events()
        peaks[heads] = sum(max(0, x.nbytes()) for x in events if x.name() == "[memory]")
    of_keys = 2 * layout.num_tokens * 7 * 64 * 4
    assert peaks[8, 8] - peaks[8, 1] >= of_keys


def test_permuting_members_permutes_output() -> None:
    members, order = [6, 6, 11, 1], [2, 0, 3, 1]
    layout = PrefixLayout.from_lengths([15], [members])
    permuted = PrefixLayout.from_lengths([15], [[members[i] for i in order]])
    spans = layout.cu_seqlens.tolist()
    rows = torch.cat([torch.arange(15), *(torch.arange(spans[1 + i], spans[2 + i]) for i in order)])
    inputs = Inputs.random(layout)
    back = torch.argsort(rows)
    moved = attention_results(on_cpu(permuted), inputs.map(lambda x: x[rows]))
    actual = {name: x[back] for name, x in moved.items()}
    assert_all(compare_attention(layout, inputs, actual))


def fused(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Views of one (T, Hq + 2 Hkv, D) tensor, as a fused projection gives."""
    return list(torch.cat([q, k, v], dim=1).split([q.shape[1], k.shape[1], v.shape[1]], dim=1))


def transposed(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Heads outside: (H, T, D) in memory."""
    return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]


def padded_rows(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Heads of 32 columns that lie 40 apart."""
    return [torch.cat([x, x[..., :8]], dim=2)[..., :32] for x in (q, k, v)]


@pytest.mark.parametrize("arrange", [fused, transposed, padded_rows])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cpu_strided_inputs_match_float64(
    arrange: Callable[..., list[Tensor]], dtype: torch.dtype
) -> None:
    layout = LAYOUTS["two ragged groups"]
    inputs = Inputs.random(layout, dtype=dtype)
    q, k, v = arrange(inputs.q, inputs.k, inputs.v)
    assert not all(x.is_contiguous() for x in (q, k, v))
    # The gradient of out with heads outside, too.
    dout = inputs.dout.transpose(0, 1).contiguous().transpose(0, 1)
    check(layout, Inputs(q, k, v, dout))


def test_cpu_expanded_inputs_match_float64() -> None:
    """Stride 0 along tokens and along heads."""
    layout = LAYOUTS["two ragged groups"]
    x = Inputs.random(layout)
    q, k, v = x.q[:1].expand_as(x.q), x.k[:, :1].expand_as(x.k), x.v[:1].expand_as(x.v)
    check(layout, Inputs(q, k, v, x.dout))


def test_cpu_leaves_inputs_unchanged() -> None:
    layout = LAYOUTS["ragged tree"]
    inputs = Inputs.random(layout, lse=True)
    copy = inputs.map(Tensor.clone)
    attention_results(on_cpu(layout), inputs)
    for name in ("q", "k", "v", "dout", "dlse"):
        assert torch.equal(getattr(inputs, name), getattr(copy, name)), name


def test_cpu_is_deterministic() -> None:
    layout = LAYOUTS["longer than a tile"]
    inputs = Inputs.random(layout)
    first, second = (attention_results(on_cpu(layout), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("row", [3, 14, 20], ids=["prefix", "first suffix", "last row of group"])
@pytest.mark.parametrize("options", [{}, {"window_size": 8}, {"softcap": 5.0}], ids=str)
def test_cpu_non_finite_values_propagate_like_sdpa(
    row: int, name: str, value: float, options: dict[str, Any]
) -> None:
    """NaN where SDPA per sequence gives NaN; the other group keeps its bits, gradients too."""
    layout = PrefixLayout.from_lengths([11, 6], [[4, 6], [5, 3]])
    first_group = slice(0, 21)
    inputs = Inputs.random(layout)
    clean = attention_results(on_cpu(layout, **options), inputs)
    getattr(inputs, name)[row] = value
    actual = attention_results(on_cpu(layout, **options), inputs)
    # Not PyTorch's flash kernel: for some lengths it returns 0 for a row of NaN scores.
    with sdpa_kernel(SDPBackend.MATH):
        sdpa = attention_results(partial(repeated_attention, layout=layout, **options), inputs)
    attends = layout.materialize(window_size=options.get("window_size"))[:, row]
    for key, result in actual.items():
        assert torch.equal(result[first_group.stop :], clean[key][first_group.stop :]), key
        assert bool(sdpa[key][first_group.stop :].isfinite().all())
    hit = ~sdpa["out"][attends].isfinite()
    assert bool(hit.any()) or value == 1e30 or "softcap" in options
    assert torch.equal(~actual["out"][attends].isfinite(), hit)
    members = [layout.sequence_rows(i) for i in (0, 1)]
    for rows in members:
        if row not in rows.tolist():
            assert bool(actual["out"][rows].isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("row", [7, 150, 411], ids=["prefix", "first suffix", "last row of group"])
def test_cpu_non_finite_values_of_long_segments_stay_with_those_who_see_them(
    row: int, name: str, value: float
) -> None:
    """Segments with calls of their own, without a mask."""
    layout = PrefixLayout.from_lengths([140, 600], [[132, 140], [530]])
    group = slice(0, 412)
    inputs = Inputs.random(layout, (2, 1), (8, 8))
    clean = attention_results(on_cpu(layout), inputs)
    getattr(inputs, name)[row] = value
    actual = attention_results(on_cpu(layout), inputs)
    with sdpa_kernel(SDPBackend.MATH):
        sdpa = attention_results(partial(repeated_attention, layout=layout), inputs)
    for key, result in actual.items():
        assert torch.equal(result[group.stop :], clean[key][group.stop :]), key
    sees = layout.materialize()
    hit = ~sdpa["out"].isfinite() & sees[:, row, None, None]
    assert torch.equal(~actual["out"].isfinite() & sees[:, row, None, None], hit)
    for rows in map(layout.sequence_rows, range(2)):
        if row not in rows.tolist():
            assert all(bool(x[rows[140:]].isfinite().all()) for x in actual.values())


@pytest.mark.parametrize("row", [0, 31, 64, 256, 511, 512, 599])
def test_cpu_nan_key_reaches_every_row_that_sees_it(row: int) -> None:
    """Also where a tile of PyTorch's kernels holds no other key that a row sees."""
    layout = PrefixLayout.from_lengths([600], [[]])
    q, k, v = torch.randn(3, 600, 1, 8).unbind()
    k[row] = float("nan")
    out, lse = prefix_attention(q, k, v, layout, return_lse=True, backend="cpu")
    assert bool(out[row:].isnan().all())
    assert bool(lse[:, row:].isnan().all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_key_of_a_prefix_of_one_reaches_all_members(backend: str) -> None:
    """A row all of whose scores in one segment are NaN: PyTorch's kernel alone returns 0 there."""
    layout = PrefixLayout.from_lengths([1, 2], [[3, 3], [4]])
    q, k, v = torch.randn(3, layout.num_tokens, 2, 16).unbind()
    k[0] = float("nan")
    out, lse = prefix_attention(q, k, v, layout, return_lse=True, backend=backend)
    assert bool(out[:7].isnan().all())
    assert bool(lse[:, :7].isnan().all())
    assert bool(out[7:].isfinite().all())
    assert bool(lse[:, 7:].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout",
    [PrefixLayout.from_lengths([], []), PrefixLayout.from_lengths([0, 0], [[0], []])],
    ids=["no segments", "empty segments"],
)
def test_cpu_no_tokens(layout: PrefixLayout, dtype: torch.dtype) -> None:
    """T = 0 gives empty results, with gradients."""
    inputs = Inputs.random(layout, dims=(32, 48), dtype=dtype, lse=True)
    result = attention_results(on_cpu(layout), inputs)
    assert result["out"].shape == (0, 4, 48)
    assert result["out"].dtype == dtype
    assert result["lse"].shape == (4, 0)
    assert result["dk"].shape == (0, 2, 32)


def test_cpu_gives_no_weight_to_a_prefix_whose_scores_are_minus_inf():
    # One key, seen by everyone, at minus infinity: the members must come out as if alone.
    layout = PrefixLayout.from_lengths([1], [[3, 2]])
    q, k, v = torch.randn(3, 6, 1, 16).unbind()
    q[..., 0] = -1.0
    k[0, 0, 0] = float("inf")
    out, lse = prefix_attention(q, k, v, layout, return_lse=True, backend="cpu")
    alone = PrefixLayout.from_lengths([0], [[3, 2]])
    expected = prefix_attention(q[1:], k[1:], v[1:], alone, return_lse=True, backend="cpu")
    torch.testing.assert_close(out[1:], expected[0])
    torch.testing.assert_close(lse[:, 1:], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(1, [3, 3]), (17, [2]), (0, [130, 140]), (3, [200])], ids=str)
def test_cpu_nan_query_gets_nan(lengths: tuple[int, list[int]], dtype: torch.dtype) -> None:
    """PyTorch's causal kernel returns 0 for so few keys. Here all queries have one, in turn."""
    layouts = [PrefixLayout.from_lengths([lengths[0]], [lengths[1]])]
    layouts += [PrefixLayout.from_lengths([n], [[]]) for n in range(1, 18)]
    for layout in layouts:
        tokens = layout.num_tokens
        q, k, v = torch.randn(3, tokens, 2, 16, dtype=dtype).unbind()
        for row in {0, tokens // 2, tokens - 1}:
            spoiled = q.clone()
            spoiled[row] = float("nan")
            out, lse = prefix_attention(spoiled, k, v, layout, return_lse=True, backend="cpu")
            is_hit = torch.arange(tokens) == row
            assert bool((out.isnan().all((1, 2)) >= is_hit).all()), (tokens, row)
            assert bool((lse.isnan().all(0) >= is_hit).all()), (tokens, row)


def test_cpu_infinite_key_without_weight_does_not_reach_gradients_of_other_members() -> None:
    """No log-sum-exp shows it, but PyTorch's kernels multiply it by zero for rows that it hides."""
    layout, other = (PrefixLayout.from_lengths([2], [x]) for x in ([3, 3], [3]))
    rows = torch.tensor([0, 1, 5, 6, 7])
    inputs = Inputs.random(layout, (1, 1), (8, 8))
    inputs.q[..., 0] = -1.0
    expected = attention_results(on_cpu(other), inputs.map(lambda x: x[rows]))
    inputs.k[3, 0, 0] = float("inf")
    actual = attention_results(on_cpu(layout), inputs)
    torch.testing.assert_close(actual["dq"][5:], expected["dq"][2:])
    torch.testing.assert_close(actual["dk"][5:], expected["dk"][2:])


@pytest.mark.parametrize("lengths", [([2], [[3, 3]]), ([2, 2], [[3], [3]])], ids=str)
def test_cpu_large_query_does_not_meet_large_keys_of_others(lengths: Any) -> None:
    """Each is small enough by itself; of their product, inf, a mask that adds -inf makes NaN."""
    layout = PrefixLayout.from_lengths(*lengths)
    inputs = Inputs.random(layout, (1, 1), (8, 8))
    inputs.q[3, 0, 0], inputs.k[7, 0, 0] = 1e30, 1e12
    actual = attention_results(on_cpu(layout), inputs)
    expected = attention_results(partial(on_cpu(layout), backend="reference"), inputs)
    rows = torch.tensor([0, 1, 2, 3, 4])
    for name, x in actual.items():
        torch.testing.assert_close(x[rows], expected[name][rows], msg=name)


@pytest.mark.parametrize("large", ["q", "k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_large_scores_reach_a_small_softcap(dtype: torch.dtype, large: str) -> None:
    """Divided by the softcap before their product, queries or keys would be infinite."""
    layout = PrefixLayout.from_lengths([30], [[20, 40]])
    inputs = Inputs.random(layout, dtype=dtype, lse=True)
    largest = torch.finfo(dtype).max
    for name in ("q", "k"):
        getattr(inputs, name).mul_(largest ** (0.6 if name == large else 0.3))
    attention = on_cpu(layout, softcap=2 / largest**0.5, scale=1.0)
    actual = attention_results(attention, inputs)
    expected = attention_results(partial(attention, backend="reference"), inputs)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=name)
