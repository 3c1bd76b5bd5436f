"""What is summed before and after the backward kernel: delta, and partial sums of dK and dV."""

import triton
import triton.language as tl

from prefix_attn.kernels.primitives import (
    LOG2E,
    by_eights,
    load_masked,
    store_masked,
    tile_ptrs,
)

DELTA_BLOCK_M = 64
# Entries of the tiles in which partial sums are added: more leave no registers.
REDUCED_TILE = 1 << 14


@triton.jit(do_not_specialize=["num_queries"])
def delta_kernel(
    out_rows, dout_rows, lse_ptr, dlse_ptr, delta_ptr, lse_log2_ptr, num_queries,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr, ACC: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Delta, and the LSE in log2 units, of BLOCK_M queries of one query head.

    They are (Hq, Tq), as dLSE is; grid (tiles, query heads).
    """
    out_rows, dout_rows = by_eights(out_rows, EIGHTS), by_eights(dout_rows, EIGHTS)
    row0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    # [BLOCK_M]
    rows = row0 + offs_m
    mask_m = rows < num_queries
    # [BLOCK_M, BLOCK_DV]
    o_ptrs = tile_ptrs(out_rows, row0, head, offs_m, offs_dv)
    do_ptrs = tile_ptrs(dout_rows, row0, head, offs_m, offs_dv)
    o = load_masked(o_ptrs, mask_m, offs_dv, DV).to(ACC)
    do = load_masked(do_ptrs, mask_m, offs_dv, DV).to(ACC)
    # delta = sum_d dO O - dLSE                                                          (B1)
    # [BLOCK_M]
    delta = tl.sum(o * do, 1)
    flat = head.to(tl.int64) * num_queries + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + flat, mask=mask_m, other=0.0)
    tl.store(delta_ptr + flat, delta, mask=mask_m)
    lse = tl.load(lse_ptr + flat, mask=mask_m, other=0.0)
    tl.store(lse_log2_ptr + flat, lse * LOG2E, mask=mask_m)


@triton.jit
def part_ptrs(ptr, row, offs_n, offs_d, D: tl.constexpr):
    """Addresses of rows [row + offs_n] of partial sums."""
    # [BLOCK_N, BLOCK_D]
    return ptr + row * D + offs_n[:, None] * D + offs_d[None, :]


@triton.jit
def reduce_kernel(
    part_ptr, grad_rows, splits_ptr, num_kv_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART_N: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
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
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = col0 + offs_n < col1
    # [BLOCK_N, BLOCK_D]
    acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    slot0 = tl.load(split_ptr + 2)
    for i in tl.range(0, tl.load(split_ptr + 3) - slot0):
        part = ((slot0 + i).to(tl.int64) * num_kv_heads + kv_head) * PART_N
        acc += load_masked(part_ptrs(part_ptr, part, offs_n, offs_d, D), mask_n, offs_d, D)
    grad_ptrs = tile_ptrs(grad_rows, col0, kv_head, offs_n, offs_d)
    store_masked(grad_ptrs, acc, mask_n, offs_d, D)
