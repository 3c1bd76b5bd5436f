"""Backward pass: dQ, dK and dV in one launch; deterministic and without atomics, unless fused.

A preprocess computes delta. Then one grid (work entries x KV heads, in sections of heads as in the
forward pass) holds two kinds of programs, longest first:

* A program that owns a key tile of one KV head runs over the rows that see it, for every query head
  of that KV head: the sum over the members of a group is this loop. Keys with a long range of rows
  are shared by several programs, each of which writes a partial sum in float32; a last small kernel
  adds these in a fixed order.
* A program that owns a query tile of one query head runs over the keys that it sees, as in the
  forward pass, and writes dQ.

Where the caller gives up the same bits in every run, there are programs that own keys only. They
add dS K to a float32 sum of dQ by TMA: S and dP are computed once, five products instead of seven.

The full loop comes first in both: a masked loop before it would be serialised by the compiler.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from prefix_attn.kernels.config import Config
from prefix_attn.kernels.options import Options
from prefix_attn.kernels.primitives import (
    INTERPRETED,
    LOG2E,
    accumulator,
    dot_precision,
    entry_and_head,
    forbid,
    key_rule,
    load_full,
    load_masked,
    needs_accurate_tanh,
    padded_dim,
    row_floor,
    scalar_argument,
    store_masked,
    tanh,
    tile_descriptor,
    tile_ptrs,
    triton_accumulator,
)

DELTA_BLOCK_M = 64


@triton.jit(do_not_specialize=["num_queries"])
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    stride_o_t, stride_o_h, stride_do_t, stride_do_h,
    num_queries,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row0 + offs_m
    mask_m = rows < num_queries
    o_ptrs = tile_ptrs(out_ptr, row0, head, stride_o_t, stride_o_h, offs_m, offs_dv)
    do_ptrs = tile_ptrs(dout_ptr, row0, head, stride_do_t, stride_do_h, offs_m, offs_dv)
    o = load_masked(o_ptrs, mask_m, offs_dv, DV, BLOCK_DV).to(ACC)
    do = load_masked(do_ptrs, mask_m, offs_dv, DV, BLOCK_DV).to(ACC)
    # delta = sum_d dO O - dLSE                                                          (B1)
    delta = tl.sum(o * do, 1)
    flat = head.to(tl.int64) * num_queries + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + flat, mask=mask_m, other=0.0)
    tl.store(delta_ptr + flat, delta, mask=mask_m)


@triton.jit
def exponent_of(s, lse_log2, scale, softcap, SOFTCAP: tl.constexpr, ACCURATE: tl.constexpr):
    """S - LSE in log2 units from Q K^T, and the slope of the softcap; lse_log2 comes expanded."""
    slope = s
    if SOFTCAP:
        # S = c tanh(scale Q K^T / c),  dS / d(scale Q K^T) = 1 - tanh^2                  (B2')
        t = tanh(s * (scale / softcap), ACCURATE)
        slope = 1.0 - t * t
        s = t * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    return s - lse_log2, slope


@triton.jit
def key_step(
    q, do, k, v, lse_log2, delta, dk, dv, scale, softcap,
    rows, floor, seen_from, seen_until, position,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one row tile to dK (without the scale) and dV; scores are [BLOCK_N, BLOCK_M]."""
    # S^T = K Q^T,  dP^T = V dO^T                                                        (B2)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dk.dtype)
    # P = 2^(S - LSE); a forbidden exponent makes P, and with it dS, zero                (B3)
    exponent, slope = exponent_of(s, lse_log2[None, :], scale, softcap, SOFTCAP, ACCURATE)
    if MASKED:
        exponent = forbid(
            exponent, rows[None, :], floor[None, :],
            seen_from[:, None], seen_until[:, None], position[:, None], WINDOW,
        )  # fmt: skip
    p = tl.math.exp2(exponent)
    # dV += P^T dO                                                                       (B4)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dv.dtype)
    # dS = P (dP - delta)                                                                (B5)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    # dK += dS^T Q                                                                       (B6)
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv, ds


