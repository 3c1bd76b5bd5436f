"""Calls of an enabled decoder: whether their batch can be packed, and how the packed row runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.integrations.packing import (
    SINGLE,
    Packing,
    PassThroughError,
    Split,
    check_content,
    content_of,
    gradient_is_wanted,
    holds_tokens,
    pack_batch,
)
from prefix_attn.integrations.transformers.attention import (
    EAGER_NAME,
    HARMLESS,
    ROW_KEYWORDS,
    SDPA_NAME,
    LazyMask,
    PackedMask,
    rope_reads_range,
    splits_rows,
)
from prefix_attn.integrations.transformers.blocks import blocks_of
from prefix_attn.integrations.transformers.caches import (
    generates,
    makes_cache,
    mark_unfilled,
    shares_by_cache,
)
from prefix_attn.integrations.transformers.hooks import check_hooks
from prefix_attn.integrations.transformers.refusals import is_causal_by_mask, refuse_parts
from prefix_attn.integrations.transformers.token_keywords import TokenKeywords
from prefix_attn.shards import RowShard

GENERATION = "past_key_values or use_cache=True"
JUMPS_IN_CACHE = "position_ids jump in a call that makes a cache: one sequence"
JUMPS_UNREAD = "position_ids jump, which this type of model alone reads as one sequence"

# Decoders whose masks never see position_ids: sequences of a row are kept apart where they restart,
# as under flash attention.
MASKS_WITHOUT_POSITIONS = frozenset({"afmoe", "gpt_oss"})
# Decoders that take (B, L) positions for three kinds of places in a picture.
PICTURE_POSITIONS = frozenset(
    {
        "cosmos3_edge_text",
        "ernie4_5_vl_moe_text",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_image_text",
        "glm_ocr_text",
        "hy_v4_vl_text",
        "paddleocr_vl_text",
        "qwen2_5_omni_talker",
        "qwen2_5_omni_text",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
    }
)

# Decoders that read left padding as tokens, in transformers itself.
READS_LEFT_PADDING = frozenset({"recurrent_gemma"})

# Keywords for the head: a decoder that knows one would drop packed rows.
HEAD_KEYWORDS = ("labels", "shift_labels", "logits_to_keep")
LEFT_OUT = frozenset({*ROW_KEYWORDS, *HEAD_KEYWORDS})
HANDLED = LEFT_OUT | {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}


def runs_ours(backbone: PreTrainedModel) -> bool:
    return backbone.config._attn_implementation in (SDPA_NAME, EAGER_NAME)


def find_packing(
    backbone: PreTrainedModel,
    kwargs: dict[str, Any],
    min_ratio: float,
    *,
    always: bool = False,
    is_whole: bool = False,
) -> Packing:
    """Packs the batch of a call, or raises PassThroughError with the reason why not.

    `always` is that of `enable`; `is_whole` says that a row is known to be no slice of one.
    """
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    mask, position_ids = plain_mask(kwargs.get("attention_mask")), kwargs.get("position_ids")
    if kwargs.get("prefix_layout") is not None:
        if not runs_ours(backbone):
            raise RuntimeError(
                f"the attention implementation of {type(backbone).__name__} is "
                f"{backbone.config._attn_implementation!r}, which would ignore the prefix_layout: "
                "it was changed after enable, here or in a model with the same config object. Call "
                "prefix_attn.enable(model) again"
            )
        if isinstance(kwargs["prefix_layout"], RowShard):
            refuse_parts(backbone)
        raise PassThroughError("the caller passes a prefix_layout")
    if generates(kwargs):
        raise PassThroughError(GENERATION)
    if makes_cache(backbone, kwargs) and shares_by_cache(backbone):
        raise PassThroughError("layers share keys by the cache, unless use_cache=False")
    if not runs_ours(backbone):  # chosen by the caller, or for a model with the same config object
        name = backbone.config._attn_implementation
        raise PassThroughError(f"attn_implementation is {name!r} since enable")
    if kwargs.get("output_attentions") or getattr(backbone.config, "output_attentions", False):
        raise PassThroughError("output_attentions")
    if kwargs.get("is_causal") is False:
        raise PassThroughError("is_causal=False")
    check_hooks(backbone, embeds=embeds is not None)
    tokens = ids if embeds is None else embeds
    if tokens is None or (ids is not None and embeds is not None):
        raise PassThroughError("not exactly one of input_ids and inputs_embeds")
    if tokens.dim() != (2 if embeds is None else 3) or not tokens.numel():
        raise PassThroughError(f"tokens of shape {tuple(tokens.shape)}")
    shape = tokens.shape[:2]
    held = token_keywords_of(backbone, kwargs, shape)
    for name, value in kwargs.items():
        if name not in HANDLED and name not in held.names and holds_tokens(value):
            raise PassThroughError(f"the keyword {name}")
    blocks, longest_block = _blocks(backbone, kwargs.get("attention_mask"), shape)
    if blocks is None and is_causal_by_mask(backbone.config):
        raise PassThroughError("no mask of an outer model says where the layers are causal")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        raise PassThroughError("attention_mask is not of shape (B, L)")
    if mask is not None:
        _pass_left_padding(backbone, mask)
    positions = as_kinds(position_ids, shape)
    if _ran_flash(backbone) and shape[0] == 1:
        if mask is not None and bool((mask != 0).all()):
            mask = None  # as transformers does for flash attention
        if mask is None:
            if not is_whole:
                _refuse_slices(positions)
            positions = _with_places(positions, kwargs)
    split = Split.NEVER if mask is not None else _split(backbone, kwargs, positions)
    if shape[0] == 1 and not always:
        jumps = JUMPS_IN_CACHE if makes_cache(backbone, kwargs) else JUMPS_UNREAD
        _pass_single_sequence(mask, positions, split, jumps)
    if embeds is not None and torch.is_grad_enabled() and gradient_is_wanted(embeds, shape):
        raise PassThroughError("the gradient of inputs_embeds itself is wanted")
    packing = pack_batch(
        tokens if embeds is None else content_of(embeds),
        mask,
        positions,
        min_ratio=min_ratio,
        always=always,
        split=split,
        same_range=rope_reads_range(backbone.config),
        further=held.contents(),
        blocks=blocks,
        longest_block=longest_block,
    )
    if embeds is not None:
        check_content(embeds, packing)
    held.check(packing)
    return packing


def token_keywords_of(
    backbone: PreTrainedModel, kwargs: dict[str, Any], shape: torch.Size
) -> TokenKeywords:
    return TokenKeywords.of(kwargs, backbone._prefix_attn.token_keywords, shape)


def plain_mask(mask: Any) -> Any:
    """The (B, L) mask from which an outer model made the masks of the decoder's layers."""
    made = list(layer_masks(mask).values())
    if not made or not all(isinstance(one, LazyMask) for one in made):
        return mask
    first, *others = (one.arguments.get("attention_mask") for one in made)
    for other in others:
        if other is not first and (other is None or first is None or not other.equal(first)):
            raise PassThroughError("attention_mask differs between layers")
    return first


