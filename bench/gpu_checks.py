"""Checks the kernels on a GPU against float64, with PyTorch's own error as the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import assert_within_budget, repeated_attention

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}


@dataclass(frozen=True, eq=False)
class Shapes:
    """Lengths of the layouts; they are small in a dry run.

    Attributes:
        groups: prefix lengths and suffix lengths: ragged members and groups, an empty prefix, empty
            suffixes, a prefix of one, a group without members.
        tree: lengths and parents: three levels, segments shorter and longer than a tile, two roots.
        split: one prefix so long that its key tiles are split over several programs.
    """

    groups: tuple[list[int], list[list[int]]]
    tree: tuple[list[int], list[int]]
    split: tuple[list[int], list[list[int]]]

    def layout(self, name: str, device: torch.device) -> PrefixLayout:
        """One of them by name."""
        if name == "tree":
            return PrefixLayout.from_tree(*self.tree, device=device)
        lengths = {"groups": self.groups, "split": self.split}[name]
        return PrefixLayout.from_lengths(*lengths, device=device)


LARGE = Shapes(
    groups=(
        [517, 0, 260, 1, 130],
        [[97, 128, 301], [65, 77], [33, 0, 64, 190], [140, 2], []],
    ),
    tree=([300, 65, 9, 1, 133, 241, 70], [-1, 0, 1, 1, 0, 4, -1]),
    split=([1700], [[130, 245, 60, 320]]),
)
TINY = Shapes(
    groups=([9, 0], [[5, 0], [3]]),
    tree=([5, 2, 3, 1], [-1, 0, 1, -1]),
    split=([20], [[6, 4]]),
)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        dtype: a key of `DTYPES`.
        head_dim: D.
        head_dim_v: DV.
        layout: a field of `Shapes`.
        heads: query heads.
        kv_heads: key and value heads.
        options: arguments of `prefix_attention`, where sinks True stands for a tensor, and
            queries_for, of the layout.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    layout: str
    heads: int = 4
    kv_heads: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """A short name, unique among checks."""
        dims = f"D{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"/{self.head_dim_v}"
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.dtype} {dims} {self.heads}/{self.kv_heads} {self.layout}{options}"


def tried() -> tuple[list[Check], list[Check]]:
    """What a dry run takes of them: each line of this file once, on few heads."""
    options: dict[str, Any] = {
        "window_size": 4,
        "softcap": 20.0,
        "sinks": True,
        "prefix_causal": False,
    }
    plain = Check("bfloat16", 16, 16, "groups", heads=2, kv_heads=1)
    return [plain, replace(plain, dtype="tf32", layout="split", head_dim_v=32)], [
        replace(plain, dtype="float16", layout="tree", options=options),
        replace(plain, layout="tree", options={"queries_for": [1, 3]}),
        replace(plain, layout="tree", options={"deterministic": False}),
    ]


def checks() -> tuple[list[Check], list[Check]]:
    """The checks that come before any timing, and the others."""
    window = 150
    first = [
        Check("bfloat16", 128, 128, "groups"),
        Check("bfloat16", 128, 128, "tree"),
        Check("bfloat16", 128, 128, "split"),
        Check("float16", 64, 64, "groups"),
    ]
    options: list[dict[str, Any]] = [
        {"window_size": window},
        {"softcap": 20.0},
        {"sinks": True},
        {"prefix_causal": False},
        {"queries_for": [1, 3, 4]},
        {"scale": -0.3},
        {"window_size": window, "softcap": 20.0, "sinks": True},
        {"deterministic": False},
    ]
    rest = [
        Check("bfloat16", 64, 64, "tree"),
        Check("bfloat16", 64, 64, "split", options={"deterministic": False}),
        *(Check("bfloat16", 128, 128, "tree", options=x) for x in options),
        Check("float32", 64, 64, "groups"),
        Check("float32", 128, 128, "tree"),
        Check("tf32", 64, 64, "groups"),
        Check("bfloat16", 80, 80, "groups"),
        Check("bfloat16", 192, 128, "tree"),
        Check("bfloat16", 256, 256, "groups"),
        Check("float16", 128, 128, "split", heads=6, kv_heads=1),
        Check("float16", 17, 33, "groups", heads=2),
        Check("float32", 256, 256, "groups"),
    ]
    return first, rest


def eager_attention(
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
) -> Tensor:
    """Dense attention as models write it in PyTorch, every product in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k) * (scale or q.shape[2] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    keep = layout.materialize(window_size=window_size, prefix_causal=prefix_causal)
    scores = scores.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        column = sinks.to(q.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.float().softmax(-1)[..., : k.shape[0]].to(q.dtype)
    return torch.einsum("hmn,nhd->mhd", weights, v)


def run(check: Check, shapes: Shapes, device: torch.device) -> list[dict[str, Any]]:
    """Raises AssertionError where ours is wrong; returns one row per tensor otherwise."""
    layout = shapes.layout(check.layout, device)
    dtype = DTYPES[check.dtype]
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype)

    options = dict(check.options)
    any_order = options.pop("deterministic", None) is False
    if segments := options.pop("queries_for", None):
        layout = layout.queries_for(segments)
    inputs = [
        normal(layout.num_queries, check.heads, check.head_dim),
        normal(layout.num_tokens, check.kv_heads, check.head_dim),
        normal(layout.num_tokens, check.kv_heads, check.head_dim_v),
    ]
    if options.pop("sinks", False):
        inputs.append(normal(check.heads))
    dout = normal(layout.num_queries, check.heads, check.head_dim_v)
    names = ("out", "dq", "dk", "dv", "dsinks")[: len(inputs) + 1]

    def results(attend: Callable[..., Tensor], precision: torch.dtype | None) -> list[Tensor]:
        def leaf(x: Tensor) -> Tensor:
            return x.detach().clone().to(precision or x.dtype).requires_grad_()

        leaves = [leaf(x) for x in inputs]
        named = {**options, **({"sinks": leaves[3]} if len(leaves) > 3 else {})}
        out = attend(*leaves[:3], layout, **named)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = check.dtype == "tf32"
    try:
        triton = partial(prefix_attention, backend="triton", deterministic=not any_order)
        ours, again = results(triton, None), results(triton, None)
        plain = not set(check.options) - {"scale", "deterministic"}
        pytorch = results(repeated_attention if plain else eager_attention, None)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = results(partial(prefix_attention, backend="reference"), torch.float64)
    rows = []
    for name, actual, other, truth, theirs in zip(names, ours, again, exact, pytorch, strict=True):
        if not any_order and not torch.equal(actual, other):
            raise AssertionError(f"{name} has other bits in a second run")
        assert_within_budget(name, actual, truth, theirs)
        error, budget = ((x.double() - truth).abs().max().item() for x in (actual, theirs))
        rows.append({"check": check.label, "tensor": name, "error": error, "pytorch_error": budget})
    return rows


def refuses_float64(device: torch.device) -> list[dict[str, Any]]:
    """The Triton backend names float64 as what it can't do, rather than computing it wrong."""
    layout = PrefixLayout.from_lengths([8], [[4]], device=device)
    x = torch.zeros(layout.num_tokens, 1, 16, dtype=torch.float64, device=device)
    try:
        prefix_attention(x, x, x, layout, backend="triton")
    except NotImplementedError as error:
        if "float64" in str(error):
            return [{"check": "float64 is refused", "tensor": "", "error": 0.0}]
        raise AssertionError(f"float64 is refused without being named: {error}") from error
    if device.type == "cuda":
        raise AssertionError("float64 was not refused")
    return [{"check": "float64 runs in the interpreter", "tensor": "", "error": 0.0}]
