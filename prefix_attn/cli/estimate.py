"""Computes what sharing a prefix saves: tokens, attention FLOPs and memory.

Nothing is measured: FLOPs are counted from the shape.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from prefix_attn.api import MAX_HEAD_DIM, MIN_HEAD_DIM
from prefix_attn.cli.costs import Group, attention_flops, verdict
from prefix_attn.cli.terminal import (
    DTYPES,
    UsageError,
    at_least,
    can_print,
    counted,
    flops,
    pairs,
    paragraph,
    size,
    table,
    width,
)

EXAMPLE = "estimate --prefix 8192 --suffix 512 --group 16 --hidden 4096"
# Backward over forward: five matrix products against two.
BACKWARD = 2.5
PREFIXES = tuple(2**i for i in range(8, 17))
SUFFIXES = tuple(2**i for i in range(5, 14))
PICTURES = (".png", ".svg", ".pdf")
SHADES, PLAIN_SHADES = " ░▒▓█", " .:+#"
# FLOPs of one layer from which `bench` takes minutes on a CPU.
LONG_ON_CPU = 2e12
COUNTING = (
    "FLOPs are not time: they say what is possible, not what a machine reaches. Bytes are those of "
    "attention's Q, K, V and O alone; other activations, gradients and weights come on top. "
    "Measured figures are in README.md (What it gains) and docs/pages/performance.md"
)
HERE = ", and this machine's come from:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--prefix", type=at_least(0), required=True, help="tokens in the prefix, P")
    parser.add_argument("--suffix", type=at_least(0), required=True, help="tokens in a suffix, S")
    parser.add_argument("--group", type=at_least(1), required=True, help="members of the group, G")
    parser.add_argument("--heads", type=at_least(1), default=32, help="query heads (32)")
    parser.add_argument("--kv-heads", type=at_least(1), default=8, help="KV heads (8)")
    parser.add_argument(
        "--head-dim",
        type=at_least(1),
        default=128,
        help=f"{MIN_HEAD_DIM} to {MAX_HEAD_DIM} (128)",
    )
    parser.add_argument("--layers", type=at_least(1), default=36, help="layers (36)")
    parser.add_argument(
        "--hidden", type=at_least(1), help="hidden size: also counts the linear layers"
    )
    parser.add_argument(
        "--intermediate", type=at_least(1), help="inner size of a gated MLP (3 x hidden)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="(bf16)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw the ideal speed-up over P and S"
    )


def check_heads(options: argparse.Namespace) -> None:
    """Refuses heads that attention refuses."""
    if options.heads % options.kv_heads:
        raise UsageError(
            f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}"
        )
    if not MIN_HEAD_DIM <= options.head_dim <= MAX_HEAD_DIM:
        raise UsageError(
            f"--head-dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {options.head_dim}"
        )


def group_of(options: argparse.Namespace) -> Group:
    """The group that `--prefix`, `--suffix` and `--group` describe."""
    try:
        return Group(options.prefix, options.suffix, options.group)
    except ValueError as error:
        raise UsageError(str(error)) from None


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Returns all figures, and exit code 0."""
    check_heads(options)
    if options.intermediate and not options.hidden:
        raise UsageError(f"--intermediate {options.intermediate} needs --hidden")
    if options.plot and options.plot.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot must end in {', '.join(PICTURES)}, got {str(options.plot)!r}")
    group = group_of(options)
    heads, kv_heads, head_dim = options.heads, options.kv_heads, options.head_dim
    item = DTYPES[options.dtype].itemsize
    qkvo = 2 * (heads + kv_heads) * head_dim * item

    def both(repeated: float, shared: float) -> dict[str, float]:
        return {"repeated": repeated, "shared": shared, "ratio": repeated / shared}

    def attention(pairs: int) -> int:
        return options.layers * attention_flops(pairs, heads, head_dim)

    forward = both(attention(group.repeated_pairs), attention(group.pairs))
    training = {name: forward[name] * (1 if name == "ratio" else 1 + BACKWARD) for name in forward}
    results: dict[str, Any] = {
        "shape": {
            name: getattr(options, name)
            for name in ("prefix", "suffix", "group", "heads", "kv_heads", "head_dim", "layers")
        }
        | {"dtype": options.dtype, "hidden": options.hidden},
        "tokens": both(group.repeated_tokens, group.tokens),
        "attention_forward_flops": forward,
        "attention_training_flops": training,
        "qkvo_bytes_per_layer": both(group.repeated_tokens * qkvo, group.tokens * qkvo),
        "kv_copies_avoided": group.members - 1,
        "kv_copy_bytes_avoided_per_layer": (
            (group.members - 1) * group.prefix * 2 * kv_heads * head_dim * item
        ),
    }
    layer_ratio = None
    if options.hidden:
        inner = options.intermediate or 3 * options.hidden
        weights = options.hidden * (2 * (heads + kv_heads) * head_dim + 3 * inner)
        # Forward 2 FLOPs per weight and token, backward 4.
        linear = both(
            *(6 * weights * options.layers * n for n in (group.repeated_tokens, group.tokens))
        )
        layers = both(*(training[name] + linear[name] for name in ("repeated", "shared")))
        layer_ratio = layers["ratio"]
        results["shape"]["intermediate"] = inner
        results |= {"linear_training_flops": linear, "layers_training_flops": layers}
    results["verdict"] = verdict(group.token_ratio, group.attention_ratio, layer_ratio)
    if options.plot:
        draw(group, options.plot)
        results["plot"] = str(options.plot)
    return results, 0


