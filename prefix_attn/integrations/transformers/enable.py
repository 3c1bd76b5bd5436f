"""Shares prefixes inside a transformers model whose callers keep their ordinary batches.

`enable` wraps the forward of a model's decoder: it finds what the rows of a batch share, runs one
packed row in which every shared token lies once, and hands hidden states back in the layout of the
batch. Importing this module also registers `attn_implementation="prefix_attn"`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from prefix_attn.integrations.packing import (
    Packing,
    PackingStats,
    PassThroughError,
    check_can_be_read,
)
from prefix_attn.integrations.transformers import pictures
from prefix_attn.integrations.transformers.attention import EAGER_NAME, SDPA_NAME, mask_making
from prefix_attn.integrations.transformers.caches import generates
from prefix_attn.integrations.transformers.calls import (
    GENERATION,
    as_asked,
    built_masks,
    find_packing,
    run_packed,
    runs_ours,
)
from prefix_attn.integrations.transformers.decoder import Weak, decoder_of
from prefix_attn.integrations.transformers.hooks import check_hooks
from prefix_attn.integrations.transformers.mixers import Mixers
from prefix_attn.integrations.transformers.refusals import refuse_unsupported
from prefix_attn.integrations.transformers.self_check import TESTED_MODEL_TYPES, self_check
from prefix_attn.integrations.transformers.sequence_parallel import SequenceParallel
from prefix_attn.integrations.transformers.token_keywords import checked_names

MIN_RATIO = 1.2

Model = TypeVar("Model", bound=torch.nn.Module)

_backbones: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # the decoders that are enabled


@dataclass
class _Enabled:
    """What `enable` keeps on the decoder."""

    min_ratio: float
    always: bool
    token_keywords: tuple[str, ...]
    check_pending: bool
    implementation: str  # before enable
    forward: Callable[..., Any] | None  # set on the instance before enable
    parameters: list[str]  # names of forward's parameters, in order
    ranks: SequenceParallel | None  # that run one packed row together
    mixers: Mixers
    counts: PackingStats


def enable(
    model: Model,
    *,
    min_ratio: float = MIN_RATIO,
    always: bool = False,
    self_check: bool | None = None,
    share_pictures: bool = True,
    token_keywords: Iterable[str] = (),
    sequence_parallel_group: dist.ProcessGroup | None = None,
    sequence_parallel_inputs: str = "whole",
    sequence_parallel_way: str = "auto",
) -> Model:
    """Computes prefixes that the rows of a batch share once, in every later call of the model.

    Nothing else changes: batches are ordinary, (B, L) with padding on either side or (1, N) rows
    of several sequences, and so are the outputs, except that hidden states of padding are zero.
    Calls that can't be packed or would not gain by it run as before; `stats` counts them.

    Args:
        model: a transformers model with a causal decoder, possibly inside PEFT, DDP, FSDP or
            `torch.compile`.
        min_ratio: a batch is packed if its tokens are at least this many times those of its packed
            row. It counts tokens alone; models narrower than 128 may be slower packed, in small
            batches on a CPU. Rows of several sequences are always packed: otherwise they need a
            mask of N x N.
        always: pack whatever is shared, a single sequence too, so that every call that can be
            packed computes its attention with the same kernel. Log-probabilities of one sequence
            then differ by less between a batch of one and a batch of many.
        self_check: before the next batch, compare packed and ordinary hidden states of a few of
            its tokens, once; by default for types of models that the tests do not cover.
        share_pictures: run the tower of a vision-language model once for each distinct picture of
            a batch. A tower that draws noise in training runs every copy.
        token_keywords: names of keywords with which the decoder is called and that hold something
            for each token, (B, L, ...) tensors such as the experts that a rollout chose. They are
            packed, and tokens are shared only where they are equal. Without this, a keyword that
            may hold something for each token lets the batch pass through.
        sequence_parallel_group: ranks that run each packed row together, one slice of its rows
            each. Every batch is then packed, whatever it shares, and one that can't be is an error
            on every rank. Gradients are those of the SUM of the ranks' losses: see Sequence
            parallelism in the documentation for what that means where gradients are averaged.
        sequence_parallel_inputs: "whole" if every rank of the group is called with the whole batch
            and gets all of its hidden states back; "slices" if rank r of N is called with the
            columns `[r L / N, (r + 1) L / N)` and gets those back.
        sequence_parallel_way: "heads" trades rows for heads in attention; "keys" brings each rank
            the keys and values of the paths of its rows; "auto" takes the one that moves less, by
            the numbers of heads and of shared rows, and "keys" where heads can't be shared evenly.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: if there is no transformers model, or the group is no process group.
        NotImplementedError: if the model's layers would be wrong on a packed row, or on some of its
            rows, naming them. The model is as it was.
        ValueError: if min_ratio is less than 1, if a token keyword is one that `enable` reads
            itself, if there are several transformers models, or if this rank is not in the group.
    """
    if not min_ratio >= 1:
        raise ValueError(f"min_ratio must be at least 1, got {min_ratio}")
    keywords = checked_names(token_keywords)
    backbone = decoder_of(model)
    ranks = SequenceParallel.of(
        backbone, sequence_parallel_group, sequence_parallel_inputs, sequence_parallel_way
    )
    state = backbone.__dict__.get("_prefix_attn")
    if state is not None and runs_ours(backbone):
        state.min_ratio, state.always, state.ranks = min_ratio, always, ranks
        state.token_keywords = keywords
        if self_check is not None:
            state.check_pending = self_check
        _set_sharing_of_pictures(model, backbone, share_pictures)
        return model
    refuse_unsupported(backbone)
    disable(model)
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
    mixers = Mixers(backbone)
    backbone._prefix_attn = _Enabled(
        min_ratio=min_ratio,
        always=always,
        token_keywords=keywords,
        check_pending=(
            backbone.config.model_type not in TESTED_MODEL_TYPES
            if self_check is None
            else self_check
        ),
        implementation=before,
        forward=backbone.__dict__.get("forward"),
        parameters=list(parameters)[1:],
        ranks=ranks,
        mixers=mixers,
        counts=PackingStats(mixers=mixers.served),
    )
    backbone.forward = partial(_forward, Weak(backbone))
    backbone._replicate_for_data_parallel = _refuse_replicas
    _backbones.add(backbone)
    _set_sharing_of_pictures(model, backbone, share_pictures)
    return model


def _set_sharing_of_pictures(
    model: torch.nn.Module, backbone: PreTrainedModel, is_wanted: bool
) -> None:
    if is_wanted:
        pictures.share_pictures(model, backbone)
    else:
        pictures.restore_pictures(model)


def disable(model: Model) -> Model:
    """Undoes `enable`; a model that is not enabled stays as it is.

    Raises:
        RuntimeError: if the decoder's forward was replaced after enable.
    """
    backbone = decoder_of(model)
    state = backbone.__dict__.get("_prefix_attn")
    if state is None:
        return model
    if getattr(backbone.forward, "func", None) is not _forward:
        raise RuntimeError(
            f"the forward of {type(backbone).__name__} was replaced after enable: undo that first"
        )
    state.mixers.check()
    state.mixers.remove()
    pictures.restore_pictures(model)
    del backbone.forward
    if state.forward is not None:
        backbone.forward = state.forward
    del backbone._prefix_attn, backbone._replicate_for_data_parallel
    _backbones.discard(backbone)
    # Another choice since then stays, and a model that shares the config still needs ours.
    if runs_ours(backbone) and not _sharing_config_of(backbone):
        backbone.set_attn_implementation(state.implementation)
    return model


def stats(model: torch.nn.Module) -> PackingStats:
    """What the enabled model did so far.

    Raises:
        ValueError: if the model is not enabled.
    """
    state = decoder_of(model).__dict__.get("_prefix_attn")
    if state is None:
        raise ValueError(f"{type(model).__name__} is not enabled: call prefix_attn.enable first")
    return state.counts


def _refuse_replicas() -> NoReturn:
    raise NotImplementedError(
        "torch.nn.DataParallel does not support prefix_attn: its replicas would run the weights of "
        "the first device. Use DistributedDataParallel"
    )


def _sharing_config_of(backbone: PreTrainedModel) -> list[PreTrainedModel]:
    """The enabled decoders with the same config object: from_config does not copy it."""
    return [other for other in _backbones if other.config is backbone.config]


# Of an enabled decoder only its own forward is compiled: what comes before and after it depends on
# each batch anew.


@torch.compiler.disable(recursive=False)
def _forward(decoder: Weak, *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward after `enable`."""
    self = decoder.module
    state: _Enabled = self._prefix_attn
    kwargs.update(zip(state.parameters, args, strict=False))
    original = state.forward or MethodType(type(self).forward, self)
    packing = _decide(self, state, original, kwargs)
    if packing is not None:
        with state.mixers.packed(packing.layout):
            out = run_packed(self, original, packing, kwargs)
        return as_asked(out, self, kwargs)
    layout = kwargs.get("prefix_layout")
    if layout is not None:
        with state.mixers.packed(layout):
            return original(**kwargs)
    before, mask_making.at_once = mask_making.at_once, True
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
    ranks = state.ranks
    if ranks is not None:
        ranks.gather(backbone, kwargs)
    if state.check_pending and runs_ours(backbone) and not generates(kwargs):
        check_once(backbone, state, original, kwargs)
    try:
        packing = (
            find_packing(backbone, kwargs, state.min_ratio, always=state.always)
            if ranks is None
            else ranks.find_packing(backbone, kwargs)
        )
    except PassThroughError as reason:
        counts.pass_through(str(reason), backbone, GENERATION)
        layout = kwargs.get("prefix_layout")
        if layout is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = layout.position_ids[None]
        if layout is None and "attention_mask" in kwargs:
            kwargs["attention_mask"] = built_masks(kwargs["attention_mask"])
        return None
    counts.packed_calls += 1
    counts.tokens_in += packing.tokens_in
    counts.tokens_run += packing.layout.num_tokens
    return packing


def check_once(
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
        check_can_be_read()
        # PEFT would hand the adapters of this batch's rows to other rows.
        check_hooks(backbone, embeds=kwargs.get("inputs_embeds") is not None)
    except PassThroughError:
        return

    def run(batch: dict[str, Any]) -> Tensor:
        hidden: Tensor = original(**batch, use_cache=False, return_dict=True).last_hidden_state
        return hidden

    def packed(batch: dict[str, Any]) -> Tensor | None:
        try:
            packing = find_packing(backbone, {**batch, "use_cache": False}, min_ratio=1.0)
        except PassThroughError:
            return None
        with state.mixers.packed(packing.layout):
            hidden: Tensor = run_packed(backbone, original, packing, batch).last_hidden_state
        return hidden

    self_check(backbone, tokens, run, packed)
    state.check_pending = False
