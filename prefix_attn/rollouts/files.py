"""Opens a file of rollouts: JSON lines, JSON arrays and Parquet, as values with their places."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from prefix_attn.rollouts.messages import is_messages

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
# What else a file may be, by its first bytes, and what to do about it.
OTHERS = {
    b"\x28\xb5\x2f\xfd": "zstd: zstd -dc FILE | prefix-attn inspect -",
    b"BZh": "bzip2: bzcat FILE | prefix-attn inspect -",
    b"\xfd7zXZ": "xz: xzcat FILE | prefix-attn inspect -",
    b"PK\x03\x04": "a zip archive, as of torch.save or numpy.savez: write JSON lines",
    b"ARROW1": "an Arrow file: write Parquet, as by Dataset.to_parquet",
    b"\xff\xff\xff\xff": "an Arrow stream: write Parquet, as by Dataset.to_parquet",
}

Value = tuple[str, int, Any]


class ReadError(Exception):
    """A file can't be read, or holds nothing that can."""


def with_progress(values: Iterable[Value]) -> Iterable[Value]:
    """Counts on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return values
    bar: Iterable[Value] = tqdm(
        values, unit=" lines", disable=sys.stderr is None or None, leave=False, file=sys.stderr
    )
    return bar


def values_of(name: str, shown: str) -> Iterator[Value]:
    """Noun, number and value of every line, item or row; a bad line is a `ValueError`."""
    if name == "-" and sys.stdin is None:
        raise ReadError("standard input is closed")
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as stream:
            start = cast(io.BufferedReader, stream).peek(8)
            for magic, what in OTHERS.items():
                if start.startswith(magic):
                    raise ReadError(f"can't read {shown}: it is {what.replace('FILE', shown)}")
            if start.startswith(PARQUET):
                yield from _rows(stream, shown)
            elif start.startswith(GZIP):
                yield from _parsed_lines(gzip.GzipFile(fileobj=stream))
            else:
                yield from _parsed_lines(stream)
    except (OSError, EOFError, zlib.error) as error:
        raise ReadError(f"can't read {shown}: {getattr(error, 'strerror', 0) or error}") from None


def _rows(stream: BinaryIO, shown: str) -> Iterator[Value]:
    """Rows of a Parquet file, such as TRL's logs of completions."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ReadError(
            f"{shown} is Parquet, which needs pyarrow: pip install prefix-attn[inspect]"
        ) from None
    try:
        # Its columns are listed at its end, and a pipe has no way back.
        file = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        # Times hold no tokens, and Python has no type for some of them.
        columns = [x.name for x in file.schema_arrow if not pyarrow.types.is_temporal(x.type)]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                yield "row", number, row
    except (pyarrow.ArrowException, ValueError) as error:
        raise ReadError(f"can't read {shown}: {error}") from None


def _parsed_lines(stream: Iterable[bytes]) -> Iterator[Value]:
    """Lines that aren't blank; of a file that is one JSON array, its items."""
    lines = enumerate(stream, 1)
    number, line = next(((n, line) for n, line in lines if line.strip()), (0, b""))
    if not number:
        return
    value = _parsed(line)
    rest: Iterable[tuple[int, bytes]] = lines
    if isinstance(value, ValueError) or (_has_objects(value) and not is_messages(value)):
        rest = list(lines)
        items = _parsed(line + b"".join(text for _, text in rest))
        if isinstance(items, list):
            yield from (("item", place, item) for place, item in enumerate(items, 1))
            return
    yield "line", number, value
    yield from (("line", n, _parsed(text)) for n, text in rest if text.strip())


def _parsed(line: bytes) -> Any:
    """The value of a JSON text, or what is wrong with it."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # too many digits, too many brackets
        return ValueError(str(error))


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(x, dict) for x in value)
