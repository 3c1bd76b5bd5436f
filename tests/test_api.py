"""What `prefix_attention` refuses and how it says so; its choice; the options by brute force."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixLayout, backends, prefix_attention
from prefix_attn.api import choose_backend, max_head_dim
from prefix_attn.backends import cpu
from prefix_attn.testing import Inputs, assert_all, attention_results, compare_attention

LAYOUT = PrefixLayout.from_lengths([4], [[2, 1]])  # T = 7
NAMES = ["triton", "cpu", "reference"]
needs_no_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs Triton on the CPU"
)


def call_tensors() -> dict[str, Tensor]:
    """T 7, Hq 4, Hkv 2, D = DV = 16."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": 4, "k": 2, "v": 2}
    return {name: torch.randn(7, n, 16, generator=generator) for name, n in heads.items()}


def call(**changes: Any) -> Any:
    """A right call with some arguments changed."""
    return prefix_attention(**{**call_tensors(), "layout": LAYOUT, **changes})


def test_call_that_the_errors_start_from_is_right() -> None:
    out, lse = call(return_lse=True)
    assert out.shape == (7, 4, 16)
    assert lse.shape == (4, 7)
    assert torch.equal(call(), out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_than_dense_tensors_raise(name: str) -> None:
    x = call_tensors()[name]
    nested = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
    for other, kind in ((x.to_sparse(), "torch.sparse_coo"), (nested, "nested")):
        message = f"{name} must be a dense tensor of shape (T, H, D), got a {kind} one"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**{name: other})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_dimensions_other_than_three_raise(name: str) -> None:
    message = f"{name} must have shape (T, H, D), got (1, 7, 2, 16)"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**{name: torch.zeros(1, 7, 2, 16)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(6, 2, 16)}, "k must have shape (7, Hkv, 16), got (6, 2, 16)"),
        ({"k": torch.zeros(7, 2, 32)}, "k must have shape (7, Hkv, 16), got (7, 2, 32)"),
        ({"v": torch.zeros(8, 2, 16)}, "v must have shape (7, 2, DV), got (8, 2, 16)"),
        ({"v": torch.zeros(7, 4, 16)}, "v must have shape (7, 2, DV), got (7, 4, 16)"),
        ({"q": torch.zeros(7, 3, 16)}, "Hq must be a positive multiple of Hkv, got Hq 3, Hkv 2"),
        ({"q": torch.zeros(7, 1, 16)}, "Hq must be a positive multiple of Hkv, got Hq 1, Hkv 2"),
        ({"q": torch.zeros(7, 0, 16)}, "Hq must be a positive multiple of Hkv, got Hq 0, Hkv 2"),
        (
            {"k": torch.zeros(7, 0, 16), "v": torch.zeros(7, 0, 16)},
            "Hq must be a positive multiple of Hkv, got Hq 4, Hkv 0",
        ),
        ({"q": torch.zeros(7, 4, 0), "k": torch.zeros(7, 2, 0)}, "D must be 1 to 512, got 0"),
        ({"q": torch.zeros(7, 4, 513), "k": torch.zeros(7, 2, 513)}, "D must be 1 to 512, got 513"),
        ({"v": torch.zeros(7, 2, 0)}, "DV must be 1 to 512, got 0"),
        ({"v": torch.zeros(7, 2, 1024)}, "DV must be 1 to 512, got 1024"),
        ({"q": torch.zeros(9, 4, 16)}, "the layout has 7 tokens, q has 9"),
    ],
)
def test_wrong_shape_raises(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes)


def test_layout_for_other_tokens_raises() -> None:
    layout = PrefixLayout.from_lengths([4], [[2, 2]])
    with pytest.raises(ValueError, match="the layout has 8 tokens, q has 7"):
        call(layout=layout)