@triton.jit
def add_to_queries(
    ds, k, dq_ptr, dq_desc, row, head, num_heads, mask_m, offs_m, offs_d,
    D: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds dS K of one row tile to a sum (Tq, Hq, D) of dQ, without the scale, in any order."""
    # dQ += dS K                                                                         (B8)
    if ds.shape[1] < 64:
        # Hopper's instruction takes 64 rows at least, which dQ^T has.
        dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION, out_dtype=ACC))
    else:
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION, out_dtype=ACC)
    if DESCRIPTORS:
        dq_desc.atomic_add([row, head * D], dq)
    else:
        dq_ptrs = tile_ptrs(dq_ptr, row, head, num_heads * D, D, offs_m, offs_d)
        tl.atomic_add(dq_ptrs, dq, mask=mask_m[:, None] & (offs_d < D)[None, :], sem="relaxed")


@triton.jit
def key_tile(
    item, kv_head,
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dq_desc, dk_ptr, dv_ptr,
    dk_part_ptr, dv_part_ptr, rule_ptr, key_items_ptr, rows_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_do_t, stride_do_h, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    num_queries, num_keys, num_kv_heads, scale, softcap, window_size,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SUBSET: tl.constexpr, SOFTCAP: tl.constexpr,
    FUSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ACCURATE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of keys [col0, col1) of one KV head, or a partial sum of them."""
    item_ptr = key_items_ptr + item * 9
    col0 = tl.load(item_ptr)
    col1 = tl.load(item_ptr + 1)
    full0 = tl.load(item_ptr + 2)
    num_full = tl.load(item_ptr + 3)
    before0 = tl.load(item_ptr + 4)
    num_before = tl.load(item_ptr + 5)
    after0 = tl.load(item_ptr + 6)
    num_masked = num_before + tl.load(item_ptr + 7)
    slot = tl.load(item_ptr + 8)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    cols = col0 + offs_n
    mask_n = cols < col1
    scale = tl.full([], scale, ACC)

    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k_ptrs = tile_ptrs(k_ptr, col0, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
    v_ptrs = tile_ptrs(v_ptr, col0, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
    k = load_masked(k_ptrs, mask_n, offs_d, D, BLOCK_D)
    v = load_masked(v_ptrs, mask_n, offs_dv, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)

    for j in tl.range(0, GROUP * num_full, num_stages=NUM_STAGES):
        head = kv_head * GROUP + j // num_full
        i = j % num_full
        row = tl.load(rows_ptr + full0 + i) if WINDOW else full0 + i * BLOCK_M
        q_ptrs = tile_ptrs(q_ptr, row, head, stride_q_t, stride_q_h, offs_m, offs_d)
        do_ptrs = tile_ptrs(dout_ptr, row, head, stride_do_t, stride_do_h, offs_m, offs_dv)
        q = load_full(q_ptrs, offs_d, D, BLOCK_D)
        do = load_full(do_ptrs, offs_dv, DV, BLOCK_DV)
        flat = head.to(tl.int64) * num_queries + row + offs_m
        lse_log2 = tl.load(lse_ptr + flat) * LOG2E
        delta = tl.load(delta_ptr + flat)
        dk, dv, ds = key_step(
            q, do, k, v, lse_log2, delta, dk, dv, scale, softcap,
            None, None, None, None, None, False, WINDOW, SOFTCAP, ACCURATE, PRECISION,
        )  # fmt: skip
        if FUSED:
            add_to_queries(
                ds, k, dq_ptr, dq_desc, row, head, num_kv_heads * GROUP,
                offs_m < BLOCK_M, offs_m, offs_d, D, DESCRIPTORS, ACC, PRECISION,
            )  # fmt: skip

    seen_from, seen_until, position = key_rule(rule_ptr, cols, mask_n, num_keys, CAUSAL, WINDOW)
    for j in tl.range(0, GROUP * num_masked, num_stages=1):
        head = kv_head * GROUP + j // num_masked
        i = j % num_masked
        if WINDOW:
            row = tl.load(rows_ptr + before0 + i)
        else:
            row = tl.where(
                i < num_before, before0 + i * BLOCK_M, after0 + (i - num_before) * BLOCK_M
            )
        queries = row + offs_m
        mask_m = queries < num_queries
        rows = queries
        if SUBSET:
            rows = tl.load(
                rule_ptr + num_keys + num_keys + num_keys + queries, mask=mask_m, other=-1
            )
        floor = row_floor(rule_ptr, rows, mask_m, num_keys, window_size, WINDOW)
        q_ptrs = tile_ptrs(q_ptr, row, head, stride_q_t, stride_q_h, offs_m, offs_d)
        do_ptrs = tile_ptrs(dout_ptr, row, head, stride_do_t, stride_do_h, offs_m, offs_dv)
        q = load_masked(q_ptrs, mask_m, offs_d, D, BLOCK_D)
        do = load_masked(do_ptrs, mask_m, offs_dv, DV, BLOCK_DV)
        flat = head.to(tl.int64) * num_queries + queries
        lse_log2 = tl.load(lse_ptr + flat, mask=mask_m, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + flat, mask=mask_m, other=0.0)
        dk, dv, ds = key_step(
            q, do, k, v, lse_log2, delta, dk, dv, scale, softcap,
            rows, floor, seen_from, seen_until, position,
            True, WINDOW, SOFTCAP, ACCURATE, PRECISION,
        )  # fmt: skip
        if FUSED:
            # Rows that see no key of the tile get zeros.
            add_to_queries(
                ds, k, dq_ptr, dq_desc, row, head, num_kv_heads * GROUP,
                mask_m, offs_m, offs_d, D, DESCRIPTORS, ACC, PRECISION,
            )  # fmt: skip

    # dK = scale sum_h dS^T Q                                                            (B7)
    dk = dk * scale
    if slot < 0:
        dk_ptrs = tile_ptrs(dk_ptr, col0, kv_head, stride_dk_t, stride_dk_h, offs_n, offs_d)
        dv_ptrs = tile_ptrs(dv_ptr, col0, kv_head, stride_dv_t, stride_dv_h, offs_n, offs_dv)
        store_masked(dk_ptrs, dk, mask_n, offs_d, D, BLOCK_D)
        store_masked(dv_ptrs, dv, mask_n, offs_dv, DV, BLOCK_DV)
    else:
        # Partial sums lie as (slot, KV head, BLOCK_N, D).
        part = (slot.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_N
        dk_part_ptrs = dk_part_ptr + part * D + offs_n[:, None] * D + offs_d[None, :]
        dv_part_ptrs = dv_part_ptr + part * DV + offs_n[:, None] * DV + offs_dv[None, :]
        store_masked(dk_part_ptrs, dk, mask_n, offs_d, D, BLOCK_D)
        store_masked(dv_part_ptrs, dv, mask_n, offs_dv, DV, BLOCK_DV)


@triton.jit
def query_step(
    q, do, k, v, lse_log2, delta, dq, scale, softcap,
    rows, floor, seen_from, seen_until, position,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one key tile to dQ (without the scale); scores are [BLOCK_M, BLOCK_N]."""
    # S = Q K^T,  dP = dO V^T                                                            (B2)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
    # P = 2^(S - LSE)                                                                    (B3)
    exponent, slope = exponent_of(s, lse_log2[:, None], scale, softcap, SOFTCAP, ACCURATE)
    if MASKED:
        exponent = forbid(
            exponent, rows[:, None], floor[:, None],
            seen_from[None, :], seen_until[None, :], position[None, :], WINDOW,
        )  # fmt: skip
    # dS = P (dP - delta)                                                                (B5)
    ds = tl.math.exp2(exponent) * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * slope
    # dQ += dS K                                                                         (B8)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)


@triton.jit
def query_tile(
    item, head,
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    rule_ptr, query_items_ptr, columns_ptr, masked_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_do_t, stride_do_h, stride_dq_t, stride_dq_h,
    num_queries, num_keys, scale, softcap, window_size,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ACCURATE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of rows [row0, row1) of one query head; the key tiles of the forward pass."""
    item_ptr = query_items_ptr + item * 9
    row0 = tl.load(item_ptr)
    row1 = tl.load(item_ptr + 1)
    query0 = tl.load(item_ptr + 2)
    list0 = tl.load(item_ptr + 3)
    num_listed = tl.load(item_ptr + 4)
    own0 = tl.load(item_ptr + 5)
    num_own = tl.load(item_ptr + 6)
    masked0 = tl.load(item_ptr + 7)
    num_masked = tl.load(item_ptr + 8)

    kv_head = head // GROUP
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row0 + offs_m
    mask_m = rows < row1
    scale = tl.full([], scale, ACC)

    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    q_ptrs = tile_ptrs(q_ptr, query0, head, stride_q_t, stride_q_h, offs_m, offs_d)
    do_ptrs = tile_ptrs(dout_ptr, query0, head, stride_do_t, stride_do_h, offs_m, offs_dv)
    q = load_masked(q_ptrs, mask_m, offs_d, D, BLOCK_D)
    do = load_masked(do_ptrs, mask_m, offs_dv, DV, BLOCK_DV)
    flat = head.to(tl.int64) * num_queries + query0 + offs_m
    lse_log2 = tl.load(lse_ptr + flat, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + flat, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    for j in tl.range(0, num_listed + num_own, num_stages=NUM_STAGES):
        listed = tl.load(columns_ptr + list0 + j, mask=j < num_listed, other=0)
        col = tl.where(j < num_listed, listed, own0 + (j - num_listed) * BLOCK_N)
        k_ptrs = tile_ptrs(k_ptr, col, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
        v_ptrs = tile_ptrs(v_ptr, col, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
        k = load_full(k_ptrs, offs_d, D, BLOCK_D)
        v = load_full(v_ptrs, offs_dv, DV, BLOCK_DV)
        dq = query_step(
            q, do, k, v, lse_log2, delta, dq, scale, softcap,
            None, None, None, None, None, False, WINDOW, SOFTCAP, ACCURATE, PRECISION,
        )  # fmt: skip

    floor = row_floor(rule_ptr, rows, mask_m, num_keys, window_size, WINDOW)
    for j in tl.range(0, num_masked, num_stages=1):
        col = tl.load(masked_ptr + 2 * (masked0 + j))
        col_end = tl.load(masked_ptr + 2 * (masked0 + j) + 1)
        cols = col + offs_n
        mask_n = cols < col_end
        seen_from, seen_until, position = key_rule(rule_ptr, cols, mask_n, num_keys, CAUSAL, WINDOW)
        k_ptrs = tile_ptrs(k_ptr, col, kv_head, stride_k_t, stride_k_h, offs_n, offs_d)
        v_ptrs = tile_ptrs(v_ptr, col, kv_head, stride_v_t, stride_v_h, offs_n, offs_dv)
        k = load_masked(k_ptrs, mask_n, offs_d, D, BLOCK_D)
        v = load_masked(v_ptrs, mask_n, offs_dv, DV, BLOCK_DV)
        dq = query_step(
            q, do, k, v, lse_log2, delta, dq, scale, softcap,
            rows, floor, seen_from, seen_until, position,
            True, WINDOW, SOFTCAP, ACCURATE, PRECISION,
        )  # fmt: skip

    # dQ = scale dS K                                                                    (B9)
    dq_ptrs = tile_ptrs(dq_ptr, query0, head, stride_dq_t, stride_dq_h, offs_m, offs_d)
    store_masked(dq_ptrs, dq * scale, mask_m, offs_d, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "num_key_items", "num_entries", "heads_per_section",
        "window_size",
    ]
)  # fmt: skip
def backward_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dq_desc, dk_ptr, dv_ptr,
    dk_part_ptr, dv_part_ptr,
    rule_ptr, order_ptr, key_items_ptr, rows_ptr, query_items_ptr, columns_ptr, masked_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_do_t, stride_do_h,
    stride_dq_t, stride_dq_h, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    num_queries, num_keys, num_key_items, num_entries, num_kv_heads, heads_per_section,
    scale, softcap, window_size,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KEYS_M: tl.constexpr, KEYS_N: tl.constexpr, KEYS_STAGES: tl.constexpr,
    QUERIES_M: tl.constexpr, QUERIES_N: tl.constexpr, QUERIES_STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SUBSET: tl.constexpr, SOFTCAP: tl.constexpr,
    FUSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ACCURATE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry, kv_head = entry_and_head(tl.program_id(0), num_entries, heads_per_section)
    item = tl.load(order_ptr + 2 * entry)
    if FUSED or item < num_key_items:
        key_tile(
            item, kv_head,
            q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dq_desc, dk_ptr, dv_ptr,
            dk_part_ptr, dv_part_ptr, rule_ptr, key_items_ptr, rows_ptr,
            stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
            stride_do_t, stride_do_h, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
            num_queries, num_keys, num_kv_heads, scale, softcap, window_size,
            GROUP, D, DV, BLOCK_D, BLOCK_DV, KEYS_M, KEYS_N, KEYS_STAGES,
            CAUSAL, WINDOW, SUBSET, SOFTCAP, FUSED, DESCRIPTORS, ACCURATE, ACC, PRECISION,
        )  # fmt: skip
    else:
        head = kv_head * GROUP + tl.load(order_ptr + 2 * entry + 1)
        query_tile(
            item - num_key_items, head,
            q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
            rule_ptr, query_items_ptr, columns_ptr, masked_ptr,
            stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
            stride_do_t, stride_do_h, stride_dq_t, stride_dq_h,
            num_queries, num_keys, scale, softcap, window_size,
            GROUP, D, DV, BLOCK_D, BLOCK_DV, QUERIES_M, QUERIES_N, QUERIES_STAGES,
            CAUSAL, WINDOW, SOFTCAP, ACCURATE, ACC, PRECISION,
        )  # fmt: skip


@triton.jit
def reduce_kernel(
    part_ptr, grad_ptr, splits_ptr, stride_t, stride_h, num_kv_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of one split key tile of one KV head, in the order of their slots."""
    split_ptr = splits_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    col0 = tl.load(split_ptr)
    col1 = tl.load(split_ptr + 1)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = col0 + offs_n < col1
    acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    slot0 = tl.load(split_ptr + 2)
    for i in tl.range(0, tl.load(split_ptr + 3) - slot0):
        part = ((slot0 + i).to(tl.int64) * num_kv_heads + kv_head) * BLOCK_N * D
        ptrs = part_ptr + part + offs_n[:, None] * D + offs_d[None, :]
        acc += load_masked(ptrs, mask_n, offs_d, D, BLOCK_D)
    ptrs = tile_ptrs(grad_ptr, col0, kv_head, stride_t, stride_h, offs_n, offs_d)
    store_masked(ptrs, acc, mask_n, offs_d, D, BLOCK_D)


@dataclass(frozen=True, eq=False)
class BackwardTables:
    """Device copies of a schedule: int32, shapes as in `prefix_attn.backends.schedule`.

    `order` is the list of `backward_order`; `key_items`, `rows` and `splits` are of `KeyTiles`, the
    last three of `QueryTiles`; `rule` is that of `ForwardTables`.
    """

    rule: torch.Tensor
    order: torch.Tensor
    key_items: torch.Tensor
    rows: torch.Tensor
    splits: torch.Tensor
    num_slots: int
    query_items: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor


def launch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    tables: BackwardTables,
    options: Options,
    config: Config,
    *,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Runs the preprocess, the backward kernel and the reduction of split tiles.

    Args:
        dout: (Tq, Hq, DV), last dimension contiguous.
        q: (Tq, Hq, D), likewise.
        k: (T, Hkv, D), likewise.
        v: (T, Hkv, DV), likewise.
        out: (Tq, Hq, DV), of the forward pass.
        lse: (Hq, Tq), contiguous, of the forward pass.
        dlse: (Hq, Tq), contiguous, or None.
        sinks: (Hq,), or None.
        tables: work lists made for `config.keys` and `config.queries`.
        options: of the call.
        config: tile shapes.
        fused: programs that own keys add up dQ; `tables.order` holds no others.

    Returns:
        dq (Tq, Hq, D), dk (T, Hkv, D), dv (T, Hkv, DV), and dsinks (Hq,) or None.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, head_dim_v = k.shape[1], v.shape[2]
    block_d, block_dv = padded_dim(head_dim), padded_dim(head_dim_v)
    acc, tl_acc = accumulator(q.dtype), triton_accumulator(q.dtype)
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)

    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(num_queries, DELTA_BLOCK_M), num_heads)](
        out_ptr=out,
        dout_ptr=dout,
        dlse_ptr=lse if dlse is None else dlse,
        delta_ptr=delta,
        stride_o_t=out.stride(0),
        stride_o_h=out.stride(1),
        stride_do_t=dout.stride(0),
        stride_do_h=dout.stride(1),
        num_queries=num_queries,
        DV=head_dim_v,
        BLOCK_DV=block_dv,
        BLOCK_M=DELTA_BLOCK_M,
        HAS_DLSE=dlse is not None,
        ACC=tl_acc,
        num_warps=4,
        enable_fp_fusion=True,
    )

    # A head's programs read its K and V, and Q and dO of its query heads.
    head_bytes = (k.shape[0] * num_kv_heads + num_queries * num_heads) // num_kv_heads * k.itemsize
    section = config.heads_per_section(num_kv_heads, head_bytes * (head_dim + head_dim_v))
    part_shape = (tables.num_slots, num_kv_heads, config.keys.block_n)
    dq_sum = q.new_zeros(q.shape, dtype=acc) if fused else dq
    descriptors = fused and not INTERPRETED
    dk_part = k.new_empty(*part_shape, head_dim, dtype=acc)
    dv_part = v.new_empty(*part_shape, head_dim_v, dtype=acc)
    backward_kernel[(tables.order.shape[0] * num_kv_heads,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq_sum,
        dq_desc=tile_descriptor(dq_sum, config.keys.block_m) if descriptors else dq_sum,
        dk_ptr=dk,
        dv_ptr=dv,
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        rule_ptr=tables.rule,
        order_ptr=tables.order,
        key_items_ptr=tables.key_items,
        rows_ptr=tables.rows,
        query_items_ptr=tables.query_items,
        columns_ptr=tables.columns,
        masked_ptr=tables.masked,
        stride_q_t=q.stride(0),
        stride_q_h=q.stride(1),
        stride_k_t=k.stride(0),
        stride_k_h=k.stride(1),
        stride_v_t=v.stride(0),
        stride_v_h=v.stride(1),
        stride_do_t=dout.stride(0),
        stride_do_h=dout.stride(1),
        stride_dq_t=dq.stride(0),
        stride_dq_h=dq.stride(1),
        stride_dk_t=dk.stride(0),
        stride_dk_h=dk.stride(1),
        stride_dv_t=dv.stride(0),
        stride_dv_h=dv.stride(1),
        num_queries=num_queries,
        num_keys=k.shape[0],
        num_key_items=tables.key_items.shape[0],
        num_entries=tables.order.shape[0],
        num_kv_heads=num_kv_heads,
        heads_per_section=section,
        scale=scalar_argument(options.scale, q.dtype),
        softcap=scalar_argument(options.softcap or 1.0, q.dtype),
        window_size=options.window_size or 0,
        GROUP=num_heads // num_kv_heads,
        D=head_dim,
        DV=head_dim_v,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        KEYS_M=config.keys.block_m,
        KEYS_N=config.keys.block_n,
        KEYS_STAGES=config.keys.num_stages,
        QUERIES_M=config.queries.block_m,
        QUERIES_N=config.queries.block_n,
        QUERIES_STAGES=config.queries.num_stages,
        CAUSAL=options.prefix_causal,
        WINDOW=options.window_size is not None,
        SUBSET=num_queries < k.shape[0],
        SOFTCAP=options.softcap is not None,
        FUSED=fused,
        DESCRIPTORS=descriptors,
        ACCURATE=needs_accurate_tanh(q.dtype, options.softcap),
        ACC=tl_acc,
        PRECISION=dot_precision(q.dtype),
        num_warps=config.backward_warps,
        enable_fp_fusion=True,
    )

    if fused:
        # (B9)
        torch.mul(dq_sum, options.scale, out=dq)
    if tables.num_slots:
        for part, grad, size, block in (
            (dk_part, dk, head_dim, block_d),
            (dv_part, dv, head_dim_v, block_dv),
        ):
            reduce_kernel[(tables.splits.shape[0], num_kv_heads)](
                part_ptr=part,
                grad_ptr=grad,
                splits_ptr=tables.splits,
                stride_t=grad.stride(0),
                stride_h=grad.stride(1),
                num_kv_heads=num_kv_heads,
                D=size,
                BLOCK_D=block,
                BLOCK_N=config.keys.block_n,
                ACC=tl_acc,
                num_warps=4,
                enable_fp_fusion=True,
            )
    dsinks = None
    if sinks is not None:
        # dsink = -sum_r P_sink delta, P_sink = exp(sink - LSE)                             (B10)
        p_sink = torch.exp(sinks.to(acc)[:, None] - lse)
        dsinks = -(p_sink * delta).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks
