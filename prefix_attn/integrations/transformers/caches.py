"""Caches of keys and values, which a packed row does not fill."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

# What models call their cache: transformers renamed it in 5.24.
CACHES = ("past_key_values", "cache", "cache_params", "layer_past")

MESSAGE = (
    "there is no cache: the call that should have filled it ran as a packed row. Pass "
    "use_cache=True to that call"
)


class UnfilledCache:
    """Stands in outputs for the cache that the ordinary call would have returned.

    None would start a new context where it is passed back. This may be ignored, compared with
    None, copied and handed on; its use is an error. Attributes are missing in the ordinary way, so
    that code which looks for tensors in outputs (`hasattr(x, "dtype")`) passes over it.
    """

    def __repr__(self) -> str:
        return f"<{MESSAGE}>"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(MESSAGE)

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(MESSAGE)


UNFILLED = UnfilledCache()


def generates(call: dict[str, Any]) -> bool:
    """Whether a call of the decoder has a cache or asks for one.

    Raises:
        ValueError: if its cache was never filled.
    """
    caches = [call[name] for name in CACHES if call.get(name) is not None]
    if any(isinstance(cache, UnfilledCache) for cache in caches):
        raise ValueError(MESSAGE)
    return bool(caches) or bool(call.get("use_cache"))


def makes_cache(backbone: PreTrainedModel, call: dict[str, Any]) -> bool:
    """Whether the ordinary call has a cache, given or made by the model itself.

    Models make one unless `use_cache`, or else the config, says no; checkpointing switches it off.
    """
    if any(call.get(name) is not None for name in CACHES):
        return True
    asked = call.get("use_cache")
    checkpoints = (
        getattr(backbone, "gradient_checkpointing", False)
        and backbone.training
        and torch.is_grad_enabled()
    )
    wanted = getattr(backbone.config, "use_cache", False) if asked is None else asked
    return bool(wanted) and not checkpoints


def shares_by_cache(backbone: PreTrainedModel) -> bool:
    """Whether layers take the keys of other layers from the cache, and have their own without one.

    Gemma 3n's do in transformers 5.5.
    """
    if not getattr(backbone.config, "num_kv_shared_layers", 0):
        return False
    layers = (x for x in backbone.modules() if getattr(x, "is_kv_shared_layer", False))
    layer = next(layers, None)
    if layer is None:
        return False
    return "shared_kv_states" not in inspect.signature(type(layer).forward).parameters


def mark_unfilled(out: Any, backbone: PreTrainedModel, call: dict[str, Any]) -> Any:
    """The output of a packed row, with UNFILLED where the ordinary call returns a cache."""
    if not makes_cache(backbone, call):
        return out
    values = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    unfilled = {name: UNFILLED for name in CACHES if name in values}
    return type(out)(**{**values, **unfilled})  # anew, for the order of its tuple
