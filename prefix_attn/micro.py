"""Prefixes that several micro-batches share, run once: what is planned, recorded and summed.

A *segment* of the prefix tree whose sequences lie in several micro-batches is recorded. Segments
with one first and one last micro-batch form a *block*, which runs as one pass of the model before
its first micro-batch:

    forward    a block records its keys and values; later passes lay them in front of their own
    backward   a pass adds the gradients of recorded rows to sums that the block keeps; the block's
               own backward takes these sums, inside the backward of its last micro-batch

Three functions do it. `Deposit` stands where a recorded tensor enters the block's own graph, `Join`
where another pass reads it. `Barrier` stands at the embeddings of a block's last micro-batch, whose
graph the block is part of: what lies below it waits until every layer above has left its gradients.
So there is one ordinary backward for each micro-batch, and no other.

This file knows tensors and layouts; `integrations.transformers.micro_groups` runs a model with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefix_attn.forest import Forest
from prefix_attn.layout import PrefixLayout

Pairs = set[tuple[int, int]]


# ---- what a block keeps -----------------------------------------------------------------------


class Recorded:
    """One tensor of a block, and the sum of the gradients that its readers found.

    The sum is in float32 or better. Both are given up when the block's own backward takes the sum.

    Attributes:
        value: detached; in host memory where the block is offloaded.
        dim: along which its tokens lie.
        closed: whether the block's own backward has been here.
        total: the sum, None before the first gradient.
    """

    def __init__(self, value: Tensor, dim: int, offload: bool) -> None:
        self.dim = dim
        self.device = value.device
        self.value: Tensor | None = value.detach()
        if offload:
            self.value = self.value.to("cpu", copy=True)
        self.shape, self.dtype = value.shape, value.dtype
        self.closed = False
        self.total: Tensor | None = None

    def read(self, start: int, length: int) -> Tensor:
        """Some of its tokens, on the device where they were recorded.

        Raises:
            RuntimeError: after the block's own backward.
        """
        if self.value is None:
            raise RuntimeError(
                "a micro-batch is recomputed after the backward of the prefixes that it reads: "
                "call backward() of every micro-batch before that of the last one that shares them"
            )
        return self.value.narrow(self.dim, start, length).to(self.device)

    def add(self, grad: Tensor, start: int) -> None:
        """Adds the gradient of tokens from `start` on."""
        if self.total is None:
            home = self.device if self.value is None else self.value.device
            dtype = torch.promote_types(self.dtype, torch.float32)
            self.total = torch.zeros(self.shape, dtype=dtype, device=home)
        part = self.total.narrow(self.dim, start, grad.shape[self.dim])
        part.add_(grad.to(self.total.device))

    def close(self) -> Tensor | None:
        """Hands the sum over, and gives up what was recorded."""
        total, self.total, self.value, self.closed = self.total, None, None, True
        return total


class Deposit(torch.autograd.Function):
    """Identity. Backward adds the gradients that readers in other graphs left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: Recorded) -> Tensor:
        """x in the block's own graph."""
        ctx.recorded = recorded
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """dx = dout + the readers' sum, rounded once."""
        total = ctx.recorded.close()
        if total is None:
            return grad, None
        return (total.to(grad.device) + grad).to(grad.dtype), None


class Join(torch.autograd.Function):
    """Recorded and own tokens in the order of a layout."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, dim: int, parts: list[Part]) -> Tensor:
        """own (..., n, ...) -> (..., T, ...), tokens along `dim`."""
        ctx.dim, ctx.parts, ctx.shape = dim, parts, own.shape
        rows = [
            own.narrow(dim, part.start, part.length)
            if part.recorded is None
            else part.recorded.read(part.start, part.length)
            for part in parts
        ]
        return torch.cat(rows, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of own tokens; that of recorded ones goes to their sums."""
        own = grad.new_zeros(ctx.shape)
        pieces = grad.split([part.length for part in ctx.parts], ctx.dim)
        for piece, part in zip(pieces, ctx.parts, strict=True):
            if part.recorded is None:
                own.narrow(ctx.dim, part.start, part.length).copy_(piece)
            else:
                part.recorded.add(piece, part.start)
        return own, None, None


