"""The cases that are timed, what options leave of them, and small ones for the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from prefix_attn.cases import Case

# tf32: float32 whose products run on tensor cores, torch.backends.cuda.matmul.allow_tf32.
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
TIMED_DTYPES = ("float16", "bfloat16", "float32")
# What the correctness gate computes float64 scores for: (L, L) of so many sequences of this length
# with all heads, or (T, T) of this packed axis with a few.
GATE_MEMBERS, GATE_SEQUENCE, GATE_TOKENS = 16, 640, 4096


def case_from_text(text: str, dtype: str) -> Case:
    """Reads `P,S,G,Hq,Hkv,D`.

    Raises:
        ValueError: if there are not six integers of at least 1, or no layout has them.
    """
    parts = text.split(",")
    if len(parts) != 6 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"a case must be six integers P,S,G,Hq,Hkv,D, got {text!r}")
    numbers = [int(part) for part in parts]
    if min(numbers) < 1:
        raise ValueError(f"the integers of a case must be at least 1, got {text!r}")
    prefix, suffix, group, heads_q, heads_kv, head_dim = numbers
    return Case(prefix, suffix, group, heads_q, heads_kv, head_dim, dtype)


def pairs(case: Case, window_size: int | None = None, prefix_causal: bool = True) -> int:
    """Allowed (query, key) pairs under these options of `prefix_attention`."""
    length = case.prefix + case.suffix
    window = window_size or length

    def seen(rows: int) -> int:
        """What the first rows of a sequence see: 1 + 2 + ..., at most a window each."""
        rising = min(rows, window)
        return rising * (rising + 1) // 2 + (rows - rising) * window

    ahead = 0 if prefix_causal else case.prefix * (case.prefix - 1) // 2
    prefix = seen(case.prefix)
    return prefix + ahead + case.group * (seen(length) - prefix)


def shrunk(case: Case) -> Case:
    """The same group with prefix and suffix halved until float64 scores are cheap."""
    few = replace(case, group=min(case.group, GATE_MEMBERS))
    return _halved_until(lambda x: x.prefix + x.suffix <= GATE_SEQUENCE, few)


def narrow(case: Case) -> Case:
    """The case with few members and heads, so that a window or a prefix keeps its length."""
    heads_q = case.heads_q // case.heads_kv
    few = replace(case, group=min(case.group, 2), heads_q=heads_q, heads_kv=1)
    return _halved_until(lambda x: x.tokens <= GATE_TOKENS, few)


def _halved_until(is_small: Callable[[Case], bool], case: Case) -> Case:
    while not is_small(case) and case.prefix > 1:
        case = replace(case, prefix=case.prefix // 2, suffix=max(1, case.suffix // 2))
    return case


QUICK_SHAPES = (
    (512, 128, 8, 8, 8, 64),
    (2048, 256, 8, 8, 8, 64),
    (2048, 256, 8, 8, 2, 64),
    (4096, 128, 16, 8, 8, 64),
    (4096, 128, 16, 8, 2, 64),
)
FULL_CPU_SHAPES = (
    *QUICK_SHAPES,
    (512, 512, 8, 8, 2, 64),
    (1024, 128, 4, 8, 2, 64),
    (1024, 256, 16, 8, 2, 128),
    (2048, 512, 4, 8, 2, 64),
    (2048, 128, 32, 8, 2, 64),
    (8192, 128, 8, 8, 2, 64),
)


def cases_of_run(device: torch.device, full: bool, dtype: str | None) -> list[Case]:
    """The cases of a run: float32 on the CPU and bfloat16 on CUDA unless `dtype` says else."""
    dtype = dtype or default_dtype(device)
    if device.type == "cpu":
        shapes = list(FULL_CPU_SHAPES if full else QUICK_SHAPES)
    elif full:
        shapes = [
            (p, s, g, 32, heads_kv, head_dim)
            for head_dim in (64, 128)
            for heads_kv in (8, 32)
            for p in (512, 2048, 8192, 32768)
            for s in (128, 512, 2048)
            for g in (4, 16, 64)
        ]
    else:
        shapes = [(p, 512, 16, 32, 8, 128) for p in (2048, 8192)]
    return [Case(*shape, dtype=dtype) for shape in shapes]


def default_dtype(device: torch.device) -> str:
    """What is trained in on a device of this type."""
    return "bfloat16" if device.type == "cuda" else "float32"
