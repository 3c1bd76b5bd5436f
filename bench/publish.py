"""Writes the generated tables anew; `python -m bench.publish NAME` keeps a run first.

A run's CSV goes to `bench/results/NAME.csv`, its picture, if there is one, to
`docs/pages/figures/NAME.png`. Tables stand between markers in README.md and in the documentation's
page on performance: those of runs, the modelled machine code and the modelled schedule.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench import schedule_model
from bench.machine_code import budget

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "pages" / "performance.md")
TABLE = re.compile(r"<!-- bench:begin (\S+) -->\n.*?<!-- bench:end -->", re.DOTALL)
MODELS: dict[str, Callable[[], str]] = {
    "machine-code": budget.markdown,
    "schedule": schedule_model.markdown,
}


def markdown(results: Path) -> str:
    """The table of one run: times, speed-up over repeating, share of the ideal."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = _gpu_lines(rows) if rows[0].get("driver") else _cpu_lines(rows)
    first = rows[0]
    versions = f"torch {first['torch']}"
    machine = f"{first['device']}, {first['threads']} threads"
    if first.get("driver"):
        machine = f"{first['device']}, driver {first['driver']}"
        versions += f", Triton {first['triton']}"
    return "\n".join(
        [
            *lines,
            "",
            f"{machine}, {first['dtype']}, {versions}, "
            f"commit {first['commit']}; medians. P prefix, S suffix, G members, query/KV heads. "
            "Speed-up is over repeated SDPA; peak memory holds inputs, output and gradients."
            + _on_modes(rows),
        ]
    )


def _on_modes(rows: list[dict[str, str]]) -> str:
    """What the figures of rows without an ideal mean, if there are any."""
    if all(row["ideal"] for row in rows):
        return ""
    return " TFLOP/s count the pairs of each mode; one that computes another function has no ideal."


def _case(row: dict[str, str]) -> str:
    return (
        f"{row['prefix']}, {row['suffix']}, {row['group']}, "
        f"{row['heads_q']}/{row['heads_kv']}, {row['head_dim']}"
    )


def _cpu_lines(rows: list[dict[str, str]]) -> list[str]:
    lines = [
        "| P, S, G, heads, D | provider | fwd+bwd ms (p20-p80) | speed-up "
        "| ideal | of ideal | MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row["total_ms"]:
            continue
        spread = f"{float(row['total_p20_ms']):.0f}-{float(row['total_p80_ms']):.0f}"
        lines.append(
            f"| {_case(row)} | {row['provider']} | {float(row['total_ms']):.0f} ({spread}) "
            f"| {float(row['total_speedup']):.2f}x | {float(row['ideal']):.2f}x "
            f"| {float(row['share_of_ideal']):.0%} | {float(row['peak_mib']):.0f} |"
        )
    return lines


def _gpu_lines(rows: list[dict[str, str]]) -> list[str]:
    """Milliseconds and useful TFLOP/s of each pass; a dash where there is no figure."""
    lines = [
        "| P, S, G, heads, D | provider | fwd ms | TFLOP/s | bwd ms | TFLOP/s | fwd+bwd ms "
        "| speed-up | ideal | of ideal | MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    fields = (
        ("fwd_ms", ".3f"), ("fwd_tflops", ".0f"), ("bwd_ms", ".3f"), ("bwd_tflops", ".0f"),
        ("total_ms", ".3f"), ("total_speedup", ".2f"), ("ideal", ".2f"), ("share_of_ideal", ".0%"),
        ("peak_mib", ".0f"),
    )  # fmt: skip
    for row in rows:
        cells = [f"{float(row[name]):{form}}" if row[name] else "-" for name, form in fields]
        lines.append(f"| {_case(row)} | {row['provider']} | {' | '.join(cells)} |")
    return lines


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


def main(arguments: list[str] | None = None) -> int:
    """Copies the files of a run and rewrites the tables; 1 if there is no run or no marker."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("name", nargs="?", help="such as cpu; none to only write tables anew")
    parser.add_argument("--run", type=Path, default=ROOT / "out" / "bench", help="folder of a run")
    options = parser.parse_args(arguments)
    if options.name:
        source = options.run / "bench.csv"
        if not source.is_file():
            print(f"{source} does not exist: run `make bench` first", file=sys.stderr)
            return 1
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, RESULTS / f"{options.name}.csv")
        picture = options.run / "bench.png"
        if picture.is_file():
            figure = ROOT / "docs" / "pages" / "figures" / f"{options.name}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, figure)
    pages = {page: page.read_text() for page in PAGES}
    marker = f"<!-- bench:begin {options.name} -->"
    if options.name and not any(marker in text for text in pages.values()):
        print(f"no page has the marker {marker}", file=sys.stderr)
        return 1
    for page, text in pages.items():
        page.write_text(filled(text))
        print(f"Written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
