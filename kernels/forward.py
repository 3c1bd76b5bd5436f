"""Forward pass: O = softmax(scale Q K^T) V over the keys that each row attends, and its LSE.

Grid: (query tiles x query heads,), heads fastest. A program owns one query tile of one query head
and writes its rows of O and LSE. It runs over the key tiles that every row of the tile sees (those
of the ancestors from a shared list, then those of its own run), without a mask, and then over the
few that only some rows see, with the attention rule  c <= r < subtree_end[c].
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from prefix_attn.kernels.config import Config
from prefix_attn.kernels.primitives import (
    FORBIDDEN,
    LN2,
    accumulator,
    dot_precision,
    load_full,
    load_masked,
    log2_scale,
    scale_argument,
    softmax_step,
    store_masked,
    tile_ptrs,
    triton_accumulator,
)


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    subtree_end_ptr, items_ptr, columns_ptr, masked_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_o_t, stride_o_h,
    num_tokens, num_heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % num_heads
    kv_head = head // GROUP
    item_ptr = items_ptr + (pid // num_heads) * 8
    row0 = tl.load(item_ptr)
    row1 = tl.load(item_ptr + 1)
    list0 = tl.load(item_ptr + 2)
    num_listed = tl.load(item_ptr + 3)
    own0 = tl.load(item_ptr + 4)
    num_own = tl.load(item_ptr + 5)
    masked0 = tl.load(item_ptr + 6)
    num_masked = tl.load(item_ptr + 7)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row0 + offs_m
    mask_m = rows < row1

    # [BLOCK_M, BLOCK_D]
    q_ptrs = tile_ptrs(q_ptr, row0, head, stride_q_t, stride_q_h, offs_m, offs_d)
    q = load_masked(q_ptrs, mask_m, offs_d, D, BLOCK_D)
    scale_log2 = log2_scale(scale, ACC)
    if NEGATIVE_SCALE:
        # The running maximum wants a scale that keeps the order.
        q = (-q).to(q.dtype)
        scale_log2 = -scale_log2
    m_i = tl.full([BLOCK_M], -float("inf"), ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)

    for j in tl.range(0, num_listed + num_own, num_stages=NUM_STAGES):
        listed = tl.load(columns_ptr + list0 + j, mask=j < num_listed, other=0)
        col = tl.where(j < num_listed, listed, own0 + (j - num_listed) * BLOCK_N)
        k_ptrs = tile_ptrs(k_ptr, col, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
        k = load_full(k_ptrs, offs_d, D, BLOCK_D)
        # S = Q K^T                                                                      (F1)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        v_ptrs = tile_ptrs(v_ptr, col, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
        v = load_full(v_ptrs, offs_dv, DV, BLOCK_DV)
        acc, l_i, m_i = softmax_step(s, v, acc, l_i, m_i, scale_log2, PRECISION)

    for j in tl.range(0, num_masked, num_stages=1):
        col = tl.load(masked_ptr + 2 * (masked0 + j))
        col_end = tl.load(masked_ptr + 2 * (masked0 + j) + 1)
        cols = col + offs_n
        mask_n = cols < col_end
        # Keys past col_end belong to other tiles: no row sees them here.
        seen_until = tl.load(subtree_end_ptr + cols, mask=mask_n, other=0)
        k_ptrs = tile_ptrs(k_ptr, col, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
        k = load_masked(k_ptrs, mask_n, offs_d, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale_log2
        s = tl.where(
            (cols[None, :] <= rows[:, None]) & (rows[:, None] < seen_until[None, :]), s, FORBIDDEN
        )
        v_ptrs = tile_ptrs(v_ptr, col, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
        v = load_masked(v_ptrs, mask_n, offs_dv, DV, BLOCK_DV)
        acc, l_i, m_i = softmax_step(s, v, acc, l_i, m_i, 1.0, PRECISION)

    # O = O' / l,  LSE = ln 2 (m + log2 l)                                               (F5)
    out_ptrs = tile_ptrs(out_ptr, row0, head, stride_o_t, stride_o_h, offs_m, offs_dv)
    store_masked(out_ptrs, acc / l_i[:, None], mask_m, offs_dv, DV, BLOCK_DV)
    lse = (m_i + tl.math.log2(l_i)) * LN2
    lse_ptrs = lse_ptr + head.to(tl.int64) * num_tokens + rows
    tl.store(lse_ptrs, lse, mask=mask_m)


@dataclass(frozen=True, eq=False)
class ForwardTables:
    """Device copies of a schedule: int32, shapes as in `prefix_attn.schedule.QueryTiles`.

    `subtree_end` is (T,): the attention rule.
    """

    subtree_end: torch.Tensor
    items: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: ForwardTables,
    scale: float,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the forward kernel.

    Args:
        q: (T, Hq, D), last dimension contiguous.
        k: (T, Hkv, D), likewise.
        v: (T, Hkv, DV), likewise.
        tables: work list made for `config.forward`.
        scale: factor of the scores.
        config: tile shapes.

    Returns:
        out (T, Hq, DV) and lse (Hq, T), natural log.
    """
    num_tokens, num_heads, head_dim = q.shape
    head_dim_v = v.shape[2]
    out = q.new_empty(num_tokens, num_heads, head_dim_v)
    lse = q.new_empty(num_heads, num_tokens, dtype=accumulator(q.dtype))
    grid = (tables.items.shape[0] * num_heads,)
    forward_kernel[grid](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        subtree_end_ptr=tables.subtree_end,
        items_ptr=tables.items,
        columns_ptr=tables.columns,
        masked_ptr=tables.masked,
        stride_q_t=q.stride(0),
        stride_q_h=q.stride(1),
        stride_k_t=k.stride(0),
        stride_k_h=k.stride(1),
        stride_v_t=v.stride(0),
        stride_v_h=v.stride(1),
        stride_o_t=out.stride(0),
        stride_o_h=out.stride(1),
        num_tokens=num_tokens,
        num_heads=num_heads,
        scale=scale_argument(scale, q.dtype),
        GROUP=num_heads // k.shape[1],
        D=head_dim,
        DV=head_dim_v,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_DV=triton.next_power_of_2(head_dim_v),
        BLOCK_M=config.forward.block_m,
        BLOCK_N=config.forward.block_n,
        NUM_STAGES=config.forward.num_stages,
        NEGATIVE_SCALE=scale < 0,
        ACC=triton_accumulator(q.dtype),
        PRECISION=dot_precision(q.dtype),
        num_warps=config.forward_warps,
        enable_fp_fusion=True,
    )
    return out, lse
