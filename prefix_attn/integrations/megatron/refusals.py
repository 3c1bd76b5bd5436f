"""What of Megatron-core would be wrong on a packed row, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import megatron.core
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

OLDEST_MEGATRON = (0, 16)
CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)

# A setting and what is wrong with any value of it but False, None, 0 and "none".
SETTINGS = {
    "attention_dropout": "masks are drawn for each place: set it to 0",
    "hidden_dropout": "masks are drawn for each place: set it to 0",
    "apply_query_key_layer_scaling": "one of its two steps is in the softmax",
    "batch_invariant_mode": "another kernel gives other bits",
    "cuda_graph_impl": "a graph has a fixed number of rows",
    "enable_cuda_graph": "a graph has a fixed number of rows",
    "external_cuda_graph": "a graph has a fixed number of rows",
    "experimental_attention_variant": "these layers do not know the tree",
    "fine_grained_activation_offloading": "it frees queries and keys that are still needed",
    "fp4": "rounding depends on all rows, and their number must be a multiple of 16",
    "fp8": "rounding depends on all rows, and their number must be a multiple of 16",
    "fused_single_qkv_rope": "it takes no packed rows",
    "log_max_attention_logit": "the largest logit is not handed on",
    "moe_enable_routing_replay": "it records and replays one routing for each place",
    "moe_expert_capacity_factor": "which tokens are dropped depends on how often they are there",
    "moe_input_jitter_eps": "noise is drawn for each place",
    "moe_router_force_load_balancing": "experts are drawn for each place",
    "overlap_moe_expert_parallel_comm": "its schedule runs the layers past the decoder's forward",
    "qk_clip": "the largest logit is not handed on",
    "quant_recipe": "rounding depends on all rows",
    "tp_comm_overlap": "its buffers have a fixed number of rows",
    "use_kitchen": "rounding depends on all rows",
}


def refuse_unsupported(model: GPTModel) -> None:
    """Raises if a packed row would be wrong in this model.

    Raises:
        NotImplementedError: with everything that is in the way.
    """
    version = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
    if version < OLDEST_MEGATRON:
        raise NotImplementedError(
            f"prefix_attn needs megatron-core {'.'.join(map(str, OLDEST_MEGATRON))} or newer, "
            f"this is {megatron.core.__version__}"
        )
    reasons = [*_of_settings(model.config), *_of_layers(model.decoder)]
    if reasons:
        raise NotImplementedError(
            f"prefix_attn can't enable {type(model).__name__}: " + "; ".join(dict.fromkeys(reasons))
        )


def _of_settings(config: Any) -> Iterator[str]:
    if config.context_parallel_size > 1:
        yield (
            f"context_parallel_size={config.context_parallel_size}: ranks see slices of sequences"
        )
    for name, reason in SETTINGS.items():
        value = getattr(config, name, None)
        if value not in (None, False, 0, "none"):
            yield f"{name}={value}: {reason}"
    if config.window_size is not None and config.window_size[1] > 0:
        yield f"window_size={config.window_size}: it lets queries see later keys"
    if config.expert_model_parallel_size > 1 and config.moe_token_dispatcher_type == "allgather":
        yield (
            "moe_token_dispatcher_type='allgather' with expert parallelism: ranks would run "
            "different numbers of rows, use 'alltoall'"
        )


def _of_layers(decoder: TransformerBlock) -> Iterator[str]:
    for layer in decoder.layers:
        if not isinstance(layer, TransformerLayer):
            yield f"{type(layer).__name__}: only Megatron-core's TransformerLayer is known"
    for module in decoder.modules():
        if hasattr(module, "core_attention"):
            if not isinstance(module, (SelfAttention, MLASelfAttention)):
                yield f"{type(module).__name__}: only self-attention is known"
            elif module.attn_mask_type not in CAUSAL:
                yield f"attn_mask_type {module.attn_mask_type.name}: only causal attention is known"
            elif (
                module.config.softmax_type != "vanilla"
                and getattr(module.core_attention, "softmax_offset", None) is None
            ):
                yield f"{type(module.core_attention).__name__} has no softmax_offset"
        elif type(module).__name__ in ("MambaMixer", "GatedDeltaNet"):
            yield f"{type(module).__name__}: a recurrent layer does not know the tree"
        if isinstance(module, MoELayer) and not isinstance(module.router, TopKRouter):
            yield f"{type(module.router).__name__}: only TopKRouter is known"
