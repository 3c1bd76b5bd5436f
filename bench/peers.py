"""Times this package beside other libraries that share prefixes, on the same trees, on a CPU.

Each library gets the same sequences, packs them itself, and computes the attention of one layer, as
its users call it:

* Prefix Grouper: its `forward` around PyTorch's attention. It serves groups alone.
* TRL: the tree attention of its AsyncGRPO. Its kernel, FlashAttention 3, needs a GPU: PyTorch's
  attention takes its place, one call for each segment of the trie.
* AReaL: the tree attention of its FSDP engine, which compiles FlexAttention. It has no backward
  pass on a CPU.
* AReaL's Triton kernel, where TRITON_INTERPRET=1 says that kernels are to be interpreted. This
  tells its errors, and nothing of its time.

`python -m bench.peers` prints a table and writes `bench.csv` and `bench.png`; names of trees choose
some. One thread computes; times are those of the processor. A library that can't be imported, and
what it refuses, is named and left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import shapes, tables
from bench.facts import environment
from bench.measure import AGREEMENT_EPS, FOREIGN_ERRORS, MIN_ROUNDS, peak_memory
from bench.shapes import Problem, Shape
from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import attention_results, repeated_attention
from prefix_attn.timing import Quantiles, interleaved, processor_seconds, rounds

SECONDS = 60.0  # of timing a tree, for all libraries
BLOCK = 128  # AReaL pads a packed row to a multiple of this
MOST_INTERPRETED = 512  # rows: longer ones take minutes

TREES = (
    Shape("tree: 128, 2 x 64, 4 x 32", (128, 64, 32, 32, 64, 32, 32), (-1, 0, 1, 1, 0, 4, 4)),
    Shape("group of 8: P 1024, S 128", (1024, *[128] * 8), (-1, *[0] * 8), members=8),
    Shape("group of 16: P 2048, S 64", (2048, *[64] * 16), (-1, *[0] * 16), members=16),
    Shape(
        "tree: 512, 4 x 256, 16 x 64",
        (512, *[256, *[64] * 4] * 4),
        (-1, *(x for i in range(4) for x in (0, *[1 + 5 * i] * 4))),
    ),
    Shape(
        "16 turns of 64, a branch of 64 at each",
        (64,) * 32,
        (-1, 0, *(x for i in range(1, 16) for x in (2 * i - 2, 2 * i))),
    ),
)


@dataclass(frozen=True, eq=False)
class Packed:
    """A tree as a library packs it.

    Attributes:
        rows: (B, L) the row of the problem that each of its tokens is, -1 for padding.
        attend: its attention: q, k and v of these rows to an output (B, L, Hq, D).
        heads_first: whether it takes (B, H, L, D), else (B, L, H, D).
        has_backward: whether it has a backward pass on a CPU.
        is_timed: whether its time means something.
    """

    rows: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    heads_first: bool = True
    has_backward: bool = True
    is_timed: bool = True

    def leaf(self, x: Tensor) -> Tensor:
        """A tensor of the problem, (T, H, D), as this library takes it."""
        found = x[self.rows.clamp(min=0)] * (self.rows >= 0)[..., None, None]
        found = found.transpose(1, 2) if self.heads_first else found
        return found.contiguous().requires_grad_(self.has_backward)

    def dout(self, x: Tensor) -> Tensor:
        """The gradient of the output, (B, L, H, D): of rows that lie here twice, in the first."""
        flat, places = self.rows.flatten(), torch.arange(self.rows.numel())
        real = flat >= 0
        first = places.new_full((len(x),), len(flat))
        first.scatter_reduce_(0, flat[real], places[real], "amin")
        found = x.new_zeros(len(flat), *x.shape[1:])
        found[first] = x
        return found.unflatten(0, self.rows.shape)

    def summed(self, grad: Tensor, like: Tensor) -> Tensor:
        """The gradient of a leaf, summed over the rows that are one row of the problem."""
        rows = grad.transpose(1, 2) if self.heads_first else grad
        real = self.rows >= 0
        return torch.zeros_like(like).index_add(0, self.rows[real], rows[real].to(like.dtype))


# ---- libraries ----------------------------------------------------------------------------------


def sequences_of(problem: Problem) -> list[list[int]]:
    """The sequences that libraries pack: a token's id is its row of the problem."""
    layout = problem.layout
    return [layout.sequence_rows(i).tolist() for i in range(layout.num_sequences)]


