"""Which backend refuses which option, as the table in docs/pages/options.md.

The table asks the code that refuses; tests/test_options.py and tests/interpreter/test_options.py
hold that what is not refused is exact, forward and backward.
"""

from __future__ import annotations

import torch

from bench import tables
from prefix_attn.api import choose_backend

# Device on which each backend is asked.
BACKENDS = {"triton": "cuda", "cpu": "cpu", "reference": "cpu"}
MEANINGS = {
    "scale": "any factor of the scores, negative or zero",
    "window_size": "sliding window, in positions",
    "softcap": "`c * tanh(s / c)`",
    "sinks": "a learned logit in the denominator",
    "prefix_causal": "`False`: prefixes see themselves whole",
    "bidirectional": "`PrefixLayout.from_tree(..., bidirectional=...)`: some segments do",
    "queries_for": "queries for some segments, keys for all",
    "value dims": "DV other than D, any size from 1 to 512 (triton: 256)",
    "LSE gradient": "`return_lse=True`, differentiable",
}


def is_served(option: str, backend: str) -> bool:
    """Whether a backend takes an option, by its own word."""
    named = {"prefix_causal": "prefix_causal=False"}.get(option, option)
    try:
        choose_backend(backend, BACKENDS[backend], torch.bfloat16, [named])
    except NotImplementedError:
        return False
    return True


def markdown() -> str:
    """The table in Markdown."""
    rows = []
    for option, meaning in MEANINGS.items():
        refusing = [f"`{name}`" for name in BACKENDS if not is_served(option, name)]
        rows.append((f"`{option}`", meaning, ", ".join(refusing)))
    return tables.markdown(("option", "meaning", "refused by"), rows, "lll")
