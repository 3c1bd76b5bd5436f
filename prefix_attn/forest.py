"""Who attends whom, said once, on the host.

Segments are packed end to end in depth-first order, so the subtree of a segment is one contiguous
range of rows, and two integers per key are the attention rule:

    row r attends key c   iff   seen_from[c] <= r < subtree_end[c]

seen_from[c] is c, or the first row of its segment where the rows of that see all of it. A window of
W positions adds `position[r] - position[c] < W`; positions count along the path, from its root.

A layout shows this to a device, schedules cut it into tiles, the CPU backend into calls, and the
command line counts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

# Layouts whose forests, and the tables made from them, are kept.
CACHED_LAYOUTS = 64
# Bits of the third row of a layout's `segments`.
HAS_QUERIES, SEES_ITSELF = 1, 2


@dataclass(frozen=True, eq=False)
class Forest:
    """The segments of a prefix forest, and which of their rows attend to which.

    S segments hold T rows. Arrays of segments are (S,), arrays of rows (T,), of int64 unless they
    say otherwise. A row is one token on the packed axis, a key in any case and a query where its
    segment has queries.

    Attributes:
        lengths: tokens of each segment; 0 is allowed.
        parents: `parents[i] < i` is the segment that i continues, -1 for a root; in depth-first
            order.
        has_queries: (S,) bool, whether the rows of a segment are queries.
        leaves: (N,) the segment in which each sequence ends, in the callers' order.
        window_size: positions that a query sees back from its own, its own included; None is all.
        prefix_causal: False lets the rows of a segment that others continue see all of it.
        sees_itself: (S,) bool, segments whose rows see all of it in any case; None is none.
    """

    lengths: np.ndarray
    parents: np.ndarray
    has_queries: np.ndarray
    leaves: np.ndarray
    window_size: int | None = None
    prefix_causal: bool = True
    sees_itself: np.ndarray | None = None

    @classmethod
    def from_tree(
        cls, lengths: np.ndarray, parents: np.ndarray, sees_itself: np.ndarray | None = None
    ) -> Forest:
        """Takes any tree that is in depth-first order; every segment has queries.

        Args:
            lengths: (S,) int64, not negative.
            parents: (S,) int64, at least -1.
            sees_itself: (S,) bool, or None.

        Raises:
            ValueError: if they differ in length, or the order is not depth-first; it names the
                entry.
        """
        if len(lengths) != len(parents):
            raise ValueError(
                "lengths and parents must have one entry per segment, got "
                f"{len(lengths)} lengths and {len(parents)} parents"
            )
        if sees_itself is not None and len(sees_itself) != len(parents):
            raise ValueError(
                f"bidirectional must have one entry per segment, got {len(sees_itself)} for "
                f"{len(parents)} segments"
            )
        _check_depth_first(parents)
        has_queries = np.ones(len(parents), dtype=bool)
        return cls(lengths, parents, has_queries, _childless(parents), sees_itself=sees_itself)

    @classmethod
    def from_segments(
        cls,
        segments: np.ndarray,
        *,
        leaves: np.ndarray | None = None,
        window_size: int | None = None,
        prefix_causal: bool = True,
    ) -> Forest:
        """Takes the `segments` of a layout: (3, S) lengths, parents, and bits that say the rest.

        Sequences are in the order of the segments in which they end, unless `leaves` says another.
        """
        lengths, parents, bits = segments.astype(np.int64)
        return cls(
            lengths=lengths,
            parents=parents,
            has_queries=bits & HAS_QUERIES > 0,
            leaves=_childless(parents) if leaves is None else leaves.astype(np.int64),
            window_size=window_size,
            prefix_causal=prefix_causal,
            sees_itself=bits & SEES_ITSELF > 0,
        )

    @cached_property
    def segments(self) -> np.ndarray:
        """(3, S) int32, what `from_segments` takes."""
        bits = self.has_queries * HAS_QUERIES
        if self.sees_itself is not None:
            bits = bits + self.sees_itself * SEES_ITSELF
        return np.stack([self.lengths, self.parents, bits]).astype(np.int32)

    # ---- segments -------------------------------------------------------------------------------

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.parents)

    @property
    def num_groups(self) -> int:
        """Roots."""
        return int((self.parents < 0).sum())

    @cached_property
    def ends(self) -> np.ndarray:
        """The row behind the last one of each segment."""
        return np.cumsum(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each segment."""
        return self.ends - self.lengths

    @cached_property
    def depths(self) -> np.ndarray:
        """Tokens on the path above each segment: the position of its first token."""
        lengths = self.lengths.tolist()
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(depths[parent] + lengths[parent] if parent >= 0 else 0)
        return np.array(depths, dtype=np.int64)

    @cached_property
    def subtree_ends(self) -> np.ndarray:
        """The row behind the last one below each segment: the end of the rows that see it."""
        subtree_ends = self.ends.tolist()
        # A child hands its own to its parent, last segment first.
        for i, parent in reversed(list(enumerate(self.parents.tolist()))):
            if parent >= 0:
                subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[i])
        return np.array(subtree_ends, dtype=np.int64)

    @cached_property
    def continued(self) -> np.ndarray:
        """(S,) bool, whether other segments continue this one."""
        return np.bincount(self.parents[self.parents >= 0], minlength=self.num_segments) > 0

    @cached_property
    def bidirectional(self) -> np.ndarray:
        """(S,) bool, whether the rows of a segment see all of it, not only what lies before."""
        by_rule = self.continued & (not self.prefix_causal)
        return by_rule if self.sees_itself is None else by_rule | self.sees_itself

    @cached_property
    def run_start(self) -> np.ndarray:
        """The row at which the run of each segment begins.

        A first child lies right behind its parent: such segments of a path are one run of rows.
        """
        return self._runs[0]

    @cached_property
    def anchor(self) -> np.ndarray:
        """The segment above the run of each segment, -1 where the run begins with a root."""
        return self._runs[1]

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        run_start, anchor = self.starts.tolist(), self.parents.tolist()
        behind = (self.parents >= 0) & (self.starts == self.ends[self.parents])
        for i in np.flatnonzero(behind).tolist():
            parent = anchor[i]
            run_start[i], anchor[i] = run_start[parent], anchor[parent]
        return np.array(run_start, dtype=np.int64), np.array(anchor, dtype=np.int64)

    # ---- rows -----------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """T, rows on the packed axis."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def positions(self) -> np.ndarray:
        """The depth of each row along its path."""
        return np.arange(self.num_tokens) + np.repeat(self.depths - self.starts, self.lengths)

    @cached_property
    def row_subtree_ends(self) -> np.ndarray:
        """The end of the rows that see each key."""
        return np.repeat(self.subtree_ends, self.lengths)

    @cached_property
    def row_seen_from(self) -> np.ndarray:
        """The first row that sees each key."""
        rows, start = np.arange(self.num_tokens), np.repeat(self.starts, self.lengths)
        return np.where(np.repeat(self.bidirectional, self.lengths), start, rows)

    @cached_property
    def query_rows(self) -> np.ndarray:
        """(Tq,) the row of each query, ascending."""
        return np.flatnonzero(np.repeat(self.has_queries, self.lengths))

    @cached_property
    def queries_before(self) -> np.ndarray:
        """(T + 1,) how many queries lie before each row."""
        is_query = np.repeat(self.has_queries, self.lengths)
        return np.concatenate([[0], np.cumsum(is_query)])

    @cached_property
    def previous_rows(self) -> np.ndarray:
        """The row before each row on its path, -1 for the first of a path."""
        # The nearest ancestor that is not empty holds the predecessor of a segment's first token.
        last: list[int] = []
        before: list[int] = []
        bounds = zip(self.parents.tolist(), self.lengths.tolist(), self.ends.tolist(), strict=True)
        for parent, length, end in bounds:
            before.append(last[parent] if parent >= 0 else -1)
            last.append(end - 1 if length else before[-1])
        previous = np.arange(self.num_tokens) - 1
        filled = self.lengths > 0
        previous[self.starts[filled]] = np.array(before, dtype=np.int64)[filled]
        return previous

    def segment_of(self, rows: np.ndarray) -> np.ndarray:
        """The segments that hold some rows."""
        filled = np.flatnonzero(self.lengths)
        return filled[np.searchsorted(self.starts[filled], rows, side="right") - 1]

    def cut(self, rows: np.ndarray) -> Forest:
        """The same forest with segments that begin at some more rows.

        Args:
            rows: ascending, each inside a segment or at its start. What is cut off from a segment
                continues it, and takes over its children.
        """
        rows = rows[~np.isin(rows, self.starts)]
        pieces = 1 + np.bincount(self.segment_of(rows), minlength=self.num_segments)
        last = np.cumsum(pieces) - 1
        first = last - pieces + 1
        parents = np.arange(int(pieces.sum())) - 1
        parents[first] = np.where(self.parents >= 0, last[self.parents], -1)
        ends = np.empty(len(parents), dtype=np.int64)
        ends[last] = self.ends
        ends[np.setdiff1d(np.arange(len(parents)), last)] = rows
        of_old = np.repeat(np.arange(self.num_segments), pieces)
        return Forest(
            lengths=np.diff(ends, prepend=0),
            parents=parents,
            has_queries=self.has_queries[of_old],
            leaves=last[self.leaves],
            window_size=self.window_size,
            prefix_causal=self.prefix_causal,
            sees_itself=None if self.sees_itself is None else self.sees_itself[of_old],
        )

    # ---- sequences ------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """N, paths from a root to a leaf."""
        return len(self.leaves)

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """(N,) tokens of each sequence."""
        return (self.depths + self.lengths)[self.leaves]

    @property
    def repeated_tokens(self) -> int:
        """Tokens of all sequences, each run whole."""
        return int(self.sequence_lengths.sum())

    @property
    def max_length(self) -> int:
        """Tokens of the longest path."""
        return int((self.depths + self.lengths).max(initial=0))

    def path_rows(self, segment: int) -> np.ndarray:
        """The rows from the root to the end of a segment."""
        path = []
        while segment >= 0:
            path.append(segment)
            segment = int(self.parents[segment])
        path.reverse()
        lengths = self.lengths[path]
        return np.arange(lengths.sum()) + np.repeat((self.starts - self.depths)[path], lengths)

    @cached_property
    def sequence_rows(self) -> list[np.ndarray]:
        """The rows of each sequence from root to leaf: `path_rows` of all leaves in one pass."""
        places = {leaf: i for i, leaf in enumerate(self.leaves.tolist())}
        sequences = [np.empty(0, dtype=np.int64)] * self.num_sequences
        # Depth first, the rows above a segment are those that were written last.
        path, rows = np.empty(self.max_length, dtype=np.int64), np.arange(self.num_tokens)
        bounds = zip(self.starts.tolist(), self.ends.tolist(), self.depths.tolist(), strict=True)
        for segment, (start, end, depth) in enumerate(bounds):
            path[depth : depth + end - start] = rows[start:end]
            if segment in places:
                sequences[places[segment]] = path[: depth + end - start].copy()
        return sequences

    @cached_property
    def sharers(self) -> np.ndarray:
        """How many sequences run through each segment."""
        sharers = np.bincount(self.leaves, minlength=self.num_segments).tolist()
        for i, parent in reversed(list(enumerate(self.parents.tolist()))):
            if parent >= 0:
                sharers[parent] += sharers[i]
        return np.array(sharers, dtype=np.int64)

    # ---- pairs ----------------------------------------------------------------------------------

    @cached_property
    def segment_pairs(self) -> np.ndarray:
        """Allowed (query, key) pairs of the queries of each segment."""

        def up_to(depth: np.ndarray) -> np.ndarray:
            """Keys at or before each of the first `depth` rows of a path, all together."""
            ramp = depth if self.window_size is None else np.minimum(depth, self.window_size)
            return ramp * (ramp + 1) // 2 + (depth - ramp) * ramp

        ahead = self.bidirectional * (self.lengths * (self.lengths - 1) // 2)
        return self.has_queries * (up_to(self.depths + self.lengths) - up_to(self.depths) + ahead)

    @property
    def num_pairs(self) -> int:
        """Allowed (query, key) pairs, those of shared rows once."""
        return sum(self.segment_pairs.tolist())  # Python's integers do not overflow

    @property
    def num_repeated_pairs(self) -> int:
        """Allowed (query, key) pairs of all sequences, each run whole."""
        each = zip(self.segment_pairs.tolist(), self.sharers.tolist(), strict=True)
        return sum(pairs * sharers for pairs, sharers in each)


@lru_cache(CACHED_LAYOUTS)
def forest_of(content: bytes, window_size: int | None = None, prefix_causal: bool = True) -> Forest:
    """The forest of a layout's `segments`, given as bytes: derived once, not once per layer."""
    segments = np.frombuffer(content, dtype=np.int32).reshape(3, -1)
    return Forest.from_segments(segments, window_size=window_size, prefix_causal=prefix_causal)


def _childless(parents: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(len(parents)), parents)


def _check_depth_first(parents: np.ndarray) -> None:
    """Refuses parents that come later (cycles) or whose subtree was already closed."""
    late = np.flatnonzero(parents >= np.arange(len(parents)))
    if late.size:
        i = int(late[0])
        raise ValueError(f"parents[{i}] must be less than {i} (or -1), got {parents[i]}")
    path: list[int] = []
    for i, parent in enumerate(parents.tolist()):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(
                f"segments must be in depth-first order: parents[{i}] is {parent}, but the "
                f"subtree of segment {parent} ended before segment {i}"
            )
        path.append(i)
