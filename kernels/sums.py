"""What is summed before and after the backward kernel: delta, and partial sums of dK and dV."""

import triton
import triton.language as tl

from prefix_attn.kernels.arguments import Rows
from prefix_attn.kernels.primitives import LOG2E, by_eights, load_rows, store_rows, zero_tile

DELTA_BLOCK_M = 64
# Entries of the tiles in which partial sums are added: more leave no registers.
REDUCED_TILE = 1 << 14


@triton.jit(do_not_specialize=["num_queries"])
def delta_kernel(
    out_rows, dout_rows, lse_ptr, dlse_ptr, delta_ptr, lse_log2_ptr, num_queries,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr, ACC: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Delta, and the LSE in log2 units, of BLOCK_M queries of one query head.

    They are (Hq, Tq), as dLSE is; grid (tiles, query heads).
    """
    out_rows, dout_rows = by_eights(out_rows, EIGHTS), by_eights(dout_rows, EIGHTS)
    row0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    # [BLOCK_M]
    rows = row0 + offs_m
    mask_m = rows < num_queries
    # [BLOCK_M, BLOCK_DV]
    o = load_rows(out_rows, row0, head, mask_m, offs_m, COLUMNS)
    do = load_rows(dout_rows, row0, head, mask_m, offs_m, COLUMNS)
    # delta = sum_d dO O - dLSE                                                          (B1)
    # [BLOCK_M]
    delta = tl.sum(o[0].to(ACC) * do[0].to(ACC), 1)
    flat = head.to(tl.int64) * num_queries + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + flat, mask=mask_m, other=0.0)
    tl.store(delta_ptr + flat, delta, mask=mask_m)
    lse = tl.load(lse_ptr + flat, mask=mask_m, other=0.0)
    tl.store(lse_log2_ptr + flat, lse * LOG2E, mask=mask_m)


@triton.jit
def part_rows(ptr, D: tl.constexpr):
    """Partial sums as rows without heads."""
    return Rows(ptr, D, 0)


@triton.jit
def reduce_kernel(
    part_ptr, grad_rows, splits_ptr, num_kv_heads,
    COLUMNS: tl.constexpr, PART_N: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of BLOCK_N keys of a split key tile, in the order of their slots.

    Grid (split key tiles of PART_N keys, KV heads, blocks of a tile).
    """
    # A row of (n, 4) `schedule.KeyTiles.splits`.
    split_ptr = splits_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    col0 = tl.load(split_ptr)
    col1 = tl.load(split_ptr + 1)
    offs_n = tl.arange(0, BLOCK_N)
    if BLOCK_N < PART_N:
        offs_n += tl.program_id(2) * BLOCK_N
    mask_n = col0 + offs_n < col1
    # [BLOCK_N, BLOCK_D]
    acc = zero_tile(BLOCK_N, COLUMNS.widths[0], ACC)
    slot0 = tl.load(split_ptr + 2)
    for i in tl.range(0, tl.load(split_ptr + 3) - slot0):
        part = ((slot0 + i).to(tl.int64) * num_kv_heads + kv_head) * PART_N
        rows = part_rows(part_ptr, COLUMNS.size)
        acc += load_rows(rows, part, kv_head, mask_n, offs_n, COLUMNS)[0]
    store_rows(grad_rows, col0, kv_head, (acc,), mask_n, offs_n, COLUMNS)
