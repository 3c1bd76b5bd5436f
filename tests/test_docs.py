"""What the documentation says is so: examples run, quoted errors exist, pictures are right."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import warnings
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist

from prefix_attn import PrefixLayout
from tests.docs_examples import PAGES, ROOT, examples, names_of_nan, pages_to_run, run_examples

QUICKSTARTS = {"README.md", "docs/pages/index.md"}


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_compile(page):
    for example in examples(page):
        where = f"{page}:{example.line}"
        code = compile(example.code, where, "exec")
        assert code.co_names, f"{where} does nothing"


@pytest.fixture(scope="module")
def one_rank():
    """What torchrun would have started."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", sorted({*pages_to_run(integrations=False)} - QUICKSTARTS))
def test_python_examples_run(page, one_rank):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # FlexAttention says that it is slow when it is not compiled.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        names = run_examples(page, {"__name__": "example"}, integrations=False)
    assert names_of_nan(names) == []


@pytest.mark.parametrize("page", sorted(QUICKSTARTS))
def test_quickstart_runs_and_has_the_shapes_that_it_names(page):
    names = run_examples(page, {"__name__": "example"}, integrations=False)
    layout, q = names["layout"], names["q"]
    assert names["out"].shape == (layout.num_tokens, 8, 64)
    assert q.grad.shape == q.shape
    assert layout.num_tokens == 2619


def test_every_python_block_is_found():
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~) ?py", (ROOT / page).read_text(), flags=re.MULTILINE)
        assert len(examples(page)) == len(fences), page


def test_an_unknown_note_is_refused(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- example: skip -->\n```python\n1 / 0\n```\n")
    monkeypatch.setattr("tests.docs_examples.ROOT", tmp_path)
    with pytest.raises(ValueError, match="unknown note"):
        examples("page.md")


@cache
def messages_of_the_package():
    """Every string of the package, formatted values as an ellipsis."""
    found = set()
    for path in (ROOT / "prefix_attn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "…" for x in node.values)
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def quoted_messages():
    """The messages that the page on troubleshooting quotes."""
    text = (ROOT / "docs" / "pages" / "troubleshooting.md").read_text()
    return re.findall(r"^```text\n(.*?)\n```$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_message_is_one_of_the_package(message):
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*".join(parts), flags=re.DOTALL)
    assert any(pattern.search(known) for known in messages_of_the_package())


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_figures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["docs_figures"]


@pytest.mark.parametrize("kind", ["query", "key"])
def test_drawn_tiles_cover_the_mask_once(figures, kind):
    layout = PrefixLayout.from_lengths([37], [[22, 15, 27]])
    cells = (
        figures.query_cells(layout, 8, 8)
        if kind == "query"
        else figures.key_cells(layout, 8, 8, figures.MAX_CHUNK)
    )
    mask = layout.materialize().numpy()
    visits = np.zeros(mask.shape, dtype=int)
    for cell in cells:
        tile = np.s_[cell.rows[0] : cell.rows[1], cell.keys[0] : cell.keys[1]]
        visits[tile] += 1
        assert cell.kind == "masked" or mask[tile].all()
    assert (visits[mask] == 1).all()
    assert visits.max() == 1


@pytest.mark.parametrize("kind", ["query", "key"])
def test_neighbouring_programs_have_other_colours(figures, kind):
    layout = PrefixLayout.from_lengths([37], [[22, 15, 27]])
    cells = (
        figures.query_cells(layout, 8, 8)
        if kind == "query"
        else figures.key_cells(layout, 8, 8, figures.MAX_CHUNK)
    )
    colours = figures.colours_of_programs(cells)
    owners = np.full((layout.num_tokens, layout.num_tokens + 8), -1)
    for cell in cells:
        owners[cell.rows[0] : cell.rows[1], cell.keys[0] : cell.keys[1]] = cell.program
    neighbours = set()
    for a, b in ((owners[1:], owners[:-1]), (owners[:, 1:], owners[:, :-1])):
        borders = (a != b) & (a >= 0) & (b >= 0)
        neighbours |= set(zip(a[borders].tolist(), b[borders].tolist(), strict=True))
    assert len(neighbours) >= 12
    assert all(colours[a] != colours[b] for a, b in neighbours)
    assert len(set(colours.values())) >= 4


def test_every_picture_is_drawn_and_shown(figures, tmp_path):
    figures.main(["--folder", str(tmp_path)])
    drawn = {path.stem for path in tmp_path.iterdir()}
    kept = {path.stem for path in (ROOT / "docs" / "pages" / "figures").glob("*.svg")}
    assert drawn == kept
    shown = "".join((ROOT / page).read_text() for page in PAGES)
    assert all(f"figures/{name}.svg" in shown for name in drawn)


def test_pictures_have_the_colours_of_light_and_of_dark_pages(figures):
    for name in figures.FIGURES:
        svg = (ROOT / "docs" / "pages" / "figures" / f"{name}.svg").read_text()
        rules, drawing = svg.split("</style>", 1)
        assert "prefers-color-scheme: dark" in rules
        for light, dark in figures.DARK.items():
            assert dark in rules
            # Outside of the rules a light colour is only what stands in for a missing variable.
            assert drawing.count(light) == len(re.findall(rf"var\(--c\d, {light}\)", drawing))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="MkDocs is installed from Python 3.11 on")
def test_site_loads_nothing_from_elsewhere_and_holds_formulas_as_mathml(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", "docs/mkdocs.yml", "-d"]
    subprocess.run([*build, str(tmp_path)], cwd=ROOT, check=True)
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//")
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert not [str(path) for path, text in pages.items() if loads.search(text)]
    source = (ROOT / "docs" / "pages" / "math.md").read_text()
    formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", source, flags=re.DOTALL)
    text = pages[tmp_path / "math" / "index.html"]
    assert text.count("<math") == text.count("</math>") == len(formulas)
    assert "arithmatex" not in text


def test_readme_table_is_that_of_the_results():
    from bench.publish import markdown

    assert markdown(ROOT / "bench" / "results" / "cpu.csv") in (ROOT / "README.md").read_text()
