"""Fixtures for every test, those of the interpreter included."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core for each worker: more of them wait for one another


@pytest.fixture(autouse=True)
def poison_empty() -> Iterator[None]:
    """Fills new memory with NaN: what is read before it is written shows in a result.

    PyTorch's own switch, so `torch.empty`, `empty_like`, `new_empty` and the allocations inside
    its operators are all covered.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