def _blocks(
    backbone: PreTrainedModel, mask: Any, shape: torch.Size
) -> tuple[Tensor | None, int | None]:
    """The blocks of a batch that see all of themselves, by the masks of an outer model.

    Returns:
        (B, L) block of each place, -1 outside, or None; and how long a block may be, or None.

    Raises:
        PassThroughError: if the masks say more than segments of a layout can.
    """
    ids, longest = None, None
    for one in layer_masks(mask).values():
        if not (isinstance(one, LazyMask) and one.adds_rules):
            continue
        said = blocks_of(one.arguments.get("mask_function"))
        if said is None or said.ids is None or said.ids.shape != shape:
            raise PassThroughError("attention_mask adds rules to the causal mask")
        if ids is not None and not ids.equal(said.ids):
            raise PassThroughError("pictures differ between the masks of layers")
        ids = said.ids
        if said.outruns_window:
            longest = backbone.config.sliding_window
    return ids, longest


def layer_masks(mask: Any) -> dict[Any, Any]:
    """Masks by type of layer; one that serves all layers has no type."""
    return mask if isinstance(mask, dict) else {None: mask}


def _packed_masks(mask: Any, packing: Packing, harmless: frozenset[str]) -> Any:
    """What stands for the masks of a packed row: one, or one for each type of layer."""
    if packing.with_blocks is None:
        return PackedMask(packing.carrying(packing.layout), harmless=harmless)
    packed = {
        kind: PackedMask(
            packing.carrying(packing.with_blocks if one.adds_rules else packing.layout),
            says_who_sees_whom=True,
            harmless=harmless,
        )
        for kind, one in layer_masks(mask).items()
    }
    return packed if isinstance(mask, dict) else packed[None]


