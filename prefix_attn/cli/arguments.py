"""The arguments of every command; nothing here needs PyTorch, so `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import prefix_attn

# Names on the command line, and PyTorch's.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
MINUTES = 0.5
# Of every integer: products of them stay far from what a float holds.
MOST = 2**63 - 1
# Of each command, a module of this package: what it does, and an example.
COMMANDS = {
    "info": ("Says what is installed, what can run here, and whether it is right", "info --json"),
    "estimate": (
        "Computes from a shape what sharing a prefix saves: tokens, attention FLOPs and memory",
        "estimate --prefix 8192 --suffix 512 --group 16 --hidden 4096",
    ),
    "inspect": (
        "Shows how much prefix the sequences of a rollout file share, as a tree",
        "inspect rollouts.jsonl --tokenizer Qwen/Qwen3-0.6B",
    ),
    "bench": (
        "Checks gradients, then times sharing a prefix against repeating it on this machine",
        "bench --prefix 2048 --suffix 128 --group 8",
    ),
}


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` is None where none is given.

    Args:
        prog: the name of the program in messages.
    """
    whole = argparse.ArgumentParser(
        prog=prog,
        description="Exact attention for sequences that share prefixes, each computed once.",
        epilog=f"example: {prog} info",
        allow_abbrev=False,
    )
    version = f"prefix_attn {prefix_attn.__version__}"
    whole.add_argument("--version", action="version", version=version)
    commands = whole.add_subparsers(dest="command", metavar="command")
    fill = {"estimate": _add_estimate, "inspect": _add_inspect, "bench": _add_bench}
    for name, (summary, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=f"{summary}.",
            epilog=f"example: {prog} {example}",
            allow_abbrev=False,
        )
        if name in fill:
            fill[name](command)
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return whole


def _add_estimate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--prefix", type=at_least(0), required=True, help="tokens in the prefix, P")
    add("--suffix", type=at_least(0), required=True, help="tokens in a suffix, S")
    add("--group", type=at_least(1), required=True, help="members of the group, G")
    add("--heads", type=at_least(1), default=32, help="query heads (32)")
    add("--kv-heads", type=at_least(1), default=8, help="KV heads (8)")
    add("--head-dim", type=at_least(1), default=128, help="head dimension (128)")
    add("--layers", type=at_least(1), default=36, help="layers (36)")
    add("--hidden", type=at_least(1), help="hidden size: also counts the linear layers")
    add("--intermediate", type=at_least(1), help="inner size of a gated MLP (3 x hidden)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="(bf16)")
    plot = "also draw the ideal speed-up over P and S"
    add("--plot", type=Path, metavar="FILE.png", help=plot)


def _add_inspect(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "file",
        metavar="FILE",
        help="JSON lines, each a list of token ids or an object; or one JSON array of these; or "
        "Parquet (needs pyarrow). JSON may be gzipped; - is standard input",
    )
    add(
        "--column",
        action="append",
        default=[],
        metavar="NAME",
        help="column with text, token ids or messages, a.b for b inside of a; several are put one "
        "after the other",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer of transformers, a name or a folder; without one text is compared by byte",
    )
    add("--limit", type=at_least(1), metavar="N", help="read the first N lines")
    add(
        "--batch",
        type=at_least(1),
        metavar="N",
        help="share prefixes only among N neighbouring sequences, as in a batch of N (all)",
    )
    depth = "levels of the tree to draw (3)"
    add("--depth", type=at_least(1), default=3, metavar="N", help=depth)


def _add_bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--minutes", type=_minutes, default=MINUTES, help=f"time to take, roughly ({MINUTES})")
    add("--prefix", type=at_least(0), help="tokens in the prefix, P")
    add("--suffix", type=at_least(1), help="tokens in a suffix, S")
    add("--group", type=at_least(1), help="members of the group, G")
    add("--heads", type=at_least(1), help="query heads (8, on a GPU 32)")
    add("--kv-heads", type=at_least(1), help="KV heads (2, on a GPU 8)")
    add("--head-dim", type=at_least(1), help="head dimension (64, on a GPU 128)")
    add("--dtype", choices=list(DTYPES), help="(fp32, on a GPU bf16)")
    add("--device", choices=["cpu", "cuda"], help="(a GPU if there is one)")


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: integers from `least` to `MOST`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > MOST:
            raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {value}")
        return value

    return integer


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value
