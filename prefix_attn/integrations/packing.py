"""Finds what the rows of an ordinary batch share, and moves tensors to the packed row and back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefix_attn.layout import PrefixLayout
from prefix_attn.recurrence import HandBack
from prefix_attn.shards import RowShard

LARGEST_KEY = 2**62
SINGLE = "a single sequence"
WARN_AFTER = 20  # calls of which none was packed
HASHED_ELEMENTS = 2**24  # at a time, for the memory that their 64-bit products need


class PassThroughError(Exception):
    """A batch is not packed; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Packing:
    """One packed row for a batch of B x L places.

    Attributes:
        layout: of T tokens, on the device of the batch.
        source_index: (T,) int64, flat place from which each packed row is taken.
        row_index: (B, L) int64, packed row of each place, -1 at padding.
        tokens_in: places that are not padding.
        with_blocks: the same rows in a layout whose blocks see all of themselves, if there are any.
    """

    layout: PrefixLayout
    source_index: Tensor
    row_index: Tensor
    tokens_in: int
    with_blocks: PrefixLayout | None = None

    @property
    def num_rows(self) -> int:
        """Rows that run."""
        return self.source_index.shape[0]

    def carrying(self, layout: PrefixLayout) -> PrefixLayout | RowShard:
        """What takes a layout of the packed row to the attention of the rows that run."""
        return layout

    def pack(self, x: Tensor) -> Tensor:
        """(..., B, L) -> (..., 1, T)."""
        return x.flatten(-2)[..., None, self.source_index]

    def pack_features(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...), differentiable."""
        return x.flatten(0, 1)[self.source_index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zero at padding; a gradient is the sum over its places."""
        return HandBack.apply(x, self.row_index)