class Barrier(torch.autograd.Function):
    """Identity of several tensors. Nothing below starts before the gradients of all are there.

    The anchor is a leaf that requires a gradient, so that a pass is part of the graph where
    embeddings are frozen.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors as they are."""
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Their gradients as they are."""
        return None, *grads


class WholeBackward(torch.autograd.Function):
    """Identity. Refuses a backward that is asked for the gradients of some tensors alone.

    That would run only what leads to them, so without `Join` where no own rows do. The anchor is a
    leaf that nobody asks for.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        """x as it is."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Its gradient as it is.

        Raises:
            RuntimeError: if the gradient of the anchor is not wanted.
        """
        (anchor, _), *_ = ctx.next_functions
        if not torch._C._will_engine_execute_node(anchor):
            raise RuntimeError(
                "torch.autograd.grad and backward(inputs=...) leave out the gradients of the "
                "prefixes that micro-batches share: call backward() without inputs inside "
                "micro_groups"
            )
        return None, grad


@dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring rows of a layout: own ones of a pass, or some that a block recorded.

    Attributes:
        recorded: where they are read, None for own ones.
        start: the first of them, counted there.
        length: how many there are.
    """

    recorded: Recorded | None
    start: int
    length: int


# ---- passes -----------------------------------------------------------------------------------


class Pass:
    """One run of the model over rows of its own, behind rows that blocks recorded.

    Attributes:
        rows: (n,) the plan's rows that it runs; empty where every row is recorded.
        all_rows: (T,) ascending, the plan's rows that its sequences hold, recorded ones included.
        stands_in: it runs one token that nothing reads, for the company of other ranks.
        offsets: of each own segment, the first of its own rows.
        parts_of: for each run of neighbouring rows the block that recorded it or None, the first
            row there, and their number.
    """

    def __init__(self, plan: Plan, segments: list[int], own: list[int]) -> None:
        forest, ours = plan.forest, set(own)
        place = {segment: i for i, segment in enumerate(segments)}
        parents = [place.get(int(forest.parents[s]), -1) for s in segments]
        layout = PrefixLayout.from_tree([int(forest.lengths[s]) for s in segments], parents)
        if len(own) < len(segments):
            layout = layout.queries_for([place[s] for s in own])
        self.all_rows = _rows_of(forest, segments)
        self.rows = _rows_of(forest, own)
        self.offsets: dict[int, int] = {}
        self.parts_of: list[tuple[Block | None, int, int]] = []
        count = 0
        for segment in segments:
            length = int(forest.lengths[segment])
            if segment in ours:
                self.offsets[segment] = count
                self._append(None, count, length)
                count += length
            else:
                block = plan.block_of[segment]
                self._append(block, block.offsets[segment], length)
        self.stands_in = plan.in_company and not count
        if self.stands_in:
            layout = PrefixLayout.from_lengths([1], [[]])
        self._host_layout = layout
        self._layouts: dict[torch.device, PassLayout] = {}
        self._attended: list[torch.nn.Module] = []  # in the run, recomputation left out
        self._turns: dict[torch.nn.Module, int] = {}
        self._ended = False

    def _append(self, block: Block | None, start: int, length: int) -> None:
        """Adds rows, as one run with those before them where they are neighbours there too."""
        if not length:
            return
        if self.parts_of:
            before, first, count = self.parts_of[-1]
            if before is block and first + count == start:
                self.parts_of[-1] = (block, first, count + length)
                return
        self.parts_of.append((block, start, length))

    @property
    def num_tokens(self) -> int:
        """Rows that it runs."""
        return 1 if self.stands_in else len(self.rows)

    def layout(self, device: torch.device) -> PassLayout:
        """Its layout on a device, which takes this pass to every attention layer."""
        if device not in self._layouts:
            self._layouts[device] = PassLayout.of(self, self._host_layout.to(device))
        return self._layouts[device]

    def parts(self, name: Any) -> list[Part]:
        """Its rows of a recorded tensor.

        Raises:
            RuntimeError: if a block did not record a tensor of that name.
        """
        found = []
        for block, start, length in self.parts_of:
            recorded = None
            if block is not None:
                recorded = block.recorded.get(name)
                if recorded is None:
                    raise RuntimeError(
                        f"{_shown(name)} runs in a micro-batch and did not when its prefix ran: "
                        "layers have to be the same in every call"
                    )
            found.append(Part(recorded, start, length))
        return found

    def join(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Own keys and values (1, Hkv, n, D), in their places among recorded ones (1, Hkv, T, D).

        Args:
            module: the attention layer; it may attend several times in one call.
            key: of the rows that this pass runs.
            value: of the same rows, (1, Hkv, n, DV).
        """
        turn = self._turn(module)
        joined = []
        for kind, x in (("key", key), ("value", value)):
            name = (module, turn, kind)
            x = self._deposit(name, x, dim=2)
            if not self.stands_in and any(block is not None for block, *_ in self.parts_of):
                x = Join.apply(x, 2, self.parts(name))
            joined.append(x)
        return joined[0], joined[1]

    def end(self) -> None:
        """Says that the run is over: layers that attend from now on are recomputed."""
        self._ended = True

    @property
    def loops(self) -> bool:
        """Whether layers ran several times, rather than attend several times in one call.

        Differential attention attends twice in every layer before the next one does.
        """
        counts = Counter(self._attended)
        several = max(counts.values(), default=1) > 1
        runs = sum(a is not b for a, b in pairwise(self._attended)) + 1
        return several and (len(counts) == 1 or len(set(counts.values())) > 1 or runs > len(counts))

    def _turn(self, module: torch.nn.Module) -> int:
        """How often a layer attended before in the same call."""
        turn = self._turns.get(module, 0)
        self._turns[module] = turn + 1
        if self._ended:
            return turn % max(1, self._attended.count(module))
        self._attended.append(module)
        return turn

    def _deposit(self, name: Any, x: Tensor, dim: int) -> Tensor:
        """What a block records; other passes record nothing."""
        return x