def as_kinds(position_ids: Any, shape: torch.Size) -> Tensor | None:
    """(1 or B, L) or (K, 1 or B, L) position ids as (K, B, L)."""
    if position_ids is None:
        return None
    if not isinstance(position_ids, Tensor) or position_ids.dim() not in (2, 3):
        raise PassThroughError("position_ids have an unknown shape")
    if position_ids.is_floating_point():
        raise PassThroughError(f"position_ids of dtype {position_ids.dtype}")
    kinds = position_ids if position_ids.dim() == 3 else position_ids[None]
    if kinds.shape[1] not in (1, shape[0]) or kinds.shape[2] != shape[1]:
        raise PassThroughError("position_ids have an unknown shape")
    if position_ids.dim() == 3 and len(kinds) not in (3, 4):
        raise PassThroughError("position_ids have an unknown shape")
    return kinds.expand(-1, shape[0], -1)


def _ran_flash(backbone: PreTrainedModel) -> bool:
    """Whether the model alone runs flash attention, which tells sequences by rules of its own."""
    return "flash" in backbone._prefix_attn.implementation


def _split(backbone: PreTrainedModel, kwargs: dict[str, Any], positions: Tensor | None) -> Split:
    """What starts a new sequence in a row without an attention mask, in the model alone."""
    if positions is None or len(positions) == 3:  # neither tells the place in the text
        return Split.NEVER
    model_type, made = backbone.config.model_type, kwargs.get("attention_mask")
    if len(positions) == 1 and model_type in PICTURE_POSITIONS:
        return Split.NEVER
    if _ran_flash(backbone):
        return Split.RESTARTS
    if made is not None:  # masks of an outer model, which may not know of the cache
        several = all(splits_rows(mask) for mask in layer_masks(made).values())
        return Split.JUMPS if several else Split.NEVER
    if makes_cache(backbone, kwargs):
        return Split.NEVER
    return Split.RESTARTS if model_type in MASKS_WITHOUT_POSITIONS else Split.JUMPS


