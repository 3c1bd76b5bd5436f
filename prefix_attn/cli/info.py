"""Says what is installed, what can run here, and whether it is right."""

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
from prefix_attn import backends
from prefix_attn.api import choose_backend
from prefix_attn.cli.checks import check_gradients
from prefix_attn.cli.terminal import pairs, table
from prefix_attn.layout import PrefixLayout

LIBRARIES = ("triton", "numpy", "transformers", "trl", "verl", "prefix-grouper", "pyarrow")
OPTIONS = ("window_size", "softcap", "sinks", "prefix_causal=False")
# Every environment variable that the package, or Triton on its behalf, reads.
ENVIRONMENT = {
    "PREFIX_ATTN_FORWARD": "gluon runs the optional Hopper forward",
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
    "megatron": ("megatron-core", "megatron.enable(model)"),
    "slime": ("megatron-core", "before_train_step, before_log_prob"),
    "axolotl": ("axolotl", "Plugin"),
    "swift": ("ms-swift", "callback prefix_attn, serve_megatron()"),
    "torchtitan": ("torchtitan", "PrefixAttention, serve_masks()"),
    "areal": (None, "layout_of_trie()"),
    "prefix_grouper": (None, "PrefixGrouper, the interface of prefix-grouper"),
    "distributed": (None, "register_dtensor_rules()"),
}
# What is trained in on a device.
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Returns everything, and exit code 1 if the self-test failed."""
    why_no_gpu, gpus = _why_no_gpu(), []
    if why_no_gpu is None:
        gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    devices = ("cuda", "cpu") if gpus else ("cpu",)
    test = _self_test(devices[0])
    results = {
        "versions": {
            "prefix_attn": prefix_attn.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: _version(name) for name in LIBRARIES},
        },
        "gpus": gpus,
        "why_no_gpu": why_no_gpu,
        "backends": {
            name: {device: _backend(name, device) for device in devices} for name in backends.NAMES
        },
        "integrations": {name: _integration(name) for name in INTEGRATIONS},
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
            f"{gpu['name']}, {_architecture(gpu['capability'])}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, driver {gpu['driver']}",
        )
        for i, gpu in enumerate(results["gpus"])
    ]
    backends = []
    for name, entries in results["backends"].items():
        for device, entry in entries.items():
            text = f"no: {entry['why_not']}" if entry["why_not"] else "available"
            if entry["lacks"]:
                text += f", without {', '.join(entry['lacks'])}"
            if entry["auto"]:
                text += f' (what "auto" takes on {device})'
            backends.append((f"{name}, {device} tensors", text))
    test = results["self_test"]
    how = f"backend {test['backend']}, {test['dtype']}, {test['device']}, {test['seconds']:.2f} s"
    if test["failure"]:
        how += f"; {test['failure']}"
    tested = pairs([(test["result"], how)])
    if test["checks"]:
        rows = [
            [c["name"], f"{c['error']:.1e}", f"{c['pytorch']:.1e}", "ok" if c["ok"] else "FAILED"]
            for c in test["checks"]
        ]
        lines = table(["", "error", "PyTorch's", ""], rows).split("\n")
        tested = "\n".join([tested, *(f"  {line}" for line in lines)])
    sections = {
        "versions": pairs((k, v or "not installed") for k, v in results["versions"].items()),
        "GPU": pairs(gpus or [("no GPU", results["why_no_gpu"])]),
        "backends": pairs(backends),
        "integrations": pairs(
            (name, f"no: {entry['why_not']}" if entry["why_not"] else f"ready: {entry['gives']}")
            for name, entry in results["integrations"].items()
        ),
        "environment variables": pairs(
            (name, f"{entry['meaning']}; {_value(entry['value'])}")
            for name, entry in results["environment"].items()
        ),
        "self-test, forward and backward against float64": tested,
    }
    return "\n\n".join(f"{title}\n{body}" for title, body in sections.items())


def _architecture(capability: str) -> str:
    """As NVIDIA or AMD names it."""
    return f"compute capability {capability}" if capability[0].isdigit() else capability


def _value(text: str | None) -> str:
    return "not set" if text is None else f"now {text!r}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _why_no_gpu() -> str | None:
    """The reason, or None; no driver is asked for where PyTorch has no use for one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        amd = f"ROCm {torch.version.hip}"
        built = amd if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        return f"torch is built for {built}, and finds no device"
    return None


def _gpu(i: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(i)
    capability = f"{properties.major}.{properties.minor}"
    if torch.version.hip is not None:
        capability = properties.gcnArchName.split(":")[0]  # such as gfx942:sramecc+:xnack-
    return {
        "name": properties.name,
        "capability": capability,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def _driver() -> str:
    """Version of NVIDIA's driver, from the kernel module itself."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    except OSError:
        return "unknown"
    return found.group() if found else "unknown"


def _backend(name: str, device: str) -> dict[str, Any]:
    """Why a backend can't run on a device, or the options that it lacks there."""

    def reason(*options: str) -> str | None:
        return backends.why_not(name, device, DTYPES[device], options)

    why_not = reason()
    lacks = [] if why_not else [option for option in OPTIONS if reason(option)]
    return {"why_not": why_not, "lacks": lacks, "auto": _auto(device) == name}


def _auto(device: str) -> str | None:
    try:
        return choose_backend("auto", device, DTYPES[device])
    except NotImplementedError:
        return None


def _integration(name: str) -> dict[str, str | None]:
    """What an integration gives; it is imported if its library is there, so that this is so."""
    library, gives = INTEGRATIONS[name]
    if library and _version(library) is None:
        return {"gives": gives, "why_not": f"{library} is not installed"}
    try:
        importlib.import_module(f"prefix_attn.integrations.{name}")
    except Exception as error:  # libraries fail in many ways when versions do not fit
        reason = str(error).splitlines()[0] if str(error) else ""
        return {"gives": gives, "why_not": f"{type(error).__name__}: {reason}"}
    plugins = metadata.entry_points(group="verl.plugins")
    if name == "verl" and f"prefix_attn.integrations.{name}" not in {x.value for x in plugins}:
        gives = "only with model.external_lib=prefix_attn.integrations.verl (no entry point)"
    return {"gives": gives, "why_not": None}


def _self_test(device: str) -> dict[str, Any]:
    """Ragged tree, grouped heads: forward and backward of "auto" within the error budget."""
    start = time.perf_counter()
    checks, failure = [], None
    try:
        layout = PrefixLayout.from_tree([37, 5, 20, 0, 9], [-1, 0, 1, 1, 0], device=device)
        checks = check_gradients(layout, (4, 2), head_dim=32, dtype=DTYPES[device])
    except Exception as error:  # a broken installation is what this is for
        failure = f"{type(error).__name__}: {error}"
    return {
        "device": device,
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "backend": _auto(device),
        "result": "ok" if checks and all(check.ok for check in checks) else "FAILED",
        "failure": failure,
        "checks": [check.summary() for check in checks],
        "seconds": time.perf_counter() - start,
    }
