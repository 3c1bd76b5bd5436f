"""Options on the CPU, query subsets, cached prefixes, merged states, and what stays bit-equal."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.options_table import MEANINGS, is_served
from prefix_attn import PrefixLayout, merge_states, prefix_attention
from prefix_attn.testing import (
    Inputs,
    assert_all,
    assert_within_budget,
    attention_results,
    check_attention,
    compare_attention,
    forests,
    repeated_attention,
)

GROUPS = PrefixLayout.from_lengths([37, 0, 20], [[9, 16, 33], [5, 7], [3, 0, 18]])
TREE = PrefixLayout.from_tree([37, 5, 9, 1, 33, 41, 6], [-1, 0, 1, 1, 0, 4, -1])
# Text, a picture, text; the leaves are text, a picture, and as long a text.
PICTURES = PrefixLayout.from_tree(
    [7, 9, 3, 6, 12, 12],
    [-1, 0, 1, 2, 2, 2],
    bidirectional=[False, True, False, False, True, False],
)
LAYOUTS = {
    "groups": GROUPS,
    "tree": TREE,
    "equal members": PrefixLayout.from_lengths([10, 4], [[6, 6, 6], [6, 6, 5]]),
    "suffix queries": GROUPS.queries_for([1, 2, 3, 5, 6, 8, 10]),
    "inner queries": TREE.queries_for([1, 4, 6]),
    "leaf queries": TREE.queries_for([5, 2]),
    "no queries": TREE.queries_for([]),
    # The first segment is continued, by an empty one only; the last one is as long, and a leaf.
    "hollow leaf": PrefixLayout.from_tree([4, 0, 4], [-1, 0, -1]),
    "pictures": PICTURES,
}
# One value for every option of the table; True stands for a tensor of sinks.
VALUES: dict[str, Any] = {
    "scale": -0.4,
    "window_size": 24,
    "softcap": 1.5,
    "sinks": True,
    "prefix_causal": False,
}


def _check(layout: PrefixLayout, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """With a gradient of lse; `options["sinks"]` is True where there are sinks."""
    options = dict(options)
    sinks = options.pop("sinks", False)
    inputs = Inputs.random(layout, dims=(16, 32), dtype=dtype, lse=True, sinks=sinks)
    check_attention(layout, inputs, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": True}, {"prefix_causal": False}, {"window_size": 24}, {"softcap": 1.5},
     {"sinks": True, "prefix_causal": False, "scale": -0.4, "window_size": 7, "softcap": 1.5}],
    ids=["plain", "sinks", "bidirectional", "window", "softcap", "all"],
)  # fmt: skip
def test_cpu_option_stays_within_budget(layout, options, dtype):
    _check(layout, options, dtype, "cpu")


@settings(max_examples=200)
@given(
    # Lengths repeat, so that neighbouring segments are equally long.
    forest=forests(lengths=[0, 1, 4, 9]),
    scale=st.sampled_from([0.25, -0.5, 0.0]),
    window_size=st.sampled_from([None, None, 1, 5, 12]),
    softcap=st.sampled_from([None, None, None, 0.5, 30.0]),
    sinks=st.booleans(),
    prefix_causal=st.booleans(),
    bidirectional=st.sets(st.integers(0, 6)),
)
def test_random_options_match_each_sequence_alone(forest, sinks, bidirectional, **options):
    """Without the reference, which knows the mask as the backends do."""
    flags = [i in bidirectional for i in range(len(forest[0]))]
    layout = PrefixLayout.from_tree(*forest, bidirectional=flags)
    inputs = Inputs.random(layout, dims=(16, 24), dtype=torch.float64, lse=True, sinks=sinks)
    exact = attention_results(partial(repeated_attention, layout=layout, **options), inputs)
    for backend in ("reference", "cpu"):
        call = partial(prefix_attention, layout=layout, backend=backend, **options)
        actual = attention_results(call, inputs)
        assert_all(compare_attention(layout, inputs, actual, exact=exact, **options))


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["flash", "formula"])
def test_autocast_does_not_round_float32_inputs(softcap):
    q, k, v = torch.randn(3, GROUPS.num_tokens, 2, 16).unbind()
    out, lse = prefix_attention(q, k, v, GROUPS, softcap=softcap, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        same, same_lse = prefix_attention(q, k, v, GROUPS, softcap=softcap, return_lse=True)
    assert torch.equal(same, out)
    assert torch.equal(same_lse, lse)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("option", MEANINGS)
def test_table_cell_is_exact(backend, option):
    # The cells of the Triton kernels are tests/interpreter/test_options.py.
    if option in ("value dims", "LSE gradient"):  # every call of this file has both
        options, layout = {}, GROUPS
    elif option == "queries_for":
        options, layout = {}, LAYOUTS["suffix queries"]
    elif option == "bidirectional":
        options, layout = {}, PICTURES
    else:
        options, layout = {option: VALUES[option]}, GROUPS
    assert is_served(option, backend)
    _check(layout, options, torch.float64, backend)


# ---- queries for some segments --------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"prefix_causal": False}], ids=["causal", "bidirectional"])
def test_query_subset_gives_the_rows_of_the_whole(backend, options):
    q, k, v = torch.randn(3, TREE.num_tokens, 2, 16, dtype=torch.float64).unbind()
    whole, lse = prefix_attention(q, k, v, TREE, return_lse=True, backend=backend, **options)
    some = TREE.queries_for(torch.tensor([4, 1, 2]))
    rows = some.query_rows
    assert rows.tolist() == [*range(37, 51), *range(52, 85)]
    part, part_lse = prefix_attention(
        q[rows], k, v, some, return_lse=True, backend=backend, **options
    )
    torch.testing.assert_close(part, whole[rows], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(part_lse, lse[:, rows], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_micro_batches_of_members_give_the_gradients_of_all_at_once(dtype):
    """The prefix is cached in float32, so that its gradients are summed there."""
    prefix, members = 29, [7, 12, 1, 20, 5]
    whole = PrefixLayout.from_lengths([prefix], [members])
    data = torch.randn(4, whole.num_tokens, 2, 16, dtype=torch.float64).to(dtype)

    exact = [x.double().requires_grad_() for x in data[:3]]
    prefix_attention(*exact, whole, backend="reference").backward(data[3].double())

    def gradients(backend: str) -> list[Tensor]:
        def run(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
            parts = q.to(dtype), k.to(dtype), v.to(dtype)
            prefix_attention(*parts, layout, backend=backend).backward(dout)

        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = leaves = [x.to(wide).requires_grad_() for x in data[:3]]
        cached = [x[:prefix].detach().requires_grad_() for x in (k, v)]
        run(PrefixLayout.from_lengths([prefix], [[]]), q[:prefix], *cached, data[3, :prefix])
        for batch in ([0, 1], [2, 3], [4]):
            rows = torch.cat([whole.sequence_rows(i)[prefix:] for i in batch])
            layout = PrefixLayout.from_lengths([prefix], [[members[i] for i in batch]])
            layout = layout.queries_for(range(1, 1 + len(batch)))
            below = [torch.cat([x, y[rows]]) for x, y in zip(cached, (k, v), strict=True)]
            run(layout, q[rows], *below, data[3, rows])
        k.grad[:prefix], v.grad[:prefix] = (x.grad for x in cached)
        return [x.grad.to(dtype) for x in leaves]

    # PyTorch's error with the same batches, each of which rounds its own gradients.
    both = zip("qkv", gradients("cpu"), exact, gradients("reference"), strict=True)
    for name, own, e, theirs in both:
        assert_within_budget(f"d{name}", own, e.grad, theirs, growth=sum(members) ** 0.5)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([7], "segments must be less than 7, the number of segments, got 7"),
        ([0, -1], r"segments\[1\] must be at least 0, got -1"),
        ([0.5], "segments must hold integers, got 0.5"),
        ("leaves", "segments must be a flat list of integers, got 'leaves'"),
    ],
)
def test_bad_query_segments_raise(segments, message):
    with pytest.raises(ValueError, match=message):
        TREE.queries_for(segments)


def test_queries_of_another_layout_raise():
    layout = GROUPS.queries_for([0])
    q = torch.zeros(GROUPS.num_tokens, 2, 16)
    with pytest.raises(ValueError, match="the layout has 37 queries, q has 148"):
        prefix_attention(q, q, q, layout)


# ---- merging --------------------------------------------------------------------------------


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def test_merge_states_joins_prefix_and_suffix():
    """The suffix alone, and its queries against the prefix, make the whole; gradients too."""
    layout = PrefixLayout.from_lengths([11], [[8]])
    q, k, v = leaves = _leaves((19, 2, 16), (19, 2, 16), (19, 2, 16))
    out, lse = prefix_attention(*leaves, layout, return_lse=True)
    exact = [out[11:], lse[:, 11:]]
    scores = torch.einsum("mhd,nhd->hmn", q[11:], k[:11]) / 4
    above = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v[:11])
    alone = PrefixLayout.from_lengths([8], [[]])
    below = prefix_attention(q[11:], k[11:], v[11:], alone, return_lse=True)
    merged = merge_states(*below, above, scores.logsumexp(-1))
    for a, e in zip(merged, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13)
    weights = [torch.randn_like(x) for x in exact]
    grads = [torch.autograd.grad(x, leaves, weights, retain_graph=True) for x in (merged, exact)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def test_merge_states_passes_gradcheck():
    leaves = _leaves((3, 2, 4), (2, 3), (3, 2, 4), (2, 3))
    assert torch.autograd.gradcheck(merge_states, leaves)


def test_merge_states_with_empty_sets():
    a, b = torch.randn(3, 2, 4), torch.zeros(3, 2, 4)
    lse = torch.randn(2, 3).requires_grad_()
    nothing = torch.full((2, 3), -float("inf")).requires_grad_()
    for out, merged in (merge_states(a, lse, b, nothing), merge_states(b, nothing, a, lse)):
        assert torch.equal(out, a)
        assert torch.equal(merged, lse)
    out, merged = merge_states(b, nothing, b, nothing)
    assert torch.equal(out, b)
    assert bool(merged.isneginf().all())
    # Some attentions return NaN where there are no keys.
    assert torch.equal(merge_states(a, lse, b * torch.nan, nothing)[0], a)
    merge_states(a, lse, b * torch.nan, nothing)[0].sum().backward()
    assert bool(lse.grad.isfinite().all() and nothing.grad.isfinite().all())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 2, 4), (2, 3), (4, 2, 4), (2, 3)), r"got \(3, 2, 4\) and \(4, 2, 4\)"),
        (((3, 2, 4), (3, 2), (3, 2, 4), (2, 3)), r"= \(2, 3\), got \(3, 2\) and \(2, 3\)"),
    ],
)
def test_merge_states_refuses_other_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        merge_states(*(torch.zeros(s) for s in shapes))


def test_merge_states_refuses_other_devices():
    out, lse = torch.zeros(3, 2, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one device, got cpu, cpu, meta and cpu"):
        merge_states(out, lse, out.to("meta"), lse)


# ---- bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_results_have_the_same_bits_from_run_to_run(backend):
    inputs = Inputs.random(GROUPS, lse=True, sinks=True)
    call = partial(prefix_attention, layout=GROUPS, prefix_causal=False, backend=backend)
    first, second = (attention_results(call, inputs) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
