"""Calls of a GPTModel's decoder: whether their batch can be packed, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prefix_attn.integrations.packing import (
    Packing,
    PassThroughError,
    Split,
    check_content,
    content_of,
    gradient_is_wanted,
    holds_tokens,
    pack_batch,
)

INFERENCE = "inference_context"
# What a decoder is handed and a packed row changes, or need not.
HANDLED = frozenset(
    {"hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params", "padding_mask"}
)


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One packed row for a call.

    Attributes:
        packing: of the batch.
        positions: (T,) int64, the row of the rotary table for each packed row.
        sequences_in_rows: whether the batch is one row of several sequences.
    """

    packing: Packing
    positions: Tensor
    sequences_in_rows: bool


def find_row(
    model: GPTModel,
    call: dict[str, Any],
    kwargs: dict[str, Any],
    hidden_of: Callable[[], Tensor],
    min_ratio: float,
) -> PackedRow:
    """Packs the batch of a call.

    Two places share a row if everything up to them is the same: the token, the place in its
    sequence, and each rotary or learned position that they have of their own. Stages of a pipeline
    behind the first have no tokens. They compare hidden states, which are the same bit for bit
    where the stage before has packed.

    Args:
        model: whose decoder is called.
        call: the arguments of the model's own call.
        kwargs: the arguments of the decoder's call.
        hidden_of: gathers what the decoder takes, (S, B, H).
        min_ratio: least tokens in over tokens run.

    Raises:
        PassThroughError: with the reason why the batch is not packed.
    """
    if any(kwargs.get(name) is not None for name in ("inference_context", "inference_params")):
        raise PassThroughError(INFERENCE)
    for name, value in kwargs.items():
        if name not in HANDLED and holds_tokens(value):
            raise PassThroughError(f"the keyword {name}")
    ids = call.get("input_ids")
    by_ids = model.decoder.pre_process and call.get("decoder_input") is None
    if by_ids:
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise PassThroughError("the model was not called with input_ids (B, S)")
        content = ids
    else:
        hidden = hidden_of().transpose(0, 1)
        if model.decoder.pre_process and torch.is_grad_enabled():
            given = call["decoder_input"]
            if gradient_is_wanted(given, given.shape[:2]):
                raise PassThroughError("the gradient of decoder_input itself is wanted")
        content = content_of(hidden)
    shape = content.shape
    device = content.device

    params = kwargs.get("packed_seq_params")
    if params is None:
        place = torch.arange(shape[1], device=device).expand(shape)
        valid = _valid_places(kwargs.get("attention_mask"), shape)
    else:
        place, valid = _places_of_sequences(params, shape, device), None
    kinds = [place]
    if model.position_embedding_type == "learned_absolute" and by_ids:
        position_ids = call.get("position_ids")
        if position_ids is None or position_ids.shape[-1] != shape[1]:
            raise PassThroughError("position_ids are not of shape (B, S)")
        kinds.append(position_ids.expand(shape))
    for table in tree_leaves(kwargs.get("rotary_pos_emb")):
        if table is not None and has_places(table, shape, params is not None):
            kinds.append(content_of(table.transpose(0, 1).reshape(*shape, -1)))

    packing = pack_batch(
        content,
        valid,
        torch.stack(kinds),
        min_ratio=min_ratio,
        split=Split.NEVER if params is None else Split.JUMPS,
    )
    if packing.tokens_in < min_ratio * packing.layout.num_tokens:
        raise PassThroughError(f"tokens in / tokens run below min_ratio {min_ratio:g}")
    try:
        check_content(hidden_of().transpose(0, 1), packing)
    except PassThroughError as error:
        raise PassThroughError("embeddings differ where tokens are equal") from error
    return PackedRow(packing, place.flatten()[packing.source_index], params is not None)


def has_places(table: Tensor, shape: torch.Size, sequences_in_rows: bool) -> bool:
    """Whether a rotary table (L, 1 or B, 1, D) has a row for each place of the batch.

    In rows of several sequences Megatron takes a table of their total length so.
    """
    return table.shape[1] == shape[0] > 1 or (sequences_in_rows and table.shape[0] == shape[1])


def _places_of_sequences(
    params: PackedSeqParams, shape: torch.Size, device: torch.device
) -> Tensor:
    """(1, N) int64, the place of each column in its sequence.

    Padding behind a sequence counts as one more sequence, and so does what follows the last one.
    """
    if params.qkv_format != "thd" or shape[0] != 1:
        raise PassThroughError(f"packed_seq_params of a batch {tuple(shape)}, {params.qkv_format}")
    if getattr(params, "local_cp_size", None) not in (None, 1):
        raise PassThroughError(f"local_cp_size {params.local_cp_size}")
    ends = params.cu_seqlens_q.to(device, torch.int64)
    padded = params.cu_seqlens_q_padded
    starts = ends if padded is None else padded.to(device, torch.int64)
    bounds = torch.cat([starts, starts[:-1] + ends.diff()]).unique()
    columns = torch.arange(shape[1], device=device)
    if int(bounds[-1]) > shape[1] or int(bounds[0]) != 0:
        raise PassThroughError(f"cu_seqlens do not fit a row of {shape[1]}")
    begins = bounds[torch.searchsorted(bounds, columns, right=True) - 1]
    return (columns - begins)[None]


def _valid_places(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """(B, S), True at tokens, of a mask of Megatron's; None if every place is one.

    True hides in masks of four dimensions, and marks a token in those of two. Attention that reads
    no mask computes padding on the right as well, which nobody reads; on the left it would be seen.
    """
    if mask is None:
        return None
    rows, length = shape
    if mask.dim() == 2 and mask.shape == shape:
        valid = mask != 0
    elif mask.dim() == 4 and mask.shape == (rows, 1, 1, length):
        valid = ~mask[:, 0, 0].bool()
    elif mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2:] == (length, length):
        mask = mask[:, 0].bool()
        valid = ~mask.diagonal(dim1=-2, dim2=-1)  # no other place can hide from itself
        later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
        # Rows of padding are nobody's; those of tokens see all earlier tokens.
        wrong = (mask != (later | ~valid[:, None])) & valid[:, :, None]
        if bool(wrong.any()):
            raise PassThroughError("attention_mask is not causal with padding")
        valid = valid.expand(shape)
    else:
        raise PassThroughError(f"attention_mask of shape {tuple(mask.shape)}")
    if bool(valid.all()):
        return None
    if not bool(valid[:, 0].all()):
        raise PassThroughError("attention_mask hides the first place of a row")
    return valid
