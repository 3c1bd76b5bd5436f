"""Draws the pictures of the documentation from the package's own masks, schedules and results.

    python docs/figures.py [--folder docs/pages/figures]

`make docs-figures` runs it. The speed-ups, `cpu.png`, come from `make bench` instead.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from prefix_attn import PrefixLayout
from prefix_attn.backends.schedule import KeyTiles, QueryTiles
from prefix_attn.forest import Forest

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
# Paper, text and faint lines on light pages, and what takes their place on dark ones.
CARD, INK, FAINT = "#fafaf7", "#24292f", "#c9c9c4"
DARK = {CARD: "#21252e", INK: "#dfe2e8", FAINT: "#4a505c"}
# Okabe and Ito's palette, told apart with any colour vision.
BLUE, SKY, GREEN, ORANGE, RED, PINK, GREY = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
MEMBERS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
STYLE: dict[Any, Any] = {
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "savefig.facecolor": CARD,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "svg.hashsalt": "prefix_attn",
}
BLOCK_M = BLOCK_N = 8
# Much shorter than real chunks, so that a small picture shows some.
MAX_CHUNK = 5
# The layer whose bytes are computed: a prefix of 8,192, suffixes of 512, bfloat16.
PREFIX, SUFFIX, HEADS, KV_HEADS, HEAD_DIM, ITEM_BYTES = 8192, 512, 32, 8, 128, 2


@dataclass(frozen=True)
class Cell:
    """A tile that one program visits.

    Attributes:
        program: place of its program in the work list.
        rows: first row and end.
        keys: first key and end.
        kind: "full", where no pair needs the attention rule, or "masked".
        split: whether its program computes a partial sum.
    """

    program: int
    rows: tuple[int, int]
    keys: tuple[int, int]
    kind: str
    split: bool = False


def query_cells(layout: PrefixLayout, block_m: int, block_n: int) -> list[Cell]:
    """What the programs that own query tiles visit: forward and dQ."""
    tiles = QueryTiles.from_forest(_forest(layout), block_m, block_n)
    cells = []
    for program, item in enumerate(tiles.items.tolist()):
        row0, row1, _, list0, num_listed, own0, num_own, masked0, num_masked = item
        own = [own0 + j * block_n for j in range(num_own)]
        for col in [*tiles.columns[list0 : list0 + num_listed].tolist(), *own]:
            cells.append(Cell(program, (row0, row1), (col, col + block_n), "full"))
        for col0, col1 in tiles.masked[masked0 : masked0 + num_masked].tolist():
            cells.append(Cell(program, (row0, row1), (col0, col1), "masked"))
    return cells


def key_cells(layout: PrefixLayout, block_m: int, block_n: int, max_chunk: int) -> list[Cell]:
    """What the programs that own key tiles, or chunks of them, visit: dK and dV."""
    tiles = KeyTiles.from_forest(_forest(layout), block_m, block_n, max_chunk)
    cells = []
    for program, item in enumerate(tiles.items.tolist()):
        col0, col1, full0, num_full, before0, num_before, after0, num_after, slot = item
        for kind, begin, count in (
            ("full", full0, num_full),
            ("masked", before0, num_before),
            ("masked", after0, num_after),
        ):
            for row in range(begin, begin + count * block_m, block_m):
                rows = (row, min(row + block_m, layout.num_tokens))
                cells.append(Cell(program, rows, (col0, col1), kind, slot >= 0))
    return cells


def layer_bytes(members: int, *, shared: bool) -> int:
    """Bytes of Q, K, V and O of one layer with the prefix once, or once per member."""
    tokens = PREFIX + members * SUFFIX if shared else members * (PREFIX + SUFFIX)
    return tokens * 2 * (HEADS + KV_HEADS) * HEAD_DIM * ITEM_BYTES


def _forest(layout: PrefixLayout) -> Forest:
    return Forest.from_segments(layout.segments.numpy())


def _segment_of_rows(layout: PrefixLayout) -> np.ndarray:
    """(T,) the segment of each packed row."""
    return np.repeat(np.arange(layout.num_segments), np.diff(layout.cu_seqlens.numpy()))


def _draw_mask(panel: Any, layout: PrefixLayout, colours: Sequence[str], left: float = 0) -> None:
    """Fills the allowed pairs in the colour of their key, and rules off the segments."""
    mask = layout.materialize().numpy()
    size = len(mask)
    image = np.zeros((size, size, 4))
    image[mask] = mpl.colors.to_rgba_array(list(colours))[np.nonzero(mask)[1]]
    panel.imshow(image, extent=(left, left + size, size, 0), interpolation="none")
    bounds = layout.cu_seqlens.tolist()
    for lines, style in ((range(size + 1), (CARD, 0.5, 1)), (bounds, (INK, 0.6, 0.5))):
        colour, width, alpha = style
        panel.vlines([left + x for x in lines], 0, size, color=colour, lw=width, alpha=alpha)
        panel.hlines(list(lines), left, left + size, color=colour, lw=width, alpha=alpha)
    panel.set(xticks=[], yticks=[])
    panel.set_frame_on(False)


def _label_segments(panel: Any, layout: PrefixLayout, names: Sequence[str]) -> None:
    bounds = layout.cu_seqlens.tolist()
    middles = [(a + b) / 2 for a, b in pairwise(bounds)]
    panel.set_yticks(middles, names)
    panel.tick_params(length=0)


def draw_shared(path: Path) -> None:
    """A group run whole, sequence by sequence, and packed with its prefix once, to one scale."""
    prefix, suffixes = 20, [5, 4, 7, 5]
    whole = PrefixLayout.from_lengths([0], [[prefix + s for s in suffixes]])
    packed = PrefixLayout.from_lengths([prefix], [suffixes])
    whole_colours = [
        BLUE if position < prefix else MEMBERS[1 + i]
        for i, suffix in enumerate(suffixes)
        for position in range(prefix + suffix)
    ]
    figure, panel = plt.subplots(figsize=(8.6, 5.7), layout="constrained")
    left = whole.num_tokens + 8
    _draw_mask(panel, whole, whole_colours)
    _draw_mask(panel, packed, [MEMBERS[s] for s in _segment_of_rows(packed)], left)
    panel.set(xlim=(-0.5, left + packed.num_tokens + 0.5), ylim=(whole.num_tokens + 0.5, -8))
    for x, title, layout in ((0, "repeated", whole), (left, "shared", packed)):
        pairs = int(layout.materialize().sum())
        panel.text(x, -5, title, fontsize=13, fontweight="bold", va="center")
        panel.text(x, -1.7, f"{layout.num_tokens} tokens, {pairs:,} pairs", va="center")
    patches = [Patch(color=BLUE, label="keys of the prompt")]
    patches += [
        Patch(color=MEMBERS[1 + i], label=f"keys of completion {1 + i}")
        for i in range(len(suffixes))
    ]
    panel.legend(
        handles=patches, loc="lower left", frameon=False, fontsize=10,
        bbox_to_anchor=(left, whole.num_tokens), bbox_transform=panel.transData, borderaxespad=0,
    )  # fmt: skip
    _save(figure, path)


def draw_masks(path: Path) -> None:
    """The mask of a group and of a tree, as `PrefixLayout.materialize` gives them."""
    group = PrefixLayout.from_lengths([8], [[4, 6, 3]])
    tree = PrefixLayout.from_tree([6, 5, 3, 4, 4], [-1, 0, 1, 1, 0])
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.0), layout="constrained")
    for panel, layout, title, names in (
        (panels[0], group, "a group", ["prefix", "suffix 1", "suffix 2", "suffix 3"]),
        (panels[1], tree, "a tree", ["root", "a", "a, first", "a, second", "b"]),
    ):
        _draw_mask(panel, layout, [MEMBERS[s] for s in _segment_of_rows(layout)])
        _label_segments(panel, layout, names)
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("keys, in packed order")
    panels[0].set_ylabel("query rows, in packed order")
    _save(figure, path)


def draw_schedule(path: Path) -> None:
    """Which program visits which tile, forward and dQ, and dK with dV, over the mask."""
    layout = PrefixLayout.from_lengths([37], [[22, 15, 27]])
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 6.1), layout="constrained")
    sides = (
        ("query tiles: forward and dQ", query_cells(layout, BLOCK_M, BLOCK_N)),
        ("key tiles: dK and dV", key_cells(layout, BLOCK_M, BLOCK_N, MAX_CHUNK)),
    )
    mask = layout.materialize().numpy()
    for panel, (title, cells) in zip(panels, sides, strict=True):
        colours = colours_of_programs(cells)
        for cell in cells:
            _draw_cell(panel, cell, colours[cell.program])
        _draw_border(panel, mask)
        for bound in layout.cu_seqlens.tolist():
            panel.axhline(bound, color=INK, lw=0.5, alpha=0.35, zorder=1)
            panel.axvline(bound, color=INK, lw=0.5, alpha=0.35, zorder=1)
        panel.set(xlim=(0, len(mask)), ylim=(len(mask), 0), aspect="equal", xticks=[])
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("keys; the line encloses the pairs that the rule allows")
        panel.tick_params(length=0)
    _label_segments(panels[0], layout, ["prefix", "suffix 1", "suffix 2", "suffix 3"])
    panels[1].set_yticks([])
    _number_programs(panels[0], sides[0][1], along_rows=True)
    _number_programs(panels[1], sides[1][1], along_rows=False)
    figure.legend(
        handles=[
            Patch(**_look(GREY, "full"), label="full colour: no mask"),
            Patch(facecolor="none", edgecolor=INK, lw=1.2, label="program that owns a key tile"),
            Patch(**_look(GREY, "masked"), label="pale: masked, the rule is applied"),
            Patch(
                facecolor="none", edgecolor=INK, lw=1.2, linestyle=(0, (3, 1.5)),
                label=f"program that owns a chunk of one, {MAX_CHUNK} tiles at most",
            ),
        ],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    _save(figure, path)


def colours_of_programs(cells: list[Cell]) -> dict[int, str]:
    """A colour for each program, another than those of the programs whose tiles touch its own."""
    # Neighbours on the page are seldom neighbours in the work list, which is sorted by cost.
    order = sorted(cells, key=lambda cell: (cell.keys, cell.rows))
    colours: dict[int, str] = {}
    for place, program in enumerate(dict.fromkeys(cell.program for cell in order)):
        near = {
            colours[other.program]
            for own in cells
            for other in cells
            if own.program == program and other.program in colours and _touch(own, other)
        }
        turned = (MEMBERS[(place + i) % len(MEMBERS)] for i in range(len(MEMBERS)))
        colours[program] = next(colour for colour in turned if colour not in near)
    return colours


def _touch(a: Cell, b: Cell) -> bool:
    return (
        max(a.rows[0], b.rows[0]) <= min(a.rows[1], b.rows[1])
        and max(a.keys[0], b.keys[0]) <= min(a.keys[1], b.keys[1])
    )  # fmt: skip


def _draw_cell(panel: Any, cell: Cell, colour: str) -> None:
    corner = (cell.keys[0], cell.rows[0])
    size = (cell.keys[1] - cell.keys[0], cell.rows[1] - cell.rows[0])
    panel.add_patch(Rectangle(corner, *size, **_look(colour, cell.kind)))
    panel.add_patch(Rectangle(corner, *size, facecolor="none", edgecolor=CARD, lw=1.2))


def _draw_border(panel: Any, mask: np.ndarray) -> None:
    """A line around the allowed pairs."""
    inside = np.pad(mask, 1)
    sides = {
        (0, 1): inside[1:, 1:-1] != inside[:-1, 1:-1],
        (1, 0): inside[1:-1, 1:] != inside[1:-1, :-1],
    }
    # Row and key of where an edge begins, where it ends, and of nowhere: the pen is lifted.
    lifted = np.full(2, np.nan)
    edges = [
        (begin, begin + np.array(step), lifted)
        for step, borders in sides.items()
        for begin in np.argwhere(borders)
    ]
    rows, keys = np.concatenate(edges).T
    panel.plot(keys, rows, color=INK, lw=0.8, zorder=3, solid_capstyle="projecting")


def _look(colour: str, kind: str) -> dict[str, Any]:
    """Masked tiles are pale."""
    return {"facecolor": (colour, 0.7 if kind == "full" else 0.25), "edgecolor": "none"}


def _number_programs(panel: Any, cells: list[Cell], *, along_rows: bool) -> None:
    """Outlines what one program visits, and writes its place in the work list on it."""
    for program in sorted({cell.program for cell in cells}):
        own = [cell for cell in cells if cell.program == program]
        left, right = min(c.keys[0] for c in own), max(c.keys[1] for c in own)
        top, bottom = min(c.rows[0] for c in own), max(c.rows[1] for c in own)
        label = {"ha": "center", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
        box = {"boxstyle": "round,pad=0.18", "facecolor": CARD, "edgecolor": "none", "alpha": 0.9}
        at = (left + BLOCK_N / 2, (top + bottom) / 2)
        if not along_rows:
            outline = Rectangle(
                (left, top), right - left, bottom - top, facecolor="none", edgecolor=INK, zorder=4,
                lw=1.2, linestyle=(0, (3, 1.5)) if own[0].split else "solid",
            )  # fmt: skip
            panel.add_patch(outline)
            at = ((left + right) / 2, (top + bottom) / 2)
        panel.text(*at, str(program), zorder=5, bbox=box, **label)


def draw_memory(path: Path) -> None:
    """Bytes against the size of a group, computed, and the peaks that were measured."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    members = np.array([1, 2, 4, 8, 16, 32, 64])
    for label, shared, colour in (("repeated", False, GREY), ("shared", True, BLUE)):
        gib = [layer_bytes(int(g), shared=shared) / 2**30 for g in members]
        panels[0].plot(members, gib, "o-", color=colour, lw=2, ms=4.5, label=label)
        panels[0].annotate(
            f"{gib[-1]:.1f} GiB", (members[-1], gib[-1]), xytext=(0, 8),
            textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(members, [str(g) for g in members])
    # Both axes double, so that what grows in proportion to G is a straight line.
    panels[0].set_yscale("log", base=2)
    ticks = [2.0**i for i in range(-3, 5)]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_ylim(ticks[0], ticks[-1])
    panels[0].set(xlabel="members G", ylabel="GiB of one layer")
    panels[0].set_title("computed: Q, K, V and O", loc="left", fontsize=11)
    panels[0].legend(loc="upper left", framealpha=1, edgecolor=CARD)
    _draw_peaks(panels[1], ROOT / "bench" / "results" / "cpu.csv")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=FAINT, lw=0.6)
        panel.set_axisbelow(True)
    figure.supxlabel(
        f"Left: P {PREFIX}, S {SUFFIX}, {HEADS}/{KV_HEADS} heads, D {HEAD_DIM}, bfloat16. Right: "
        "bench/results/cpu.csv, float32; inputs, output and gradients.",
        fontsize=8,
    )
    _save(figure, path)


