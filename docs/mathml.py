"""Turns the formulas of the pages into MathML, which browsers draw without a script or a network.

A hook of MkDocs. `pymdownx.arithmatex` finds the formulas, math-core converts them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexToMathML

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(content: str, **_: Any) -> str:
    """The HTML of a page with MathML in place of LaTeX.

    Raises:
        math_core.LatexError: for a formula that can't be converted. It ends the build.
    """
    converter = LatexToMathML()

    def converted(match: re.Match[str]) -> str:
        latex = html.unescape(match["latex"])
        return converter.convert_with_local_state(latex, displaystyle=match["tag"] == "div")

    return FORMULA.sub(converted, content)
