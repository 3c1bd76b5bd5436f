"""The command line: `prefix-attn`, or `python -m prefix_attn`.

Every command is a module of its name with `run` and `render`. It prints text for people, or with
`--json` one JSON object. Exit codes: 0, 1 if a check failed, 2 if an argument or a file is wrong.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from prefix_attn.cli.arguments import parser
from prefix_attn.cli.terminal import UsageError, complain, emit, silence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, prog: str = "prefix-attn") -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: those of the command line by default.
        prog: the name of the program in messages.
    """
    whole = parser(prog)
    try:
        args = whole.parse_args(arguments)
    except SystemExit as stop:  # --help, --version and what argparse refuses
        return _finished(prog, int(stop.code or 0))
    if args.command is None:
        whole.print_help(sys.stderr)
        return 2
    name = f"{prog} {args.command}"
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed")
        # Only now is PyTorch imported: help and wrong arguments need none.
        command = importlib.import_module(f"prefix_attn.cli.{args.command}")
        results, code = command.run(args)
        text = json.dumps(results, indent=2) if args.json else command.render(results)
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
        silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # else the reader, such as `head`, has gone
            complain(f"{name}: error: can't write to standard output: {error.strerror or error}")
            return 2
    return code