def repeat(problem: Problem) -> Packed:
    """Every sequence whole, through PyTorch's attention."""
    filled = torch.arange(problem.index.shape[1]) < problem.lengths[:, None]
    rows = problem.index.masked_fill(~filled, -1)
    return Packed(rows, lambda q, k, v: problem.sdpa(q, k, v).transpose(1, 2))


def share(problem: Problem) -> Packed:
    """This package."""
    layout, ids = PrefixLayout.from_sequences(sequences_of(problem))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = prefix_attention(q[0], k[0], v[0], layout)
        return out[None]

    return Packed(ids[None], attend, heads_first=False)


def group(problem: Problem) -> Packed:
    """Prefix Grouper."""
    importlib.import_module("prefix_grouper")
    if not problem.shape.members:
        raise NotImplementedError("it serves groups alone, no deeper trees")
    attend = problem.grouped()
    rows = torch.arange(problem.layout.num_tokens).unflatten(0, (problem.layout.num_groups, -1))
    return Packed(rows, lambda q, k, v: attend(q, k, v).transpose(1, 2))


@cache
def trl_packing() -> Any:
    """TRL's module of tries, with PyTorch's attention in the place of FlashAttention 3."""
    packing: Any = importlib.import_module("trl.experimental.async_grpo.packing")
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attend_paths)
    return packing


@cache
def _lower_right(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """What the last queries of a path may see, as PyTorch's attention adds it to scores."""
    keep = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -torch.inf)


def attend_paths(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *_: Any, **options: Any
) -> Tensor:
    """What `flash_attn_varlen_func` computes of causal sequences, the last rows of each queries."""
    outs = []
    bounds = (pairwise(ends.tolist()) for ends in (ends_q, ends_k))
    for (a, b), (c, d) in zip(*bounds, strict=True):
        mask = None if b - a == d - c else _lower_right(b - a, d - c, q.dtype)
        own, keys, values = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        scale, whole = options["softmax_scale"], mask is None
        out = F.scaled_dot_product_attention(
            own, keys, values, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def trl(problem: Problem) -> Packed:
    """TRL's tree attention, on its own trie."""
    packing = trl_packing()
    trie = packing.TreeRow()
    for ids in sequences_of(problem):
        ones = torch.ones(len(ids))
        sample = {"input_ids": torch.tensor(ids), "completion_mask": ones, "old_log_probs": ones}
        trie.add({**sample, "advantage": 1.0, "group_id": 0})
    row = trie.pack()
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    longest = dict(
        zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), row["tree_max_seqlens"], strict=True)
    )
    arguments = {name: row[name] for name in names} | longest
    module: Any = torch.nn.Linear(1, 1)  # whose dtype is that of the kernel
    module.config = None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = packing.tree_attention(module, q, k, v, None, scaling=None, **arguments)[0]
        return out

    return Packed(row["input_ids"][None], attend)


@cache
def areal_module(name: str) -> Any:
    """A module of AReaL's tree attention, without the servers and logs that AReaL imports with it.

    Raises:
        ModuleNotFoundError: if AReaL is not installed.
    """
    spec = importlib.util.find_spec("areal")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'areal'")
    for package in ("areal", "areal.models", "areal.models.tree_attn"):
        stand_in = ModuleType(package)
        stand_in.__spec__ = spec
        stand_in.__path__ = [str(Path(spec.submodule_search_locations[0], *package.split(".")[1:]))]
        sys.modules.setdefault(package, stand_in)
    for module in ("api", "api.cli_args", "utils", "utils.logging", "utils.data"):
        sys.modules.setdefault(f"areal.{module}", MagicMock())
    tracer: Any = ModuleType("areal.utils.perf_tracer")
    tracer.trace_perf = lambda *_: lambda function: function
    tracer.trace_scope = lambda *_: nullcontext()
    sys.modules.setdefault(tracer.__name__, tracer)
    return importlib.import_module(f"areal.models.tree_attn.{name}")


