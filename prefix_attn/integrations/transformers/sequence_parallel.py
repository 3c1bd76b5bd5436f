"""Sequence parallelism inside `enable`: the ranks of a group run one packed row together.

Every rank finds the same packed row and runs its own rows of it. In every attention layer ranks
trade rows for heads, or bring each other the keys of shared rows. What a call returns goes back to
the caller's layout in one uneven all-to-all:

    "whole"     every rank has the whole batch, and gets all of it back
    "slices"    rank r of N has the columns [r L/N, (r + 1) L/N), and gets these back

A rank that raised alone would leave the others waiting. So before anything is exchanged the ranks
tell one another whether they can go on, and compare what they are about to run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.dealing import keys_move_less
from prefix_attn.integrations.packing import (
    HandBack,
    Packing,
    PassThroughError,
    content_of,
)
from prefix_attn.integrations.transformers.attention import LazyMask
from prefix_attn.integrations.transformers.caches import generates
from prefix_attn.integrations.transformers.calls import (
    GENERATION,
    as_kinds,
    find_packing,
    layer_masks,
    plain_mask,
    token_keywords_of,
)
from prefix_attn.integrations.transformers.refusals import refuse_parts
from prefix_attn.layout import PrefixLayout, outside_inference_mode
from prefix_attn.shards import WAYS, RowExchange, RowShard

INPUTS = ("whole", "slices")
OWN_SHARD = "the caller passes a RowShard"
# Keywords that change how many tensors a call hands back.
OUTPUTS = ("output_hidden_states", "output_router_logits")
# What a call has for each column.
PARTS = ("input_ids", "attention_mask", "position_ids")
# What the ranks of a group compare before they run a batch.
FACTS = ("shape", *PARTS, "token keywords", "packed row", "gradient mode", *OUTPUTS)
# Of splitmix64, which spreads every bit of a number over all bits of the result.
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardedPacking(Packing):
    """A packed row of which this rank runs some rows.

    Attributes:
        source_index: (n,) int64, flat place of the whole batch from which each own row is taken.
        row_index: (B, L) int64, packed row of each place of the whole batch.
        shard: the own rows.
        exchange: brings the rows that this rank hands back.
        own_index: (B, L) or (B, L / N) int64, where among these the row of each place of this rank
            is, -1 at padding.
    """

    shard: RowShard
    exchange: RowExchange
    own_index: Tensor

    @classmethod
    @outside_inference_mode
    def of(cls, packing: Packing, shard: RowShard, slices: bool) -> ShardedPacking:
        """The packing of the whole batch, cut.

        Args:
            packing: the same on every rank.
            shard: of this rank.
            slices: whether every rank is handed back its own columns, not the whole batch.
        """
        size, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
        rows = packing.row_index.cpu().numpy()
        parts = np.split(rows, size, axis=1) if slices else [rows]
        wanted = [np.unique(part[part >= 0]) for part in parts]
        own, own_wanted = (x[rank] if slices else x[0] for x in (parts, wanted))
        index = np.where(own < 0, -1, np.searchsorted(own_wanted, own))
        device = packing.source_index.device
        return cls(
            layout=packing.layout,
            source_index=packing.source_index[shard.rows],
            row_index=packing.row_index,
            tokens_in=packing.tokens_in,
            with_blocks=packing.with_blocks,
            shard=shard,
            exchange=RowExchange(
                shard.held, wanted if slices else wanted * size, shard.group, device
            ),
            own_index=torch.from_numpy(index).to(device),
        )

    def carrying(self, layout: PrefixLayout) -> RowShard:
        """The own rows of a layout of the whole row."""
        return replace(self.shard, layout=layout)

    def unpack(self, x: Tensor) -> Tensor:
        """(n, ...) own rows -> what this rank hands back, zero at padding.

        The gradient of a row is the sum over its places on all ranks.
        """
        return HandBack.apply(self.exchange(x[: self.shard.num_own]), self.own_index)


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """How the ranks of a group share the calls of an enabled decoder.

    Attributes:
        group: the ranks that run one packed row together.
        slices: whether each of them is called with its columns of the batch.
        way: how their attention works together, "auto" for the one that moves less.
    """

    group: dist.ProcessGroup
    slices: bool
    way: str

    def __deepcopy__(self, memo: Any) -> SequenceParallel:
        return self  # a copy of the model has the same ranks

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model with a sequence_parallel_group can't be pickled: call "
            "prefix_attn.disable(model) first"
        )

    @classmethod
    def of(
        cls, backbone: PreTrainedModel, group: Any, inputs: str, way: str
    ) -> SequenceParallel | None:
        """Checks the arguments of `enable`, and that the model can be cut into rows.

        Raises:
            TypeError: if the group is no process group.
            ValueError: if this rank is not in the group, or `inputs` or `way` is nothing known.
            NotImplementedError: naming what of the model would be wrong.
        """
        if inputs not in INPUTS:
            raise ValueError(
                f"sequence_parallel_inputs must be one of {list(INPUTS)}, got {inputs!r}"
            )
        if way not in ("auto", *WAYS):
            raise ValueError(f"sequence_parallel_way must be one of {['auto', *WAYS]}, got {way!r}")
        if group is None:
            if inputs != "whole":
                raise ValueError(
                    f"sequence_parallel_inputs={inputs!r} needs a sequence_parallel_group"
                )
            return None
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"rank {dist.get_rank()} is not in the sequence_parallel_group")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "sequence_parallel_group must be a ProcessGroup, such as mesh['sp'].get_group(), "
                f"got {type(group).__name__}"
            )
        refuse_parts(backbone)
        unshared = _why_not_heads(backbone.config, dist.get_world_size(group))
        if unshared is not None and way == "heads":
            raise NotImplementedError(
                f"{type(backbone).__name__} can't run with sequence_parallel_way='heads': "
                f"{unshared}"
            )
        return cls(group, inputs == "slices", way)

    def gather(self, backbone: PreTrainedModel, call: dict[str, Any]) -> None:
        """Puts the whole batch into a call that has this rank's columns.

        Raises:
            NotImplementedError: if the call can't be one of slices, on this rank or another.
            ValueError: if the ranks' slices differ in shape.
        """
        if not self.slices or isinstance(call.get("prefix_layout"), RowShard):
            return
        if generates(call):
            raise NotImplementedError(
                "slices of a batch can't be generated from: call prefix_attn.disable(model) first, "
                "and enable again after it"
            )
        parts: dict[str, Tensor] = {}
        error: Exception | None = None
        try:
            parts = _parts_of_slice(call)
        except Exception as raised:  # told to all ranks
            error = raised
        shapes = {f"shape of {name}": _shape(parts.get(name)) for name in PARTS}
        self._agree(shapes, error, _device_of(backbone, call))
        stacked = torch.cat([x.reshape(-1, x.shape[-1]) for x in parts.values()]).contiguous()
        columns = [torch.empty_like(stacked) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(columns, stacked, group=self.group)
        sizes = [x[..., 0].numel() for x in parts.values()]
        whole = torch.cat(columns, dim=1).split(sizes)
        for (name, own), found in zip(parts.items(), whole, strict=True):
            call[name] = found.view(*own.shape[:-1], -1)
        if "attention_mask" not in parts:
            call["attention_mask"] = None

    def find_packing(self, backbone: PreTrainedModel, call: dict[str, Any]) -> ShardedPacking:
        """Packs the whole batch of a call and cuts the row, in the same way on every rank.

        Raises:
            PassThroughError: for calls that every rank runs by itself: generation, and calls with a
                `RowShard` of the caller.
            NotImplementedError: if the batch can't be packed, on this rank or another.
            ValueError: if the ranks are about to run different batches.
        """
        if generates(call):
            raise PassThroughError(GENERATION)
        given = call.get("prefix_layout")
        if isinstance(given, RowShard) and given.group is self.group:
            raise PassThroughError(OWN_SHARD)
        packing: Packing | None = None
        facts: dict[str, Any] = dict.fromkeys(FACTS, 0)
        error: Exception | None = None
        try:
            packing = find_packing(backbone, call, 1.0, always=True, is_whole=True)
            facts = _facts_of(backbone, call, packing)
        except Exception as raised:  # told to all ranks
            error = raised
        self._agree(facts, error, _device_of(backbone, call))
        assert packing is not None  # else there was an error
        shard = RowShard.of(packing.layout, self.group, self._way_of(backbone.config, packing))
        return ShardedPacking.of(packing, shard, self.slices)

    def _way_of(self, config: Any, packing: Packing) -> str:
        """How the attention of a packed row works together, the same on every rank."""
        ranks = dist.get_world_size(self.group)
        unshared = _why_not_heads(config, ranks)
        if packing.with_blocks is not None:  # such blocks can't be dealt in tiles
            if self.way == "keys" or unshared is not None:
                raise NotImplementedError(
                    "pictures that see all of themselves need ranks that trade rows for heads: "
                    + (unshared or 'pass sequence_parallel_way="heads"')
                )
            return "heads"
        if self.way != "auto":
            return self.way
        if unshared is not None:
            return "keys"
        heads, kv_heads = _heads(config)
        if heads is None or kv_heads is None:
            return "heads"
        less = keys_move_less(packing.layout.forest, ranks, heads, kv_heads)
        return "keys" if less else "heads"

    def _agree(self, facts: dict[str, Any], error: Exception | None, device: torch.device) -> None:
        """Raises on every rank if one of them has an error, or facts that differ."""
        values = [int(error is not None), *facts.values()]
        mine = torch.stack([torch.as_tensor(x, dtype=torch.int64).to(device) for x in values])
        told = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(told, mine, group=self.group)
        failed, *columns = torch.stack(told, dim=1).tolist()
        if any(failed):
            self._raise_for_all(error)
        for name, column in zip(facts, columns, strict=True):
            odd = next((rank for rank, x in enumerate(column) if x != column[0]), None)
            if odd is not None:
                raise ValueError(
                    f"the ranks of the sequence-parallel group run different batches: the {name} "
                    f"of rank {odd} differs from that of rank 0. Ranks of a group need the same "
                    "batch, or its slices"
                )

    def _raise_for_all(self, error: Exception | None) -> NoReturn:
        reasons: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(reasons, None if error is None else str(error), group=self.group)
        if error is not None and not isinstance(error, PassThroughError):
            raise error
        first = next(rank for rank, reason in enumerate(reasons) if reason is not None)
        raise NotImplementedError(
            f"under sequence parallelism no batch can be passed through, and rank {first} can't "
            f"pack its batch: {reasons[first]}"
        )


def _parts_of_slice(call: dict[str, Any]) -> dict[str, Tensor]:
    """What a call has for each column: (B, n), positions (B, n) or (K, B, n)."""
    if call.get("prefix_layout") is not None:
        raise PassThroughError("the caller passes a prefix_layout")
    ids = call.get("input_ids")
    if call.get("inputs_embeds") is not None:
        raise PassThroughError("slices of inputs_embeds")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise PassThroughError("there are no input_ids of shape (B, L)")
    parts = {"input_ids": ids.long()}
    made = call.get("attention_mask")
    if any(isinstance(one, LazyMask) and one.adds_rules for one in layer_masks(made).values()):
        raise PassThroughError(
            "slices of a batch whose attention_mask adds rules to the causal mask"
        )
    mask = plain_mask(made)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise PassThroughError("attention_mask is not of shape (B, L)")
        parts["attention_mask"] = (mask != 0).long()
    kinds = as_kinds(call.get("position_ids"), ids.shape)
    if kinds is not None:
        parts["position_ids"] = (kinds[0] if call["position_ids"].dim() == 2 else kinds).long()
    return parts


def _facts_of(backbone: PreTrainedModel, call: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """What must be the same on all ranks: checksums of the batch, and what else decides its run."""
    ids, mask = call.get("input_ids"), plain_mask(call.get("attention_mask"))
    tokens = content_of(call["inputs_embeds"]) if ids is None else ids
    batch = [tokens, None if mask is None else mask != 0, call.get("position_ids")]
    shape = packing.row_index.shape
    keywords = [x[None] for x in token_keywords_of(backbone, call, shape).contents()]
    batch.append(torch.cat(keywords) if keywords else None)
    blocks = packing.row_index.new_empty(0)
    if packing.with_blocks is not None:
        blocks = packing.with_blocks.segments.flatten().to(packing.row_index)
    batch.append(torch.cat([packing.row_index.flatten(), blocks]))
    asked = [bool(call.get(name)) for name in OUTPUTS]
    values = [_shape(tokens), *map(_checksum, batch), torch.is_grad_enabled(), *asked]
    return dict(zip(FACTS, values, strict=True))


def _checksum(x: Tensor | None) -> Tensor | int:
    """A number that tells apart tensors with any different element or order."""
    if x is None:
        return 0
    flat = x.reshape(-1).long()
    mixed = (flat + 1) * FIRST + torch.arange(flat.numel(), device=flat.device) * STEP
    mixed = (mixed ^ (mixed >> 30)) * FIRST
    mixed = (mixed ^ (mixed >> 27)) * SECOND
    return (mixed ^ (mixed >> 31)).sum()


def _shape(x: Tensor | None) -> int:
    """A number for a shape: 0 for None."""
    number = 0
    for size in () if x is None else x.shape:
        number = number * 2**21 + size + 1
    return number % 2**62


def _device_of(backbone: PreTrainedModel, call: dict[str, Any]) -> torch.device:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(call.get(name), Tensor):
            device: torch.device = call[name].device
            return device
    return backbone.device


def _why_not_heads(config: Any, ranks: int) -> str | None:
    """The reason why ranks can't trade rows for heads, or None."""
    heads, kv_heads = _heads(config)
    if heads is not None and heads % ranks:
        return (
            f"{heads} query heads can't be shared by {ranks} ranks: their number must divide that "
            "of the heads"
        )
    if kv_heads is not None and kv_heads % ranks and ranks % kv_heads:
        return (
            f"{kv_heads} KV heads can't be shared by {ranks} ranks: their number must divide that "
            "of the heads, or be a multiple of it"
        )
    return None


def _heads(config: Any) -> tuple[int | None, int | None]:
    """Query and KV heads of a layer, None where they are not one number for all."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "kv_lora_rank", None) is not None:  # each query head has keys of its own
        kv_heads = heads
    return (
        heads if isinstance(heads, int) else None,
        kv_heads if isinstance(kv_heads, int) else None,
    )
