"""Says what is installed, what can run here, and whether it is right.

Exit code 1 if the self-test fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import prefix_attn
from prefix_attn.api import choose_backend
from prefix_attn.cli.checks import check_gradients
from prefix_attn.cli.terminal import pairs, table
from prefix_attn.layout import PrefixLayout
from prefix_attn.ops import BACKENDS

EXAMPLE = "info --json"
LIBRARIES = ("triton", "numpy", "transformers", "trl", "verl", "prefix-grouper")
OPTIONS = ("window_size", "softcap", "sinks", "prefix_causal=False")
# Every environment variable that the package, or Triton on its behalf, reads.
ENVIRONMENT = {
    "PREFIX_ATTN_FORWARD": "gluon runs the optional Hopper forward, not yet run on a GPU",
    "PREFIX_ATTN_TILES": "file of tiles that `make gpu-tune` wrote, instead of the built-in ones",
    "FLASH_ATTENTION_DETERMINISTIC": "1 overrules deterministic=False",
    "TRITON_INTERPRET": "1 runs the Triton kernels in Triton's interpreter, on any device",
    "COLUMNS": "width of what these commands print, instead of the terminal's",
}
# Module of prefix_attn.integrations: the library that it needs, and what it gives.
INTEGRATIONS = {
    "transformers": ("transformers", 'enable(model), attn_implementation="prefix_attn"'),
    "trl": ("trl", "KeepGroupsMixin, serve_tree_attention()"),
    "verl": ("verl", "override_config.attn_implementation=prefix_attn"),
    "prefix_grouper": (None, "PrefixGrouper, the interface of prefix-grouper"),
    "distributed": (None, "register_dtensor_rules()"),
}
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Returns everything, and exit code 1 if the self-test failed."""
    gpus = _gpus()
    device = "cuda" if isinstance(gpus, list) else "cpu"
    test = _self_test(device)
    results = {
        "versions": _versions(),
        "gpus": gpus if isinstance(gpus, list) else [],
        "why_no_gpu": None if isinstance(gpus, list) else gpus,
        "backends": _backends(("cuda", "cpu") if device == "cuda" else ("cpu",)),
        "integrations": _integrations(),
        "environment": {
            name: {"meaning": meaning, "value": os.environ.get(name)}
            for name, meaning in ENVIRONMENT.items()
        },
        "self_test": test,
    }
    return results, 0 if test["result"] == "ok" else 1


def render(results: dict[str, Any]) -> str:
    """The facts, one section after another."""
    gpus = [
        (
            f"GPU {i}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, driver {gpu['driver']}",
        )
        for i, gpu in enumerate(results["gpus"])
    ] or [("no GPU", results["why_no_gpu"])]
    backends = []
    for name, entries in results["backends"].items():
        for device, entry in entries.items():
            if entry["why_not"]:
                text = f"no: {entry['why_not']}"
            else:
                text = "available"
                if entry["lacks"]:
                    text += f", without {', '.join(entry['lacks'])}"
                if entry["auto"]:
                    text += f' (what "auto" takes on {device})'
            backends.append((f"{name}, {device} tensors", text))
    test = results["self_test"]
    rows = [
        [c["name"], f"{c['error']:.1e}", f"{c['pytorch']:.1e}", "ok" if c["ok"] else "FAILED"]
        for c in test["checks"]
    ]
    how = f"backend {test['backend']}, {test['dtype']}, {test['device']}, {test['seconds']:.2f} s"
    if test["failure"]:
        how += f"; {test['failure']}"
    sections = {
        "versions": pairs(
            (name, version or "not installed") for name, version in results["versions"].items()
        ),
        "GPU": pairs(gpus),
        "backends": pairs(backends),
        "integrations": pairs(
            (name, f"no: {entry['why_not']}" if entry["why_not"] else f"ready: {entry['gives']}")
            for name, entry in results["integrations"].items()
        ),
        "environment variables": pairs(
            (name, f"{entry['meaning']}; {_value(entry['value'])}")
            for name, entry in results["environment"].items()
        ),
        "self-test, forward and backward against float64": "\n".join(
            [
                pairs([(test["result"], how)]),
                *([_indented(table(["", "error", "PyTorch's", ""], rows))] if rows else []),
            ]
        ),
    }
    return "\n\n".join(f"{title}\n{body}" for title, body in sections.items())


def _value(text: str | None) -> str:
    return "not set" if text is None else f"now {text!r}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "prefix_attn": prefix_attn.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for name in LIBRARIES:
        versions[name] = _version(name)
    return versions


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]] | str:
    """The GPUs, or the reason why there are none; no driver is asked for where there is none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, and finds no device"
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "driver": _driver(),
            }
        )
    return gpus


def _driver() -> str:
    """Version of NVIDIA's driver, from the kernel module itself."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


def _backends(devices: tuple[str, ...]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each backend and device: why it can't run, or the options it lacks."""
    backends: dict[str, dict[str, dict[str, Any]]] = {}
    for name in (*BACKENDS, "reference"):
        backends[name] = {}
        for device in devices:
            dtype = _dtype(device)

            def reason(
                *options: str, name: str = name, device: str = device, dtype: torch.dtype = dtype
            ) -> str | None:
                if name == "reference":
                    return None
                return BACKENDS[name].why_not(device, dtype, options)

            why_not = reason()
            backends[name][device] = {
                "why_not": why_not,
                "lacks": [] if why_not else [o for o in OPTIONS if reason(o)],
                "auto": _auto(device) == name,
            }
    return backends


def _auto(device: str) -> str | None:
    try:
        return choose_backend("auto", device, _dtype(device))
    except NotImplementedError:
        return None


def _dtype(device: str) -> torch.dtype:
    """What is trained in on a device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _integrations() -> dict[str, dict[str, str | None]]:
    """Imports each integration whose library is installed, so that what is said here is so."""
    found = {}
    for name, (library, gives) in INTEGRATIONS.items():
        why_not = None
        if library and _version(library) is None:
            why_not = f"{library} is not installed"
        else:
            try:
                importlib.import_module(f"prefix_attn.integrations.{name}")
            except Exception as error:  # libraries fail in many ways when versions do not fit
                why_not = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
        if name == "verl" and why_not is None and not _verl_plugin():
            gives = "only with model.external_lib=prefix_attn.integrations.verl (no entry point)"
        found[name] = {"gives": gives, "why_not": why_not}
    return found


def _verl_plugin() -> bool:
    """Whether verl finds the plugin by itself: an entry point of the installed package."""
    return any(
        point.value == "prefix_attn.integrations.verl"
        for point in metadata.entry_points(group="verl.plugins")
    )


def _self_test(device: str) -> dict[str, Any]:
    """Ragged tree, grouped heads: forward and backward of "auto" within the error budget."""
    start = time.perf_counter()
    dtype = _dtype(device)
    test: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    checks = []
    failure = None
    try:
        layout = PrefixLayout.from_tree([37, 5, 20, 0, 9], [-1, 0, 1, 1, 0], device=device)
        checks = check_gradients(layout, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    except Exception as error:  # a broken installation is what this is for
        failure = f"{type(error).__name__}: {error}"
    ok = bool(checks) and all(check.ok for check in checks)
    return test | {
        "backend": _auto(device),
        "result": "ok" if ok else "FAILED",
        "failure": failure,
        "checks": [check.summary() for check in checks],
        "seconds": time.perf_counter() - start,
    }
