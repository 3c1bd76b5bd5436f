"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest
import torch

import prefix_attn

ROOT = Path(__file__).parents[1]


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def test_overview_example_runs():
    (code,) = examples("docs/pages/index.md")
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == (2619, 8, 64)
    assert names["q"].grad.shape == names["q"].shape


@pytest.mark.parametrize("code", examples("README.md"))
def test_readme_example_runs(code):
    names = {
        "PrefixLayout": prefix_attn.PrefixLayout,
        "prefix_attention": prefix_attn.prefix_attention,
        "q": torch.randn(2619, 4, 32, requires_grad=True),
        "k": torch.randn(2619, 2, 32),
        "v": torch.randn(2619, 2, 16),
    }
    exec(code, names)
    assert names["out"].shape == (2619, 4, 16)


def test_readme_table_is_that_of_the_results():
    from bench.publish import markdown

    assert markdown(ROOT / "bench" / "results" / "cpu.csv") in (ROOT / "README.md").read_text()
