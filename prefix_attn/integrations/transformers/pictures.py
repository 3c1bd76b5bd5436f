"""Runs the tower of a vision-language model once for each distinct picture of a batch.

The members of a group hold the same pictures. `share_pictures` wraps the methods that turn pictures
into features: pictures are compared bit for bit, distinct ones run, and every copy is handed its
features. The gradient of a picture's features is the sum over its copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from prefix_attn.integrations.packing import (
    PassThroughError,
    bits_of,
    check_can_be_read,
    checksums,
)
from prefix_attn.integrations.transformers.attention import HARMLESS
from prefix_attn.integrations.transformers.decoder import Weak
from prefix_attn.recurrence import HandBack

METHODS = ("get_image_features", "get_video_features")
# Types of models whose pictures are told apart below; the tests compare each with ordinary batches.
PICTURE_MODELS = frozenset(
    {
        "gemma3",
        "gemma4",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "paligemma",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "vipllava",
    }
)
# (n, 3) patches of each picture in time, height and width; the patches of all lie end to end.
GRIDS = ("image_grid_thw", "video_grid_thw")
FRAMES = "num_frames_per_video"  # (n,), where the frames of all videos lie end to end
PADDED = "pixel_attention_mask"  # where each row of the batch has as many pictures, some of zeros
# (n, P, 2) places of patches, -1 at padding that has no features.
PLACES = ("image_position_ids", "video_position_ids")
IN_ROWS = "batch_num_images"  # (B,), pictures in each row of the batch
# What has an entry for each picture.
PER_PICTURE = frozenset({*GRIDS, *PLACES, FRAMES, PADDED, "image_sizes"})
# The only fields of a tower's output that come back where pictures repeat.
FEATURES, LAYERS_OF_FEATURES = "pooler_output", "deepstack_features"


@dataclass
class _Shared:
    """What `share_pictures` keeps on the model that owns the tower."""

    decoder: PreTrainedModel
    originals: dict[str, Callable[..., Any] | None]  # by name; set on the instance before
    running: bool = False  # one of the methods may call the other


@dataclass(frozen=True, eq=False)
class _Pictures:
    """The n pictures of one call of a tower.

    Attributes:
        parts: by keyword, what holds something for each of them, end to end along the first
            dimension, and how many entries each picture has there.
        weights: (n,) what the number of features of each is proportional to.
        rows: pictures in each row of the batch, if they came with padding, else None.
    """

    parts: dict[str, tuple[Tensor, list[int]]]
    weights: list[int]
    rows: list[int] | None = None


def share_pictures(model: torch.nn.Module, decoder: PreTrainedModel) -> None:
    """Lets the tower that feeds a decoder run once for each distinct picture.

    A model without a tower stays as it is, and one whose pictures are shared already.

    Args:
        model: that holds the decoder.
        decoder: that is enabled; its counts are kept.
    """
    owner = _owner_of(model, decoder)
    if owner is None or "_prefix_attn_pictures" in owner.__dict__:
        return
    names = [name for name in METHODS if hasattr(type(owner), name)]
    owner._prefix_attn_pictures = _Shared(decoder, {n: owner.__dict__.get(n) for n in names})
    for name in names:
        features = partial(_features, Weak(owner), name)
        features.__signature__ = _signature(getattr(owner, name))  # type: ignore[attr-defined]
        setattr(owner, name, features)


def restore_pictures(model: torch.nn.Module) -> None:
    """Undoes `share_pictures`."""
    for owner in model.modules():
        shared = owner.__dict__.get("_prefix_attn_pictures")
        if shared is None:
            continue
        for name, original in shared.originals.items():
            if getattr(owner.__dict__.get(name), "func", None) is not _features:
                continue  # replaced since then; without an enabled decoder ours does nothing
            delattr(owner, name)
            if original is not None:
                setattr(owner, name, original)
        del owner._prefix_attn_pictures


def _owner_of(model: torch.nn.Module, decoder: PreTrainedModel) -> PreTrainedModel | None:
    """The innermost model that computes features of pictures for a decoder, or None."""
    owner = None
    for module in model.modules():  # outer ones come first
        has_tower = any(hasattr(type(module), name) for name in METHODS)
        if module is not decoder and has_tower and any(m is decoder for m in module.modules()):
            owner = module
    return owner


@torch.compiler.disable(recursive=False)
def _features(owner: Weak, name: str, *args: Any, **kwargs: Any) -> Any:
    """`get_image_features` or `get_video_features` after `share_pictures`."""
    model = owner.module
    shared: _Shared | None = model.__dict__.get("_prefix_attn_pictures")
    before = shared.originals[name] if shared else None
    original = before or MethodType(getattr(type(model), name), model)
    state = shared.decoder.__dict__.get("_prefix_attn") if shared else None
    if shared is None or state is None or shared.running:
        return original(*args, **kwargs)
    call = _by_name(original, args, kwargs)
    counts = state.counts
    kept: list[int] = []
    copy_of: list[int] = []
    shared.running = True
    try:
        try:
            pictures = _read(model, call, HARMLESS.union(state.token_keywords))
            kept, copy_of = _distinct(pictures)
            if len(kept) < len(copy_of):
                _refuse_noise(model, shared.decoder)
        except PassThroughError as reason:
            counts.pictures_repeated[str(reason)] += 1
            kept = copy_of
        counts.pictures_in += len(copy_of)
        counts.pictures_run += len(kept)
        if len(kept) == len(copy_of):
            return original(*args, **kwargs)
        return _hand_out(original(**_selected(call, pictures, kept)), pictures, kept, copy_of)
    finally:
        shared.running = False


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Names and defaults, by which generation chooses what it hands to a tower.

    Annotations are left out: copies and pickles of a model hold the signature.
    """
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


