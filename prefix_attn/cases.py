"""One group of equal members: its tokens, attention FLOPs and bytes, repeated and shared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prefix_attn.layout import INT32_MAX, PrefixLayout


@dataclass(frozen=True)
class Case:
    """`group` suffixes that continue one prefix, with heads and a type.

    Attributes:
        prefix: tokens in the prefix, P.
        suffix: tokens in each suffix, S.
        group: members, G.
        heads_q: query heads, Hq.
        heads_kv: key and value heads, Hkv.
        head_dim: D, of queries, keys and values.
        dtype: PyTorch's name of a type, such as `bfloat16`.

    Example:
        >>> case = Case(1024, 64, 16, 8, 2, 64, "float32")
        >>> case.tokens, case.repeated_tokens, round(case.attention_ratio, 2)
        (2048, 17408, 5.9)
    """

    prefix: int
    suffix: int
    group: int
    heads_q: int
    heads_kv: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuses what no attention runs.

        Raises:
            ValueError: naming the values.
        """
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"query heads must be a multiple of KV heads, got {self.heads_q} and "
                f"{self.heads_kv}"
            )
        if not 0 <= self.tokens <= INT32_MAX:
            raise ValueError(
                f"a layout holds at most {INT32_MAX} tokens, {self.prefix} + {self.group} x "
                f"{self.suffix} are {self.tokens}"
            )

    @property
    def tokens(self) -> int:
        """P + G S."""
        return self.prefix + self.group * self.suffix

    @property
    def repeated_tokens(self) -> int:
        """G (P + S)."""
        return self.group * (self.prefix + self.suffix)

    @property
    def pairs(self) -> int:
        """Allowed (query, key) pairs: the prefix's triangle, for each suffix P S and its own."""
        own = self.prefix * self.suffix + _triangle(self.suffix)
        return _triangle(self.prefix) + self.group * own

    @property
    def repeated_pairs(self) -> int:
        """Allowed pairs with every member run whole."""
        return self.group * _triangle(self.prefix + self.suffix)

    @property
    def token_ratio(self) -> float:
        """Repeated tokens over tokens."""
        return self.repeated_tokens / self.tokens if self.tokens else 1.0

    @property
    def attention_ratio(self) -> float:
        """Repeated pairs over pairs, `PrefixLayout.flop_ratio`: the ideal speed-up."""
        return self.repeated_pairs / self.pairs if self.pairs else 1.0

    def flops(self, pairs: int) -> int:
        """FLOPs of a forward pass, 4 D Hq pairs: Q K^T and P V. The backward has 2.5 times."""
        return 4 * self.head_dim * self.heads_q * pairs

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.heads_kv * self.head_dim * self.torch_dtype.itemsize

    @property
    def qkvo_bytes(self) -> int:
        """Bytes of Q, K, V and O of one token in one layer."""
        return self.kv_bytes * (self.heads_q + self.heads_kv) // self.heads_kv

    @property
    def label(self) -> str:
        """Such as `P2048 S128 G8 8/2 D64`."""
        return (
            f"P{self.prefix} S{self.suffix} G{self.group} {self.heads_q}/{self.heads_kv} "
            f"D{self.head_dim}"
        )

    def layout(self, device: torch.device) -> PrefixLayout:
        """Its layout."""
        return PrefixLayout.from_lengths([self.prefix], [[self.suffix] * self.group], device)

    def shrunk(self, tokens: int) -> Case:
        """The same heads with lengths and members halved until there are at most so many tokens."""
        case = self
        while case.tokens > tokens:
            group = max(2, case.group // 2) if case.suffix <= 2 else case.group
            case = replace(
                case, prefix=case.prefix // 2, suffix=max(1, case.suffix // 2), group=group
            )
        return case


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
