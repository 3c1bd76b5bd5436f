"""Launches a kernel again and again with arguments of one kind."""

from collections.abc import Mapping
from typing import Any

import torch
from triton.compiler.compiler import CompiledKernel


class Launch:
    """A kernel's grid and arguments, all of them but tensors.

    Triton's launcher reads each argument anew, and asks what it has to compile for: types, integers
    and constants, and whether addresses are multiples of 16. Here all of that but the last is the
    same in every launch. So launches with aligned addresses go straight to what the first of them
    compiled, under the settings of Triton that it found.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Fixes what does not change.

        Args:
            kernel: what `triton.jit` made.
            grid: programs in each direction.
            constants: arguments of the kernel that are the same in every launch.
            options: of the compiler.
        """
        self._kernel, self._grid, self._options = kernel, grid, options
        self._constants = dict(constants)
        self._compiled: tuple[Any, dict[str, Any]] | None = None

    def __call__(self, *, aligned: bool, **arguments: Any) -> None:
        """Launches the kernel on the current stream.

        Args:
            aligned: whether the addresses of all tensors in the arguments are multiples of 16.
            arguments: those that are not constant; always the same ones, in type, dtype and shape.
        """
        # Read once: another thread may set it meanwhile.
        found = self._compiled
        if aligned and found is not None:
            start, places = found
            start(*{**places, **arguments}.values())
            return
        compiled = self._kernel[self._grid](**self._constants, **arguments, **self._options)
        # The interpreter compiles nothing, and AMD's compiler also asks how large a storage is.
        if (
            aligned
            and isinstance(compiled, CompiledKernel)
            and compiled.metadata.target.backend == "cuda"
        ):
            # Compiled kernels take all arguments by position. Tensors of a call are not held.
            places = {name: self._constants.get(name) for name in self._kernel.arg_names}
            self._compiled = compiled[self._grid], places


def are_aligned(*tensors: torch.Tensor) -> bool:
    """Whether all addresses are multiples of 16."""
    bits = 0
    for x in tensors:
        bits |= x.data_ptr()
    return bits % 16 == 0
