"""Checks the kernels on a GPU against float64, with PyTorch's own error as the budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench import providers
from bench.cases import DTYPES
from bench.measure import UnsupportedError, WrongResultError
from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import Inputs, Results, attention_results, compare_attention

# Lengths of the layouts: of prefixes and suffixes, or of segments with their parents.
Shapes = Mapping[str, tuple[list[int], list[Any]]]
LARGE: Shapes = {
    # Ragged members and groups, an empty prefix, empty suffixes, a prefix of one, no members.
    "groups": (
        [517, 0, 260, 1, 130],
        [[97, 128, 301], [65, 77], [33, 0, 64, 190], [140, 2], []],
    ),
    # Three levels, segments shorter and longer than a tile, two roots.
    "tree": ([300, 65, 9, 1, 133, 241, 70], [-1, 0, 1, 1, 0, 4, -1]),
    # A prefix so long that its key tiles are split over several programs.
    "split": ([1700], [[130, 245, 60, 320]]),
}
# Those of a dry run.
TINY: Shapes = {
    "groups": ([9, 0], [[5, 0], [3]]),
    "tree": ([5, 2, 3, 1], [-1, 0, 1, -1]),
    "split": ([20], [[6, 4]]),
}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        dtype: a key of `DTYPES`.
        head_dim: D.
        head_dim_v: DV.
        layout: a key of `LARGE`; "tree" is one of segments.
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


def _layout(check: Check, shapes: Shapes, device: torch.device) -> PrefixLayout:
    is_tree = check.layout == "tree"
    build = PrefixLayout.from_tree if is_tree else PrefixLayout.from_lengths
    return build(*shapes[check.layout], device=device)


def run(check: Check, shapes: Shapes, device: torch.device) -> list[dict[str, Any]]:
    """Compares ours with float64; one row per tensor.

    Raises:
        WrongResultError: where ours is wrong.
        UnsupportedError: where the Gluon forward can't serve the check.
    """
    layout = _layout(check, shapes, device)
    dtype, dims = DTYPES[check.dtype], (check.head_dim, check.head_dim_v)
    options = dict(check.options)
    reason = providers.no_gluon(dtype, *dims, options.get("scale", 1.0), device)
    if check.gluon and reason:
        raise UnsupportedError(reason)
    deterministic = options.pop("deterministic", True)
    if segments := options.pop("queries_for", None):
        layout = layout.queries_for(segments)
    sinks, heads = options.pop("sinks", False), (check.heads, check.kv_heads)
    inputs = Inputs.random(layout, heads, dims, dtype, lse=check.lse, sinks=sinks)
    if check.strided:
        together = torch.cat([inputs.q, inputs.k, inputs.v], 1)
        q, k, v = together.split([x.shape[1] for x in (inputs.q, inputs.k, inputs.v)], 1)
        dout = inputs.dout.transpose(0, 1).contiguous().transpose(0, 1)
        inputs = replace(inputs, q=q, k=k, v=v, dout=dout)

    def ours() -> Results:
        attend = partial(prefix_attention, layout=layout, backend="triton", **options)
        kernel = providers.gluon() if check.gluon else nullcontext()
        stream = _late_stream(device) if check.stream else nullcontext()
        with kernel, stream:
            given = inputs.map(torch.clone) if check.stream else inputs
            return attention_results(partial(attend, deterministic=deterministic), given)

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = check.dtype == "tf32"
    try:
        found, again = ours(), ours()
        compared = compare_attention(layout, inputs, found, **options)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    wrong = [str(x) for x in compared if not x.ok]
    wrong += [
        f"{name} has other bits in a second run"
        for name, x in found.items()
        if deterministic and not torch.equal(x, again[name])
    ]
    if wrong:
        raise WrongResultError("; ".join(wrong))
    return [
        {"check": check.label, "tensor": name, **asdict(x), "share_of_budget": x.share}
        for name, x in zip(found, compared, strict=True)
    ]


def refuses_float64(device: torch.device) -> list[dict[str, Any]]:
    """The Triton backend names float64 as what it can't do, rather than computing it wrong."""
    layout = PrefixLayout.from_lengths([8], [[4]], device=device)
    x = torch.zeros(layout.num_tokens, 1, 16, dtype=torch.float64, device=device)
    try:
        prefix_attention(x, x, x, layout, backend="triton")
    except NotImplementedError as error:
        if "float64" in str(error):
            return [{"check": "float64 is refused", "tensor": "", "error": 0.0}]
        raise WrongResultError(f"float64 is refused without being named: {error}") from error
    if device.type == "cuda":
        raise WrongResultError("float64 was not refused")
    return [{"check": "float64 runs in the interpreter", "tensor": "", "error": 0.0}]


def waits_for_nothing(check: Check, shapes: Shapes, device: torch.device) -> list[dict[str, Any]]:
    """The host waits for nothing that the GPU does, in all layers of a layout but the first.

    Args:
        check: sizes of the layer; its options are left out.
        shapes: lengths of the layouts.
        device: nothing but a GPU can be waited for.

    Raises:
        WrongResultError: where it waits.
    """
    layout = _layout(check, shapes, device)
    heads, dims = (check.heads, check.kv_heads), (check.head_dim, check.head_dim_v)
    inputs = Inputs.random(layout, heads, dims, DTYPES[check.dtype])
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))

    def layer() -> None:
        out = prefix_attention(q, k, v, layout, backend="triton")
        torch.autograd.grad(out, (q, k, v), inputs.dout)

    layer()
    on_gpu = device.type == "cuda"
    before = torch.cuda.get_sync_debug_mode() if on_gpu else 0
    try:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        layer()
    except RuntimeError as error:
        raise WrongResultError(f"a later layer waits for the GPU: {error}") from error
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(before)
    return [{"check": "later layers wait for nothing", "tensor": "", "error": 0.0}]
