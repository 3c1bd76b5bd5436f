"""Fixtures for every test, those of the interpreter included."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.poison import poisoned

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core for each worker: more of them wait for one another

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples in every run, no deadlines

# Libraries that are not part of every environment: files that import a missing one are left out.
OPTIONAL = (
    "deepspeed",
    "hypothesis",
    "megatron",
    "peft",
    "torchtitan",
    "transformers",
    "trl",
    "verl",
)
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
    """What a test reads before it is written shows in a result."""
    with poisoned():
        yield
