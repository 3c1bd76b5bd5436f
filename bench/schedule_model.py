"""Simulates how evenly the work lists fill 132 multiprocessors: `python -m bench.schedule_model`.

Programs start in list order, each on the multiprocessor that is free first, as the hardware does.
The efficiency is the time that perfectly even work would take over the time of the last program,
with costs in the units of `prefix_attn.schedule`.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch

from prefix_attn.kernels.config import select_config
from prefix_attn.schedule import (
    Forest,
    KeyTiles,
    QueryTiles,
    backward_order,
    balanced_key_tiles,
)

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


def efficiency(costs: np.ndarray, heads: int, slots: int) -> float:
    """Even time over makespan of a work list whose entries run once per head, heads fastest."""
    free = [0.0] * slots
    for cost in np.repeat(costs, heads).tolist():
        heapq.heapreplace(free, free[0] + cost)
    return float(costs.sum()) * heads / slots / max(free)


def main() -> None:
    """Prints one line per shape."""
    group = HEADS_Q // HEADS_KV
    print(
        f"even time / makespan on {PROCESSORS} multiprocessors, {HEADS_Q}/{HEADS_KV} heads, "
        f"D {HEAD_DIM};\nforward with 1 and with 2 programs per multiprocessor, backward with 1\n"
    )
    print(
        f"{'P':>6} {'S':>5} {'G':>3}  {'forward 1':>9} {'forward 2':>9} {'backward':>9}  "
        f"{'dK/dV alone':>11} {'unsplit':>8}  {'slots':>5} {'MiB':>6}"
    )
    for prefix, suffix, members in SHAPES:
        lengths = np.array([prefix] + [suffix] * members)
        parents = np.array([-1] + [0] * members)
        forest = Forest.from_segments(lengths, parents)
        forward = QueryTiles.from_forest(forest, *FORWARD_TILE)
        queries = QueryTiles.from_forest(forest, *QUERY_TILE)
        whole = KeyTiles.from_forest(forest, *KEY_TILE)
        keys = balanced_key_tiles(
            forest, *KEY_TILE, heads=HEADS_KV, group=group, processors=PROCESSORS
        )
        _, backward = backward_order(keys, queries, CONFIG.keys.area, CONFIG.queries.area, group)
        # Two float32 partial sums, of dK and of dV, per slot and KV head.
        mib = keys.num_slots * KEY_TILE[1] * HEAD_DIM * 2 * 4 * HEADS_KV / 2**20
        print(
            f"{prefix:6} {suffix:5} {members:3}  "
            f"{efficiency(forward.costs, HEADS_Q, PROCESSORS):9.3f} "
            f"{efficiency(forward.costs, HEADS_Q, 2 * PROCESSORS):9.3f} "
            f"{efficiency(backward, HEADS_KV, PROCESSORS):9.3f}  "
            f"{efficiency(keys.costs, HEADS_KV, PROCESSORS):11.3f} "
            f"{efficiency(whole.costs, HEADS_KV, PROCESSORS):8.3f}  "
            f"{keys.num_slots:5} {mib:6.1f}"
        )


if __name__ == "__main__":
    main()
