"""Times sharing a prefix against repeating it, forward and backward, on this machine.

Gradients are checked first: what is wrong is not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import prefix_attn
from prefix_attn.api import choose_backend, prefix_attention
from prefix_attn.cli.checks import check_gradients
from prefix_attn.cli.costs import Group
from prefix_attn.cli.estimate import check_heads, group_of
from prefix_attn.cli.terminal import (
    DTYPES,
    UsageError,
    at_least,
    complain,
    counted,
    cut,
    on_terminal,
    paragraph,
    size,
    table,
    width,
)
from prefix_attn.layout import PrefixLayout

EXAMPLE = "bench --prefix 2048 --suffix 128 --group 8"
# The shapes of a run without options, by device: groups, query heads, KV heads, head dimension.
CPU_SHAPES = ((512, 128, 8), (1024, 64, 16), (2048, 128, 8))
CUDA_SHAPES = ((2048, 512, 16), (8192, 512, 16))
CPU_HEADS, CUDA_HEADS = (8, 2, 64), (32, 8, 128)
MINUTES = 0.5
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# It says so if the fewest rounds take so much longer than there is time.
PATIENCE_SECONDS = 10.0
MEMORY_FILE = Path("/proc/meminfo")
# How PyTorch words it that the CPU's memory is not enough: no class of its own.
NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
# The check computes dense float64 scores of this many tokens.
CHECK_TOKENS = 1024
# Larger than any L2 cache: written between CUDA timings.
L2_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """A group, its heads and its type.

    Attributes:
        group: of equal members.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: of queries, keys and values.
        dtype: a key of `DTYPES`.
    """

    group: Group
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    def layout(self, device: torch.device) -> PrefixLayout:
        """Its layout."""
        group = self.group
        return PrefixLayout.from_lengths([group.prefix], [[group.suffix] * group.members], device)

    def shrunk(self) -> Shape:
        """The same heads with lengths and members halved until float64 scores are cheap."""
        group = self.group
        while group.tokens > CHECK_TOKENS:
            group = Group(
                group.prefix // 2,
                max(1, group.suffix // 2),
                max(2, group.members // 2) if group.suffix <= 2 else group.members,
            )
        return dataclasses.replace(self, group=group)

    @property
    def least_bytes(self) -> int:
        """Bytes of Q, K, V, the output and their gradients, repeated and shared at once."""
        tokens = self.group.repeated_tokens + self.group.tokens
        itemsize = DTYPES[self.dtype].itemsize
        return 4 * tokens * (self.heads + self.kv_heads) * self.head_dim * itemsize

    @property
    def label(self) -> str:
        """Such as `P2048 S128 G8 8/2 D64`."""
        group = self.group
        return (
            f"P{group.prefix} S{group.suffix} G{group.members} {self.heads}/{self.kv_heads} "
            f"D{self.head_dim}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "--minutes", type=_minutes, default=MINUTES, help=f"time to take, roughly ({MINUTES})"
    )
    parser.add_argument("--prefix", type=at_least(0), help="tokens in the prefix, P")
    parser.add_argument("--suffix", type=at_least(1), help="tokens in a suffix, S")
    parser.add_argument("--group", type=at_least(1), help="members of the group, G")
    parser.add_argument("--heads", type=at_least(1), help="query heads (8, on a GPU 32)")
    parser.add_argument("--kv-heads", type=at_least(1), help="KV heads (2, on a GPU 8)")
    parser.add_argument("--head-dim", type=at_least(1), help="(64, on a GPU 128)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="(fp32, on a GPU bf16)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(a GPU if there is one)")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Checks and times every shape; exit code 1 if a gradient is wrong."""
    device, shapes = _plan(options)
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    for i, shape in enumerate(shapes):
        seconds = (deadline - time.monotonic()) / (len(shapes) - i)
        _note(f"{shape.label}: checking gradients")
        try:
            if device.type == "cpu":
                _check_memory(shape)
            rows.append(_measured(shape, device, max(seconds, 0.0)))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            if _is_of_memory(error):
                raise UsageError(_too_large(shape, device)) from None
            raise
        finally:
            _note("")
    results = {
        "versions": {"prefix_attn": prefix_attn.__version__, "torch": str(torch.__version__)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backend": rows[0]["backend"],
        "shapes": rows,
    }
    return results, 0 if all(row["wrong"] is None for row in rows) else 1


def render(results: dict[str, Any]) -> str:
    """A table, what was wrong, and how to read it."""
    rows = [
        [
            f"P{row['prefix']} S{row['suffix']} G{row['group']}",
            _spread(row["repeated_ms"]),
            _spread(row["prefix_attn_ms"]),
            f"{row['speed_up']:.2f}x",
            f"{row['ideal']:.2f}x",
            f"{100 * row['share_of_ideal']:.0f} %",
        ]
        for row in results["shapes"]
        if row["wrong"] is None
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    device = results["device"]
    if device == "cpu":
        device = f"CPU, threads: {results['threads']}"
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in results["shapes"]))
    first = results["shapes"][0]
    heads = (
        f"{first['heads']} query heads, {first['kv_heads']} KV heads, head dimension "
        f"{first['head_dim']}"
    )
    parts = [paragraph(f"{device}, {dtypes}, {heads}, backend {results['backend']}, {versions}")]
    if rows:
        header = ["shape", "repeated ms", "prefix_attn ms", "speed-up", "ideal", "of ideal"]
        baselines = ", ".join(dict.fromkeys(row["baseline"] for row in results["shapes"]))
        rounds = ", ".join(str(row["rounds"]) for row in results["shapes"] if not row["wrong"])
        note = (
            "Prefix P, suffix S, G members. Forward + backward, median (p20-p80) of "
            f"{rounds} interleaved rounds; repeated: {baselines}. The ideal is the ratio of "
            "attention FLOPs."
        )
        if any(row["wrong"] is None and row["share_of_ideal"] > 1 for row in results["shapes"]):
            note += (
                " More than 100 % of it says that repeating runs further below its own FLOP rate "
                "than sharing does."
            )
        parts += [
            table(header, rows),
            paragraph(note),
        ]
    parts += [
        f"WRONG, not timed: {row['label']}: {row['wrong']}"
        for row in results["shapes"]
        if row["wrong"] is not None
    ]
    return "\n\n".join(parts)


