"""Forward pass: O = softmax(scale Q K^T) V over the keys that each row attends, and its LSE.

Grid: (query tiles x query heads,), in sections of heads whose K and V fit in the cache together,
the tiles of a section longest first, heads fastest. A program owns one query tile of one query head
and writes its rows of O and LSE. It runs over the key tiles that every row of the tile sees (those
of the ancestors from a shared list, then those of its own run), without a mask, and then over the
few that only some rows see, with the attention rule  c <= r < subtree_end[c].

A window shortens the lists, a softcap bends the scores, a sink starts the softmax: constants decide
about them, so that a kernel without them has nothing of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from prefix_attn.kernels.config import Config
from prefix_attn.kernels.options import Options
from prefix_attn.kernels.primitives import (
    LN2,
    LOG2E,
    accumulator,
    dot_precision,
    entry_and_head,
    forbid,
    key_rule,
    load_full,
    load_masked,
    log2_scale,
    needs_accurate_tanh,
    padded_dim,
    row_floor,
    scalar_argument,
    softmax_step,
    store_masked,
    tanh,
    tile_descriptor,
    tile_ptrs,
    triton_accumulator,
)


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "num_items", "heads_per_section", "window_size"]
)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, sinks_ptr, out_ptr, lse_ptr,
    rule_ptr, items_ptr, columns_ptr, masked_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_o_t, stride_o_h,
    num_queries, num_keys, num_items, heads_per_section, scale, softcap, window_size,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ACCURATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, head = entry_and_head(tl.program_id(0), num_items, heads_per_section)
    kv_head = head // GROUP
    item_ptr = items_ptr + item * 9
    row0 = tl.load(item_ptr)
    row1 = tl.load(item_ptr + 1)
    query0 = tl.load(item_ptr + 2)
    list0 = tl.load(item_ptr + 3)
    num_listed = tl.load(item_ptr + 4)
    own0 = tl.load(item_ptr + 5)
    num_own = tl.load(item_ptr + 6)
    masked0 = tl.load(item_ptr + 7)
    num_masked = tl.load(item_ptr + 8)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row0 + offs_m
    mask_m = rows < row1

    # [BLOCK_M, BLOCK_D]
    q_ptrs = tile_ptrs(q_ptr, query0, head, stride_q_t, stride_q_h, offs_m, offs_d)
    q = load_masked(q_ptrs, mask_m, offs_d, D, BLOCK_D)
    scale_log2 = log2_scale(scale, ACC)
    if NEGATIVE_SCALE:
        # The running maximum wants a scale that keeps the order.
        q = (-q.to(ACC)).to(q.dtype)
        scale_log2 = -scale_log2
    if SOFTCAP:
        cap_scale = tl.full([], scale, ACC) / softcap
        cap_log2 = log2_scale(softcap, ACC)
        scale_log2 = 1.0
    if SINKS:
        # A key with the score of the sink and a value of zero.
        m_i = tl.zeros([BLOCK_M], ACC) + tl.load(sinks_ptr + head).to(ACC) * LOG2E
        l_i = tl.full([BLOCK_M], 1.0, ACC)
    else:
        m_i = tl.full([BLOCK_M], -float("inf"), ACC)
        l_i = tl.zeros([BLOCK_M], ACC)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)

    for j in tl.range(0, num_listed + num_own, num_stages=NUM_STAGES):
        listed = tl.load(columns_ptr + list0 + j, mask=j < num_listed, other=0)
        col = tl.where(j < num_listed, listed, own0 + (j - num_listed) * BLOCK_N)
        if DESCRIPTORS:
            k = k_desc.load([col, kv_head * D])
        else:
            k_ptrs = tile_ptrs(k_ptr, col, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
            k = load_full(k_ptrs, offs_d, D, BLOCK_D)
        # S = Q K^T                                                                      (F1)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if SOFTCAP:
            # S = c tanh(scale Q K^T / c)                                               (F1')
            s = cap_log2 * tanh(s * cap_scale, ACCURATE)
        if DESCRIPTORS:
            v = v_desc.load([col, kv_head * DV])
        else:
            v_ptrs = tile_ptrs(v_ptr, col, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
            v = load_full(v_ptrs, offs_dv, DV, BLOCK_DV)
        acc, l_i, m_i = softmax_step(s, v, acc, l_i, m_i, scale_log2, PRECISION)

    floor = row_floor(rule_ptr, rows, mask_m, num_keys, window_size, WINDOW)
    for j in tl.range(0, num_masked, num_stages=1):
        col = tl.load(masked_ptr + 2 * (masked0 + j))
        col_end = tl.load(masked_ptr + 2 * (masked0 + j) + 1)
        cols = col + offs_n
        mask_n = cols < col_end
        # Keys past col_end belong to other tiles: no row sees them here.
        seen_from, seen_until, position = key_rule(rule_ptr, cols, mask_n, num_keys, CAUSAL, WINDOW)
        if DESCRIPTORS:
            # Keys of other tiles are masked below; values have to be zero where they are.
            k = k_desc.load([col, kv_head * D])
        else:
            k_ptrs = tile_ptrs(k_ptr, col, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
            k = load_masked(k_ptrs, mask_n, offs_d, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        s = cap_log2 * tanh(s * cap_scale, ACCURATE) if SOFTCAP else s * scale_log2
        s = forbid(
            s, rows[:, None], floor[:, None],
            seen_from[None, :], seen_until[None, :], position[None, :], WINDOW,
        )  # fmt: skip
        v_ptrs = tile_ptrs(v_ptr, col, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
        v = load_masked(v_ptrs, mask_n, offs_dv, DV, BLOCK_DV)
        acc, l_i, m_i = softmax_step(s, v, acc, l_i, m_i, 1.0, PRECISION)

    # O = O' / l,  LSE = ln 2 (m + log2 l)                                               (F5)
    out_ptrs = tile_ptrs(out_ptr, query0, head, stride_o_t, stride_o_h, offs_m, offs_dv)
    store_masked(out_ptrs, acc / l_i[:, None], mask_m, offs_dv, DV, BLOCK_DV)
    lse = (m_i + tl.math.log2(l_i)) * LN2
    lse_ptrs = lse_ptr + head.to(tl.int64) * num_queries + query0 + offs_m
    tl.store(lse_ptrs, lse, mask=mask_m)


@dataclass(frozen=True, eq=False)
class ForwardTables:
    """Device copies of a schedule: int32, shapes as in `prefix_attn.backends.schedule.QueryTiles`.

    `rule` is (1, T) or, with options, (4, T): the end of the rows that see each key; the first of
    these rows; positions; the packed rows of the queries.
    """

    rule: torch.Tensor
    items: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    tables: ForwardTables,
    options: Options,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the forward kernel.

    Args:
        q: (Tq, Hq, D), last dimension contiguous.
        k: (T, Hkv, D), likewise.
        v: (T, Hkv, DV), likewise.
        sinks: (Hq,), or None.
        tables: work list made for `config.forward`.
        options: of the call.
        config: tile shapes.

    Returns:
        out (Tq, Hq, DV) and lse (Hq, Tq), natural log.
    """
    num_queries, num_heads, head_dim = q.shape
    head_dim_v = v.shape[2]
    out = q.new_empty(num_queries, num_heads, head_dim_v)
    lse = q.new_empty(num_heads, num_queries, dtype=accumulator(q.dtype))
    descriptors = config.forward_descriptors
    num_items, group = tables.items.shape[0], num_heads // k.shape[1]
    section = config.heads_per_section(
        k.shape[1], k.shape[0] * (head_dim + head_dim_v) * k.itemsize
    )
    grid = (num_items * num_heads,)
    forward_kernel[grid](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        k_desc=tile_descriptor(k, config.forward.block_n) if descriptors else k,
        v_desc=tile_descriptor(v, config.forward.block_n) if descriptors else v,
        sinks_ptr=lse if sinks is None else sinks,
        out_ptr=out,
        lse_ptr=lse,
        rule_ptr=tables.rule,
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
        num_queries=num_queries,
        num_keys=k.shape[0],
        num_items=num_items,
        heads_per_section=section * group,
        scale=scalar_argument(options.scale, q.dtype),
        softcap=scalar_argument(options.softcap or 1.0, q.dtype),
        window_size=options.window_size or 0,
        GROUP=group,
        D=head_dim,
        DV=head_dim_v,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_DV=padded_dim(head_dim_v),
        BLOCK_M=config.forward.block_m,
        BLOCK_N=config.forward.block_n,
        NUM_STAGES=config.forward.num_stages,
        NEGATIVE_SCALE=options.scale < 0 and options.softcap is None,
        CAUSAL=options.prefix_causal,
        WINDOW=options.window_size is not None,
        SOFTCAP=options.softcap is not None,
        SINKS=sinks is not None,
        ACCURATE=needs_accurate_tanh(q.dtype, options.softcap),
        DESCRIPTORS=descriptors,
        ACC=triton_accumulator(q.dtype),
        PRECISION=dot_precision(q.dtype),
        num_warps=config.forward_warps,
        enable_fp_fusion=True,
    )
    return out, lse
