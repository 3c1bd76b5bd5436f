"""Results as a table, a CSV and a picture."""

from __future__ import annotations

import csv
import hashlib
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.measure import TENSORS, Quantiles, Result
from bench.providers import FLASH_PACKAGES, OURS, PROVIDERS

ROOT = Path(__file__).resolve().parents[1]
# What a measurement is of.
MEASURED = ("kernels", "prefix_attn")
# Facts that rows share when they belong together: those of a run that goes on, those of a table.
IDENTITY = ("device", "driver", "torch", "triton", "commit")
HEADER = (
    "case", "provider", "fwd ms", "p20-p80", "fwd+bwd ms", "p20-p80", "speed-up", "ideal",
    "share", "peak MiB",
)  # fmt: skip
# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = {
    "repeated SDPA": "#999999",
    "repeated SDPA cuDNN": "#999999",
    "repeated SDPA flash": "#56B4E9",
    "repeated SDPA float32": "#999999",
    **dict(zip(FLASH_PACKAGES, ("#D55E00", "#CC79A7"), strict=True)),
    "prefix-grouper": "#E69F00",
    "two calls": "#E69F00",
    "FlexAttention": "#009E73",
    OURS: "#0072B2",
}


@dataclass(frozen=True)
class Row:
    """A result next to the baseline of its case.

    Attributes:
        result: what was measured.
        ideal: FLOPs without sharing over FLOPs with it; None for what computes another function.
        forward_speedup: over the fastest repeated SDPA, None where none ran or there is no ideal.
        total_speedup: the same for forward and backward.
    """

    result: Result
    ideal: float | None
    forward_speedup: float | None
    total_speedup: float | None

    @property
    def share(self) -> float | None:
        """Part of the ideal that is reached, forward and backward; forward where that is all."""
        speedup = self.total_speedup if self.result.total else self.forward_speedup
        return None if speedup is None or self.ideal is None else speedup / self.ideal


LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def compare(results: list[Result]) -> list[Row]:
    """Sets each result against the fastest repeated SDPA of its case."""
    rows = []
    for result in results:
        same = [r for r in results if r.case == result.case] if result.same else []
        baselines = [r for r in same if r.is_baseline]
        forward = min((r.forward.median for r in baselines), default=None)
        total = min((r.total.median for r in baselines if r.total), default=None)
        own = result.total and result.total.median
        rows.append(
            Row(
                result=result,
                ideal=result.case.layout(torch.device("cpu")).flop_ratio if result.same else None,
                forward_speedup=forward and forward / result.forward.median,
                total_speedup=total / own if total and own else None,
            )
        )
    return rows


def _cells(row: Row, case: str) -> tuple[str, ...]:
    def spread(q: Quantiles | None) -> str:
        return f"{q.p20:.1f}-{q.p80:.1f}" if q else "-"

    result = row.result
    speedup, share, mark = row.total_speedup, row.share, ""
    if result.total is None:
        speedup, mark = row.forward_speedup, " fwd"
    return (
        case,
        result.provider,
        f"{result.forward.median:.1f}",
        spread(result.forward),
        f"{result.total.median:.1f}" if result.total else "-",
        spread(result.total),
        f"{speedup:.2f}x{mark}" if speedup else "-",
        f"{row.ideal:.2f}x" if row.ideal else "-",
        f"{share:.0%}" if share else "-",
        f"{result.peak_bytes / 2**20:.0f}",
    )


def table(rows: list[Row]) -> str:
    """Aligned text, one block of lines per case."""
    lines: list[tuple[str, ...]] = [HEADER]
    last = None
    for row in rows:
        case = row.result.case
        lines.append(_cells(row, case.label if case != last else ""))
        last = case
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text: list[str] = []
    for line in lines:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        if line[0] and text:
            text.append("")
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


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
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
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
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


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


