"""Reads rollout files: one JSON value per line, token ids or text, in the columns people use."""

from __future__ import annotations

import gzip
import json
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from prefix_attn.cli.terminal import UsageError, on_terminal

# A path is the columns that are put one after the other; several paths are several sequences.
Paths = tuple[tuple[str, ...], ...]
KNOWN: tuple[Paths, ...] = (
    (("prompt_ids", "completion_ids"),),
    (("prompt_ids", "response_ids"),),
    (("prompt_token_ids", "token_ids"),),
    (("input_ids",),),
    (("token_ids",),),
    (("tokens",),),
    (("prompt", "completion"),),
    (("prompt", "completions"),),
    (("prompt", "response"),),
    (("prompt", "responses"),),
    (("prompt", "chosen"), ("prompt", "rejected")),
    (("chosen",), ("rejected",)),
    (("messages",),),
    (("conversations",),),
    (("question", "answer"),),
    (("instruction", "input", "output"),),
    (("instruction", "output"),),
    (("input", "output"),),
    (("text",),),
)
# Columns that hold token ids by their name: a list of strings there is no list of texts.
TOKEN_COLUMNS = {
    column
    for paths in KNOWN
    for path in paths
    for column in path
    if column == "tokens" or column.endswith("_ids")
}
# Columns whose padding another column tells. TRL's completion_mask tells more than padding.
MASKS = {"input_ids": "attention_mask", "prompt_ids": "prompt_mask"}
# ShareGPT's names of roles.
ROLES = {"human": "user", "gpt": "assistant"}
GZIP = b"\x1f\x8b"
MAX_ID = 2**31 - 1
TICK_SECONDS = 0.5


@dataclass
class Rollouts:
    """What a file holds.

    Attributes:
        sequences: token ids (int32), or UTF-8 bytes (uint8) of text without a tokenizer.
        paths: the columns that were read; empty for lines that are lists or strings.
        bad: number and reason of every line, or item, that was left out.
        rendered: whether messages were written out without a chat template.
        masked: tokens that were left out because an attention mask says so.
        noun: what is numbered: lines, or the items of one JSON array.
    """

    sequences: list[np.ndarray] = field(default_factory=list)
    paths: Paths = ()
    bad: list[tuple[int, str]] = field(default_factory=list)
    rendered: bool = False
    masked: int = 0
    noun: str = "line"

    @property
    def unit(self) -> str:
        """What the sequences are made of: tokens, or bytes."""
        is_text = self.sequences and self.sequences[0].dtype == np.uint8
        return "bytes" if is_text else "tokens"


def read(name: str, columns: list[str], tokenizer: Any, limit: int | None) -> Rollouts:
    """Reads a file, or standard input for "-".

    Args:
        name: of the file.
        columns: put one after the other; found from `KNOWN` if there are none.
        tokenizer: of transformers, or None.
        limit: most lines, or items, to read, blank ones not counted.

    Raises:
        UsageError: if the file can't be read, a column is unknown, or no line is good.
    """
    rollouts = Rollouts()
    encoder = _Encoder(tokenizer, rollouts)
    read_lines = 0
    with _opened(name) as (stream, total):
        for number, line in _numbered(_with_progress(stream, total), rollouts):
            if limit is not None and read_lines == limit:
                break
            read_lines += 1
            try:
                record = _parsed(line) if isinstance(line, bytes) else line
                if isinstance(record, dict) and not rollouts.paths:
                    where = f"{rollouts.noun} {number}"
                    rollouts.paths = _choose(record, columns, where, bool(rollouts.sequences))
                elif columns and not isinstance(record, dict):
                    raise ValueError(f"--column needs an object, this is {_kind(record)}")
                sequences = list(encoder.sequences(record, rollouts.paths))
                _check_unit(sequences, rollouts)
            except (ValueError, RecursionError) as error:
                rollouts.bad.append((number, str(error)))
                continue
            rollouts.sequences += sequences
    if not rollouts.sequences:
        reasons = "".join(
            f"\n  {rollouts.noun} {number}: {reason}" for number, reason in rollouts.bad[:5]
        )
        raise UsageError(f"{_shown(name)} holds no sequence{':' if reasons else ''}{reasons}")
    return rollouts


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


