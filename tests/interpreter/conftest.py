"""Runs the real kernels in Triton's interpreter, under a guard that sees every address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

if not triton.knobs.runtime.interpret:
    pytest.skip("these tests need TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from prefix_attn.testing import fix_interpreter  # noqa: E402

fix_interpreter()


def _leaves(arguments: Iterable[Any]) -> Iterator[Any]:
    """Arguments, tuples taken apart."""
    for x in arguments:
        if isinstance(x, tuple):
            yield from _leaves(x)
        else:
            yield x


class AddressGuard:
    """Checks, launch by launch, that addresses lie in an argument and are written once."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.launches = 0
        self._ranges: list[tuple[int, int]] = []
        self._written: list[np.ndarray] = []

    def start_launch(self, arguments: list[Any]) -> None:
        """Notes the memory that a launch may touch."""
        self.finish_launch()
        self.launches += 1
        self._ranges = []
        for x in _leaves(arguments):
            x = x.base if isinstance(x, TensorDescriptor) else x
            if isinstance(x, torch.Tensor) and x.numel():
                span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                self._ranges.append((x.data_ptr(), x.data_ptr() + span * x.element_size()))

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        """Checks the addresses of one load or store."""
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data).reshape(-1)
        if mask is not None:
            keep = np.broadcast_to(np.asarray(mask.data), np.asarray(pointers.data).shape)
            addresses = addresses[keep.reshape(-1).astype(bool)]
        inside = np.zeros(addresses.shape, dtype=bool)
        for low, high in self._ranges:
            inside |= (addresses >= low) & (addresses + width <= high)
        if not inside.all():
            self.faults.append(f"{int((~inside).sum())} {kind} addresses outside of every argument")
        if kind == "store":
            self._written.append(addresses.astype(np.uint64))

    def finish_launch(self) -> None:
        """Checks that no address was written twice."""
        if self._written:
            addresses = np.concatenate(self._written)
            twice = len(addresses) - len(np.unique(addresses))
            if twice:
                self.faults.append(f"{twice} addresses written twice")
        self._written = []


@pytest.fixture(autouse=True)
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[AddressGuard]:
    """Fails a test whose kernels touch memory that is not theirs, or write it twice."""
    seen = AddressGuard()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, add, init = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        executor._init_args_hst,
    )

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        seen.access("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.access("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def guarded_add(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.access("atomic", pointers, mask)
        return add(self, kind, pointers, value, mask, *rest)

    def guarded_init(self: Any, arguments: Any, named: Any) -> Any:
        result = init(self, arguments, named)
        seen.start_launch([*result[0], *result[1].values()])
        return result

    monkeypatch.setattr(builder, "create_masked_load", guarded_load)
    monkeypatch.setattr(builder, "create_masked_store", guarded_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", guarded_add)
    monkeypatch.setattr(executor, "_init_args_hst", guarded_init)
    yield seen
    seen.finish_launch()
    assert not seen.faults, seen.faults
