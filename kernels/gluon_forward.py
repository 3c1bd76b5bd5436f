"""The forward pass for Hopper in Gluon: loads, products and softmax overlap by hand.

**Not yet run on a GPU.** It compiles for sm_90 without spills, and its source is tested in Python
against the dense reference; nothing selects it by itself.

The work list, the grid and the results are those of `forward.py`. A block has three warp
specialised parts: one warp loads K and V tiles into stages of shared memory (TMA), and two warp
groups of 64 rows each run the softmax. A warp group starts S of tile i, then O += P V of tile
i - 1, and turns S into P as soon as the first is done: the tensor cores work on P V meanwhile.

Stages pass hands through barriers: `ready` flips when a load has landed, `free` when both warp
groups have read it. The round of a stage, i // STAGES, is even or odd: that is the phase to wait
for. In its first round a stage is free from the start. Two stages are the least: a warp group waits
for V of tile i before it has let go of V of tile i - 1.

Masked tiles come first, so that the first tile needs no loop of its own: the rule that masks them
also holds where there are none.

TMA reads rows past the end of a segment, too, and what is masked has weight zero: a NaN or an
infinity in V spreads to rows that do not see it but share a tile with its segment.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from prefix_attn.kernels import arguments, primitives
from prefix_attn.kernels.arguments import ForwardTables, QueryItem
from prefix_attn.kernels.config import Config, Tile, version_of
from prefix_attn.kernels.options import Options

# How each Triton that this file was compiled with names the load of a tile.
LOADS = {
    "3.6": "async_copy_global_to_shared",
    "3.7": "async_copy_global_to_shared",
    "3.8": "async_load",
    "3.9": "async_load",
}
VERSION = ".".join(triton.__version__.split(".")[:2])
tma_load = getattr(tma, LOADS.get(VERSION, ""), None)

LN2 = gl.constexpr(primitives.LN2.value)
LOG2E = gl.constexpr(primitives.LOG2E.value)
FORBIDDEN = gl.constexpr(arguments.FORBIDDEN.value)

# Registers of a thread at the start, in a warp group that computes, and in the one that loads.
REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 168, 240, 24


@gluon.jit
def query_item(items_ptr, item):
    """Reads one row of a work list of query tiles, as `arguments.query_item` does."""
    ptr = items_ptr + item * 9
    row0, row1, query0 = gl.load(ptr), gl.load(ptr + 1), gl.load(ptr + 2)
    list0, num_listed = gl.load(ptr + 3), gl.load(ptr + 4)
    own0, num_own = gl.load(ptr + 5), gl.load(ptr + 6)
    masked0, num_masked = gl.load(ptr + 7), gl.load(ptr + 8)
    return QueryItem(row0, row1, query0, list0, num_listed, own0, num_own, masked0, num_masked)


@gluon.jit
def tile_column(i, tiles, BLOCK_N: gl.constexpr):
    """First key of tile i: masked tiles, then listed ones, then those of the own run."""
    columns_ptr, masked_ptr, list0, num_listed, own0, masked0, num_masked = tiles
    j = i - num_masked
    if i < num_masked:
        col = gl.load(masked_ptr + 2 * (masked0 + i))
    elif j < num_listed:
        col = gl.load(columns_ptr + list0 + j)
    else:
        col = own0 + (j - num_listed) * BLOCK_N
    return col


@gluon.jit
def load_tile(desc, corner, i, stages, ready, free, STAGES: gl.constexpr):
    """Starts to load tile i into its stage, once both warp groups have read what was there."""
    stage = i % STAGES
    mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    tma_load(desc, corner, ready.index(stage), stages.index(stage))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_tile, k_stages, v_stages, barriers, tiles, num_tiles,
    query0, head, kv_head,
    D: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Loads Q once and all K and V tiles in turn."""
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    for part in gl.static_range(2):
        mbarrier.expect(q_ready.index(part), q_desc.block_type.nbytes)
        tma_load(q_desc, [query0 + part * ROWS, head * D], q_ready.index(part), q_tile.index(part))
    col = tile_column(0, tiles, BLOCK_N)
    load_tile(k_desc, [col, kv_head * D], 0, k_stages, k_ready, k_free, STAGES)
    for i in range(num_tiles):
        # Keys are wanted a tile ahead of values.
        next_col = col
        if i + 1 < num_tiles:
            next_col = tile_column(i + 1, tiles, BLOCK_N)
            load_tile(k_desc, [next_col, kv_head * D], i + 1, k_stages, k_ready, k_free, STAGES)
        load_tile(v_desc, [col, kv_head * DV], i, v_stages, v_ready, v_free, STAGES)
        col = next_col


