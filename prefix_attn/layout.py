"""The device view of a prefix forest: where tokens lie on the packed axis, who attends to whom.

Segments are packed end to end in depth-first order, so the subtree of a segment is one contiguous
range of rows, and one integer per key is the whole attention rule:

    row r attends key c   iff   c <= r < subtree_end[c]

What follows from lengths and parents is computed on the host, in `prefix_attn.forest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefix_attn.checks import bool_array, flag, int_array, is_integer, is_list, shown, window
from prefix_attn.forest import HAS_QUERIES, SEES_ITSELF, Forest
from prefix_attn.radix import find_prefixes

INT32_MAX = 2**31 - 1
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
        segments: (3, S) int32 on the CPU, the lengths, the parents, and bits: 1 where the rows of a
            segment are queries, 2 where they see all of it. This is the whole layout.
        cu_seqlens: (S + 1,) int32, first row of each segment, and T.
        parents: (S,) int32, the segment that each one continues, -1 for roots.
        position_ids: (T,) int64, depth of each token along its path.
        subtree_end: (T,) int32, end of the subtree of each row's segment.
        query_rows: (Tq,) int64, packed rows that are queries, ascending: all but for `queries_for`.
        seen_from: (T,) int64, the first row that sees each key; None if that is its own.
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
    seen_from: Tensor | None
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
        prefixes = int_array("prefix_lens", prefix_lens)
        if not is_list(suffix_lens):
            raise ValueError(
                "suffix_lens must be a sequence of sequences of lengths, one per group, got "
                f"{type(suffix_lens).__name__}"
            )
        if len(prefixes) != len(suffix_lens):
            raise ValueError(
                "prefix_lens and suffix_lens must have one entry per group, got "
                f"{len(prefixes)} prefixes and {len(suffix_lens)} groups of suffixes"
            )
        members = [int_array(f"suffix_lens[{g}]", s) for g, s in enumerate(suffix_lens)]
        sizes = np.array([1 + len(m) for m in members], dtype=np.int64)
        roots = np.cumsum(sizes) - sizes
        parents = np.repeat(roots, sizes)
        parents[roots] = -1
        lengths = np.empty(int(sizes.sum()), dtype=np.int64)
        lengths[parents >= 0] = np.concatenate([*members, np.empty(0, dtype=np.int64)])
        lengths[roots] = prefixes
        return cls._from_forest(Forest.from_tree(lengths, parents), device)

    @classmethod
    def from_tree(
        cls,
        lengths: Sequence[int] | Tensor,
        parents: Sequence[int] | Tensor,
        device: torch.device | str | None = None,
        *,
        bidirectional: Sequence[bool] | Tensor | None = None,
    ) -> PrefixLayout:
        """Builds any prefix forest, given in depth-first order.

        Args:
            lengths: tokens in each segment.
            parents: `parents[i] < i` is the segment that segment i continues, -1 for a root.
            device: where the tensors live; the CPU by default.
            bidirectional: for each segment whether its rows see all of it, not only what lies
                before, as those of pictures do in some models. None by default.

        Raises:
            ValueError: naming the entry that is negative, out of range, cyclic or out of
                depth-first order, or no bool.

        Example:
            >>> layout = PrefixLayout.from_tree([4, 2, 1, 3], [-1, 0, 1, 0])
            >>> layout.position_ids.tolist()
            [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
        """
        length_array = int_array("lengths", lengths)
        parent_array = int_array("parents", parents, least=-1)
        whole = None if bidirectional is None else bool_array("bidirectional", bidirectional)
        return cls._from_forest(Forest.from_tree(length_array, parent_array, whole), device)

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
            raise ValueError(f"sequences must be lists of token ids, got {shown(sequences)}")
        arrays = [int_array(f"sequences[{i}]", s) for i, s in enumerate(sequences)]
        forest = find_prefixes(arrays)
        layout = cls._from_forest(forest, device)
        packed = np.empty(forest.num_tokens, dtype=np.int64)
        for rows, ids in zip(forest.sequence_rows, arrays, strict=True):
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
            `(layout, source_index, row_index)`: source_index (T,) int64 is the place of each packed
            row in the flattened batch, row_index (B, L) int64 the packed row of each place, -1 at
            padding.

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
        places = [np.flatnonzero(row) for row in mask]
        arrays = [int_array(f"input_ids[{i}]", ids[i, s]) for i, s in enumerate(places)]
        forest = find_prefixes(arrays)
        layout = cls._from_forest(forest, device)
        source_index = np.empty(forest.num_tokens, dtype=np.int64)
        row_index = np.full(ids.shape, -1, dtype=np.int64)
        # The first of the sequences that share a row is its source: fill it last.
        for i in reversed(range(len(arrays))):
            rows = forest.sequence_rows[i]
            row_index[i, places[i]] = rows
            source_index[rows] = i * ids.shape[1] + places[i]
        to = layout.device
        return layout, torch.from_numpy(source_index).to(to), torch.from_numpy(row_index).to(to)

    @classmethod
    @outside_inference_mode
    def _from_forest(cls, forest: Forest, device: torch.device | str | None) -> PrefixLayout:
        """Takes a forest without a window: that is the choice of a call."""
        total = sum(forest.lengths.tolist())  # Python's integers do not overflow
        if total > INT32_MAX:
            raise ValueError(f"a layout holds at most {INT32_MAX} tokens, got {total}")
        target = torch.device("cpu") if device is None else _device(device)
        cu_seqlens = np.concatenate([[0], forest.ends])
        return cls(
            segments=torch.from_numpy(forest.segments),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)).to(target),
            parents=torch.from_numpy(forest.parents.astype(np.int32)).to(target),
            position_ids=torch.from_numpy(forest.positions).to(target),
            subtree_end=torch.from_numpy(forest.row_subtree_ends.astype(np.int32)).to(target),
            query_rows=torch.from_numpy(forest.query_rows).to(target),
            seen_from=(
                torch.from_numpy(forest.row_seen_from).to(target)
                if forest.bidirectional.any()
                else None
            ),
            sequence_leaves=torch.from_numpy(forest.leaves.astype(np.int32)),
            num_groups=forest.num_groups,
            max_length=forest.max_length,
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PrefixLayout:
        """Returns the same layout with its tensors on `device`.

        Args:
            device: where the tensors are to live.
            non_blocking: copy without waiting, which works for layouts in pinned memory.

        Raises:
            ValueError: if `device` is not a device or its name.
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
        if self.seen_from is not None:
            moved["seen_from"] = function(self.seen_from)
        return replace(self, **moved)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: the fields, not what is derived from them on first use."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @outside_inference_mode
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes out of inference mode what was loaded or copied there."""
        vars(self).update(
            (name, x.clone() if isinstance(x, Tensor) and x.is_inference() else x)
            for name, x in state.items()
        )

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
        chosen = int_array("segments", segments)
        beyond = chosen[chosen >= self.num_segments]
        if beyond.size:
            raise ValueError(
                f"segments must be less than {self.num_segments}, the number of segments, got "
                f"{beyond[0]}"
            )
        table = self.segments.clone()
        table[2] &= SEES_ITSELF
        table[2, torch.from_numpy(chosen)] |= HAS_QUERIES
        query_rows = Forest.from_segments(table.numpy()).query_rows
        return replace(
            self, segments=table, query_rows=torch.from_numpy(query_rows).to(self.device)
        )

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

    @property
    def bidirectional(self) -> Tensor:
        """(S,) bool on the CPU: segments whose rows see all of it, whatever a call says."""
        return (self.segments[2] & SEES_ITSELF) > 0

    @cached_property
    def forest(self) -> Forest:
        """The same on the host: what follows from lengths and parents, as NumPy arrays."""
        return Forest.from_segments(self.segments.numpy(), leaves=self.sequence_leaves.numpy())

    @cached_property
    def repeated_tokens(self) -> int:
        """Tokens that the same sequences have when every one is run whole."""
        return self.forest.repeated_tokens

    @cached_property
    def flop_ratio(self) -> float:
        """Attention FLOPs without sharing over those with it: the ideal speed-up.

        Counts the allowed (query, key) pairs of each sequence run whole, over those of the layout.
        """
        pairs = self.forest.num_pairs
        return self.forest.num_repeated_pairs / pairs if pairs else 1.0

    # ---- moving data ----------------------------------------------------------------------------

    @outside_inference_mode
    def sequence_rows(self, i: int) -> Tensor:
        """Packed rows of sequence i from root to leaf: (L_i,) int64."""
        if not is_integer(i) or not 0 <= i < self.num_sequences:
            raise ValueError(f"sequence {i!r} does not exist, there are {self.num_sequences}")
        rows = self.forest.path_rows(int(self.sequence_leaves[i]))
        return torch.from_numpy(rows).to(self.device)

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
        if not is_list(sequences) and not (isinstance(sequences, Tensor) and sequences.dim()):
            raise ValueError(
                f"sequences must be a list of tensors, one per sequence, got {shown(sequences)}"
            )
        if len(sequences) != self.num_sequences:
            raise ValueError(f"expected {self.num_sequences} sequences, got {len(sequences)}")
        lengths = self.forest.sequence_lengths.tolist()
        for i, (x, length) in enumerate(zip(sequences, lengths, strict=True)):
            if not isinstance(x, Tensor):
                raise ValueError(f"sequence {i} must be a tensor, got {type(x).__name__}")
            if x.dim() == 0 or x.shape[0] != length:
                raise ValueError(f"sequence {i} must have {length} tokens, got {tuple(x.shape)}")
            like = sequences[0]
            if x.shape[1:] != like.shape[1:] or x.device != like.device:
                raise ValueError(
                    "sequences must agree in their device and in their dimensions but the first, "
                    f"got {tuple(like.shape)} on {like.device} and, in sequence {i}, "
                    f"{tuple(x.shape)} on {x.device}"
                )
        if not len(sequences):
            raise ValueError("an empty layout has nothing to pack")
        return torch.cat(list(sequences))[self._first_places]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Splits a packed (T, ...) tensor into one (L_i, ...) tensor per sequence.

        Differentiable: the gradient of a shared row is summed over the sequences that hold it.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[0] != self.num_tokens:
            raise ValueError(f"x must have shape ({self.num_tokens}, ...), got {tuple(x.shape)}")
        lengths = self.forest.sequence_lengths.tolist()
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
        window_size, prefix_causal = window(window_size), flag("prefix_causal", prefix_causal)
        subtree_end, position = self.subtree_end, self.position_ids
        rows = self.query_rows if self.num_queries < self.num_tokens else None
        seen_from = self.seen_from if prefix_causal else self._seen_from

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

    # ---- derived, on the device -----------------------------------------------------------------

    @cached_property
    @outside_inference_mode
    def _seen_from(self) -> Tensor:
        """(T,) int64, the first row that sees each key where prefixes are bidirectional."""
        forest = replace(self.forest, prefix_causal=False)
        return torch.from_numpy(forest.row_seen_from).to(self.device)

    @cached_property
    @outside_inference_mode
    def _all_rows(self) -> Tensor:
        """The rows of all sequences, laid end to end."""
        return torch.from_numpy(np.concatenate(self.forest.sequence_rows)).to(self.device)

    @cached_property
    @outside_inference_mode
    def _first_places(self) -> Tensor:
        """(T,) int64, the first place of each packed row among those of all sequences."""
        _, first = np.unique(np.concatenate(self.forest.sequence_rows), return_index=True)
        return torch.from_numpy(first).to(self.device)

    @cached_property
    @outside_inference_mode
    def _label_rows(self) -> tuple[Tensor, Tensor]:
        previous = self.forest.previous_rows
        target = np.flatnonzero(previous >= 0)
        return (
            torch.from_numpy(previous[target]).to(self.device),
            torch.from_numpy(target).to(self.device),
        )


def _device(device: Any) -> torch.device:
    """The device that a caller names, which a dtype or a tensor does not."""
    try:
        return torch.device(int(device) if isinstance(device, np.integer) else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a device or its name, got {device!r}") from error