def _by_name(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by keyword, the pixels first."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    call: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        call.update(value if rest else {name: value})
    return call


# ---- reading a call -----------------------------------------------------------------------------


def _read(model: PreTrainedModel, call: dict[str, Any], harmless: frozenset[str]) -> _Pictures:
    """Finds the pictures of a call.

    Args:
        model: that owns the tower.
        call: arguments by keyword, the pixels first.
        harmless: keywords for the decoder and the loss, which models hand to their tower as well.

    Raises:
        PassThroughError: with the reason why pictures can't be told apart.
    """
    if model.config.model_type not in PICTURE_MODELS:
        raise PassThroughError(f"pictures of {model.config.model_type!r} are not known")
    check_can_be_read()
    name, pixels = next(iter(call.items()))
    for asked in ("output_hidden_states", "output_attentions"):
        if call.get(asked):
            raise PassThroughError(f"{asked} of the tower")
    if not isinstance(pixels, Tensor):
        raise PassThroughError(f"{name} is a {type(pixels).__name__}, not a tensor")
    if torch.is_grad_enabled() and pixels.requires_grad:
        raise PassThroughError(f"the gradient of {name} is wanted")
    tensors = {k: x for k, x in call.items() if isinstance(x, Tensor) and x.dim()}
    others = {k: x for k, x in tensors.items() if k != name and k not in harmless}
    for other, x in others.items():
        one_each = other == IN_ROWS and len(x) == len(pixels) and bool((x == 1).all())
        if other not in PER_PICTURE and not one_each:
            raise PassThroughError(f"the keyword {other}")
    if pixels.dim() == 5 and PADDED in call:
        return _read_padded(name, pixels, others.get(PADDED))
    sizes = _sizes(name, pixels, others)
    parts = {name: (pixels, sizes)}
    for other, x in others.items():
        if len(x) == len(pixels):
            parts[other] = x, sizes
        elif len(x) == len(sizes):
            parts[other] = x, [1] * len(sizes)
        else:
            raise PassThroughError(f"{other} has {len(x)} entries for {len(sizes)} pictures")
    places = next((others[k] for k in PLACES if k in others), None)
    if places is None:
        return _Pictures(parts, sizes)
    filled = (places != -1).all(-1).sum(-1)
    return _Pictures(parts, [int(x.sum()) for x in filled.cpu().split(sizes)])


def _sizes(name: str, pixels: Tensor, others: dict[str, Tensor]) -> list[int]:
    """How many entries of pixels each picture has."""
    grid = next((others[k] for k in GRIDS if k in others), None)
    if grid is not None:
        sizes = grid.prod(-1).tolist()
    elif FRAMES in others:
        sizes = others[FRAMES].tolist()
    else:
        return [1] * len(pixels)
    if sum(sizes) != len(pixels):
        raise PassThroughError(f"{name} has {len(pixels)} entries, {sum(sizes)} by its grid")
    return sizes


def _read_padded(name: str, pixels: Tensor, mask: Tensor | None) -> _Pictures:
    """Pictures (B, n, C, H, W), of which those of zeros are padding, as the models say it."""
    real = (pixels != 0).flatten(2).any(-1)
    rows = real.sum(1).tolist()
    if not sum(rows):
        raise PassThroughError("pictures of zeros")
    parts = {name: (pixels[real], [1] * sum(rows))}
    if mask is not None:
        parts[PADDED] = mask[real], [1] * sum(rows)
    return _Pictures(parts, [1] * sum(rows), rows)


def _distinct(pictures: _Pictures) -> tuple[list[int], list[int]]:
    """Compares pictures bit for bit.

    Returns:
        The numbers of distinct pictures, and for each picture the place of its like among them.

    Raises:
        PassThroughError: if two different pictures were taken for one.
    """
    bits = {k: bits_of(_rows(x)).split(sizes) for k, (x, sizes) in pictures.parts.items()}
    sums = {k: _sums(x).cpu().split(sizes) for k, (x, sizes) in pictures.parts.items()}
    keys = [tuple(tuple(x.tolist()) for x in one) for one in zip(*sums.values(), strict=True)]
    places: dict[Any, int] = {}
    kept: list[int] = []
    copy_of: list[int] = []
    for i, key in enumerate(keys):
        if key not in places:
            places[key] = len(kept)
            kept.append(i)
        copy_of.append(places[key])
    same = [
        (part[i] == part[kept[place]]).all()
        for part in bits.values()
        for i, place in enumerate(copy_of)
        if kept[place] != i
    ]
    if same and not bool(torch.stack(same).all()):
        raise PassThroughError("pictures differ where their checksums agree")
    return kept, copy_of


def _rows(x: Tensor) -> Tensor:
    """(n, ...) -> (n, K)."""
    return x.reshape(len(x), -1)


def _sums(x: Tensor) -> Tensor:
    """(n, ...) -> (n,) int64, equal where entries are, bit for bit: sums of sums of sums."""
    bits = bits_of(x if x.dim() > 1 else x[:, None])
    while bits.dim() > 1:
        shape = bits.shape[:-1]
        sums = checksums(bits.flatten(0, -2)).view(shape)
        bits = bits_of(sums) if sums.dim() > 1 else sums
    return bits


def _refuse_noise(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Raises PassThroughError if copies of a picture would get different features in training."""
    inside = set(decoder.modules())
    for name, module in model.named_modules():
        if not module.training or module in inside:
            continue
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise PassThroughError(f"{name} normalises over the pictures of a batch in training")
        values = dict(vars(module))
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            values["drop"] = module.p
        config = values.get("config")
        if config is not None and config is not model.config and config is not decoder.config:
            values |= {f"config.{k}": x for k, x in vars(config).items()}
        for key, value in values.items():
            if "drop" in key and type(value) in (int, float) and value > 0:
                raise PassThroughError(f"{name} ({type(module).__name__}) drops in training: {key}")


# ---- running the distinct ones ------------------------------------------------------------------


def _selected(call: dict[str, Any], pictures: _Pictures, kept: Sequence[int]) -> dict[str, Any]:
    """The call with the distinct pictures alone."""
    selected = dict(call)
    for name, (x, sizes) in pictures.parts.items():
        pieces = x.split(sizes)
        chosen = torch.cat([pieces[i] for i in kept])
        selected[name] = chosen if pictures.rows is None else chosen[:, None]
    return selected


def _hand_out(
    out: Any, pictures: _Pictures, kept: Sequence[int], copy_of: Sequence[int]
) -> ModelOutput:
    """The output of a tower that ran distinct pictures, as if all had run: their features alone."""
    if not isinstance(out, ModelOutput) or getattr(out, FEATURES, None) is None:
        raise NotImplementedError(
            f"the tower returned a {type(out).__name__} without {FEATURES}, which can't be handed "
            "to the copies of a picture: call prefix_attn.enable(model, share_pictures=False)"
        )
    weights = [pictures.weights[i] for i in kept]
    features: dict[str, Any] = {
        FEATURES: _copies(getattr(out, FEATURES), weights, copy_of, pictures.rows)
    }
    layers = getattr(out, LAYERS_OF_FEATURES, None)
    if layers is not None:
        features[LAYERS_OF_FEATURES] = [_copies(x, weights, copy_of, None) for x in layers]
    # Before transformers 5.24 some set them on outputs that have no such field.
    has_fields = features.keys() <= {field.name for field in fields(out)}
    return (type(out) if has_fields else BaseModelOutputWithPooling)(**features)


def _copies(
    features: Tensor | Sequence[Tensor],
    weights: Sequence[int],
    copy_of: Sequence[int],
    rows: list[int] | None,
) -> Tensor | Sequence[Tensor]:
    """The features of every copy of a picture; a gradient is the sum over its copies.

    Args:
        features: of distinct pictures: (n, ...) each, or those of all end to end.
        weights: what the number of features of each is proportional to.
        copy_of: for each picture its place among the distinct ones.
        rows: pictures in each row of the batch, where the features of a row go together.
    """
    whole = features if isinstance(features, Tensor) else torch.cat(list(features))
    if isinstance(features, Tensor):
        lengths = [len(whole) * weight // sum(weights) for weight in weights]
    else:
        lengths = [len(x) for x in features]
    if len(lengths) != len(weights) or sum(lengths) != len(whole):
        raise NotImplementedError(
            f"the tower returned {len(whole)} features for {len(weights)} pictures: call "
            "prefix_attn.enable(model, share_pictures=False)"
        )
    places = torch.arange(len(whole), device=whole.device).split(lengths)
    index = torch.cat([places[i] for i in copy_of])
    copied: Tensor = HandBack.apply(whole, index[None])[0]
    if isinstance(features, Tensor):
        return copied
    each = [lengths[i] for i in copy_of]
    if rows is not None:
        ends = torch.tensor(rows).cumsum(0).tolist()
        each = [sum(each[end - n : end]) for n, end in zip(rows, ends, strict=True)]
    split: tuple[Tensor, ...] = copied.split(each)
    return split if isinstance(features, tuple) else list(split)
