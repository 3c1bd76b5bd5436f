"""The Python examples of the README and of the documentation's pages.

The examples of a page run in their order and share one namespace. A comment in front of an example
says what else becomes of it:

    <!-- example: needs transformers -->   it runs in tests/integrations/test_docs_integrations.py
    <!-- example: syntax only, REASON -->  it is compiled
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
]
EXAMPLE = re.compile(
    r"^(?:<!-- example: (?P<note>[^\n]*) -->\n)?```python[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SYNTAX_ONLY = "syntax only, "


@dataclass(frozen=True)
class Example:
    """A Python block of a page.

    Attributes:
        line: where its code begins, from 1.
        code: its text.
        library: what it needs beside the package, or "".
        runs: False if it is only compiled.
    """

    line: int
    code: str
    library: str
    runs: bool


def examples(page: str) -> list[Example]:
    """All Python blocks of a page.

    Raises:
        ValueError: if a note in front of one is neither of those above.
    """
    text = (ROOT / page).read_text()
    found = []
    for match in EXAMPLE.finditer(text):
        note, code = match["note"] or "", match["code"]
        line = text.count("\n", 0, match.start("code")) + 1
        library = note.removeprefix("needs ") if note.startswith("needs ") else ""
        runs = not note.startswith(SYNTAX_ONLY)
        if (note and runs and not library) or note == SYNTAX_ONLY.strip():
            raise ValueError(f"{page}:{line} has an unknown note: {note!r}")
        found.append(Example(line, code, library, runs))
    return found


def run_examples(page: str, names: dict, *, integrations: bool) -> dict:
    """Runs those examples of a page that need another library, or those that need none.

    Args:
        page: path from the root.
        names: what the examples find; the result holds theirs, too.
        integrations: which of both kinds.
    """
    for example in examples(page):
        # Padding makes the line numbers in a traceback those of the page.
        source = "\n" * (example.line - 1) + example.code
        code = compile(source, page, "exec")
        if example.runs and bool(example.library) == integrations:
            exec(code, names)
    return names


def names_of_nan(names: dict) -> list[str]:
    """The tensors with a NaN among what examples leave."""
    return [
        name
        for name, x in names.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and bool(x.isnan().any())
    ]


def pages_to_run(*, integrations: bool) -> list[str]:
    """The pages that hold examples of a kind."""
    return [
        page
        for page in PAGES
        if any(e.runs and bool(e.library) == integrations for e in examples(page))
    ]
