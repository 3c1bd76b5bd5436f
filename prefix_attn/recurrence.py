"""Runs functions of sequences on a packed row: recurrences, convolutions, and any other.

Attention sees a prefix forest through its mask. A layer that reads rows in order needs more: a
segment starts from the state in which its parent ended. `fork_states` hands states on from segment
to segment, `convolve` puts the end of its path in front of each segment, and `whole_sequences` runs
what can do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from prefix_attn.forest import Forest
from prefix_attn.layout import PrefixLayout, outside_inference_mode

# Segments up to this length run in one batch: chunked scans pad to it anyway.
CHUNK = 64

# (parts, initial_states, lengths or bounds) -> (out, final_states)
Step = Callable[[Sequence[Tensor], Tensor | None, Tensor], tuple[Tensor, Tensor | None]]

Out = TypeVar("Out", Tensor, tuple[Tensor, ...])


class HandBack(torch.autograd.Function):
    """Copies packed rows to the places that share them; the gradient of a row is their sum.

    The sum is taken in float32 or better and does not depend on the order of threads.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor) -> Tensor:
        """packed (T, ...), index (*places), -1 for zeros -> (*places, ...)."""
        ctx.save_for_backward(index)
        ctx.rows = packed.shape[0]
        return _rows_or_zeros(packed, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """dpacked[r] = sum of dout over the places of row r."""
        (index,) = ctx.saved_tensors
        shape = grad.shape[index.dim() :]
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.rows + 1, *shape, dtype=dtype, device=grad.device)
        at = torch.where(index < 0, ctx.rows, index)  # zeros have a row of their own
        total.index_put_((at,), grad.to(dtype), accumulate=True)
        return total[:-1].to(grad.dtype), None


class MoveRows(torch.autograd.Function):
    """Moves each row to one place, or drops it; the gradient moves back, and nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """x (n, ...), index (m,), inverse (n,), both -1 for zeros -> (m, ...)."""
        ctx.save_for_backward(index, inverse)
        return _rows_or_zeros(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dx[j] = dout[inverse[j]]."""
        _, inverse = ctx.saved_tensors
        return _rows_or_zeros(grad, inverse), None, None


def _rows_or_zeros(x: Tensor, index: Tensor) -> Tensor:
    if not x.shape[0]:
        return x.new_zeros(*index.shape, *x.shape[1:])
    out = x[index.clamp(min=0)]
    return out.masked_fill_((index < 0).view(*index.shape, *[1] * (x.dim() - 1)), 0)


# ---- recurrences --------------------------------------------------------------------------------


def fork_states(
    step: Step, inputs: Sequence[Tensor], layout: PrefixLayout, *, padded: bool = True
) -> Tensor:
    """Runs a recurrence over every segment once; each starts where its parent ended.

    Segments of one depth run together, in a few calls of `step`.

    Args:
        step: `(parts, states, lengths) -> (out, final_states)`. Without gaps it is called with one
            row of n segments end to end. The parts are (n, L, ...), one for each input, zero behind
            the end of a segment; states is (n, ...), None where all segments are roots; lengths is
            (n,) int64. It returns out (n, L, ...) and final_states (n, ...), the states behind the
            last token of each segment, so zeros must leave a state alone, or `step` must stop at
            `lengths`.
        inputs: tensors (T, ...) on the packed axis.
        layout: of T tokens.
        padded: False calls `step` with parts (M, ...) instead, the M rows of its segments end to
            end, and with their bounds (n + 1,) int32 in the place of lengths: 0, where the first
            one ends, and so on up to M. out is (M, ...) as well. The bounds are the same tensor in
            every call with the layout, by which kernels may know them again.

    Returns:
        (T, ...) what `step` computed for each row.

    Raises:
        ValueError: if an input does not have T rows.

    Example:
        >>> layout = PrefixLayout.from_lengths([3], [[2, 1]])
        >>> def running_sum(parts, states, lengths):
        ...     sums = parts[0].cumsum(1) + (0 if states is None else states[:, None])
        ...     return sums, sums[:, -1]
        >>> fork_states(running_sum, [torch.ones(6)], layout).tolist()
        [1.0, 2.0, 3.0, 4.0, 5.0, 4.0]
    """
    for x in inputs:
        _check_rows(x, layout)
    tables = _tables_of(layout).waves(padded)
    moved = [MoveRows.apply(x, tables.source, tables.place) for x in inputs]
    cut = [x.split(tables.sizes) for x in moved]
    outs: list[Tensor] = []
    above: Tensor | None = None  # final states of the segments one level up that are continued
    for level in tables.levels:
        finals: list[Tensor] = []
        for call in level:
            parts = [x[call.at] for x in cut]
            if padded:
                parts = [x.unflatten(0, (len(call.extents), -1)) for x in parts]
            states = None
            if call.parents is not None:
                assert above is not None
                states = HandBack.apply(above, call.parents)
            out, final = step(parts, states, call.extents)
            outs.append(out.flatten(0, 1) if padded else out)
            if call.continued is not None:
                if final is None:
                    raise ValueError("step must return the final states of its segments, got None")
                finals.append(final[call.continued])
        above = torch.cat(finals) if finals else None
    return MoveRows.apply(torch.cat(outs), tables.place, tables.source)


