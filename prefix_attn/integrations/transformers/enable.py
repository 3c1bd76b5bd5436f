"""Shares prefixes inside a transformers model whose callers keep their ordinary batches.

`enable` wraps the forward of a model's decoder: it finds what the rows of a batch share, runs one
packed row in which every shared token lies once, and hands hidden states back in the layout of the
batch. Importing this module also registers `attn_implementation="prefix_attn"`.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.integrations.transformers.attention import (
    EAGER_NAME,
    SDPA_NAME,
    LazyMask,
    PackedMask,
    mask_making,
    splits_rows,
)
from prefix_attn.integrations.transformers.caches import generates, makes_cache, mark_unfilled
from prefix_attn.integrations.transformers.hooks import check_adapters, check_hooks
from prefix_attn.integrations.transformers.packing import (
    SINGLE,
    Packing,
    PassThroughError,
    Split,
    check_content,
    content_of,
    gradient_is_wanted,
    pack_batch,
)
from prefix_attn.integrations.transformers.refusals import refuse_unsupported
from prefix_attn.integrations.transformers.self_check import TESTED_MODEL_TYPES, self_check

MIN_RATIO = 1.2
WARN_AFTER = 20
GENERATION = "past_key_values or use_cache=True"
JUMPS_IN_CACHE = "position_ids jump in a call that makes a cache: one sequence"

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

# Keywords of packed rows for flash attention: the layout says the same.
ROW_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Keywords for the head: a decoder that knows one would drop packed rows.
HEAD_KEYWORDS = ("labels", "shift_labels", "logits_to_keep")
LEFT_OUT = frozenset({*ROW_KEYWORDS, *HEAD_KEYWORDS})
HANDLED = LEFT_OUT | {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}

Model = TypeVar("Model", bound=torch.nn.Module)

_backbones: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # the decoders that are enabled


@dataclass
class PackingStats:
    """What `enable` did so far.

    Attributes:
        calls: of the decoder.
        packed_calls: calls that ran as one packed row.
        tokens_in: tokens of the packed calls' batches, padding left out.
        tokens_run: rows that ran instead.
        passed_through: how many calls were not packed, by reason.
    """

    calls: int = 0
    packed_calls: int = 0
    tokens_in: int = 0
    tokens_run: int = 0
    passed_through: Counter[str] = field(default_factory=Counter)

    @property
    def ratio(self) -> float:
        """Tokens in over tokens run, 1 before the first packed call."""
        return self.tokens_in / self.tokens_run if self.tokens_run else 1.0


@dataclass
class _Enabled:
    """What `enable` keeps on the decoder."""

    min_ratio: float
    always: bool
    check_pending: bool
    implementation: str  # before enable
    forward: Callable[..., Any] | None  # set on the instance before enable
    parameters: list[str]  # names of forward's parameters, in order
    counts: PackingStats = field(default_factory=PackingStats)
    warned: bool = False


class _Weak:
    """The decoder, for its own forward.

    A strong reference would be a cycle, with which the memory of a deleted model waits for Python's
    collector. Copied and pickled, it refers to the copy of the decoder.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self._reference = weakref.ref(module)

    @property
    def module(self) -> PreTrainedModel:
        module = self._reference()
        if module is None:
            raise ReferenceError(
                "the enabled model was deleted, only its forward is left: keep the model"
            )
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return _Weak, (self.module,)


