"""The real Triton kernels, interpreted, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from triton.runtime.interpreter import TensorDescHandle

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.backends import triton as triton_backend
from prefix_attn.content import content_of
from prefix_attn.kernels import sums
from prefix_attn.kernels.arguments import BackwardTables
from prefix_attn.kernels.config import INTERPRETER, Tile
from prefix_attn.testing import (
    Inputs,
    assert_all,
    attention_results,
    check_attention,
    compare_attention,
    forests,
    repeated_attention,
)

# Ragged members, an empty prefix, an empty suffix, a prefix of one, a lone sequence.
GROUPS = PrefixLayout.from_lengths([37, 0, 20, 1, 18], [[9, 16, 33], [5, 7], [3, 0], [40, 2], []])
# Three levels, segments shorter and longer than a tile, two roots.
TREE = PrefixLayout.from_tree([37, 5, 9, 1, 33, 41, 6], [-1, 0, 1, 1, 0, 4, -1])
# One long prefix: its key tiles are split over several programs.
SPLIT = PrefixLayout.from_lengths([50], [[30, 45, 60, 20]])


def _on_triton(layout: PrefixLayout, **options: Any) -> Callable[..., Any]:
    return partial(prefix_attention, layout=layout, backend="triton", **options)


def _check(layout: PrefixLayout, heads: int, kv_heads: int, d: int, dv: int, dtype: torch.dtype):
    inputs = Inputs.random(layout, (heads, kv_heads), (d, dv), dtype)
    check_attention(layout, inputs, backend="triton")


@pytest.mark.parametrize("layout", [GROUPS, TREE, SPLIT], ids=["groups", "tree", "split"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_triton_matches_float64(layout, dtype):
    _check(layout, 4, 2, 32, 32, dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dv"),
    [(2, 2, 16, 16), (3, 1, 80, 80), (2, 1, 96, 64), (1, 1, 192, 128), (1, 1, 17, 33),
     (1, 1, 256, 256), (2, 1, 1, 1), (4, 2, 2, 8), (1, 1, 8, 2), (2, 1, 15, 40)],
)  # fmt: skip
def test_triton_serves_head_dims_and_head_groups(heads, kv_heads, d, dv):
    _check(PrefixLayout.from_lengths([19], [[7, 18]]), heads, kv_heads, d, dv, torch.float32)


@pytest.mark.parametrize("dims", [(1, 1), (2, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_triton_pads_small_heads_in_every_dtype(dtype, dims):
    # The split prefix has partial sums, of unpadded rows, too.
    _check(SPLIT, 2, 1, *dims, dtype)


@pytest.mark.parametrize("softcap", [None, 1e-19, 1e19], ids=str)
@pytest.mark.parametrize("scale", [2.0**23, -(2.0**23)], ids=str)
def test_triton_takes_the_largest_scale_without_nan(scale, softcap):
    inputs = Inputs.random(SPLIT, (2, 1), (16, 16))
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    options = {"scale": scale, "softcap": softcap}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = prefix_attention(*leaves, SPLIT, return_lse=True, backend="triton", **options)
    exact = prefix_attention(*(x.double() for x in leaves), SPLIT, backend="reference", **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for x in (lse, *torch.autograd.grad(out, leaves, dout)):
        assert x.isfinite().all()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "own tensors": lambda x: x,
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one of three": lambda x: torch.stack([x, x, x], dim=2)[:, :, 1],
    "off by 8 bytes": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "rows overlap": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize(
    ("layout", "view"),
    [(GROUPS, "own tensors"), *((TREE, view) for view in VIEWS)],
    ids=["groups", *VIEWS],
)
def test_triton_by_descriptors_matches_pointers(layout, view, monkeypatch):
    """Tiles stick out past the last key and into neighbours; 32 and 16 columns cover 40."""
    view = VIEWS[view]
    inputs = Inputs.random(layout, (2, 1), (40, 64), torch.float64)
    results = []
    for descriptors in (True, False):
        config = replace(
            INTERPRETER, forward_descriptors=descriptors, backward_descriptors=descriptors
        )
        monkeypatch.setattr(triton_backend, "config_for", lambda q, v, config=config: config)
        leaves = [view(x).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = prefix_attention(*leaves, layout, backend="triton")
        results.append((out, *torch.autograd.grad(out, leaves, view(inputs.dout))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_triton_loads_by_descriptors_where_they_can_address_the_heads(monkeypatch):
    """In the interpreter, too, whose configuration asks for them."""
    loads = []
    load = TensorDescHandle.__init__

    def counted(self, *arguments):
        loads.append(1)
        return load(self, *arguments)

    monkeypatch.setattr(TensorDescHandle, "__init__", counted)
    _check(SPLIT, 2, 1, 16, 16, torch.float32)
    assert len(loads) > 0
    loads.clear()
    _check(SPLIT, 2, 1, 15, 16, torch.float32)
    assert len(loads) == 0


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gluon", NotImplementedError, "=gluon can't serve this call: Triton's interpreter"),
        ("cuda", ValueError, "PREFIX_ATTN_FORWARD must be triton or gluon, got 'cuda'"),
    ],
)
def test_forward_that_cannot_serve_raises(name, error, message, monkeypatch):
    monkeypatch.setenv("PREFIX_ATTN_FORWARD", name)
    q, k, v = torch.randn(3, SPLIT.num_tokens, 1, 64).bfloat16().unbind()
    with pytest.raises(error, match=message):
        prefix_attention(q, k, v, SPLIT, backend="triton")


@pytest.mark.parametrize("prefix", range(1, 35))
def test_triton_at_every_offset_of_a_suffix_in_a_block(prefix):
    # The second and third suffixes start at other offsets again; tiles are 16 and 32 wide.
    _check(
        PrefixLayout.from_lengths([prefix], [[prefix % 5 + 1, 17, 40]]), 1, 1, 16, 16, torch.float32
    )


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(forest=forests())
def test_triton_on_random_forests(forest):
    _check(PrefixLayout.from_tree(*forest), 2, 1, 16, 16, torch.float32)


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
def test_triton_scale_and_lse_gradient(scale):
    inputs = Inputs.random(TREE, (2, 1), (16, 16), torch.float64, lse=True)
    check_attention(TREE, inputs, backend="triton", scale=scale)


def test_triton_passes_gradcheck():
    layout = PrefixLayout.from_tree([3, 2, 1, 4], [-1, 0, 1, 0])
    inputs = Inputs.random(layout, (2, 1), (16, 16), torch.float64)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert torch.autograd.gradcheck(
        lambda *x: prefix_attention(*x, layout, return_lse=True, backend="triton"),
        leaves,
        fast_mode=True,
    )


def test_triton_gradients_have_the_same_bits_from_run_to_run():
    inputs = Inputs.random(SPLIT, (2, 1), (16, 16))
    first, second = (attention_results(_on_triton(SPLIT), inputs) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("block_m", [16, 64])
def test_triton_adds_up_dq_either_way_round(block_m, monkeypatch):
    """Row tiles below and from 64 on multiply K^T dS^T and dS K."""
    config = replace(INTERPRETER, fused=Tile(block_m, 32))
    monkeypatch.setattr(triton_backend, "config_for", lambda q, v: config)
    monkeypatch.setattr(triton_backend, "_any_order", lambda options: True)
    _check(SPLIT, 2, 1, 16, 32, torch.float64)


def test_split_layout_really_splits(monkeypatch):
    tables = []
    launch = triton_backend.BackwardLaunch

    def recorded(*arguments, **named):
        tables.extend(x for x in arguments if isinstance(x, BackwardTables))
        return launch(*arguments, **named)

    monkeypatch.setattr(triton_backend, "BackwardLaunch", recorded)
    content_of(SPLIT.segments).kept.clear()
    _check(SPLIT, 4, 1, 16, 16, torch.float32)
    (made,) = tables
    assert made.keys.num_slots > 2


@pytest.mark.parametrize(
    ("descriptors", "deterministic"), [(True, True), (False, False)], ids=["TMA", "any order"]
)
def test_triton_sums_dk_and_dv_apart(descriptors, deterministic, monkeypatch, guard):
    """Both have partial sums here, which are added in several blocks of keys."""
    layout = PrefixLayout.from_lengths([20], [[30, 35]])
    apart = replace(INTERPRETER, values=Tile(16, 16), backward_descriptors=descriptors)
    monkeypatch.setattr(triton_backend, "config_for", lambda q, v: apart)
    monkeypatch.setattr(triton_backend, "_any_order", lambda options: not deterministic)
    monkeypatch.setattr(sums, "REDUCED_TILE", 8 * 16)
    inputs = Inputs.random(layout, (4, 1), (16, 24), torch.float64)
    results = attention_results(_on_triton(layout), inputs)
    assert guard.launches == 5  # the forward pass, delta, the backward and two sums
    assert_all(compare_attention(layout, inputs, results))


def test_triton_takes_one_forward_and_three_backward_launches(guard):
    leaves = [x.requires_grad_() for x in torch.randn(3, GROUPS.num_tokens, 1, 16).unbind()]
    out = prefix_attention(*leaves, GROUPS, backend="triton")
    assert guard.launches == 1
    out.sum().backward()
    assert guard.launches == 3  # no tile of this layout is split: delta and the backward


def test_triton_members_may_be_permuted():
    lengths, order = [9, 16, 33], [2, 0, 1]
    layout = PrefixLayout.from_lengths([21], [lengths])
    permuted = PrefixLayout.from_lengths([21], [[lengths[i] for i in order]])
    inputs = Inputs.random(layout, (2, 1), (16, 16))
    rows = torch.cat([torch.arange(21), *(layout.sequence_rows(i)[21:] for i in order)])
    moved = attention_results(_on_triton(permuted), inputs.map(lambda x: x[rows]))
    back = torch.argsort(rows)
    actual = {name: x[back] for name, x in moved.items()}
    assert_all(compare_attention(layout, inputs, actual))


def test_triton_takes_views_and_broadcast_gradients():
    layout = GROUPS
    fused = torch.randn(layout.num_tokens, 4, 3, 16, requires_grad=True)
    grads = []
    for backend in ("triton", "reference"):
        q, k, v = fused.unbind(2)  # strided heads and rows
        prefix_attention(q, k, v, layout, backend=backend).sum().backward()
        grads.append(fused.grad.clone())
        fused.grad = None
    torch.testing.assert_close(*grads, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("axis", ["rows", "heads"])
def test_triton_addresses_past_two_to_the_31_elements(axis):
    # Sparse views of untouched virtual memory: only the rows in use become real.
    tokens, heads, d = (140, 1, 16) if axis == "rows" else (40, 2, 16)
    strides = (2**24, d, 1) if axis == "rows" else (d, 2**31 + 64, 1)
    span = 1 + sum((n - 1) * s for n, s in zip((tokens, heads, d), strides, strict=True))
    assert span > 2**31
    layout = PrefixLayout.from_lengths([tokens // 2], [[tokens // 4, tokens // 4]])
    inputs = Inputs.random(layout, (heads, heads), (d, d), torch.float16)
    far = torch.from_numpy(np.empty(span, dtype=np.float16)).as_strided((tokens, heads, d), strides)
    far.copy_(inputs.k)
    near = attention_results(_on_triton(layout), inputs)
    leaf = inputs.q.clone().requires_grad_()
    out = prefix_attention(leaf, far, inputs.v, layout, backend="triton")
    assert torch.equal(out, near["out"])
    assert torch.equal(torch.autograd.grad(out, leaf, inputs.dout)[0], near["dq"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_triton_spreads_nan_and_inf_like_sdpa(bad, which):
    layout = PrefixLayout.from_lengths([40], [[40, 40]])
    inputs = list(torch.randn(3, layout.num_tokens, 1, 16).unbind())
    inputs[which][20] = bad
    out = prefix_attention(*inputs, layout, backend="triton")
    expected = repeated_attention(*inputs, layout)
    assert (~out.isfinite()).any()
    # Whatever PyTorch makes non-finite is non-finite here too.
    assert not (out.isfinite() & ~expected.isfinite()).any()


def test_triton_serves_no_tokens():
    layout = PrefixLayout.from_lengths([0], [[0, 0]])
    q = torch.empty(0, 2, 16, requires_grad=True)
    out, lse = prefix_attention(q, q, q, layout, return_lse=True, backend="triton")
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    out.sum().backward()
    assert q.grad.shape == (0, 2, 16)


def test_triton_operators_pass_opcheck():
    layout = PrefixLayout.from_tree([20, 5, 3], [-1, 0, 0])
    inputs = Inputs.random(layout, (2, 1), (16, 16))
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    operators = torch.ops.prefix_attn
    sinks = torch.zeros(2)
    for deterministic in (True, False):
        rest = (layout.segments, 0.25, None, None, True, deterministic, "triton")
        out, lse = operators.forward(q, k, v, sinks, *rest)
        torch.library.opcheck(operators.forward.default, (q, k, v, sinks, *rest))
        saved = (q, k, v, out, lse, None, sinks, *rest)
        torch.library.opcheck(operators.backward.default, (dout, *saved))