@dataclass(frozen=True, eq=False)
class _Call:
    """Segments of one depth that run together.

    Attributes:
        at: which part of the moved row they are.
        extents: (n,) int64 lengths where they are padded, else (n + 1,) int32 bounds.
        parents: (n,) int64, where among the states that the level above hands on theirs is; None
            at the roots.
        continued: (m,) int64, those of the n whose final state is handed on, None if there is none.
    """

    at: int
    extents: Tensor
    parents: Tensor | None
    continued: Tensor | None


@dataclass(frozen=True, eq=False)
class _Waves:
    """All segments level by level.

    Attributes:
        source: (M,) int64, the packed row of each place, -1 at padding.
        place: (T,) int64, its inverse.
        sizes: places of each call, M together.
        levels: the calls of each depth.
    """

    source: Tensor
    place: Tensor
    sizes: list[int]
    levels: list[list[_Call]]


# ---- convolutions and whole sequences -----------------------------------------------------------


def convolve(
    function: Callable[[Tensor], Tensor], x: Tensor, layout: PrefixLayout, history: int
) -> Tensor:
    """Runs a causal function of the last tokens of a path on every segment.

    Args:
        function: (M, ...) -> (M, ...), on one sequence of M rows. What it gives for a row depends
            on that row and the `history` rows before it.
        x: (T, ...) on the packed axis.
        layout: of T tokens.
        history: rows before a row that `function` reads: the width of a convolution less one. Rows
            before the first of a path are zero.

    Returns:
        (T, ...).

    Raises:
        ValueError: if x does not have T rows, or history is negative.

    Example:
        >>> layout = PrefixLayout.from_lengths([2], [[2, 1]])
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> convolve(lambda x: x + torch.nn.functional.pad(x, (1, 0))[:-1], x, layout, 1).tolist()
        [1.0, 3.0, 5.0, 7.0, 7.0]
    """
    _check_rows(x, layout)
    if history < 0:
        raise ValueError(f"history must not be negative, got {history}")
    tables = _tables_of(layout).paths(history)
    ends = MoveRows.apply(x, tables.end_rows, tables.end_inverse)
    above = HandBack.apply(ends, tables.above)
    joined = MoveRows.apply(torch.cat([x, above]), tables.order, tables.inverse)
    return MoveRows.apply(function(joined), tables.inverse[: x.shape[0]], tables.own)


@dataclass(frozen=True, eq=False)
class _Paths:
    """Segments end to end, each behind the last rows of the path above it.

    Attributes:
        end_rows: (U,) int64, the packed rows that stand before some segment.
        end_inverse: (T,) int64, their inverse, -1 elsewhere.
        above: (n history,) int64, what stands before each of the n segments: places in `end_rows`,
            -1 before the first row of a path.
        order: (M,) int64, for each place of the sequence its place in the packed rows and, behind
            them, the rows of `above`.
        inverse: (M,) int64, the inverse of `order`.
        own: (M,) int64, the packed row of each place, -1 at the rows of `above`.
    """

    end_rows: Tensor
    end_inverse: Tensor
    above: Tensor
    order: Tensor
    inverse: Tensor
    own: Tensor


