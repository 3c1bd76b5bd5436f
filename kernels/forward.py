"""Forward pass: O = softmax(scale Q K^T) V over the keys that each row attends, and its LSE.

Grid: (query tiles x query heads,), in sections of heads whose K and V fit in the cache together,
the tiles of a section longest first, heads fastest. A program owns one query tile of one query head
and writes its rows of O and LSE. It runs over the key tiles that every row of the tile sees (those
of the ancestors from a shared list, then those of its own run), without a mask, and then over the
few that only some rows see, with the attention rule  c <= r < subtree_end[c].

A window shortens the lists, a softcap bends the scores, a sink starts the softmax: constants decide
about them, so that a kernel without them has nothing of them.
"""

import torch
import triton
import triton.language as tl

from prefix_attn.kernels.arguments import (
    ForwardTables,
    Heads,
    QueryTable,
    Rows,
    forbid,
    full_column,
    key_rule,
    masked_column,
    query_item,
    row_floor,
)
from prefix_attn.kernels.config import Config, suits_tma
from prefix_attn.kernels.launch import Launch, are_aligned
from prefix_attn.kernels.options import Options
from prefix_attn.kernels.primitives import (
    LN2,
    LOG2E,
    TmaLoads,
    accumulator,
    by_eights,
    divided,
    dot_transposed,
    entry_and_head,
    load_rows,
    load_tile,
    log2_scale,
    mode_of,
    scalar_argument,
    scaled,
    softmax_step,
    store_rows,
    suits_eights,
    tanh,
    zero_tiles,
)


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "num_items", "heads_per_section", "window_size"]
)
def forward_kernel(
    q_rows, k_rows, v_rows, k_desc, k_rest_desc, v_desc, v_rest_desc, sinks_ptr, out_rows, lse_ptr,
    rule_ptr, query_table,
    num_queries, num_keys, num_items, heads_per_section, scale, softcap, window_size,
    HEADS: tl.constexpr, TILE: tl.constexpr, MODE: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, SINKS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """O and LSE of one query tile of one query head.

    k_desc and v_desc describe K and V to TMA, with DESCRIPTORS, and k_rest_desc and v_rest_desc
    what of them lies in the second tile of a head; sinks_ptr (Hq,) is read with SINKS; lse_ptr is
    (Hq, Tq).
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    QK: tl.constexpr = HEADS.qk
    VO: tl.constexpr = HEADS.vo
    ACC: tl.constexpr = MODE.acc
    MASKED_STAGES: tl.constexpr = 2 if DESCRIPTORS else 1
    q_rows, out_rows = by_eights(q_rows, EIGHTS), by_eights(out_rows, EIGHTS)
    k_rows, v_rows = by_eights(k_rows, EIGHTS), by_eights(v_rows, EIGHTS)
    entry, head = entry_and_head(tl.program_id(0), num_items, heads_per_section)
    kv_head = head // HEADS.group
    item = query_item(query_table, entry)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    k_descs, v_descs = (k_desc, k_rest_desc), (v_desc, v_rest_desc)
    # [BLOCK_M]
    rows = item.row0 + offs_m
    mask_m = rows < item.row1

    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_rows, item.query0, head, mask_m, offs_m, QK)
    scale_log2 = log2_scale(scale, ACC)
    if NEGATIVE_SCALE:
        # The running maximum wants a scale that keeps the order.
        q = scaled(q, -1.0, ACC)
        scale_log2 = -scale_log2
    if MODE.softcap:
        cap_scale = tl.full([], scale, ACC) / softcap
        cap_log2 = log2_scale(softcap, ACC)
        scale_log2 = 1.0
    # [BLOCK_M]
    if SINKS:
        # A key with the score of the sink and a value of zero.
        m_i = tl.zeros([BLOCK_M], ACC) + tl.load(sinks_ptr + head).to(ACC) * LOG2E
        l_i = tl.full([BLOCK_M], 1.0, ACC)
    else:
        m_i = tl.full([BLOCK_M], -float("inf"), ACC)
        l_i = tl.zeros([BLOCK_M], ACC)
    # [BLOCK_M, BLOCK_DV]
    acc = zero_tiles(BLOCK_M, VO, ACC)

    for j in tl.range(0, item.num_listed + item.num_own, num_stages=TILE.num_stages):
        col = full_column(query_table, item, j, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        mask_n = offs_n < BLOCK_N
        k = load_tile(k_rows, k_descs, col, kv_head, mask_n, offs_n, QK, False, DESCRIPTORS)
        # S = Q K^T                                                                      (F1)
        # [BLOCK_M, BLOCK_N]
        s = dot_transposed(q, k, MODE)
        if MODE.softcap:
            # S = c tanh(scale Q K^T / c)                                               (F1')
            s = cap_log2 * tanh(s * cap_scale, MODE.accurate)
        # [BLOCK_N, BLOCK_DV]
        v = load_tile(v_rows, v_descs, col, kv_head, mask_n, offs_n, VO, False, DESCRIPTORS)
        acc, l_i, m_i = softmax_step(s, v, acc, l_i, m_i, scale_log2, MODE)

    # [BLOCK_M]
    floor = row_floor(rule_ptr, rows, mask_m, num_keys, window_size, MODE)
    for j in tl.range(0, item.num_masked, num_stages=MASKED_STAGES):
        col, col_end = masked_column(query_table, item, j)
        # [BLOCK_N]
        cols = col + offs_n
        mask_n = cols < col_end
        # Keys past col_end belong to other tiles: no row sees them here.
        keys = key_rule(rule_ptr, cols, mask_n, num_keys, MODE)
        # [BLOCK_N, BLOCK_D]
        k = load_tile(k_rows, k_descs, col, kv_head, mask_n, offs_n, QK, True, DESCRIPTORS)
        # [BLOCK_M, BLOCK_N]
        s = dot_transposed(q, k, MODE)
        s = cap_log2 * tanh(s * cap_scale, MODE.accurate) if MODE.softcap else s * scale_log2
        s = forbid(s, rows, floor, keys, MODE, False)
        # [BLOCK_N, BLOCK_DV]
        v = load_tile(v_rows, v_descs, col, kv_head, mask_n, offs_n, VO, True, DESCRIPTORS)
        acc, l_i, m_i = softmax_step(s, v, acc, l_i, m_i, 1.0, MODE)

    # O = O' / l,  LSE = ln 2 (m + log2 l)                                               (F5)
    # [BLOCK_M, BLOCK_DV], [BLOCK_M]
    out = divided(acc, l_i[:, None])
    store_rows(out_rows, item.query0, head, out, mask_m, offs_m, VO)
    lse = (m_i + tl.math.log2(l_i)) * LN2
    lse_ptrs = lse_ptr + head.to(tl.int64) * num_queries + item.query0 + offs_m
    tl.store(lse_ptrs, lse, mask=mask_m)


class ForwardLaunch:
    """The forward kernel, for calls of one kind: shapes, strides, dtypes, work list and options."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        tables: ForwardTables,
        options: Options,
        config: Config,
    ) -> None:
        """Fixes all arguments of the kernel but tensors.

        Args:
            q: (Tq, Hq, D), last dimension contiguous.
            k: (T, Hkv, D), likewise.
            v: (T, Hkv, DV), likewise.
            sinks: (Hq,), or None.
            tables: work list made for `config.forward`.
            options: of the call.
            config: tile shapes.
        """
        num_queries, num_heads, _ = q.shape
        num_keys, num_kv_heads, _ = k.shape
        heads = Heads.of(q, k, v, in_two=config.heads_in_two)
        self._out, self._lse = (num_queries, num_heads, v.shape[2]), (num_heads, num_queries)
        self._acc = accumulator(q.dtype)
        out = q.new_empty(self._out, device="meta")
        self._strides = [x.stride()[:2] for x in (q, k, v, out)]
        descriptors = config.forward_descriptors and suits_tma(q.shape[2], v.shape[2], q.itemsize)
        block_n = config.forward.block_n
        self._k_loads = TmaLoads("k", k, block_n, heads.qk, used=descriptors)
        self._v_loads = TmaLoads("v", v, block_n, heads.vo, used=descriptors)
        limit = {} if config.forward_registers is None else {"maxnreg": config.forward_registers}
        num_items = tables.items.shape[0]
        section = config.heads_per_section(
            num_kv_heads, num_keys * (k.shape[2] + v.shape[2]) * k.itemsize
        )
        constants = {
            **self._k_loads.absent,
            **self._v_loads.absent,
            "rule_ptr": tables.rule,
            "query_table": QueryTable(tables.items, tables.columns, tables.masked),
            "num_queries": num_queries,
            "num_keys": num_keys,
            "num_items": num_items,
            "heads_per_section": section * heads.group,
            "scale": scalar_argument(options.scale, q.dtype),
            "softcap": scalar_argument(options.softcap or 1.0, q.dtype),
            "window_size": options.window_size or 0,
            "HEADS": heads,
            "TILE": config.forward,
            "MODE": mode_of(q.dtype, options),
            "NEGATIVE_SCALE": options.scale < 0 and options.softcap is None,
            "SINKS": sinks is not None,
            "DESCRIPTORS": descriptors,
            "EIGHTS": suits_eights(heads, q, k, v, out),
        }
        self._launch = Launch(
            forward_kernel,
            (num_items * num_heads, 1, 1),
            constants,
            num_warps=config.forward_warps,
            **limit,
            enable_fp_fusion=True,
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the kernel: out (Tq, Hq, DV) and lse (Hq, Tq), natural log."""
        out = q.new_empty(self._out)
        lse = q.new_empty(self._lse, dtype=self._acc)
        sinks = lse if sinks is None else sinks
        aligned = are_aligned(q, k, v, sinks, out, lse)
        of_q, of_k, of_v, of_out = self._strides
        self._launch(
            aligned=aligned,
            q_rows=Rows(q, *of_q),
            k_rows=Rows(k, *of_k),
            v_rows=Rows(v, *of_v),
            **self._k_loads.describe(k, aligned=aligned),
            **self._v_loads.describe(v, aligned=aligned),
            sinks_ptr=sinks,
            out_rows=Rows(out, *of_out),
            lse_ptr=lse,
        )
        return out, lse
