"""Shares prefixes inside a Megatron-core GPTModel whose callers keep their ordinary batches.

`enable` wraps the forward of a model's decoder: it finds what the sequences of a batch share, runs
one packed row in which every shared token lies once, and hands hidden states back in the layout of
the batch. Embedding, multi-token prediction, head and loss stay ordinary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.utils import WrappedTensor, make_viewless_tensor
from torch import Tensor

from prefix_attn.integrations.megatron.attention import (
    make_latent_table,
    row_params,
    run_core_attention,
    run_latent_projections,
)
from prefix_attn.integrations.megatron.calls import INFERENCE, PackedRow, find_row, has_places
from prefix_attn.integrations.megatron.moe import forget_row, remember_row, route, run_moe
from prefix_attn.integrations.megatron.refusals import refuse_unsupported
from prefix_attn.integrations.packing import HandBack, PackingStats, PassThroughError

MIN_RATIO = 1.2

Model = TypeVar("Model")


@dataclass
class _Enabled:
    """What `enable` keeps on the model.

    Attributes:
        min_ratio: as `enable` takes it.
        call: arguments of the call of the model that is running.
        replaced: objects and names of their attributes that hide those of their class.
        hooks: to be removed.
        counts: what `stats` returns.
    """

    min_ratio: float
    call: dict[str, Any] | None = None
    replaced: list[tuple[torch.nn.Module, str]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    counts: PackingStats = field(default_factory=PackingStats)


def enable(model: Model, *, min_ratio: float = MIN_RATIO) -> Model:
    """Computes prefixes that the sequences of a batch share once, in every later call of the model.

    Nothing else changes: batches are ordinary, (B, S) with a causal mask and padding on the right,
    or one row of several sequences with `packed_seq_params` (thd), and so are the outputs, except
    that hidden states of padding are zero. Calls that can't be packed or would not gain by it run
    as before; `stats` counts them. Parameters, their names and checkpoints stay as they are.

    Args:
        model: a Megatron-core GPTModel, possibly inside DDP, Float16Module or another wrapper, or a
            list with one for each virtual stage of a pipeline. Every rank has to enable its own.
        min_ratio: a batch is packed if its tokens are at least this many times those of its packed
            row.

    Returns:
        The model, changed in place.

    Raises:
        TypeError: if there is no GPTModel.
        NotImplementedError: if the model would be wrong on a packed row, with all reasons.
        ValueError: if min_ratio is less than 1.
    """
    if not min_ratio >= 1:
        raise ValueError(f"min_ratio must be at least 1, got {min_ratio}")
    gpts = _gpts_of(model)
    for gpt in gpts:
        refuse_unsupported(gpt)
    for gpt in gpts:
        state = gpt.__dict__.get("_prefix_attn")
        if state is None:
            _enable(gpt, min_ratio)
        else:
            state.min_ratio = min_ratio
    return model


def disable(model: Model) -> Model:
    """Undoes `enable`; a model that is not enabled stays as it is.

    Raises:
        RuntimeError: if a forward was replaced after enable.
    """
    for gpt in _gpts_of(model):
        state: _Enabled | None = gpt.__dict__.get("_prefix_attn")
        if state is None:
            continue
        for owner, name in state.replaced:
            replacement = owner.__dict__.get(name)
            function = getattr(replacement, "func", None)
            if not str(getattr(function, "__module__", "")).startswith(__package__):
                raise RuntimeError(
                    f"{name} of {type(owner).__name__} was replaced after enable: undo that first"
                )
        for owner, name in state.replaced:
            replacement = owner.__dict__.pop(name)
            before = replacement.args[1]
            if getattr(before, "__func__", None) is not getattr(type(owner), name):
                setattr(owner, name, before)
        for hook in state.hooks:
            hook.remove()
        del gpt._prefix_attn
    return model


def stats(model: Any) -> PackingStats:
    """What the enabled model did so far, the sum over its virtual stages.

    Raises:
        ValueError: if the model is not enabled.
    """
    total = PackingStats()
    for gpt in _gpts_of(model):
        state: _Enabled | None = gpt.__dict__.get("_prefix_attn")
        if state is None:
            raise ValueError(
                f"{type(gpt).__name__} is not enabled: call "
                "prefix_attn.integrations.megatron.enable first"
            )
        total.calls += state.counts.calls
        total.packed_calls += state.counts.packed_calls
        total.tokens_in += state.counts.tokens_in
        total.tokens_run += state.counts.tokens_run
        total.passed_through += state.counts.passed_through
    return total


def _gpts_of(model: Any) -> list[GPTModel]:
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    if not isinstance(chunks, Iterable):
        raise TypeError(f"expected a Megatron-core GPTModel, got {type(model).__name__}")
    gpts = [part for chunk in chunks for part in chunk.modules() if isinstance(part, GPTModel)]
    if not gpts:
        raise TypeError(f"expected a Megatron-core GPTModel, got {type(model).__name__}")
    return gpts


def _enable(model: GPTModel, min_ratio: float) -> None:
    state = model._prefix_attn = _Enabled(min_ratio)

    def replace(
        owner: torch.nn.Module, name: str, function: Callable[..., Any], first: Any
    ) -> None:
        setattr(owner, name, partial(function, first, getattr(owner, name)))
        state.replaced.append((owner, name))

    names = list(inspect.signature(type(model).forward).parameters)[1:]
    state.hooks += [
        model.register_forward_pre_hook(partial(_remember_call, names), with_kwargs=True),
        model.register_forward_hook(_forget_call, always_call=True),
    ]
    replace(model.decoder, "forward", _forward, model)
    for module in model.decoder.modules():
        if not hasattr(module, "core_attention"):
            continue
        replace(module.core_attention, "forward", run_core_attention, module)
        if isinstance(module, MLASelfAttention):
            replace(module, "get_query_key_value_tensors", run_latent_projections, module)
            for name in ("forward", "get_cached_cos_sin"):
                if hasattr(module.rotary_pos_emb, name):
                    replace(module.rotary_pos_emb, name, make_latent_table, module)
    for layer in model.decoder.layers:
        moe = getattr(layer, "mlp", None)
        if not isinstance(moe, MoELayer):
            continue
        moe.router._prefix_params = None
        replace(moe.router, "routing", route, moe.router)
        if moe.moe_layer_recompute:
            replace(moe, "forward", run_moe, moe)
        state.hooks += [
            layer.register_forward_pre_hook(remember_row, with_kwargs=True),
            layer.register_forward_hook(forget_row, always_call=True),
        ]


def _remember_call(
    names: list[str], model: GPTModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A pre-hook of the model: its decoder is not told of token ids."""
    model._prefix_attn.call = dict(zip(names, args, strict=False)) | kwargs


