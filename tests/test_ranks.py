"""`tests.ranks` waits for processes, and leaves none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests import ranks
from tests.poison import poisoned

FORK = multiprocessing.get_context("fork")


@contextmanager
def started(*targets: Callable[[], Any]) -> Iterator[list[Any]]:
    """Processes that die of SIGUSR1, as none of `tests.ranks` does."""
    processes = [FORK.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    yield processes
    assert not any(process.is_alive() for process in processes)


def sleep() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # whatever pytest's process does with it
    time.sleep(60)


def crash() -> None:
    os._exit(3)


@pytest.fixture(autouse=True)
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The end of the pipe to the process that forks; its other end is stdin there."""
    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "w") as held:
        monkeypatch.setattr(ranks.sys, "stdin", stdin)
        yield held


@pytest.mark.parametrize("targets", [(sleep, crash), (crash, sleep), (crash, crash)])
def test_others_of_a_crashed_rank_end_at_once(targets: tuple[Callable[[], None], ...]) -> None:
    start = time.monotonic()
    with started(*targets) as processes:
        ranks._wait_for(processes, start + 30)
    assert time.monotonic() - start < 15
    assert 3 in [process.exitcode for process in processes]


def test_ranks_that_hang_are_killed() -> None:
    with started(sleep, sleep) as processes:
        ranks._wait_for(processes, time.monotonic() + 0.1)
    assert [process.exitcode for process in processes] == [-signal.SIGUSR1] * 2


def test_ranks_end_with_pytest(pipe: Any) -> None:
    pipe.close()
    with started(sleep, sleep) as processes:
        ranks._wait_for(processes, time.monotonic() + 30)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


def test_memory_is_poisoned_no_longer_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def fail() -> None:
        with poisoned():
            assert torch.empty(3).isnan().all()
            raise RuntimeError("of a test")

    with pytest.raises(RuntimeError, match="of a test"):
        fail()
    assert not torch.utils.deterministic.fill_uninitialized_memory