@dataclass
class PackingStats:
    """What `enable` did so far.

    Attributes:
        calls: of the decoder.
        packed_calls: calls that ran as one packed row.
        tokens_in: tokens of the packed calls' batches, padding left out.
        tokens_run: rows that ran instead.
        passed_through: how many calls were not packed, by reason.
        pictures_in: pictures and videos that the tower was called with.
        pictures_run: those that it ran.
        pictures_repeated: how many of its calls ran every copy of a picture, by reason.
        mixers: how each recurrent, linear-attention or convolutional mixer runs on a packed row, by
            its name in the decoder.
    """

    calls: int = 0
    packed_calls: int = 0
    tokens_in: int = 0
    tokens_run: int = 0
    passed_through: Counter[str] = field(default_factory=Counter)
    pictures_in: int = 0
    pictures_run: int = 0
    pictures_repeated: Counter[str] = field(default_factory=Counter)
    mixers: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Tokens in over tokens run, 1 before the first packed call."""
        return self.tokens_in / self.tokens_run if self.tokens_run else 1.0

    def pass_through(self, reason: str, model: object, generation: str) -> None:
        """Counts a call that is not packed; warns once if none was of many that could have been.

        Args:
            reason: why it is not packed.
            model: whose call it is.
            generation: the reason of calls from which nobody expects it.
        """
        self.passed_through[reason] += 1
        tried = self.calls - self.passed_through[generation]
        if reason == generation or self.packed_calls or tried != WARN_AFTER:
            return
        others = (x for x in self.passed_through.most_common() if x[0] != generation)
        reasons = ", ".join(f"{other} ({n} calls)" for other, n in others)
        warnings.warn(
            f"prefix_attn is enabled on {type(model).__name__} but none of {tried} calls was "
            f"packed: {reasons}",
            stacklevel=3,
        )


class Split(Enum):
    """Where a row without an attention mask holds several sequences, by its first kind of position.

    NEVER: it is one sequence.
    JUMPS: a sequence starts wherever positions do not count on by one, as in transformers' masks.
    RESTARTS: in a batch of one row a sequence starts at every place with the smallest position, as
        in flash attention.
    """

    NEVER = auto()
    JUMPS = auto()
    RESTARTS = auto()


def pack_batch(
    content: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    min_ratio: float,
    always: bool = False,
    split: Split = Split.JUMPS,
    same_range: bool = False,
    further: Sequence[Tensor] = (),
    blocks: Tensor | None = None,
    longest_block: int | None = None,
) -> Packing:
    """Packs a batch if enough of it is shared.

    Two places share a row if everything up to them is the same: content and positions, and their
    whole block if they lie in one.

    Args:
        content: (B, L) integers that are equal where tokens are.
        attention_mask: (B, L), non-zero at tokens, or None.
        position_ids: (K, B, L), K kinds of positions, or None for the numbers of the columns.
        min_ratio: least tokens in over tokens run.
        always: pack whatever the ratio is, and a single sequence too.
        split: what starts a new sequence within a row, if there is no attention mask.
        same_range: pack only if padding has no larger position than tokens have.
        further: (B, L) integers each, which are to be equal as well.
        blocks: (B, L) integers, equal where places see each other whatever their order, -1 at all
            others; or None.
        longest_block: places that a block may have, if a window ends what they see.

    Raises:
        PassThroughError: with the reason why the batch is not packed.
    """
    parts = [content.long()]
    parts += [] if attention_mask is None else [(attention_mask != 0).long()]
    parts += [] if position_ids is None else list(position_ids.long())
    parts += [x.long() for x in further]
    parts += [] if blocks is None else [blocks.long()]
    check_can_be_read()
    host = torch.stack(parts).cpu().numpy()  # the one copy to the host
    block_ids = None if blocks is None else host[-1].ravel()
    first_further = len(parts) - len(further) - (blocks is not None)
    also = host[first_further : first_further + len(further)]
    ids, rest = host[0], host[1:first_further]
    if attention_mask is None:
        valid = np.ones(ids.shape, dtype=bool)
    else:
        valid, rest = rest[0] > 0, rest[1:]
    columns = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    positions = columns[None] if position_ids is None else rest

    begins, ends = valid.copy(), valid.copy()
    begins[:, 1:] &= ~valid[:, :-1]
    ends[:, :-1] &= ~valid[:, 1:]
    if (begins.sum(1) > 1).any():
        raise PassThroughError("attention_mask has holes")
    if attention_mask is None:
        cuts = _cuts(positions[0], split)
        begins[:, 1:] |= cuts
        ends[:, :-1] |= cuts
    starts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    if len(starts) < (1 if always else 2):
        raise PassThroughError(SINGLE)
    if (ids[valid] < 0).any():
        raise PassThroughError("negative token ids")
    if same_range and positions.max() > positions[:, valid].max():
        raise PassThroughError("positions of padding change the rotary frequencies")

    contents = joint_ids([ids, *positions, *also]).ravel()
    if block_ids is not None:
        contents, block_starts = _whole_blocks(contents, block_ids, starts, stops, longest_block)
    sequences = [torch.from_numpy(contents[a:b]) for a, b in zip(starts, stops, strict=True)]
    layout, _ = PrefixLayout.from_sequences(sequences, device="cpu")
    tokens_in = int(valid.sum())
    # Rows that hold several sequences need a T x T mask without a layout: they always have one.
    several = len(starts) > valid.any(1).sum()
    if not (always or several) and tokens_in < min_ratio * layout.num_tokens:
        raise PassThroughError(f"tokens in / tokens run below min_ratio {min_ratio:g}")

    source_index = np.empty(layout.num_tokens, dtype=np.int64)
    row_index = np.full(ids.size, -1, dtype=np.int64)
    for i in reversed(range(len(starts))):  # the first of those that share a row is its source
        rows = layout.forest.sequence_rows[i]
        places = np.arange(starts[i], stops[i])
        row_index[places] = rows
        source_index[rows] = places
    device, with_blocks = content.device, None
    if block_ids is not None:
        inside = block_ids[source_index] >= 0
        with_blocks = _cut_at_blocks(layout, inside, block_starts[source_index]).to(device)
    return Packing(
        layout=layout.to(device),
        source_index=torch.from_numpy(source_index).to(device),
        row_index=torch.from_numpy(row_index).to(device).view(content.shape),
        tokens_in=tokens_in,
        with_blocks=with_blocks,
    )


def check_can_be_read() -> None:
    """Passes a batch through whose numbers can't be read, or would become those of a trace.

    Raises:
        PassThroughError: under torch.jit.trace and the transforms of torch.func.
    """
    if torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None:
        raise PassThroughError("torch.jit.trace or torch.func, under which no batch can be read")


def _whole_blocks(
    contents: np.ndarray,
    blocks: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    longest: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the contents of blocks equal where whole blocks are, and nowhere else.

    Args:
        contents: (N,) integers of places.
        blocks: (N,) the block of each, -1 outside.
        starts: the first place of each sequence.
        stops: the place behind its last one.
        longest: places that a block may have, or None.

    Returns:
        The contents, and (N,) bool, the places at which a block starts.
    """
    numbers, begins = np.zeros_like(contents), np.zeros(len(contents), dtype=bool)
    known: dict[bytes, int] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        mine = blocks[start:stop]
        edges = [0, *(np.flatnonzero(np.diff(mine)) + 1).tolist(), stop - start]
        seen: set[int] = set()
        for a, b in pairwise(edges):
            block = int(mine[a])
            if block < 0:
                continue
            if block in seen:
                raise PassThroughError("a block that sees all of itself lies in several pieces")
            if longest is not None and b - a > longest:
                raise PassThroughError(
                    f"a sliding window of {longest} is shorter than a picture of {b - a} tokens, "
                    "which see each other beyond it"
                )
            seen.add(block)
            at = slice(start + a, start + b)
            numbers[at] = 1 + known.setdefault(contents[at].tobytes(), len(known))
            begins[at.start] = True
    return joint_ids([contents, numbers]), begins