def _with_places(positions: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Puts the places in sequences first, if the call has the bounds of flash attention.

    Args:
        positions: (K, 1, N), or None for the numbers of the columns.
        kwargs: of the call.
    """
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None or any(kwargs.get(name) is None for name in ROW_KEYWORDS):
        return positions
    tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    starts = bounds.to(columns)[torch.searchsorted(bounds.to(columns), columns, right=True) - 1]
    places = (columns - starts)[None, None]
    return torch.cat([places, columns[None, None] if positions is None else positions])


def _refuse_slices(positions: Tensor | None) -> None:
    """Libraries that run flash attention over the ranks of a sequence hand slices of it over."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if positions is None or ranks == 1:
        return
    first = int(positions[0, 0, 0])
    if first != 0:
        raise ValueError(
            f"the row starts at position {first}: it is a sequence-parallel slice of a longer one. "
            'Call enable with sequence_parallel_group and sequence_parallel_inputs="slices"'
        )


def _pass_left_padding(backbone: PreTrainedModel, mask: Tensor) -> None:
    """Raises PassThroughError for left padding whose content the ordinary call takes for tokens."""
    is_token = mask != 0
    if not bool((is_token.any(1) & ~is_token[:, 0]).any()):
        return
    mixers = backbone._prefix_attn.mixers
    if backbone.config.model_type in READS_LEFT_PADDING:
        raise PassThroughError("left padding, which this type of model reads as tokens")
    if mixers.projects_with_bias():
        raise PassThroughError("left padding, which mixers read: their projections have a bias")
    if len(mask) == 1 and mixers.reads_padding_of_one_row():
        raise PassThroughError("left padding of a single row, which mixers read as tokens")


def _pass_single_sequence(
    mask: Tensor | None, positions: Tensor | None, split: Split, jumps: str
) -> None:
    """Raises PassThroughError for a batch of one row that is known to hold one sequence.

    `jumps` is the reason where positions jump that the model alone does not split by.
    """
    if mask is not None or positions is None:
        raise PassThroughError(SINGLE)
    if split is Split.NEVER:
        jump = len(positions) == 1 and bool((positions[0].diff() != 1).any())
        raise PassThroughError(jumps if jump else SINGLE)


def built_masks(mask: Any) -> Any:
    """The masks that an outer model made, built for a batch that runs as it is."""
    for one in layer_masks(mask).values():
        if isinstance(one, LazyMask):
            one.build()
    return mask.build() if isinstance(mask, LazyMask) else mask


@torch.compiler.disable(recursive=False)
def run_packed(
    backbone: PreTrainedModel,
    original: Callable[..., Any],
    packing: Packing,
    kwargs: dict[str, Any],
) -> Any:
    """Runs the packed row and hands every output back in the layout of the batch."""
    out = original(**_packed_call(backbone, packing, kwargs))
    return _hand_back_all(out, packing)


@torch.compiler.disable
def _packed_call(
    backbone: PreTrainedModel, packing: Packing, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of the packed row."""
    call = {name: value for name, value in kwargs.items() if name not in LEFT_OUT}
    position_ids = kwargs.get("position_ids")
    shape = packing.row_index.shape
    if kwargs.get("inputs_embeds") is None:
        call["input_ids"] = packing.pack(kwargs["input_ids"])
    else:
        call["inputs_embeds"] = packing.pack_features(kwargs["inputs_embeds"])
    if position_ids is None:  # transformers numbers the columns
        call["position_ids"] = (packing.source_index % shape[1])[None]
    else:
        call["position_ids"] = packing.pack(position_ids.expand(*position_ids.shape[:-2], *shape))
    held = TokenKeywords.read(kwargs, backbone._prefix_attn.token_keywords)
    call |= held.pack(packing)
    call.update(
        attention_mask=_packed_masks(kwargs.get("attention_mask"), packing, HARMLESS | held.names),
        use_cache=False,
        return_dict=True,
        prefix_layout=packing.carrying(packing.layout),
    )
    return call


@torch.compiler.disable
def _hand_back_all(out: Any, packing: Packing) -> Any:
    handed: dict[int, Tensor] = {}
    for name, value in list(out.items()):
        out[name] = _hand_back(name, value, packing, handed)
    return out


def _hand_back(name: str, value: Any, packing: Packing, handed: dict[int, Tensor]) -> Any:
    """An output of the packed row as an output of the batch; the same tensor only once."""
    if isinstance(value, (tuple, list)):
        return tuple(_hand_back(name, v, packing, handed) for v in value)
    if value is None:
        return None
    tokens = packing.num_rows
    if isinstance(value, Tensor) and id(value) not in handed:
        if value.dim() == 3 and value.shape[:2] == (1, tokens):
            handed[id(value)] = packing.unpack(value[0])
        elif value.dim() == 4 and value.shape[1:3] == (1, tokens):  # Gemma 3n's (K, B, L, H)
            streams = packing.unpack(value[:, 0].transpose(0, 1).flatten(1))
            handed[id(value)] = streams.unflatten(-1, (len(value), -1)).movedim(-2, 0)
        elif value.dim() == 2 and value.shape[0] == tokens:  # router logits: places end to end
            handed[id(value)] = packing.unpack(value).flatten(0, 1)
    if not isinstance(value, Tensor) or id(value) not in handed:
        raise NotImplementedError(f"the output {name} of a packed row can't be handed back")
    return handed[id(value)]


@torch.compiler.disable
def as_asked(out: Any, backbone: PreTrainedModel, kwargs: dict[str, Any]) -> Any:
    """The output of a packed call with a cache and as a tuple, where the caller expects them."""
    out = mark_unfilled(out, backbone, kwargs)
    return out.to_tuple() if _wants_tuple(backbone, kwargs) else out


def _wants_tuple(backbone: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    return not (getattr(backbone.config, "return_dict", True) if asked is None else asked)
