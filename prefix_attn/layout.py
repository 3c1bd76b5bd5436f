"""Where the segments of a prefix forest lie on the packed axis, and who attends to whom.

Segments are packed end to end in depth-first order, so the subtree of a segment is one contiguous
range of rows, and one integer per key is the whole attention rule:

    row r attends key c   iff   c <= r < subtree_end[c]
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DRAWN_TOKENS = 64
# A tensor that is made in inference mode can't be saved for a backward pass, ever; a layout that
# served the old log-probabilities serves the update too, and so do the indices that it hands out.
outside_inference_mode = torch.inference_mode(mode=False)


@dataclass(frozen=True, eq=False, repr=False)
class PrefixLayout:
    """A prefix forest on the packed axis: plain tensors, built once per micro-batch.

    Build one with `from_lengths`, `from_tree`, `from_sequences` or `from_padded`; every layer, the
    backward pass and recomputation share it.

    For one prefix of three tokens and suffixes of two and one, `print(layout)` draws

        # . . . . .
        # # . . . .
        # # # . . .
        # # # # . .
        # # # # # .
        # # # . . #

    Attributes:
        segments: (3, S) int32 on the CPU, the lengths, the parents, and 1 where the rows of a
            segment are queries: the whole layout.
        cu_seqlens: (S + 1,) int32, first row of each segment, and T.
        parents: (S,) int32, the segment that each one continues, -1 for roots.
        position_ids: (T,) int64, depth of each token along its path.
        subtree_end: (T,) int32, end of the subtree of each row's segment.
        query_rows: (Tq,) int64, packed rows that are queries, ascending: all but for `queries_for`.
        sequence_leaves: (N,) int32 on the CPU, the leaf segment of each sequence, in the order in
            which the caller named the sequences.
        num_groups: number of roots.
        max_length: tokens of the longest sequence.
    """

    segments: Tensor
    cu_seqlens: Tensor
    parents: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    query_rows: Tensor
    sequence_leaves: Tensor
    num_groups: int
    max_length: int

    # ---- construction ---------------------------------------------------------------------------

    @classmethod
    def from_lengths(
        cls,
        prefix_lens: Sequence[int] | Tensor,
        suffix_lens: Sequence[Sequence[int] | Tensor],
        device: torch.device | str | None = None,
    ) -> PrefixLayout:
        """Builds groups of depth one: a prefix and the suffixes that continue it.

        Args:
            prefix_lens: one length per group; 0 makes a group of independent sequences.
            suffix_lens: for each group the lengths of its suffixes; 0 is allowed.
            device: where the tensors live; the CPU by default.

        Raises:
            ValueError: if a length is negative or not an integer, or the two lists differ in
                length.

        Example:
            >>> layout = PrefixLayout.from_lengths([3, 2], [[2, 1], [4]])
            >>> layout.num_tokens, layout.num_groups, layout.num_sequences
            (12, 2, 3)
        """
        prefixes = _int_array("prefix_lens", prefix_lens)
        if isinstance(suffix_lens, (str, bytes)) or not isinstance(
            suffix_lens, (Sequence, np.ndarray)
        ):
            raise ValueError(
                "suffix_lens must be a sequence of sequences of lengths, one per group, got "
                f"{type(suffix_lens).__name__}"
            )
        if len(prefixes) != len(suffix_lens):
            raise ValueError(
                "prefix_lens and suffix_lens must have one entry per group, got "
                f"{len(prefixes)} prefixes and {len(suffix_lens)} groups of suffixes"
            )
        members = [_int_array(f"suffix_lens[{g}]", s) for g, s in enumerate(suffix_lens)]
        sizes = np.array([1 + len(m) for m in members], dtype=np.int64)
        roots = np.cumsum(sizes) - sizes
        parents = np.repeat(roots, sizes)
        parents[roots] = -1
        lengths = np.empty(int(sizes.sum()), dtype=np.int64)
        lengths[parents >= 0] = np.concatenate([*members, np.empty(0, dtype=np.int64)])
        lengths[roots] = prefixes
        return cls._from_arrays(lengths, parents, device)

    @classmethod
    def from_tree(
        cls,
        lengths: Sequence[int] | Tensor,
        parents: Sequence[int] | Tensor,
        device: torch.device | str | None = None,
    ) -> PrefixLayout:
        """Builds any prefix forest, given in depth-first order.

        Args:
            lengths: tokens in each segment.
            parents: `parents[i] < i` is the segment that segment i continues, -1 for a root.
            device: where the tensors live; the CPU by default.

        Raises:
            ValueError: naming the entry that is negative, out of range, cyclic or out of
                depth-first order.

        Example:
            >>> layout = PrefixLayout.from_tree([4, 2, 1, 3], [-1, 0, 1, 0])
            >>> layout.position_ids.tolist()
            [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
        """
        length_array = _int_array("lengths", lengths)
        parent_array = _int_array("parents", parents, least=-1)
        if len(length_array) != len(parent_array):
            raise ValueError(
                "lengths and parents must have one entry per segment, got "
                f"{len(length_array)} lengths and {len(parent_array)} parents"
            )
        _check_depth_first(parent_array)
        return cls._from_arrays(length_array, parent_array, device)

    @classmethod
    @outside_inference_mode
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | Tensor],
        device: torch.device | str | None = None,
    ) -> tuple[PrefixLayout, Tensor]:
        """Finds every shared prefix among token id lists, at any depth, by a radix tree.

        Args:
            sequences: N lists of token ids (ids are not negative).
            device: where the tensors live; the CPU by default.

        Returns:
            `(layout, packed_ids)`, packed_ids (T,) int64. Sequence i of the layout
            (`sequence_rows(i)`, `unpack`) is `sequences[i]`, whatever order the tree has.

        Example:
            >>> layout, ids = PrefixLayout.from_sequences([[5, 6, 7], [1], [5, 6, 8, 9]])
            >>> ids.tolist(), ids[layout.sequence_rows(2)].tolist()
            ([5, 6, 7, 8, 9, 1], [5, 6, 8, 9])
        """
        if isinstance(sequences, (str, bytes)) or not isinstance(sequences, Iterable):
            raise ValueError(f"sequences must be lists of token ids, got {_shown(sequences)}")
        arrays = [_int_array(f"sequences[{i}]", s) for i, s in enumerate(sequences)]
        layout = cls._from_radix(arrays, device)
        packed = np.empty(layout.num_tokens, dtype=np.int64)
        for rows, ids in zip(layout._path_rows, arrays, strict=True):
            packed[rows] = ids
        return layout, torch.from_numpy(packed).to(layout.device)

    @classmethod
    @outside_inference_mode
    def from_padded(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        device: torch.device | str | None = None,
    ) -> tuple[PrefixLayout, Tensor, Tensor]:
        """Finds every shared prefix in an ordinary padded batch, left or right padded.

        Args:
            input_ids: (B, L) integer token ids.
            attention_mask: (B, L), non-zero at tokens.
            device: where the tensors live; that of `input_ids` by default.

        Returns:
            `(layout, source_index, row_index)`: source_index (T,) int64 is the flat batch slot
            of each packed row, row_index (B, L) int64 the packed row of each slot, -1 at padding.

        Example:
            >>> ids = torch.tensor([[7, 8, 9], [0, 7, 8]])
            >>> layout, source, rows = PrefixLayout.from_padded(ids, torch.tensor([[1, 1, 1],
            ...                                                                   [0, 1, 1]]))
            >>> source.tolist(), rows.tolist()
            ([0, 1, 2], [[0, 1, 2], [-1, 0, 1]])
        """
        for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if input_ids.device != attention_mask.device:
            raise ValueError(
                f"input_ids and attention_mask must be on one device, got {input_ids.device} and "
                f"{attention_mask.device}"
            )
        if input_ids.dim() != 2 or input_ids.dtype not in INTEGERS:
            raise ValueError(
                "input_ids must be an integer tensor of shape (B, L), got "
                f"{input_ids.dtype} {tuple(input_ids.shape)}"
            )
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        device = input_ids.device if device is None else device
        ids, mask = torch.stack([input_ids.long(), (attention_mask != 0).long()]).cpu().numpy()
        slots = [np.flatnonzero(row) for row in mask]
        arrays = [_int_array(f"input_ids[{i}]", ids[i, s]) for i, s in enumerate(slots)]
        layout = cls._from_radix(arrays, device)
        source_index = np.empty(layout.num_tokens, dtype=np.int64)
        row_index = np.full(ids.shape, -1, dtype=np.int64)
        # The first of the sequences that share a row is its source: fill it last.
        for i in reversed(range(len(arrays))):
            rows = layout._path_rows[i]
            row_index[i, slots[i]] = rows
            source_index[rows] = i * ids.shape[1] + slots[i]
        to = layout.device
        return layout, torch.from_numpy(source_index).to(to), torch.from_numpy(row_index).to(to)

    @classmethod
    def _from_radix(
        cls, arrays: list[np.ndarray], device: torch.device | str | None
    ) -> PrefixLayout:
        lengths, parents, leaves = _radix_tree(arrays)
        return cls._from_arrays(lengths, parents, device, leaves)

    @classmethod
    @outside_inference_mode
    def _from_arrays(
        cls,
        lengths: np.ndarray,
        parents: np.ndarray,
        device: torch.device | str | None,
        leaves: np.ndarray | None = None,
    ) -> PrefixLayout:
        total = sum(lengths.tolist())  # Python's integers do not overflow
        if total > INT32_MAX:
            raise ValueError(f"a layout holds at most {INT32_MAX} tokens, got {total}")
        ends = np.cumsum(lengths)
        starts = ends - lengths
        subtree_ends = subtree_ends_of(parents, ends)
        depths = depths_of(parents, lengths)
        within = np.arange(total) - np.repeat(starts, lengths)
        if leaves is None:
            leaves = np.setdiff1d(np.arange(len(parents)), parents)
        tensors = [
            np.concatenate([[0], ends]).astype(np.int32),
            parents.astype(np.int32),
            np.repeat(depths, lengths) + within,
            np.repeat(subtree_ends, lengths).astype(np.int32),
        ]
        device = torch.device("cpu") if device is None else _device(device)
        cu_seqlens, parents_t, position_ids, subtree_end = (
            torch.from_numpy(t).to(device) for t in tensors
        )
        return cls(
            segments=torch.from_numpy(
                np.stack([lengths, parents, np.ones_like(lengths)]).astype(np.int32)
            ),
            cu_seqlens=cu_seqlens,
            parents=parents_t,
            position_ids=position_ids,
            subtree_end=subtree_end,
            query_rows=torch.arange(total, device=device),
            sequence_leaves=torch.from_numpy(leaves.astype(np.int32)),
            num_groups=int((parents < 0).sum()),
            max_length=int((depths + lengths).max(initial=0)),
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PrefixLayout:
        """Returns the same layout with its tensors on `device`.

        Args:
            device: where the tensors are to live.
            non_blocking: copy without waiting, which works for layouts in pinned memory.

        Raises:
            ValueError: if `device` is none.
        """
        target = _device(device)
        return self._with_tensors(lambda x: x.to(target, non_blocking=non_blocking))

    def pin_memory(self) -> PrefixLayout:
        """Returns the same layout in pinned memory, from which `to` copies without waiting.

        A `DataLoader` with `pin_memory=True` calls it for layouts in its batches.

        Raises:
            ValueError: if the layout is not on the CPU.
            RuntimeError: from PyTorch, where there is no accelerator to pin memory for.
        """
        if self.device.type != "cpu":
            raise ValueError(f"only layouts on the CPU can be pinned, this one is on {self.device}")
        return self._with_tensors(Tensor.pin_memory)

    @outside_inference_mode
    def _with_tensors(self, function: Callable[[Tensor], Tensor]) -> PrefixLayout:
        """The same layout with other copies of the tensors that live on its device."""
        names = ("cu_seqlens", "parents", "position_ids", "subtree_end", "query_rows")
        moved: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **moved)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: the fields, not what is derived from them on first use."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @outside_inference_mode
    def queries_for(self, segments: Sequence[int] | Tensor) -> PrefixLayout:
        """Returns the layout with queries for some segments only; keys and values stay for all.

        For cached prefixes, and for groups whose members are run in several micro-batches: q and
        the output then have `num_queries` rows, those of `query_rows`.

        Args:
            segments: indices of segments, in any order.

        Raises:
            ValueError: if an index is not that of a segment.

        Example:
            >>> layout = PrefixLayout.from_lengths([3], [[2, 1]]).queries_for([1, 2])
            >>> layout.num_tokens, layout.query_rows.tolist()
            (6, [3, 4, 5])
        """
        chosen = _int_array("segments", segments)
        beyond = chosen[chosen >= self.num_segments]
        if beyond.size:
            raise ValueError(
                f"segments must be less than {self.num_segments}, the number of segments, got "
                f"{beyond[0]}"
            )
        table = self.segments.clone()
        table[2] = 0
        table[2, torch.from_numpy(chosen)] = 1
        is_query = torch.repeat_interleave(table[2], table[0]).nonzero()[:, 0]
        return replace(self, segments=table, query_rows=is_query.to(self.device))

    # ---- counts ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.subtree_end.device

    @property
    def num_tokens(self) -> int:
        """T, rows on the packed axis."""
        return self.subtree_end.shape[0]

    @property
    def num_queries(self) -> int:
        """Tq, rows of q and of the output: T, but for layouts made by `queries_for`."""
        return self.query_rows.shape[0]

    @property
    def num_segments(self) -> int:
        """S, empty segments included."""
        return self.parents.shape[0]

    @property
    def num_sequences(self) -> int:
        """N, paths from a root to a leaf."""
        return self.sequence_leaves.shape[0]

    @cached_property
    def repeated_tokens(self) -> int:
        """Tokens that the same sequences have when every one is run whole."""
        return int(self._sequence_lengths.sum())

    @cached_property
    def flop_ratio(self) -> float:
        """Attention FLOPs without sharing over those with it: the ideal speed-up.

        Counts the allowed (query, key) pairs of each sequence run whole, over those of the layout.
        """
        lengths, parents, has_queries = self.segments.numpy().astype(np.int64)
        copies = np.bincount(self.sequence_leaves.numpy(), minlength=len(lengths)).tolist()
        for i, parent in reversed(list(enumerate(parents.tolist()))):
            if parent >= 0:
                copies[parent] += copies[i]
        before = depths_of(parents, lengths)
        pairs = has_queries * (lengths * before + lengths * (lengths + 1) // 2)
        return float((pairs * copies).sum() / pairs.sum()) if pairs.any() else 1.0

    # ---- moving data ----------------------------------------------------------------------------

    @outside_inference_mode
    def sequence_rows(self, i: int) -> Tensor:
        """Packed rows of sequence i from root to leaf: (L_i,) int64."""
        if not _is_integer(i) or not 0 <= i < self.num_sequences:
            raise ValueError(f"sequence {i!r} does not exist, there are {self.num_sequences}")
        return torch.from_numpy(self._path_rows[i]).to(self.device)

    def pack(self, sequences: Sequence[Tensor]) -> Tensor:
        """Packs one tensor per sequence, shared tokens once: the inverse of `unpack`.

        Args:
            sequences: for each sequence a tensor (L_i, ...), such as embeddings or labels.

        Returns:
            (T, ...). A shared row is taken from the first sequence that holds it.

        Raises:
            ValueError: if the number of sequences or the length of one is wrong, or they differ in
                device or further dimensions.
        """
        if not isinstance(sequences, (Sequence, Tensor)) or isinstance(sequences, (str, bytes)):
            raise ValueError(
                f"sequences must be a list of tensors, one per sequence, got {_shown(sequences)}"
            )
        if len(sequences) != self.num_sequences:
            raise ValueError(f"expected {self.num_sequences} sequences, got {len(sequences)}")
        for i, (x, rows) in enumerate(zip(sequences, self._path_rows, strict=True)):
            if not isinstance(x, Tensor):
                raise ValueError(f"sequence {i} must be a tensor, got {type(x).__name__}")
            if x.dim() == 0 or x.shape[0] != len(rows):
                raise ValueError(f"sequence {i} must have {len(rows)} tokens, got {tuple(x.shape)}")
            like = sequences[0]
            if x.shape[1:] != like.shape[1:] or x.device != like.device:
                raise ValueError(
                    "sequences must agree in their device and in their dimensions but the first, "
                    f"got {tuple(like.shape)} on {like.device} and, in sequence {i}, "
                    f"{tuple(x.shape)} on {x.device}"
                )
        if not len(sequences):
            raise ValueError("an empty layout has nothing to pack")
        return torch.cat(list(sequences))[self._first_slots]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Splits a packed (T, ...) tensor into one (L_i, ...) tensor per sequence.

        Differentiable: the gradient of a shared row is summed over the sequences that hold it.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[0] != self.num_tokens:
            raise ValueError(f"x must have shape ({self.num_tokens}, ...), got {tuple(x.shape)}")
        lengths = [len(rows) for rows in self._path_rows]
        return list(x[self._all_rows].split(lengths)) if lengths else []

    @cached_property
    def target_index(self) -> Tensor:
        """Rows of all tokens that have a predecessor on their path: (M,) int64, ascending.

        Rows of the packed axis, T of them, after `queries_for` as well.
        """
        return self._label_rows[1]

    @cached_property
    def predictor_index(self) -> Tensor:
        """For each row of `target_index` the row whose logits predict it: (M,) int64.

        The last row of a prefix appears once per child: the label at the fork is right for every
        member.
        """
        return self._label_rows[0]

    # ---- the attention rule ---------------------------------------------------------------------

    @outside_inference_mode
    def materialize(self, *, window_size: int | None = None, prefix_causal: bool = True) -> Tensor:
        """The dense (Tq, T) bool mask, True where query attends key: slow, for tests."""
        keep = self.mask_mod(window_size=window_size, prefix_causal=prefix_causal)
        queries = torch.arange(self.num_queries, device=self.device)
        keys = torch.arange(self.num_tokens, device=self.device)
        none = queries[:0]
        return keep(none, none, queries[:, None], keys[None, :])

    def mask_mod(
        self, *, window_size: int | None = None, prefix_causal: bool = True
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rule as a `mask_mod` for `torch.nn.attention.flex_attention`.

        Args:
            window_size: a query sees this many positions, its own included.
            prefix_causal: False lets the rows of a segment that others continue see all of it.

        Raises:
            ValueError: if window_size is not a positive integer, or prefix_causal not a bool.
        """
        if window_size is not None and not (_is_integer(window_size) and window_size >= 1):
            raise ValueError(f"window_size must be a positive integer or None, got {window_size!r}")
        if not isinstance(prefix_causal, (bool, np.bool_)):
            raise ValueError(f"prefix_causal must be True or False, got {prefix_causal!r}")
        window_size = None if window_size is None else int(window_size)
        subtree_end, position = self.subtree_end, self.position_ids
        rows = self.query_rows if self.num_queries < self.num_tokens else None
        seen_from = None if prefix_causal else self._seen_from

        def shared_prefix(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row = q_idx if rows is None else rows[q_idx]
            first = kv_idx if seen_from is None else seen_from[kv_idx]
            keep = (first <= row) & (row < subtree_end[kv_idx])
            if window_size is not None:
                keep = keep & (position[row] - position[kv_idx] < window_size)
            return keep

        return shared_prefix

    # ---- showing itself -------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"PrefixLayout(num_tokens={self.num_tokens}, num_segments={self.num_segments}, "
            f"num_groups={self.num_groups}, num_sequences={self.num_sequences}, "
            f"device='{self.device}')"
        )

    def __str__(self) -> str:
        lines = [
            f"{self.num_groups} groups, {self.num_sequences} sequences, {self.num_segments} "
            f"segments",
            f"{self.num_tokens} tokens instead of {self.repeated_tokens} repeated, attention "
            f"FLOPs {self.flop_ratio:.2f}x fewer",
        ]
        if 0 < self.num_tokens <= DRAWN_TOKENS:
            mask = self.materialize().tolist()
            lines += [" ".join("#" if keep else "." for keep in row) for row in mask]
        return "\n".join(lines)

    # ---- derived, on the host -------------------------------------------------------------------

    @cached_property
    def _sequence_lengths(self) -> np.ndarray:
        lengths, parents, _ = self.segments.numpy().astype(np.int64)
        return (depths_of(parents, lengths) + lengths)[self.sequence_leaves.numpy()]

    @cached_property
    def _path_rows(self) -> list[np.ndarray]:
        lengths, parents, _ = self.segments.numpy().astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        leaves = self.sequence_leaves.tolist()
        place = {leaf: i for i, leaf in enumerate(leaves)}
        rows = [np.empty(0, dtype=np.int64)] * len(leaves)
        # Depth first, the rows above a segment are those that were written last.
        path, own = np.empty(self.max_length, dtype=np.int64), np.arange(self.num_tokens)
        depths = depths_of(parents, lengths)
        bounds = zip(starts.tolist(), lengths.tolist(), depths.tolist(), strict=True)
        for segment, (start, length, depth) in enumerate(bounds):
            path[depth : depth + length] = own[start : start + length]
            if segment in place:
                rows[place[segment]] = path[: depth + length].copy()
        return rows

    @cached_property
    @outside_inference_mode
    def _seen_from(self) -> Tensor:
        """(T,) int64, the first row that sees each key where prefixes are bidirectional."""
        lengths, parents, _ = self.segments.numpy().astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        continued = np.zeros(len(lengths), dtype=bool)
        continued[parents[parents >= 0]] = True
        start = np.repeat(starts, lengths)
        own = np.arange(self.num_tokens)
        return torch.from_numpy(np.where(np.repeat(continued, lengths), start, own)).to(self.device)

    @cached_property
    @outside_inference_mode
    def _all_rows(self) -> Tensor:
        return torch.from_numpy(np.concatenate(self._path_rows)).to(self.device)

    @cached_property
    @outside_inference_mode
    def _first_slots(self) -> Tensor:
        """For each packed row its first place in the sequences laid end to end."""
        _, first = np.unique(np.concatenate(self._path_rows), return_index=True)
        return torch.from_numpy(first).to(self.device)

    @cached_property
    @outside_inference_mode
    def _label_rows(self) -> tuple[Tensor, Tensor]:
        lengths, parents, _ = self.segments.numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        # The nearest ancestor that is not empty holds the predecessor of a segment's first token.
        ancestor = parents.copy()
        while True:
            hollow = (ancestor >= 0) & (lengths[ancestor] == 0)
            if not hollow.any():
                break
            ancestor[hollow] = parents[ancestor[hollow]]
        predictor = np.arange(self.num_tokens) - 1
        filled = lengths > 0
        predictor[(ends - lengths)[filled]] = np.where(ancestor >= 0, ends[ancestor] - 1, -1)[
            filled
        ]
        target = np.flatnonzero(predictor >= 0)
        return (
            torch.from_numpy(predictor[target]).to(self.device),
            torch.from_numpy(target).to(self.device),
        )


def _device(device: Any) -> torch.device:
    """The device that a caller names, which a dtype or a tensor does not."""
    try:
        return torch.device(int(device) if isinstance(device, np.integer) else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a device or its name, got {device!r}") from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """The value as a message shows it: some of it, where it is long."""
    return reprlib.repr(value)


def _int_array(name: str, values: Any, least: int = 0) -> np.ndarray:
    """Checks integers against `least` and returns them as int64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    try:
        raw = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a flat list of integers, got {_shown(values)}") from error
    if raw.ndim != 1:
        raise ValueError(f"{name} must be a flat list of integers, got {_shown(values)}")
    if raw.size == 0:
        return np.empty(0, dtype=np.int64)
    if raw.dtype.kind in "iu" and raw.min() >= least and raw.max() <= INT64_MAX:
        return raw.astype(np.int64, copy=False)
    for i, item in enumerate(values):
        value = item.item() if isinstance(item, (np.generic, Tensor)) else item
        if type(value) is not int:
            raise ValueError(f"{name} must hold integers, got {value!r} at {name}[{i}]")
        if value < least:
            raise ValueError(f"{name}[{i}] must be at least {least}, got {value}")
        if value > INT64_MAX:
            raise ValueError(f"{name}[{i}] must be at most {INT64_MAX}, got {value}")
    raise ValueError(f"{name} must hold integers, got {raw.dtype}")


def _check_depth_first(parents: np.ndarray) -> None:
    """Refuses parents that come later (cycles) or whose subtree was already closed."""
    late = np.flatnonzero(parents >= np.arange(len(parents)))
    if late.size:
        i = int(late[0])
        raise ValueError(f"parents[{i}] must be less than {i} (or -1), got {parents[i]}")
    path: list[int] = []
    for i, parent in enumerate(parents.tolist()):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(
                f"segments must be in depth-first order: parents[{i}] is {parent}, but the "
                f"subtree of segment {parent} ended before segment {i}"
            )
        path.append(i)


def depths_of(parents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens on the path above each segment."""
    sizes = lengths.tolist()
    depths: list[int] = []
    for parent in parents.tolist():
        depths.append(depths[parent] + sizes[parent] if parent >= 0 else 0)
    return np.array(depths, dtype=np.int64)


def subtree_ends_of(parents: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """End row of each subtree (S,): a child hands its own to its parent, last segment first."""
    subtree_ends = ends.tolist()
    for i, parent in reversed(list(enumerate(parents.tolist()))):
        if parent >= 0:
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[i])
    return np.array(subtree_ends, dtype=np.int64)


def _radix_tree(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges equal prefixes: lengths and parents in depth-first order, and a leaf per sequence.

    Sorted sequences hold every shared prefix side by side, so the tree follows from the common
    prefix lengths of neighbours. Children are put back in the callers' order.
    """
    count = len(arrays)
    if not count:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    sizes = [len(a) for a in arrays]
    # Ids have one width, so their bytes sort equal prefixes next to each other, the shorter first.
    content = [a.tobytes() for a in arrays]
    order = sorted(range(count), key=content.__getitem__)
    common = [0]  # tokens that each shares with the one before it in this order
    for a, b in pairwise(order):
        shorter = min(sizes[a], sizes[b])
        differs = arrays[a][:shorter] != arrays[b][:shorter]
        common.append(int(differs.argmax()) if differs.any() else shorter)

    # Nodes by the depth at which they end; one opens when a sequence leaves the current path.
    node_end: list[int] = []
    node_parent: list[int] = []
    leaf_of = np.empty(count, dtype=np.int64)

    def new_node(end: int, parent: int) -> int:
        node_end.append(end)
        node_parent.append(parent)
        return len(node_end) - 1

    path: list[int] = []  # nodes from the root to the last sequence's, none of them empty
    for rank, (sequence, shared) in enumerate(zip(order, common, strict=True)):
        left = -1
        while path and node_end[path[-1]] > shared:
            left = path.pop()
        fork = path[-1] if path else -1
        if left >= 0 and shared > (node_end[fork] if path else 0):
            # The node that was left is cut in two at the fork.
            fork = new_node(shared, fork)
            node_parent[left] = fork
            path.append(fork)
        elif left < 0 and path:
            # The sequence before ends at the fork: it gets an empty leaf of its own.
            before = order[rank - 1]
            if leaf_of[before] == fork:
                leaf_of[before] = new_node(shared, fork)
        leaf_of[sequence] = new_node(sizes[sequence], fork)
        if sizes[sequence] > shared:
            path.append(int(leaf_of[sequence]))
    return _depth_first(node_end, node_parent, leaf_of)


def _depth_first(
    node_end: list[int], node_parent: list[int], leaf_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orders the nodes of a radix tree depth first, siblings by their first sequence."""
    count = len(node_end)
    first = np.full(count, len(leaf_of), dtype=np.int64)
    for sequence, node in enumerate(leaf_of.tolist()):
        while node >= 0 and first[node] > sequence:
            first[node] = sequence
            node = node_parent[node]
    children: list[list[int]] = [[] for _ in range(count + 1)]
    for node in np.argsort(-first, kind="stable").tolist():
        children[node_parent[node]].append(node)  # -1 is the last list, the roots
    lengths, parents = np.empty(count, np.int64), np.empty(count, np.int64)
    place = np.full(count + 1, -1, dtype=np.int64)
    stack = list(children[-1])
    position = 0
    while stack:
        node = stack.pop()
        parent = node_parent[node]
        place[node] = position
        parents[position] = place[parent]
        lengths[position] = node_end[node] - (node_end[parent] if parent >= 0 else 0)
        position += 1
        stack += children[node]
    return lengths, parents, place[leaf_of]