def _cut_at_blocks(
    layout: PrefixLayout, inside: np.ndarray, block_starts: np.ndarray
) -> PrefixLayout:
    """The same rows, with a segment of its own for each block.

    Args:
        layout: whose segments hold whole blocks.
        inside: (T,) bool, rows of blocks.
        block_starts: (T,) bool, their first rows.
    """
    edges = block_starts | (np.diff(inside, prepend=False) & ~inside)
    forest = layout.forest.cut(np.flatnonzero(edges))
    filled = forest.lengths > 0
    whole = np.zeros(forest.num_segments, dtype=bool)
    whole[filled] = inside[forest.starts[filled]]
    return PrefixLayout.from_tree(
        forest.lengths.tolist(), forest.parents.tolist(), bidirectional=whole.tolist()
    )


def _cuts(positions: np.ndarray, split: Split) -> np.ndarray:
    """(B, L) positions -> (B, L - 1), True where a sequence ends and another one starts."""
    if split is Split.JUMPS:
        return np.diff(positions, axis=1) != 1
    if split is Split.RESTARTS and len(positions) == 1:
        return positions[:, 1:] == positions.min()
    return np.zeros((len(positions), positions.shape[1] - 1), dtype=bool)


def joint_ids(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Integers that are equal where all parts are: non-negative, of the shape of each part."""
    key, size = np.zeros(parts[0].shape, dtype=np.int64), 1
    for part in parts:
        low, high = int(part.min()), int(part.max())
        if size * (high - low + 1) > LARGEST_KEY:
            key, part = _ranks(key), _ranks(part)
            size, low, high = int(key.max()) + 1, 0, int(part.max())
        span = high - low + 1
        key, size = key * span + (part - low), size * span
    return key


def _ranks(x: np.ndarray) -> np.ndarray:
    return np.unique(x, return_inverse=True)[1].reshape(x.shape)


def holds_tokens(value: Any) -> bool:
    """Whether an argument may hold something for each token."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(holds_tokens(v) for v in value)


def content_of(embeddings: Tensor) -> Tensor:
    """(B, L, H) -> (B, L) int64, equal where embeddings are, bit for bit.

    Different embeddings can meet in one number, with a chance of about 2**-63: see
    `check_content`.
    """
    return checksums(bits_of(embeddings).flatten(0, 1)).view(embeddings.shape[:2])


def checksums(bits: Tensor) -> Tensor:
    """(N, K) integers -> (N,) int64, not negative and equal where rows are."""
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator, device="cpu")
    factors = (factors * 2 + 1).to(bits.device)
    at_once = max(1, HASHED_ELEMENTS // max(1, bits.shape[1]))
    sums = [(chunk.long() * factors).sum(1) for chunk in bits.split(at_once)]
    return torch.cat(sums) & (2**62 - 1)


def gradient_is_wanted(embeddings: Tensor, shape: torch.Size) -> bool:
    """Whether the gradients of single places may be read, not only their sum in parameters.

    The packed row is taken from the first of the places that share it, and so is its gradient: that
    is right for what all of them were computed from in the same way.

    Args:
        embeddings: that hold something for each place.
        shape: (B, L), with which a parameter would hold something for each place, too.
    """
    if not embeddings.requires_grad:
        return False
    if embeddings.is_leaf or embeddings.retains_grad or _is_watched(embeddings):
        return True
    seen: set[Any] = set()
    nodes = [embeddings.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [above for above, _ in node.next_functions]
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable  # type: ignore[attr-defined]
            is_parameter = isinstance(leaf, torch.nn.Parameter)
            if not is_parameter or leaf.shape[:2] == shape:
                return True
    return False


def _is_watched(x: Tensor) -> bool:
    """Whether x has hooks other than those with which FSDP gathers parameters."""
    hooks = (getattr(hook, "func", hook) for hook in (x._backward_hooks or {}).values())
    origins = (getattr(hook, "__module__", None) or "" for hook in hooks)
    return not all(origin.startswith("torch.distributed") for origin in origins)


def check_content(embeddings: Tensor, packing: Packing, name: str = "inputs_embeds") -> None:
    """Compares the embeddings of every place with those of its packed row, bit for bit.

    Args:
        embeddings: (B, L, H).
        packing: of the batch.
        name: what they are to the caller.

    Raises:
        PassThroughError: if two different embeddings were taken for one.
    """
    bits = bits_of(embeddings)
    packed = packing.pack_features(bits)[0]
    same = packed[packing.row_index.clamp(min=0)] == bits
    if not bool((same | (packing.row_index < 0)[..., None]).all()):
        raise PassThroughError(f"{name} differ where their checksums agree")


def bits_of(x: Tensor) -> Tensor:
    """(..., H) -> (..., H or 2 H) integers of at most 32 bits: sums of 64 then keep them all."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[x.element_size()]
    return x.detach().contiguous().view(kind)