@pytest.mark.parametrize("layout", [None, [4, 2, 1], torch.tensor([0, 4, 6, 7])])
def test_layout_of_another_type_raises(layout: Any) -> None:
    name = type(layout).__name__
    with pytest.raises(TypeError, match=f"layout must be a PrefixLayout, got {name}"):
        call(layout=layout)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_than_tensor_raises(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        call(**{name: [[1.0]]})


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_unsupported_dtype_raises(name: str, dtype: torch.dtype) -> None:
    message = f"{name} must be float16, bfloat16, float32 or float64, got {dtype}"
    with pytest.raises(ValueError, match=message):
        call(**{name: torch.zeros(7, 2, 16).to(dtype)})


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_dtypes_raise(name: str) -> None:
    message = f"must have one dtype, got q torch.float32, {name} torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        call(**{name: torch.zeros(7, 2, 16, dtype=torch.bfloat16)})


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_devices_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"on one device, got q on cpu, {name} on meta"):
        call(**{name: torch.zeros(7, 2, 16, device="meta")})


def test_layout_on_another_device_raises() -> None:
    message = re.escape("the layout is on meta, q on cpu; use layout.to('cpu')")
    with pytest.raises(ValueError, match=message):
        call(layout=LAYOUT.to("meta"))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_last_dimension_that_is_not_contiguous_raises(name: str) -> None:
    heads = 4 if name == "q" else 2
    strided = torch.zeros(7, 16, heads).transpose(1, 2)
    message = (
        f"the last dimension of {name} must be contiguous, got strides {strided.stride()}; "
        f"call {name}.contiguous()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**{name: strided})


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_that_are_not_finite_raise(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite, got {value}"):
        call(**{name: value})


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0), [0.5]])
def test_other_than_number_raises(name: str, value: Any) -> None:
    message = f"{name} must be a number or None, got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        call(**{name: value})


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4"])
def test_bad_window_size_raises(value: Any) -> None:
    message = f"window_size must be a positive integer or None, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(window_size=value)


@pytest.mark.parametrize("value", [0, 0.0, -30.0])
def test_softcap_that_is_not_positive_raises(value: float) -> None:
    with pytest.raises(ValueError, match=f"softcap must be positive or None, got {float(value)}"):
        call(softcap=value)


@pytest.mark.parametrize("shape", [(2,), (4, 1), (), (7,)])
def test_sinks_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    message = f"sinks must have shape (4,) on cpu, got {shape} on cpu"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(sinks=torch.zeros(shape))


def test_sinks_on_another_device_raise() -> None:
    with pytest.raises(ValueError, match=r"on cpu, got \(4,\) on meta"):
        call(sinks=torch.zeros(4, device="meta"))


def test_sinks_other_than_tensor_raise() -> None:
    with pytest.raises(TypeError, match="sinks must be a tensor or None, got list"):
        call(sinks=[0.0] * 4)


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.longdouble], ids=str)
@pytest.mark.parametrize("integer", [np.int8, np.uint32, np.int64], ids=str)
def test_numbers_of_numpy_are_numbers(number: Any, integer: Any) -> None:
    numpy = call(scale=number(0.5), softcap=integer(3), window_size=integer(2))
    assert torch.equal(numpy, call(scale=0.5, softcap=3, window_size=2))
    assert torch.equal(call(scale=integer(1), softcap=number(3)), call(scale=1, softcap=3))


def test_bools_of_numpy_are_bools() -> None:
    no, yes = np.bool_(False), np.bool_(True)
    out, _ = call(prefix_causal=no, return_lse=yes, deterministic=no)
    assert torch.equal(out, call(prefix_causal=False))
    assert torch.equal(call(prefix_causal=yes, return_lse=no), call())


LARGEST_SCALE = {torch.bfloat16: 2.0**23, torch.float32: 2.0**23, torch.float64: 2.0**52}


@pytest.mark.parametrize("dtype", LARGEST_SCALE, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_scale_that_overflows_raises(sign: int, dtype: torch.dtype) -> None:
    """The largest one that is taken gives no NaN, in gradients neither; more is refused."""
    tensors = {name: call_tensors()[name].to(dtype) for name in "qkv"}
    largest = sign * LARGEST_SCALE[dtype]
    for backend in ("cpu", "reference"):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        results = call(**leaves, scale=largest, backend=backend, return_lse=True)
        grads = torch.autograd.grad(results[0].sum() + results[1].sum(), list(leaves.values()))
        assert all(x.isfinite().all() for x in (*results, *grads))
    for scale in (1.5 * largest, 1e38 * largest):
        message = f"scale must be at most {abs(largest):.3g} in size for {dtype}, got {scale}"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**tensors, scale=scale)


