"""Hooks that would see a packed row where the ordinary call shows them the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.modules import module as hooks_of_all
from transformers import PreTrainedModel

from prefix_attn.integrations.packing import PassThroughError

# Their hooks move, cast, gather and hand on: each token alike.
HARMLESS_LIBRARIES = (
    "torch",
    "accelerate",
    "deepspeed",
    "prefix_attn",
    "transformers.distributed",
    "transformers.integrations.tensor_parallel",  # where it was before
)
# Of transformers, PEFT and TRL, and copied into many scripts.
HARMLESS_NAMES = frozenset(
    {
        "make_inputs_require_grad",
        "make_inputs_require_grads",
        "cast_outputs_to_original_dtype",
    }
)
NEFTUNE = "neftune_post_forward_hook"  # adds noise in training, whose size depends on the row's


def check_hooks(backbone: PreTrainedModel, *, embeds: bool) -> None:
    """Passes a call through whose result hooks may take from the rows of its batch.

    A hook on the embedding may read how long a row is and where in it a token lies, as NEFTune
    does. PEFT tells its layers by hooks which adapter each row takes, or from where on.

    Args:
        backbone: the decoder.
        embeds: whether the caller passes inputs_embeds, so that no token id is embedded.

    Raises:
        PassThroughError: with the name of what would see other rows.
    """
    check_adapters(backbone)
    for module in _embedding_modules(backbone, of_ids=not embeds):
        for hook in _hooks_of(module):
            if not _is_harmless(hook, module):
                raise PassThroughError(f"a hook on the embedding: {_name_of(hook)}")


def check_adapters(backbone: PreTrainedModel) -> None:
    """Passes a call through for which PEFT has told layers what to do with each row.

    Raises:
        PassThroughError: with the keyword that holds something for each row.
    """
    if "peft" not in sys.modules:
        return
    for module in backbone.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if _is_of(hook, "peft") and _name_of(hook) not in HARMLESS_NAMES:
                words = ", ".join(hook.keywords) if isinstance(hook, partial) else ""
                raise PassThroughError(f"PEFT's adapters see rows: {words or _name_of(hook)}")


def _embedding_modules(backbone: PreTrainedModel, *, of_ids: bool) -> Iterator[torch.nn.Module]:
    """The modules that embed places, and token ids if `of_ids`, with what wraps them."""
    try:
        embedding = backbone.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    for_ids = set() if embedding is None else set(embedding.modules())
    for child in backbone.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):  # layers
            continue
        parts = set(child.modules())
        if child is embedding or any(isinstance(part, torch.nn.Embedding) for part in parts):
            yield from parts if of_ids else parts - for_ids


def _hooks_of(module: torch.nn.Module) -> Iterator[Callable[..., Any]]:
    """All that runs around a module's own forward, and what stands in its place."""
    yield from hooks_of_all._global_forward_pre_hooks.values()
    yield from hooks_of_all._global_forward_hooks.values()
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    if "forward" in module.__dict__:
        yield module.__dict__["forward"]


def _is_harmless(hook: Callable[..., Any], module: torch.nn.Module) -> bool:
    name = _name_of(hook)
    if name == NEFTUNE:
        return not module.training
    return name in HARMLESS_NAMES or any(_is_of(hook, x) for x in HARMLESS_LIBRARIES)


def _is_of(hook: Callable[..., Any], library: str) -> bool:
    """Whether a hook's function is defined in a library or in a module of it."""
    module = str(getattr(_function_of(hook), "__module__", ""))
    return module == library or module.startswith(f"{library}.")


def _name_of(hook: Callable[..., Any]) -> str:
    function = _function_of(hook)
    return getattr(function, "__name__", type(function).__name__)


def _function_of(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself: accelerate gives its partial functions the name of what they replace."""
    while isinstance(hook, partial):
        hook = hook.func
    return hook
