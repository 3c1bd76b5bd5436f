"""Times sharing a prefix against repeating it, forward and backward, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import prefix_attn
from prefix_attn.api import choose_backend, prefix_attention
from prefix_attn.cases import Case
from prefix_attn.cli import terminal
from prefix_attn.cli.arguments import DTYPES
from prefix_attn.cli.checks import check_gradients
from prefix_attn.cli.costs import case_of
from prefix_attn.cli.terminal import UsageError, complain, counted, paragraph
from prefix_attn.timing import Clock, Quantiles, busy, interleaved, load_average, rounds

# What a run without arguments takes, by device. Of one shape given, the rest is that of the first.
CPU_SHAPES = [(512, 128, 8), (1024, 64, 16), (2048, 128, 8)]
CUDA_SHAPES = [(2048, 512, 16), (8192, 512, 16)]
CPU_DEFAULTS = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "fp32"}
CUDA_DEFAULTS = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bf16"}
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# The check of gradients computes dense float64 scores of at most this many tokens.
CHECK_TOKENS = 1024
# It says so if the fewest rounds take so much longer than there is time.
PATIENCE_SECONDS = 10.0
MEMORY_FILE = Path("/proc/meminfo")
# How PyTorch words it that the CPU's memory is not enough: no class of its own.
NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Checks and times every case; exit code 1 if a gradient is wrong."""
    device, cases = _plan(args)
    load = load_average()
    deadline = time.monotonic() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases):
        seconds = (deadline - time.monotonic()) / (len(cases) - i)
        _note(f"{case.label}: checking gradients")
        try:
            if device.type == "cpu":
                _check_memory(case)
            rows.append(_measured(case, device, max(seconds, 0.0)))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            if _is_of_memory(error):
                raise UsageError(_too_large(case, device)) from None
            raise
        finally:
            _note("")
    names = ("repeated_ms", "prefix_attn_ms")
    times = [Quantiles(**row[name]) for row in rows for name in names if name in row]
    results = {
        "versions": {"prefix_attn": prefix_attn.__version__, "torch": str(torch.__version__)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backend": rows[0]["backend"],
        "busy": busy(load, times) or None,
        "shapes": rows,
    }
    return results, 0 if all(row["wrong"] is None for row in rows) else 1


def render(results: dict[str, Any]) -> str:
    """A table, what was wrong, and how to read it."""
    first = results["shapes"][0]
    right = [row for row in results["shapes"] if row["wrong"] is None]
    device = results["device"]
    if device == "cpu":
        device = f"CPU, threads: {results['threads']}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        paragraph(
            f"{device}, {first['dtype']}, {first['heads']} query heads, {first['kv_heads']} KV "
            f"heads, head dimension {first['head_dim']}, backend {results['backend']}, {versions}"
        )
    ]
    if right:
        rows = [
            [
                f"P{row['prefix']} S{row['suffix']} G{row['group']}",
                _spread(row["repeated_ms"]),
                _spread(row["prefix_attn_ms"]),
                f"{row['speed_up']:.2f}x",
                f"{row['ideal']:.2f}x",
                f"{100 * row['share_of_ideal']:.0f} %",
            ]
            for row in right
        ]
        note = (
            "Prefix P, suffix S, G members. Times are of forward + backward: the median (p20-p80) "
            f"of {', '.join(str(row['rounds']) for row in right)} interleaved rounds. Repeated: "
            f"{', '.join(dict.fromkeys(row['baseline'] for row in right))}. The ideal is the ratio "
            "of attention FLOPs."
        )
        if any(row["share_of_ideal"] > 1 for row in right):
            note += (
                " Above 100 % means that the repeated baseline reaches fewer FLOP/s than we do; "
                "no work is skipped."
            )
        if results["busy"]:
            note += f" {results['busy']}"
        header = ["shape", "repeated ms", "prefix_attn ms", "speed-up", "ideal", "of ideal"]
        parts += [terminal.table(header, rows), paragraph(note)]
    parts += [
        f"WRONG, not timed: {row['label']}: {row['wrong']}"
        for row in results["shapes"]
        if row["wrong"] is not None
    ]
    return "\n\n".join(parts)


def _spread(times: dict[str, float]) -> str:
    median, p20, p80 = (
        f"{times[name]:.0f}" if times[name] >= 100 else f"{times[name]:.3g}"
        for name in ("median", "p20", "p80")
    )
    return f"{median} ({p20}-{p80})"


def _note(text: str) -> None:
    """What is being done, on a terminal only."""
    if terminal.on_terminal():
        columns = terminal.width() - 1
        line = f"\r{terminal.cut(text, columns):<{columns}}"
        print(line if text else f"{line}\r", end="", file=sys.stderr, flush=True)


def _bytes(case: Case) -> int:
    """Bytes of Q, K, V, O and their gradients, repeated and shared at once."""
    return 2 * (case.repeated_tokens + case.tokens) * case.qkvo_bytes


def _too_large(case: Case, device: torch.device) -> str:
    where = "on the GPU" if device.type == "cuda" else "in memory"
    return (
        f"{case.label} in {case.dtype} does not fit {where} with the prefix repeated: "
        f"{terminal.size(_bytes(case))} at least; give a smaller --prefix, --suffix or --group"
    )


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in NO_MEMORY
    )


