"""Routers of Megatron-core over a packed row: their losses and counts see every ordinary place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from prefix_attn.integrations.megatron.attention import PrefixSeqParams
from prefix_attn.integrations.packing import HandBack


def remember_row(layer: TransformerLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook of a layer: its router is not told of `packed_seq_params`."""
    params = kwargs.get("packed_seq_params")
    layer.mlp.router._prefix_params = params if isinstance(params, PrefixSeqParams) else None


def forget_row(layer: TransformerLayer, *_: Any) -> None:
    """A hook behind a layer."""
    layer.mlp.router._prefix_params = None


def run_moe(
    moe: MoELayer, original: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a MoELayer that recomputes itself, after its layer has ended."""
    router, params = moe.router, moe.router._prefix_params
    if params is None or not torch.is_grad_enabled():
        return original(hidden_states, *args, **kwargs)

    def run(hidden: Tensor) -> Any:
        before = router._prefix_params
        router._prefix_params, moe.moe_layer_recompute = params, False
        try:
            return original(hidden)
        finally:
            router._prefix_params, moe.moe_layer_recompute = before, True

    return tensor_parallel.checkpoint(run, False, hidden_states)


def route(
    router: TopKRouter,
    original: Callable[..., tuple[Tensor, Tensor]],
    logits: Tensor,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`TopKRouter.routing`: logits (T, 1, E) -> probabilities and map, (T, E).

    Balancing and z losses, the counts for expert biases and sinkhorn's normalization depend on how
    often a token is there. So the ordinary routing runs on ordinary places, of which the packed
    rows then take theirs. Padding that the attention mask hides is left out.
    """
    params: PrefixSeqParams | None = router._prefix_params
    if params is None or not _needs_places(router):
        return original(logits, padding_mask)
    packing = params.packing
    assert packing is not None
    rows = packing.row_index.t().contiguous()  # (S, B), as Megatron lays places out
    length, batch = rows.shape
    source = packing.source_index % length * batch + packing.source_index // length
    hidden = None if params.padding is None else params.padding.t()
    if not router.config.sequence_parallel or router.tp_group.size() == 1:
        probabilities, chosen = original(HandBack.apply(logits[:, 0], rows), hidden)
        return probabilities[source], chosen[source]

    # Each rank has its part of the packed rows, and takes its part of the places.
    gather = partial(gather_from_sequence_parallel_region, group=router.tp_group)
    own = partial(_part, rank=router.tp_group.rank(), ranks=router.tp_group.size())
    packed = gather(logits[:, 0])
    places = HandBack.apply(packed, own(rows))
    probabilities, chosen = original(places, None if hidden is None else own(hidden))
    source = own(torch.nn.functional.pad(source, (0, len(packed) - len(source))))
    return gather(probabilities)[source], gather(chosen.to(torch.uint8)).bool()[source]


def _part(x: Tensor, *, rank: int, ranks: int) -> Tensor:
    return x.chunk(ranks)[rank]


def _needs_places(router: TopKRouter) -> bool:
    if router.routing_type == "sinkhorn":
        return True
    if not torch.is_grad_enabled():
        return False
    losses = router.is_aux_loss_enabled() or router.config.moe_z_loss_coeff is not None
    return router.enable_expert_bias or (router.training and losses)