def enable(
    model: Model,
    *,
    min_ratio: float = MIN_RATIO,
    always: bool = False,
    self_check: bool | None = None,
) -> Model:
    """Computes prefixes that the rows of a batch share once, in every later call of the model.

    Nothing else changes: batches are ordinary, (B, L) with padding on either side or (1, N) rows
    of several sequences, and so are the outputs, except that hidden states of padding are zero.
    Calls that can't be packed or would not gain by it run as before; `stats` counts them.

    Args:
        model: a transformers model with a causal decoder, possibly inside PEFT, DDP, FSDP or
            `torch.compile`.
        min_ratio: a batch is packed if its tokens are at least this many times those of its packed
            row. Rows of several sequences are always packed: otherwise they need a mask of N x N.
        always: pack whatever is shared, a single sequence too, so that every call that can be
            packed computes its attention with the same kernel. Log-probabilities of one sequence
            then differ by less between a batch of one and a batch of many.
        self_check: before the first batch, compare packed and ordinary hidden states of a few of
            its tokens; by default for types of models that the tests do not cover.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: if there is no transformers model.
        NotImplementedError: if the model's layers would be wrong on a packed row, naming them.
        ValueError: if min_ratio is less than 1, or if there are several transformers models.
    """
    if not min_ratio >= 1:
        raise ValueError(f"min_ratio must be at least 1, got {min_ratio}")
    backbone = _decoder(model)
    state = backbone.__dict__.get("_prefix_attn")
    if state is not None and _runs_ours(backbone):
        state.min_ratio, state.always = min_ratio, always
        return model
    disable(model)
    refuse_unsupported(backbone)
    before = backbone.config._attn_implementation
    for other in _sharing_config_of(backbone):
        before = other._prefix_attn.implementation  # what it was before the first of them
    name = EAGER_NAME if before in ("eager", EAGER_NAME) else SDPA_NAME
    backbone.set_attn_implementation(name)
    if backbone.config._attn_implementation != name:  # transformers only warns
        raise NotImplementedError(
            f"{type(backbone).__name__} does not let its attention implementation be set"
        )
    parameters = inspect.signature(type(backbone).forward).parameters
    backbone._prefix_attn = _Enabled(
        min_ratio=min_ratio,
        always=always,
        check_pending=(
            backbone.config.model_type not in TESTED_MODEL_TYPES
            if self_check is None
            else self_check
        ),
        implementation=before,
        forward=backbone.__dict__.get("forward"),
        parameters=list(parameters)[1:],
    )
    backbone.forward = partial(_forward, _Weak(backbone))
    backbone._replicate_for_data_parallel = _refuse_replicas
    _backbones.add(backbone)
    return model


def disable(model: Model) -> Model:
    """Undoes `enable`; a model that is not enabled stays as it is.

    Raises:
        RuntimeError: if the decoder's forward was replaced after enable.
    """
    backbone = _decoder(model)
    state = backbone.__dict__.get("_prefix_attn")
    if state is None:
        return model
    if getattr(backbone.forward, "func", None) is not _forward:
        raise RuntimeError(
            f"the forward of {type(backbone).__name__} was replaced after enable: undo that first"
        )
    del backbone.forward
    if state.forward is not None:
        backbone.forward = state.forward
    del backbone._prefix_attn, backbone._replicate_for_data_parallel
    _backbones.discard(backbone)
    # Another choice since then stays, and a model that shares the config still needs ours.
    if _runs_ours(backbone) and not _sharing_config_of(backbone):
        backbone.set_attn_implementation(state.implementation)
    return model


def stats(model: torch.nn.Module) -> PackingStats:
    """What the enabled model did so far.

    Raises:
        ValueError: if the model is not enabled.
    """
    state = _decoder(model).__dict__.get("_prefix_attn")
    if state is None:
        raise ValueError(f"{type(model).__name__} is not enabled: call prefix_attn.enable first")
    return state.counts


def _decoder(model: torch.nn.Module) -> PreTrainedModel:
    """The module that runs the layers, inside whatever wraps the model."""
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    inner = {id(part) for _, m in named for part in m.modules() if part is not m}
    outer = [name for name, m in named if id(m) not in inner]
    if len(outer) > 1:
        raise ValueError(
            f"{type(model).__name__} holds several transformers models ({', '.join(outer)}): "
            "call prefix_attn's functions with one of them at a time"
        )
    for _, module in named:
        for decoder in (module.get_decoder(), module.base_model):  # some call their head so
            if isinstance(decoder, PreTrainedModel):
                return _without_head(decoder)
    raise TypeError(f"expected a transformers model, got {type(model).__name__}")


