"""Checks and times the kernels on a GPU: `python -m bench.gpu`, or `make gpu`.

Work is cut into units, the most telling ones first: what the device itself can do, whether the
kernels are right, how long they and the alternatives take. Each unit writes its rows to
`records.jsonl` as soon as it is done. Units that the folder already has, from the same commit on
the same device, are skipped, so a run that ended early goes on where it stopped. A unit that fails
is recorded by name; one that kills the process is recorded by the supervisor, which starts another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench import providers
from bench.facts import environment, same_identity
from bench.gpu import report, tune
from bench.gpu.units import Session, Unit, units
from bench.measure import UnsupportedError, WrongResultError
from prefix_attn.timing import Clock

ROOT = Path(__file__).resolve().parents[2]
RECORDS = "records.jsonl"
# A unit that runs longer is ended, and recorded as such.
UNIT_SECONDS = 150.0
# How a worker is started.
COMMAND = [sys.executable, "-m", "bench.gpu"]
POISONED = 3  # exit status of a worker whose device answers no more


class Records:
    """The file that every unit is appended to."""

    def __init__(self, folder: Path, facts: dict[str, Any], session: str) -> None:
        """Makes the folder; `session` is the same for all workers of one run."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.facts, self.session = folder / RECORDS, facts, session
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            # A crash cut the last line short.
            self.path.write_bytes(self.path.read_bytes() + b"\n")

    def append(self, key: str, status: str, reason: str = "", **more: Any) -> None:
        """Adds a line, and has it on disk before it returns."""
        record = {"key": key, "status": status, "reason": reason, "session": self.session, **more}
        with self.path.open("a") as file:
            file.write(json.dumps({**record, "facts": self.facts}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finished(self) -> set[str]:
        """Keys that need no other run: done before, or tried in this session."""
        same = [r for r in read(self.path) if same_identity(r["facts"], self.facts)]
        ended = [r for r in same if r["status"] != "started"]
        settled = ("done", "unsupported")
        return {r["key"] for r in ended if r["session"] == self.session or r["status"] in settled}


def read(path: Path) -> list[dict[str, Any]]:
    """All records; a line that a crash cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def work(args: argparse.Namespace) -> int:
    """Runs units until they are done or the time is over; the exit status of a worker."""
    device = torch.device("cpu" if args.dry_run else "cuda")
    if args.dry_run:
        _prepare_dry_run()
    torch.manual_seed(0)
    # FlexAttention compiles once for each kind of case; at its limit it would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    session = Session(device, args.dry_run, Clock(device), deadline=args.deadline)
    records = Records(args.out, environment(device), args.session)
    todo = tune.units(session, args) if args.kernel else units(session)
    finished = records.finished()
    left = [unit for unit in todo if unit.key not in finished]
    print(f"{len(todo) - len(left)} of {len(todo)} units are done", flush=True)
    postponed = 0
    compiled: set[Hashable] = set()
    for unit in left:
        if unit.expected(compiled) > args.deadline - time.time():
            postponed += 1
            continue
        records.append(unit.key, "started")
        compiled.add(unit.kernels)
        begin = time.monotonic()
        status, reason, rows = attempt(unit)
        seconds = round(time.monotonic() - begin, 2)
        records.append(unit.key, status, reason, rows=rows, seconds=seconds)
        words = f"{status} in {seconds:.1f} s" + (f": {reason}" if reason else "")
        print(f"{unit.key}: {words}{_summary(rows)}", flush=True)
        if not _device_answers(device):
            return POISONED
    if postponed:
        print(f"{postponed} units did not fit into the time: the same command goes on with them")
    return 0


def attempt(unit: Unit) -> tuple[str, str, list[dict[str, Any]]]:
    """Status, reason and rows of a unit, whatever it raises."""
    try:
        return "done", "", unit.run()
    except UnsupportedError as error:
        return "unsupported", str(error), []
    except WrongResultError as error:
        return "wrong", str(error)[:1000], []
    except torch.OutOfMemoryError as error:
        return "failed", f"out of memory: {str(error).splitlines()[0][:200]}", []
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return "failed", f"{type(error).__name__}: {lines[0][:300]}", []


def _summary(rows: list[dict[str, Any]]) -> str:
    texts = []
    for row in rows:
        if "reached" in row:
            texts.append(f"{row['reached']:.0f} {row['unit']}")
        elif row.get("forward"):
            passes = [f"{row[x]['median']:.3f}" for x in ("forward", "total") if row[x]]
            texts.append(f"{' / '.join(passes)} ms")
    return "".join(f", {text}" for text in texts)


def _device_answers(device: torch.device) -> bool:
    """Frees memory; False after an error that the process can't recover from."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _prepare_dry_run() -> None:
    """Runs the kernels in Triton's interpreter, and FlexAttention without a C++ compiler."""
    from prefix_attn.testing import fix_interpreter

    torch.set_num_threads(1)
    fix_interpreter()
    providers.ours_backend = "triton"
    _stand_in_for_gluon()
    providers.flex_compiler = lambda function, **_: function


def _stand_in_for_gluon() -> None:
    """Has the interpreter run the usual forward where it can't run Gluon."""
    from prefix_attn.kernels import gluon_forward
    from prefix_attn.kernels.config import INTERPRETER
    from prefix_attn.kernels.forward import ForwardLaunch

    stand_ins = {
        "why_not": lambda *_: None,
        "select_tile": lambda *_: INTERPRETER.forward,
        "launch_gluon_forward": lambda q, k, v, sinks, *fixed: ForwardLaunch(
            q, k, v, sinks, *fixed
        )(q, k, v, sinks),
    }
    for name, stand_in in stand_ins.items():
        setattr(gluon_forward, name, stand_in)


def supervise(args: argparse.Namespace) -> int:
    """Starts workers until one ends by itself; the exit status of the run."""
    command = [*COMMAND, "--worker", *sys.argv[1:]]
    command += ["--session", args.session, "--deadline", str(args.deadline)]
    environ = dict(os.environ)
    if args.dry_run:
        environ["TRITON_INTERPRET"] = "1"
    path = args.out / RECORDS
    while True:
        known = len(read(path))
        process = subprocess.Popen(command, cwd=ROOT, env=environ)
        ended = _wait(process, path, args)
        if ended == "" and process.returncode == 0:
            return 0
        records = read(path)
        fresh = records[known:]
        if not fresh:
            print(f"The worker ended before any unit, exit status {process.returncode}")
            return 1
        last = fresh[-1]
        if last["status"] == "started":
            reason = ended or f"the process died, exit status {process.returncode}"
            Records(args.out, last["facts"], args.session).append(last["key"], "failed", reason)
            print(f"{last['key']}: failed: {reason}", flush=True)
        if time.time() >= args.deadline:
            return 0


def _wait(process: subprocess.Popen[bytes], path: Path, args: argparse.Namespace) -> str:
    """Waits for a worker; ends it, and says why, if a unit takes too long."""
    size, changed = -1, time.time()
    while process.poll() is None:
        time.sleep(0.2)
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, changed = now, time.time()
        late = time.time() > args.deadline + args.grace
        if late or time.time() - changed > UNIT_SECONDS:
            process.kill()
            process.wait()
            return "the time was over" if late else f"took more than {UNIT_SECONDS:.0f} s"
    return ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with the reason when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder (out/gpu)")
    parser.add_argument("--minutes", type=float, default=8.5, help="time to stop after (8.5)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, on a CPU")
    parser.add_argument("--report", action="store_true", help="only write tables and pictures")
    tune.add_arguments(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--session", default=f"{time.time():.3f}", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, {args.out} is a file")
    try:
        tune.check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    args.out = args.out.resolve()
    # The last unit may end late by so many seconds; then the tables are written.
    args.grace = 15.0
    if args.deadline is None:
        args.deadline = time.time() + args.minutes * 60
    return args


def main() -> int:
    """Runs what is left, then writes the tables; 1 if anything of ours was wrong."""
    args = parse()
    if args.worker:
        return work(args)
    if not (args.dry_run or args.report or torch.cuda.is_available()):
        print(
            "make gpu needs a CUDA device and a PyTorch that sees it; `python -m bench.gpu "
            "--dry-run` tries the script on a CPU.",
            file=sys.stderr,
        )
        return 2
    status = 0 if args.report else supervise(args)
    return max(status, report.write(args.out, read(args.out / RECORDS)))


if __name__ == "__main__":
    sys.exit(main())
