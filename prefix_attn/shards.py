"""A packed row spread over ranks: which rows each of them runs, and rows that travel between them.

Every rank has the same layout, and runs n of its T rows; where a rank has fewer of its own, the
rest is padding, which repeats the last row. There are two ways to attend:

    "heads"  rank r has the rows [r n, (r + 1) n), and trades rows for heads before attention
             T = 7, N = 3    rank 0: 0 1 2    rank 1: 3 4 5    rank 2: 6 6 6
    "keys"   rows are dealt as in `prefix_attn.dealing`, and each rank gets the keys and values of
             the paths of its own

Gradients are those of the SUM of the losses of all ranks: each rank has the part that came through
its own rows. `RowExchange` is where that is made true: its backward is the transpose of its
forward, so the gradient of a row is the sum over all ranks that got it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefix_attn.dealing import deal, path_segments
from prefix_attn.layout import PrefixLayout, outside_inference_mode

WAYS = ("heads", "keys")


@dataclass(frozen=True, eq=False, repr=False)
class RowShard:
    """The rows of a layout that this rank runs.

    It is passed where a layout is: `prefix_layout=shard` makes the attention of transformers models
    run over the group.

    Attributes:
        layout: of all T tokens, the same on every rank.
        group: the ranks that share the row.
        held: the own rows of every rank, ascending.
        rows: (n,) int64, the packed rows of this rank, padding included.
        keys: how keys and values come to this rank, or None where rows are traded for heads.
    """

    layout: PrefixLayout
    group: dist.ProcessGroup
    held: list[np.ndarray]
    rows: Tensor
    keys: PathKeys | None = None

    @classmethod
    @outside_inference_mode
    def of(cls, layout: PrefixLayout, group: dist.ProcessGroup, way: str) -> RowShard:
        """This rank's rows, unchecked: see `shard_rows`."""
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        keys = None
        if way == "heads":
            n = -(-layout.num_tokens // size)
            edges = np.minimum(np.arange(size + 1) * n, layout.num_tokens).tolist()
            held = [np.arange(a, b) for a, b in pairwise(edges)]
        else:
            held, keys = _dealt(layout, group)
        rows = np.full(max(map(len, held)), layout.num_tokens - 1)
        rows[: len(held[rank])] = held[rank]
        return cls(layout, group, held, torch.from_numpy(rows).to(layout.device), keys)

    @property
    def num_own(self) -> int:
        """How many of `rows` are no padding; they come first."""
        return len(self.held[dist.get_rank(self.group)])

    @property
    def num_rows(self) -> int:
        """n, rows that each rank runs."""
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.layout.device

    @cached_property
    @outside_inference_mode
    def position_ids(self) -> Tensor:
        """(n,) int64, depth of each row along its path."""
        return self.layout.position_ids[self.rows]

    @cached_property
    @outside_inference_mode
    def places(self) -> Tensor:
        """(T,) int64, where among this rank's rows each packed row is, -1 where another has it."""
        places = self.rows.new_full((self.layout.num_tokens,), -1)
        own = self.rows[: self.num_own]
        places[own] = torch.arange(self.num_own, device=self.device)
        return places

    @cached_property
    @outside_inference_mode
    def pairs(self) -> Tensor:
        """(M_r,) int64, ascending: the entries of `layout.target_index` that own rows predict.

        Every entry belongs to exactly one rank.
        """
        return (self.places[self.layout.predictor_index] >= 0).nonzero()[:, 0]

    def __repr__(self) -> str:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return f"RowShard({self.num_own} of {self.layout.num_tokens} rows, rank {rank} of {size})"


def shard_rows(
    layout: PrefixLayout, group: dist.ProcessGroup | None = None, *, way: str = "heads"
) -> RowShard:
    """The rows of a layout that this rank runs, where the ranks of a group share its packed row.

    With it no hidden state leaves its rank: the model runs `shard.rows`, and `packed_log_probs`
    takes the hidden states as they are. Nothing is sent here.

    Args:
        layout: of all T tokens, the same on every rank.
        group: the ranks; all of them by default.
        way: "heads" trades rows for heads in attention (Ulysses); "keys" brings each rank the keys
            and values of the paths of its rows. The second serves any number of heads, and moves
            less where little is shared: see Sequence parallelism in the documentation.

    Returns:
        The `RowShard` of this rank, for `prefix_layout=`, `packed_log_probs` and
        `completion_log_probs`.

    Raises:
        TypeError: if the layout or the group is none.
        ValueError: if the layout has no tokens or not a query for each, if this rank is not in the
            group, if `way` is neither, or for "keys" over segments that see all of themselves.

    Example:
        >>> layout, ids = PrefixLayout.from_sequences(sequences)  # doctest: +SKIP
        >>> shard = shard_rows(layout, group)  # doctest: +SKIP
        >>> hidden = model.model(  # doctest: +SKIP
        ...     input_ids=ids[shard.rows][None], position_ids=shard.position_ids[None],
        ...     prefix_layout=shard, use_cache=False,
        ... ).last_hidden_state[0]
        >>> log_probs = packed_log_probs(hidden, head.weight, ids, shard)  # doctest: +SKIP
    """
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"layout must be a PrefixLayout, got {type(layout).__name__}")
    if layout.num_queries != layout.num_tokens or not layout.num_tokens:
        raise ValueError(
            "layout must have tokens, and a query for each, got "
            f"{layout.num_queries} queries for {layout.num_tokens} tokens"
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"rank {dist.get_rank()} is not in the group")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup or None for all ranks, got {type(group).__name__}; "
            "torch.distributed.init_process_group comes first"
        )
    if way not in WAYS:
        raise ValueError(f"way must be one of {list(WAYS)}, got {way!r}")
    if way == "keys" and bool(layout.forest.bidirectional.any()):
        raise ValueError(
            "segments that see all of themselves can't be dealt in tiles: pass way='heads'"
        )
    return RowShard.of(layout, group, way)


