"""What kernels are given, by name: tensors, work lists, the attention rule, and constants.

A tuple with names is one argument of a kernel and becomes as many parameters of the machine code as
it has fields; a constant object is none. The columns of work lists are those of
`prefix_attn.backends.schedule`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Rows of the rule, each one entry per key. The last three are there under some options only.
SEEN_UNTIL = tl.constexpr(0)  # end of the rows that see a key
SEEN_FROM = tl.constexpr(1)  # the first of them
POSITION = tl.constexpr(2)  # depth along the path
QUERY_ROW = tl.constexpr(3)  # packed row of a query: one entry per query
# Stands for "forbidden" in log2 units: exp2 of it is 0, yet differences of it are no NaN.
FORBIDDEN = tl.constexpr(-1.0e30)


class Rows(NamedTuple):
    """A (T, H, D) tensor: its address, and the strides of rows and heads; that of D is 1."""

    ptr: Any
    stride_t: Any
    stride_h: Any

    @classmethod
    def of(cls, x: torch.Tensor) -> "Rows":
        """Describes x."""
        return cls(x, x.stride(0), x.stride(1))


class QueryTable(NamedTuple):
    """Addresses of a work list of query tiles, `schedule.QueryTiles`."""

    items: Any
    columns: Any
    masked: Any


class QueryItem(NamedTuple):
    """A query tile: rows [row0, row1), queries from query0 on, and the key tiles they visit."""

    row0: Any
    row1: Any
    query0: Any
    list0: Any
    num_listed: Any
    own0: Any
    num_own: Any
    masked0: Any
    num_masked: Any


class KeyTable(NamedTuple):
    """Addresses of a work list of key tiles, `schedule.KeyTiles`."""

    items: Any
    rows: Any


class KeyItem(NamedTuple):
    """A key tile: keys [col0, col1), the query tiles that visit them, and a place for the sum."""

    col0: Any
    col1: Any
    full0: Any
    num_full: Any
    before0: Any
    num_before: Any
    after0: Any
    num_masked: Any  # those before and after the full ones together
    slot: Any


class KeyRule(NamedTuple):
    """Who sees each key of a tile, [BLOCK_N] each: rows [seen_from, seen_until)."""

    seen_until: Any
    seen_from: Any
    position: Any


@dataclass(frozen=True)
class Columns:
    """The columns of a head, and the widths of the tiles that cover them.

    Tiles are powers of two wide. So a head is covered by one tile with padding, or by two of
    different widths, side by side, such as 128 and 64 for 192 columns.
    """

    size: int
    widths: tuple[int, ...]

    @classmethod
    @lru_cache
    def of(cls, size: int, *, in_two: bool) -> "Columns":
        """Covers a head of so many columns, `in_two` where two tiles have less padding than one."""
        whole = padded_dim(size)
        first = whole // 2
        rest = padded_dim(size - first) if size > first else whole
        return cls(size, (first, rest) if in_two and first + rest < whole else (whole,))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first column of each tile."""
        return (0, *self.widths)[: len(self.widths)]

    @property
    def padded(self) -> tuple[bool, ...]:
        """Whether each tile has columns behind the end of the head."""
        ends = (start + width for start, width in zip(self.starts, self.widths, strict=True))
        return tuple(end > self.size for end in ends)


