"""Work on the host for each layer call, counted rather than timed: no machine is too slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import host
from bench.machine_code.compile import missing_tools
from prefix_attn import PrefixLayout, ops, prefix_attention
from prefix_attn.backends import schedule, tables
from prefix_attn.backends import triton as triton_backend
from prefix_attn.kernels.config import INTERPRETER

pytestmark = pytest.mark.skipif(
    bool(missing_tools()) or triton_backend.INTERPRETED,
    reason=missing_tools() or "the interpreter launches otherwise",
)
# Python functions that a call enters, of PyTorch 2.13 and Triton 3.9; a tenth more is allowed.
ENTERED = {"forward, no_grad": 216, "forward": 208, "forward and backward": 469}


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
