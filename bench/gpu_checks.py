"""Checks the kernels on a GPU against float64, with PyTorch's own error as the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import providers
from bench.cases import DTYPES, Case
from bench.measure import TENSORS, packed_tensors
from bench.providers import Inputs, Provider
from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import assert_within_budget, repeated_attention


class UnsupportedError(Exception):
    """Somebody does not take a case; the reason is their own."""


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
        gluon: with the optional Hopper forward.
        lse: the log-sum-exp is a result, too, and has a gradient.
        strided: q, k and v are views of one tensor, and dout one of (Hq, T, DV).
        stream: on another CUDA stream than PyTorch's default, where the inputs come late.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    layout: str
    heads: int = 8
    kv_heads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    gluon: bool = False
    lse: bool = False
    strided: bool = False
    stream: bool = False

    @property
    def label(self) -> str:
        """A short name, unique among checks."""
        dims = f"D{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"/{self.head_dim_v}"
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        flags = ("gluon", "lse", "strided", "stream")
        options += "".join(f" {name}" for name in flags if getattr(self, name))
        return f"{self.dtype} {dims} {self.heads}/{self.kv_heads} {self.layout}{options}"

    @property
    def kind(self) -> tuple[object, ...]:
        """Checks of one kind launch the same machine code."""
        dims = (self.dtype, self.head_dim, self.head_dim_v, self.heads // self.kv_heads)
        options = dict(self.options)
        # A negative scale is a constant, any other is not.
        scale = options.pop("scale", 1.0) < 0
        return (*dims, scale, str(sorted(options)), self.gluon, self.lse)


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
        replace(plain, lse=True),
        replace(plain, strided=True),
        replace(plain, stream=True),
        replace(plain, gluon=True),
    ]


def checks() -> tuple[list[Check], list[Check]]:
    """The checks that come before any timing, and the others."""
    window = 150
    first = [
        Check("bfloat16", 128, 128, "groups"),
        Check("bfloat16", 128, 128, "tree"),
        Check("bfloat16", 128, 128, "split"),
        Check("float16", 64, 64, "groups"),
        Check("bfloat16", 128, 128, "tree", options={"deterministic": False}),
        Check("bfloat16", 128, 128, "groups", gluon=True),
    ]
    options: list[dict[str, Any]] = [
        {"window_size": window},
        {"softcap": 20.0},
        {"sinks": True},
        {"prefix_causal": False},
        {"queries_for": [1, 3, 4]},
        {"scale": -0.3},
        {"window_size": window, "softcap": 20.0, "sinks": True},
    ]
    rest = [
        Check("bfloat16", 64, 64, "tree"),
        Check("bfloat16", 64, 64, "split", options={"deterministic": False}),
        Check("bfloat16", 128, 128, "tree", lse=True),
        Check("bfloat16", 128, 128, "tree", lse=True, options={"sinks": True}),
        Check("bfloat16", 128, 128, "groups", strided=True),
        Check("bfloat16", 128, 128, "groups", stream=True),
        *(
            Check("bfloat16", d, d, layout, gluon=True)
            for d in (128, 64)
            for layout in ("tree", "split", "groups")
            if (d, layout) != (128, "groups")
        ),
        Check("float16", 128, 128, "tree", gluon=True, lse=True, options={"scale": -0.3}),
        Check("bfloat16", 64, 128, "tree", gluon=True, options={"queries_for": [1, 3, 4]}),
        Check("bfloat16", 128, 128, "groups", gluon=True, strided=True),
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
    out = torch.einsum("hmn,nhd->mhd", weights, v)
    return (out, scores.float().logsumexp(-1)) if return_lse else out


@contextmanager
def _late_stream(device: torch.device) -> Iterator[None]:
    """Another stream, with work that inputs made on it come behind; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    stream, default = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        busy = torch.zeros(4096, 4096, device=device)
        for _ in range(32):
            busy = busy @ busy
        yield
    default.wait_stream(stream)


