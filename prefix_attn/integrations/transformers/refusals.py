"""Models that would be wrong on a packed row, refused by name."""

from __future__ import annotations

import sys
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_attn.api import MIN_HEAD_DIM, max_head_dim
from prefix_attn.integrations.transformers.attention import (
    MIXER_LAYER_TYPES,
    RANGE,
    rope_reads_range,
)
from prefix_attn.integrations.transformers.code_names import calls_attention, keeps_keys
from prefix_attn.integrations.transformers.mixers.find import (
    GLOBAL_FUNCTIONS_SINCE,
    find_mixers,
    has_global_functions,
)

INTERFACE = "transformers' attention interface"

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention", "mlp", "moe"})

NO_LAYOUT = "its layers take neither a mask nor keywords, so the prefix tree does not reach them"
POSITION_BIAS = "its attention adds a position bias"

# What no attribute of a model tells.
NAMED = {
    "opt": "it derives positions from attention_mask",
    "xglm": "it derives positions from attention_mask",
    "biogpt": "it derives positions from attention_mask",
    "bloom": "its attention adds a position bias (ALiBi)",
    "mpt": "its attention adds a position bias (ALiBi)",
    "doge": "its attention masks depend on keys",
    "rwkv": NO_LAYOUT,
    "xlstm": NO_LAYOUT,
    "mamba": NO_LAYOUT,
    "falcon_mamba": NO_LAYOUT,
    "inkling_text": POSITION_BIAS,
    "inkling2_text": POSITION_BIAS,
    "inkling2_loop_text": POSITION_BIAS,
    "phi4_multimodal": "its decoder holds an audio encoder, whose convolutions see no prefix tree",
    "llama4_text": "the temperature of its attention depends on the place in the row",
}

# Decoders that PaliGemma makes bidirectional: they see what masks say, and all without a mask.
PREFIX_LANGUAGE = frozenset({"gemma", "gemma2"})

# Types whose scan, before mixers call global functions, gives other results with other padding.
DEPEND_ON_PADDING = frozenset({"nemotron_h", "zamba2"})

# What attention layers call the sizes of their heads.
HEAD_DIMS = ("head_dim", "qk_head_dim", "v_head_dim", "head_size", "attention_head_size")


def refuse_unsupported(backbone: PreTrainedModel) -> None:
    """Raises if a packed row would not mean the same to a model as the batch.

    Args:
        backbone: the decoder, as `get_decoder` returns it.

    Raises:
        NotImplementedError: naming what is not supported.
    """
    reason = why_not(backbone)
    if reason is not None:
        raise NotImplementedError(
            f"prefix_attn can't enable {type(backbone).__name__}: {reason}. Run it without enable"
        )


def why_not(backbone: PreTrainedModel) -> str | None:
    """The reason why a model can't run packed rows, or None."""
    config = backbone.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if config.model_type in NAMED:
        return NAMED[config.model_type]
    if config.model_type in DEPEND_ON_PADDING and not has_global_functions():
        return (
            f"in transformers {transformers.__version__} its scan gives other results with other "
            f"padding: it is served from {GLOBAL_FUNCTIONS_SINCE} on"
        )
    mixers = [mixer.name for mixer in find_mixers(backbone)]
    known = LAYER_TYPES | MIXER_LAYER_TYPES if mixers else LAYER_TYPES
    reason = _why_not_layer_types(config, known)
    if reason is not None:
        return reason
    for name, module in backbone.named_modules():
        if getattr(module, "is_causal", None) is False and not is_causal_by_mask(config):
            return f"{name} ({type(module).__name__}) is not causal"
    reason = _why_not_attention(backbone, mixers)
    if reason is not None:
        return reason
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    if getattr(config, "output_attentions", False):
        return (
            "its config asks for output_attentions in every call, which packed rows do not have: "
            "set config.output_attentions to False first"
        )
    if getattr(config, "alibi", False):
        return "its attention adds a position bias (ALiBi)"
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        return 'sdpa drops its softcap: call set_attn_implementation("eager") first'
    return _why_not_heads(backbone) or _why_not_implementation(config._attn_implementation)


def is_causal_by_mask(config: Any) -> bool:
    """Whether only masks of an outer model make layers causal, behind the prompt of PaliGemma."""
    return config.model_type in PREFIX_LANGUAGE and bool(
        getattr(config, "use_bidirectional_attention", False)
    )


def refuse_parts(backbone: PreTrainedModel) -> None:
    """Raises if a model can't run some rows of a packed row, as one rank of several does.

    Raises:
        NotImplementedError: naming what is not supported.
    """
    reason = reads_rows_in_order(backbone)
    if reason is None and rope_reads_range(backbone.config):
        reason = f"it {RANGE}"
    if reason is not None:
        raise NotImplementedError(
            f"{type(backbone).__name__} can't run some rows of a packed row, as each rank of a "
            f"sequence-parallel group does: {reason}"
        )


def reads_rows_in_order(backbone: PreTrainedModel) -> str | None:
    """Which layers besides attention need whole rows, of which no rank may have all; or None."""
    for mixer in find_mixers(backbone):
        return f"{mixer.name} ({type(mixer.module).__name__}) reads a row in order"
    return _why_not_layer_types(backbone.config, LAYER_TYPES)


def _why_not_layer_types(config: Any, known: frozenset[str]) -> str | None:
    unknown = sorted(set(getattr(config, "layer_types", None) or []) - known)
    if not unknown:
        return None
    return (
        f"its layer_types {unknown} are not among {sorted(known)}: chunked and sparse layers "
        "depend on the order or number of rows"
    )


def _why_not_attention(backbone: PreTrainedModel, mixers: list[str]) -> str | None:
    """Every module that keeps keys and values must call transformers' attention interface."""
    attends = False
    for name, module in backbone.named_modules():
        if any(name == mixer or name.startswith(f"{mixer}.") for mixer in mixers):
            continue
        if calls_attention(module):
            attends = True
        elif keeps_keys(module):
            return f"{name} ({type(module).__name__}) does not call {INTERFACE}"
    return None if attends or mixers else f"it does not call {INTERFACE}"


def _why_not_heads(backbone: PreTrainedModel) -> str | None:
    device_type = backbone.device.type
    most = max_head_dim(device_type)
    for name, module in backbone.named_modules():
        for size in HEAD_DIMS:
            value = getattr(module, size, None)
            if isinstance(value, int) and not MIN_HEAD_DIM <= value <= most:
                return (
                    f"{name} ({type(module).__name__}) has {size} {value}, on {device_type} "
                    f"{MIN_HEAD_DIM} to {most} are served"
                )
    return None


def _why_not_implementation(name: str) -> str | None:
    """Custom attention does what packing can't know of, such as sequence parallelism."""
    function: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    function = getattr(function, "func", function)
    origin = getattr(function, "__module__", "")
    if function is None or origin.split(".")[0] in ("transformers", "prefix_attn"):
        return None
    where = getattr(sys.modules.get(origin), "__name__", origin)
    return (
        f"its attention implementation {name!r} comes from {where}, which enable would replace; "
        'sequence-parallel attention is not supported, else set_attn_implementation("sdpa") first'
    )
