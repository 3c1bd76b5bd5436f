"""The shapes that are timed, with their tokens and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from prefix_attn import PrefixLayout

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


@dataclass(frozen=True)
class Case:
    """One group of equal members: `group` suffixes that continue one prefix.

    Attributes:
        prefix: tokens in the prefix, P.
        suffix: tokens in each suffix, S.
        group: members, G.
        heads_q: query heads, Hq.
        heads_kv: key and value heads, Hkv.
        head_dim: D, of queries, keys and values.
        dtype: one of `TIMED_DTYPES`.
    """

    prefix: int
    suffix: int
    group: int
    heads_q: int
    heads_kv: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuses shapes that no provider can run.

        Raises:
            ValueError: naming the field that is wrong.
        """
        for name in ("prefix", "suffix", "group", "heads_q", "heads_kv", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"heads_q must be a multiple of heads_kv, got {self.heads_q} and {self.heads_kv}"
            )
        if self.dtype not in TIMED_DTYPES:
            names = ", ".join(TIMED_DTYPES)
            raise ValueError(f"dtype must be one of {names}, got {self.dtype!r}")

    @property
    def tokens(self) -> int:
        """Packed tokens, P + G S."""
        return self.prefix + self.group * self.suffix

    @property
    def sequence(self) -> int:
        """Tokens of one member run whole, P + S."""
        return self.prefix + self.suffix

    @property
    def pairs(self) -> int:
        """Allowed (query, key) pairs with the prefix computed once."""
        return self.pairs_under()

    def pairs_under(self, window_size: int | None = None, prefix_causal: bool = True) -> int:
        """Allowed pairs under these options of `prefix_attention`."""
        window = window_size or self.sequence

        def seen(rows: int) -> int:
            """What the first rows of a sequence see: 1 + 2 + ..., at most a window each."""
            rising = min(rows, window)
            return rising * (rising + 1) // 2 + (rows - rising) * window

        ahead = 0 if prefix_causal else self.prefix * (self.prefix - 1) // 2
        prefix = seen(self.prefix)
        return prefix + ahead + self.group * (seen(self.sequence) - prefix)

    def flops(self, pairs: int) -> float:
        """FLOPs of a forward pass over so many pairs: 4 D Hq pairs.

        Two matrix products, Q K^T and P V, each of 2 D FLOPs per query head and allowed pair. The
        backward pass has five. Every provider is charged this useful work, whether it repeats the
        prefix or not.
        """
        return 4.0 * self.head_dim * self.heads_q * pairs

    @property
    def label(self) -> str:
        """Short name, `P2048 S256 G8 8/2 D64`."""
        return (
            f"P{self.prefix} S{self.suffix} G{self.group} "
            f"{self.heads_q}/{self.heads_kv} D{self.head_dim}"
        )

    def layout(self, device: torch.device) -> PrefixLayout:
        """Layout of the group on `device`."""
        return PrefixLayout.from_lengths([self.prefix], [[self.suffix] * self.group], device=device)

    def shrunk(self) -> Case:
        """The same group with prefix and suffix halved until float64 scores are cheap."""
        few = replace(self, group=min(self.group, GATE_MEMBERS))
        return few._halved_until(lambda case: case.sequence <= GATE_SEQUENCE)

    def narrow(self) -> Case:
        """The case with few members and heads, so that a window or a prefix keeps its length."""
        heads_q = self.heads_q // self.heads_kv
        few = replace(self, group=min(self.group, 2), heads_q=heads_q, heads_kv=1)
        return few._halved_until(lambda case: case.tokens <= GATE_TOKENS)

    def _halved_until(self, is_small: Callable[[Case], bool]) -> Case:
        case = self
        while not is_small(case) and case.prefix > 1:
            case = replace(case, prefix=case.prefix // 2, suffix=max(1, case.suffix // 2))
        return case

    @classmethod
    def from_text(cls, text: str, dtype: str) -> Case:
        """Reads `P,S,G,Hq,Hkv,D`.

        Raises:
            ValueError: if there are not six integers, or one is out of range.
        """
        parts = text.split(",")
        if len(parts) != 6 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"a case must be six integers P,S,G,Hq,Hkv,D, got {text!r}")
        prefix, suffix, group, heads_q, heads_kv, head_dim = map(int, parts)
        return cls(prefix, suffix, group, heads_q, heads_kv, head_dim, dtype)


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


def table(device: torch.device, full: bool, dtype: str | None) -> list[Case]:
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
