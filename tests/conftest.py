"""Fixtures for every test, those of the interpreter included."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core for each worker: more of them wait for one another

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples in every run, no deadlines

# Libraries that are not part of every environment: files that import a missing one are left out.
OPTIONAL = ("hypothesis", "megatron", "peft", "torchtitan", "transformers", "trl", "verl")
MISSING = [name for name in OPTIONAL if not find_spec(name)]
TOP_IMPORT = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)

collect_ignore = [
    str(path)
    for path in sorted(Path(__file__).parent.rglob("*.py"))
    if set(TOP_IMPORT.findall(path.read_text())) & set(MISSING)
]


def pytest_report_header() -> list[str]:
    """Says what is left out, and why."""
    names = ", ".join(Path(x).name for x in collect_ignore)
    return [f"without {', '.join(MISSING)}, left out: {names}"] if names else []


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
