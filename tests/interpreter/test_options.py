"""Window, softcap, sinks, bidirectional prefixes and query subsets in the kernels, interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.backends import triton as triton_backend
from prefix_attn.kernels import backward
from prefix_attn.kernels.config import INTERPRETER, Tile
from prefix_attn.kernels.primitives import dot_precision
from prefix_attn.testing import Inputs, attention_results, check_attention, forests

GROUPS = PrefixLayout.from_lengths([37, 0, 20], [[9, 16, 33], [5, 7], [3, 0, 18]])
TREE = PrefixLayout.from_tree([37, 5, 9, 1, 33, 41, 6], [-1, 0, 1, 1, 0, 4, -1])
LAYOUTS = {
    "groups": GROUPS,
    "tree": TREE,
    "suffixes": GROUPS.queries_for([1, 3, 5, 7, 9]),
    "inner": TREE.queries_for([1, 4, 6]),
    # Text, a picture of more than a tile, text; one leaf is a picture.
    "pictures": PrefixLayout.from_tree(
        [9, 37, 5, 6, 3], [-1, 0, 1, 2, 2], bidirectional=[False, True, False, False, True]
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": 24},
    "softcap": {"softcap": 1.5},
    "large softcap": {"softcap": 1e6},
    "negative scale": {"scale": -0.4},
    "sinks": {"sinks": True},
    "bidirectional": {"prefix_causal": False},
    "window+bidirectional": {"window_size": 17, "prefix_causal": False},
    "any order": {"deterministic": False},
    "all, any order": {
        "window_size": 40,
        "softcap": 2.0,
        "sinks": True,
        "prefix_causal": False,
        "scale": -0.4,
        "deterministic": False,
    },
    "all": {
        "window_size": 40,
        "softcap": 2.0,
        "sinks": True,
        "prefix_causal": False,
        "scale": -0.4,
    },
}


@contextmanager
def any_order() -> Iterator[None]:
    """Without PyTorch's switch, which the fixtures of these tests turn on."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _check(
    layout: PrefixLayout,
    options: dict[str, Any],
    dtype: torch.dtype,
    dims: tuple[int, int] = (16, 32),
) -> None:
    """With a gradient of lse; `options["sinks"]` is True where there are sinks."""
    options = dict(options)
    sinks = options.pop("sinks", False)
    inputs = Inputs.random(layout, (2, 1), dims, dtype, lse=True, sinks=sinks)
    with any_order() if options.get("deterministic") is False else nullcontext():
        check_attention(layout, inputs, backend="triton", **options)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_triton_option_matches_float64(layout, options):
    _check(layout, options, torch.float64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_triton_option_matches_float64_with_dk_and_dv_apart(options, monkeypatch):
    """Tiles of dK, of dV and of rows differ in size, so that each needs a list of its own.

    Two tiles cover a head: 32 and 16 columns, of which those of V have some padding.
    """
    apart = replace(INTERPRETER, keys=Tile(16, 32), fused=Tile(16, 32), values=Tile(32, 16))
    monkeypatch.setattr(triton_backend, "config_for", lambda q, v: apart)
    _check(LAYOUTS["inner"], options, torch.float64, (48, 40))


@pytest.mark.parametrize("layout", [GROUPS, LAYOUTS["inner"]], ids=["groups", "inner"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_option_stays_within_budget(layout, options, dtype):
    _check(layout, options, dtype)


def test_triton_members_that_fill_tiles_keep_their_bits_when_permuted():
    """Tiles of the interpreter are 32 queries high: a prefix and members of whole tiles."""
    prefix, lengths, order = 64, [32, 96, 64], [2, 0, 1]
    layout = PrefixLayout.from_lengths([prefix], [lengths])
    permuted = PrefixLayout.from_lengths([prefix], [[lengths[i] for i in order]])
    rows = torch.cat([torch.arange(prefix), *(layout.sequence_rows(i)[prefix:] for i in order)])
    data = torch.randn(4, layout.num_tokens, 1, 16).unbind()
    results = []
    for which, index in ((layout, slice(None)), (permuted, rows)):
        *leaves, dout = (x[index].clone().requires_grad_() for x in data)
        out, lse = prefix_attention(*leaves, which, return_lse=True, backend="triton")
        results.append((out, lse.t(), *torch.autograd.grad(out, leaves, dout.detach())))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        if name in ("dk", "dv"):  # the prefix sums over its members in packed order
            assert torch.equal(a[rows][prefix:], b[prefix:])
            torch.testing.assert_close(a[:prefix], b[:prefix])
        else:
            assert torch.equal(a[rows], b)


def test_bfloat16_is_refused_where_the_interpreter_computes_it_wrong(monkeypatch):
    x = torch.zeros(3, 1, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "prefix_attn_fixed", False)
    with pytest.raises(NotImplementedError, match=r"call prefix_attn.testing.fix_interpreter"):
        prefix_attention(x, x, x, PrefixLayout.from_lengths([2], [[1]]), backend="triton")


def test_interpreter_replaces_the_language_once_a_launch(monkeypatch):
    replaced = []
    replace_language = interpreter._patch_lang_core

    def counted(lang, scope):
        replaced.append(lang)
        replace_language(lang, scope)

    monkeypatch.setattr(interpreter, "_patch_lang_core", counted)
    x = torch.zeros(3, 1, 16)
    for _ in range(3):
        prefix_attention(x, x, x, PrefixLayout.from_lengths([2], [[1]]), backend="triton")
    # `tl.core` is left replaced by the first function of Triton's own that a process calls.
    assert replaced.count(tl) == 3
    assert replaced.count(tl.core) <= 1


def test_every_switch_for_determinism_overrules_the_fused_backward(monkeypatch):
    seen = []
    launch = backward.BackwardLaunch.__call__

    def recorded(self, *tensors):
        seen.append(self.fused)
        return launch(self, *tensors)

    monkeypatch.setattr(backward.BackwardLaunch, "__call__", recorded)

    def run(deterministic: bool | None) -> None:
        x = torch.randn(5, 1, 16, requires_grad=True)
        layout = PrefixLayout.from_lengths([3], [[1, 1]])
        prefix_attention(
            x, x, x, layout, deterministic=deterministic, backend="triton"
        ).sum().backward()

    run(False)  # PyTorch's switch is on in these tests
    with any_order():
        run(None)
        run(True)
        run(False)
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
        run(False)
    assert seen == [False, False, False, True, False]


def test_triton_options_have_the_same_bits_from_run_to_run():
    options = {name: x for name, x in OPTIONS["all"].items() if name != "sinks"}
    call = partial(prefix_attention, layout=GROUPS, backend="triton", **options)
    inputs = Inputs.random(GROUPS, (2, 1), (16, 32), lse=True, sinks=True)
    first, second = (attention_results(call, inputs) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    forest=forests(max_segments=6, max_length=40),
    queries=st.none() | st.sets(st.integers(0, 5)),
    window_size=st.none() | st.integers(1, 60),
    softcap=st.none() | st.sampled_from([0.5, 3.0, 50.0]),
    sinks=st.booleans(),
    prefix_causal=st.booleans(),
    scale=st.sampled_from([None, 1.0, -0.5, 0.0]),
    deterministic=st.sampled_from([None, False]),
    bidirectional=st.sets(st.integers(0, 5)),
)
def test_triton_on_random_forests_with_random_options(forest, queries, bidirectional, **options):
    flags = [i in bidirectional for i in range(len(forest[0]))]
    layout = PrefixLayout.from_tree(*forest, bidirectional=flags)
    if queries is not None:
        layout = layout.queries_for([i for i in sorted(queries) if i < layout.num_segments])
    _check(layout, options, torch.float64)


SWITCHES = {
    "matmul.fp32_precision": (
        lambda on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "ieee")
    ),
    "backends.fp32_precision": (
        lambda on: setattr(torch.backends, "fp32_precision", "tf32" if on else "none")
    ),
    "set_float32_matmul_precision": (
        lambda on: torch.set_float32_matmul_precision("high" if on else "highest")
    ),
    "matmul.allow_tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
}


@pytest.fixture
def default_precision() -> Iterator[None]:
    """Leaves PyTorch's switches for tf32 as they are at the start of a process."""
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_float32_products_follow_every_switch_of_pytorch(switch, default_precision):
    """Once one of them was set, reading another one may raise."""
    assert dot_precision(torch.float32) == "ieee"
    switch(True)
    assert dot_precision(torch.float32) == "tf32"
    assert dot_precision(torch.bfloat16) == "ieee"
    switch(False)
    assert dot_precision(torch.float32) == "ieee"
