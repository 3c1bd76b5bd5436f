"""Random forests for property tests."""

from __future__ import annotations

from typing import Any


def forests(
    max_segments: int = 7,
    max_length: int = 45,
    *,
    min_segments: int = 1,
    min_length: int = 0,
    lengths: list[int] | None = None,
) -> Any:
    """A hypothesis strategy of `(lengths, parents)` in depth-first order.

    Args:
        max_segments: segments at most.
        max_length: tokens in a segment at most.
        min_segments: segments at least.
        min_length: tokens in a segment at least; there are empty ones by default.
        lengths: or the only lengths that segments have.
    """
    from hypothesis import strategies as st

    length = st.integers(min_length, max_length) if lengths is None else st.sampled_from(lengths)

    @st.composite
    def draw_forest(draw: Any) -> tuple[list[int], list[int]]:
        count = draw(st.integers(min_segments, max_segments))
        parents: list[int] = []
        path: list[int] = []
        for i in range(count):
            path = path[: draw(st.integers(0, len(path)))]
            parents.append(path[-1] if path else -1)
            path.append(i)
        return draw(st.lists(length, min_size=count, max_size=count)), parents

    return draw_forest()
