"""What is summed before and after the backward kernel: delta, and partial sums of dK and dV."""

import torch
import triton
import triton.language as tl

from prefix_attn.kernels.arguments import Columns, Heads, Mode, Rows
from prefix_attn.kernels.launch import Launch, are_aligned
from prefix_attn.kernels.primitives import (
    LOG2E,
    by_eights,
    load_rows,
    store_rows,
    suits_eights,
    zero_tile,
)

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


class DeltaLaunch:
    """The kernel of delta, for calls of one kind: shapes, strides and dtypes."""

    def __init__(
        self,
        out: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        heads: Heads,
        mode: Mode,
    ) -> None:
        """Fixes all arguments of the kernel but tensors.

        Args:
            out: (Tq, Hq, DV), last dimension contiguous.
            dout: likewise.
            dlse: (Hq, Tq), contiguous, or None.
            heads: of the call.
            mode: of the call.
        """
        num_queries, num_heads, head_dim_v = out.shape
        self._strides = [x.stride()[:2] for x in (out, dout)]
        constants = {
            "num_queries": num_queries,
            "COLUMNS": Columns.of(head_dim_v, in_two=False),
            "BLOCK_M": DELTA_BLOCK_M,
            "HAS_DLSE": dlse is not None,
            "ACC": mode.acc,
            "EIGHTS": suits_eights(heads, out, dout),
        }
        grid = (triton.cdiv(num_queries, DELTA_BLOCK_M), num_heads, 1)
        self._launch = Launch(delta_kernel, grid, constants, num_warps=4, enable_fp_fusion=True)

    def __call__(
        self, out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the kernel: delta and the LSE in log2 units, (Hq, Tq) as lse is."""
        delta, lse_log2 = torch.empty_like(lse), torch.empty_like(lse)
        dlse = lse if dlse is None else dlse
        of_out, of_dout = self._strides
        self._launch(
            aligned=are_aligned(out, dout, lse, dlse, delta, lse_log2),
            out_rows=Rows(out, *of_out),
            dout_rows=Rows(dout, *of_dout),
            lse_ptr=lse,
            dlse_ptr=dlse,
            delta_ptr=delta,
            lse_log2_ptr=lse_log2,
        )
        return delta, lse_log2


class ReduceLaunch:
    """The kernel that adds the partial sums of one work list of key tiles."""

    def __init__(self, splits: torch.Tensor, grad: torch.Tensor, part_n: int, mode: Mode) -> None:
        """Fixes all arguments of the kernel but tensors.

        Args:
            splits: (n, 4), of `schedule.KeyTiles`.
            grad: (T, Hkv, D), what the sums become.
            part_n: keys of a tile.
            mode: of the call.
        """
        _, num_kv_heads, head_dim = grad.shape
        columns = Columns.of(head_dim, in_two=False)
        block_n = min(part_n, REDUCED_TILE // columns.widths[0])
        self._strides = grad.stride()[:2]
        constants = {
            "splits_ptr": splits,
            "num_kv_heads": num_kv_heads,
            "COLUMNS": columns,
            "PART_N": part_n,
            "BLOCK_N": block_n,
            "ACC": mode.acc,
        }
        grid = (splits.shape[0], num_kv_heads, part_n // block_n)
        self._launch = Launch(reduce_kernel, grid, constants, num_warps=4, enable_fp_fusion=True)

    def __call__(self, part: torch.Tensor, grad: torch.Tensor) -> None:
        """Adds (slots, Hkv, part_n, D) up in grad."""
        aligned = are_aligned(part, grad)
        self._launch(aligned=aligned, part_ptr=part, grad_rows=Rows(grad, *self._strides))
