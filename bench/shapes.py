"""Times options, dtypes and trees on a CPU beside what a user would run instead.

`python -m bench.shapes` prints a table, writes `bench.csv` and draws `bench.png`; names of shapes
choose some. Every sequence is repeated whole, padded to the longest: through SDPA, with a boolean
mask under a window, as the formula that models write out under a softcap or with sinks. Prefix
Grouper serves plain groups.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import tables
from bench.facts import environment
from bench.measure import AGREEMENT_EPS, MIN_ROUNDS, peak_memory
from bench.report import COLOURS, LABEL_BOX
from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import Inputs, check_attention
from prefix_attn.timing import Clock, Quantiles, busy, interleaved, load_average, rounds

# A shape stops after the fewest rounds once it has run so long.
SECONDS = 40.0
# Dense scores in float64 are computed for so many tokens.
GATE_TOKENS = 400
HEADS, HEAD_DIM = (8, 2), 64
REPEATED = "repeated"  # how the names of what repeats begin
HEADER = ("shape", "provider", "fwd ms", "fwd+bwd ms (p20-p80)", "fwd speed-up", "speed-up",
          "goal", "ideal", "fwd of ideal", "of ideal", "MiB")  # fmt: skip
# A call is never to take longer than repeating, but for the spread of its time.
LEAST_SPEEDUP = 0.95


@dataclass(frozen=True)
class Shape:
    """A layout with heads and options.

    Attributes:
        name: as printed.
        lengths: tokens of each segment.
        parents: the segment that each one continues.
        heads: Hq and Hkv.
        dtype: of q, k and v.
        window_size: of the call.
        softcap: of the call.
        sinks: whether the call has them.
        members: of each group, where all groups have one shape that Prefix Grouper takes.
        of_ideal: the goal of forward and backward together, as a share of the ideal speed-up.
    """

    name: str
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    heads: tuple[int, int] = HEADS
    dtype: torch.dtype = torch.float32
    window_size: int | None = None
    softcap: float | None = None
    sinks: bool = False
    members: int = 0
    of_ideal: float = 0.0

    @cached_property
    def layout(self) -> PrefixLayout:
        """The layout."""
        return PrefixLayout.from_tree(self.lengths, self.parents)

    @property
    def small(self) -> Shape:
        """Its first segments, few enough for dense scores in float64."""
        tokens = itertools.accumulate(self.lengths)
        count = max(2, sum(x <= GATE_TOKENS for x in tokens))
        return replace(self, lengths=self.lengths[:count], parents=self.parents[:count])

    @property
    def options(self) -> dict[str, Any]:
        """Those of `prefix_attention`, but sinks."""
        return {"window_size": self.window_size, "softcap": self.softcap}

    @property
    def ideal(self) -> float:
        """Allowed pairs of all sequences over those of the layout, under the window."""
        forest = replace(self.layout.forest, window_size=self.window_size)
        return forest.num_repeated_pairs / forest.num_pairs

    @property
    def goal(self) -> float:
        """The speed-up over repeating that is aimed at."""
        return max(LEAST_SPEEDUP, self.of_ideal * self.ideal)


def _groups(
    name: str, prefix: int, suffix: int, members: int, count: int = 1, **more: Any
) -> Shape:
    lengths = ([prefix] + [suffix] * members) * count
    parents = [x for i in range(count) for x in [-1] + [i * (members + 1)] * members]
    plain = not {"window_size", "softcap", "sinks"} & more.keys() and prefix
    more["members"] = members if plain else 0
    return Shape(name, tuple(lengths), tuple(parents), **more)


def _binary(depth: int) -> tuple[int, ...]:
    """Parents of a binary tree in depth-first order."""
    below = _binary(depth - 1) if depth > 1 else ()
    second = len(below) + 1
    moved = [tuple(max(0, x + at) if x >= 0 else 0 for x in below) for at in (1, second)]
    return (-1, *moved[0], *moved[1])


def _comb(teeth: int) -> tuple[int, ...]:
    """Parents of a spine with a tooth before every continuation."""
    return (-1, 0, *(x for i in range(1, teeth) for x in (2 * i - 2, 2 * i)))


SHAPES = (
    _groups("P2048 S256 G8", 2048, 256, 8),
    _groups("P2048 S256 G8, window 256", 2048, 256, 8, window_size=256),
    _groups("P1024 S128 G8, window 128, sinks", 1024, 128, 8, window_size=128, sinks=True),
    _groups("P512 S128 G8, softcap 30", 512, 128, 8, softcap=30.0, of_ideal=0.8),
    _groups("P64 S256 G8, softcap 30", 64, 256, 8, softcap=30.0, of_ideal=0.8),
    _groups("P1024 S128 G8, bfloat16", 1024, 128, 8, dtype=torch.bfloat16, of_ideal=0.85),
    Shape("binary tree, depth 9, 16 each", (16,) * 511, _binary(9), of_ideal=0.6),
    Shape("comb, 64 teeth, 16 each", (16,) * 128, _comb(64), of_ideal=0.6),
    _groups("512 groups of P16 S4 G2", 16, 4, 2, 512),
    _groups("P0 S512 G8", 0, 512, 8),
    _groups("P0 S32 G64", 0, 32, 64),
    _groups("P1 S64 G16", 1, 64, 16),
)


class Problem:
    """Inputs of a shape, packed and repeated, and the ways to run them."""

    def __init__(self, shape: Shape, heads: tuple[int, int], head_dim: int = HEAD_DIM) -> None:
        layout = self.layout = shape.layout
        self.shape, self.dims = shape, (head_dim, head_dim)
        self.inputs = Inputs.random(layout, heads, self.dims, shape.dtype, sinks=shape.sinks)
        self.group = heads[0] // heads[1]
        rows = [layout.sequence_rows(i) for i in range(layout.num_sequences)]
        self.lengths = torch.tensor([len(x) for x in rows])
        self.index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        at = torch.arange(self.index.shape[1])
        self.keep = at[None] <= at[:, None]
        if shape.window_size is not None:
            self.keep &= at[:, None] - at[None] < shape.window_size

    def leaves(self, arrange: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """q, k, v and dout as a provider takes them."""
        x = self.inputs
        parts = [arrange(t).detach().contiguous() for t in (x.q, x.k, x.v, x.dout)]
        return [t.clone().requires_grad_() for t in parts[:3]] + parts[3:]

    def repeated(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (N, H, L, D), one sequence each."""
        return x[self.index].transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """(N, H, L, D) -> (T, H, D): each row as some sequence has it."""
        filled = torch.arange(x.shape[2]) < self.lengths[:, None]
        out = x.new_empty(self.layout.num_tokens, x.shape[1], x.shape[3])
        out[self.index[filled]] = x.transpose(1, 2)[filled]
        return out

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a user runs without a softcap and sinks."""
        if self.shape.window_size is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep, enable_gqa=True)

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What models write out."""
        k, v = (x.repeat_interleave(self.group, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * self.dims[0] ** -0.5
        if self.shape.softcap is not None:
            scores = self.shape.softcap * torch.tanh(scores / self.shape.softcap)
        scores = scores.masked_fill(~self.keep, -torch.inf)
        if self.inputs.sinks is None:
            return torch.softmax(scores, -1) @ v
        sinks = self.inputs.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ v

    def grouped(self) -> Callable[..., Tensor]:
        """Prefix Grouper, one row per group: (groups, H, P + G S, D) tensors."""
        from prefix_grouper import PrefixGrouper

        prefix, suffix = self.shape.lengths[:2]
        groups = [[prefix] + [suffix] * self.shape.members] * self.layout.num_groups
        grouper = PrefixGrouper(groups, device=self.layout.device)
        keep = torch.ones(suffix, prefix + suffix, dtype=torch.bool).tril(prefix)

        def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
            whole = q.shape[2] == k.shape[2]
            mask = None if whole else keep
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True
            )
            return out.transpose(1, 2)

        return lambda q, k, v: grouper.forward(attend, q, k, v).transpose(1, 2)

    def in_groups(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (groups, H, P + G S, D)."""
        return x.unflatten(0, (self.layout.num_groups, -1)).transpose(1, 2)

    def providers(self) -> dict[str, tuple[Callable[..., Tensor], Any, Any]]:
        """Name to attention, what arranges its leaves, what packs its output; repeating first."""
        shape = self.shape
        eager = shape.softcap is not None or shape.sinks
        mask = "" if shape.window_size is None else ", boolean mask"
        name = f"{REPEATED} formula" if eager else f"{REPEATED} SDPA{mask}"
        found = {name: (self.eager if eager else self.sdpa, self.repeated, self.packed)}
        if shape.members and importlib.util.find_spec("prefix_grouper"):
            found["prefix-grouper"] = (
                self.grouped(),
                self.in_groups,
                lambda x: x.transpose(1, 2).flatten(0, 1),
            )
        ours = partial(
            prefix_attention, layout=self.layout, sinks=self.inputs.sinks, **shape.options
        )
        return found | {"prefix_attn": (ours, lambda x: x, lambda x: x)}


def measured(shape: Shape, most_rounds: int) -> list[dict[str, Any]]:
    """Checks a small part with the heads of one KV head, then times all providers in turn.

    Raises:
        AssertionError: if results are beyond the error budget, or providers disagree.
    """
    narrow = Problem(shape.small, (shape.heads[0] // shape.heads[1], 1))
    check_attention(narrow.layout, narrow.inputs, **shape.options)
    problem = Problem(shape, shape.heads)
    runs: dict[str, list[Callable[..., Any]]] = {}
    peaks: dict[str, int] = {}
    first: Tensor | None = None
    for name, (attend, arrange, pack) in problem.providers().items():
        *leaves, dout = problem.leaves(arrange)

        def forward(attend: Any = attend, leaves: list[Tensor] = leaves) -> Tensor:
            out: Tensor = attend(*leaves)
            return out

        def backward(out: Tensor, leaves: Any = leaves, dout: Tensor = dout) -> Any:
            return torch.autograd.grad(out, leaves, dout)

        def both(forward: Any = forward, backward: Any = backward) -> None:
            backward(forward())

        runs[name] = [forward, backward]
        out = pack(forward().detach()).double()
        first = out if first is None else first
        limit = AGREEMENT_EPS * torch.finfo(shape.dtype).eps
        distance = float((out - first).norm() / first.norm())
        assert distance <= limit, f"{shape.name}: {name} differs by {distance:.1e} > {limit:.1e}"
        held = sum(x.numel() * x.element_size() for x in (*leaves, dout))
        peaks[name] = held + peak_memory(both, out.device)
    laps: dict[str, list[list[float]]] = {name: [] for name in runs}
    clock = Clock(torch.device("cpu"))
    for _, name in interleaved(list(runs), rounds(MIN_ROUNDS, most_rounds, SECONDS)):
        laps[name].append(clock.laps(*runs[name]))
    quantiles = {
        name: [Quantiles.from_seconds([x[i] for x in samples]) for i in (0, 1)]
        for name, samples in laps.items()
    }
    base = next(iter(quantiles.values()))
    return [
        {
            "shape": shape.name,
            "provider": name,
            "fwd_ms": fwd.median,
            "total_ms": total.median,
            "total_p20_ms": total.p20,
            "total_p80_ms": total.p80,
            "fwd_speedup": base[0].median / fwd.median,
            "total_speedup": base[1].median / total.median,
            "goal": shape.goal,
            "ideal": shape.ideal,
            "peak_mib": peaks[name] / 2**20,
        }
        for name, (fwd, total) in quantiles.items()
    ]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    names = ("fwd_ms", "total_ms", "total_p20_ms", "total_p80_ms", "fwd_speedup", "total_speedup",
             "goal", "ideal", "peak_mib")  # fmt: skip
    x = {name: float(row[name]) for name in names}
    return (
        row["shape"],
        row["provider"],
        f"{x['fwd_ms']:.1f}",
        f"{x['total_ms']:.1f} ({x['total_p20_ms']:.1f}-{x['total_p80_ms']:.1f})",
        f"{x['fwd_speedup']:.2f}x",
        f"{x['total_speedup']:.2f}x",
        f"{x['goal']:.2f}x",
        f"{x['ideal']:.2f}x",
        f"{x['fwd_speedup'] / x['ideal']:.0%}",
        f"{x['total_speedup'] / x['ideal']:.0%}",
        f"{x['peak_mib']:.0f}",
    )


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of a run's CSV."""
    first = rows[0]
    notes = (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, commit "
        f"{first['commit']}; {HEADS[0]}/{HEADS[1]} heads of {HEAD_DIM}, float32 unless a shape "
        "says otherwise; medians. Peak memory holds inputs, output and gradients. Above 100 %: "
        "repeating reaches fewer FLOP/s, or computes pairs that are masked or padding."
    )
    table = tables.markdown(HEADER, map(cells, rows), "ll" + "r" * (len(HEADER) - 2))
    return f"{table}\n\n{notes}"


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draws speed-ups over repeating, forward and backward, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(9.0, 6.4), layout="constrained")
    shapes: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        shapes.setdefault(row["shape"], []).append(row)
    labelled: set[str] = set()
    for place, of_shape in enumerate(shapes.values()):
        shown = [row for row in of_shape if not row["provider"].startswith(REPEATED)]
        height = 0.8 / len(shown)
        for index, row in enumerate(shown):
            name, speedup = row["provider"], float(row["total_speedup"])
            at, label = place - 0.4 + height * (index + 0.5), "" if name in labelled else name
            labelled.add(name)
            bar = panel.barh(
                at, speedup - 1, min(0.5, height * 0.92), 1, color=COLOURS[name], label=label
            )
            panel.bar_label(
                bar, [f"{speedup:.2f}"], fontsize=8, padding=3, bbox=LABEL_BOX, zorder=4
            )
        ideal, label = float(of_shape[0]["ideal"]), "" if place else "ideal: ratio of pairs"
        panel.vlines(ideal, place - 0.44, place + 0.44, colors="black", label=label, zorder=3)
    panel.set_xscale("log", base=2)
    ticks = [2.0**i for i in range(-1, 6)]
    panel.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    panel.set_xlim(left=0.4)
    panel.set_yticks(range(len(shapes)), shapes)
    panel.set_ylim(len(shapes) - 0.4, -0.6)
    panel.set_xlabel("speed-up over repeating every sequence, forward + backward")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    shapes: Sequence[Shape],
    *,
    rounds: int,
    out: Path,
) -> argparse.Namespace:
    """Reads which of `shapes` are wanted, how often each is timed, and where results go."""
    parser.add_argument("names", nargs="*", help="parts of names of what is timed; none for all")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples of a time ({rounds})")
    parser.add_argument("--out", type=Path, default=out, help=f"folder ({out})")
    args = parser.parse_args(arguments)
    if args.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, got {args.rounds}")
    args.shapes = [x for x in shapes if not args.names or any(n in x.name for n in args.names)]
    if not args.shapes:
        parser.error(f"nothing is named like {args.names}: {', '.join(x.name for x in shapes)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a shape was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__)
    args = parse(parser, arguments, SHAPES, rounds=5, out=Path("out/shapes"))
    load, facts = load_average(), environment(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    failures = []
    for shape in args.shapes:
        print(f"{shape.name} ...", file=sys.stderr, flush=True)
        try:
            rows += measured(shape, args.rounds)
        except AssertionError as error:
            failures.append(f"WRONG, not timed: {shape.name}: {error}")
    if rows:
        print(tables.text([HEADER, *map(cells, rows)], "ll" + "r" * (len(HEADER) - 2)))
        tables.write_run([row | facts for row in rows], args.out, draw)
        print(f"Written to {args.out}")
    names = ("total_ms", "total_p20_ms", "total_p80_ms")
    if note := busy(load, [Quantiles(*(row[name] for name in names)) for row in rows]):
        print(note)
    print(*failures, sep="\n", file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
