"""How many bytes autograd holds, by the tensors that are saved for the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SavedBytes:
    """The most bytes that autograd held at once.

    Attributes:
        peak: in bytes; storages that several saved tensors share count once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.peak = 0
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._users: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what is saved meanwhile."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield

    def _keep(self, x: Tensor) -> _Kept:
        key = x.untyped_storage().data_ptr()
        if key not in self._weights:
            self._users[key] += 1
            self._sizes[key] = x.untyped_storage().nbytes()
            self.peak = max(self.peak, sum(self._sizes.values()))
        return _Kept(self, x, key)

    def forget(self, key: int) -> None:
        """One saved tensor less lies in a storage."""
        self._users[key] -= 1
        if not self._users[key]:
            self._sizes.pop(key, None)


class _Kept:
    """A saved tensor, until its graph is gone."""

    def __init__(self, owner: SavedBytes, tensor: Tensor, key: int) -> None:
        self.owner, self.tensor, self.key = owner, tensor, key

    def __del__(self) -> None:
        self.owner.forget(self.key)
