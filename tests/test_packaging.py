"""What the wheel holds, and what importing the package does and does not do."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from prefix_attn.integrations import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A freshly built wheel, built from a copy of the sources."""
    sources = tmp_path_factory.mktemp("sources")
    tracked = ("pyproject.toml", "README.md", "LICENSE", "kernels", "prefix_attn")
    subprocess.run(["cp", "-a", *(ROOT / name for name in tracked), sources], check=True)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Without --wheel the wheel is built from the source distribution, so both are tested.
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel_names(wheel):
    """Names of the files in the wheel."""
    return wheel.namelist()


def run_python(code, **environment):
    """Runs code in a fresh interpreter in the root of the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_every_module(wheel_names):
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in (ROOT / "prefix_attn", ROOT / "prefix_attn" / "kernels")
        for path in folder.rglob("*.py")
    }
    assert modules <= set(wheel_names)
    assert any(name.startswith("prefix_attn/kernels/") for name in modules)


def test_wheel_installs_the_command(wheel):
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "prefix-attn = prefix_attn.cli:main" in wheel.read(points).decode()


def test_wheel_is_typed(wheel_names):
    assert "prefix_attn/py.typed" in wheel_names


def test_wheel_has_no_top_level_kernels(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prefix_attn"}


def test_wheel_holds_the_licence(wheel_names):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_workflows_take_actions_at_a_commit():
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    used = [name for path in workflows for name in re.findall(r"uses: (\S+)", path.read_text())]
    others = [name for name in used if not name.startswith("./")]
    assert len(others) > 4
    assert [name for name in others if not re.fullmatch(r"\S+@[0-9a-f]{40}", name)] == []


def test_kernels_is_a_relative_symlink():
    link = ROOT / "prefix_attn" / "kernels"
    assert link.is_symlink()
    assert link.readlink().as_posix() == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_without_triton_and_transformers():
    code = (
        "import sys; sys.modules.update({'triton': None, 'transformers': None})\n"
        "import torch, prefix_attn\n"
        "layout = prefix_attn.PrefixLayout.from_lengths([2], [[1, 1]])\n"
        "q = torch.randn(4, 2, 16)\n"
        "print(*prefix_attn.prefix_attention(q, q, q, layout).shape)"
    )
    assert run_python(code) == "4 2 16"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("forest", {"numpy"}), ("radix", {"numpy", "prefix_attn.forest"})],
)
def test_the_host_side_of_layouts_needs_numpy_alone(name, allowed):
    tree = ast.parse((ROOT / "prefix_attn" / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules = [node.names for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported |= {module.name for names in modules for module in names}
    assert {x for x in imported if x.split(".")[0] not in sys.stdlib_module_names} == allowed


def test_star_import_and_dir_name_what_can_be_had():
    code = (
        "import sys\n"
        "if {missing}: sys.modules['transformers'] = None\n"
        "else: sys.modules['transformers'] = types = type(sys)('transformers')\n"
        "if not {missing}: types.__spec__ = 'found'\n"
        "import prefix_attn\n"
        "print(*(name for name in ('enable', 'disable', 'stats') if name in dir(prefix_attn)))\n"
        "if {missing}:\n"
        "    from prefix_attn import *\n"
        "    import inspect\n"
        "    inspect.getmembers(prefix_attn)\n"
        "    print(PrefixLayout.__name__, prefix_attention.__name__, 'enable' in globals())\n"
    )
    found = run_python(code.format(missing=True))
    assert found.splitlines() == ["PrefixLayout prefix_attention False"]
    assert run_python(code.format(missing=False)) == "enable disable stats"


@pytest.mark.parametrize("path", ["pyproject.toml", "Makefile", "docs/pages/transformers.md"])
def test_the_oldest_transformers_is_said_alike_everywhere(path):
    found = re.findall(r"transformers\W+(\d+\.\d+\.\d+)", (ROOT / path).read_text())
    assert set(found) == {OLDEST_TRANSFORMERS}


def test_import_touches_no_integration_and_no_driver():
    """PyTorch's counter of FLOPs imports Triton itself, which finds its driver when it is asked."""
    code = (
        "import sys, torch\n"
        "from prefix_attn import PrefixLayout, prefix_attention\n"
        "assert not torch.cuda.is_initialized()\n"
        "runtime = sys.modules.get('triton.runtime.driver')\n"
        "assert runtime is None or runtime.driver._active is None\n"
        "print([name for name in ('transformers', 'trl', 'verl', 'kernels', "
        "'prefix_attn.kernels.forward') if name in sys.modules])"
    )
    assert run_python(code) == "[]"
