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
from prefix_attn.cli.terminal import UsageError, emit

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
        return int(stop.code or 0)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[options.command]
    try:
        results, code = command.run(options)
        emit(json.dumps(results, indent=2) if options.json else command.render(results))
        sys.stdout.flush()
    except UsageError as error:
        print(f"{prog} {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has gone: nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"{prog} {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
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
