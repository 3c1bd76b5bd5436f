"""Tokens, attention FLOPs and bytes with a prefix repeated and shared, and what they decide."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_attn.layout import INT32_MAX

# Below this ratio `prefix_attn.enable` leaves a batch as it is, too.
WORTH_RATIO = 1.2


@dataclass(frozen=True)
class Group:
    """One group of equal members: `members` suffixes that continue one prefix.

    Attributes:
        prefix: tokens in the prefix, P.
        suffix: tokens in each suffix, S.
        members: G.
    """

    prefix: int
    suffix: int
    members: int

    def __post_init__(self) -> None:
        """Refuses what a layout refuses.

        Raises:
            ValueError: naming the values.
        """
        if not self.prefix + self.suffix:
            raise ValueError("--prefix and --suffix are both 0: there are no tokens")
        if self.tokens > INT32_MAX:
            raise ValueError(
                f"a layout holds at most {INT32_MAX} tokens, --prefix {self.prefix} and --group "
                f"{self.members} times --suffix {self.suffix} are {self.tokens}"
            )

    @property
    def tokens(self) -> int:
        """P + G S."""
        return self.prefix + self.members * self.suffix

    @property
    def repeated_tokens(self) -> int:
        """G (P + S)."""
        return self.members * (self.prefix + self.suffix)

    @property
    def pairs(self) -> int:
        """Allowed (query, key) pairs with the prefix computed once."""
        return _triangle(self.prefix) + self.members * (
            self.suffix * self.prefix + _triangle(self.suffix)
        )

    @property
    def repeated_pairs(self) -> int:
        """Allowed (query, key) pairs with every sequence run whole."""
        return self.members * _triangle(self.prefix + self.suffix)

    @property
    def token_ratio(self) -> float:
        """Repeated tokens over tokens."""
        return self.repeated_tokens / self.tokens

    @property
    def attention_ratio(self) -> float:
        """Repeated pairs over pairs, `PrefixLayout.flop_ratio`: the ideal speed-up."""
        return self.repeated_pairs / self.pairs


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def attention_flops(pairs: int, heads: int, head_dim: int) -> int:
    """FLOPs of the forward pass, 4 D Hq pairs: Q K^T and P V. The backward pass has 2.5 times."""
    return 4 * head_dim * heads * pairs


def verdict(token_ratio: float, attention_ratio: float, layer_ratio: float | None = None) -> str:
    """Whether sharing is worth it, and why.

    The work of a layer is attention, which shrinks by `attention_ratio`, and the rest, which
    shrinks by `token_ratio`: what both do together lies between the two.

    Args:
        token_ratio: repeated tokens over tokens.
        attention_ratio: the same for attention FLOPs.
        layer_ratio: FLOPs of whole layers, where they are known.
    """
    low, high = sorted((token_ratio, attention_ratio))
    if high == 1:
        return "Not worth it: no token is shared."
    if layer_ratio is not None:
        low = high = layer_ratio
    if f"{low:.2f}" == f"{high:.2f}":
        what = f"a layer's FLOPs fall {high:.2f}x"
    else:
        what = f"a layer's FLOPs fall between {low:.2f}x and {high:.2f}x"
    if high < WORTH_RATIO:
        return f"Not worth it: {what}, less than {WORTH_RATIO}x."
    if low >= WORTH_RATIO:
        return f"Worth it: {what}."
    return f"It depends on how much of the time is attention: {what}."
