"""Backward pass: dQ, dK and dV in one launch; deterministic and without atomics, unless fused.

A preprocess computes delta. Then one grid (work entries x KV heads, in sections of heads as in the
forward pass) holds two kinds of programs, longest first:

* A program that owns a key tile of one KV head runs over the rows that see it, for every query head
  of that KV head: the sum over the members of a group is this loop. Keys with a long range of rows
  are shared by several programs, each of which writes a partial sum in float32; a last small kernel
  adds these in a fixed order.
* A program that owns a query tile of one query head runs over the keys that it sees, as in the
  forward pass, and writes dQ.

Heads so wide that registers hold one sum of a key tile have two kinds of programs that own keys:
those of dK, and those of dV. S is computed once more then.

With deterministic=False only key programs are launched. Those of dK also add dS K to dQ with atomic
adds, in float32 by TMA. S and dP are computed once: five products instead of seven.

The full loop comes first in both: a masked loop before it would be serialised by the compiler.
"""

import torch
import triton
import triton.language as tl

from prefix_attn.kernels.arguments import (
    QUERY_ROW,
    BackwardTables,
    Heads,
    KeyTable,
    QueryTable,
    Rows,
    forbid,
    full_column,
    key_item,
    key_rule,
    masked_column,
    query_item,
    row_floor,
    rule_row,
)
from prefix_attn.kernels.config import Config, suits_tma
from prefix_attn.kernels.launch import Launch, are_aligned
from prefix_attn.kernels.options import Options
from prefix_attn.kernels.primitives import (
    INTERPRETED,
    LOG2E,
    TmaLoads,
    accumulator,
    add_dot,
    by_eights,
    dot_transposed,
    entry_and_head,
    load_rows,
    load_tile,
    mode_of,
    piece_ptrs,
    scalar_argument,
    scaled,
    store_rows,
    suits_eights,
    tanh,
    zero_tiles,
)
from prefix_attn.kernels.sums import DeltaLaunch, ReduceLaunch, part_rows


@triton.jit
def exponent_of(s, lse_log2, scale, softcap, MODE: tl.constexpr):
    """S - LSE in log2 units from Q K^T, and the slope of the softcap; lse_log2 comes expanded."""
    slope = s
    if MODE.softcap:
        # S = c tanh(scale Q K^T / c),  dS / d(scale Q K^T) = 1 - tanh^2                  (B2')
        t = tanh(s * (scale / softcap), MODE.accurate)
        slope = 1.0 - t * t
        s = t * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    return s - lse_log2, slope


