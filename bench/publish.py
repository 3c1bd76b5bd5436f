"""Writes the generated tables anew; `python -m bench.publish NAME` keeps a run first.

A run's CSV goes to `bench/results/NAME.csv`, its picture, if there is one, to
`docs/pages/figures/NAME.png`. Tables stand between markers in README.md and in the documentation's
pages on options, performance, other libraries, machine code, micro-groups and sequence parallelism:
those of runs, of what backends refuse, and of the models of machine code, of the schedule and of
what ranks send.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import (
    micro,
    options_table,
    peers,
    schedule_model,
    sequence_parallel,
    shapes,
    tables,
)
from bench.machine_code import budget

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "pages"
PAGES = (
    ROOT / "README.md",
    *(
        DOCS / f"{name}.md"
        for name in (
            "options",
            "performance",
            "peers",
            "machine-code",
            "micro-groups",
            "sequence-parallel",
        )
    ),
)
TABLE = re.compile(r"<!-- bench:begin (\S+) -->\n.*?<!-- bench:end -->", re.DOTALL)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
MODELS: dict[str, Callable[[], str]] = {
    "options": options_table.markdown,
    "machine-code": budget.markdown,
    "schedule": schedule_model.markdown,
    "sequence-parallel": sequence_parallel.markdown,
}
ABOVE = (
    "Above 100 % means that the repeated baseline reaches fewer FLOP/s than shared attention; no "
    "work is skipped."
)
MODES = "TFLOP/s count the pairs of each mode; one that computes another function has no ideal."


# Columns of a run's table: title, and figures of the CSV.
CPU_COLUMNS = {
    "fwd+bwd ms (p20-p80)": "{total_ms:.0f} ({total_p20_ms:.0f}-{total_p80_ms:.0f})",
    "speed-up": "{total_speedup:.2f}x",
    "ideal": "{ideal:.2f}x",
    "of ideal": "{share_of_ideal:.0%}",
    "MiB": "{peak_mib:.0f}",
}
GPU_COLUMNS = {
    "fwd ms": "{fwd_ms:.3f}",
    "fwd TFLOP/s": "{fwd_tflops:.0f}",
    "bwd ms": "{bwd_ms:.3f}",
    "bwd TFLOP/s": "{bwd_tflops:.0f}",
    **CPU_COLUMNS,
    "fwd+bwd ms (p20-p80)": "{total_ms:.3f} ({total_p20_ms:.3f}-{total_p80_ms:.3f})",
}


def markdown(results: Path) -> str:
    """The table of one run: of attention times, speed-up over repeating, share of the ideal."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    if "recomputation" in first:
        return micro.markdown(rows)
    if "shape" in first:
        return shapes.markdown(rows)
    if "library" in first:
        return peers.markdown(rows)
    machine = f"{first['device']}, {first['threads']} threads, {first['dtype']}"
    versions, columns = f"torch {first['torch']}", CPU_COLUMNS
    if first.get("driver"):
        machine = f"{first['device']}, driver {first['driver']}, {first['dtype']}"
        versions, columns = f"{versions}, Triton {first['triton']}", GPU_COLUMNS
    else:
        rows = [row for row in rows if row["total_ms"]]
    notes = [
        f"{machine}, {versions}, commit {first['commit']}; medians.",
        "P prefix, S suffix, G members, query/KV heads.",
        "Speed-up is over repeated SDPA; peak memory holds inputs, output and gradients.",
    ]
    if any(float(row["share_of_ideal"] or 0) > 1 for row in rows):
        notes.append(ABOVE)
    if not all(row["ideal"] for row in rows):
        notes.append(MODES)
    header = ("P, S, G, heads, D", "provider", *columns)
    cells = [_cells(row, columns.values()) for row in rows]
    table = tables.markdown(header, cells, "ll" + "r" * len(columns))
    return f"{table}\n\n{' '.join(notes)}"


def _cells(row: dict[str, str], columns: Iterable[str]) -> list[str]:
    """The case, the provider and the figures; a dash where there is none."""
    figures = {name: float(x) for name, x in row.items() if NUMBER.fullmatch(x)}

    def cell(column: str) -> str:
        try:
            return column.format_map(figures)
        except KeyError:
            return "-"

    case = "{prefix}, {suffix}, {group}, {heads_q}/{heads_kv}, {head_dim}".format_map(row)
    return [case, row["provider"], *map(cell, columns)]


def filled(text: str) -> str:
    """A page with every table between markers written anew.

    Raises:
        FileNotFoundError: if a marker names neither a model nor a run that was kept.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        content = MODELS[name]() if name in MODELS else markdown(RESULTS / f"{name}.csv")
        return f"<!-- bench:begin {name} -->\n{content}\n<!-- bench:end -->"

    return TABLE.sub(table, text)


def _first_column(results: Path) -> str:
    """Which tells the benchmarks apart."""
    with results.open(newline="") as file:
        return next(csv.reader(file), [""])[0]


def main(arguments: list[str] | None = None) -> int:
    """Copies the files of a run and rewrites the tables; 1 if there is no such run or no marker."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("name", nargs="?", help="such as cpu; none to only write tables anew")
    parser.add_argument("--run", type=Path, default=ROOT / "out" / "bench", help="folder of a run")
    args = parser.parse_args(arguments)
    pages = {page: page.read_text() for page in PAGES}
    marker = f"<!-- bench:begin {args.name} -->"
    if args.name and not any(marker in text for text in pages.values()):
        print(f"no page has the marker {marker}", file=sys.stderr)
        return 1
    if args.name:
        source = args.run / "bench.csv"
        if not source.is_file():
            print(f"{source} does not exist: run the benchmark first", file=sys.stderr)
            return 1
        kept = RESULTS / f"{args.name}.csv"
        if kept.is_file() and _first_column(kept) != _first_column(source):
            print(
                f"{source} begins with {_first_column(source)!r}, {kept} with "
                f"{_first_column(kept)!r}: pass the folder of a run of {args.name} as --run",
                file=sys.stderr,
            )
            return 1
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, kept)
        picture = args.run / "bench.png"
        if picture.is_file():
            figure = ROOT / "docs" / "pages" / "figures" / f"{args.name}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, figure)
    for page, text in pages.items():
        page.write_text(filled(text))
        print(f"Written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
