"""Work on the host for each layer call, counted rather than timed: no machine is too slow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.compiler.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import host
from bench.machine_code.compile import missing_tools
from prefix_attn import PrefixLayout, ops, prefix_attention
from prefix_attn.backends import schedule, tables
from prefix_attn.backends import triton as triton_backend
from prefix_attn.content import content_of
from prefix_attn.kernels.config import INTERPRETER, Tile
from prefix_attn.kernels.launch import Launch

pytestmark = pytest.mark.skipif(
    bool(missing_tools()) or triton_backend.INTERPRETED,
    reason=missing_tools() or "the interpreter launches otherwise",
)
# Python functions that a call enters, of PyTorch 2.13 and Triton 3.9; a tenth more is allowed.
ENTERED = {"forward, no_grad": 115, "forward": 107, "forward and backward": 219}


@pytest.fixture(scope="module", autouse=True)
def stubbed() -> Iterator[None]:
    """Kernels with small tiles, which compile in seconds, and no launches."""
    with host.no_launches(INTERPRETER):
        yield


@pytest.mark.parametrize(("groups", "members"), [(1, 4), (16, 16)], ids=["few", "many"])
def test_layer_call_enters_no_more_python_than_it_did(groups, members):
    """However many segments there are: what is derived from them was derived before."""
    for name, call in host.layer_calls(groups, members, head_dim=16).items():
        call()
        assert host.python_calls(call) <= 1.1 * ENTERED[name], name


def test_work_lists_are_built_once_for_all_layers(monkeypatch):
    built = []
    for name in ("QueryTiles", "KeyTiles"):
        owner = getattr(schedule, name)
        monkeypatch.setattr(
            owner,
            "from_forest",
            lambda *a, f=owner.from_forest, **k: built.append(1) or f(*a, **k),
        )
    call = host.layer_calls(3, 5, head_dim=16)["forward and backward"]
    call()
    first = len(built)
    assert first > 0
    call()
    assert len(built) == first


def test_first_layer_uploads_once_and_later_ones_never(monkeypatch):
    """What a training step copies to the GPU: one buffer, before its first launch."""
    uploads = []
    upload = tables._Upload
    monkeypatch.setattr(tables, "_Upload", lambda *a: uploads.append(1) or upload(*a))
    call = host.layer_calls(2, 7, head_dim=16)["forward and backward"]
    for _ in range(3):
        call()
    assert uploads == [1]


def test_backward_leaves_second_derivatives_to_those_who_ask():
    """An autograd function around the backward operator costs as much as the launch."""
    entered = []
    apply = ops.PrefixAttentionBackward.apply
    call = host.layer_calls(1, 2, head_dim=16)["forward and backward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ops.PrefixAttentionBackward, "apply", lambda *a: entered.append(1) or apply(*a)
        )
        call()
        assert entered == []
        x = torch.zeros(4, 1, 16, requires_grad=True)
        out = prefix_attention(x, x, x, PrefixLayout.from_lengths([2], [[2]]), backend="cpu")
        torch.autograd.grad(out.sum(), x, create_graph=True)
        assert entered == [1]


def _shown(argument: Any) -> Any:
    """What has to be the same in every launch: all but addresses, and of those the alignment."""
    if isinstance(argument, torch.Tensor):
        aligned = argument.data_ptr() % 16 == 0
        return (argument.dtype, argument.shape, argument.stride(), aligned)
    if isinstance(argument, TensorDescriptor):
        return {name: _shown(value) for name, value in vars(argument).items()}
    if isinstance(argument, (tuple, list)):
        return [_shown(x) for x in argument]
    return argument


def test_later_launches_give_kernels_what_the_first_gave_them(monkeypatch):
    launches, bound = [], []
    monkeypatch.setattr(
        CompiledKernel,
        "run",
        property(lambda kernel: lambda *arguments: launches.append((kernel, arguments))),
    )
    run = triton.JITFunction.run
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda *a, **named: bound.append(1) or run(*a, **named)
    )
    call = host.layer_calls(2, 3, head_dim=16)["forward and backward"]
    content_of(PrefixLayout.from_lengths([8] * 2, [[4] * 3] * 2).segments).kept.clear()
    call()
    first, launches[:] = [*launches], []
    assert len(first) == len(bound) >= 3
    call()
    assert len(bound) == len(first), "Triton read the arguments again"
    for (kernel, arguments), (later, others) in zip(first, launches, strict=True):
        assert later is kernel
        assert _shown(others) == _shown(arguments)


def test_layout_that_keeps_launches_holds_no_tensor_of_a_call():
    layout = PrefixLayout.from_lengths([8], [[4, 4]])
    q, k, v = (
        torch.zeros(layout.num_tokens, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    out, lse = prefix_attention(q, k, v, layout, backend="triton", return_lse=True)
    given = (torch.ones_like(out), torch.ones_like(lse))
    grads = torch.autograd.grad((out, lse), (q, k, v), given)
    storages = {x.data_ptr() for x in (q, k, v, out, lse, *given, *grads)}
    del q, k, v, out, lse, given, grads
    gc.collect()
    held = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu"]
    assert content_of(layout.segments).kept
    assert not [x.shape for x in held if x.data_ptr() in storages]


def test_launch_with_an_address_that_is_no_multiple_of_16_is_bound_by_triton(monkeypatch):
    layout = PrefixLayout.from_lengths([8], [[4, 4]])
    values = torch.zeros(layout.num_tokens * 16 + 1, dtype=torch.bfloat16)
    q, k = torch.zeros(2, layout.num_tokens, 1, 16, dtype=torch.bfloat16).unbind()
    aligned, shifted = (values[i : i + q.numel()].view(q.shape) for i in (0, 1))
    prefix_attention(q, k, aligned, layout, backend="triton")
    bound = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **named: bound.append(named))
    prefix_attention(q, k, aligned, layout, backend="triton")
    assert not bound
    prefix_attention(q, k, shifted, layout, backend="triton")
    (named,) = bound
    assert named["v_rows"].ptr.data_ptr() == shifted.data_ptr()
    # TMA addresses multiples of 16 only.
    assert named["v_desc"].base.data_ptr() % 16 == 0


@pytest.mark.parametrize(("backend", "bound"), [("cuda", 1), ("hip", 3)])
def test_launch_on_amd_is_bound_by_triton(backend, bound):
    """Its compiler asks how large the storage of a tensor is, too."""
    compiled = CompiledKernel.__new__(CompiledKernel)
    compiled.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
    compiled.module, seen = None, []

    class Kernel:
        arg_names = ("x_ptr", "n")

        def __getitem__(self, grid: Any) -> Any:
            return lambda **named: seen.append(named) or compiled

    with pytest.MonkeyPatch.context() as patch:
        straight = []
        patch.setattr(CompiledKernel, "__getitem__", lambda *_: lambda *x: straight.append(x))
        launch = Launch(Kernel(), (1, 1, 1), {"n": 5}, num_warps=4)
        for x in (1, 2, 3):
            launch(aligned=True, x_ptr=x)
    assert seen == [{"n": 5, "x_ptr": x, "num_warps": 4} for x in (1, 2, 3)][:bound]
    assert straight == [(x, 5) for x in (1, 2, 3)][bound:]


LAYOUT = PrefixLayout.from_lengths([5], [[3, 4]])
OTHER_CALLS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "query heads": {"heads": (4, 2, 2)},
    "KV heads": {"heads": (2, 1, 1)},
    "strides of q": {"apart": (1, 0, 0)},
    "strides of v": {"apart": (0, 0, 1)},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 20.0},
    "window": {"window_size": 3},
    "sinks": {"sinks": torch.zeros(2)},
    "prefix_causal": {"prefix_causal": False},
    "any order": {"deterministic": False},
}


def _call(
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, ...] = (2, 2, 2),
    apart: tuple[int, ...] = (0, 0, 0),
    **options: Any,
) -> None:
    """Both passes, on heads of wider rows; heads that are apart have other numbers between them."""
    leaves = [
        torch.zeros(LAYOUT.num_tokens, 4, 16 + 16 * gap, dtype=dtype)[:, :n, :16].requires_grad_()
        for n, gap in zip(heads, apart, strict=True)
    ]
    prefix_attention(*leaves, LAYOUT, backend="triton", **options).sum().backward()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which launches were made, in the order of time; they compute nothing."""
    made: list[str] = []

    class Forward:
        def __init__(self, q: torch.Tensor, *_: Any) -> None:
            made.append("forward")

        def __call__(self, q: torch.Tensor, k: Any, v: Any, sinks: Any) -> Any:
            return torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_zeros(
                q.shape[1], q.shape[0], dtype=torch.float32
            )

    class Backward:
        def __init__(self, *_: Any, **named: Any) -> None:
            made.append("backward")

        def __call__(self, *tensors: Any) -> Any:
            return tuple(
                None if x is None else torch.zeros_like(x) for x in (*tensors[1:4], tensors[7])
            )

    monkeypatch.setattr(triton_backend, "ForwardLaunch", Forward)
    monkeypatch.setattr(triton_backend, "BackwardLaunch", Backward)
    content_of(LAYOUT.segments).kept.clear()
    return made