def render(results: dict[str, Any]) -> str:
    """The figures as tables, with a heat map around the shape."""
    shape = results["shape"]
    group = Group(shape["prefix"], shape["suffix"], shape["group"])
    layers = shape["layers"]

    def row(name: str, key: str, show: Any, factor: int = 1) -> list[str]:
        entry = results[key]
        cells = [show(factor * entry[side]) for side in ("repeated", "shared")]
        return [name, *cells, f"{entry['ratio']:.2f}x"]

    memory = "qkvo_bytes_per_layer"
    rows = [
        row("tokens", "tokens", lambda n: f"{n:,}"),
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
    copy = results["kv_copy_bytes_avoided_per_layer"]
    heading = (
        f"{counted(group.members, 'member')} of {counted(group.suffix, 'token')} "
        f"{'that continues' if group.members == 1 else 'that continue'} a prefix of "
        f"{group.prefix:,}; {counted(shape['heads'], 'query head')}, "
        f"{counted(shape['kv_heads'], 'KV head')}, head dimension {shape['head_dim']}, "
        f"{counted(layers, 'layer')}, {shape['dtype']}"
    )
    if shape["hidden"]:
        heading += f", hidden size {shape['hidden']}, gated MLP of {shape['intermediate']}"
    ideal = [
        ("ideal for attention", f"{group.attention_ratio:.2f}x faster, the ratio of its FLOPs"),
        ("ideal for the rest", f"{group.token_ratio:.2f}x faster, the ratio of tokens"),
        (
            "copies of K and V avoided",
            f"{results['kv_copies_avoided']} of the prefix in every layer: {size(copy)} each "
            f"layer, {size(copy * layers)} in all"
            if copy
            else f"none: there is {'one member' if group.prefix else 'no prefix'}",
        ),
    ]
    parts = [
        paragraph(heading),
        table(["", "repeated", "shared", "ratio"], rows),
        pairs(ideal),
        paragraph(results["verdict"]),
        _measuring(shape, results["attention_training_flops"]["repeated"] / layers),
        heat_map(group),
    ]
    if "plot" in results:
        parts.append(f"written: {results['plot']}")
    return "\n\n".join(parts)


def _measuring(shape: dict[str, Any], layer_flops: float) -> str:
    """What the figures are not, and the command that measures: it needs suffixes."""
    if not shape["suffix"]:
        return paragraph(f"{COUNTING}.")
    names = ("prefix", "suffix", "group", "heads", "kv_heads", "head_dim")
    given = " ".join(f"--{name.replace('_', '-')} {shape[name]}" for name in names)
    text = f"{paragraph(COUNTING + HERE)}\n  prefix-attn bench {given}"
    if layer_flops > LONG_ON_CPU:
        text += "\nWithout a GPU that takes minutes or more; this takes one, at smaller shapes:"
        text += "\n  prefix-attn bench --minutes 1"
    return text


def heat_map(group: Group) -> str:
    """Ideal speed-ups of attention as numbers with a shade, as many columns as fit."""
    shades = SHADES if can_print(SHADES) else PLAIN_SHADES
    column = max(8, len(str(group.suffix)) + 3)
    left = max(6, len(str(group.prefix))) + 1
    suffixes = _around(SUFFIXES, group.suffix, max(1, (width() - left) // column))
    prefixes = _around(PREFIXES, group.prefix, len(PREFIXES) + 1)
    lines = [
        paragraph(
            f"Ideal speed-up of attention for {counted(group.members, 'member')}; P down, S "
            "across, darker is closer to the most there can be, the number of members:"
        ),
        " " * left + "".join(f"{s:>{column - 2}}  " for s in suffixes).rstrip(),
    ]
    for prefix in prefixes:
        cells = ""
        for suffix in suffixes:
            ratio = _ratio(prefix, suffix, group.members)
            # Equal steps of the logarithm, from 1 to the number of members.
            most = math.log(group.members) or 1.0
            shade = shades[round(math.log(ratio) / most * (len(shades) - 1))]
            text = f"{ratio:.1f}"
            if (prefix, suffix) == (group.prefix, group.suffix):
                text = f"[{text}]"
            cells += f"{text:>{column - 2}}{shade} "
        lines.append(f"{prefix:>{left - 1}} {cells}".rstrip())
    return "\n".join(lines)


def _ratio(prefix: int, suffix: int, members: int) -> float:
    group = Group(prefix, suffix, members) if prefix + suffix else None
    return group.attention_ratio if group else 1.0


def _around(values: tuple[int, ...], own: int, count: int) -> list[int]:
    """Up to `count` of the values that lie nearest to `own`, and `own` itself, ascending."""
    nearest = sorted({*values, own}, key=lambda x: abs(math.log2((x + 1) / (own + 1))))
    return sorted(nearest[:count])


def draw(group: Group, path: Path) -> None:
    """Draws the ideal speed-up over P and S, with the shape itself marked.

    Raises:
        UsageError: if matplotlib is missing or the file can't be written.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib: pip install matplotlib ({error})") from None
    prefixes = _around(PREFIXES, group.prefix, len(PREFIXES) + 1)
    suffixes = _around(SUFFIXES, group.suffix, len(SUFFIXES) + 1)
    ratios = np.array([[_ratio(p, s, group.members) for s in suffixes] for p in prefixes])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    norm = LogNorm(1, max(group.members, 2))
    image = axes.imshow(ratios, norm=norm, cmap="viridis", aspect="auto", origin="lower")
    for i, prefix in enumerate(prefixes):
        for j, suffix in enumerate(suffixes):
            own = (prefix, suffix) == (group.prefix, group.suffix)
            axes.text(
                j,
                i,
                f"{ratios[i, j]:.1f}",
                ha="center",
                va="center",
                color="white" if norm(ratios[i, j]) < 0.6 else "black",
                fontweight="bold" if own else "normal",
                bbox={"fill": False, "edgecolor": "red"} if own else None,
            )
    axes.set_xticks(range(len(suffixes)), [str(s) for s in suffixes])
    axes.set_yticks(range(len(prefixes)), [str(p) for p in prefixes])
    axes.set_xlabel("suffix, tokens")
    axes.set_ylabel("prefix, tokens")
    axes.set_title(
        f"Ideal speed-up of attention, {counted(group.members, 'member')} (FLOPs, not time)"
    )
    bar = figure.colorbar(image, label="repeated FLOPs over shared FLOPs")
    ticks = [2**i for i in range(int(norm.vmax or 2).bit_length()) if 2**i <= (norm.vmax or 2)]
    bar.minorticks_off()
    bar.set_ticks(ticks, labels=[f"{tick}x" for tick in ticks])
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror or error}") from None
