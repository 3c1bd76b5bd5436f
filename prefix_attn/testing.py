"""What tests of exactness share: the error budget, the repeated baseline, interpreter fixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_attn.layout import PrefixLayout


def repeated_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float | None = None
) -> Tensor:
    """PyTorch's own attention with every sequence run whole: what sharing must reproduce.

    Args:
        q: (T, Hq, D) on the packed axis.
        k: (T, Hkv, D).
        v: (T, Hkv, DV).
        layout: of T tokens.
        scale: factor of the scores, `D ** -0.5` by default.

    Returns:
        (T, Hq, DV). A shared row's output is the mean of its copies, which are equal; its
        gradients arrive summed over them.
    """
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    count = torch.zeros(q.shape[0], device=q.device)
    pieces = []
    for i in range(layout.num_sequences):
        rows = layout.sequence_rows(i)
        one, keys, values = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(
            one,
            keys.repeat_interleave(group, dim=1),
            values.repeat_interleave(group, dim=1),
            is_causal=True,
            scale=scale,
        )
        pieces.append((rows, o[0].transpose(0, 1)))
        count[rows] += 1
    for rows, o in pieces:
        out = out.index_add(0, rows, (o / count[rows, None, None]).to(q.dtype))
    return out


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, pytorch: Tensor) -> None:
    """Fails unless `actual` is at most twice as far from float64 as PyTorch is.

    Args:
        name: what is compared, for the message.
        actual: result under test.
        exact: the same in float64.
        pytorch: what PyTorch computes in the dtype of `actual`.

    Raises:
        AssertionError: with both errors. A band of two units in the last place of the largest
            value is allowed beyond the budget, since PyTorch may be right by luck.
    """
    band = 2 * torch.finfo(actual.dtype).eps * _largest(exact)
    error, budget = _largest(actual.double() - exact), _largest(pytorch.double() - exact)
    if not error <= 2 * budget + band:
        raise AssertionError(
            f"{name}: error {error:.3e} against float64, PyTorch has {budget:.3e} "
            f"(largest value {_largest(exact):.3e})"
        )


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def fix_interpreter() -> None:
    """Makes bfloat16 right under TRITON_INTERPRET=1 (Triton 3.6 to 3.9).

    There `tl.dot` multiplies the bit patterns of bfloat16 and casts to it truncate. Calling this
    again does nothing.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "prefix_attn_fixed", False):
        return
    convert, dot = interpreter._convert_float, builder.create_dot

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, rounding)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest_even).astype(np.uint16)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.prefix_attn_fixed = True
