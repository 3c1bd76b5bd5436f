"""Measures training steps over one group: whole, in micro-batches, and in micro-groups.

`python -m bench --micro` runs it. Memory is measured in a process of its own for each point: what
is resident on a CPU, what is allocated on a GPU, at most and beyond the model and its gradients.
Times are those of all providers in turn; on a CPU that of its processors, so that what else runs
there counts little. Needs transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import tables
from bench.facts import environment
from bench.measure import MIN_ROUNDS, peak_memory
from prefix_attn.testing import compare
from prefix_attn.timing import Clock, Quantiles, interleaved, processor_seconds, rounds

PREFIX, SUFFIX, AT_A_TIME, LAYERS, HEAD_DIM, VOCABULARY = 512, 64, 4, 4, 64, 1000
GROUPS = (8, 16, 32, 64)
WHOLE, REPEATED, OURS = NAMES = ("whole group", "micro-batches", "micro-groups")
COLOURS = {WHOLE: "#999999", REPEATED: "#E69F00", OURS: "#0072B2"}
POINT_SECONDS = 120.0  # of timing, for all providers


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        provider: how the group runs, always in an enabled model.
        group: members.
        recomputation: whether layers are checkpointed.
        width: of the model's hidden states.
        dtype: of its parameters.
    """

    provider: str
    group: int
    recomputation: bool
    width: int
    dtype: str


class Step:
    """Training steps of one model.

    Attributes:
        model: an enabled Qwen3 of four layers, with random weights.
    """

    def __init__(self, point: Point, device: torch.device) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        import prefix_attn

        torch.manual_seed(0)
        heads = point.width // HEAD_DIM
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=point.width,
            intermediate_size=3 * point.width,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=HEAD_DIM,
        )
        model = Qwen3ForCausalLM(config).to(device, getattr(torch, point.dtype)).train()
        self.model = prefix_attn.enable(model)
        if point.recomputation:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._provider, self._device = point.provider, device

    def __call__(self, members: int, prefix: int = PREFIX, suffix: int = SUFFIX) -> None:
        """Forward and backward over a group; the loss is that of its members' tokens."""
        import prefix_attn
        from prefix_attn.losses import token_log_probs

        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(VOCABULARY, (prefix,), generator=generator)
        ends = torch.randint(VOCABULARY, (members, suffix), generator=generator)
        ids = torch.cat([prompt.expand(members, -1), ends], dim=1).to(self._device)
        size = members if self._provider == WHOLE else AT_A_TIME
        batches = [{"input_ids": part} for part in ids.split(size)]
        self.model.zero_grad(set_to_none=False)
        ours = self._provider == OURS
        with prefix_attn.micro_groups(self.model, batches) if ours else nullcontext():
            for batch in batches:
                hidden = self.model.model(**batch, use_cache=False).last_hidden_state
                targets = batch["input_ids"][:, prefix:]
                rows = hidden[:, prefix - 1 : -1]
                token_log_probs(rows, self.model.lm_head.weight, targets).sum().backward()

    def warm_up(self) -> None:
        """Loads what a first step loads."""
        self(2 * AT_A_TIME, prefix=80, suffix=2)

    def gradients(self) -> Tensor:
        """All gradients of a step over eight members, end to end."""
        self(8)
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])


def gate(point: Point, device: torch.device) -> str | None:
    """What is wrong with a provider's gradients against float64; None if nothing is."""
    exact = Step(replace(point, provider=REPEATED, dtype="float64"), device).gradients()
    repeated = Step(replace(point, provider=REPEATED), device).gradients()
    found = compare(point.provider, Step(point, device).gradients(), exact, repeated)
    return None if found.ok else f"{found} against float64"


# ---- memory -------------------------------------------------------------------------------------


def peak(point: Point, device: torch.device) -> int:
    """Bytes that a step takes beyond the model and its gradients. For a process of its own."""
    step = Step(point, device)
    step.warm_up()
    if device.type == "cuda":
        return peak_memory(lambda: step(point.group), device)
    before = begin_peak()
    step(point.group)
    return peak_since(before)


def begin_peak() -> int:
    """Bytes that are resident now, where the peak of this process begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_since(before: int) -> int:
    """The most bytes that were resident since then, beyond those."""
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def fresh_processes() -> Pool:
    """One process for each call, which has loaded what it needs and run nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["bench.micro", "prefix_attn.integrations.transformers", "transformers.models.qwen3"]
    )
    return context.Pool(1, maxtasksperchild=1)


# ---- a run --------------------------------------------------------------------------------------