@pytest.mark.parametrize("other", OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_launch_is_kept_for_calls_of_its_kind_alone(other, made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        for options in ({}, {}, other, other, {}):
            _call(**options)
    assert made == ["forward", "backward"] * 2


@pytest.mark.parametrize("name", ["lse", "strides of dout", "dtype of sinks"])
def test_launch_of_the_backward_pass_is_kept_for_its_gradients_alone(name, made):
    def call(other: bool) -> None:
        x = torch.zeros(LAYOUT.num_tokens, 1, 16, dtype=torch.bfloat16, requires_grad=True)
        sinks = torch.zeros(1, dtype=torch.float64 if other and "sinks" in name else None)
        out, lse = prefix_attention(x, x, x, LAYOUT, backend="triton", sinks=sinks, return_lse=True)
        dout = torch.ones(*out.shape[:2], 17, dtype=out.dtype)[..., :16]
        dout = dout if other and "dout" in name else dout.contiguous()
        gradients = (dout, torch.ones_like(lse)) if other and name == "lse" else (dout,)
        torch.autograd.grad((out, lse)[: len(gradients)], x, gradients)

    for other in (False, True, False, True):
        call(other)
    assert made.count("backward") == 2


def test_launch_is_kept_for_what_settings_choose_alone(made, monkeypatch):
    _call()
    for forward, launches in ((Tile(32, 16), 2), (Tile(16, 16), 4)):
        config = replace(INTERPRETER, forward=forward)
        monkeypatch.setattr(triton_backend, "config_for", lambda *_, config=config: config)
        _call()
        assert len(made) == launches
    with monkeypatch.context() as patch:
        patch.setenv("PREFIX_ATTN_FORWARD", "cuda")
        with pytest.raises(ValueError, match="must be triton or gluon, got 'cuda'"):
            _call()
    _call(dtype=torch.float32)
    monkeypatch.setattr(triton_backend, "dot_precision", lambda _: "tf32")
    _call(dtype=torch.float32)
    assert len(made) == 8
    for deterministic, launches in ((True, 10), (False, 12)):
        monkeypatch.setattr(
            torch, "are_deterministic_algorithms_enabled", lambda x=deterministic: x
        )
        _call(deterministic=False)
        assert len(made) == launches