def _forget_call(model: GPTModel, *_: Any) -> None:
    model._prefix_attn.call = None


def _forward(model: GPTModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of the decoder after `enable`."""
    state: _Enabled = model._prefix_attn
    decoder = model.decoder
    kwargs.update(zip(("hidden_states", "attention_mask"), args, strict=False))
    state.counts.calls += 1
    whole: list[Tensor] = []

    def hidden_of() -> Tensor:
        """What the decoder takes, (S, B, H), of all ranks of a sequence-parallel group."""
        if not whole:
            x = kwargs["hidden_states"] if decoder.pre_process else decoder.input_tensor
            x = x.unwrap() if isinstance(x, WrappedTensor) else x
            whole.append(_gather(model, x))
        return whole[0]

    try:
        if state.call is None:
            raise PassThroughError("the decoder was called from outside of the model")
        row = find_row(model, state.call, kwargs, hidden_of, state.min_ratio)
    except PassThroughError as reason:
        state.counts.pass_through(str(reason), model, INFERENCE)
        return original(**kwargs)
    state.counts.packed_calls += 1
    state.counts.tokens_in += row.packing.tokens_in
    state.counts.tokens_run += row.packing.layout.num_tokens
    return _run_packed(model, original, row, hidden_of(), state.call, kwargs)


def _run_packed(
    model: GPTModel,
    original: Callable[..., Any],
    row: PackedRow,
    hidden: Tensor,
    call: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """Runs the packed row and hands hidden states back: (S, B, H) -> (S, B, H)."""
    decoder, packing = model.decoder, row.packing
    tokens = packing.layout.num_tokens
    ranks = decoder.tp_group.size() if model.config.sequence_parallel else 1
    rows = -(-tokens // ranks) * ranks  # each rank takes as many
    packed = packing.pack_features(hidden.transpose(0, 1))[0]
    packed = torch.nn.functional.pad(packed, (0, 0, 0, rows - tokens))[:, None]  # (rows, 1, H)
    packed = _scatter(model, packed)
    kwargs = kwargs | {
        "hidden_states": packed,
        "attention_mask": None,
        "padding_mask": None,
        "rotary_pos_emb": _pack_tables(kwargs.get("rotary_pos_emb"), row, rows),
        "packed_seq_params": row_params(packing, row.positions, call.get("padding_mask"), rows),
    }
    before = decoder.input_tensor
    if not decoder.pre_process:
        decoder.input_tensor = packed
    try:
        out = original(**kwargs)
    finally:
        decoder.input_tensor = before
    if not isinstance(out, Tensor):
        raise NotImplementedError(
            f"the output of {type(decoder).__name__} is of type {type(out).__name__}: "
            "it can't be handed back"
        )
    out = HandBack.apply(_gather(model, out)[:tokens, 0], packing.row_index.t().contiguous())
    # A pipeline frees the storage of what it has sent, so this must not be a view.
    return make_viewless_tensor(_scatter(model, out), out.requires_grad, keep_graph=True)


def _gather(model: GPTModel, x: Tensor) -> Tensor:
    """The parts of all ranks, with which each of them then does the same."""
    if not model.config.sequence_parallel:
        return x
    return gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=model.decoder.tp_group
    )


def _scatter(model: GPTModel, x: Tensor) -> Tensor:
    if not model.config.sequence_parallel:
        return x
    return scatter_to_sequence_parallel_region(x, group=model.decoder.tp_group)


def _pack_tables(tables: Any, row: PackedRow, rows: int) -> Any:
    """Rotary tables with a row for each packed row; those of padding are never read."""
    if isinstance(tables, dict):
        return {name: _pack_tables(table, row, rows) for name, table in tables.items()}
    if isinstance(tables, (tuple, list)):
        return tuple(_pack_tables(table, row, rows) for table in tables)
    if tables is None:
        return None
    packing = row.packing
    if has_places(tables, packing.row_index.shape, row.sequences_in_rows):
        table = tables.transpose(0, 1).flatten(0, 1)[packing.source_index][:, None]
    else:
        table = tables[row.positions]
    padding = rows - len(table)
    return torch.cat([table, table[:1].expand(padding, *table.shape[1:])])
