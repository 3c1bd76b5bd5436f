"""Computes what sharing a prefix saves: tokens, attention FLOPs and memory."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefix_attn.cases import Case
from prefix_attn.cli.costs import case_of, verdict
from prefix_attn.cli.terminal import (
    UsageError,
    can_print,
    counted,
    flops,
    pairs,
    paragraph,
    size,
    table,
    width,
)

# Backward over forward: five matrix products against two.
BACKWARD = 2.5
SIDES = ("repeated", "shared")
PREFIXES = tuple(2**i for i in range(8, 17))
SUFFIXES = tuple(2**i for i in range(5, 14))
PICTURES = (".png", ".svg", ".pdf")
SHADES, PLAIN_SHADES = " ░▒▓█", " .:+#"
# FLOPs of one layer from which `bench` takes minutes on a CPU.
LONG_ON_CPU = 2e12
COUNTING = (
    "FLOPs are not time: they say what is possible, not what a machine reaches. Bytes are those of "
    "attention's Q, K, V and O alone; other activations, gradients and weights come on top. "
    "README.md (What it gains) and docs/pages/performance.md hold measured figures."
)
HERE = " This measures here:"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Returns all figures, and exit code 0."""
    case = case_of(args)
    if args.intermediate and not args.hidden:
        raise UsageError(f"--intermediate {args.intermediate} needs --hidden")
    if args.plot and args.plot.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot must end in {', '.join(PICTURES)}, got {str(args.plot)!r}")
    layers, hidden, inner = args.layers, args.hidden, None
    forward = _both(*(layers * case.flops(n) for n in (case.repeated_pairs, case.pairs)))
    training = _both(*((1 + BACKWARD) * forward[side] for side in SIDES))
    results: dict[str, Any] = {
        "tokens": _both(case.repeated_tokens, case.tokens),
        "attention_forward_flops": forward,
        "attention_training_flops": training,
        "qkvo_bytes_per_layer": _both(
            *(n * case.qkvo_bytes for n in (case.repeated_tokens, case.tokens))
        ),
        "kv_copies_avoided": case.group - 1,
        "kv_copy_bytes_avoided_per_layer": (case.group - 1) * case.prefix * case.kv_bytes,
    }
    layer_ratio = None
    if hidden:
        inner = args.intermediate or 3 * hidden
        weights = hidden * (2 * (case.heads_q + case.heads_kv) * case.head_dim + 3 * inner)
        # Forward 2 FLOPs per weight and token, backward 4.
        linear = _both(*(6 * weights * layers * n for n in (case.repeated_tokens, case.tokens)))
        whole = _both(*(training[side] + linear[side] for side in SIDES))
        layer_ratio = whole["ratio"]
        results |= {"linear_training_flops": linear, "layers_training_flops": whole}
    given = ("prefix", "suffix", "group", "heads", "kv_heads", "head_dim", "layers", "dtype")
    results["shape"] = {name: getattr(args, name) for name in given}
    results["shape"] |= {"hidden": hidden, "intermediate": inner}
    results["verdict"] = verdict(case.token_ratio, case.attention_ratio, layer_ratio)
    if args.plot:
        draw(case, args.plot)
        results["plot"] = str(args.plot)
    return results, 0


def _both(repeated: float, shared: float) -> dict[str, float]:
    return {"repeated": repeated, "shared": shared, "ratio": repeated / shared}


def render(results: dict[str, Any]) -> str:
    """The figures as tables, with a heat map around the shape."""
    shape = results["shape"]
    case, layers = case_of(argparse.Namespace(**shape)), shape["layers"]

    def row(name: str, key: str, show: Callable[[float], str], factor: int = 1) -> list[str]:
        entry = results[key]
        return [name, *(show(factor * entry[side]) for side in SIDES), f"{entry['ratio']:.2f}x"]

    memory = "qkvo_bytes_per_layer"
    rows = [
        row("tokens", "tokens", "{:,}".format),
        row("attention, forward", "attention_forward_flops", flops),
        row("attention, forward + backward", "attention_training_flops", flops),
        row("Q, K, V and O of one layer", memory, size),
        row(f"Q, K, V and O of {counted(layers, 'layer')}", memory, size, layers),
    ]
    if shape["hidden"]:
        rows += [
            row("linear layers, forward + backward", "linear_training_flops", flops),
            row("whole layers, forward + backward", "layers_training_flops", flops),
        ]
    heading = (
        f"{counted(case.group, 'member')} of {counted(case.suffix, 'token')} "
        f"{'that continues' if case.group == 1 else 'that continue'} a prefix of "
        f"{case.prefix:,}; {counted(case.heads_q, 'query head')}, "
        f"{counted(case.heads_kv, 'KV head')}, head dimension {case.head_dim}, "
        f"{counted(layers, 'layer')}, {shape['dtype']}"
    )
    if shape["hidden"]:
        heading += f", hidden size {shape['hidden']}, gated MLP of {shape['intermediate']}"
    copies = f"none: there is {'one member' if case.prefix else 'no prefix'}"
    if copy := results["kv_copy_bytes_avoided_per_layer"]:
        copies = (
            f"{results['kv_copies_avoided']} of the prefix in every layer: {size(copy)} each "
            f"layer, {size(copy * layers)} in all"
        )
    ideal = [
        ("ideal for attention", f"{case.attention_ratio:.2f}x faster, the ratio of its FLOPs"),
        ("ideal for the rest", f"{case.token_ratio:.2f}x faster, the ratio of tokens"),
        ("copies of K and V avoided", copies),
    ]
    parts = [
        paragraph(heading),
        table(["", "repeated", "shared", "ratio"], rows),
        pairs(ideal),
        paragraph(results["verdict"]),
        _measuring(case),
        heat_map(case),
    ]
    if "plot" in results:
        parts.append(f"written: {results['plot']}")
    return "\n\n".join(parts)


