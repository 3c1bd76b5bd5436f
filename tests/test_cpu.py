"""The CPU backend against float64, with PyTorch's own attention per sequence as the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import assert_within_budget, repeated_attention

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

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Result = dict[str, Tensor]


@st.composite
def forests(draw: st.DrawFn) -> PrefixLayout:
    """Random forests in depth-first order, empty segments included."""
    count = draw(st.integers(1, 10))
    lengths = draw(st.lists(st.integers(0, 21), min_size=count, max_size=count))
    parents: list[int] = []
    path: list[int] = []
    for i in range(count):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        path.append(i)
    return PrefixLayout.from_tree(lengths, parents)


def inputs(
    tokens: int,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(seed)
    (hq, hkv), (d, dv) = heads, dims
    shapes = [(tokens, hq, d), (tokens, hkv, d), (tokens, hkv, dv), (tokens, hq, dv)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Result:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def repeated_with_lse(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Every sequence whole, densely, in float32 or better; the mean over the copies of a row."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=dtype)
    lse = torch.zeros(q.shape[:2], dtype=dtype)
    all_rows = [layout.sequence_rows(i) for i in range(layout.num_sequences)]
    count = torch.bincount(torch.cat([*all_rows, torch.empty(0).long()]), minlength=q.shape[0])
    for rows in all_rows:
        qs = q[rows].to(dtype).transpose(0, 1)
        ks, vs = (x[rows].to(dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        hidden = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        scores = (qs @ ks.mT * scale).masked_fill(hidden, -torch.inf)
        share = 1 / count[rows].to(dtype)
        o = (scores.softmax(-1) @ vs).transpose(0, 1)
        out = out.index_add(0, rows, o * share[:, None, None])
        lse = lse.index_add(0, rows, scores.logsumexp(-1).t() * share[:, None])
    return out.to(q.dtype), lse.t()


def gradients_with_lse(
    attention: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], dlse: Tensor
) -> Result:
    """out, lse, dq, dk, dv where both outputs have a gradient."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse.to(lse.dtype)))
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def check(actual: Result, exact: Result, pytorch: Result) -> None:
    """Every result is within its budget; the gradients share one.

    dq and dk are differences of terms as large as dv: over one key they are exactly zero, and
    rounding is measured against what was subtracted.
    """
    for name, value in actual.items():
        assert value.dtype == pytorch[name].dtype, name
        assert value.shape == exact[name].shape, name
        if not name.startswith("d"):
            assert_within_budget(name, value, exact[name], pytorch[name])
    grads = [name for name in actual if name.startswith("d")]
    flat = [torch.cat([r[name].flatten() for name in grads]) for r in (actual, exact, pytorch)]
    assert_within_budget(", ".join(grads), *flat)


def check_layout(layout: PrefixLayout, tensors: list[Tensor], scale: float | None = None) -> None:
    """Without a gradient of lse: against the dense float64, and SDPA per sequence as budget."""
    check(
        gradients(
            lambda q, k, v: prefix_attention(q, k, v, layout, scale=scale, backend="cpu"), *tensors
        ),
        gradients(
            lambda q, k, v: prefix_attention(q, k, v, layout, scale=scale, backend="reference"),
            *doubles(tensors),
        ),
        gradients(lambda q, k, v: repeated_attention(q, k, v, layout, scale=scale), *tensors),
    )