@triton.jit
def key_step(
    q, do, k, v, lse_log2, delta_ptrs, dk, dv, scale, softcap, mask_m, rows, floor, keys,
    MASKED: tl.constexpr, MODE: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """Adds one row tile to dK (without the scale), to dV, or to both; returns dS^T with dK.

    Scores are [BLOCK_N, BLOCK_M].
    """
    # S^T = K Q^T,  dP^T = V dO^T                                                        (B2)
    s = dot_transposed(k, q, MODE)
    if WITH_DK:
        dp = dot_transposed(v, do, MODE)
    # P = 2^(S - LSE); a forbidden exponent makes P, and with it dS, zero                (B3)
    exponent, slope = exponent_of(s, lse_log2[None, :], scale, softcap, MODE)
    if MASKED:
        exponent = forbid(exponent, rows, floor, keys, MODE, True)
    p = tl.math.exp2(exponent)
    ds = p
    if WITH_DV:
        # dV += P^T dO                                                                   (B4)
        # [BLOCK_N, BLOCK_DV]
        dv = add_dot(dv, p.to(do[0].dtype), do, MODE)
    if WITH_DK:
        # dS = P (dP - delta)                                                            (B5)
        # Loaded as late as this, delta takes no registers while S and dP are there.
        delta = tl.load(delta_ptrs, mask=mask_m, other=0.0) if MASKED else tl.load(delta_ptrs)
        ds = p * (dp - delta[None, :])
        if MODE.softcap:
            ds = ds * slope
        # dK += dS^T Q                                                                   (B6)
        # [BLOCK_N, BLOCK_D]
        ds = ds.to(q[0].dtype)
        dk = add_dot(dk, ds, q, MODE)
    return dk, dv, ds


@triton.jit
def add_to_queries(
    ds, k, dq_rows, dq_descs, row, head, mask_m, offs_m,
    COLUMNS: tl.constexpr, REDUCE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adds dS K of one row tile to a sum (Tq, Hq, D) of dQ, without the scale, in any order."""
    for i in tl.static_range(len(COLUMNS.widths)):
        # dQ += dS K                                                                     (B8)
        # [BLOCK_M, BLOCK_D]
        if ds.shape[1] < 64:
            # Hopper's instruction takes 64 rows at least, which dQ^T has.
            dq = tl.dot(tl.trans(k[i]), ds, input_precision=MODE.precision, out_dtype=MODE.acc)
            dq = tl.trans(dq)
        else:
            dq = tl.dot(tl.trans(ds), k[i], input_precision=MODE.precision, out_dtype=MODE.acc)
        if REDUCE:
            flat = tl.reshape(dq, [dq.shape[0], 1, dq.shape[1]])
            dq_descs[i].atomic_add([row, head, COLUMNS.starts[i]], flat)
        else:
            dq_ptrs, offs_d = piece_ptrs(dq_rows, row, head, offs_m, COLUMNS, i)
            mask = mask_m[:, None] & (offs_d < COLUMNS.size)[None, :]
            tl.atomic_add(dq_ptrs, dq, mask=mask, sem="relaxed")


@triton.jit
def key_tile(
    entry, kv_head, q_descs, do_descs,
    q_rows, k_rows, v_rows, dout_rows, lse_log2_ptr, delta_ptr, dq_rows, dq_descs, dk_rows, dv_rows,
    dk_part_ptr, dv_part_ptr, rule_ptr, key_table,
    num_queries, num_keys, num_kv_heads, scale, softcap, window_size,
    HEADS: tl.constexpr, TILE: tl.constexpr, MODE: tl.constexpr,
    SUBSET: tl.constexpr, FUSED: tl.constexpr, DESCRIPTORS: tl.constexpr, REDUCE: tl.constexpr,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """dK, dV or both of keys [col0, col1) of one KV head, or a partial sum of them."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    QK: tl.constexpr = HEADS.qk
    VO: tl.constexpr = HEADS.vo
    ACC: tl.constexpr = MODE.acc
    MASKED_STAGES: tl.constexpr = 2 if DESCRIPTORS else 1
    item = key_item(key_table, entry)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    # [BLOCK_N]
    cols = item.col0 + offs_n
    mask_n = cols < item.col1
    scale = tl.full([], scale, ACC)

    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k = load_rows(k_rows, item.col0, kv_head, mask_n, offs_n, QK)
    v = load_rows(v_rows, item.col0, kv_head, mask_n, offs_n, VO)
    dk = zero_tiles(BLOCK_N, QK, ACC)
    dv = zero_tiles(BLOCK_N, VO, ACC)

    # Index and head are carried: a division would stand between the products.
    head = kv_head * HEADS.group
    i = 0
    for _ in tl.range(0, HEADS.group * item.num_full, num_stages=TILE.num_stages):
        row = tl.load(key_table.rows + item.full0 + i) if MODE.window else item.full0 + i * BLOCK_M
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        mask_m = offs_m < BLOCK_M
        q = load_tile(q_rows, q_descs, row, head, mask_m, offs_m, QK, False, DESCRIPTORS)
        do = load_tile(dout_rows, do_descs, row, head, mask_m, offs_m, VO, False, DESCRIPTORS)
        # [BLOCK_M]
        flat = head.to(tl.int64) * num_queries + row
        lse_log2 = tl.load(lse_log2_ptr + flat + offs_m)
        dk, dv, ds = key_step(
            q, do, k, v, lse_log2, delta_ptr + flat + offs_m, dk, dv, scale, softcap,
            mask_m, None, None, None, False, MODE, WITH_DK, WITH_DV,
        )  # fmt: skip
        if FUSED and WITH_DK:
            add_to_queries(ds, k, dq_rows, dq_descs, row, head, mask_m, offs_m, QK, REDUCE, MODE)
        head, i = next_row_tile(head, i, item.num_full)

    keys = key_rule(rule_ptr, cols, mask_n, num_keys, MODE)
    head = kv_head * HEADS.group
    i = 0
    for _ in tl.range(0, HEADS.group * item.num_masked, num_stages=MASKED_STAGES):
        if MODE.window:
            row = tl.load(key_table.rows + item.before0 + i)
        else:
            row = tl.where(
                i < item.num_before,
                item.before0 + i * BLOCK_M,
                item.after0 + (i - item.num_before) * BLOCK_M,
            )
        # [BLOCK_M]
        queries = row + offs_m
        mask_m = queries < num_queries
        rows = queries
        if SUBSET:
            rows = tl.load(rule_row(rule_ptr, num_keys, QUERY_ROW) + queries, mask=mask_m, other=-1)
        floor = row_floor(rule_ptr, rows, mask_m, num_keys, window_size, MODE)
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        q = load_tile(q_rows, q_descs, row, head, mask_m, offs_m, QK, True, DESCRIPTORS)
        do = load_tile(dout_rows, do_descs, row, head, mask_m, offs_m, VO, True, DESCRIPTORS)
        # [BLOCK_M]
        flat = head.to(tl.int64) * num_queries + queries
        lse_log2 = tl.load(lse_log2_ptr + flat, mask=mask_m, other=0.0)
        dk, dv, ds = key_step(
            q, do, k, v, lse_log2, delta_ptr + flat, dk, dv, scale, softcap,
            mask_m, rows, floor, keys, True, MODE, WITH_DK, WITH_DV,
        )  # fmt: skip
        if FUSED and WITH_DK:
            # Rows that see no key of the tile get zeros.
            add_to_queries(ds, k, dq_rows, dq_descs, row, head, mask_m, offs_m, QK, REDUCE, MODE)
        head, i = next_row_tile(head, i, item.num_masked)

    # dK = scale sum_h dS^T Q                                                            (B7)
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    dk = scaled(dk, scale, ACC)
    # Partial sums lie as (slot, KV head, BLOCK_N, D).
    part = (item.slot.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_N
    if item.slot < 0:
        if WITH_DK:
            store_rows(dk_rows, item.col0, kv_head, dk, mask_n, offs_n, QK)
        if WITH_DV:
            store_rows(dv_rows, item.col0, kv_head, dv, mask_n, offs_n, VO)
    else:
        if WITH_DK:
            dk_part = part_rows(dk_part_ptr, QK.size)
            store_rows(dk_part, part, kv_head, dk, mask_n, offs_n, QK)
        if WITH_DV:
            dv_part = part_rows(dv_part_ptr, VO.size)
            store_rows(dv_part, part, kv_head, dv, mask_n, offs_n, VO)


@triton.jit
def next_row_tile(head, i, count):
    """Row tile i of `count` of a query head, one further: the first one of the next head last."""
    is_last = i + 1 == count
    return tl.where(is_last, head + 1, head), tl.where(is_last, 0, i + 1)


@triton.jit
def query_step(
    q, do, k, v, lse_log2, delta, dq, scale, softcap, rows, floor, keys,
    MASKED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adds one key tile to dQ (without the scale); scores are [BLOCK_M, BLOCK_N]."""
    # S = Q K^T,  dP = dO V^T                                                            (B2)
    s = dot_transposed(q, k, MODE)
    dp = dot_transposed(do, v, MODE)
    # P = 2^(S - LSE)                                                                    (B3)
    exponent, slope = exponent_of(s, lse_log2[:, None], scale, softcap, MODE)
    if MASKED:
        exponent = forbid(exponent, rows, floor, keys, MODE, False)
    # dS = P (dP - delta)                                                                (B5)
    ds = tl.math.exp2(exponent) * (dp - delta[:, None])
    if MODE.softcap:
        ds = ds * slope
    # dQ += dS K                                                                         (B8)
    # [BLOCK_M, BLOCK_D]
    return add_dot(dq, ds.to(k[0].dtype), k, MODE)


@triton.jit
def query_tile(
    entry, head, k_descs, v_descs,
    q_rows, k_rows, v_rows, dout_rows, lse_log2_ptr, delta_ptr, dq_rows, rule_ptr, query_table,
    num_queries, num_keys, scale, softcap, window_size,
    HEADS: tl.constexpr, TILE: tl.constexpr, MODE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dQ of rows [row0, row1) of one query head; the key tiles of the forward pass."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    QK: tl.constexpr = HEADS.qk
    VO: tl.constexpr = HEADS.vo
    ACC: tl.constexpr = MODE.acc
    MASKED_STAGES: tl.constexpr = 2 if DESCRIPTORS else 1
    item = query_item(query_table, entry)

    kv_head = head // HEADS.group
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    # [BLOCK_M]
    rows = item.row0 + offs_m
    mask_m = rows < item.row1
    scale = tl.full([], scale, ACC)

    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    q = load_rows(q_rows, item.query0, head, mask_m, offs_m, QK)
    do = load_rows(dout_rows, item.query0, head, mask_m, offs_m, VO)
    # [BLOCK_M]
    flat = head.to(tl.int64) * num_queries + item.query0 + offs_m
    lse_log2 = tl.load(lse_log2_ptr + flat, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + flat, mask=mask_m, other=0.0)
    # [BLOCK_M, BLOCK_D]
    dq = zero_tiles(BLOCK_M, QK, ACC)

    for j in tl.range(0, item.num_listed + item.num_own, num_stages=TILE.num_stages):
        col = full_column(query_table, item, j, BLOCK_N)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        mask_n = offs_n < BLOCK_N
        k = load_tile(k_rows, k_descs, col, kv_head, mask_n, offs_n, QK, False, DESCRIPTORS)
        v = load_tile(v_rows, v_descs, col, kv_head, mask_n, offs_n, VO, False, DESCRIPTORS)
        dq = query_step(
            q, do, k, v, lse_log2, delta, dq, scale, softcap, None, None, None, False, MODE
        )

    # [BLOCK_M]
    floor = row_floor(rule_ptr, rows, mask_m, num_keys, window_size, MODE)
    for j in tl.range(0, item.num_masked, num_stages=MASKED_STAGES):
        col, col_end = masked_column(query_table, item, j)
        # [BLOCK_N]
        cols = col + offs_n
        mask_n = cols < col_end
        keys = key_rule(rule_ptr, cols, mask_n, num_keys, MODE)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        k = load_tile(k_rows, k_descs, col, kv_head, mask_n, offs_n, QK, True, DESCRIPTORS)
        v = load_tile(v_rows, v_descs, col, kv_head, mask_n, offs_n, VO, True, DESCRIPTORS)
        dq = query_step(
            q, do, k, v, lse_log2, delta, dq, scale, softcap, rows, floor, keys, True, MODE
        )

    # dQ = scale dS K                                                                    (B9)
    # [BLOCK_M, BLOCK_D]
    dq = scaled(dq, scale, ACC)
    store_rows(dq_rows, item.query0, head, dq, mask_m, offs_m, QK)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "num_key_items", "num_value_items", "num_entries",
        "heads_per_section", "window_size",
    ]
)  # fmt: skip
def backward_kernel(
    q_desc, q_rest_desc, do_desc, do_rest_desc,
    value_q_desc, value_q_rest_desc, value_do_desc, value_do_rest_desc,
    k_desc, k_rest_desc, v_desc, v_rest_desc, dq_rest_desc,
    q_rows, k_rows, v_rows, dout_rows, lse_log2_ptr, delta_ptr, dq_rows, dq_desc, dk_rows, dv_rows,
    dk_part_ptr, dv_part_ptr, rule_ptr, order_ptr, key_table, value_table, query_table,
    num_queries, num_keys, num_key_items, num_value_items, num_entries, num_kv_heads,
    heads_per_section, scale, softcap, window_size,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, QUERIES: tl.constexpr,
    MODE: tl.constexpr,
    SUBSET: tl.constexpr, FUSED: tl.constexpr, DESCRIPTORS: tl.constexpr, REDUCE: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """One entry of `order`: a key tile of one KV head, or a query tile of one of its query heads.

    lse_log2_ptr and delta_ptr are (Hq, Tq), partial sums (slots, Hkv, BLOCK_N, D) and DV; KEYS and
    QUERIES are the tiles of the two kinds. With VALUES key tiles are of two kinds: those of KEYS
    sum dK, and those of VALUES, which follow them in `order`, dV. With FUSED there are key tiles
    only, and dq_rows, for TMA dq_desc, are a sum that they add to. The other descriptors are read
    with DESCRIPTORS, those of a rest where a head is covered by two tiles.
    """
    q_rows, dout_rows = by_eights(q_rows, EIGHTS), by_eights(dout_rows, EIGHTS)
    k_rows, v_rows = by_eights(k_rows, EIGHTS), by_eights(v_rows, EIGHTS)
    dk_rows, dv_rows = by_eights(dk_rows, EIGHTS), by_eights(dv_rows, EIGHTS)
    dq_rows = by_eights(dq_rows, EIGHTS)
    entry, kv_head = entry_and_head(tl.program_id(0), num_entries, heads_per_section)
    item = tl.load(order_ptr + 2 * entry)
    APART: tl.constexpr = VALUES is not None
    first_query = num_key_items
    if APART:
        first_query += num_value_items
    if (FUSED and not APART) or item < num_key_items:
        key_tile(
            item, kv_head, (q_desc, q_rest_desc), (do_desc, do_rest_desc),
            q_rows, k_rows, v_rows, dout_rows, lse_log2_ptr, delta_ptr,
            dq_rows, (dq_desc, dq_rest_desc), dk_rows, dv_rows, dk_part_ptr, dv_part_ptr,
            rule_ptr, key_table, num_queries, num_keys, num_kv_heads, scale, softcap, window_size,
            HEADS, KEYS, MODE, SUBSET, FUSED, DESCRIPTORS, REDUCE, True, not APART,
        )  # fmt: skip
    elif APART and (FUSED or item < first_query):
        key_tile(
            item - num_key_items, kv_head,
            (value_q_desc, value_q_rest_desc), (value_do_desc, value_do_rest_desc),
            q_rows, k_rows, v_rows, dout_rows, lse_log2_ptr, delta_ptr,
            dq_rows, (dq_desc, dq_rest_desc), dk_rows, dv_rows, dk_part_ptr, dv_part_ptr,
            rule_ptr, value_table, num_queries, num_keys, num_kv_heads, scale, softcap, window_size,
            HEADS, VALUES, MODE, SUBSET, FUSED, DESCRIPTORS, REDUCE, False, True,
        )  # fmt: skip
    else:
        head = kv_head * HEADS.group + tl.load(order_ptr + 2 * entry + 1)
        query_tile(
            item - first_query, head, (k_desc, k_rest_desc), (v_desc, v_rest_desc),
            q_rows, k_rows, v_rows, dout_rows, lse_log2_ptr, delta_ptr, dq_rows,
            rule_ptr, query_table,
            num_queries, num_keys, scale, softcap, window_size, HEADS, QUERIES, MODE, DESCRIPTORS,
        )  # fmt: skip


class BackwardLaunch:
    """All kernels of a backward pass, for calls of one kind, as that of `ForwardLaunch`.

    Attributes:
        fused: whether programs that own keys add up dQ.
    """

    def __init__(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        dlse: torch.Tensor | None,
        tables: BackwardTables,
        options: Options,
        config: Config,
        *,
        fused: bool,
    ) -> None:
        """Fixes all arguments of the kernels but tensors.

        Args:
            dout: (Tq, Hq, DV), last dimension contiguous.
            q: (Tq, Hq, D), likewise.
            k: (T, Hkv, D), likewise.
            v: (T, Hkv, DV), likewise.
            out: (Tq, Hq, DV), of the forward pass.
            dlse: (Hq, Tq), contiguous, or None.
            tables: work lists made for `config.keys`, `config.values` and `config.queries`.
            options: of the call.
            config: tile shapes.
            fused: programs that own keys add up dQ; `tables.order` holds no others.
        """
        num_queries, num_heads, _ = q.shape
        num_keys, num_kv_heads, _ = k.shape
        heads = Heads.of(q, k, v, in_two=config.heads_in_two)
        mode, self._acc = mode_of(q.dtype, options), accumulator(q.dtype)
        self._scale, self.fused = options.scale, fused
        self._delta = DeltaLaunch(out, dout, dlse, heads, mode)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (q, k, v))
        dq_sum = dq.to(self._acc) if fused else dq
        self._strides = [x.stride()[:2] for x in (q, k, v, dout, dq_sum, dk, dv)]

        apart = config.values is not None
        of_values = tables.keys if tables.values is None else tables.values
        values_tile = config.keys if config.values is None else config.values
        descriptors = config.backward_descriptors and suits_tma(q.shape[2], v.shape[2], q.itemsize)
        # The interpreter knows no sums by descriptor.
        reduce = fused and not INTERPRETED
        block_m, value_block_m = config.keys.block_m, values_tile.block_m
        block_n = config.queries.block_n
        self._loads = [
            TmaLoads("q", q, block_m, heads.qk, used=descriptors),
            TmaLoads("do", dout, block_m, heads.vo, used=descriptors),
            TmaLoads("value_q", q, value_block_m, heads.qk, used=descriptors and apart),
            TmaLoads("value_do", dout, value_block_m, heads.vo, used=descriptors and apart),
            TmaLoads("k", k, block_n, heads.qk, used=descriptors),
            TmaLoads("v", v, block_n, heads.vo, used=descriptors),
            TmaLoads("dq", dq_sum, block_m, heads.qk, used=reduce),
        ]

        # A head's programs read its K and V, and Q and dO of its query heads.
        head_bytes = (num_keys * num_kv_heads + num_queries * num_heads) // num_kv_heads
        section = config.heads_per_section(
            num_kv_heads, head_bytes * k.itemsize * (q.shape[2] + v.shape[2])
        )
        self._parts = [
            (lists.num_slots, num_kv_heads, tile.block_n, dim)
            for lists, tile, dim in (
                (tables.keys, config.keys, q.shape[2]),
                (of_values, values_tile, v.shape[2]),
            )
        ]
        constants = {
            **{name: None for loads in self._loads for name in loads.absent},
            "rule_ptr": tables.rule,
            "order_ptr": tables.order,
            "key_table": KeyTable(tables.keys.items, tables.keys.rows),
            "value_table": KeyTable(of_values.items, of_values.rows) if apart else None,
            "query_table": QueryTable(tables.query_items, tables.columns, tables.masked),
            "num_queries": num_queries,
            "num_keys": num_keys,
            "num_key_items": tables.keys.items.shape[0],
            "num_value_items": of_values.items.shape[0] if apart else None,
            "num_entries": tables.order.shape[0],
            "num_kv_heads": num_kv_heads,
            "heads_per_section": section,
            "scale": scalar_argument(options.scale, q.dtype),
            "softcap": scalar_argument(options.softcap or 1.0, q.dtype),
            "window_size": options.window_size or 0,
            "HEADS": heads,
            "KEYS": config.keys,
            "VALUES": config.values,
            "QUERIES": config.queries,
            "MODE": mode,
            "SUBSET": num_queries < num_keys,
            "FUSED": fused,
            "DESCRIPTORS": descriptors,
            "REDUCE": reduce,
            "EIGHTS": suits_eights(heads, q, k, v, dout, dq_sum, dk, dv),
        }
        self._launch = Launch(
            backward_kernel,
            (tables.order.shape[0] * num_kv_heads, 1, 1),
            constants,
            num_warps=config.backward_warps,
            enable_fp_fusion=True,
        )
        self._reduce_dk, self._reduce_dv = (
            ReduceLaunch(lists.splits, grad, part[2], mode) if lists.num_slots else None
            for lists, grad, part in zip(
                (tables.keys, of_values), (dk, dv), self._parts, strict=True
            )
        )

    def __call__(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Runs the preprocess, the backward kernel and the reduction of split tiles.

        The tensors are of the kind that the launch was made for. lse is (Hq, Tq), contiguous, of
        the forward pass, and sinks are (Hq,) or None.

        Returns:
            dq (Tq, Hq, D), dk (T, Hkv, D), dv (T, Hkv, DV), and dsinks (Hq,) or None.
        """
        delta, lse_log2 = self._delta(out, dout, lse, dlse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dq_sum = q.new_zeros(q.shape, dtype=self._acc) if self.fused else dq
        # Where no tile is split, nothing is written there.
        dk_part, dv_part = (
            k.new_empty(shape, dtype=self._acc) if shape[0] else delta for shape in self._parts
        )
        aligned = are_aligned(q, k, v, dout, lse_log2, delta, dq_sum, dk, dv, dk_part, dv_part)
        of_q, of_k, of_v, of_dout, of_dq, of_dk, of_dv = self._strides
        descriptors = {}
        for loads, x in zip(self._loads, (q, dout, q, dout, k, v, dq_sum), strict=True):
            descriptors |= loads.describe(x, aligned=aligned)
        self._launch(
            aligned=aligned,
            **descriptors,
            q_rows=Rows(q, *of_q),
            k_rows=Rows(k, *of_k),
            v_rows=Rows(v, *of_v),
            dout_rows=Rows(dout, *of_dout),
            lse_log2_ptr=lse_log2,
            delta_ptr=delta,
            dq_rows=Rows(dq_sum, *of_dq),
            dk_rows=Rows(dk, *of_dk),
            dv_rows=Rows(dv, *of_dv),
            dk_part_ptr=dk_part,
            dv_part_ptr=dv_part,
        )
        if self.fused:
            # (B9)
            torch.mul(dq_sum, self._scale, out=dq)
        if self._reduce_dk is not None:
            self._reduce_dk(dk_part, dk)
        if self._reduce_dv is not None:
            self._reduce_dv(dv_part, dv)
        dsinks = None
        if sinks is not None:
            # dsink = -sum_r P_sink delta, P_sink = exp(sink - LSE)                         (B10)
            p_sink = torch.exp(sinks.to(self._acc)[:, None] - lse)
            dsinks = -(p_sink * delta).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks
