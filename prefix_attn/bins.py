"""Cuts sequences into micro-batches that are charged their shared prefixes once."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from prefix_attn.checks import int_array, positive_int, shown
from prefix_attn.forest import Forest
from prefix_attn.radix import find_prefixes


def pack_bins(
    sequences: Sequence[Sequence[int] | Tensor],
    max_tokens: int,
    *,
    num_bins: int | None = None,
) -> list[list[int]]:
    """Cuts sequences into as few micro-batches as their unique tokens allow.

    A micro-batch is charged the tokens of its prefix tree, in which shared ones lie once: what
    `enable` and `PrefixLayout.from_sequences` run for it. The bins, read one after the other, walk
    the prefix tree depth first, so a group is scattered no further than its size demands.

    Siblings are ordered so that they fill bins well: the largest that still fits comes next. For
    that order and the callers' own the cuts are the best there are: the fewest bins, and of those
    cuts the ones that repeat the fewest tokens. The better of the two orders is taken.

    Args:
        sequences: N lists of token ids (ids are not negative).
        max_tokens: unique tokens that a bin holds at most.
        num_bins: at least this many bins, none of them empty: for ranks that have to run the same
            number of micro-batches. Further cuts are made where they repeat the fewest tokens.

    Returns:
        The indices of the sequences in each bin; every index occurs once.

    Raises:
        ValueError: if a sequence alone holds more than `max_tokens`, if there are fewer sequences
            than `num_bins`, or if an argument is not what it should be.

    Example:
        >>> prompt = [1, 2, 3, 4]
        >>> pack_bins([prompt + [5, 6], [9], prompt + [7, 8], prompt + [5, 7]], max_tokens=8)
        [[0, 3], [2, 1]]
    """
    if isinstance(sequences, (str, bytes)) or not isinstance(sequences, Iterable):
        raise ValueError(f"sequences must be lists of token ids, got {shown(sequences)}")
    arrays = [int_array(f"sequences[{i}]", s) for i, s in enumerate(sequences)]
    positive_int("max_tokens", max_tokens)
    if num_bins is not None:
        positive_int("num_bins", num_bins)
    for i, ids in enumerate(arrays):
        if len(ids) > max_tokens:
            raise ValueError(
                f"sequences[{i}] alone has {len(ids)} tokens, a bin holds max_tokens={max_tokens}"
            )
    if num_bins is not None and num_bins > len(arrays):
        raise ValueError(
            f"num_bins={num_bins} bins need as many sequences, none may be empty; got {len(arrays)}"
        )
    if not arrays:
        return []

    forest = find_prefixes(arrays)
    children: list[list[int]] = [[] for _ in range(forest.num_segments + 1)]
    for segment, parent in enumerate(forest.parents.tolist()):
        children[parent].append(segment)  # -1 is the last list, the roots
    walks = [_Walk(forest, children), _Walk(forest, _filling(forest, children, max_tokens))]
    # The callers' order comes first, and stays where the other gains nothing.
    best, cuts = min(
        ((walk, walk.best_cuts(max_tokens)) for walk in walks),
        key=lambda found: (len(found[1]), found[0].repeated(found[1])),
    )
    if num_bins is not None:
        cuts = best.more_cuts(cuts, num_bins)
    bounds = [0, *cuts, len(arrays)]
    return [best.order[a:b] for a, b in pairwise(bounds)]


class _Walk:
    """The sequences in one depth-first order.

    Attributes:
        order: (N,) indices of the sequences.
        lengths: (N,) their tokens.
        shared: (N,) tokens that each shares with the one before it, zero for the first. Bins
            [a, b) of the order hold `sum(lengths[a:b]) - sum(shared[a + 1:b])` unique tokens, so
            a cut in front of b repeats `shared[b]` tokens.
    """

    def __init__(self, forest: Forest, children: list[list[int]]) -> None:
        ends = (forest.depths + forest.lengths).tolist()
        parents = forest.parents.tolist()
        sequence_of = {leaf: i for i, leaf in enumerate(forest.leaves.tolist())}
        self.order: list[int] = []
        self.shared: list[int] = []
        fork = 0  # depth at which the path to the next leaf leaves that to the last one
        stack = children[-1][::-1]
        while stack:
            segment = stack.pop()
            parent = parents[segment]
            fork = min(fork, ends[parent] if parent >= 0 else 0)
            if segment in sequence_of:
                self.order.append(sequence_of[segment])
                self.shared.append(fork)
                fork = ends[segment]
            stack += children[segment][::-1]
        self.lengths: list[int] = forest.sequence_lengths[self.order].tolist()
        own = np.array(self.lengths) - np.array(self.shared)
        self._before = [0, *np.cumsum(own).tolist()]  # unique tokens in front of each place

    def tokens(self, a: int, b: int) -> int:
        """Unique tokens of the bin [a, b)."""
        return self._before[b] - self._before[a] + self.shared[a]

    def repeated(self, cuts: list[int]) -> int:
        """Tokens that run once more because of the cuts."""
        return sum(self.shared[cut] for cut in cuts)

    def best_cuts(self, max_tokens: int) -> list[int]:
        """The places in front of which a bin begins, but for the first.

        The fewest cuts, and of those the ones that repeat the fewest tokens: the shortest path
        over places 0 to N, whose steps are bins that fit. A bin shrinks when it begins later, so
        the places from which place b can be reached are a window, kept sorted by cost.
        """
        count = len(self.order)
        cost = [(0, 0)] * (count + 1)
        came_from = [0] * (count + 1)
        window: deque[int] = deque()
        for b in range(1, count + 1):
            a = b - 1
            bins, repeated = cost[a]
            cost[a] = (bins, repeated + self.shared[a])  # of a bin that begins at a
            while window and cost[window[-1]] > cost[a]:
                window.pop()
            window.append(a)
            while self.tokens(window[0], b) > max_tokens:
                window.popleft()
            came_from[b] = window[0]
            bins, repeated = cost[window[0]]
            cost[b] = (bins + 1, repeated)
        cuts: list[int] = []
        place = came_from[count]
        while place:
            cuts.append(place)
            place = came_from[place]
        return cuts[::-1]

    def more_cuts(self, cuts: list[int], num_bins: int) -> list[int]:
        """Cuts bins in two, where that repeats the fewest tokens, until there are num_bins."""
        waiting: list[tuple[int, int, int, int, int]] = []

        def consider(a: int, b: int) -> None:
            if b - a < 2:
                return
            fewest = min(self.shared[a + 1 : b])
            places = (i for i in range(a + 1, b) if self.shared[i] == fewest)
            cut = min(places, key=lambda i: max(self.tokens(a, i), self.tokens(i, b)))
            heapq.heappush(waiting, (fewest, -self.tokens(a, b), a, b, cut))

        bounds = [0, *cuts, len(self.order)]
        for a, b in pairwise(bounds):
            consider(a, b)
        cuts = list(cuts)
        while len(cuts) + 1 < num_bins:
            *_, a, b, cut = heapq.heappop(waiting)
            cuts.append(cut)
            consider(a, cut)
            consider(cut, b)
        return sorted(cuts)


def _filling(forest: Forest, children: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Orders the children of every segment so that bins come out full.

    A walk that fills one bin after the other: next comes the largest sibling whose whole subtree
    still fits. Where none does, it enters the largest one that has children, or begins a new bin,
    which holds the path to here once more.
    """
    parents, lengths = forest.parents.tolist(), forest.lengths.tolist()
    ends = [*(forest.depths + forest.lengths).tolist(), 0]  # the last is that of no segment
    total = list(lengths)  # tokens of each subtree
    least = [0] * len(lengths)  # tokens from the first of a segment to its nearest leaf
    for segment in range(len(lengths) - 1, -1, -1):
        below = children[segment]
        least[segment] = lengths[segment] + min((least[child] for child in below), default=0)
        if parents[segment] >= 0:
            total[parents[segment]] += total[segment]

    ordered: list[list[int]] = [list(siblings) for siblings in children]
    room = max_tokens
    waiting = {-1: sorted(children[-1], key=total.__getitem__)}  # of the path, smallest first
    ordered[-1] = []
    path = [-1]
    while path:
        segment = path[-1]
        siblings = waiting[segment]
        if not siblings:
            path.pop()
            continue
        fits = bisect_right(siblings, room, key=total.__getitem__)
        if fits:
            child = siblings.pop(fits - 1)
            ordered[segment].append(child)
            room -= total[child]
            continue
        child = siblings[-1]
        if least[child] > room or not children[child]:
            room = max_tokens - ends[segment]
            if total[child] <= room:
                continue
        siblings.pop()
        ordered[segment].append(child)
        room -= lengths[child]
        waiting[child] = sorted(children[child], key=total.__getitem__)
        ordered[child] = []
        path.append(child)
    return ordered
