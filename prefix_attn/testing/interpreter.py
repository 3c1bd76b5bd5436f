"""What Triton's interpreter computes wrong or slowly, mended."""

from __future__ import annotations

from functools import cache
from typing import Any


def fix_interpreter() -> None:
    """Makes bfloat16 right under TRITON_INTERPRET=1, and kernels twice as fast (Triton 3.6 to 3.9).

    There `tl.dot` multiplies the bit patterns of bfloat16 and casts to it truncate. Each function
    that a kernel calls has the whole language replaced by the interpreter's, which the launch has
    done before. Calling this again does nothing.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "prefix_attn_fixed", False):
        return
    convert, dot = interpreter._convert_float, builder.create_dot
    patch_language = interpreter._patch_lang

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

    @cache
    def languages(function: Any) -> list[Any]:
        return [x for x in (tl, tl.core) if any(x is y for y in function.__globals__.values())]

    def patch_language_once(function: Any) -> Any:
        found = languages(function)
        if found and not any(tl.core.is_builtin(x.load) for x in found):
            return interpreter._LangPatchScope()  # nothing to restore
        return patch_language(function)

    interpreter._convert_float = convert_float
    interpreter._patch_lang = patch_language_once
    builder.create_dot = create_dot
    builder.prefix_attn_fixed = True
