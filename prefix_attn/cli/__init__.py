"""The command line: `prefix-attn`, or `python -m prefix_attn`.

Every command prints text for people, or with `--json` one JSON object. Exit codes: 0, 1 if a check
failed, 2 if an argument or a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import prefix_attn
from prefix_attn.cli import bench, estimate, info, inspect
from prefix_attn.cli.terminal import UsageError, complain, emit

COMMANDS = {"info": info, "estimate": estimate, "inspect": inspect, "bench": bench}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, prog: str = "prefix-attn") -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: those of the command line by default.
        prog: the name of the program in messages.
    """
    parser = _parser(prog)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # --help, --version and what argparse refuses
        return _finished(prog, int(stop.code or 0))
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    name = f"{prog} {options.command}"
    command = COMMANDS[options.command]
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed")
        results, code = command.run(options)
        text = json.dumps(results, indent=2) if options.json else command.render(results)
        return _finished(name, code, text)
    except UsageError as error:
        complain(f"{name}: error: {error}")
        return 2
    except KeyboardInterrupt:
        complain(f"{name}: interrupted")
        return INTERRUPTED


def _finished(name: str, code: int, text: str | None = None) -> int:
    """Writes the text and all that is still buffered; the exit code, 2 if that can't be done."""
    if sys.stdout is None:
        return code
    try:
        if text is not None:
            emit(text)
        sys.stdout.flush()
    except OSError as error:
        # Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # else the reader, such as `head`, has gone
            complain(f"{name}: error: can't write to standard output: {error.strerror or error}")
            return 2
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Exact attention for sequences that share prefixes, each computed once.",
        epilog=f"example: {prog} info",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"prefix_attn {prefix_attn.__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n")[0]
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog=f"example: {prog} {module.EXAMPLE}",
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