class Block(Pass):
    """The pass of prefixes that micro-batches `first` to `last` share.

    Attributes:
        first: the micro-batch before which it runs.
        last: the micro-batch in whose backward its own backward runs.
        num_prefixes: segments.
        above: blocks whose rows it reads.
        recorded: tensors by name.
        outputs: its outputs with their graph, until its last micro-batch takes them.
    """

    def __init__(self, plan: Plan, segments: list[int], first: int, last: int) -> None:
        self.first, self.last, self.num_prefixes = first, last, len(segments)
        path = plan.with_ancestors(segments)
        super().__init__(plan, path, segments)
        ours = set(segments)
        self.above = list(dict.fromkeys(plan.block_of[s] for s in path if s not in ours))
        self.recorded: dict[Any, Recorded] = {}
        self.outputs: dict[Any, Tensor] | None = None
        self.offload = plan.offload

    def _deposit(self, name: Any, x: Tensor, dim: int) -> Tensor:
        if not self._ended:
            self.recorded[name] = Recorded(x, dim, self.offload)
        return Deposit.apply(x, self.recorded[name]) if torch.is_grad_enabled() else x

    def keep_outputs(self, outputs: dict[Any, Tensor]) -> None:
        """Records outputs of the run, (n, ...) each, and keeps them with their graph."""
        self.outputs = {name: self._deposit(name, x, dim=0) for name, x in outputs.items()}
        self.end()

    @property
    def is_open(self) -> bool:
        """Whether it ran, and its own backward did not."""
        return bool(self.recorded) and not any(one.closed for one in self.recorded.values())

    @property
    def is_late(self) -> bool:
        """Whether gradients came after its own backward."""
        return any(one.closed and one.total is not None for one in self.recorded.values())

    def release(self) -> None:
        """Gives up everything that was recorded."""
        self.recorded, self.outputs = {}, None


@dataclass(frozen=True, eq=False, repr=False)
class PassLayout(PrefixLayout):
    """A layout that takes its pass to the attention layers, recomputation included."""

    run: Pass

    @classmethod
    def of(cls, run: Pass, layout: PrefixLayout) -> PassLayout:
        """The same layout, with its pass."""
        values = {field.name: getattr(layout, field.name) for field in fields(layout)}
        return cls(**values, run=run)


# ---- the plan ---------------------------------------------------------------------------------


