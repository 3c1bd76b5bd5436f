"""Times shared-prefix attention, or with --micro a training step: `python -m bench`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from bench import micro, report
from bench.cases import TIMED_DTYPES, case_from_text, cases_of_run, default_dtype
from bench.facts import environment
from bench.measure import MIN_ROUNDS, Outcome, run_case
from prefix_attn.timing import busy, load_average


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with the reason when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--full", action="store_true", help="the whole table, not the quick cases")
    parser.add_argument("--device", default=default_device, help="cpu or cuda")
    parser.add_argument(
        "--case", action="append", default=[], metavar="P,S,G,Hq,Hkv,D", help="may be repeated"
    )
    parser.add_argument(
        "--micro", action="store_true", help="memory and time of micro-groups instead"
    )
    parser.add_argument("--width", type=int, default=256, help="of the model of --micro (256)")
    parser.add_argument(
        "--group", action="append", default=[], type=int, metavar="G", help="for --micro: 8 to 64"
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each time (5)")
    parser.add_argument("--dtype", choices=TIMED_DTYPES, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--out", type=Path, help="folder (out/bench, out/micro)")
    args = parser.parse_args(arguments)
    args.out = args.out or Path("out/micro" if args.micro else "out/bench")
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device must be cpu or cuda, got {args.device!r}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {str(args.device)!r}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if args.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, got {args.rounds}")
    if args.micro and (args.case or args.full):
        parser.error("--micro excludes --case and --full")
    if args.width < 64 or args.width % micro.HEAD_DIM:
        parser.error(f"--width must be a multiple of {micro.HEAD_DIM}, got {args.width}")
    if any(group < micro.AT_A_TIME or group % micro.AT_A_TIME for group in args.group):
        parser.error(f"--group must be a multiple of {micro.AT_A_TIME}, got {args.group}")
    if args.case and args.full:
        parser.error("--case and --full exclude each other")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, {args.out} is a file")
    try:
        dtype = args.dtype or default_dtype(args.device)
        args.cases = [case_from_text(text, dtype) for text in args.case]
    except ValueError as error:
        parser.error(f"--case: {error}")
    args.cases = args.cases or cases_of_run(args.device, args.full, args.dtype)
    args.dtype, args.group = dtype, args.group or list(micro.GROUPS)
    return args


class Lines:
    """What `tqdm` does, in lines, where that is not installed."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def set_description(self, text: str) -> None:
        """Says what is done now."""
        print(text, file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Prints a line of the results."""
        print(text, flush=True)

    def update(self) -> None:
        """A case is done: the next description says so."""


def progress(cases: int) -> Any:
    """A bar over the cases, or lines."""
    if importlib.util.find_spec("tqdm") is None:
        return Lines()
    from tqdm import tqdm

    return tqdm(total=cases, unit="case", file=sys.stderr)


def main() -> int:
    """Runs the cases and writes table, CSV and picture; 1 if a provider was wrong."""
    args = parse()
    device, cases = args.device, args.cases
    facts = environment(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value))
    if args.micro:
        return micro.main(args, progress(2 * len(args.group)))
    total, load = Outcome(), load_average()
    with progress(len(cases)) as bar:
        for case in cases:

            def tick(word: str, label: str = case.label) -> None:
                bar.set_description(f"{label}: {word}")

            outcome = run_case(case, device, args.rounds, tick)
            for reason in outcome.skipped:
                if reason not in total.skipped:  # most hold for every case
                    bar.write(f"{case.label}: {reason}")
                    total.skipped.append(reason)
            for note in outcome.notes:
                bar.write(f"{case.label}: {note}")
            total.results += outcome.results
            total.failures += outcome.failures
            bar.update()
    if total.results:
        if note := busy(load, [x.total or x.forward for x in total.results]):
            print(note)
        written = report.write(total.results, facts, args.out, len(cases))
        print(
            "Speed-ups are over the fastest repeated SDPA, forward + backward unless marked fwd; "
            "share is the speed-up over the ideal.\nPeak memory holds inputs, output, gradients "
            f"and workspace. Written to {args.out}: {', '.join(written)}"
        )
    for failure in total.failures:
        print(f"WRONG, not timed: {failure}", file=sys.stderr)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