@pytest.mark.parametrize("dtype", LARGEST_SCALE, ids=str)
def test_softcap_that_overflows_raises(dtype: torch.dtype) -> None:
    tensors = {name: call_tensors()[name].to(dtype) for name in "qkv"}
    largest = 1.3e154 if dtype == torch.float64 else 1.8e19
    for softcap in (largest, 1 / largest):
        for scale in (0.25, LARGEST_SCALE[dtype]):
            leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
            results = call(**leaves, softcap=softcap, scale=scale, return_lse=True)
            grads = torch.autograd.grad(results[0].sum() + results[1].sum(), list(leaves.values()))
            assert all(x.isfinite().all() for x in (*results, *grads))
    for softcap in (1.5 * largest, 0.5 / largest, 1e-320):
        message = f"for {dtype}, got {softcap}: scores would overflow to NaN"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**tensors, softcap=softcap)


@pytest.mark.parametrize("value", [0, None, "yes", torch.ones(2)])
def test_bad_return_lse_raises(value: Any) -> None:
    message = f"return_lse must be True or False, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(return_lse=value)


@pytest.mark.parametrize("value", [0, None, torch.ones(2)])
def test_bad_prefix_causal_raises(value: Any) -> None:
    message = f"prefix_causal must be True or False, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(prefix_causal=value)


@pytest.mark.parametrize("value", ["yes", 0, 2, 0.5])
def test_bad_deterministic_raises(value: Any) -> None:
    message = f"deterministic must be True, False or None, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(deterministic=value)


def test_dropout_raises() -> None:
    with pytest.raises(TypeError, match="dropout_p"):
        call(dropout_p=0.1)


@pytest.mark.parametrize("backend", ["", "cuda", "Triton", None, "flash"])
def test_unknown_backend_raises(backend: Any) -> None:
    message = f"backend must be one of ['auto', 'triton', 'cpu', 'reference'], got {backend!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(backend=backend)


@needs_no_interpreter
@pytest.mark.skipif(os.name != "posix", reason="Triton is installed on Linux")
def test_triton_on_cpu_raises_with_every_reason() -> None:
    with pytest.raises(NotImplementedError) as error:
        call(backend="triton")
    message = str(error.value)
    assert "backend 'triton' can't serve this call (cpu, torch.float32)" in message
    assert "needs CUDA tensors, or TRITON_INTERPRET=1 on any device; got cpu tensors" in message
    assert all(f"{name}: " in message for name in NAMES)
    assert "cpu: serves it; reference: serves it" in message


def test_device_without_backend_raises() -> None:
    """Meta tensors all round: no silent choice of the dense reference."""
    tensors = {name: torch.zeros(7, 2, 16, device="meta") for name in "qkv"}
    with pytest.raises(NotImplementedError) as error:
        call(**tensors, layout=LAYOUT.to("meta"))
    assert "backend 'auto' can't serve this call (meta, torch.float32)" in str(error.value)
    assert "cpu: needs CPU tensors, got meta tensors" in str(error.value)


@needs_no_interpreter
def test_float64_on_triton_raises() -> None:
    pytest.importorskip("triton")
    for backend in ("auto", "triton"):
        with pytest.raises(NotImplementedError, match="float64 runs in Triton's interpreter only"):
            choose_backend(backend, "cuda", torch.float64)


