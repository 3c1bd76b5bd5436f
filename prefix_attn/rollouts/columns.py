"""Finds the sequences of a rollout file in the columns that people use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from prefix_attn.rollouts.files import ReadError, values_of, with_progress
from prefix_attn.rollouts.messages import Chat, is_messages, is_text_parts

# Columns that are found by themselves, the first that are all there. `a + b` puts one after the
# other, `a? + b` where the object has it, `x and y` are two sequences. `a.b` is b of the object a,
# or of each object in the list a.
KNOWN = (
    "prompt_ids + completion_ids, prompt_ids + response_ids, prompt_token_ids + token_ids, "
    "prompt_token_ids + outputs.token_ids, prompt_token_ids + choices.token_ids, "
    "input_ids + output_ids?, token_ids, tokens, prompt + completion, "
    "prompt + completions, prompt + response, prompt + responses, prompt + outputs.text, "
    "prompt? + chosen and prompt? + rejected, system? + messages, system? + conversations, "
    "body.messages, body.prompt, body.instructions? + body.input, "
    "params.system? + params.messages, question + answer, instruction + input? + output, "
    "input + output, text"
)
Paths = tuple[tuple[str, ...], ...]
# Columns whose padding another column tells, by a mask or by lengths (NeMo-RL). TRL's
# completion_mask tells more than padding.
MASKS = {"input_ids": "attention_mask", "prompt_ids": "prompt_mask"}
LENGTHS = {"input_ids": "input_lengths", "token_ids": "input_lengths"}
BATCH_OUTPUT = (
    "holds what a batch of OpenAI's gave, answers without their prompts: write one object per "
    "answer, whose messages are those of the request of the same custom_id and then the answer"
)
MAX_ID = 2**31 - 1


@dataclass
class Rollouts:
    """What a file holds.

    Attributes:
        sequences: token ids (int32), or UTF-8 bytes (uint8) of text without a tokenizer.
        paths: the columns that were read; empty for lines that are lists or strings.
        optional: those of them that an object may lack.
        absent: those that every object lacked, which are no part of `paths` in the end.
        unread: other columns of the first object that hold text, lists or objects.
        bad: number and reason of every line, item or row that was left out.
        masked: tokens that were left out because a mask or a length says that they are padding.
        noun: what is numbered: lines, the items of one JSON array, or rows.
        is_text: whether the sequences are text; None where all are empty, and could be either.
        chat: what became of messages.
    """

    chat: Chat
    sequences: list[np.ndarray] = field(default_factory=list)
    paths: Paths = ()
    optional: frozenset[str] = frozenset()
    absent: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    masked: int = 0
    noun: str = "line"
    is_text: bool | None = None

    @property
    def unit(self) -> str:
        """What the sequences are made of: tokens, or bytes."""
        return "bytes" if self.is_text else "tokens"


def read(name: str, columns: list[str], tokenizer: Any, limit: int | None) -> Rollouts:
    """Reads a file, or standard input for "-".

    Args:
        name: of the file.
        columns: put one after the other; found from `KNOWN` if there are none.
        tokenizer: of transformers, or None.
        limit: most lines, items or rows to read, blank lines not counted.

    Raises:
        ReadError: if the file can't be read, a column is unknown, or no line is good.
    """
    rollouts = Rollouts(Chat(tokenizer))
    shown = "standard input" if name == "-" else name
    for place, (noun, number, value) in enumerate(with_progress(values_of(name, shown))):
        if place == limit:
            break
        rollouts.noun = noun
        try:
            if isinstance(value, ValueError):
                raise value
            if isinstance(value, dict) and not rollouts.paths:
                _choose(value, columns, f"{noun} {number}", rollouts)
            elif columns and not isinstance(value, dict):
                raise ValueError(f"--column needs an object, this is {_kind(value)}")
            sequences = list(_sequences(value, rollouts))
            kinds = {x.dtype == np.uint8 for x in sequences if len(x)}
            if len(kinds | {rollouts.is_text} - {None}) > 1:
                raise ValueError("token ids and text can't be compared without --tokenizer")
        except (ValueError, RecursionError) as error:
            rollouts.bad.append((number, str(error)))
            continue
        rollouts.sequences += sequences
        rollouts.is_text = next(iter(kinds), rollouts.is_text)
    rollouts.paths = tuple(
        tuple(column for column in path if column not in rollouts.absent) for path in rollouts.paths
    )
    if not rollouts.sequences:
        reasons = [f"\n  {rollouts.noun} {number}: {why}" for number, why in rollouts.bad[:5]]
        raise ReadError(f"{shown} holds no sequence{':' if reasons else ''}{''.join(reasons)}")
    return rollouts


# ---- sequences of a value -----------------------------------------------------------------------


def _choose(record: dict[str, Any], columns: list[str], where: str, rollouts: Rollouts) -> None:
    """Finds the columns to read, from the first object of a file.

    Raises:
        ReadError: if there are none.
        ValueError: instead, if good lines came before, or this one has columns that hold nothing:
            then it is bad.
    """
    there = ", ".join(map(repr, record)) or "none"
    for column in columns:
        if not _is_named(record, column):
            raise ReadError(f"--column {column!r} is not in {where}; there are: {there}")
    if not columns and "custom_id" in record and isinstance(record.get("response"), dict):
        raise ReadError(f"{where} {BATCH_OUTPUT}")
    known = [((tuple(columns),), frozenset[str]())] if columns else _known()
    named = [choice for choice in known if all(_is_named(record, x) for x in _needed(*choice))]
    filled = [choice for choice in named if all(_has(record, x) for x in _needed(*choice))]
    if not named:
        none = f"none of the columns this command knows; there are: {there}"
        if rollouts.sequences:
            raise ValueError(none)
        raise ReadError(f"{where} has {none}; name one or more with --column")
    paths, optional = (filled or named)[0]
    for column in _needed(paths, optional):
        _filled(record, column)
    rollouts.paths, rollouts.optional, rollouts.absent = paths, optional, set(optional)
    read = {column for path in paths for column in path}
    read |= {tells[x] for tells in (MASKS, LENGTHS) for x in read & set(tells)}
    rollouts.unread = list(_unread(record, read | set(map(_beside, read)), ""))


def _known() -> list[tuple[Paths, frozenset[str]]]:
    """The sets of columns in `KNOWN`, and which of each are optional."""
    sets = []
    for text in KNOWN.split(", "):
        marked = [path.split(" + ") for path in text.split(" and ")]
        paths = tuple(tuple(x.removesuffix("?") for x in path) for path in marked)
        optional = frozenset(x[:-1] for path in marked for x in path if x.endswith("?"))
        sets.append((paths, optional))
    return sets


def _needed(paths: Paths, optional: frozenset[str]) -> list[str]:
    """The columns that are not optional."""
    return [column for path in paths for column in path if column not in optional]


def _beside(column: str) -> str:
    """The column that holds the tools of messages."""
    inside, dot, _ = column.rpartition(".")
    return f"{inside}{dot}tools"


def _unread(record: dict[str, Any], read: set[str], inside: str) -> Iterator[str]:
    """Columns that hold text, lists or objects and are not read."""
    for name, value in record.items():
        column = inside + name
        if any(x.startswith(f"{column}.") for x in read):
            first = value[0] if isinstance(value, list) else value
            yield from _unread(first, read, f"{column}.")
        elif value and column not in read and isinstance(value, (str, list, dict)):
            yield column


def _has(record: dict[str, Any], column: str) -> bool:
    try:
        return any(value is not None for value in _look_up(record, column))
    except ValueError:
        return False


def _is_named(record: Any, column: str) -> bool:
    """Whether a column is there, or could be: inside of a null or an empty list."""
    if record is None or record == []:
        return True
    if isinstance(record, list):
        return any(_is_named(x, column) for x in record)
    if not isinstance(record, dict):
        return False
    first, _, rest = column.partition(".")
    return column in record or (bool(rest) and first in record and _is_named(record[first], rest))


def _filled(record: Any, column: str) -> list[Any]:
    """What a column holds.

    Raises:
        ValueError: if that is nothing but nulls.
    """
    values = _look_up(record, column)
    if all(value is None for value in values):
        raise ValueError(f"column {column!r} holds nothing")
    return values


def _look_up(record: Any, column: str) -> list[Any]:
    """What a column holds: one value, or one for each object of a list on the way."""
    if isinstance(record, list):
        return [value for x in record for value in _look_up(x, column)]
    if isinstance(record, dict) and column in record:
        return [record[column]]
    first, _, rest = column.partition(".")
    if not rest or not isinstance(record, dict) or first not in record:
        raise ValueError(f"no column {column!r}")
    return _look_up(record[first], rest)


def _sequences(value: Any, rollouts: Rollouts) -> Iterator[np.ndarray]:
    """The sequences of a line, item or row.

    Raises:
        ValueError: naming what is wrong with it.
    """
    if not isinstance(value, dict):
        where = f"the {rollouts.noun}"
        if _has_strings(value):
            raise ValueError(f"{where} is a list of strings: write token ids, or an object")
        for part in _alternatives(value, where):
            yield _joined([part], rollouts)
        return
    for path in rollouts.paths:
        there = [x for x in path if x not in rollouts.optional or _has(value, x)]
        rollouts.absent.difference_update(there)
        tools = _beside(path[-1])
        rollouts.chat.tools = _look_up(value, tools)[0] if _has(value, tools) else None
        for parts in product(*(_column(value, column, rollouts) for column in there)):
            yield _joined(list(parts), rollouts)


def _column(record: dict[str, Any], column: str, rollouts: Rollouts) -> list[Any]:
    """What a column holds, without the padding that a mask or lengths tell."""
    where, values = f"column {column!r}", _filled(record, column)
    # By its name the column holds token ids: a list of strings there is no list of texts.
    has_ids = column == "tokens" or column.endswith("_ids")
    if has_ids and any(isinstance(x, str) or _has_strings(x) for x in values):
        raise ValueError(
            f"{where} holds strings, not token ids: write ids, as by "
            "tokenizer.convert_tokens_to_ids, or text in a column of another name"
        )
    parts = [part for value in values for part in _alternatives(value, where)]
    names = (MASKS.get(column, ""), LENGTHS.get(column, ""))
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        return parts
    padding = record[name]
    if parts and parts[0] is values[0] and (name in MASKS.values() or isinstance(padding, int)):
        padding = [padding]  # of the one sequence
    if not isinstance(padding, list) or len(padding) != len(parts):
        raise ValueError(f"{name} has not the shape of {column}")
    kept = [_unpadded(*both, name, column) for both in zip(parts, padding, strict=True)]
    rollouts.masked += sum(map(len, parts)) - sum(map(len, kept))
    return kept


def _unpadded(ids: list[int], padding: Any, name: str, column: str) -> list[int]:
    """Token ids where a mask is 1, or as many as a length says."""
    if name in LENGTHS.values():
        if type(padding) is not int or not 0 <= padding <= len(ids):
            raise ValueError(f"{name} must be 0 to {len(ids)}, as {column} has, got {padding!r}")
        return ids[:padding]
    if not isinstance(padding, list) or len(padding) != len(ids):
        raise ValueError(f"{name} has not the shape of {column}")
    odd = next((x for x in padding if x not in (0, 1)), None)
    if odd is not None:
        raise ValueError(f"{name} must hold 0 and 1, got {odd!r}")
    return [token for token, flag in zip(ids, padding, strict=True) if flag]


def _joined(parts: list[Any], rollouts: Rollouts) -> np.ndarray:
    """Parts one after the other; special tokens belong to the first alone."""
    if len(parts) > 1 and all(map(is_messages, parts)):
        parts = [[message for part in parts for message in part]]
    pieces = [rollouts.chat.encode(part, is_first=not i) for i, part in enumerate(parts)]
    pieces = [piece for piece in pieces if len(piece)] or pieces[:1]  # an empty one fits to all
    if len({piece.dtype for piece in pieces}) > 1:
        raise ValueError("token ids and text can't be joined without --tokenizer")
    return np.concatenate(pieces)


def _alternatives(value: Any, where: str) -> list[Any]:
    """Text, token ids or messages; a list of these is that many alternatives."""
    if isinstance(value, str) or is_messages(value):
        return [value]
    if is_messages([value]):
        return [[value]]
    if is_text_parts(value):
        return ["".join(part["text"] for part in value)]
    if isinstance(value, list) and all(type(x) is int for x in value):
        odd = next((x for x in value if not 0 <= x <= MAX_ID), None)
        if odd is not None:
            raise ValueError(f"{where} has a token id outside 0 to {MAX_ID}: {odd}")
        return [value]
    if isinstance(value, list) and all(isinstance(x, (str, list)) for x in value):
        return [part for x in value for part in _alternatives(x, where)]
    inside = ""
    if isinstance(value, list):
        inside = f" with {_kind(next(x for x in value if type(x) is not int))}"
    raise ValueError(f"{where} is {_kind(value)}{inside}, not text, token ids or messages")


def _has_strings(value: Any) -> bool:
    """Whether this is a list of strings, or of lists of strings."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(x, str) or _has_strings(x) for x in value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