def _spread(times: dict[str, float]) -> str:
    median, p20, p80 = (
        f"{x:.0f}" if x >= 100 else f"{x:.3g}"
        for x in (times["median"], times["p20"], times["p80"])
    )
    return f"{median} ({p20}-{p80})"


def _note(text: str) -> None:
    """What is being done, on a terminal only."""
    if on_terminal():
        columns = width() - 1
        line = f"\r{cut(text, columns):<{columns}}"
        print(line if text else f"{line}\r", end="", file=sys.stderr, flush=True)


def _too_large(shape: Shape, device: torch.device) -> str:
    where = "on the GPU" if device.type == "cuda" else "in memory"
    return (
        f"{shape.label} in {shape.dtype} does not fit {where} with the prefix repeated: "
        f"{size(shape.least_bytes)} at least; give a smaller --prefix, --suffix or --group"
    )


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in NO_MEMORY
    )


def _check_memory(shape: Shape) -> None:
    """Refuses what the machine has no memory for, where it tells: on Linux."""
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", MEMORY_FILE.read_text())
    except OSError:
        return
    if found and shape.least_bytes > (free := 1024 * int(found.group(1))):
        raise UsageError(f"{_too_large(shape, torch.device('cpu'))} ({size(free)} are free)")


def _plan(options: argparse.Namespace) -> tuple[torch.device, list[Shape]]:
    """The device and the shapes that the options ask for."""
    has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UsageError("--device cuda: there is no CUDA device")
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    on_gpu = device.type == "cuda"
    groups = list(CUDA_SHAPES if on_gpu else CPU_SHAPES)
    names = ("prefix", "suffix", "group")
    if any(getattr(options, name) is not None for name in names):
        groups = groups[:1]
    heads = CUDA_HEADS if on_gpu else CPU_HEADS
    for name, value in zip(("heads", "kv_heads", "head_dim"), heads, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_heads(options)
    dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    shapes = []
    for group in groups:
        given = [getattr(options, name) for name in names]
        chosen = [
            own if own is not None else value for own, value in zip(given, group, strict=True)
        ]
        lengths = argparse.Namespace(**dict(zip(names, chosen, strict=True)))
        shapes.append(
            Shape(group_of(lengths), options.heads, options.kv_heads, options.head_dim, dtype)
        )
    try:
        choose_backend("auto", device.type, DTYPES[dtype], head_dims=[options.head_dim])
    except NotImplementedError as error:
        raise UsageError(str(error)) from None
    return device, shapes


def _measured(shape: Shape, device: torch.device, seconds: float) -> dict[str, Any]:
    """Checks the gradients of a shape, then times it for about so many seconds."""
    group = shape.group
    small = shape.shrunk()
    dtype = DTYPES[shape.dtype]
    checks = check_gradients(
        small.layout(device),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
    )
    row: dict[str, Any] = {
        "label": shape.label,
        "prefix": group.prefix,
        "suffix": group.suffix,
        "group": group.members,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype,
        "backend": choose_backend("auto", device.type, dtype),
        "checked_at": small.label,
        "checks": [check.summary() for check in checks],
        "wrong": None,
    }
    wrong = [str(check) for check in checks if not check.ok]
    if wrong:
        return row | {"wrong": "; ".join(wrong), "baseline": "none"}
    _note(f"{shape.label}: timing")
    if device.type == "cpu":
        _announce(shape, small, seconds)
    baseline, repeated = _repeated(shape, device)
    times = _interleaved([repeated, _shared(shape, device)], device, seconds)
    repeated_ms, ours_ms = map(_quantiles, times)
    speed_up = repeated_ms["median"] / ours_ms["median"]
    return row | {
        "baseline": baseline,
        "rounds": len(times[0]),
        "repeated_ms": repeated_ms,
        "prefix_attn_ms": ours_ms,
        "speed_up": speed_up,
        "ideal": group.attention_ratio,
        "share_of_ideal": speed_up / group.attention_ratio,
    }


def _announce(shape: Shape, small: Shape, seconds: float) -> None:
    """Says beforehand if the fewest rounds take much longer, from the speed of the small shape."""
    device = torch.device("cpu")
    expected = 0.0
    for each, pairs, all_pairs in (
        (_repeated(small, device)[1], small.group.repeated_pairs, shape.group.repeated_pairs),
        (_shared(small, device), small.group.pairs, shape.group.pairs),
    ):
        fastest = min(_cpu_ms(each) for _ in range(1 + MIN_ROUNDS))
        expected += fastest / 1e3 * all_pairs / pairs
    expected *= 1 + MIN_ROUNDS
    if expected > seconds + PATIENCE_SECONDS:
        complain(
            f"{shape.label} takes about {_duration(expected)}, to judge by a small shape: a "
            "smaller --prefix, --suffix or --group takes less"
        )


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * unit:
            return counted(round(seconds / unit), name)
    return counted(round(seconds), "second")


def _interleaved(
    passes: list[Callable[[], Any]], device: torch.device, seconds: float
) -> list[list[float]]:
    """Times of each pass in milliseconds, taken in turn, after one round that does not count."""
    timer = _cuda_ms if device.type == "cuda" else _cpu_ms
    least = MIN_ROUNDS * sum(timer(each) for each in passes) / 1e3
    if least > seconds + PATIENCE_SECONDS:
        complain(
            f"{MIN_ROUNDS} rounds of this shape take about {least:.0f} s, longer than --minutes"
        )
    stop = time.monotonic() + seconds
    times: list[list[float]] = [[] for _ in passes]
    while len(times[0]) < MIN_ROUNDS or (len(times[0]) < MAX_ROUNDS and time.monotonic() < stop):
        for samples, each in zip(times, passes, strict=True):
            samples.append(timer(each))
    return times


def _cpu_ms(each: Callable[[], Any]) -> float:
    start = time.perf_counter()
    each()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(each: Callable[[], Any]) -> float:
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    each()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _quantiles(samples: list[float]) -> dict[str, float]:
    p20, p80 = torch.quantile(
        torch.tensor(samples, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    ).tolist()
    return {"median": statistics.median(samples), "p20": p20, "p80": p80}


def _normal(shape: Shape, device: torch.device, *dims: int) -> Tensor:
    return torch.randn(*dims, shape.head_dim, device=device, dtype=DTYPES[shape.dtype])


def _shared(shape: Shape, device: torch.device) -> Callable[[], Any]:
    """Forward and backward of `prefix_attention` on packed tensors."""
    layout = shape.layout(device)
    tokens = layout.num_tokens
    q, k, v = (
        _normal(shape, device, tokens, heads).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    dout = _normal(shape, device, tokens, shape.heads)

    def both() -> Any:
        return torch.autograd.grad(prefix_attention(q, k, v, layout), (q, k, v), dout)

    return both


def _repeated(shape: Shape, device: torch.device) -> tuple[str, Callable[[], Any]]:
    """Forward and backward of SDPA on whole sequences: the fastest backend there is, and a pass."""
    group = shape.group
    length = group.prefix + group.suffix
    q, k, v = (
        _normal(shape, device, group.members, heads, length).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    dout = _normal(shape, device, group.members, shape.heads, length)

    def both(backend: SDPBackend | None) -> Any:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=shape.heads > shape.kv_heads
            )
        return torch.autograd.grad(out, (q, k, v), dout)

    if device.type == "cuda":
        # On Hopper cuDNN is about twice as fast as the backend that SDPA takes by itself.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend refuses: it is tried on purpose
                both(SDPBackend.CUDNN_ATTENTION)
        except RuntimeError:
            return "SDPA as it chooses (cuDNN refuses)", partial(both, None)
        return "SDPA through cuDNN", partial(both, SDPBackend.CUDNN_ATTENTION)
    return "SDPA", partial(both, None)