def times(
    points: list[Point], device: torch.device, most_rounds: int, tick: Callable[[str], None]
) -> dict[Point, Quantiles]:
    """Milliseconds of a step, all providers in turn."""
    steps = {point: Step(point, device) for point in points}
    seconds = Clock(device).seconds if device.type == "cuda" else processor_seconds
    samples: dict[Point, list[float]] = {point: [] for point in points}
    for step in steps.values():
        step.warm_up()
    for index, point in interleaved(points, rounds(MIN_ROUNDS, most_rounds, POINT_SECONDS)):
        tick(f"round {index + 1}/{most_rounds} {point.provider}")
        samples[point].append(seconds(partial(steps[point], point.group)))
    return {point: Quantiles.from_seconds(found) for point, found in samples.items()}


def run(
    args: argparse.Namespace, processes: Pool, bar: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures all points; returns a row for each, and what was wrong."""
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for recomputation in (False, True):
        for group in args.group:
            shared = (group, recomputation, args.width, args.dtype)
            points = [Point(provider, *shared) for provider in NAMES]
            label = f"G {group}{', recomputation' if recomputation else ''}"

            def tick(word: str, label: str = label) -> None:
                bar.set_description(f"{label}: {word}")

            if group == args.group[0]:
                tick("float64 check")
                reason = gate(points[-1], args.device)
                wrong += [f"{OURS}, {label}: {reason}"] if reason else []
            peaks = {}
            for point in points:
                tick(f"memory {point.provider}")
                peaks[point] = processes.apply(peak, (point, args.device))
            for point, ms in times(points, args.device, args.rounds, tick).items():
                shape = {"prefix": PREFIX, "suffix": SUFFIX, "at_a_time": AT_A_TIME}
                figures = {"peak_mib": peaks[point] / 2**20, "ms": ms.median}
                spread = {"p20_ms": ms.p20, "p80_ms": ms.p80}
                found.append(asdict(point) | shape | figures | spread)
            bar.update()
    return found, wrong


def main(args: argparse.Namespace, bar: Any) -> int:
    """Measures, prints the table, and writes `bench.csv` and `bench.png`; 1 if ours is wrong."""
    if importlib.util.find_spec("transformers") is None:
        print("bench --micro needs transformers: pip install 'prefix-attn[hf]'", file=sys.stderr)
        return 2
    if args.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        print("bench --micro reads the memory of a process from Linux's /proc", file=sys.stderr)
        return 2
    with fresh_processes() as processes, bar:
        rows, wrong = run(args, processes, bar)
    facts = environment(args.device)
    print(markdown(tables.write_run([row | facts for row in rows], args.out, draw)))
    print(f"Written to {args.out}")
    for failure in wrong:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 1 if wrong else 0


# ---- results ------------------------------------------------------------------------------------


def _series(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], list[Mapping[str, str]]]:
    """Rows in the order of G, by recomputation and provider."""
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["recomputation"], row["provider"]), []).append(row)
    return found


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of a run's CSV: memory and time of all providers, one line for each group."""
    series = _series(rows)
    header = ["recomputation", "G", *(f"{x}, MiB" for x in NAMES), *(f"{x}, s" for x in NAMES)]
    cells = []
    for recomputation in dict.fromkeys(row["recomputation"] for row in rows):
        for same in zip(*(series[recomputation, name] for name in NAMES), strict=True):
            memory = [f"{float(row['peak_mib']):.0f}" for row in same]
            seconds = [f"{float(row['ms']) / 1e3:.2f}" for row in same]
            shown = "yes" if recomputation == "True" else "no"
            cells.append([shown, same[0]["group"], *memory, *seconds])
    first = rows[0]
    kind, clock = ("allocated", "time") if first["driver"] else ("resident", "processor time")
    notes = (
        f"{first['device']}, {first['threads']} threads, {first['dtype']}, torch {first['torch']}, "
        f"commit {first['commit']}. P {first['prefix']}, S {first['suffix']}, "
        f"{first['at_a_time']} members at a time; a Qwen3 of {LAYERS} layers and width "
        f"{first['width']}. MiB: the most {kind} beyond the model and its gradients, in a process "
        f"of its own; s: {clock} of whole steps, medians, all three in turn."
    )
    return f"{tables.markdown(header, cells, 'l' + 'r' * (len(header) - 1))}\n\n{notes}"


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Memory and time over the size of the group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = sorted(_series(rows).items(), key=lambda item: (NAMES.index(item[0][1]), item[0]))
    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.8), layout="constrained")
    columns = {"peak memory of a step, MiB": ("peak_mib", 1.0), "time of a step, s": ("ms", 1e-3)}
    for panel, (title, (column, unit)) in zip(panels, columns.items(), strict=True):
        for (recomputation, name), points in series:
            groups = [int(row["group"]) for row in points]
            values = [float(row[column]) * unit for row in points]
            again = recomputation == "True"
            label = f"{name}, recomputation" if again else name
            style = "o--" if again else "o-"
            panel.plot(groups, values, style, color=COLOURS[name], label=label, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_xticks(groups, [str(group) for group in groups])
        panel.set_ylim(bottom=0)
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("members of the group")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.9")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
