"""Writes a folder that the library `kernels` loads, from the sources of the package.

    python -m hub [--out FOLDER]
    kernels.get_local_kernel(Path("out/hub"))

A kernel of the hub is imported under a name of its own, beside an installed copy and beside other
versions of itself. So its imports are relative, and what is registered with PyTorch and
transformers has names of its own: the operators, and the attention implementations.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "prefix_attn"
BACKENDS = ("cpu", "cuda")
# What is imported by name when it is first used.
LAZY = ("prefix_attn.losses", "prefix_attn.integrations.transformers")
IMPORT = re.compile(rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import ", re.MULTILINE)


def main(arguments: list[str] | None = None) -> None:
    """Writes the folder.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m hub", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "hub", help="folder to write")
    out = parser.parse_args(arguments).out
    sources = collect()
    shutil.rmtree(out / "build", ignore_errors=True)
    for backend in BACKENDS:
        write(sources, backend, out / "build" / f"torch-{backend}")
    shutil.copy(ROOT / "LICENSE", out)
    (out / "README.md").write_text(readme())
    print(f"{out}: {len(sources)} modules for {' and '.join(BACKENDS)}")


def collect() -> dict[str, str]:
    """The sources of all modules that the kernel imports, by path from its root."""
    kernel = (ROOT / "hub" / "kernel.py").read_text()
    sources = {"__init__.py": kernel}
    wanted = [*LAZY, *imported_by(kernel)]
    seen = set()
    while wanted:
        module = wanted.pop()
        if module in seen or module == PACKAGE:
            continue
        seen.add(module)
        wanted.append(module.rpartition(".")[0])
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.exists():  # not for a folder without __init__.py, or a name that is no module
            source = path.read_text()
            sources[path.relative_to(ROOT / PACKAGE).as_posix()] = source
            wanted += imported_by(source)
    return sources


def imported_by(source: str) -> Iterator[str]:
    """Names of modules of the package that a source imports, and of what it takes from them."""
    for node in ast.walk(ast.parse(source)):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and module.split(".")[0] == PACKAGE:
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import) and any(x.name.startswith(PACKAGE) for x in node.names):
            raise ValueError(f"write `from {PACKAGE}... import`: a kernel has no module {PACKAGE}")


def write(sources: dict[str, str], backend: str, folder: Path) -> None:
    """Writes the variant for one backend, under names that no other build has."""
    build = hashlib.sha256("".join(f"{p}\0{s}\0" for p, s in sorted(sources.items())).encode())
    identity = f"_{PACKAGE}_{backend}_{build.hexdigest()[:8]}"
    digests = {}
    for path, source in sources.items():
        code = rename(relative(source, path), identity).encode()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(code)
        digests[path] = base64.b64encode(hashlib.sha256(code).digest()).decode()
    metadata = {
        "name": "prefix-attn",
        "id": identity,
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


def relative(source: str, path: str) -> str:
    """Makes the imports of a module relative; its path is that from the kernel's root."""
    dots = "." * (path.count("/") + 1)
    return IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", source)


def rename(source: str, identity: str) -> str:
    """Gives operators and attention implementations names of their own."""
    source = source.replace(f'"{PACKAGE}::', f'"{identity}::')
    source = source.replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{identity}.")
    return re.sub(rf'^(\w+_NAME = )"{PACKAGE}', rf'\1"{identity}', source, flags=re.MULTILINE)


def readme() -> str:
    """What the hub shows."""
    return (
        "---\nlicense: apache-2.0\nlibrary_name: kernels\ntags: [kernels]\n---\n\n"
        "# prefix_attn\n\n"
        "Exact causal attention for sequences that share a prefix: the prefix is computed once.\n\n"
        "```python\nfrom kernels import get_kernel\n\n"
        'prefix_attn = get_kernel("ORGANIZATION/prefix-attn", version=0)\n'
        "model = prefix_attn.enable(model)  # a transformers model\n```\n\n"
        "It needs NumPy, as PyTorch's own `Tensor.numpy` does.\n"
    )


if __name__ == "__main__":
    main()