def _check_memory(case: Case) -> None:
    """Refuses what the machine has no memory for, where it tells: on Linux."""
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", MEMORY_FILE.read_text())
    except OSError:
        return
    if found and _bytes(case) > (free := 1024 * int(found.group(1))):
        raise UsageError(
            f"{_too_large(case, torch.device('cpu'))} ({terminal.size(free)} are free)"
        )


def _plan(args: argparse.Namespace) -> tuple[torch.device, list[Case]]:
    """The device and the cases that the arguments ask for."""
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise UsageError("--device cuda: there is no CUDA device")
    device = torch.device(args.device or ("cuda" if has_gpu else "cpu"))
    on_gpu = device.type == "cuda"
    shapes = CUDA_SHAPES if on_gpu else CPU_SHAPES
    defaults = CUDA_DEFAULTS if on_gpu else CPU_DEFAULTS
    given = {name: value for name, value in vars(args).items() if value is not None}
    if {"prefix", "suffix", "group"} & set(given):
        shapes = shapes[:1]
    cases = []
    for shape in shapes:
        filled = dict(zip(("prefix", "suffix", "group"), shape, strict=True)) | defaults | given
        cases.append(case_of(argparse.Namespace(**filled)))
    try:
        choose_backend("auto", device.type, cases[0].torch_dtype, head_dims=[cases[0].head_dim])
    except NotImplementedError as error:
        raise UsageError(str(error)) from None
    return device, cases


def _measured(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Checks the gradients of a case, then times it for about so many seconds."""
    small = case.shrunk(CHECK_TOKENS)
    heads = case.heads_q, case.heads_kv
    checks = check_gradients(
        small.layout(device), heads, head_dim=case.head_dim, dtype=case.torch_dtype
    )
    wrong = [str(check) for check in checks if not check.ok]
    row: dict[str, Any] = {
        "label": case.label,
        "prefix": case.prefix,
        "suffix": case.suffix,
        "group": case.group,
        "heads": case.heads_q,
        "kv_heads": case.heads_kv,
        "head_dim": case.head_dim,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == case.dtype),
        "backend": choose_backend("auto", device.type, case.torch_dtype),
        "checked_at": small.label,
        "checks": [check.summary() for check in checks],
        "wrong": "; ".join(wrong) or None,
    }
    if wrong:
        return row
    _note(f"{case.label}: timing")
    clock = Clock(device)
    _announce(case, small, device, clock, seconds)
    baseline, repeated = _repeated(case, device)
    repeated_seconds, our_seconds = _timed([repeated, _shared(case, device)], clock, seconds)
    theirs, ours = map(Quantiles.from_seconds, (repeated_seconds, our_seconds))
    speed_up = theirs.median / ours.median
    return row | {
        "baseline": baseline,
        "rounds": len(our_seconds),
        "repeated_ms": dataclasses.asdict(theirs),
        "prefix_attn_ms": dataclasses.asdict(ours),
        "speed_up": speed_up,
        "ideal": case.attention_ratio,
        "share_of_ideal": speed_up / case.attention_ratio,
    }


def _announce(case: Case, small: Case, device: torch.device, clock: Clock, seconds: float) -> None:
    """Says beforehand if the fewest rounds take much longer, from the speed of the small case."""
    expected = 0.0
    for each, pairs, all_pairs in (
        (_repeated(small, device)[1], small.repeated_pairs, case.repeated_pairs),
        (_shared(small, device), small.pairs, case.pairs),
    ):
        expected += min(clock.seconds(each) for _ in range(1 + MIN_ROUNDS)) * all_pairs / pairs
    expected *= 1 + MIN_ROUNDS
    if expected > seconds + PATIENCE_SECONDS:
        complain(
            f"{case.label} takes about {_duration(expected)}, to judge by a small shape: a "
            "smaller --prefix, --suffix or --group takes less"
        )


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * unit:
            return counted(round(seconds / unit), name)
    return counted(round(seconds), "second")


def _timed(passes: list[Callable[[], Any]], clock: Clock, seconds: float) -> list[list[float]]:
    """Seconds of each pass, taken in turn, after one round that does not count."""
    for each in passes:
        each()
    times: list[list[float]] = [[] for _ in passes]
    for _, i in interleaved(range(len(passes)), rounds(MIN_ROUNDS, MAX_ROUNDS, seconds)):
        times[i].append(clock.seconds(passes[i]))
    return times


def _normal(case: Case, device: torch.device, *dims: int) -> Tensor:
    return torch.randn(*dims, case.head_dim, device=device, dtype=case.torch_dtype)


def _shared(case: Case, device: torch.device) -> Callable[[], Any]:
    """Forward and backward of `prefix_attention` on packed tensors."""
    layout = case.layout(device)
    q, k, v = (
        _normal(case, device, case.tokens, heads).requires_grad_()
        for heads in (case.heads_q, case.heads_kv, case.heads_kv)
    )
    dout = _normal(case, device, case.tokens, case.heads_q)

    def both() -> Any:
        return torch.autograd.grad(prefix_attention(q, k, v, layout), (q, k, v), dout)

    return both


def _repeated(case: Case, device: torch.device) -> tuple[str, Callable[[], Any]]:
    """Forward and backward of SDPA on whole sequences: the fastest backend there is, and a pass."""
    length = case.prefix + case.suffix
    q, k, v = (
        _normal(case, device, case.group, heads, length).requires_grad_()
        for heads in (case.heads_q, case.heads_kv, case.heads_kv)
    )
    dout = _normal(case, device, case.group, case.heads_q, length)

    def both(backend: SDPBackend | None) -> Any:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=case.heads_q > case.heads_kv
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
