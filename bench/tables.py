"""Tables as aligned text, as Markdown and as CSV.

The standard library is enough for them: `make gpu` runs where PyTorch and Triton are all there is.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RULES = {"l": "---", "c": ":-:", "r": "---:"}


def text(rows: Iterable[Sequence[str]], align: str) -> str:
    """Aligned columns; a cell runs over empty ones behind it, an empty row is an empty line.

    Args:
        rows: of one cell per column, the header first.
        align: for each column "l" or "r".
    """
    rows = list(rows)
    at, starts, widths = 0, [], []
    for i in range(len(align)):
        cells = (row[i] for row in rows if row and (i + 1 == len(align) or row[i + 1]))
        starts.append(at)
        widths.append(max(map(len, cells), default=0))
        at += widths[-1] + 2
    lines = []
    for row in rows:
        line, shift = "", 0
        for start, width, side, cell in zip(starts, widths, align, row, strict=False):
            if cell:
                # A cell that is longer than its room moves the rest of its row.
                shift = max(shift, len(line) + 2 - start) if line else 0
                line = line.ljust(start + shift) + (cell.rjust(width) if side == "r" else cell)
        lines.append(line)
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """A Markdown table; `align` holds "l", "c" or "r" for each column."""
    rules = "|".join(RULES[side] for side in align)
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{rules}|", *lines[1:]])


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes one line per row, floats with six digits; rows may lack columns of others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({n: f"{x:.6g}" if isinstance(x, float) else x for n, x in row.items()})


def write_run(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    draw: Callable[[list[dict[str, str]], Path], None],
) -> list[dict[str, str]]:
    """Writes `bench.csv`, and draws `bench.png` where matplotlib is installed.

    Returns:
        The rows as the file has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "bench.csv")
    with (folder / "bench.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(written, folder / "bench.png")
    return written