@contextmanager
def _opened(name: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A stream of bytes, unpacked if it is gzip's, and how many there are, if that is known."""
    if name == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        yield sys.stdin.buffer, None
        return
    path = Path(name)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UsageError(f"can't read {name}: {error.strerror or error}") from None
    with stream:
        if stream.peek(len(GZIP))[: len(GZIP)] != GZIP:
            yield stream, path.stat().st_size
            return
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=stream)), None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"can't read {name}: {error}") from None


def _numbered(lines: Iterator[bytes], rollouts: Rollouts) -> Iterator[tuple[int, Any]]:
    """Lines that aren't blank, with their numbers; of a file that is one JSON array, its items."""
    numbered = _not_blank(lines, 1)
    number, line = next(numbered, (0, b""))
    if not number:
        return
    if _begins_array(line):
        whole = [line, *lines]
        items = _array(whole)
        if items is not None:
            rollouts.noun = "item"
            yield from enumerate(items, 1)
            return
        numbered = _not_blank(whole[1:], number + 1)
    yield number, line
    yield from numbered


def _not_blank(lines: Iterable[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, start) if line.strip())


def _begins_array(line: bytes) -> bool:
    """Whether this first line looks like the beginning of an array of records."""
    try:
        value = _parsed(line)
    except (ValueError, RecursionError):
        return line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")
    return (
        isinstance(value, list)
        and any(isinstance(x, dict) for x in value)
        and not _is_messages(value)
    )


