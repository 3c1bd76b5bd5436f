"""Finds the module that runs the layers, inside whatever wraps a model, and refers to it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import PreTrainedModel


def decoder_of(model: torch.nn.Module) -> PreTrainedModel:
    """The module that runs the layers.

    Raises:
        TypeError: if there is no transformers model.
        ValueError: if there are several.
        NotImplementedError: if its layers and its head are one module.
    """
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


class Weak:
    """A model or a part of it, for what is set on itself in the place of its methods.

    A strong reference would be a cycle, with which the memory of a deleted model waits for Python's
    collector. Copied and pickled, it refers to the copy of the module.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._reference = weakref.ref(module)

    @property
    def module(self) -> Any:
        """The model itself."""
        module = self._reference()
        if module is None:
            raise ReferenceError(
                "the enabled model was deleted, only its forward is left: keep the model"
            )
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self.module,)