def write_csv(rows: list[Row], facts: dict[str, Any], path: Path) -> None:
    """Writes one line per case and provider, times in milliseconds, bytes in MiB."""
    records = []
    for row in rows:
        result, case = row.result, row.result.case
        backward, total = result.backward, result.total
        flops = case.flops(result.pairs)
        record: dict[str, Any] = {
            "prefix": case.prefix,
            "suffix": case.suffix,
            "group": case.group,
            "heads_q": case.heads_q,
            "heads_kv": case.heads_kv,
            "head_dim": case.head_dim,
            "dtype": case.dtype,
            "provider": result.provider,
            "pairs": result.pairs,
            "fwd_ms": result.forward.median,
            "fwd_p20_ms": result.forward.p20,
            "fwd_p80_ms": result.forward.p80,
            "bwd_ms": backward and backward.median,
            "bwd_p20_ms": backward and backward.p20,
            "bwd_p80_ms": backward and backward.p80,
            "total_ms": total and total.median,
            "total_p20_ms": total and total.p20,
            "total_p80_ms": total and total.p80,
            "rounds": result.rounds,
            "compared": result.compared,
            "fwd_tflops": flops / result.forward.median * 1e-9,
            "bwd_tflops": backward and 2.5 * flops / backward.median * 1e-9,
            "total_tflops": total and 3.5 * flops / total.median * 1e-9,
            "fwd_speedup": row.forward_speedup,
            "total_speedup": row.total_speedup,
            "ideal": row.ideal,
            "share_of_ideal": row.share,
            "peak_mib": result.peak_bytes / 2**20,
            **{f"error_{name}": result.errors.get(name) for name in TENSORS},
            "error_prefix": result.gate_case.prefix,
            "error_suffix": result.gate_case.suffix,
            **facts,
        }
        records.append(
            {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in record.items()}
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def draw(rows: list[Row], facts: dict[str, Any], path: Path) -> None:
    """Draws the speed-ups over repeated SDPA per case, with the ideal as a line over each.

    Modes of ours are left to the tables.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = {provider.name for provider in PROVIDERS}
    rows = [row for row in rows if row.result.provider in known]
    cases = list(dict.fromkeys(row.result.case for row in rows))
    names = [p.name for p in PROVIDERS if any(row.result.provider == p.name for row in rows)]
    width = max(9.0, 0.5 * len(names) * len(cases) * 0.75)
    figure, panels = plt.subplots(2, 1, figsize=(width, 7.6), sharex=True, layout="constrained")
    for panel, title, field in zip(
        panels,
        ("forward + backward", "forward"),
        ("total_speedup", "forward_speedup"),
        strict=True,
    ):
        _panel(panel, rows, cases, names, field)
        panel.set_title(title, loc="left", fontsize=11)
    panels[1].set_xticks(range(len(cases)), [_tick_label(case) for case in cases])
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{cases[0].dtype}. P prefix, S suffix, G members, query/KV heads, D head dim.",
        fontsize=8,
        color="0.35",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _tick_label(case: Case) -> str:
    return (
        f"P {case.prefix}  S {case.suffix}  G {case.group}\n"
        f"{case.heads_q}/{case.heads_kv} heads  D {case.head_dim}"
    )


def _panel(panel: Any, rows: list[Row], cases: list[Case], names: list[str], field: str) -> None:
    bar = 0.8 / len(names)
    by_key = {(row.result.case, row.result.provider): row for row in rows}
    for index, name in enumerate(names):
        found = [(i, by_key[case, name]) for i, case in enumerate(cases) if (case, name) in by_key]
        points = [(i, getattr(row, field)) for i, row in found if getattr(row, field)]
        offsets = [i + (index - (len(names) - 1) / 2) * bar for i, _ in points]
        heights = [height for _, height in points]
        bars = panel.bar(offsets, heights, bar * 0.92, color=COLOURS[name], label=name)
        panel.bar_label(bars, fmt="%.2f", fontsize=7.5, padding=2, zorder=4, bbox=LABEL_BOX)
    ideals = [next(row.ideal for row in rows if row.result.case == case) for case in cases]
    at = range(len(cases))
    panel.hlines(
        ideals,
        [i - 0.44 for i in at],
        [i + 0.44 for i in at],
        colors="black",
        label="ideal: FLOP ratio",
    )
    panel.margins(y=0.12)
    panel.set_ylabel("speed-up over repeated SDPA")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
