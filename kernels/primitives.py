"""What the kernels share: addresses, loads, and one step of each recurrence.

Shapes: M query rows, N keys, D head dimension of Q and K, DV head dimension of V. Equations are
numbered as in docs/pages/math.md.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Stands for "forbidden" in log2 units: exp2 of it is 0, yet differences of it are no NaN.
FORBIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def tile_ptrs(ptr, row, head, stride_t, stride_h, offs_row, offs_d):
    """Addresses of rows [row + offs_row] of one head: 64-bit base, 32-bit offsets in the tile."""
    base = ptr + row.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
    # [ROWS, D]
    return base + offs_row[:, None] * stride_t + offs_d[None, :]


@triton.jit
def load_full(ptrs, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads a tile whose rows all exist."""
    if BLOCK_D == D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def load_masked(ptrs, mask_row, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads a tile; rows outside of mask_row and padding columns are zero."""
    if BLOCK_D == D:
        return tl.load(ptrs, mask=mask_row[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def store_masked(ptrs, value, mask_row, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the rows in mask_row without padding columns, in the type of the target."""
    value = value.to(ptrs.dtype.element_ty)
    if BLOCK_D == D:
        tl.store(ptrs, value, mask=mask_row[:, None])
    else:
        tl.store(ptrs, value, mask=mask_row[:, None] & (offs_d < D)[None, :])


@triton.jit
def log2_scale(scale, ACC: tl.constexpr):
    """The scale in log2 units, in the accumulator's precision."""
    return tl.full([], scale, ACC) * LOG2E


@triton.jit
def softmax_step(s, v, acc, l_i, m_i, scale_log2, PRECISION: tl.constexpr):
    """Folds the scores of one key tile into the running softmax; scale_log2 >= 0."""
    # m' = max(m, max_n S)                                                               (F2)
    m_ij = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    # P = 2^(S - m')                                                                     (F3)
    p = tl.math.exp2(s * scale_log2 - m_ij[:, None])
    # l' = 2^(m - m') l + sum_n P,  O' = 2^(m - m') O + P V                              (F4)
    alpha = tl.math.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, l_i, m_ij


# Decided by TRITON_INTERPRET when the kernels were imported.
INTERPRETED = not isinstance(softmax_step, triton.JITFunction)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and of the LSE: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """`accumulator` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: PyTorch's own setting for matrix products decides."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def scale_argument(scale: float, dtype: torch.dtype) -> float | tl.constexpr:
    """Scalars reach kernels as float32: float64 inputs need theirs as a constant."""
    return tl.constexpr(scale) if dtype == torch.float64 else scale