def _measuring(case: Case) -> str:
    """What the figures are not, and the command that measures: it needs suffixes."""
    if not case.suffix:
        return paragraph(COUNTING)
    text = (
        f"{paragraph(COUNTING + HERE)}\n  prefix-attn bench --prefix {case.prefix} --suffix "
        f"{case.suffix} --group {case.group} --heads {case.heads_q} --kv-heads {case.heads_kv} "
        f"--head-dim {case.head_dim}"
    )
    if (1 + BACKWARD) * case.flops(case.repeated_pairs) > LONG_ON_CPU:
        text += "\nWithout a GPU that takes minutes or more; this takes one, at smaller shapes:"
        text += "\n  prefix-attn bench --minutes 1"
    return text


def heat_map(case: Case) -> str:
    """Ideal speed-ups of attention as numbers with a shade, as many columns as fit."""
    shades = SHADES if can_print(SHADES) else PLAIN_SHADES
    column = max(8, len(str(case.suffix)) + 3)
    left = max(6, len(str(case.prefix))) + 1
    prefixes, suffixes = _lengths(case, max(1, (width() - left) // column))
    lines = [
        paragraph(
            f"Ideal speed-up of attention for {counted(case.group, 'member')}. P goes down, S "
            "across. The darker, the closer to the number of members, the most there can be:"
        ),
        " " * left + "".join(f"{s:>{column - 2}}  " for s in suffixes).rstrip(),
    ]
    for prefix in prefixes:
        cells = ""
        for suffix in suffixes:
            other = _other(case, prefix, suffix)
            if other is None:
                cells += f"{'-':>{column - 2}}  "
                continue
            # Equal steps of the logarithm, from 1 to the number of members.
            most = math.log(case.group) or 1.0
            shade = shades[round(math.log(other.attention_ratio) / most * (len(shades) - 1))]
            text = f"{other.attention_ratio:.1f}"
            cells += f"{f'[{text}]' if other == case else text:>{column - 2}}{shade} "
        lines.append(f"{prefix:>{left - 1}} {cells}".rstrip())
    return "\n".join(lines)


def _lengths(case: Case, columns: int) -> tuple[list[int], list[int]]:
    """Prefixes, and as many suffixes as there are columns, those of the case among them."""
    prefixes = [p for p in PREFIXES if _other(case, p, case.suffix)]
    suffixes = [s for s in SUFFIXES if _other(case, case.prefix, s)]
    return (
        _around(prefixes, case.prefix, len(prefixes) + 1),
        _around(suffixes, case.suffix, columns),
    )


def _other(case: Case, prefix: int, suffix: int) -> Case | None:
    """The case with other lengths, or None where no layout holds so many tokens."""
    try:
        return replace(case, prefix=prefix, suffix=suffix)
    except ValueError:
        return None


def _around(values: Sequence[int], own: int, count: int) -> list[int]:
    """Up to `count` of the values that lie nearest to `own`, and `own` itself, ascending."""
    nearest = sorted({*values, own}, key=lambda x: abs(math.log2((x + 1) / (own + 1))))
    return sorted(nearest[:count])


def draw(case: Case, path: Path) -> None:
    """Draws the ideal speed-up over P and S, with the shape itself marked.

    Raises:
        UsageError: if matplotlib is missing or the file can't be written.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib: pip install matplotlib ({error})") from None
    prefixes, suffixes = _lengths(case, len(SUFFIXES) + 1)
    cases = [[_other(case, p, s) for s in suffixes] for p in prefixes]
    ratios = [[other.attention_ratio if other else math.nan for other in row] for row in cases]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    norm = LogNorm(1, max(case.group, 2))
    image = axes.imshow(ratios, norm=norm, cmap="viridis", aspect="auto", origin="lower")
    for i, row in enumerate(ratios):
        for j, ratio in enumerate(row):
            if cases[i][j] is None:
                continue
            own = cases[i][j] == case
            axes.text(
                j,
                i,
                f"{ratio:.1f}",
                ha="center",
                va="center",
                color="white" if norm(ratio) < 0.6 else "black",
                fontweight="bold" if own else "normal",
                bbox={"fill": False, "edgecolor": "red"} if own else None,
            )
    axes.set_xticks(range(len(suffixes)), [str(s) for s in suffixes])
    axes.set_yticks(range(len(prefixes)), [str(p) for p in prefixes])
    axes.set(xlabel="suffix, tokens", ylabel="prefix, tokens")
    axes.set_title(f"Ideal speed-up of attention, {counted(case.group, 'member')} (not time)")
    bar = figure.colorbar(image, label="repeated FLOPs over shared FLOPs")
    ticks = [2**i for i in range(max(case.group, 2).bit_length())]
    bar.minorticks_off()
    bar.set_ticks(ticks, labels=[f"{tick}x" for tick in ticks])
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror or error}") from None