def _trie_of_areal(problem: Problem) -> tuple[Any, Tensor]:
    """AReaL's trie, and its padded row: (1, L) rows of the problem, -1 for padding."""
    tree = areal_module("tree")
    sequences = [torch.tensor(ids) for ids in sequences_of(problem)]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad(sequences)
    batch = {"input_ids": ids, "attention_mask": pad([torch.ones_like(x) for x in sequences])}
    (trie,), (tokens,) = tree._greedy_build_tries(batch, problem.layout.num_tokens)
    rows = tree._pack_input_ids(trie, ids, -(-tokens // BLOCK) * BLOCK)
    rows[:, tokens:] = -1
    return trie, rows


def areal(problem: Problem) -> Packed:
    """AReaL's FSDP engine: FlexAttention."""
    trie, rows = _trie_of_areal(problem)
    mask = areal_module("tree").build_block_mask_from_trie(trie, rows.shape[1], rows.device)
    attend = partial(areal_module("module_fsdp")._tree_attn_fwd_func, tree_block_mask=mask)
    return Packed(rows, attend, heads_first=False, has_backward=False)


def areal_triton(problem: Problem) -> Packed:
    """AReaL's Triton kernel, interpreted."""
    kernels = areal_module("triton_kernel")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError("it needs a GPU, or TRITON_INTERPRET=1 from the start")
    if problem.layout.num_tokens > MOST_INTERPRETED:
        raise NotImplementedError(f"it is interpreted, on at most {MOST_INTERPRETED} rows")
    for kernel in vars(kernels).values():  # their tiles are equal, and tuning them needs a GPU
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]
    trie, rows = _trie_of_areal(problem)
    data = areal_module("tree").build_triton_attn_data_from_trie(trie, rows.shape[1])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = kernels.tree_attention(q, k, v, **vars(data))
        return out.transpose(1, 2)

    return Packed(rows, attend, is_timed=False)


REPEATED, OURS = "repeated SDPA", "prefix_attn"
# What packs a tree, and the distribution that it is of.
LIBRARIES: dict[str, tuple[Callable[[Problem], Packed], str]] = {
    REPEATED: (repeat, ""),
    "Prefix Grouper": (group, "prefix_grouper"),
    "TRL": (trl, "trl"),
    "AReaL": (areal, "areal"),
    "AReaL, Triton": (areal_triton, "areal"),
    OURS: (share, ""),
}
COLOURS = {
    REPEATED: "#999999",
    "Prefix Grouper": "#E69F00",
    "TRL": "#009E73",
    OURS: "#0072B2",
}


# ---- a run --------------------------------------------------------------------------------------


def errors_of(packed: Packed, problem: Problem, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms of what differs from float64, relative to it: of the output and of each gradient."""
    x = problem.inputs
    leaves = [packed.leaf(t) for t in (x.q, x.k, x.v)]
    out = packed.attend(*leaves)
    real = packed.rows >= 0
    expected = exact["out"][packed.rows[real]]
    found = {"out": float((out.detach()[real] - expected).norm() / expected.norm())}
    if packed.has_backward:
        grads = torch.autograd.grad(out, leaves, packed.dout(x.dout))
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            wrong = packed.summed(grad, exact[name]) - exact[name]
            found[name] = float(wrong.norm() / exact[name].norm())
    return found


def measured(
    tree: Shape, most_rounds: int, notes: list[str], wrong: list[str]
) -> list[dict[str, Any]]:
    """A row for each library that runs.

    Args:
        tree: which all of them pack.
        most_rounds: samples of each time.
        notes: takes what was left out, and why.
        wrong: takes who is further from float64 than rounding explains.
    """
    problem = Problem(tree, tree.heads)
    repeated = partial(repeated_attention, layout=problem.layout)
    exact = attention_results(repeated, problem.inputs.map(Tensor.double))
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, (pack, distribution) in LIBRARIES.items():
        print(f"{tree.name}: {name} ...", file=sys.stderr, flush=True)
        try:
            packed = pack(problem)
            errors = errors_of(packed, problem, exact)
        except (ImportError, NotImplementedError, *FOREIGN_ERRORS) as error:
            if name in (REPEATED, OURS):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes.append(f"{name} left out of {tree.name}: {reason}")
            continue
        limit = AGREEMENT_EPS * torch.finfo(tree.dtype).eps
        if not all(error <= limit for error in errors.values()):  # NaN is wrong too
            wrong.append(f"{tree.name}: {name} is off by {errors}")
        found[name] = {
            "tree": tree.name,
            "heads_q": tree.heads[0],
            "heads_kv": tree.heads[1],
            "head_dim": problem.dims[0],
            "library": name,
            "version": version(distribution) if distribution else "",
            "tokens": packed.rows.numel(),
            "error": errors.pop("out"),
            "error_grad": max(errors.values(), default=None),
        }
        if not packed.is_timed:
            continue
        x = problem.inputs
        leaves, dout = [packed.leaf(t) for t in (x.q, x.k, x.v)], packed.dout(x.dout)

        def laps(packed: Packed = packed, leaves: Any = leaves, dout: Any = dout) -> Any:
            outs: list[Tensor] = []
            spent = [processor_seconds(lambda: outs.append(packed.attend(*leaves)))]
            if packed.has_backward:
                spent.append(processor_seconds(lambda: torch.autograd.grad(outs, leaves, dout)))
            return spent

        runs[name] = laps
        runs[name]()
        inputs = (*leaves, dout) if packed.has_backward else leaves
        held = sum(t.numel() * t.element_size() for t in inputs)
        found[name] |= {
            "pack_ms": 1e3 * min(processor_seconds(partial(pack, problem)) for _ in range(3)),
            "peak_mib": (held + peak_memory(runs[name], dout.device)) / 2**20,
        }
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _, name in interleaved(list(runs), rounds(MIN_ROUNDS, most_rounds, SECONDS)):
        samples[name].append(runs[name]())
    for name, laps_of in samples.items():
        found[name]["fwd_ms"] = Quantiles.from_seconds([x[0] for x in laps_of]).median
        if len(laps_of[0]) > 1:
            both = Quantiles.from_seconds([sum(x) for x in laps_of])
            spread = {"total_p20_ms": both.p20, "total_p80_ms": both.p80}
            found[name] |= {"total_ms": both.median, **spread}
    return list(found.values())


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a library was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    args = shapes.parse(parser, arguments, TREES, rounds=7, out=Path("out/peers"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    notes: list[str] = []
    wrong: list[str] = []
    facts = environment(torch.device("cpu"))
    try:
        rows = [row for tree in args.shapes for row in measured(tree, args.rounds, notes, wrong)]
    finally:
        torch.set_num_threads(threads)
    print(markdown(tables.write_run([row | facts for row in rows], args.out, draw)))
    for note in notes:
        print(note)
    print(f"Written to {args.out}")
    for failure in wrong:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 1 if wrong else 0


# ---- results ------------------------------------------------------------------------------------

COLUMNS = {
    "tokens": "{tokens:.0f}",
    "packing, ms": "{pack_ms:.1f}",
    "forward, ms": "{fwd_ms:.1f}",
    "forward + backward, ms": "{total_ms:.1f} ({total_p20_ms:.1f}-{total_p80_ms:.1f})",
    "MiB": "{peak_mib:.0f}",
    "error": "{error:.1e}",
    "of gradients": "{error_grad:.1e}",
}


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of a run's CSV, one line for each library and tree."""

    def cell(row: dict[str, str], column: str) -> str:
        values = {name: x for name, x in row.items() if x and f"{{{name}:" in column}
        try:
            return column.format_map({name: float(x) for name, x in values.items()})
        except KeyError:
            return "-"

    cells, last = [], ""
    for row in rows:
        tree = row["tree"] if row["tree"] != last else ""
        last = row["tree"]
        library = f"{row['library']} {row['version']}".strip()
        cells.append([tree, library, *(cell(row, x) for x in COLUMNS.values())])
    first = rows[0]
    notes = (
        f"{first['device']}, one thread, float32, {first['heads_q']} query and "
        f"{first['heads_kv']} KV heads of {first['head_dim']}, torch {first['torch']}, commit "
        f"{first['commit']}. Times are those of the processor, medians (p20-p80), all in turn. "
        "Tokens count padding and what is packed twice; packing is done once for all layers. MiB: "
        "the most that is allocated, inputs and gradients included. Errors are norms of what "
        "differs from float64, relative to it: of the output, and of the worst of dQ, dK and dV."
    )
    table = tables.markdown(("tree", "library", *COLUMNS), cells, "ll" + "r" * len(COLUMNS))
    return f"{table}\n\n{notes}"


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Time and memory of each tree, a bar for each library that has a backward pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trees = list(dict.fromkeys(row["tree"] for row in rows))
    rows = [row for row in rows if row["total_ms"]]
    names = [x for x in COLOURS if any(row["library"] == x for row in rows)]
    figure, panels = plt.subplots(1, 2, figsize=(11.0, 4.4), sharey=True, layout="constrained")
    columns = {"forward + backward, ms": "total_ms", "peak memory, MiB": "peak_mib"}
    height = 0.8 / len(names)
    for panel, (title, column) in zip(panels, columns.items(), strict=True):
        for index, name in enumerate(names):
            found = [row for row in rows if row["library"] == name]
            at = [trees.index(row["tree"]) + (index + 0.5) * height - 0.4 for row in found]
            values = [float(row[column]) for row in found]
            bars = panel.barh(at, values, height * 0.9, color=COLOURS[name], label=name)
            panel.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
        panel.set_title(title, loc="left", fontsize=11)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    breaks = ((": ", "\n") if ": " in tree else (", ", ",\n") for tree in trees)
    labels = [tree.replace(*at) for tree, at in zip(trees, breaks, strict=True)]
    panels[0].set_yticks(range(len(trees)), labels)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