def whole_sequences(
    function: Callable[[Sequence[Tensor]], Out], inputs: Sequence[Tensor], layout: PrefixLayout
) -> Out:
    """Runs any causal function on whole sequences; shared rows run once for each of them.

    Args:
        function: takes parts, one (N, L, ...) for each input, zero behind the end of a sequence;
            gives (N, L, ...), or a tuple of such tensors. There is a sequence for every segment
            that no other one continues.
        inputs: tensors (T, ...) on the packed axis.
        layout: of T tokens.

    Returns:
        (T, ...), or a tuple of them. A shared row is taken from one of its sequences, and so is its
        gradient.

    Raises:
        ValueError: if an input does not have T rows.

    Example:
        >>> layout = PrefixLayout.from_lengths([2], [[2, 1]])
        >>> whole_sequences(lambda parts: parts[0].cumsum(1), [torch.ones(5)], layout).tolist()
        [1.0, 2.0, 3.0, 4.0, 3.0]
    """
    for x in inputs:
        _check_rows(x, layout)
    rows, place, inverse = _tables_of(layout).sequences
    out = function([HandBack.apply(x, rows) for x in inputs])
    if isinstance(out, Tensor):
        return MoveRows.apply(out.flatten(0, 1), place, inverse)
    return tuple(MoveRows.apply(x.flatten(0, 1), place, inverse) for x in out)


# ---- tables -------------------------------------------------------------------------------------


def _check_rows(x: Tensor, layout: PrefixLayout) -> None:
    if x.dim() == 0 or x.shape[0] != layout.num_tokens:
        raise ValueError(
            f"inputs must have shape ({layout.num_tokens}, ...) on the packed axis, got "
            f"{tuple(x.shape)}"
        )