def check_lse(layout: PrefixLayout, tensors: list[Tensor], scale: float | None = None) -> None:
    """With a gradient of lse, which SDPA does not have: dense PyTorch is the budget."""
    dlse = torch.randn(tensors[0].shape[:2], generator=torch.Generator().manual_seed(7)).t()
    scale = tensors[0].shape[2] ** -0.5 if scale is None else scale
    options = {"scale": scale, "return_lse": True}
    check(
        gradients_with_lse(
            lambda q, k, v: prefix_attention(q, k, v, layout, backend="cpu", **options),
            tensors,
            dlse,
        ),
        gradients_with_lse(
            lambda q, k, v: prefix_attention(q, k, v, layout, backend="reference", **options),
            doubles(tensors),
            dlse,
        ),
        gradients_with_lse(
            lambda q, k, v: repeated_with_lse(q, k, v, layout, scale), tensors, dlse
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_cpu_matches_float64(layout: PrefixLayout, dtype: torch.dtype) -> None:
    check_layout(layout, inputs(layout.num_tokens, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_cpu_matches_float64_with_lse(layout: PrefixLayout, dtype: torch.dtype) -> None:
    check_lse(layout, inputs(layout.num_tokens, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(
    "dims",
    # Powers of two, others, odd ones, DV on either side of D, both limits.
    [(16, 16), (64, 64), (80, 80), (96, 96), (17, 33), (192, 128), (16, 256), (256, 256)],
    ids=str,
)
def test_cpu_heads_and_dims_match_float64(
    dims: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    layout = LAYOUTS["ragged tree"]
    tensors = inputs(layout.num_tokens, heads, dims, dtype)
    check_layout(layout, tensors)
    check_lse(layout, tensors)


@settings(max_examples=60)
@given(
    layout=forests(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dims=st.tuples(st.sampled_from([16, 24, 80, 96]), st.sampled_from([16, 40, 80])),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_cpu_random_forests_match_float64(
    layout: PrefixLayout, kv_heads: int, group: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    tensors = inputs(layout.num_tokens, (kv_heads * group, kv_heads), dims, dtype)
    check_layout(layout, tensors)
    check_lse(layout, tensors)


@pytest.mark.parametrize("start", range(1, 41))
def test_cpu_every_suffix_start_matches_float64(start: int) -> None:
    """A fork after each of the first 40 rows, past the query tile of 32 rows."""
    layout = PrefixLayout.from_lengths([start], [[9, 2]])
    check_layout(layout, inputs(layout.num_tokens, seed=start))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-300, 1e-3, 0.5])
def test_cpu_scale_matches_float64(scale: float) -> None:
    """Scales that are not positive, which PyTorch's causal kernels can't take; others."""
    layout = LAYOUTS["two ragged groups"]
    check_lse(layout, inputs(layout.num_tokens), scale)


def test_cpu_large_scale_matches_float64() -> None:
    """Scores of 50 and more: softmax is nearly one-hot, SDPA is the budget."""
    layout = LAYOUTS["two ragged groups"]
    check_layout(layout, inputs(layout.num_tokens), 2.5)


def test_packed_matches_each_sequence_alone() -> None:
    """Without the reference: every sequence alone, in float64, by PyTorch."""
    layout = LAYOUTS["ragged tree"]
    tensors = inputs(layout.num_tokens)
    check(
        gradients(lambda q, k, v: prefix_attention(q, k, v, layout, backend="cpu"), *tensors),
        gradients(lambda q, k, v: repeated_attention(q, k, v, layout), *doubles(tensors)),
        gradients(lambda q, k, v: repeated_attention(q, k, v, layout), *tensors),
    )


def test_dk_accumulates_over_members() -> None:
    """The prefix gradients are the sum of those of every member run alone."""
    prefix, members = 21, [5, 17, 1, 8]
    layout = PrefixLayout.from_lengths([prefix], [members])
    tensors = inputs(layout.num_tokens)
    tensors[3][:prefix] = 0  # else every member alone counts the prefix rows once more

    def alone(tensors: list[Tensor]) -> Result:
        total = {}
        for i in range(layout.num_sequences):
            rows = layout.sequence_rows(i)
            one = gradients(
                lambda q, k, v: repeated_attention(
                    q, k, v, PrefixLayout.from_lengths([len(q)], [[]])
                ),
                *(x[rows] for x in tensors),
            )
            for name in ("dq", "dk", "dv"):
                grad = total.setdefault(name, torch.zeros_like(tensors[1 if name != "dq" else 0]))
                grad[rows] += one[name]
        return total

    actual = gradients(lambda q, k, v: prefix_attention(q, k, v, layout, backend="cpu"), *tensors)
    del actual["out"]
    check(actual, alone(doubles(tensors)), alone(tensors))


def test_permuting_members_permutes_output() -> None:
    members, order = [6, 6, 11, 1], [2, 0, 3, 1]
    layout = PrefixLayout.from_lengths([15], [members])
    permuted = PrefixLayout.from_lengths([15], [[members[i] for i in order]])
    spans = layout.cu_seqlens.tolist()
    rows = torch.cat([torch.arange(15), *(torch.arange(spans[1 + i], spans[2 + i]) for i in order)])
    tensors = inputs(layout.num_tokens)
    back = torch.argsort(rows)
    moved = gradients(
        lambda q, k, v: prefix_attention(q, k, v, permuted, backend="cpu"),
        *(x[rows] for x in tensors),
    )
    check(
        {name: x[back] for name, x in moved.items()},
        gradients(
            lambda q, k, v: prefix_attention(q, k, v, layout, backend="reference"),
            *doubles(tensors),
        ),
        gradients(lambda q, k, v: repeated_attention(q, k, v, layout), *tensors),
    )


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
    q, k, v, dout = inputs(layout.num_tokens, dtype=dtype)
    views = arrange(q, k, v)
    assert not all(x.is_contiguous() for x in views)
    # The gradient of out with heads outside, too.
    check_layout(layout, [*views, dout.transpose(0, 1).contiguous().transpose(0, 1)])


def test_cpu_expanded_inputs_match_float64() -> None:
    """Stride 0 along tokens and along heads."""
    layout = LAYOUTS["two ragged groups"]
    q, k, v, dout = inputs(layout.num_tokens)
    check_layout(layout, [q[:1].expand_as(q), k[:, :1].expand_as(k), v[:1].expand_as(v), dout])


def test_cpu_leaves_inputs_unchanged() -> None:
    layout = LAYOUTS["ragged tree"]
    tensors = inputs(layout.num_tokens)
    copies = [x.clone() for x in tensors]
    dlse = torch.ones(4, layout.num_tokens)
    gradients_with_lse(
        lambda q, k, v: prefix_attention(q, k, v, layout, return_lse=True, backend="cpu"),
        tensors,
        dlse,
    )
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
    assert torch.equal(dlse, torch.ones_like(dlse))


def test_cpu_is_deterministic() -> None:
    layout = LAYOUTS["longer than a tile"]
    tensors = inputs(layout.num_tokens)
    first, second = (
        gradients(lambda q, k, v: prefix_attention(q, k, v, layout, backend="cpu"), *tensors)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("row", [3, 14, 20], ids=["prefix", "first suffix", "last row of group"])
def test_cpu_non_finite_values_propagate_like_sdpa(row: int, name: str, value: float) -> None:
    """NaN where SDPA per sequence gives NaN; the other group keeps its bits, gradients too."""
    layout = PrefixLayout.from_lengths([11, 6], [[4, 6], [5, 3]])
    first_group = slice(0, 21)
    tensors = inputs(layout.num_tokens)
    ours = lambda q, k, v: prefix_attention(q, k, v, layout, backend="cpu")  # noqa: E731
    clean = gradients(ours, *tensors)
    tensors["qkv".index(name)][row] = value
    actual = gradients(ours, *tensors)
    # Not PyTorch's flash kernel: for some lengths it returns 0 for a row of NaN scores.
    with sdpa_kernel(SDPBackend.MATH):
        sdpa = gradients(lambda q, k, v: repeated_attention(q, k, v, layout), *tensors)
    attends = layout.materialize()[:, row]
    for key, result in actual.items():
        assert torch.equal(result[first_group.stop :], clean[key][first_group.stop :]), key
        assert bool(sdpa[key][first_group.stop :].isfinite().all())
    hit = ~sdpa["out"][attends].isfinite()
    assert bool(hit.any())
    assert torch.equal(~actual["out"][attends].isfinite(), hit)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_key_of_a_prefix_of_one_reaches_all_members(backend: str) -> None:
    """A row all of whose scores in one segment are NaN: PyTorch's kernel alone returns 0 there."""
    layout = PrefixLayout.from_lengths([1, 2], [[3, 3], [4]])
    q, k, v, _ = inputs(layout.num_tokens)
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
    result = gradients_with_lse(
        lambda q, k, v: prefix_attention(q, k, v, layout, return_lse=True, backend="cpu"),
        inputs(0, dims=(32, 48), dtype=dtype),
        torch.empty(4, 0),
    )
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
