"""What the kernels share: addresses, loads, and one step of each recurrence.

Shapes: M query rows, N keys, D head dimension of Q and K, DV head dimension of V. Equations are
numbered as in docs/pages/math.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from prefix_attn.kernels.arguments import Columns, Heads, Mode, Rows
from prefix_attn.kernels.options import Options

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Above this softcap even 16-bit results show the error of the fast tanh.
LARGE_SOFTCAP = 128.0


@triton.jit
def entry_and_head(pid, num_entries, heads_per_section):
    """Sections of heads one after another; in a section all heads of an entry, then the next."""
    section = pid // (num_entries * heads_per_section)
    within = pid % (num_entries * heads_per_section)
    return within // heads_per_section, section * heads_per_section + within % heads_per_section


@triton.jit
def by_eights(x, EIGHTS: tl.constexpr):
    """Rows whose strides the compiler knows to be multiples of 8, if EIGHTS says so.

    By itself it knows only multiples of 16, and loads element by element what is none.
    """
    if EIGHTS:
        return Rows(x.ptr, x.stride_t // 8 * 8, x.stride_h // 8 * 8)
    else:
        return x


@triton.jit
def tile_ptrs(x, row, head, offs_row, offs_d):
    """Addresses of rows [row + offs_row] of one head: 64-bit base, 32-bit offsets in the tile."""
    base = x.ptr + row.to(tl.int64) * x.stride_t + head.to(tl.int64) * x.stride_h
    # [ROWS, BLOCK_D]
    return base + offs_row[:, None] * x.stride_t + offs_d[None, :]


@triton.jit
def piece_ptrs(x, row, head, offs_row, COLUMNS: tl.constexpr, i: tl.constexpr):
    """Addresses of tile i of rows [row + offs_row] of one head, and its columns."""
    offs_d = tl.arange(0, COLUMNS.widths[i])
    if i > 0:
        offs_d += COLUMNS.starts[i]
    return tile_ptrs(x, row, head, offs_row, offs_d), offs_d


@triton.jit
def load_piece(
    x, row, head, mask_row, offs_row,
    COLUMNS: tl.constexpr, i: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Loads tile i of some rows of one head; see `load_rows`."""
    ptrs, offs_d = piece_ptrs(x, row, head, offs_row, COLUMNS, i)
    PADDED: tl.constexpr = COLUMNS.padded[i]
    if MASKED and PADDED:
        return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < COLUMNS.size)[None, :], other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=mask_row[:, None], other=0.0)
    elif PADDED:
        return tl.load(ptrs, mask=(offs_d < COLUMNS.size)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rows(
    x, row, head, mask_row, offs_row, COLUMNS: tl.constexpr, MASKED: tl.constexpr = True
):  # fmt: skip
    """Loads rows [row + offs_row] of one head of x, as a tuple of the tiles that cover it.

    With MASKED, rows outside of mask_row are zero. Columns behind the last one are in any case.
    """
    tiles = ()
    for i in tl.static_range(len(COLUMNS.widths)):
        tiles += (load_piece(x, row, head, mask_row, offs_row, COLUMNS, i, MASKED),)
    return tiles


@triton.jit
def load_tile(
    x, descs, row, head, mask_row, offs_row,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The same; with DESCRIPTORS by TMA, from one of descs for each tile.

    Then rows outside of mask_row hold whatever x holds there, and zeros behind the last row of x.
    """
    if DESCRIPTORS:
        tiles = ()
        for i in tl.static_range(len(COLUMNS.widths)):
            tile = descs[i].load([row, head, COLUMNS.starts[i]])
            tiles += (tl.reshape(tile, [offs_row.shape[0], COLUMNS.widths[i]]),)
        return tiles
    else:
        return load_rows(x, row, head, mask_row, offs_row, COLUMNS, MASKED)


@triton.jit
def store_rows(x, row, head, tiles, mask_row, offs_row, COLUMNS: tl.constexpr):
    """Stores the rows in mask_row without padding columns, in the type of the target."""
    for i in tl.static_range(len(COLUMNS.widths)):
        ptrs, offs_d = piece_ptrs(x, row, head, offs_row, COLUMNS, i)
        value = tiles[i].to(ptrs.dtype.element_ty)
        if COLUMNS.padded[i]:
            tl.store(ptrs, value, mask=mask_row[:, None] & (offs_d < COLUMNS.size)[None, :])
        else:
            tl.store(ptrs, value, mask=mask_row[:, None])


@triton.jit
def zero_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """A sum of so many columns."""
    return tl.zeros([ROWS, WIDTH], ACC)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """Sums for all columns of a head."""
    tiles = ()
    for i in tl.static_range(len(COLUMNS.widths)):
        tiles += (zero_tile(ROWS, COLUMNS.widths[i], ACC),)
    return tiles


@triton.jit
def scaled(tiles, factor, ACC: tl.constexpr):
    """Tiles times a factor, computed in the type of sums."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result += ((tiles[i].to(ACC) * factor).to(tiles[i].dtype),)
    return result


@triton.jit
def divided(tiles, divisor):
    """Tiles over a divisor."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result += (tiles[i] / divisor,)
    return result


@triton.jit
def dot_transposed(a, b, MODE: tl.constexpr):
    """A B^T, over all columns of a head."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=MODE.precision, out_dtype=MODE.acc)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=MODE.precision, out_dtype=MODE.acc)
    return s


@triton.jit
def add_dot(sums, p, b, MODE: tl.constexpr):
    """Sums + P B, for all columns of a head."""
    result = ()
    for i in tl.static_range(len(sums)):
        new = tl.dot(p, b[i], sums[i], input_precision=MODE.precision, out_dtype=MODE.acc)
        result += (new,)
    return result


@triton.jit
def log2_scale(scale, ACC: tl.constexpr):
    """The scale in log2 units, in the accumulator's precision."""
    return tl.full([], scale, ACC) * LOG2E


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """Hyperbolic tangent; ACCURATE keeps small results exact to the last places too."""
    y = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
    if ACCURATE:
        # Pade approximant of order (7, 6): its error is below 1e-15 x there.
        z = x * x
        top = x * (135135.0 + z * (17325.0 + z * (378.0 + z)))
        bottom = 135135.0 + z * (62370.0 + z * (3150.0 + z * 28.0))
        y = tl.where(tl.abs(x) < 0.5, top / bottom, y)
    return y


@triton.jit
def softmax_step(s, v, acc, l_i, m_i, scale_log2, MODE: tl.constexpr):
    """Folds the scores of one key tile into the running softmax; scale_log2 >= 0."""
    # s [BLOCK_M, BLOCK_N], v [BLOCK_N, BLOCK_DV], acc [BLOCK_M, BLOCK_DV], l_i and m_i [BLOCK_M]
    # m' = max(m, max_n S)                                                               (F2)
    m_ij = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    # P = 2^(S - m')                                                                     (F3)
    p = tl.math.exp2(s * scale_log2 - m_ij[:, None])
    # l' = 2^(m - m') l + sum_n P,  O' = 2^(m - m') O + P V                              (F4)
    alpha = tl.math.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = add_dot(scaled(acc, alpha[:, None], MODE.acc), p.to(v[0].dtype), v, MODE)
    return acc, l_i, m_ij


# Decided by TRITON_INTERPRET when the kernels were imported.
INTERPRETED = not isinstance(softmax_step, triton.JITFunction)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and of the LSE: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: PyTorch's own setting for matrix products decides.

    Its older name, `allow_tf32`, can be set as well but not always read: reading it raises once
    the newer one was set.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and has_tf32() else "ieee"


def has_tf32() -> bool:
    """Whether Triton multiplies in tf32 on the current GPU: of AMD's only gfx942 can."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend != "hip" or target.arch.startswith("gfx942")


def mode_of(dtype: torch.dtype, options: Options) -> Mode:
    """What the options and the dtype of a call fix in its kernels."""
    # A softcap multiplies the error of the fast tanh near zero, 1e-7, by itself.
    large = options.softcap is not None and options.softcap > LARGE_SOFTCAP
    return Mode(
        causal=options.prefix_causal,
        window=options.window_size is not None,
        softcap=options.softcap is not None,
        accurate=dtype.itemsize >= 4 or large,
        acc=tl.float64 if dtype == torch.float64 else tl.float32,
        precision=dot_precision(dtype),
    )


def scalar_argument(value: float, dtype: torch.dtype) -> float | tl.constexpr:
    """Scalars reach kernels as float32: float64 inputs need theirs as a constant."""
    return tl.constexpr(value) if dtype == torch.float64 else value


def suits_eights(heads: Heads, *tensors: torch.Tensor) -> bool:
    """Whether `by_eights` helps: 16-bit rows of 16 bytes, of which 32 bytes are no multiple."""
    if not heads.qk.size % 16 and not heads.vo.size % 16:
        return False
    return all(
        x.itemsize == 2 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
        for x in tensors
        if x.dtype == tensors[0].dtype
    )


class TmaLoads:
    """How TMA loads tensors (T, H, D) of one kind: the arguments NAME_desc and NAME_rest_desc.

    Attributes:
        absent: those of them that are None: both if TMA loads nothing, and the second one where one
            tile covers a head.
    """

    def __init__(
        self, name: str, x: torch.Tensor, block_rows: int, columns: Columns, *, used: bool
    ) -> None:
        """Fixes what does not change.

        Args:
            name: of the tensor, in the names of the arguments.
            x: a tensor of that kind.
            block_rows: rows of one head in a tile.
            columns: those of a head.
            used: whether TMA loads the tensors at all.
        """
        names = (f"{name}_desc", f"{name}_rest_desc")
        widths = columns.widths if used else ()
        self._blocks = {n: [block_rows, 1, width] for n, width in zip(names, widths, strict=False)}
        self.absent = dict.fromkeys(n for n in names if n not in self._blocks)
        self._fields: dict[str, dict[str, Any]] | None = None
        if used and has_tma_strides(x):
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            self._fields = {n: vars(descriptor) for n, descriptor in self._checked(like).items()}

    def describe(self, x: torch.Tensor, *, aligned: bool) -> dict[str, TensorDescriptor]:
        """The other arguments, by name.

        Args:
            x: (T, H, D).
            aligned: whether the address of x is known to be a multiple of 16.
        """
        if not self._blocks:
            return {}
        if not aligned or self._fields is None:
            return self._checked(for_tma(x))
        descriptors = {}
        for name, fields in self._fields.items():
            # Checked when the first one was made.
            descriptors[name] = descriptor = TensorDescriptor.__new__(TensorDescriptor)
            vars(descriptor).update(fields, base=x)
        return descriptors

    def _checked(self, x: torch.Tensor) -> dict[str, TensorDescriptor]:
        return {name: TensorDescriptor.from_tensor(x, b) for name, b in self._blocks.items()}


def has_tma_strides(x: torch.Tensor) -> bool:
    """Whether rows and heads of (T, H, D) lie apart, and start at multiples of 16 bytes."""
    unit = 16 // x.itemsize
    row, head, _ = x.stride()
    return row % unit == 0 and head % unit == 0 and row >= x.shape[2] and head >= x.shape[2]


def for_tma(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as TMA addresses it: a copy where rows or heads overlap or lie across 16 bytes."""
    if x.data_ptr() % 16 == 0 and has_tma_strides(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def rows_for_tma(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as (T, H * D) with rows that TMA can address.

    Copies x where its heads do not lie side by side, or where its rows overlap or do not start at
    multiples of 16 bytes.
    """
    flat = x.flatten(1)
    aligned = flat.data_ptr() % 16 == 0 and flat.stride(0) * flat.itemsize % 16 == 0
    if not aligned or flat.stride(0) < flat.shape[1] or flat.stride(1) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat
