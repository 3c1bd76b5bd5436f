"""Keeps a run: `python -m bench.publish NAME` copies `out/bench` to where the docs show it.

The CSV goes to `bench/results/NAME.csv`, the picture to `docs/pages/figures/NAME.png`, and the
table between the markers in README.md is written anew.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "<!-- bench:begin {name} -->", "<!-- bench:end -->"


def markdown(results: Path) -> str:
    """The README's table of one run: times, speed-up over repeating, share of the ideal."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| P, S, G, heads, D | provider | fwd+bwd ms (p20-p80) | speed-up "
        "| ideal | of ideal | MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row["total_ms"]:
            continue
        case = (
            f"{row['prefix']}, {row['suffix']}, {row['group']}, "
            f"{row['heads_q']}/{row['heads_kv']}, {row['head_dim']}"
        )
        spread = f"{float(row['total_p20_ms']):.0f}-{float(row['total_p80_ms']):.0f}"
        lines.append(
            f"| {case} | {row['provider']} | {float(row['total_ms']):.0f} ({spread}) "
            f"| {float(row['total_speedup']):.2f}x | {float(row['ideal']):.2f}x "
            f"| {float(row['share_of_ideal']):.0%} | {float(row['peak_mib']):.0f} |"
        )
    first = rows[0]
    lines += [
        "",
        f"{first['device']}, {first['threads']} threads, {first['dtype']}, torch {first['torch']}, "
        f"commit {first['commit']}; medians. P prefix, S suffix, G members, query/KV heads. "
        "Speed-up is over repeated SDPA; peak memory holds inputs, output and gradients.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Copies the files and rewrites the README's table; 1 if there is no run or no marker."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("name", help="such as cpu")
    parser.add_argument("--run", type=Path, default=ROOT / "out" / "bench", help="folder of a run")
    options = parser.parse_args(arguments)
    source = options.run / "bench.csv"
    if not source.is_file():
        print(f"{source} does not exist: run `make bench` first", file=sys.stderr)
        return 1
    results = ROOT / "bench" / "results" / f"{options.name}.csv"
    figure = ROOT / "docs" / "pages" / "figures" / f"{options.name}.png"
    for path in (results, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, results)
    shutil.copyfile(options.run / "bench.png", figure)
    readme = ROOT / "README.md"
    begin, end = MARKERS[0].format(name=options.name), MARKERS[1]
    text, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{markdown(results)}\n{end}",
        readme.read_text(),
        flags=re.DOTALL,
    )
    if not count:
        print(f"{readme} has no marker {begin}", file=sys.stderr)
        return 1
    readme.write_text(text)
    print(f"Written: {results}, {figure}, {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