def _draw_peaks(panel: Any, results: Path) -> None:
    with results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["total_ms"]]
    fields = ("prefix", "suffix", "group", "heads_q", "heads_kv")
    cases = list(dict.fromkeys(tuple(row[f] for f in fields) for row in rows))
    colours = {"repeated SDPA": GREY, "prefix-grouper": ORANGE, "prefix_attn": BLUE}
    for i, (provider, colour) in enumerate(colours.items()):
        peaks = {
            tuple(row[f] for f in fields): float(row["peak_mib"])
            for row in rows
            if row["provider"] == provider
        }
        places = np.arange(len(cases)) + (i - 1) * 0.27
        bars = panel.bar(places, [peaks[c] for c in cases], 0.25, color=colour, label=provider)
        panel.bar_label(bars, fmt="%.0f", fontsize=7.5, padding=1.5)
    labels = [f"P {p}\nS {s}\nG {g}\n{q}/{kv}" for p, s, g, q, kv in cases]
    panel.set_xticks(range(len(cases)), labels, fontsize=8.5)
    panel.set_ylabel("peak MiB, forward + backward")
    panel.set_title("measured on a CPU", loc="left", fontsize=11)
    panel.legend(loc="upper left", fontsize=9, framealpha=1, edgecolor=CARD)


def _save(figure: Any, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
    plt.close(figure)
    if path.suffix == ".svg":
        path.write_text(with_both_themes(path.read_text()))


def with_both_themes(svg: str) -> str:
    """An SVG whose paper, text and faint lines follow the colour scheme of the page around it."""
    names = {colour: f"--c{i}" for i, colour in enumerate(DARK)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name}, {colour})")
    light = "; ".join(f"{name}: {colour}" for colour, name in names.items())
    dark = "; ".join(f"{name}: {DARK[colour]}" for colour, name in names.items())
    rules = f"svg {{{light}}} @media (prefers-color-scheme: dark) {{svg {{{dark}}}}}"
    return svg.replace("<defs>", f"<style>{rules}</style>\n <defs>", 1)


FIGURES = {
    "shared": draw_shared,
    "masks": draw_masks,
    "schedule": draw_schedule,
    "memory": draw_memory,
}


def main(arguments: list[str] | None = None) -> None:
    """Writes every picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "pages" / "figures")
    parser.add_argument("--kind", choices=["svg", "png"], default="svg")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            path = args.folder / f"{name}.{args.kind}"
            draw(path)
            print(f"Written: {path}")


if __name__ == "__main__":
    main()
