"""Results as a table, a CSV and a picture."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import tables
from bench.measure import Result
from bench.providers import FLASH_PACKAGES, OURS, PROVIDERS, TENSORS
from prefix_attn.cases import Case
from prefix_attn.timing import Quantiles

HEADER = (
    "case", "provider", "fwd ms", "p20-p80", "fwd+bwd ms", "p20-p80", "speed-up", "ideal",
    "share", "peak MiB",
)  # fmt: skip
QUANTILES = {"ms": "median", "p20_ms": "p20", "p80_ms": "p80"}
# FLOPs of each pass in those of the forward: two matrix products, five, and both.
WORK = {"fwd": 1.0, "bwd": 2.5, "total": 3.5}
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
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


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
                ideal=result.case.attention_ratio if result.same else None,
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
        if case != last:
            lines.append(())
        lines.append(_cells(row, case.label if case != last else ""))
        last = case
    return tables.text(lines, "ll" + "r" * (len(HEADER) - 2))


def write(results: list[Result], facts: dict[str, Any], folder: Path, cases: int) -> list[str]:
    """Prints the table, writes `bench.csv` and draws so many cases where matplotlib is installed.

    Returns:
        Names of the files.
    """
    rows = compare(results)
    print(f"\n{table(rows)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    tables.write_csv([_record(row) | facts for row in rows], folder / "bench.csv")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there is no picture.")
        return ["bench.csv"]
    drawn = draw(rows, facts, folder / "bench.png", cases)
    return ["bench.csv", "bench.png"] if drawn else ["bench.csv"]


def _record(row: Row) -> dict[str, Any]:
    """A line of the CSV: times in milliseconds, bytes in MiB."""
    result, case = row.result, row.result.case
    flops = case.flops(result.pairs)
    passes: dict[str, Any] = {
        "fwd": result.forward,
        "bwd": result.backward,
        "total": result.total,
    }
    times: dict[str, float | None] = {}
    for name, x in passes.items():
        times |= {f"{name}_{q}": getattr(x, field, None) for q, field in QUANTILES.items()}
    return {
        **asdict(case),
        "provider": result.provider,
        "pairs": result.pairs,
        **times,
        "rounds": result.rounds,
        "compared": result.compared,
        **{f"{n}_tflops": x and WORK[n] * flops / x.median * 1e-9 for n, x in passes.items()},
        "fwd_speedup": row.forward_speedup,
        "total_speedup": row.total_speedup,
        "ideal": row.ideal,
        "share_of_ideal": row.share,
        "peak_mib": result.peak_bytes / 2**20,
        **{f"error_{name}": result.errors.get(name) for name in TENSORS},
        "error_prefix": result.gate_case.prefix,
        "error_suffix": result.gate_case.suffix,
        "error_group": result.gate_case.group,
    }


def draw(rows: list[Row], facts: dict[str, Any], path: Path, most: int) -> bool:
    """Draws the speed-ups over repeated SDPA, with the ideal as a line over each case.

    Modes of ours are left to the tables; without anything else there is no picture, and False.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = {provider.name for provider in PROVIDERS}
    rows = [row for row in rows if row.result.provider in known]
    cases = list(dict.fromkeys(row.result.case for row in rows))[:most]
    if not cases:
        return False
    names = [p.name for p in PROVIDERS if any(row.result.provider == p.name for row in rows)]
    width = max(9.0, 0.5 * len(names) * len(cases) * 0.75)
    figure, panels = plt.subplots(2, 1, figsize=(width, 7.6), sharex=True, layout="constrained")
    fields = {"forward + backward": "total_speedup", "forward": "forward_speedup"}
    for panel, (title, field) in zip(panels, fields.items(), strict=True):
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
    return True


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