class _Tables:
    """What a layout means to functions of sequences; each table is made once."""

    def __init__(self, layout: PrefixLayout) -> None:
        self._device = layout.device
        self._forest = layout.forest
        self._waves: dict[bool, _Waves] = {}
        self._paths: dict[int, _Paths] = {}
        self._sequences: tuple[Tensor, Tensor, Tensor] | None = None

    def waves(self, padded: bool) -> _Waves:
        """For `fork_states`."""
        if padded not in self._waves:
            self._waves[padded] = self._make_waves(padded)
        return self._waves[padded]

    def paths(self, history: int) -> _Paths:
        """For `convolve`."""
        if history not in self._paths:
            self._paths[history] = self._make_paths(history)
        return self._paths[history]

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """For `whole_sequences`: rows (N, L), and the place of each row with its inverse."""
        if self._sequences is None:
            self._sequences = self._make_sequences()
        return self._sequences

    @outside_inference_mode
    def _make_waves(self, padded: bool) -> _Waves:
        segments, parents = filled_segments(self._forest)
        starts, lengths = self._forest.starts[segments], self._forest.lengths[segments]
        is_continued = np.bincount(parents[parents >= 0], minlength=len(segments)) > 0
        depths: list[int] = []
        for parent in parents.tolist():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        depth_of = np.array(depths, dtype=np.int64)
        state_of = np.full(len(segments), -1)  # among the states that a level hands on
        source: list[np.ndarray] = []
        sizes: list[int] = []
        levels: list[list[_Call]] = []
        for depth in range(max(depths, default=-1) + 1):
            level = np.flatnonzero(depth_of == depth)
            calls: list[_Call] = []
            handed_on = 0
            for batch in _batches(level, lengths) if padded else [level]:
                continued = np.flatnonzero(is_continued[batch])
                state_of[batch[continued]] = handed_on + np.arange(len(continued))
                handed_on += len(continued)
                mine = lengths[batch]
                size = mine.max() if padded else 0
                for segment in batch:
                    rows = np.arange(starts[segment], starts[segment] + lengths[segment])
                    source += [rows, np.full(max(size - len(rows), 0), -1)]
                bounds = np.cumsum([0, *mine])
                calls.append(
                    _Call(
                        at=len(sizes),
                        extents=self._tensor(mine) if padded else self._tensor(bounds).int(),
                        parents=self._tensor(state_of[parents[batch]]) if depth else None,
                        continued=self._tensor(continued) if len(continued) else None,
                    )
                )
                sizes.append(int(len(batch) * size if padded else bounds[-1]))
            levels.append(calls)
        flat = np.concatenate([*source, np.empty(0, dtype=np.int64)])
        return _Waves(
            source=self._tensor(flat),
            place=self._tensor(_inverse(flat, self._forest.num_tokens)),
            sizes=sizes,
            levels=levels,
        )

    @outside_inference_mode
    def _make_paths(self, history: int) -> _Paths:
        forest = self._forest
        segments, _ = filled_segments(forest)
        starts, lengths = forest.starts[segments], forest.lengths[segments]
        before = np.full((len(segments), history), -1)
        row = starts
        for column in reversed(range(history)):
            row = np.where(row >= 0, forest.previous_rows[row], -1)
            before[:, column] = row
        end_rows = np.unique(before[before >= 0])
        total = forest.num_tokens
        behind = total + np.arange(before.size).reshape(before.shape)
        own = [np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]
        pairs = zip(behind, own, strict=True)
        order = np.concatenate([part for pair in pairs for part in pair] or [np.empty(0, int)])
        above = np.where(before < 0, -1, np.searchsorted(end_rows, before))
        return _Paths(
            end_rows=self._tensor(end_rows),
            end_inverse=self._tensor(_inverse(end_rows, total)),
            above=self._tensor(above.ravel()),
            order=self._tensor(order),
            inverse=self._tensor(_inverse(order, len(order))),
            own=self._tensor(np.where(order < total, order, -1)),
        )

    @outside_inference_mode
    def _make_sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        forest = self._forest
        segments, parents = filled_segments(forest)
        leaves = segments[np.bincount(parents[parents >= 0], minlength=len(segments)) == 0]
        paths = [forest.path_rows(int(leaf)) for leaf in leaves]
        rows = np.full((len(paths), max(map(len, paths), default=0)), -1)
        for i, path in enumerate(paths):
            rows[i, : len(path)] = path
        place = _inverse(rows.ravel(), forest.num_tokens)
        return (
            self._tensor(rows),
            self._tensor(place),
            self._tensor(_inverse(place, rows.size)),
        )

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(self._device)


def filled_segments(forest: Forest) -> tuple[np.ndarray, np.ndarray]:
    """The segments that hold tokens, and which of them each one continues, -1 for none."""
    segments = np.flatnonzero(forest.lengths)
    before = forest.previous_rows[forest.starts[segments]]
    parents = np.full(len(segments), -1)
    below = before >= 0
    parents[below] = np.searchsorted(segments, forest.segment_of(before[below]))
    return segments, parents


def _batches(segments: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Segments that may share a batch: padded, none is more than twice as long as it was."""
    order = segments[np.argsort(-lengths[segments], kind="stable")]
    batches: list[list[int]] = []
    for segment in order.tolist():
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or max(lengths[segment], CHUNK) * 2 < longest:
            batches.append([])
        batches[-1].append(segment)
    return [np.array(batch) for batch in batches]


def _inverse(index: np.ndarray, size: int) -> np.ndarray:
    """The first place of each of `size` values in index, -1 where it has none."""
    inverse = np.full(size, -1)
    places = np.flatnonzero(index >= 0)[::-1]  # of those with one value, the first is written last
    inverse[index[places]] = places
    return inverse


_tables: WeakKeyDictionary[PrefixLayout, _Tables] = WeakKeyDictionary()


def _tables_of(layout: PrefixLayout) -> _Tables:
    if layout not in _tables:
        _tables[layout] = _Tables(layout)
    return _tables[layout]
