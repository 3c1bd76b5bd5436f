"""What a time depends on besides the case: the machine, versions, the commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# What a measurement is of.
MEASURED = ("kernels", "prefix_attn")
# Facts that rows share when they belong together: those of a run that goes on, those of a table.
IDENTITY = ("device", "driver", "torch", "triton", "commit")


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """What a time depends on besides the case."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "driver": _driver() if cuda else "",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "prefix_attn": _version("prefix_attn"),
        "prefix_grouper": _version("prefix_grouper"),
        "commit": _commit(),
    }


def same_identity(facts: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether measurements under these facts belong together."""
    return all(facts.get(name) == others.get(name) for name in IDENTITY)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit(root: Path = ROOT) -> str:
    """The commit, with a hash of what is measured where that is not all of it."""
    found = _git(root, "describe", "--always", "--dirty", "--abbrev=12")
    # A copy inside of another repository has no commit of its own.
    if not found or _git(root, "rev-parse", "--show-prefix"):
        return f"content-{_content(root)}"
    return f"{found}-{_content(root)}" if found.endswith("-dirty") else found


def _git(root: Path, *arguments: str) -> str:
    return _printed("git", "-C", str(root), *arguments)


def _printed(*command: str) -> str:
    """What a command prints; nothing where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _content(root: Path) -> str:
    """A short hash of the names and the text of all sources that are measured."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(text)}\n".encode())
            digest.update(text)
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    lines = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return (lines.splitlines() or ["unknown"])[0].strip()