def _array(lines: list[bytes]) -> list[Any] | None:
    """The items of a JSON array, or None."""
    try:
        value = json.loads(b"".join(lines).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _with_progress(lines: Iterable[bytes], total: int | None) -> Iterator[bytes]:
    """Hands lines on and counts bytes on a terminal: by tqdm where it is installed."""
    if not on_terminal():
        yield from lines
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _with_counter(lines, total)
        return
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:
        for line in lines:
            yield line
            bar.update(len(line))


def _with_counter(lines: Iterable[bytes], total: int | None) -> Iterator[bytes]:
    """The same without tqdm."""
    shown, done = time.monotonic(), 0
    for number, line in enumerate(lines, 1):
        yield line
        done += len(line)
        if time.monotonic() - shown > TICK_SECONDS:
            shown = time.monotonic()
            share = f", {100 * done / total:.0f} %" if total else ""
            print(f"\r{number:,} lines{share} ", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None


def _choose(record: dict[str, Any], columns: list[str], where: str, late: bool) -> Paths:
    """The columns to read, from the first object of a file.

    Raises:
        UsageError: if there are none.
        ValueError: instead, if good lines came before (`late`): then this one is bad.
    """
    there = ", ".join(map(repr, record)) or "none"
    for column in columns:
        if column not in record:
            raise UsageError(f"--column {column!r} is not in {where}; there are: {there}")
    if columns:
        return (tuple(columns),)
    for paths in KNOWN:
        if all(column in record for path in paths for column in path):
            return paths
    if late:
        raise ValueError(f"none of the columns this command knows; there are: {there}")
    raise UsageError(
        f"{where} has none of the columns this command knows; name one or more with "
        f"--column; there are: {there}"
    )


def _check_unit(sequences: list[np.ndarray], rollouts: Rollouts) -> None:
    """Refuses to compare text with token ids."""
    kinds = {x.dtype for x in [*rollouts.sequences[:1], *sequences]}
    if len(kinds) > 1:
        raise ValueError("token ids and text can't be compared without --tokenizer")


def _kind(value: Any) -> str:
    names = {
        dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"
    }  # fmt: skip
    return names.get(type(value), "a number")


class _Encoder:
    """Turns a JSON value into sequences of token ids or bytes."""

    def __init__(self, tokenizer: Any, rollouts: Rollouts) -> None:
        self.tokenizer = tokenizer
        self.rollouts = rollouts

    def sequences(self, record: Any, paths: Paths) -> Iterator[np.ndarray]:
        """The sequences of a line.

        Raises:
            ValueError: naming what is wrong with it.
        """
        if not isinstance(record, dict):
            where = f"the {self.rollouts.noun}"
            if _has_strings(record):
                raise ValueError(f"{where} is a list of strings: write token ids, or an object")
            for part in _alternatives(record, where):
                yield self._joined([part])
            return
        for path in paths:
            for column in path:
                if column not in record:
                    raise ValueError(f"no column {column!r}")
            values = [self._column(record, column) for column in path]
            for parts in product(*values):
                yield self._joined(parts)

    def _column(self, record: dict[str, Any], column: str) -> list[Any]:
        """What a column holds; padding that a mask tells is left out."""
        value, where = record[column], f"column {column!r}"
        if column in TOKEN_COLUMNS and (isinstance(value, str) or _has_strings(value)):
            raise ValueError(
                f"{where} holds strings, not token ids: write ids, as by "
                "tokenizer.convert_tokens_to_ids, or text in a column of another name"
            )
        parts = _alternatives(value, where)
        name = MASKS.get(column, "")
        mask = record.get(name)
        if mask is None:
            return parts
        masks = [mask] if parts and parts[0] is value else mask
        if not isinstance(masks, list) or list(map(_length, masks)) != list(map(len, parts)):
            raise ValueError(f"{name} has not the shape of {column}")
        odd = next((x for flags in masks for x in flags if x not in (0, 1)), None)
        if odd is not None:
            raise ValueError(f"{name} must hold 0 and 1, got {odd!r}")
        kept = [
            [token for token, flag in zip(ids, flags, strict=True) if flag]
            for ids, flags in zip(parts, masks, strict=True)
        ]
        self.rollouts.masked += sum(map(len, parts)) - sum(map(len, kept))
        return kept

    def _joined(self, parts: Iterable[Any]) -> np.ndarray:
        """Parts one after the other; special tokens belong to the first alone."""
        parts = list(parts)
        if len(parts) > 1 and all(_is_messages(part) for part in parts):
            parts = [[message for part in parts for message in part]]
        pieces = [self._encoded(part, first=not i) for i, part in enumerate(parts)]
        if len({piece.dtype for piece in pieces}) > 1:
            raise ValueError("token ids and text can't be joined without --tokenizer")
        return np.concatenate(pieces)

    def _encoded(self, part: Any, first: bool) -> np.ndarray:
        special = first
        if _is_messages(part):
            special = False
            part = self._rendered(part)
        if isinstance(part, str):
            if self.tokenizer is None:
                # Lone surrogates are legal in JSON.
                return np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)
            part = self.tokenizer(part, add_special_tokens=special)["input_ids"]
        return np.array(part, dtype=np.int32)

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        """Messages as text: by the chat template of the tokenizer, or each after its role."""
        messages = [_in_roles(message) for message in messages]
        if getattr(self.tokenizer, "chat_template", None):
            try:
                return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
            except Exception as error:  # templates raise errors of their own
                raise ValueError(f"the chat template refuses the messages: {error}") from None
        self.rollouts.rendered = True
        return "".join(f"<{m.get('role')}>\n{_content(m)}\n" for m in messages)


def _alternatives(value: Any, where: str) -> list[Any]:
    """Text, token ids or messages; a list of these is that many alternatives."""
    if isinstance(value, str) or _is_messages(value):
        return [value]
    if _is_messages([value]):
        return [[value]]
    if isinstance(value, list) and all(type(x) is int for x in value):
        for token in value:
            if not 0 <= token <= MAX_ID:
                raise ValueError(f"{where} has a token id outside 0 to {MAX_ID}: {token}")
        return [value]
    if isinstance(value, list) and all(isinstance(x, (str, list)) for x in value):
        return [part for x in value for part in _alternatives(x, where)]
    inside = ""
    if isinstance(value, list):
        odd = next((x for x in value if type(x) is not int), None)
        inside = f" with {_kind(odd)}"
    raise ValueError(f"{where} is {_kind(value)}{inside}, not text, token ids or messages")


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(x, dict) and ("content" in x or {"from", "value"} <= set(x)) for x in value
        )
    )


def _in_roles(message: dict[str, Any]) -> dict[str, Any]:
    """A message with a role and content; ShareGPT's have `from` and `value` instead."""
    if "content" in message:
        return message
    name = str(message["from"])
    return {"role": ROLES.get(name, name), "content": message["value"]}


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _has_strings(value: Any) -> bool:
    """Whether this is a list of strings, or of lists of strings."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, str) or _has_strings(x) for x in value)
    )


def _content(message: dict[str, Any]) -> str:
    """Text of a message; that of its parts where it has parts."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(
            str(x.get("text", "")) if isinstance(x, dict) else str(x) for x in content
        )
    return "" if content is None else str(content)
