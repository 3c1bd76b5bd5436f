"""Which calls of a kernel make up a layout: computed once for each layout, on the host.

Segments become nodes: one that is the only continuation of another joins it, since the two are one
causal run. A long node attends itself in one call, with the short ones above it where they are few,
and all rows below it attend it in another, so that it is read once for all members. Short nodes go
together: a block of queries attends the rows above it, gathered along the path, and its own rows,
under a mask. Under a window, and where no flash kernel serves, all is cut into blocks, so that
memory is linear in tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_attn.content import Content
from prefix_attn.forest import Forest

# Most rows of a block. A longer node has calls of its own; below, merging costs more than masking.
BLOCK = 128
# Keys of a tile of PyTorch's kernels. They compute whole tiles: among so few keys a mask costs what
# a causal call does, and another call and merging would come on top.
TILE_KEYS = 512
# Rows of a causal call: of NaN in fewer than a vector's its kernel makes 0. With a mask it doesn't.
LEAST_CAUSAL = 16
# What a block and each of its keys cost by themselves, in query-key pairs.
BLOCK_PAIRS, KEY_PAIRS = 256, 8
# What a call costs in the same, and a row that is copied to and fro where a call holds no view.
CALL_PAIRS, ROW_PAIRS = 2048, 16
# What one call holds: query-key pairs of a head, and gathered rows.
MOST_PAIRS, MOST_ROWS = 2**19, 2**12
# Pairs of a mask that is kept for later calls. To make one takes several operators, which shows in
# small calls alone.
KEPT_PAIRS = 2**16
# Calls of nodes up to this length go together although some have to be padded by an eighth.
MOST_PADDED = 256
# Layouts whose plans are kept.
CACHED_PLANS = 16


class Node(NamedTuple):
    """Rows start to end of one path; `below` ends the rows that continue it.

    `query` is the place of the first row in q, or -1 where the rows are no queries.
    """

    start: int
    end: int
    below: int
    parent: int
    query: int
    bidirectional: bool

    @property
    def length(self) -> int:
        """Rows."""
        return self.end - self.start


class Block(NamedTuple):
    """The rows of queries, which lie in q from `place` on, and those of all their keys.

    `is_causal` says that these are one run of rows, each of which sees all before it.
    """

    place: int
    rows: np.ndarray
    keys: np.ndarray
    is_causal: bool

    @property
    def queries(self) -> np.ndarray:
        """Places in q."""
        return self.place + np.arange(len(self.rows))


@dataclass(frozen=True, eq=False)
class Grid:
    """(count, length) rows of a tensor, those of one batch of equal calls.

    Attributes:
        shape: count and length.
        start: the first row where the grid is a view, one row every `step` from there on.
        step: rows from one line of the grid to the next.
        rows: (count * length,) the rows of all places where it is no view; a line that is shorter
            than the longest one goes on with its last row.
        filled: (n,) the places of the flattened grid before that; None where these are all.
    """

    shape: tuple[int, int]
    start: int = 0
    step: int = 0
    rows: Tensor | None = None
    filled: Tensor | None = None

    @classmethod
    def from_lines(cls, lines: Sequence[np.ndarray]) -> Grid:
        """Lines of ascending rows, padded to the longest one."""
        lengths = [len(line) for line in lines]
        shape = len(lines), max(lengths)
        if min(lengths) == shape[1] and all(line[-1] - line[0] == len(line) - 1 for line in lines):
            starts = np.array([line[0] for line in lines])
            steps = np.diff(starts)
            if not len(steps) or ((steps == steps[0]).all() and steps[0] >= shape[1]):
                return cls(shape, int(starts[0]), int(steps[0]) if len(steps) else shape[1])
        places = np.arange(shape[1])
        last = np.array(lengths)[:, None] - 1
        grid = np.concatenate([line[np.minimum(places, len(line) - 1)] for line in lines])
        filled = None
        if min(lengths) < shape[1]:
            filled = torch.from_numpy(np.flatnonzero(places <= last))
        return cls(shape, rows=torch.from_numpy(grid), filled=filled)

    @property
    def is_view(self) -> bool:
        """Whether `take` returns a view, so that what is written there is in the tensor."""
        return self.rows is None

    @property
    def size(self) -> int:
        """Filled places."""
        return self.shape[0] * self.shape[1] if self.filled is None else len(self.filled)

    def take(self, x: Tensor) -> Tensor:
        """(T, H, ...) -> (count, H, length, ...)."""
        rows, heads, *rest = x.stride()
        if self.rows is None:
            return x.as_strided(
                (self.shape[0], x.shape[1], self.shape[1], *x.shape[2:]),
                (self.step * rows, heads, rows, *rest),
                x.storage_offset() + self.start * rows,
            )
        return x.index_select(0, self.rows).unflatten(0, self.shape).transpose(1, 2)

    def cleared(self, values: Tensor) -> Tensor:
        """(count, H, length, ...) values with zeros at places that are not filled."""
        if self.filled is None:
            return values
        values = values.transpose(1, 2)
        zeros = torch.zeros_like(values, memory_format=torch.contiguous_format)
        zeros.flatten(0, 1).index_copy_(0, self.filled, self._filled(values)[1])
        return zeros.transpose(1, 2)

    def is_all(self, num_rows: int) -> bool:
        """Whether these are all rows of a tensor, each once and in their order."""
        return self.is_view and self.step == self.shape[1] and self.size == num_rows

    def put(self, x: Tensor, values: Tensor) -> None:
        """Writes (count, H, length, ...) values to their rows of x."""
        if self.is_view:
            self.take(x).copy_(values)
        else:
            x.index_copy_(0, *self._filled(values.transpose(1, 2)))

    def add(self, x: Tensor, values: Tensor) -> None:
        """Adds values to their rows of x, in the order of the grid."""
        if self.is_view:
            self.take(x).add_(values)
        else:
            x.index_add_(0, *self._filled(values.transpose(1, 2)))

    def _filled(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the filled places, and the (count, length, ...) values there."""
        values = values.flatten(0, 1)
        if self.filled is not None:
            values = values.index_select(0, self.filled)
        return self._filled_rows, values

    @cached_property
    def _filled_rows(self) -> Tensor:
        assert self.rows is not None
        return self.rows if self.filled is None else self.rows[self.filled]


@dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom in a batch of blocks: int32 tables of queries (n, L, 1) and keys (n, 1, K).

    Attributes:
        length: L, queries of a block.
        seen_from: of each key the first query that sees it, by its place in the block.
        seen_until: the one behind the last.
        window: under a window also the positions of queries, and of each key the one that ends its
            window.
        is_kept: whether later calls are to find it made.
        kept: by dtype.
    """

    length: int
    seen_from: Tensor
    seen_until: Tensor
    window: tuple[Tensor, Tensor] | None
    is_kept: bool
    kept: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Tensor:
        """(n, 1, L, K): whether a key is seen, or for a number what that adds to a score."""
        mask = self.kept.get(dtype)
        if mask is None:
            mask = self._seen()
            if dtype is not torch.bool:
                mask = torch.where(mask, torch.zeros((), dtype=dtype), float("-inf"))
            if self.is_kept:
                self.kept[dtype] = mask
        return mask

    def _seen(self) -> Tensor:
        place = torch.arange(self.length, dtype=torch.int32)[:, None]
        seen = (self.seen_from <= place) & (place < self.seen_until)
        if self.window is not None:
            position, seen_before = self.window
            seen &= position < seen_before
        return seen[:, None]


@dataclass(frozen=True, eq=False)
class Call:
    """A batch of equal attentions.

    Attributes:
        queries: places in q.
        keys: rows of k and v.
        causal: whether query i sees the first i keys alone.
        mask: or which keys it sees; None for all.
        first: whether this is the first call of its queries; it holds their own keys.
    """

    queries: Grid
    keys: Grid
    causal: bool = False
    mask: Mask | None = None
    first: bool = True


@lru_cache(CACHED_PLANS)
def plan(
    content: Content, window_size: int | None, prefix_causal: bool, dense: bool, crossing: bool
) -> list[Call]:
    """The calls of a layout, those first that a query is in first.

    Args:
        content: of the layout.
        window_size: that of the call.
        prefix_causal: that of the call.
        dense: cut everything into masked blocks, as a window does.
        crossing: whether a block may hold several nodes.
    """
    forest = content.forest(window_size, prefix_causal)
    nodes = _nodes(forest)
    blocks: list[Block] = []
    own: list[tuple[np.ndarray, np.ndarray, bool]] = []
    sides: list[tuple[np.ndarray, np.ndarray, bool]] = []
    belows: list[tuple[np.ndarray, np.ndarray, bool]] = []

    packer = _Packer(forest.num_tokens, window_size)
    for node in nodes:
        is_long = node.length > BLOCK or not crossing
        is_gathered = dense or window_size is not None or node.length <= BLOCK
        packer.enter(node, is_gathered)
        if is_long or not packer.fits(node):
            blocks += packer.finished()
        if not is_long:
            packer.add(node)
            continue
        rows = np.arange(node.start, node.end)
        if node.query >= 0 and is_gathered:
            blocks += packer.pieces(node)
        elif node.query >= 0:
            queries = np.arange(node.query, node.query + node.length)
            above = packer.path[: packer.above[-1]]
            if 0 < len(above) <= TILE_KEYS - node.length:
                blocks.append(Block(node.query, rows, np.concatenate([above, rows]), False))
            else:
                own.append((queries, rows, not node.bidirectional))
                if len(above):
                    sides.append((queries, above.copy(), False))
        first, last = forest.queries_before[[node.end, node.below]].tolist()
        if not is_gathered and first < last:
            belows.append((np.arange(first, last), rows, False))
    blocks += packer.finished()
    if not dense:
        own += [(x.queries, x.keys, True) for x in blocks if x.is_causal]
        blocks = [x for x in blocks if not x.is_causal]
    return [
        *_calls(own, first=True),
        *_masked(blocks, forest),
        *_calls(sides, first=False),
        *_calls(belows, first=False),
    ]


def _nodes(forest: Forest) -> list[Node]:
    """The filled segments in packed order, only continuations joined to what they continue."""
    nodes: list[Node] = []
    node_of: list[int] = []
    for start, end, below, parent, has_queries, bidirectional in zip(
        forest.starts.tolist(),
        forest.ends.tolist(),
        forest.subtree_ends.tolist(),
        forest.parents.tolist(),
        forest.has_queries.tolist(),
        forest.bidirectional.tolist(),
        strict=True,
    ):
        above = node_of[parent] if parent >= 0 else -1
        if start == end:
            node_of.append(above)
            continue
        query = int(forest.queries_before[start]) if has_queries else -1
        last = nodes[above] if above >= 0 else None
        if (
            last
            and (last.end, last.below) == (start, below)
            and (last.query >= 0) == has_queries
            and not (bidirectional or last.bidirectional)
        ):
            nodes[above] = last._replace(end=end)
            node_of.append(above)
            continue
        node_of.append(len(nodes))
        nodes.append(Node(start, end, below, above, query, bidirectional))
    return nodes


class _Packer:
    """Fills blocks with neighbouring short nodes, and cuts long ones into pieces.

    Nodes are entered in packed order, so the gathered rows above one are those that were written
    last to a path of rows. Under a window all are gathered: places on the path are positions.
    """

    def __init__(self, num_rows: int, window_size: int | None) -> None:
        self.window_size = window_size
        self.path = np.empty(num_rows, dtype=np.int64)
        # Of each node: rows on the path above it, those of the block among them, rows with its own.
        self.above: list[int] = []
        self.inside: list[int] = []
        self.upto: list[int] = []
        self.held: list[Node] = []
        # The first node of the block, the rows above it, and the first of them that is seen.
        self.first = 0
        self.keys = self.path[:0]
        self.low = 0

    def enter(self, node: Node, gathered: bool) -> None:
        """Puts the next node on the path."""
        parent = node.parent
        above = self.upto[parent] if parent >= 0 else 0
        in_block = bool(self.held) and parent >= self.first
        self.above.append(above)
        self.inside.append(above - self.above[parent] + self.inside[parent] if in_block else 0)
        self.upto.append(above + node.length if gathered else above)
        if gathered:
            self.path[above : above + node.length] = np.arange(node.start, node.end)

    def fits(self, node: Node) -> bool:
        """Whether the node that was entered last costs less in the block than alone.

        In the block its rows meet keys that they do not see, and its keys meet the rows before it.
        """
        if not self.held:
            return True
        rows, above = node.start - self.held[0].start, self.above[-1]
        seen = above if self.window_size is None else min(above, self.window_size)
        hidden = node.length * (len(self.keys) - self.low + 2 * rows - seen)
        return rows + node.length <= BLOCK and hidden <= BLOCK_PAIRS + KEY_PAIRS * seen

    def add(self, node: Node) -> None:
        """Joins that node to the block; one without queries matters between others alone."""
        if not self.held:
            if node.query < 0:
                return
            self.first, self.inside[-1] = len(self.above) - 1, 0
            self.keys = self.path[: self.above[-1]].copy()
            self.low = len(self.keys)
        low = self._low(self.above[-1])
        if node.query >= 0 and low < self.above[-1] - self.inside[-1]:
            self.low = min(self.low, low)
        self.held.append(node)

    def finished(self) -> list[Block]:
        """The block, if there is one; a new one begins."""
        held, self.held = self.held, []
        while held and held[-1].query < 0:
            held.pop()
        if not held:
            return []
        start, end = held[0].start, held[-1].end
        rows = [np.arange(x.start, x.end) for x in held if x.query >= 0]
        keys = np.concatenate([self.keys[self.low :], np.arange(start, end)])
        is_run = all(node.parent == self.first + i for i, node in enumerate(held[1:]))
        is_causal = is_run and self._is_causal(held, keys)
        return [Block(held[0].query, np.concatenate(rows), keys, is_causal)]

    def pieces(self, node: Node) -> list[Block]:
        """The node that was entered last, cut into equal blocks."""
        count = -(-node.length // BLOCK)
        size = -(-node.length // count)
        above = self.path[: self.above[-1]]
        found = []
        for start in range(node.start, node.end, size):
            end = min(start + size, node.end)
            shift = start - node.start
            low = self._low(len(above) + shift)
            seen = node.start + max(0, low - len(above))
            ahead = node.end if node.bidirectional else end
            keys = np.concatenate([above[low:], np.arange(seen, ahead)])
            rows = np.arange(start, end)
            is_causal = count == 1 and self._is_causal([node], keys)
            found.append(Block(node.query + shift, rows, keys, is_causal))
        return found

    def _is_causal(self, run: Sequence[Node], keys: np.ndarray) -> bool:
        """Whether a run of nodes sees itself alone, all rows before each, in a causal call."""
        in_window = self.window_size is None or len(keys) <= self.window_size
        is_alone = LEAST_CAUSAL <= len(keys) == sum(x.length for x in run)
        return is_alone and in_window and all(x.query >= 0 and not x.bidirectional for x in run)

    def _low(self, position: int) -> int:
        """The first position that a query sees."""
        return 0 if self.window_size is None else max(0, position - self.window_size + 1)


def _calls(parts: Iterable[tuple[np.ndarray, np.ndarray, bool]], first: bool) -> list[Call]:
    """Calls without a mask: those of one shape go together; causal ones may be padded."""
    batches: list[list[tuple[np.ndarray, np.ndarray, bool]]] = []
    for part in sorted(parts, key=lambda x: (x[2], len(x[1]), len(x[0]), x[0][0])):
        queries, keys, causal = part
        last = batches[-1] if batches else [part]
        length = len(last[0][1])
        spare = length // 8 if causal and len(keys) <= MOST_PADDED else 0
        equal = (len(last[0][0]), length) == (len(queries), len(keys))
        alike = equal or 0 < len(keys) - length <= spare
        if batches and last[0][2] == causal and alike and len(keys) * len(last) < MOST_ROWS:
            last.append(part)
        else:
            batches.append([part])
    return [
        Call(
            Grid.from_lines([x[0] for x in batch]),
            Grid.from_lines([x[1] for x in batch]),
            causal=batch[0][2],
            first=first,
        )
        for batch in batches
    ]


def _masked(blocks: list[Block], forest: Forest) -> list[Call]:
    """Blocks of about one shape go together, unless padding costs more than another call."""

    def shape(block: Block) -> tuple[int, int]:
        return len(block.keys), len(block.rows)

    alike = Counter(map(shape, blocks))

    def in_place(block: Block) -> int:
        """Queries of equal blocks, which are a view where no other block is among them."""
        return len(block.rows) * alike[shape(block)] if alike[shape(block)] > 1 else 0

    batches: list[list[Block]] = []
    widest = filled = 0
    for block in sorted(blocks, key=lambda x: (*shape(x), x.place)):
        keys, length = shape(block)
        if batches:
            last = batches[-1]
            count, wide = len(last) + 1, max(widest, length)
            padded = wide * keys * count
            spare = padded - filled - length * keys
            if len(last[-1].rows) != length:
                spare += ROW_PAIRS * (in_place(last[-1]) + in_place(block))
            if (
                spare <= max(CALL_PAIRS, length * keys // 4)
                and padded <= MOST_PAIRS
                and keys * count <= MOST_ROWS
            ):
                last.append(block)
                widest, filled = wide, padded
                continue
        batches.append([block])
        widest, filled = length, length * keys
    masks: dict[Hashable, Mask] = {}
    return [_masked_call(batch, forest, masks) for batch in batches]


def _masked_call(blocks: list[Block], forest: Forest, masks: dict[Hashable, Mask]) -> Call:
    """A call with one mask for all blocks, or for each; equal ones of several calls are one."""
    queries = Grid.from_lines([x.queries for x in blocks])
    keys = Grid.from_lines([x.keys for x in blocks])

    def table(lines: list[np.ndarray], shape: tuple[int, int], empty: int) -> np.ndarray:
        filled = np.full(shape, empty, dtype=np.int32)
        for i, line in enumerate(lines):
            filled[i, : len(line)] = line
        return filled

    # A place that is not filled is seen by nobody, and sees nothing.
    places = [
        [np.searchsorted(x.rows, rows[x.keys]) for x in blocks]
        for rows in (forest.row_seen_from, forest.row_subtree_ends)
    ]
    of_keys = [table(places[0], keys.shape, queries.shape[1]), table(places[1], keys.shape, 0)]
    of_queries = []
    if forest.window_size is not None:
        # Only how far apart they are matters, so that blocks at several depths may be alike.
        positions = [forest.positions[x.rows] for x in blocks]
        ends = [
            forest.positions[x.keys] + forest.window_size - own[0]
            for x, own in zip(blocks, positions, strict=True)
        ]
        of_keys.append(table(ends, keys.shape, 0))
        of_queries.append(table([x - x[0] for x in positions], queries.shape, 0))
    tables = of_keys + of_queries
    is_shared = len(blocks) > 1 and all((x == x[:1]).all() for x in tables)
    if is_shared:
        tables = [x[:1] for x in tables]
    is_kept = is_shared or math.prod((*queries.shape, keys.shape[1])) <= KEPT_PAIRS
    key = None
    if is_kept and len(tables[0]) == 1:
        key = (queries.shape[1], *(x.tobytes() for x in tables))
        if key in masks:
            return Call(queries, keys, mask=masks[key])
    seen_from, seen_until, *window = (torch.from_numpy(x) for x in tables)
    mask = Mask(
        queries.shape[1],
        seen_from[:, None],
        seen_until[:, None],
        (window[1][:, :, None], window[0][:, None]) if window else None,
        is_kept=is_kept,
    )
    if key is not None:
        masks[key] = mask
    return Call(queries, keys, mask=mask)
