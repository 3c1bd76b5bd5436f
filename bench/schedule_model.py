"""Simulates how evenly the work lists fill 132 multiprocessors: `python -m bench.schedule_model`.

Programs start in list order, each on the multiprocessor that is free first, as the hardware does.
The efficiency is the time that perfectly even work would take over the time of the last program,
with costs in the units of `prefix_attn.backends.schedule`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import torch

from bench import tables
from prefix_attn import PrefixLayout
from prefix_attn.backends.schedule import (
    KeyTiles,
    QueryTiles,
    backward_order,
    balanced_key_tiles,
)
from prefix_attn.forest import Forest
from prefix_attn.kernels.config import select_config

PROCESSORS = 132
HEADS_Q, HEADS_KV, HEAD_DIM = 32, 8, 128
CONFIG = select_config(90, HEAD_DIM, torch.bfloat16, PROCESSORS)
FORWARD_TILE, KEY_TILE, QUERY_TILE = (
    (tile.block_m, tile.block_n) for tile in (CONFIG.forward, CONFIG.keys, CONFIG.queries)
)

# Prefix, suffix, members.
SHAPES = (
    (512, 128, 8),
    (512, 1024, 16),
    (512, 4096, 16),
    (512, 1024, 64),
    (1024, 1024, 8),
    (1024, 1024, 64),
    (2048, 512, 16),
    (4096, 512, 8),
    (4096, 1024, 16),
    (8192, 1024, 16),
    (8192, 4096, 8),
    (16384, 512, 16),
    (32768, 1024, 8),
)


def efficiency(costs: np.ndarray, heads: int, slots: int, section: int | None = None) -> float:
    """Even time over makespan of a work list whose entries run once per head.

    Sections of `section` heads, all by default, follow one another; in each, heads run fastest.
    """
    section = section or heads
    free = [0.0] * slots
    for cost in np.tile(np.repeat(costs, section), heads // section).tolist():
        heapq.heapreplace(free, free[0] + cost)
    return float(costs.sum()) * heads / slots / max(free)


def modelled(prefix: int, suffix: int, members: int) -> tuple[list[float], float]:
    """Simulates a group of equal members.

    Returns:
        Efficiencies as in `HEADER`, where two programs per multiprocessor are modelled as twice as
        many slower multiprocessors, and MiB of partial sums.
    """
    group = HEADS_Q // HEADS_KV
    layout = PrefixLayout.from_lengths([prefix], [[suffix] * members])
    forest = Forest.from_segments(layout.segments.numpy())
    forward = QueryTiles.from_forest(forest, *FORWARD_TILE)
    queries = QueryTiles.from_forest(forest, *QUERY_TILE)
    whole = KeyTiles.from_forest(forest, *KEY_TILE)
    keys = balanced_key_tiles(forest, *KEY_TILE, heads=HEADS_KV, group=group, processors=PROCESSORS)
    _, backward = backward_order(keys, queries, CONFIG.keys.area, CONFIG.queries.area, group)
    head_bytes = layout.num_tokens * 2 * HEAD_DIM * 2  # K and V of a head in bfloat16
    query_heads = group * CONFIG.heads_per_section(HEADS_KV, head_bytes)
    kv_heads = CONFIG.heads_per_section(HEADS_KV, head_bytes * (1 + group))
    efficiencies = [
        *(efficiency(forward.costs, HEADS_Q, n * PROCESSORS, query_heads) for n in (1, 2)),
        *(
            efficiency(x, HEADS_KV, PROCESSORS, kv_heads)
            for x in (backward, keys.costs, whole.costs)
        ),
    ]
    # Two float32 partial sums, of dK and of dV, per slot and KV head.
    return efficiencies, keys.num_slots * KEY_TILE[1] * HEAD_DIM * 2 * 4 * HEADS_KV / 2**20


HEADER = (
    "P", "S", "G", "forward, 1 program", "forward, 2 programs", "backward", "dK, dV alone",
    "dK, dV unsplit", "workspace MiB",
)  # fmt: skip


def rows() -> Iterator[tuple[str, ...]]:
    """One row per shape."""
    for shape in SHAPES:
        efficiencies, workspace = modelled(*shape)
        yield (*map(str, shape), *(f"{e:.3f}" for e in efficiencies), f"{workspace:.0f}")


def markdown() -> str:
    """The table of the documentation."""
    return tables.markdown(HEADER, rows(), "r" * len(HEADER))


def main() -> None:
    """Prints the same as text."""
    print(
        f"even time / makespan on {PROCESSORS} multiprocessors, {HEADS_Q}/{HEADS_KV} heads, "
        f"D {HEAD_DIM};\nforward with 1 and with 2 programs per multiprocessor, backward with 1\n"
    )
    print(tables.text([HEADER, *rows()], "r" * len(HEADER)))


if __name__ == "__main__":
    main()