class Plan:
    """Which prefixes are recorded, and what every micro-batch runs.

    Args:
        forest: the prefix tree of the sequences of all micro-batches.
        batch_of: (N,) the micro-batch of each sequence.
        num_batches: M.
        min_tokens: blocks with fewer tokens are not worth a pass, unless others hang on them.
        offload: whether what is recorded lies in host memory.
        agree: takes the (first, last) of this rank's blocks to those of all ranks; None where
            ranks run their passes apart.
        in_company: whether a pass without rows runs one token, for parameters that ranks share.

    Attributes:
        blocks: in the order in which they run.
        passes: one for each micro-batch.
        block_of: the block of each recorded segment.
    """

    def __init__(
        self,
        forest: Forest,
        batch_of: np.ndarray,
        num_batches: int,
        *,
        min_tokens: int,
        offload: bool = False,
        agree: Callable[[Pairs], Pairs] | None = None,
        in_company: bool = False,
    ) -> None:
        self.forest, self.offload, self.in_company = forest, offload, in_company
        groups = self._groups(batch_of, num_batches, min_tokens)
        pairs = set(groups) if agree is None else agree(set(groups))
        self.block_of: dict[int, Block] = {}
        self.blocks: list[Block] = []
        for first, last in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):  # parents first
            segments = groups.get((first, last), [])
            block = Block(self, segments, first, last)
            self.blocks.append(block)
            self.block_of.update(dict.fromkeys(segments, block))
        self.passes = []
        for batch in range(num_batches):
            segments = self.with_ancestors(forest.leaves[batch_of == batch].tolist())
            own = [s for s in segments if s not in self.block_of]
            self.passes.append(Pass(self, segments, own))

    def _groups(
        self, batch_of: np.ndarray, num_batches: int, min_tokens: int
    ) -> dict[tuple[int, int], list[int]]:
        """The segments to record, by their first and last micro-batch."""
        parents, lengths = self.forest.parents, self.forest.lengths
        first = np.full(self.forest.num_segments, num_batches)
        last = np.full(self.forest.num_segments, -1)
        np.minimum.at(first, self.forest.leaves, batch_of)
        np.maximum.at(last, self.forest.leaves, batch_of)
        for segment in range(self.forest.num_segments - 1, -1, -1):
            parent = parents[segment]
            if parent >= 0:
                first[parent] = min(first[parent], first[segment])
                last[parent] = max(last[parent], last[segment])
        groups: dict[tuple[int, int], list[int]] = {}
        for segment in np.flatnonzero(first < last).tolist():
            groups.setdefault((int(first[segment]), int(last[segment])), []).append(segment)
        # What hangs on a segment is shared by no more micro-batches than that: shortest first.
        needed: set[int] = set()
        kept = {}
        for pair in sorted(groups, key=lambda pair: pair[1] - pair[0]):
            segments = groups[pair]
            if needed.isdisjoint(segments) and lengths[segments].sum() < min_tokens:
                continue
            kept[pair] = segments
            needed.update(self.with_ancestors(segments))
        return kept

    def with_ancestors(self, segments: Sequence[int]) -> list[int]:
        """Some segments and all above them, in depth-first order."""
        seen: set[int] = set()
        for segment in segments:
            while segment >= 0 and segment not in seen:
                seen.add(segment)
                segment = int(self.forest.parents[segment])
        return sorted(seen)

    @property
    def num_prefixes(self) -> int:
        """Segments that are recorded."""
        return sum(block.num_prefixes for block in self.blocks)

    @property
    def tokens_run(self) -> int:
        """Tokens of all passes."""
        return sum(run.num_tokens for run in (*self.blocks, *self.passes))

    @property
    def tokens_held(self) -> int:
        """The most tokens whose activations are held at once."""
        held = [run.num_tokens for run in self.passes]
        for block in self.blocks:
            for batch in range(block.first, block.last + 1):
                held[batch] += block.num_tokens
        return max(held, default=0)

    @property
    def tokens_apart(self) -> int:
        """The same where every micro-batch runs its prefixes itself: those of the largest."""
        return max((len(run.all_rows) for run in self.passes), default=0)


def _rows_of(forest: Forest, segments: Sequence[int]) -> np.ndarray:
    starts, lengths = forest.starts[list(segments)], forest.lengths[list(segments)]
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _shown(name: Any) -> str:
    owner = name[0]
    return type(owner).__name__ if isinstance(owner, torch.nn.Module) else f"the output {owner!r}"
