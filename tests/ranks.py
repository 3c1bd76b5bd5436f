"""Tests that several gloo ranks run together, each of them a process.

    @on_ranks(4)
    def test_something(group): ...  # what every rank runs; pytest waits for all of them

Those tests of a file that are to run start together: one process imports the file, and forks the
ranks, for each number of them anew. What one test leaves behind, such as groups, stays for the next
one, unless it failed.

Nothing hangs: a collective gives up after `PATIENCE`, and ranks that are not done after `LONGEST`
are killed, as are the others of one that crashed. Nothing is left behind: they end with pytest.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from tests.poison import poisoned

ROOT = Path(__file__).parents[1]
PATIENCE = timedelta(seconds=120)
LONGEST = 600.0  # seconds, for all tests of a file on one number of ranks
FAILED, SKIPPED = "failed", "skipped"
# The process that forks the ranks. Some libraries install a package `tests` of their own.
SCRIPT = f"""
import sys, types
from pathlib import Path
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [{str(ROOT / "tests")!r}]
from tests.ranks import main
main(*map(Path, sys.argv[1:]))
"""


@dataclass(frozen=True)
class Run:
    """A test as ranks run it.

    Attributes:
        name: of the test, its parameters included.
        function: its name in the file.
        ranks: how many run it.
        arguments: its parameters.
    """

    name: str
    function: str
    ranks: int
    arguments: dict[str, Any]


@dataclass
class Reports:
    """How the tests of a file went.

    Attributes:
        output: what the processes printed.
        by_rank: by test and rank, (outcome, reason) where it did not pass, else None.
    """

    output: str
    by_rank: dict[str, dict[int, tuple[str, str] | None]] = field(default_factory=dict)

    def check(self, run: Run) -> None:
        """Fails or skips the test that runs now, if a rank did."""
        told = self.by_rank.get(run.name, {})
        missing = sorted(set(range(run.ranks)) - told.keys())
        errors = {rank: x[1] for rank, x in sorted(told.items()) if x and x[0] == FAILED}
        if missing or errors:
            lines = [f"rank {rank}: {error}" for rank, error in errors.items()]
            lines += [f"not done: ranks {missing}", self.output] if missing else []
            pytest.fail("\n".join(lines), pytrace=False)
        if any(told.values()):
            pytest.skip(next(x[1] for x in told.values() if x))


_reports: dict[Path, Reports] = {}


def on_ranks(count: int | str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Lets ranks run a test. Its first argument is their group, which is the world.

    Args:
        count: how many, or which parameter of the test says it.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(request: Any, tmp_path_factory: Any, **arguments: Any) -> None:
            if request.path not in _reports:
                _reports[request.path] = _run_file(request, tmp_path_factory)
            _reports[request.path].check(_run_of(request.node))

        names = ["request", "tmp_path_factory", *list(inspect.signature(check).parameters)[1:]]
        keyword = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([inspect.Parameter(name, keyword) for name in names])
        test.__signature__ = signature
        test.on_ranks = (count, check)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(test, name, getattr(check, name))
        return test

    return decorate


def _module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def _run_of(item: Any) -> Run:
    arguments = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    count = item.function.on_ranks[0]
    ranks = arguments[count] if isinstance(count, str) else count
    return Run(item.name, item.originalname, ranks, arguments)


def _is_chosen(item: Any, request: Any) -> bool:
    """Whether it is a test of the file for ranks, and not one that pytest skips."""
    if item.path != request.path or not hasattr(item.function, "on_ranks"):
        return False
    return not any(mark.args[0] for mark in item.iter_markers("skipif"))


def _run_file(request: Any, tmp_path_factory: Any) -> Reports:
    """Runs those tests of a file that pytest has chosen; once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / f"ranks_of_{_module_name(request.path)}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            runs = [_run_of(item) for item in request.session.items if _is_chosen(item, request)]
            (folder / "runs").write_bytes(pickle.dumps(runs))
            with (folder / "output").open("w") as output:
                script = [sys.executable, "-c", SCRIPT, str(request.path), str(folder)]
                # A process that has had threads can't be forked.
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
                # The pipe is closed when this process ends, however it does.
                streams["stdin"] = subprocess.PIPE
                with subprocess.Popen(script, cwd=ROOT, env=environment, **streams) as process:
                    process.wait()
    reports = Reports((folder / "output").read_text())
    for file in folder.glob("*.report"):
        for name, told in pickle.loads(file.read_bytes()).items():
            reports.by_rank.setdefault(name, {})[int(file.name.split(".")[1])] = told
    return reports


# ---- the process that forks the ranks, and these ------------------------------------------------


def main(file: Path, folder: Path) -> None:
    """Imports a file of tests and runs some of them, on each number of ranks in turn."""
    module = importlib.import_module(_module_name(file))
    runs: list[Run] = pickle.loads((folder / "runs").read_bytes())
    fork = multiprocessing.get_context("fork")  # one process has imported all, without threads
    for count in sorted({run.ranks for run in runs}):
        chosen = [run for run in runs if run.ranks == count]
        ranks = [
            fork.Process(target=_rank, args=(rank, count, module, chosen, folder))
            for rank in range(count)
        ]
        with poisoned():  # so that no rank has to import what it takes
            for process in ranks:
                process.start()
        _wait_for(ranks, time.monotonic() + LONGEST)


def _wait_for(ranks: list[Any], last: float) -> None:
    """Until all are done, one has crashed, it is too late or pytest has ended: kills the others."""
    try:
        while time.monotonic() < last:
            codes = [process.exitcode for process in ranks]  # asked once: each may crash meanwhile
            running = [x.sentinel for x, code in zip(ranks, codes, strict=True) if code is None]
            if any(codes):
                break
            if not running or sys.stdin in wait([*running, sys.stdin], last - time.monotonic()):
                return
        late = [process for process in ranks if process.is_alive()]
        for process in late:  # each says where it is
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0 if late else 0.0)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(rank: int, count: int, module: Any, runs: list[Run], folder: Path) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ.update({name: str(x) for name, x in numbers.items()}, GLOO_SOCKET_IFNAME="lo")
    store = dist.FileStore(str(folder / f"{count}.store"), count)
    store.set_timeout(timedelta(seconds=LONGEST))
    reports: dict[str, tuple[str, str] | None] = {}
    for number, run in enumerate(runs):
        if not dist.is_initialized():
            place = dist.PrefixStore(f"from test {number}", store)
            options = {"rank": rank, "world_size": count, "timeout": PATIENCE}
            dist.init_process_group("gloo", store=place, **options)
        start = time.perf_counter()
        reports[run.name] = _report(getattr(module, run.function).on_ranks[1], run.arguments)
        if rank == 0:
            print(f"{time.perf_counter() - start:6.1f} s  {run.name} on {count}", flush=True)
        (folder / f"{count}.{rank}.report").write_bytes(pickle.dumps(reports))
        # A rank that failed may have left the others in a collective: all start anew.
        store.set(f"{number} of {rank}", str(reports[run.name] is None))
        passed = [store.get(f"{number} of {other}") == b"True" for other in range(count)]
        if not all(passed):
            dist.destroy_process_group()


def _report(check: Callable[..., None], arguments: dict[str, Any]) -> tuple[str, str] | None:
    try:
        with poisoned():
            check(dist.group.WORLD, **arguments)
    except pytest.skip.Exception as reason:
        return SKIPPED, str(reason)
    except (Exception, pytest.fail.Exception):
        return FAILED, traceback.format_exc()
    return None