@dataclass(frozen=True, eq=False)
class PathKeys:
    """Keys and values that this rank needs: those of the paths of its own rows.

    Attributes:
        layout: of these paths alone, with queries for the own rows.
        exchange: from the own rows of every rank to those of the paths.
    """

    layout: PrefixLayout
    exchange: RowExchange


def _dealt(layout: PrefixLayout, group: dist.ProcessGroup) -> tuple[list[np.ndarray], PathKeys]:
    """The rows of every rank, and what brings this one its keys."""
    size, own = dist.get_world_size(group), dist.get_rank(group)
    pieces, rank = deal(layout.forest, size)
    rank_of_rows = np.repeat(rank, pieces.lengths)
    held = [np.flatnonzero(rank_of_rows == r) for r in range(size)]
    paths = [path_segments(pieces, rank == r) for r in range(size)]
    wanted = [np.flatnonzero(np.repeat(path, pieces.lengths)) for path in paths]
    keep = paths[own]
    number = np.cumsum(keep) - 1
    parents = np.where(pieces.parents >= 0, number[pieces.parents], -1)[keep]
    part = PrefixLayout.from_tree(pieces.lengths[keep].tolist(), parents.tolist(), layout.device)
    queries = part.queries_for(np.flatnonzero(rank[keep] == own).tolist())
    return held, PathKeys(queries, RowExchange(held, wanted, group, layout.device))


class RowExchange:
    """Takes rows from the ranks that hold them to those that want them, each row once to each.

    Args:
        held: for each rank the rows that it holds; no row has two holders.
        wanted: for each rank the rows that it wants, ascending.
        group: the ranks.
        device: of the rows.
    """

    @outside_inference_mode
    def __init__(
        self,
        held: Sequence[np.ndarray],
        wanted: Sequence[np.ndarray],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        rank = dist.get_rank(group)
        size = 1 + max((int(rows.max()) for rows in held if len(rows)), default=-1)
        holder, place = np.full(size, -1), np.full(size, -1)
        for r, rows in enumerate(held):
            holder[rows], place[rows] = r, np.arange(len(rows))
        own = [rows[holder[rows] == rank] for rows in wanted]
        got = [wanted[rank][holder[wanted[rank]] == r] for r in range(len(held))]
        order = np.argsort(np.concatenate(got), kind="stable")
        self.group = group
        self.sent = [len(rows) for rows in own]
        self.received = [len(rows) for rows in got]
        self.places = torch.from_numpy(place[np.concatenate(own)]).to(device)
        self.order = torch.from_numpy(order).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, ...) rows that this rank holds -> (m, ...) rows that it wants, differentiable."""
        return _Exchange.apply(x, self)


class _Exchange(torch.autograd.Function):
    """An uneven all-to-all of rows, and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: RowExchange) -> Tensor:
        """x (n, ...) -> (m, ...)."""
        ctx.exchange, ctx.rows = exchange, x.shape[0]
        parts = x[exchange.places]
        got = x.new_empty(sum(exchange.received), *x.shape[1:])
        dist.all_to_all_single(got, parts, exchange.received, exchange.sent, group=exchange.group)
        return got[exchange.order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """dx[i] = the sum of dout over the ranks that got row i, in float32 or better."""
        exchange = ctx.exchange
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        parts[exchange.order] = grad
        got = grad.new_empty(sum(exchange.sent), *grad.shape[1:])
        dist.all_to_all_single(got, parts, exchange.sent, exchange.received, group=exchange.group)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.rows, *grad.shape[1:], dtype=dtype, device=grad.device)
        # One rank after the other: a row is there at most once in each, so the order is fixed.
        each = zip(exchange.places.split(exchange.sent), got.split(exchange.sent), strict=True)
        for places, part in each:
            total[places] += part
        return total.to(grad.dtype), None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' tensors, on every rank; so is the gradient of each."""
    total: Tensor = _SumOverRanks.apply(x, group)
    return total


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x -> the sum of x over the ranks."""
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """dx = the sum of dout over the ranks."""
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