@dataclass(frozen=True)
class Heads:
    """Query heads per KV head; the columns of Q and K, and those of V and O."""

    group: int
    qk: Columns
    vo: Columns

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, in_two: bool) -> "Heads":
        """The heads of a call; `in_two` as in `Columns.of`."""
        qk, vo = (Columns.of(x.shape[2], in_two=in_two) for x in (q, v))
        return cls(q.shape[1] // k.shape[1], qk, vo)


@dataclass(frozen=True)
class Mode:
    """What options and dtype fix in a kernel, so that one without an option has nothing of it.

    Attributes:
        causal: whether rows see only keys that lie before them.
        window: whether positions limit what is seen.
        softcap: whether scores are bent.
        accurate: whether the tanh of a softcap has to be exact near zero.
        acc: type of sums.
        precision: of float32 products.
    """

    causal: bool
    window: bool
    softcap: bool
    accurate: bool
    acc: tl.dtype
    precision: str


@dataclass(frozen=True, eq=False)
class ForwardTables:
    """Device copies of a schedule: int32, shapes as in `prefix_attn.backends.schedule.QueryTiles`.

    `rule` is (1, T) or, with options, (4, T), with the rows that are named above: SEEN_UNTIL,
    SEEN_FROM, POSITION, QUERY_ROW.
    """

    rule: torch.Tensor
    items: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor


@dataclass(frozen=True, eq=False)
class KeyLists:
    """Device copies of `prefix_attn.backends.schedule.KeyTiles`: int32, shapes as there."""

    items: torch.Tensor
    rows: torch.Tensor
    splits: torch.Tensor
    num_slots: int


@dataclass(frozen=True, eq=False)
class BackwardTables:
    """Device copies of a schedule: int32, shapes as in `prefix_attn.backends.schedule`.

    `order` is the list of `backward_order`; `values` are the key tiles of the programs that sum dV,
    or None if those of `keys` do; the last three are of `QueryTiles`, empty if fused; `rule` is
    that of `ForwardTables`.
    """

    rule: torch.Tensor
    order: torch.Tensor
    keys: KeyLists
    values: KeyLists | None
    query_items: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor


def padded_dim(size: int) -> int:
    """Columns of a tile: a power of two, and at least the 16 that a product of tiles needs."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def query_item(table, item):
    """Reads one row of (n, 9) `table.items`."""
    ptr = table.items + item * 9
    row0, row1, query0 = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    list0, num_listed = tl.load(ptr + 3), tl.load(ptr + 4)
    own0, num_own = tl.load(ptr + 5), tl.load(ptr + 6)
    masked0, num_masked = tl.load(ptr + 7), tl.load(ptr + 8)
    return QueryItem(row0, row1, query0, list0, num_listed, own0, num_own, masked0, num_masked)


@triton.jit
def full_column(table, item, j, BLOCK_N: tl.constexpr):
    """First key of full tile j: the listed ones of the ancestors, then those of the own run."""
    listed = tl.load(table.columns + item.list0 + j, mask=j < item.num_listed, other=0)
    return tl.where(j < item.num_listed, listed, item.own0 + (j - item.num_listed) * BLOCK_N)


@triton.jit
def masked_column(table, item, j):
    """First key and end of masked tile j, a row of (k, 2) `table.masked`."""
    col = tl.load(table.masked + 2 * (item.masked0 + j))
    col_end = tl.load(table.masked + 2 * (item.masked0 + j) + 1)
    return col, col_end


@triton.jit
def key_item(table, item):
    """Reads one row of (n, 9) `table.items`."""
    ptr = table.items + item * 9
    col0, col1 = tl.load(ptr), tl.load(ptr + 1)
    full0, num_full = tl.load(ptr + 2), tl.load(ptr + 3)
    before0, num_before = tl.load(ptr + 4), tl.load(ptr + 5)
    after0, num_masked = tl.load(ptr + 6), num_before + tl.load(ptr + 7)
    slot = tl.load(ptr + 8)
    return KeyItem(col0, col1, full0, num_full, before0, num_before, after0, num_masked, slot)


@triton.jit
def rule_row(rule_ptr, num_keys, ROW: tl.constexpr):
    """Address of one row of the rule."""
    for _ in tl.static_range(ROW):
        rule_ptr += num_keys
    return rule_ptr


@triton.jit
def key_rule(rule_ptr, cols, mask_n, num_keys, MODE: tl.constexpr):
    """The rule for some keys; those outside of mask_n are seen by no row."""
    # [BLOCK_N]
    seen_until = tl.load(rule_row(rule_ptr, num_keys, SEEN_UNTIL) + cols, mask=mask_n, other=0)
    seen_from = cols
    position = cols
    if not MODE.causal:
        seen_from = tl.load(rule_row(rule_ptr, num_keys, SEEN_FROM) + cols, mask=mask_n, other=0)
    if MODE.window:
        position = tl.load(rule_row(rule_ptr, num_keys, POSITION) + cols, mask=mask_n, other=0)
    return KeyRule(seen_until, seen_from, position)


@triton.jit
def row_floor(rule_ptr, rows, mask_m, num_keys, window_size, MODE: tl.constexpr):
    """The last position that is too far back for each row, under a window."""
    # [BLOCK_M]
    floor = rows
    if MODE.window:
        position = tl.load(rule_row(rule_ptr, num_keys, POSITION) + rows, mask=mask_m, other=0)
        floor = position - window_size
    return floor


@triton.jit
def forbid(s, rows, floor, keys, MODE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The attention rule: scores of pairs that it excludes become FORBIDDEN.

    Scores are [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] with KEYS_FIRST.
    """
    if KEYS_FIRST:
        rows, floor = rows[None, :], floor[None, :]
        seen_from, seen_until = keys.seen_from[:, None], keys.seen_until[:, None]
        position = keys.position[:, None]
    else:
        rows, floor = rows[:, None], floor[:, None]
        seen_from, seen_until = keys.seen_from[None, :], keys.seen_until[None, :]
        position = keys.position[None, :]
    if MODE.window:
        return tl.where(
            (seen_from <= rows) & (rows < seen_until) & (position > floor), s, FORBIDDEN
        )
    else:
        return tl.where((seen_from <= rows) & (rows < seen_until), s, FORBIDDEN)
