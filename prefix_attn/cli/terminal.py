"""What the commands share: errors, widths and plain text."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

MIN_WIDTH, MAX_WIDTH = 20, 100


class UsageError(Exception):
    """An argument or a file is wrong: printed without a traceback, exit code 2."""


def on_terminal() -> bool:
    """Whether progress is shown: standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def complain(text: str) -> None:
    """Prints a line on standard error, unless that is closed or can't be written."""
    if sys.stderr is not None:
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:  # the exit code says it as well
            silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Throws away what a stream that can't be written still holds, which is tried again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def emit(text: str) -> None:
    """Prints; what the encoding of the output lacks is written as an escape."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def width() -> int:
    """Columns to write in: those of the terminal, 80 in a pipe."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size().columns))


def can_print(characters: str) -> bool:
    """Whether the encoding of the output has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "token"), counted(2000, "token")
        ('1 token', '2,000 tokens')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def flops(count: float) -> str:
    """FLOPs with a prefix: `1.37 TFLOP`."""
    scaled, unit = _scaled(count, 1000, ("", "K", "M", "G", "T", "P", "E"))
    return f"{scaled:.3g} {unit}FLOP"


def size(count: float) -> str:
    """Bytes with a binary prefix: `402 MiB`."""
    scaled, unit = _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"


def _scaled(count: float, base: int, units: Sequence[str]) -> tuple[float, str]:
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return count, units[power]


def visible(text: str) -> str:
    r"""One line that a terminal shows as it stands: no control characters.

    Example:
        >>> visible("a\n\x1b[2J")
        'a\\n\\x1b[2J'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cut(text: str, columns: int) -> str:
    """The beginning of a line, wide characters counted as two columns.

    Example:
        >>> cut("abcdef", 5)
        'ab...'
    """
    sizes = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]
    if sum(sizes) <= columns:
        return text
    room, kept = columns - 3, 0
    while kept < len(text) and sizes[kept] <= room:
        room -= sizes[kept]
        kept += 1
    return (text[:kept] + "...")[: max(columns, 0)]


def paragraph(text: str, first: str = "", indent: str = "") -> str:
    """Text wrapped to the width of the terminal, its lines after `first` and `indent`."""
    return textwrap.fill(
        text,
        width(),
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, one to a line, values wrapped beside their names.

    Names that are long for the terminal have a line of their own.
    """
    rows = list(rows)
    column = min(max((len(name) for name, _ in rows), default=0), width() // 3)
    indent = " " * (column + 4)
    lines = []
    for name, value in rows:
        first = f"  {name:{column}}  "
        if len(name) > column:
            lines.append(f"  {name}")
            first = indent
        lines.append(paragraph(value, first, indent))
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column to the left, the others to the right.

    Where it is wider than the terminal, every row becomes a block of names and values.
    """
    lines = [list(header), *map(list, rows)]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if sum(sizes) + 2 * (len(sizes) - 1) > width():
        blocks = ((line[0], pairs(zip(header[1:], line[1:], strict=True))) for line in lines[1:])
        return "\n".join(f"{name}\n{block}" for name, block in blocks)

    def row(line: list[str]) -> str:
        rest = (cell.rjust(size) for cell, size in zip(line[1:], sizes[1:], strict=True))
        return "  ".join([line[0].ljust(sizes[0]), *rest]).rstrip()

    return "\n".join(map(row, lines))
