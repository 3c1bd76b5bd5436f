"""Simulates how evenly the work lists fill 132 multiprocessors: `python -m bench.schedule_model`.

Programs start in list order, each on the multiprocessor that is free first, as the hardware does.
The efficiency is the time that perfectly even work would take over the time of the last program,
with costs in the units of `prefix_attn.backends.schedule`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch

from prefix_attn import PrefixLayout
from prefix_attn.backends.schedule import (
    Forest,
    KeyTiles,
    QueryTiles,
    backward_order,
    balanced_key_tiles,
)
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


@dataclass(frozen=True)
class Modelled:
    """Efficiencies of one shape.

    Attributes:
        forward: with one program per multiprocessor, and with two, which are modelled as twice as
            many slower multiprocessors.
        backward: of the launch for dQ, dK and dV.
        keys: of dK and dV alone.
        unsplit: of dK and dV alone without splitting long key tiles.
        slots: partial sums of split tiles.
        workspace: of the partial sums in MiB.
    """

    forward: tuple[float, float]
    backward: float
    keys: float
    unsplit: float
    slots: int
    workspace: float

    @classmethod
    def from_shape(cls, prefix: int, suffix: int, members: int) -> Modelled:
        """Simulates a group of equal members."""
        group = HEADS_Q // HEADS_KV
        layout = PrefixLayout.from_lengths([prefix], [[suffix] * members])
        forest = Forest.from_segments(layout.segments.numpy())
        forward = QueryTiles.from_forest(forest, *FORWARD_TILE)
        queries = QueryTiles.from_forest(forest, *QUERY_TILE)
        whole = KeyTiles.from_forest(forest, *KEY_TILE)
        keys = balanced_key_tiles(
            forest, *KEY_TILE, heads=HEADS_KV, group=group, processors=PROCESSORS
        )
        _, backward = backward_order(keys, queries, CONFIG.keys.area, CONFIG.queries.area, group)
        head_bytes = layout.num_tokens * 2 * HEAD_DIM * 2  # K and V of a head in bfloat16
        kv_heads = CONFIG.heads_per_section(HEADS_KV, head_bytes)
        backward_heads = CONFIG.heads_per_section(HEADS_KV, head_bytes * (1 + group))
        return cls(
            forward=(
                efficiency(forward.costs, HEADS_Q, PROCESSORS, kv_heads * group),
                efficiency(forward.costs, HEADS_Q, 2 * PROCESSORS, kv_heads * group),
            ),
            backward=efficiency(backward, HEADS_KV, PROCESSORS, backward_heads),
            keys=efficiency(keys.costs, HEADS_KV, PROCESSORS, backward_heads),
            unsplit=efficiency(whole.costs, HEADS_KV, PROCESSORS, backward_heads),
            slots=keys.num_slots,
            # Two float32 partial sums, of dK and of dV, per slot and KV head.
            workspace=keys.num_slots * KEY_TILE[1] * HEAD_DIM * 2 * 4 * HEADS_KV / 2**20,
        )


def markdown() -> str:
    """The table of the documentation."""
    lines = [
        "| P | S | G | forward, 1 program | forward, 2 programs | backward | dK, dV unsplit "
        "| workspace MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        x = Modelled.from_shape(*shape)
        efficiencies = (*x.forward, x.backward, x.unsplit)
        cells = [*map(str, shape), *(f"{e:.3f}" for e in efficiencies), f"{x.workspace:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints one line per shape."""
    print(
        f"even time / makespan on {PROCESSORS} multiprocessors, {HEADS_Q}/{HEADS_KV} heads, "
        f"D {HEAD_DIM};\nforward with 1 and with 2 programs per multiprocessor, backward with 1\n"
    )
    print(
        f"{'P':>6} {'S':>5} {'G':>3}  {'forward 1':>9} {'forward 2':>9} {'backward':>9}  "
        f"{'dK/dV alone':>11} {'unsplit':>8}  {'slots':>5} {'MiB':>6}"
    )
    for prefix, suffix, members in SHAPES:
        x = Modelled.from_shape(prefix, suffix, members)
        print(
            f"{prefix:6} {suffix:5} {members:3}  {x.forward[0]:9.3f} {x.forward[1]:9.3f} "
            f"{x.backward:9.3f}  {x.keys:11.3f} {x.unsplit:8.3f}  {x.slots:5} {x.workspace:6.1f}"
        )


if __name__ == "__main__":
    main()
