"""Models that micro-groups can't serve although `enable` does, refused by name."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from prefix_attn.integrations.transformers.attention import rope_reads_range
from prefix_attn.integrations.transformers.caches import makes_cache, shares_by_cache
from prefix_attn.integrations.transformers.mixers import find_mixers


def refuse_unserved(model: torch.nn.Module, backbone: PreTrainedModel) -> None:
    """Raises if micro-groups would be wrong for an enabled model.

    Raises:
        NotImplementedError: naming what is not served.
    """
    reason = why_not(model, backbone)
    if reason is not None:
        raise NotImplementedError(
            f"micro_groups can't serve {type(backbone).__name__}: {reason}. Run it without "
            "micro_groups"
        )


def why_not(model: torch.nn.Module, backbone: PreTrainedModel) -> str | None:
    """The reason why micro-groups would be wrong for an enabled model, or None."""
    if rope_reads_range(backbone.config):
        return "its rotary frequencies depend on the longest sequence of a call"
    if makes_cache(backbone, {}) and shares_by_cache(backbone):
        return "its layers share keys by the cache: set use_cache of its config to False"
    for mixer in find_mixers(backbone):
        return f"the states of {mixer.name} ({type(mixer.module).__name__}) are not recorded"
    for module in model.modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or type(module).__name__ == "OptimizedModule":
            return f"{type(module).__name__} is compiled, which can't record keys and values"
    inside_ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    calling = getattr(DistributedDataParallel, "_active_ddp_module", None)  # during its forward
    inside_ddp = inside_ddp or calling is not None
    if inside_ddp and recomputes(backbone, reentrant=True):
        return (
            "DistributedDataParallel with reentrant checkpointing marks parameters twice: pass "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    if has_frozen_units(model):
        return (
            "FSDP frees parameters that are not trained, such as those under LoRA, before the "
            "backward of prefixes reads them: wrap the model by FSDP2, fully_shard"
        )
    return None


def has_frozen_units(model: torch.nn.Module) -> bool:
    """Whether FSDP shards a unit in which no parameter is trained.

    It frees such a unit after the backward of the first call of a step, and never gathers it twice
    in one backward.
    """
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        others = (x for x in FullyShardedDataParallel.fsdp_modules(unit) if x is not unit)
        inner = {parameter for other in others for parameter in other.parameters()}
        own = [parameter for parameter in unit.parameters() if parameter not in inner]
        is_sharded = unit.sharding_strategy is not ShardingStrategy.NO_SHARD
        if own and is_sharded and not any(parameter.requires_grad for parameter in own):
            return True
    return False


def recomputes(backbone: PreTrainedModel, *, reentrant: bool = False) -> bool:
    """Whether layers are checkpointed; with `reentrant`, whether by reentrant checkpoints."""
    for module in backbone.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            if not reentrant or keywords.get("use_reentrant", True):
                return True
        if type(module).__name__ == "CheckpointWrapper":
            kind = getattr(getattr(module, "checkpoint_impl", None), "name", "REENTRANT")
            if not reentrant or kind == "REENTRANT":
                return True
    return False
