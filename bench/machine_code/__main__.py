"""Compiles the kernels ahead of time and reports their machine code, without a GPU.

`python -m bench.machine_code` compiles every kernel as the package's own launchers call it, in the
configurations of `everything`, and holds the result against `bench/machine_code_budget.json`.
`--arch`, `--dtype`, `--head-dim` and `--kernel` choose others, and the Python that runs it chooses
the Triton. `--fits` asks whether everything fits into the shared memory of consumer cards. The
shares of peak come from a model that counts issue slots (`bench.machine_code.sass`), the clocks of
full and masked tiles on Hopper from another one (`bench.machine_code.walk`): nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench import tables
from bench.cases import DTYPES
from bench.machine_code.budget import Budget
from bench.machine_code.compile import compile_all, missing_tools
from bench.machine_code.figures import LIMITS, Report
from bench.machine_code.programs import (
    ARCHITECTURES,
    HEAD_DIMS,
    HEADS,
    KERNELS,
    KV_HEADS,
    consumer,
    everything,
    selected,
    tested,
)
from prefix_attn.kernels.config import AMD

NOTE = (
    "Compiled, not measured: nothing here ran on a GPU. The shares are those of a model that "
    "counts issue slots."
)


def table(reports: list[Report]) -> str:
    """Aligned text, one line per program and one below it per full loop."""
    header = (
        "program", "tiles, stages, warps", "regs", "spill st/ld", "shared KiB", "blocks",
        "instructions", "LDL+STL", "UTMALDG", "tensor cores", "share of peak (model)",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [header]
    for report in reports:
        program, figures = report.program, report.figures
        if figures is None:
            lines.append((program.label, program.shape, *("-",) * (len(header) - 2)))
            continue
        shares = report.shares()
        lines.append(
            (
                program.label,
                program.shape,
                str(figures.registers),
                f"{figures.spill_stores}/{figures.spill_loads}",
                f"{figures.shared / 1024:.1f}",
                str(report.blocks),
                str(figures.instructions),
                str(figures.local),
                str(figures.tma),
                _counts(figures.tensor),
                f"{shares[0]:.0%}-{shares[1]:.0%}" if shares else "",
            )
        )
        for function, loop in figures.loops.items():
            walks = [f"{x:.0f}" for x in (loop.walk, loop.masked_walk) if x is not None]
            lines.append(
                (
                    f"  full loop of {function}",
                    _counts(loop.mix),
                    *[""] * 4,
                    str(loop.instructions),
                    str(loop.local),
                    str(loop.tma),
                    _counts(loop.tensor),
                    f"{loop.useful:.0f} of {loop.together:.0f}-{loop.apart:.0f} clocks"
                    + (f", walk {' / masked '.join(walks)}" if walks else ""),
                )
            )
    return tables.text(lines, "l" * len(header))


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{name} {count}" for name, count in counts.items())


def as_json(reports: list[Report], triton_version: str) -> str:
    """All figures, with the versions that they depend on."""
    programs = []
    for report in reports:
        shares = report.shares()
        programs.append(
            {
                "label": report.program.label,
                **asdict(report.program),
                "shape": report.program.shape,
                "figures": report.figures and asdict(report.figures),
                "blocks": report.blocks,
                "modelled_share": shares and {"apart": shares[0], "together": shares[1]},
                "violations": [asdict(x) for x in report.violations()],
                "error": report.error,
            }
        )
    return json.dumps({"note": NOTE, "triton": triton_version, "programs": programs}, indent=1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with the reason when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the set of the tests")
    parser.add_argument(
        "--fits", action="store_true", help="whether consumer cards have the shared memory for all"
    )
    parser.add_argument(
        "--arch", type=_arch, nargs="+", choices=list(LIMITS), help="80 90 100 gfx942 gfx950"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="all")
    parser.add_argument(
        "--head-dim", nargs="+", metavar="D", help=f"D or D/DV: {' '.join(HEAD_DIMS)}"
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="all")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--update-budget",
        action="store_true",
        help="write the figures into bench/machine_code_budget.json; its exceptions stay",
    )
    parser.add_argument(
        "--accept-known",
        action="store_true",
        help="with --update-budget: write the figures of exceptions, too, where a reason is known",
    )
    args = parser.parse_args(arguments)
    chosen = (args.arch, args.dtype, args.head_dim, args.kernel)
    if args.quick + args.fits + any(chosen) > 1:
        name = "quick" if args.quick else "fits"
        parser.error(f"--{name} chooses what to compile: leave out --arch, --dtype, and so on")
    if args.accept_known and not args.update_budget:
        parser.error("--accept-known goes with --update-budget")
    if args.fits and args.update_budget:
        parser.error("--fits has no budget: leave out --update-budget")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    for size in args.head_dim or ():
        if not re.fullmatch(r"\d+(/\d+)?", size):
            parser.error(f"--head-dim must be D or D/DV, such as 192/128, got {size!r}")
        for head_dim in size.split("/"):
            if not 1 <= int(head_dim) <= 256:
                parser.error(f"--head-dim must be in 1..256, got {head_dim}")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json must name a file in a folder that exists, got {args.json}")
    args.programs = consumer() if args.fits else everything()
    if any(chosen):
        args.programs = selected(
            args.arch or [*ARCHITECTURES, *AMD],
            args.dtype or list(DTYPES),
            args.head_dim or list(HEAD_DIMS),
            args.kernel or list(KERNELS),
        )
    return args


def _arch(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def main() -> int:
    """Compiles and reports; 1 if a program is over its budget, 2 if nothing can be compiled."""
    args = parse()
    if reason := missing_tools():
        print(f"python -m bench.machine_code: {reason}", file=sys.stderr)
        return 2
    import triton

    budget = Budget.from_file(triton_version=triton.__version__)
    programs = tested(triton.__version__) if args.quick else args.programs
    started, done = time.monotonic(), 0

    def tick(report: Report) -> None:
        nonlocal done
        done += 1
        seconds = time.monotonic() - started
        left = seconds / done * (len(programs) - done)
        words = "; ".join(x.text for x in report.violations()) or "ok"
        print(
            f"[{done}/{len(programs)}, {left:.0f} s left] {report.program.label}: {words}",
            file=sys.stderr,
        )

    reports = compile_all(programs, args.jobs, tick)
    seconds = time.monotonic() - started
    print(f"\nTriton {triton.__version__}, {HEADS}/{KV_HEADS} heads. {NOTE}\n\n{table(reports)}\n")
    if args.json:
        args.json.write_text(as_json(reports, triton.__version__) + "\n")
    if args.fits:
        return _print_fits(reports)
    if args.update_budget:
        known = {program.label for program in everything()}
        before = budget
        budget = budget.updated(reports).pruned(known | {r.program.label for r in reports})
        budget = budget.accepting(reports) if args.accept_known else budget
        budget.write()
        print(f"Written: {budget.path}")
        for report in reports:
            left = budget.violations(report)
            for violation in before.violations(report):
                if violation not in left:
                    print(f"accepted: {report.program.label}: {violation.text}")
    over = [(report, found) for report in reports if (found := budget.violations(report))]
    for report, found in over:
        for violation in found:
            print(f"{report.program.label}: {violation.rule}: {violation.text}")
    print(f"{len(reports)} programs in {seconds:.0f} s, {len(over)} over their budget")
    if missing := budget.missing(programs):
        print(
            f"{len(missing)} of them have no baseline for Triton {budget.triton}, so that their "
            "loops were compared with nothing: --update-budget writes them"
        )
    return 1 if over else 0


def _print_fits(reports: list[Report]) -> int:
    """Says what needs the most shared memory; 1 if that is more than there is."""
    wrong = [
        f"{report.program.label}: {violation.text}"
        for report in reports
        for violation in report.violations()
        if violation.rule in ("compile", "shared")
    ]
    for report in sorted(reports, key=lambda x: -(x.figures.shared if x.figures else 0))[:5]:
        if report.figures is not None:
            limit = LIMITS[report.program.arch].shared_per_block
            print(f"{report.program.label}: {report.figures.shared} of {limit} bytes")
    print("\n".join([*wrong, f"{len(reports)} programs, {len(wrong)} do not fit"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