@gluon.jit
def start_scores(
    i, q, k_stages, k_ready,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Starts S of tile i, without the scale, when its keys are there."""
    stage = i % STAGES
    mbarrier.wait(k_ready.index(stage), (i // STAGES) & 1)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    # S = Q K^T                                                                          (F1)
    k = k_stages.index(stage).permute((1, 0))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def start_output(i, p, v_stages, acc, STAGES: gl.constexpr):
    """Starts to add tile i to O; its values are there."""
    # O' += P V                                                                          (F4)
    return warpgroup_mma(p, v_stages.index(i % STAGES), acc, is_async=True)


@gluon.jit
def mask_scores(i, s, rows, tiles, rule_ptr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Scores of tile i where  c <= r < subtree_end[c],  else FORBIDDEN."""
    _, masked_ptr, _, _, _, masked0, num_masked = tiles
    col = tile_column(i, tiles, BLOCK_N)
    col_end = col + BLOCK_N
    if i < num_masked:
        col_end = gl.load(masked_ptr + 2 * (masked0 + i) + 1)
    cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    # Keys past col_end belong to other tiles: no row sees them here.
    seen_until = gl.load(rule_ptr + cols, mask=cols < col_end, other=0)
    seen = (cols[None, :] <= rows[:, None]) & (rows[:, None] < seen_until[None, :])
    return gl.where(seen, s, FORBIDDEN)


@gluon.jit
def step(
    i, q, p, acc, m_i, l_i, rows, scale_log2, k_stages, v_stages, barriers, tiles, rule_ptr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Adds tile i - 1 to O, and makes P of tile i and waits for its values."""
    _, k_ready, k_free, v_ready, v_free = barriers
    s = start_scores(i, q, k_stages, k_ready, ROWS, BLOCK_N, STAGES, SCORES)
    acc = start_output(i - 1, p, v_stages, acc, STAGES)
    # S is done, P V goes on.
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(i % STAGES), count=1)
    if NEGATIVE_SCALE:
        s = -s
    if MASKED:
        s = mask_scores(i, s * scale_log2, rows, tiles, rule_ptr, BLOCK_N, SCORES)
        scale_log2 = 1.0
    # m' = max(m, max_n S)                                                               (F2)
    m_ij = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
    # P = 2^(S - m')                                                                     (F3)
    weights = gl.exp2(s * scale_log2 - m_ij[:, None])
    # l' = 2^(m - m') l + sum_n P,  O' = 2^(m - m') O                                    (F4)
    alpha = gl.exp2(m_i - m_ij)
    l_i = l_i * alpha + gl.sum(weights, 1)
    # This wait also keeps ptxas from moving the exponentials behind the next one.
    mbarrier.wait(v_ready.index(i % STAGES), (i // STAGES) & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index((i - 1) % STAGES), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    p = gl.convert_layout(weights.to(v_stages.dtype), gl.DotOperandLayout(0, OUT, 2))
    return p, acc, m_ij, l_i


@gluon.jit
def consume(
    out_ptr, lse_ptr, rule_ptr, q_tile, k_stages, v_stages, barriers, tiles, num_tiles,
    row0, row1, query0, head, num_queries, stride_o_t, stride_o_h, scale_log2,
    PART: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """O and LSE of one half of the rows."""
    q_ready, k_ready, k_free, v_ready, _ = barriers
    _, _, _, _, _, _, num_masked = tiles
    # Layouts of S and O in the registers of a warp group, and of O as it is stored.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    offs_m = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    rows = row0 + offs_m

    q = q_tile.index(PART)
    mbarrier.wait(q_ready.index(PART), 0)
    s = start_scores(0, q, k_stages, k_ready, ROWS, BLOCK_N, STAGES, SCORES)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0), count=1)
    if NEGATIVE_SCALE:
        s = -s
    s = mask_scores(0, s * scale_log2, rows, tiles, rule_ptr, BLOCK_N, SCORES)
    m_i = gl.maximum(gl.max(s, 1), FORBIDDEN)
    weights = gl.exp2(s - m_i[:, None])
    l_i = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(v_stages.dtype), gl.DotOperandLayout(0, OUT, 2))
    # [ROWS, DV]
    acc = gl.zeros([ROWS, DV], gl.float32, OUT)
    mbarrier.wait(v_ready.index(0), 0)

    first_full = gl.maximum(num_masked, 1)
    for i in range(1, first_full):
        p, acc, m_i, l_i = step(
            i, q, p, acc, m_i, l_i, rows, scale_log2, k_stages, v_stages, barriers, tiles, rule_ptr,
            ROWS, BLOCK_N, STAGES, NEGATIVE_SCALE, True, SCORES, OUT,
        )  # fmt: skip
    for i in range(first_full, num_tiles):
        p, acc, m_i, l_i = step(
            i, q, p, acc, m_i, l_i, rows, scale_log2, k_stages, v_stages, barriers, tiles, rule_ptr,
            ROWS, BLOCK_N, STAGES, NEGATIVE_SCALE, False, SCORES, OUT,
        )  # fmt: skip
    acc = start_output(num_tiles - 1, p, v_stages, acc, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])

    # O = O' / l,  LSE = ln 2 (m + log2 l)                                               (F5)
    out = acc / gl.convert_layout(l_i, gl.SliceLayout(1, OUT))[:, None]
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), STORED)
    offs_out = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
    offs_dv = gl.arange(0, DV, gl.SliceLayout(0, STORED))
    base = out_ptr + query0.to(gl.int64) * stride_o_t + head.to(gl.int64) * stride_o_h
    out_ptrs = base + offs_out[:, None] * stride_o_t + offs_dv[None, :]
    gl.store(out_ptrs, out, mask=(row0 + offs_out < row1)[:, None])
    lse_ptrs = lse_ptr + head.to(gl.int64) * num_queries + query0 + offs_m
    gl.store(lse_ptrs, (m_i + gl.log2(l_i)) * LN2, mask=rows < row1)


@gluon.jit(do_not_specialize=["num_queries"])
def gluon_forward_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr,
    rule_ptr, items_ptr, columns_ptr, masked_ptr,
    stride_o_t, stride_o_h, num_queries, num_heads, scale,
    GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """O and LSE of one query tile of one query head; lse_ptr is (Hq, Tq)."""
    ROWS: gl.constexpr = BLOCK_M // 2
    pid = gl.program_id(0)
    head = pid % num_heads
    kv_head = head // GROUP
    item = query_item(items_ptr, pid // num_heads)
    # At least one: a row sees its own key.
    num_tiles = item.num_masked + item.num_listed + item.num_own
    scale_log2 = scale * LOG2E
    if NEGATIVE_SCALE:
        # The running maximum wants a scale that keeps the order.
        scale_log2 = -scale_log2

    q_tile = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_stages = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_stages = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, DV], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(q_ready.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()

    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    tiles = (
        columns_ptr, masked_ptr, item.list0, item.num_listed, item.own0,
        item.masked0, item.num_masked,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (
                out_ptr, lse_ptr, rule_ptr, q_tile, k_stages, v_stages, barriers, tiles, num_tiles,
                item.row0, item.row1, item.query0, head, num_queries, stride_o_t, stride_o_h,
                scale_log2, 0, DV, ROWS, BLOCK_N, STAGES, NEGATIVE_SCALE,
            )),
            (consume, (
                out_ptr, lse_ptr, rule_ptr, q_tile, k_stages, v_stages, barriers, tiles, num_tiles,
                item.row0, item.row1, item.query0, head, num_queries, stride_o_t, stride_o_h,
                scale_log2, 1, DV, ROWS, BLOCK_N, STAGES, NEGATIVE_SCALE,
            )),
            (produce, (
                q_desc, k_desc, v_desc, q_tile, k_stages, v_stages, barriers, tiles, num_tiles,
                item.query0, head, kv_head, D, DV, ROWS, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def select_tile(head_dim: int, head_dim_v: int) -> Tile:
    """The tile to make the work list for; as many stages as shared memory holds."""
    # bfloat16, Triton 3.6 to 3.9: no spill; 176, 192 (D 64, DV 128: 176), 160 KB.
    return Tile(128, 128, {256: 2, 192: 3, 128: 4}[head_dim + head_dim_v])


def why_not(
    arch: int | str,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    options: Options,
    sinks: torch.Tensor | None,
) -> str | None:
    """The reason why this kernel can't serve a call, or None.

    Args:
        arch: of the GPU, such as 90; see `select_config`.
        dtype: dtype of q, k and v.
        head_dim: D.
        head_dim_v: DV.
        options: of the call.
        sinks: (Hq,), or None.
    """
    if primitives.INTERPRETED:
        return "Triton's interpreter (TRITON_INTERPRET=1) does not run Gluon"
    if tma_load is None:
        known = ", ".join(LOADS)
        return f"Gluon changes with every Triton: known are {known}, got {triton.__version__}"
    if arch != 90:
        return f"needs compute capability 9.0 (Hopper), got {version_of(arch)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {dtype}"
    if head_dim not in (64, 128) or head_dim_v not in (64, 128):
        return f"needs head dimensions 64 or 128, got D {head_dim} and DV {head_dim_v}"
    used = {
        "window_size": options.window_size is not None,
        "softcap": options.softcap is not None,
        "prefix_causal=False": not options.prefix_causal,
        "sinks": sinks is not None,
    }
    if any(used.values()):
        return "has no " + ", ".join(name for name, is_used in used.items() if is_used)
    return None


def launch_gluon_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    tables: ForwardTables,
    options: Options,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel; to be called only where `why_not` returns None.

    Args:
        q: (Tq, Hq, D).
        k: (T, Hkv, D).
        v: (T, Hkv, DV).
        sinks: None.
        tables: work list made for `config.forward`.
        options: of the call.
        config: its `forward` is `select_tile(D, DV)`.

    Returns:
        out (Tq, Hq, DV) and lse (Hq, Tq), natural log.
    """
    num_queries, num_heads, head_dim = q.shape
    head_dim_v, tile = v.shape[2], config.forward
    assert sinks is None
    assert tile == select_tile(head_dim, head_dim_v)
    out = q.new_empty(num_queries, num_heads, head_dim_v)
    lse = q.new_empty(num_heads, num_queries, dtype=torch.float32)
    if not tables.items.shape[0]:
        return out, lse
    gluon_forward_kernel[(tables.items.shape[0] * num_heads,)](
        q_desc=_descriptor(q, tile.block_m // 2),
        k_desc=_descriptor(k, tile.block_n),
        v_desc=_descriptor(v, tile.block_n),
        out_ptr=out,
        lse_ptr=lse,
        rule_ptr=tables.rule,
        items_ptr=tables.items,
        columns_ptr=tables.columns,
        masked_ptr=tables.masked,
        stride_o_t=out.stride(0),
        stride_o_h=out.stride(1),
        num_queries=num_queries,
        num_heads=num_heads,
        scale=options.scale,
        GROUP=num_heads // k.shape[1],
        D=head_dim,
        DV=head_dim_v,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        NEGATIVE_SCALE=options.scale < 0,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=REGISTERS,
        enable_fp_fusion=True,
    )
    return out, lse


def _descriptor(x: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """Describes (T, H, D) to TMA as (T, H * D), in tiles of block_rows rows of one head."""
    block = [block_rows, x.shape[2]]
    element = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor.from_tensor(primitives.rows_for_tma(x), block, layout)
