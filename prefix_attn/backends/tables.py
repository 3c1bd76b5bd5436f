"""Work lists on a device: built once per layout, copied there at once, and kept with the layout.

A CUDA graph reads the memory of its tables whenever it is replayed, and can't say when it is gone:
what is used during a capture is kept until the process ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_attn.backends import schedule
from prefix_attn.content import Content
from prefix_attn.forest import Forest
from prefix_attn.kernels.arguments import BackwardTables, ForwardTables, KeyLists
from prefix_attn.kernels.config import Config, Tile

# Tables start at multiples of so many integers, as tensors of their own would: 128 bytes.
ALIGNMENT = 32


class Wanted(NamedTuple):
    """What the tables of a layout depend on.

    Attributes:
        device: where they live.
        config: tiles of both passes, under the options of the call.
        window_size: of the call.
        prefix_causal: of the call.
        kv_heads: Hkv.
        group: query heads per KV head.
        fused: whether the programs that own keys add up dQ.
    """

    device: torch.device
    config: Config
    window_size: int | None
    prefix_causal: bool
    kv_heads: int
    group: int
    fused: bool


class _BackwardArrays(NamedTuple):
    """What the tables of a backward pass are made of, and the partial sums in them.

    Attributes:
        arrays: the order, the lists of key tiles, those of values if dV is summed apart, and those
            of query tiles.
        key_slots: partial sums of dK, and of dV if that is not apart.
        value_slots: those of dV if it is.
    """

    arrays: list[np.ndarray]
    key_slots: int = 0
    value_slots: int | None = None


class Tables:
    """The tables of one layout for one kind of call.

    Attributes:
        forward: those of the forward pass.
    """

    def __init__(self, content: Content, wanted: Wanted, *, with_backward: bool) -> None:
        """Builds those of the forward pass, and with_backward the others in the same copy."""
        self._content, self._wanted = content, wanted
        self._uploads: list[_Upload] = []
        forest = content.forest(wanted.window_size, wanted.prefix_causal)
        work = self._query_tiles(wanted.config.forward)
        forward = [_rule(forest), work.items, work.columns, work.masked]
        backward = self._backward_arrays(work) if with_backward else _BackwardArrays([])
        copies = self._upload([*forward, *backward.arrays])
        self.forward = ForwardTables(*copies[:4])
        self._backward = self._as_backward(copies[4:], backward) if with_backward else None

    @property
    def backward(self) -> BackwardTables:
        """Those of the backward pass, built now if they were not needed before."""
        if self._backward is None:
            _refuse_capture(self._wanted.device)
            made = self._backward_arrays()
            self._backward = self._as_backward(self._upload(made.arrays), made)
        return self._backward

    def use(self) -> None:
        """To be called before a launch: orders the copies, and keeps what a CUDA graph reads."""
        device = self._wanted.device
        if device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            _captured.add(self)
            return
        stream = torch.cuda.current_stream(device)
        for upload in self._uploads:
            upload.wait(stream)

    def _query_tiles(self, tile: Tile) -> schedule.QueryTiles:
        forest = self._content.forest(self._wanted.window_size, self._wanted.prefix_causal)
        return schedule.QueryTiles.from_forest(forest, tile.block_m, tile.block_n)

    def _backward_arrays(self, forward: schedule.QueryTiles | None = None) -> _BackwardArrays:
        """Takes the query tiles of the forward pass, which are those of dQ where sizes agree."""
        config = self._wanted.config
        keys = self._key_tiles(config.keys)
        values = None if config.values is None else self._key_tiles(config.values)
        queries: schedule.QueryTiles | None = None
        if not self._wanted.fused:
            sizes = [(x.block_m, x.block_n) for x in (config.forward, config.queries)]
            reused = forward is not None and sizes[0] == sizes[1]
            queries = forward if reused else self._query_tiles(config.queries)
        order, _ = schedule.backward_order(
            keys,
            queries,
            config.keys.area,
            config.queries.area,
            self._wanted.group,
            values=values,
            value_area=0 if config.values is None else config.values.area,
        )
        arrays, slots = [order], []
        for tiles in (keys, values):
            if tiles is not None:
                arrays += [tiles.items, tiles.queries, tiles.splits]
                slots.append(tiles.num_slots)
        if queries is None:
            arrays += [np.empty((0, 9)), np.empty(0), np.empty((0, 2))]
        else:
            arrays += [queries.items, queries.columns, queries.masked]
        return _BackwardArrays(arrays, *slots)

    def _key_tiles(self, tile: Tile) -> schedule.KeyTiles:
        wanted = self._wanted
        return schedule.balanced_key_tiles(
            self._content.forest(wanted.window_size, wanted.prefix_causal),
            tile.block_m,
            tile.block_n,
            heads=wanted.kv_heads,
            group=wanted.group,
            processors=wanted.config.processors,
        )

    def _as_backward(self, copies: Sequence[Tensor], made: _BackwardArrays) -> BackwardTables:
        order, *of_keys, query_items, columns, masked = copies
        apart = made.value_slots is not None
        return BackwardTables(
            rule=self.forward.rule,
            order=order,
            keys=KeyLists(*of_keys[:3], made.key_slots),
            values=KeyLists(*of_keys[3:], made.value_slots) if apart else None,
            query_items=query_items,
            columns=columns,
            masked=masked,
        )

    def _upload(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        upload = _Upload(arrays, self._wanted.device)
        self._uploads.append(upload)
        return upload.tables


def tables_of(content: Content, wanted: Wanted, *, with_backward: bool) -> Tables:
    """The tables of a layout, from its first call on the same object.

    Args:
        content: of the layout.
        wanted: for what.
        with_backward: whether a backward pass may follow, so that its tables go along.

    Raises:
        RuntimeError: if they would have to be built while a CUDA graph is captured.
    """
    tables: Tables | None = content.kept.get(wanted)
    if tables is None:
        _refuse_capture(wanted.device)
        tables = Tables(content, wanted, with_backward=with_backward)
        content.kept[wanted] = tables
    return tables


class _Upload:
    """Arrays that were copied to a device together.

    Attributes:
        tables: their copies, int32, views of one tensor.
    """

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        starts = np.cumsum([0, *(-(-x.size // ALIGNMENT) * ALIGNMENT for x in arrays)]).tolist()
        host = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=on_gpu)
        pieces = [host[start : start + x.size] for start, x in zip(starts, arrays, strict=False)]
        for piece, x in zip(pieces, arrays, strict=True):
            piece.numpy()[:] = x.ravel()
        self._buffer = host.to(device, non_blocking=True)
        self.tables = [
            self._buffer[start : start + x.size].view(x.shape)
            for start, x in zip(starts, arrays, strict=False)
        ]
        self._streams: set[int] = set()
        if on_gpu:
            stream = torch.cuda.current_stream(device)
            self._copied = stream.record_event()
            self._streams.add(stream.cuda_stream)

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Lets a stream that did not make the copy wait for it, and hold its memory."""
        if stream.cuda_stream not in self._streams:
            stream.wait_event(self._copied)
            self._buffer.record_stream(stream)
            self._streams.add(stream.cuda_stream)


def _rule(forest: Forest) -> np.ndarray:
    """The attention rule as kernels read it, see `ForwardTables`."""
    rows = [forest.row_subtree_ends]
    plain = forest.window_size is None and not forest.bidirectional.any()
    if not (plain and forest.has_queries.all()):
        queries = np.zeros_like(forest.positions)
        queries[: len(forest.query_rows)] = forest.query_rows
        rows += [forest.row_seen_from, forest.positions, queries]
    return np.stack(rows)


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the work lists of this layout are not on the GPU yet, and a CUDA graph can't be "
            "captured while they are built: run the same call once with this layout before the "
            "capture, its backward pass included"
        )


# Read by CUDA graphs.
_captured: set[Tables] = set()