def test_auto_chooses_by_device_and_options() -> None:
    """CUDA is asked about by name: nothing here touches a driver."""
    assert choose_backend("auto", "cpu", torch.float32) == "cpu"
    assert choose_backend("auto", "cpu", torch.float64) == "cpu"
    for option in ("sinks", "prefix_causal=False", "window_size", "softcap"):
        assert choose_backend("auto", "cpu", torch.float32, (option,)) == "cpu"
    pytest.importorskip("triton")
    assert choose_backend("auto", "cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize("dims", [(257, 16), (16, 257), (512, 512)], ids=str)
def test_large_heads_are_refused_by_triton_alone(dims: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    for backend in ("auto", "triton"):
        with pytest.raises(NotImplementedError) as error:
            choose_backend(backend, "cuda", torch.bfloat16, (), dims)
        assert f"triton: head dimensions are at most 256 here, got {max(dims)}" in str(error.value)
        assert all(f"{name}: " in str(error.value) for name in NAMES)
    assert choose_backend("auto", "cpu", torch.bfloat16, (), dims) == "cpu"
    assert choose_backend("reference", "cuda", torch.bfloat16, (), dims) == "reference"
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert choose_backend("auto", "cuda", torch.bfloat16, (), (256, 1)) == "triton"


def test_call_with_large_heads_asks_for_its_dimensions() -> None:
    pytest.importorskip("triton")
    q, k, v = torch.zeros(7, 4, 300), torch.zeros(7, 2, 300), torch.zeros(7, 2, 400)
    with pytest.raises(NotImplementedError, match=r"triton: .*at most 256 here, got 400"):
        call(q=q, k=k, v=v, backend="triton")
    assert call(q=q, k=k, v=v).shape == (7, 4, 400)


def test_largest_head_is_that_of_the_device() -> None:
    assert choose_backend("auto", "cpu", torch.float32, (), [max_head_dim("cpu")]) == "cpu"
    assert (max_head_dim("cuda"), max_head_dim("cpu")) == (256, 512)


def test_auto_on_cpu_runs_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(1) or forward(*args))
    call()
    call(sinks=torch.zeros(4))
    call(prefix_causal=False)
    call(window_size=2)
    call(softcap=2.0)
    assert len(calls) == 5
    call(backend="reference")
    assert len(calls) == 5


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_error_inside_a_backend_propagates(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that was chosen and fails does not hand over to another one."""

    def fail(*args: Any) -> None:
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(cpu, "forward", fail)
    with pytest.raises(RuntimeError, match="broken kernel"):
        call(backend=backend)


def test_backend_that_cannot_serve_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not", lambda *_: "is switched off")
    for backend in ("cpu", "auto"):
        with pytest.raises(NotImplementedError, match="cpu: is switched off; reference: serves it"):
            call(backend=backend)


def test_listing_names_every_backend() -> None:
    assert list(backends.NAMES) == NAMES
    for name in NAMES:
        assert callable(backends.load(name).why_not)


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_deterministic_does_not_change_bits(deterministic: bool | None) -> None:
    assert torch.equal(call(deterministic=deterministic), call())


def brute_force(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """One query, one head at a time over the rows of its sequence: no mask, no packing.

    Everything else is compared with `layout.materialize`, which comes from the forest. So this
    reads the lengths and parents of segments alone, and finds rows by itself.
    """
    lengths, parents, bits = layout.segments.tolist()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    own_rows = [list(range(a, a + n)) for a, n in zip(starts, lengths, strict=True)]
    ahead_of = {}  # of a row of a segment that sees all of itself: the rows from it to the end
    for segment, rows in enumerate(own_rows):
        if bits[segment] & 2 or (segment in parents and not prefix_causal):
            ahead_of |= {row: rows[-1] + 1 - row for row in rows}
    sequences: list[list[int]] = []
    for segment in range(len(lengths)):
        if segment not in parents:
            sequences.append([])
            while segment >= 0:
                sequences[-1][:0] = own_rows[segment]
                segment = parents[segment]
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out: list[list[Tensor]] = [[] for _ in range(tokens)]
    lse: list[list[Tensor]] = [[] for _ in range(tokens)]
    for rows in sequences:
        for position, row in enumerate(rows):
            if out[row]:
                continue  # shared, and equal in every sequence
            first = 0 if window_size is None else max(0, position - window_size + 1)
            keys = rows[first : position + ahead_of.get(row, 1)]
            for h in range(heads):
                logits = (k[keys, h // group] * q[row, h]).sum(-1) * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1]])
                weights = torch.softmax(logits, 0)[: len(keys)]
                out[row].append((weights[:, None] * v[keys, h // group]).sum(0))
                lse[row].append(torch.logsumexp(logits, 0))
    return torch.stack([torch.stack(o) for o in out]), torch.stack(
        [torch.stack(x) for x in lse]
    ).t()


OPTIONS = {
    "none": {},
    "scale": {"scale": 0.7},
    "window of one": {"window_size": 1},
    # Longer than the second suffix up to its row: the window reaches back over the fork.
    "window across the fork": {"window_size": 4},
    "window past the start": {"window_size": 99},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "bidirectional prefix": {"prefix_causal": False},
    "bidirectional prefix, window": {"prefix_causal": False, "window_size": 2},
    "all": {"scale": -0.4, "window_size": 3, "softcap": 1.5, "sinks": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        PrefixLayout.from_lengths([5, 2], [[3, 6], [1, 0]]),
        PrefixLayout.from_tree([3, 2, 1, 4, 2], [-1, 0, 1, 1, 0]),
        PrefixLayout.from_tree(
            [3, 4, 1, 4, 2], [-1, 0, 1, 1, 0], bidirectional=[False, True, False, True, False]
        ),
    ],
    ids=["groups", "tree", "pictures"],
)
def test_reference_options_match_brute_force(
    layout: PrefixLayout, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    named = {name: x for name, x in options.items() if name != "sinks"}
    inputs = Inputs.random(layout, dims=(16, 24), dtype=dtype, lse=True, sinks="sinks" in options)

    def one_by_one(*tensors: Tensor, return_lse: bool, **more: Any) -> tuple[Tensor, Tensor]:
        return brute_force(*tensors, layout, **named, **more)

    exact = attention_results(one_by_one, inputs.map(Tensor.double))
    pytorch = attention_results(one_by_one, inputs)
    reference = partial(prefix_attention, layout=layout, backend="reference", **named)
    actual = attention_results(reference, inputs)
    assert_all(compare_attention(layout, inputs, actual, exact=exact, pytorch=pytorch, **named))


@pytest.mark.parametrize("dims", [(1, 1), (2, 8), (8, 2), (512, 3)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_small_and_large_heads_match_brute_force(backend: str, dims: tuple[int, int]) -> None:
    """Heads of one dimension may have any stride there."""
    layout = PrefixLayout.from_tree([3, 2, 1, 4, 2], [-1, 0, 1, 1, 0])
    generator = torch.Generator().manual_seed(3)

    def draw(heads: int, size: int) -> Tensor:
        x = torch.randn(layout.num_tokens, size, heads, generator=generator, dtype=torch.float64)
        x = x.transpose(1, 2)
        return (x if size == 1 else x.contiguous()).requires_grad_()

    leaves = [draw(4, dims[0]), draw(2, dims[0]), draw(2, dims[1])]
    dout, dlse = torch.randn(12, 4, dims[1]).double(), torch.randn(4, 12).double()
    actual = prefix_attention(*leaves, layout, return_lse=True, backend=backend)
    exact = brute_force(*leaves, layout)
    for results in zip(
        (*actual, *torch.autograd.grad(actual, leaves, (dout, dlse))),
        (*exact, *torch.autograd.grad(exact, leaves, (dout, dlse))),
        strict=True,
    ):
        torch.testing.assert_close(*results)


def test_window_counts_positions_not_rows() -> None:
    """The second suffix starts 6 rows below the fork but one position after it."""
    layout = PrefixLayout.from_lengths([3], [[6, 2]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(11, 1, 16, generator=generator) for _ in range(3))
    v.zero_()
    v[2] = 1.0
    out = prefix_attention(q, k, v, layout, window_size=2)
    seen = (out[:, 0, 0] != 0).nonzero().flatten().tolist()
    assert seen == [2, 3, 9]


def test_sinks_of_minus_infinity_change_nothing() -> None:
    sinks = torch.full((4,), -float("inf"))
    for backend in ("cpu", "reference"):
        without = call(backend=backend)
        torch.testing.assert_close(call(sinks=sinks, backend=backend), without, rtol=0, atol=0)
