"""Fixtures for every test, those of the interpreter included."""

from __future__ import annotations

import os
import re
import zlib
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


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Random numbers of a fixture are its own, whichever test asks for it first."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """And those of a test are, whatever ran before it."""
    _seed(item.name)


def _seed(name: str) -> None:
    """Chooses random numbers by a name; the variable SALT chooses others."""
    number = zlib.crc32((os.environ.get("SALT", "") + name).encode())
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond


@pytest.fixture(autouse=True)
def poison_empty() -> Iterator[None]:
    """What a test reads before it is written shows in a result."""
    with poisoned():
        yield