def run(check: Check, shapes: Shapes, device: torch.device) -> list[dict[str, Any]]:
    """Compares ours with float64; one row per tensor.

    Raises:
        AssertionError: where ours is wrong.
        UnsupportedError: where the Gluon forward can't serve the check.
    """
    layout = shapes.layout(check.layout, device)
    dtype = DTYPES[check.dtype]
    options = dict(check.options)
    if check.gluon:
        scale = options.get("scale", 1.0)
        reason = providers.no_gluon(dtype, check.head_dim, check.head_dim_v, scale, device)
        if reason:
            raise UnsupportedError(reason)
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype)

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
    douts = [normal(layout.num_queries, check.heads, check.head_dim_v)]
    names = ["out", "dq", "dk", "dv", "dsinks"][: len(inputs) + 1]
    if check.strided:
        douts[0] = douts[0].transpose(0, 1).contiguous().transpose(0, 1)
    if check.lse:
        options["return_lse"] = True
        douts.append(normal(check.heads, layout.num_queries, dtype=torch.float32))
        names.insert(1, "lse")

    def leaf(x: Tensor, precision: torch.dtype | None) -> Tensor:
        return x.detach().clone().to(precision or x.dtype).requires_grad_()

    def results(
        attend: Callable[..., Any], precision: torch.dtype | None = None, fused: bool = False
    ) -> list[Tensor]:
        leaves = [leaf(x, precision) for x in inputs]
        arguments = leaves[:3]
        if fused:
            heads = [x.shape[1] for x in arguments]
            leaves[:3] = [leaf(torch.cat(arguments, 1), precision)]
            arguments = list(leaves[0].split(heads, 1))
        named = {**options, **({"sinks": leaves[-1]} if len(inputs) > 3 else {})}
        found = attend(*arguments, layout, **named)
        outs = list(found) if check.lse else [found]
        given = [x.to(out.dtype) for x, out in zip(douts, outs, strict=True)]
        grads = list(torch.autograd.grad(outs, leaves, given))
        if fused:
            grads[:1] = grads[0].split(heads, 1)
        return [*(out.detach() for out in outs), *grads]

    def ours() -> list[Tensor]:
        attend = partial(prefix_attention, backend="triton", deterministic=not any_order)
        kernel = providers.gluon() if check.gluon else nullcontext()
        stream = _late_stream(device) if check.stream else nullcontext()
        with kernel, stream:
            return results(attend, fused=check.strided)

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = check.dtype == "tf32"
    try:
        found, again = ours(), ours()
        every = layout.num_queries == layout.num_tokens
        plain = every and len(inputs) == 3 and not set(options) - {"scale"}
        pytorch = results(repeated_attention if plain else eager_attention)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = results(partial(prefix_attention, backend="reference"), torch.float64)
    rows = []
    for name, actual, other, truth, theirs in zip(names, found, again, exact, pytorch, strict=True):
        if not any_order and not torch.equal(actual, other):
            raise AssertionError(f"{name} has other bits in a second run")
        assert_within_budget(name, actual, truth, theirs)
        error, budget = ((x.double() - truth).abs().max().item() for x in (actual, theirs))
        rows.append({"check": check.label, "tensor": name, "error": error, "pytorch_error": budget})
    return rows


# The longest packed axis whose (T, T) float64 scores `gate` computes for a few heads.
GATE_TOKENS = 4096


def narrow(case: Case) -> Case:
    """The case with few members and heads, so that a window or a prefix keeps its length."""
    case = replace(
        case,
        group=min(case.group, 2),
        heads_q=case.heads_q // case.heads_kv,
        heads_kv=1,
    )
    while case.tokens > GATE_TOKENS and case.prefix > 1:
        case = replace(case, prefix=case.prefix // 2, suffix=max(1, case.suffix // 2))
    return case


def gate(case: Case, provider: Provider, device: torch.device) -> dict[str, float]:
    """Errors of a provider against the dense reference of what it computes, in float64.

    Raises:
        AssertionError: if they are beyond twice those of dense PyTorch at the same dtype.
    """
    inputs = Inputs.random(case, device, seed=0)
    options = providers.with_sinks(provider.changes, case, device)

    def dense(attend: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
        named = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in options.items()}
        leaves = [x.to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = attend(*leaves, inputs.layout, **named)
        grads = torch.autograd.grad(out, leaves, inputs.dout.to(dtype))
        return dict(zip(TENSORS, (out.detach(), *grads), strict=True))

    exact = dense(partial(prefix_attention, backend="reference"), torch.float64)
    pytorch = dense(eager_attention, inputs.q.dtype)
    backward = provider.forward_only(device) is None
    actual = packed_tensors(provider.prepare(inputs), backward, inputs.q.dtype)
    for name, x in actual.items():
        assert_within_budget(name, x, exact[name], pytorch[name])
    return {n: (x.double() - exact[n]).abs().max().item() for n, x in actual.items()}


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