def _without_head(decoder: PreTrainedModel) -> PreTrainedModel:
    """The model inside one with a head: Mllama and others have a decoder with its own."""
    while decoder.get_output_embeddings() is not None:
        parts = (m for m in decoder.modules() if isinstance(m, PreTrainedModel))
        inner = next((m for m in parts if m is not decoder), None)
        if inner is None:
            raise NotImplementedError(
                f"prefix_attn can't enable {type(decoder).__name__}: its layers and its head are "
                "one module. Run it without enable"
            )
        decoder = inner
    return decoder


def _refuse_replicas() -> NoReturn:
    raise NotImplementedError(
        "torch.nn.DataParallel does not support prefix_attn: its replicas would run the weights of "
        "the first device. Use DistributedDataParallel"
    )


def _runs_ours(backbone: PreTrainedModel) -> bool:
    return backbone.config._attn_implementation in (SDPA_NAME, EAGER_NAME)


def _sharing_config_of(backbone: PreTrainedModel) -> list[PreTrainedModel]:
    """The enabled decoders with the same config object: from_config does not copy it."""
    return [other for other in _backbones if other.config is backbone.config]


# Of an enabled decoder only its own forward is compiled: what comes before and after it depends on
# each batch anew.


@torch.compiler.disable(recursive=False)
def _forward(decoder: _Weak, *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward after `enable`."""
    self = decoder.module
    state: _Enabled = self._prefix_attn
    kwargs.update(zip(state.parameters, args, strict=False))
    original = state.forward or MethodType(type(self).forward, self)
    packing = _decide(self, state, original, kwargs)
    if packing is not None:
        return _as_asked(_run_packed(original, packing, kwargs), self, kwargs)
    before = mask_making.at_once
    mask_making.at_once = kwargs.get("prefix_layout") is None
    try:
        return original(**kwargs)
    finally:
        mask_making.at_once = before


@torch.compiler.disable
def _decide(
    backbone: PreTrainedModel,
    state: _Enabled,
    original: Callable[..., Any],
    kwargs: dict[str, Any],
) -> Packing | None:
    """Packs the batch of a call, or prepares the call to run as it is; counts both."""
    counts = state.counts
    counts.calls += 1
    if state.check_pending and _runs_ours(backbone) and not generates(kwargs):
        _check_once(backbone, state, original, kwargs)
    try:
        packing = _find_packing(backbone, kwargs, state.min_ratio, always=state.always)
    except PassThroughError as reason:
        counts.passed_through[str(reason)] += 1
        _warn_if_idle(backbone, state)
        layout = kwargs.get("prefix_layout")
        if layout is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = layout.position_ids[None]
        if layout is None:
            _build_masks(kwargs.get("attention_mask"))
        return None
    counts.packed_calls += 1
    counts.tokens_in += packing.tokens_in
    counts.tokens_run += packing.layout.num_tokens
    return packing


@torch.compiler.disable
def _as_asked(out: Any, backbone: PreTrainedModel, kwargs: dict[str, Any]) -> Any:
    """The output of a packed call with a cache and as a tuple, where the caller expects them."""
    out = mark_unfilled(out, backbone, kwargs)
    return out.to_tuple() if _wants_tuple(backbone, kwargs) else out


def _find_packing(
    backbone: PreTrainedModel, kwargs: dict[str, Any], min_ratio: float, *, always: bool = False
) -> Packing:
    """Packs the batch of a call, or raises PassThroughError with the reason why not."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    mask, position_ids = _plain_mask(kwargs.get("attention_mask")), kwargs.get("position_ids")
    if kwargs.get("prefix_layout") is not None:
        if not _runs_ours(backbone):
            raise RuntimeError(
                f"the attention implementation of {type(backbone).__name__} is "
                f"{backbone.config._attn_implementation!r}, which would ignore the prefix_layout: "
                "it was changed after enable, here or in a model with the same config object. Call "
                "prefix_attn.enable(model) again"
            )
        raise PassThroughError("the caller passes a prefix_layout")
    if generates(kwargs):
        raise PassThroughError(GENERATION)
    if not _runs_ours(backbone):  # chosen by the caller, or for a model with the same config object
        name = backbone.config._attn_implementation
        raise PassThroughError(f"attn_implementation is {name!r} since enable")
    if kwargs.get("output_attentions") or getattr(backbone.config, "output_attentions", False):
        raise PassThroughError("output_attentions")
    if kwargs.get("is_causal") is False:
        raise PassThroughError("is_causal=False")
    check_hooks(backbone, embeds=embeds is not None)
    for name, value in kwargs.items():
        if name not in HANDLED and _holds_tokens(value):
            raise PassThroughError(f"the keyword {name}")
    tokens = ids if embeds is None else embeds
    if tokens is None or (ids is not None and embeds is not None):
        raise PassThroughError("not exactly one of input_ids and inputs_embeds")
    if tokens.dim() != (2 if embeds is None else 3) or not tokens.numel():
        raise PassThroughError(f"tokens of shape {tuple(tokens.shape)}")
    shape = tokens.shape[:2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        raise PassThroughError("attention_mask is not of shape (B, L)")
    positions = _as_kinds(position_ids, shape)
    if _ran_flash(backbone) and shape[0] == 1:
        if mask is not None and bool((mask != 0).all()):
            mask = None  # as transformers does for flash attention
        if mask is None:
            _refuse_slices(positions)
            positions = _with_places(positions, kwargs)
    split = Split.NEVER if mask is not None else _split(backbone, kwargs, positions)
    if shape[0] == 1 and not always:
        _pass_single_sequence(mask, positions, split)
    if embeds is not None and torch.is_grad_enabled() and gradient_is_wanted(embeds):
        raise PassThroughError("the gradient of inputs_embeds itself is wanted")
    packing = pack_batch(
        tokens if embeds is None else content_of(embeds),
        mask,
        positions,
        min_ratio=min_ratio,
        always=always,
        split=split,
        same_range=_rope_reads_range(backbone.config),
    )
    if embeds is not None:
        check_content(embeds, packing)
    return packing


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
        masks = made.values() if isinstance(made, dict) else [made]
        return Split.JUMPS if all(splits_rows(mask) for mask in masks) else Split.NEVER
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
            f"the row starts at position {first}: it is a slice of a longer one. "
            "Slices of sequence-parallel rows are not supported"
        )


def _pass_single_sequence(mask: Tensor | None, positions: Tensor | None, split: Split) -> None:
    """Raises PassThroughError for a batch of one row that is known to hold one sequence."""
    if mask is not None or positions is None:
        raise PassThroughError(SINGLE)
    if split is Split.NEVER:
        jumps = len(positions) == 1 and bool((positions[0].diff() != 1).any())
        raise PassThroughError(JUMPS_IN_CACHE if jumps else SINGLE)


def _check_once(
    backbone: PreTrainedModel,
    state: _Enabled,
    original: Callable[..., Any],
    kwargs: dict[str, Any],
) -> None:
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or not tokens.numel():
        return
    try:
        check_adapters(backbone)  # PEFT would hand those of this batch's rows to other rows
    except PassThroughError:
        return

    def run(batch: dict[str, Any]) -> Tensor:
        hidden: Tensor = original(**batch, use_cache=False, return_dict=True).last_hidden_state
        return hidden

    def run_packed(batch: dict[str, Any]) -> Tensor | None:
        try:
            packing = _find_packing(backbone, {**batch, "use_cache": False}, min_ratio=1.0)
        except PassThroughError:
            return None
        hidden: Tensor = _run_packed(original, packing, batch).last_hidden_state
        return hidden

    self_check(backbone, tokens, run, run_packed)
    state.check_pending = False


def _plain_mask(mask: Any) -> Any:
    """The (B, L) mask from which an outer model made the masks of the decoder's layers."""
    made = list(mask.values()) if isinstance(mask, dict) else [mask]
    if not made or not all(isinstance(one, LazyMask) for one in made):
        return mask
    if any(one.adds_rules for one in made):
        raise PassThroughError("attention_mask adds rules to the causal mask")
    first, *others = (one.arguments.get("attention_mask") for one in made)
    for other in others:
        if other is not first and (other is None or first is None or not other.equal(first)):
            raise PassThroughError("attention_mask differs between layers")
    return first


def _build_masks(mask: Any) -> None:
    """Builds the masks that an outer model made, for a batch that runs as it is."""
    for one in mask.values() if isinstance(mask, dict) else [mask]:
        if isinstance(one, LazyMask):
            one.build()


def _as_kinds(position_ids: Any, shape: torch.Size) -> Tensor | None:
    """(1 or B, L) or (K, 1 or B, L) position ids as (K, B, L)."""
    if position_ids is None:
        return None
    if not isinstance(position_ids, Tensor) or position_ids.dim() not in (2, 3):
        raise PassThroughError("position_ids have an unknown shape")
    kinds = position_ids if position_ids.dim() == 3 else position_ids[None]
    if kinds.shape[1] not in (1, shape[0]) or kinds.shape[2] != shape[1]:
        raise PassThroughError("position_ids have an unknown shape")
    if position_ids.dim() == 3 and len(kinds) not in (3, 4):
        raise PassThroughError("position_ids have an unknown shape")
    return kinds.expand(-1, shape[0], -1)


def _holds_tokens(value: Any) -> bool:
    """Whether a keyword may hold something for each token."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(_holds_tokens(v) for v in value)


def _rope_reads_range(config: Any) -> bool:
    """Whether the rotary frequencies depend on the largest position in the batch."""
    text = repr(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    return "'dynamic'" in text or "'longrope'" in text


def _wants_tuple(backbone: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    return not (getattr(backbone.config, "return_dict", True) if asked is None else asked)


@torch.compiler.disable(recursive=False)
def _run_packed(original: Callable[..., Any], packing: Packing, kwargs: dict[str, Any]) -> Any:
    """Runs the packed row and hands every output back in the layout of the batch."""
    out = original(**_packed_call(packing, kwargs))
    return _hand_back_all(out, packing)


@torch.compiler.disable
def _packed_call(packing: Packing, kwargs: dict[str, Any]) -> dict[str, Any]:
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
    call.update(
        attention_mask=PackedMask(packing.layout),
        use_cache=False,
        return_dict=True,
        prefix_layout=packing.layout,
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
    tokens = packing.layout.num_tokens
    if isinstance(value, Tensor) and id(value) not in handed:
        if value.dim() == 3 and value.shape[:2] == (1, tokens):
            handed[id(value)] = packing.unpack(value[0])
        elif value.dim() == 2 and value.shape[0] == tokens:  # router logits: places end to end
            handed[id(value)] = packing.unpack(value).flatten(0, 1)
    if not isinstance(value, Tensor) or id(value) not in handed:
        raise NotImplementedError(f"the output {name} of a packed row can't be handed back")
    return handed[id(value)]


def _warn_if_idle(backbone: PreTrainedModel, state: _Enabled) -> None:
    """Warns once if many calls that were not generation were never packed."""
    counts = state.counts
    tried = counts.calls - counts.passed_through[GENERATION]
    if state.warned or counts.packed_calls or tried < WARN_AFTER:
        return
    state.warned = True
    reasons = ", ".join(
        f"{reason} ({n} calls)"
        for reason, n in counts.passed_through.most_common()
        if reason != GENERATION
    )
    warnings.warn(
        f"prefix_attn is enabled on {type(backbone).__name__} but none of {tried} calls was "
        f"packed: {reasons}",
        stacklevel=3,
    )
