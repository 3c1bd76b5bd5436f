"""Keywords of a decoder's call that hold something for each token, beside ids and embeddings.

They are packed with the row, and they are part of what must be equal where tokens are shared: equal
embeddings with other features of a picture, or with other experts, are other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefix_attn.integrations.packing import (
    Packing,
    PassThroughError,
    bits_of,
    check_content,
    checksums,
    content_of,
    gradient_is_wanted,
)

# (B, L, layers, D), of Gemma 3n and Gemma 4.
KNOWN = ("per_layer_inputs",)
# (B, L) places of pictures, and for each of some layers the (N, H) features that it adds there.
PLACES, FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
# What `enable` reads in another way.
RESERVED = frozenset(
    {
        "attention_mask",
        "cache",
        "input_ids",
        "inputs_embeds",
        "labels",
        "past_key_values",
        "position_ids",
        "prefix_layout",
        PLACES,
        FEATURES,
    }
)


def checked_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names that a caller gives to `enable`.

    Raises:
        ValueError: if one is no name, or that of a keyword that is read in another way.
    """
    if isinstance(names, str):
        raise ValueError(f"token_keywords must be a list of names, got {names!r}")
    checked = tuple(names)
    for name in checked:
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(
                f"token_keywords must name further keywords of the decoder, got {name!r}"
            )
    return checked


@dataclass(frozen=True, eq=False)
class TokenKeywords:
    """The keywords of one call that hold something for each token of its (B, L) batch.

    Attributes:
        tensors: by name, (B, L, ...).
        places: (B, L) bool, where pictures lie that have `features`, or None.
        features: (N, H) each, for the N places of pictures in the order of the batch.
    """

    tensors: dict[str, Tensor]
    places: Tensor | None
    features: list[Tensor]

    @classmethod
    def of(cls, kwargs: dict[str, Any], names: Iterable[str], shape: torch.Size) -> TokenKeywords:
        """Reads a call and checks it.

        Args:
            kwargs: of the call.
            names: that the caller gave to `enable`.
            shape: (B, L).

        Raises:
            ValueError: if a keyword that the caller named has no entry for each token.
            PassThroughError: if another one has not, or if its own gradient is wanted.
        """
        for name in names:
            x = kwargs.get(name)
            if x is not None and (not isinstance(x, Tensor) or x.shape[:2] != shape):
                found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"{name} is a token keyword and must have shape ({shape[0]}, {shape[1]}, ...), "
                    f"got {found}"
                )
        if (kwargs.get(PLACES) is None) != (kwargs.get(FEATURES) is None):
            raise PassThroughError(f"only one of {PLACES} and {FEATURES}")
        held = cls.read(kwargs, names)
        held._check_shapes(shape)
        held._check_gradients(shape)
        return held

    @classmethod
    def read(cls, kwargs: dict[str, Any], names: Iterable[str]) -> TokenKeywords:
        """Reads a call that was checked before: the checks wait for the device."""
        tensors = {n: kwargs[n] for n in (*names, *KNOWN) if kwargs.get(n) is not None}
        return cls(tensors, kwargs.get(PLACES), list(kwargs.get(FEATURES) or []))

    @property
    def names(self) -> frozenset[str]:
        """Those that are packed."""
        return frozenset(self.tensors) | (set() if self.places is None else {PLACES, FEATURES})

    def _check_shapes(self, shape: torch.Size) -> None:
        for name, x in self.tensors.items():
            if not isinstance(x, Tensor) or x.shape[:2] != shape:
                raise PassThroughError(f"{name} is not of shape (B, L, ...)")
        if self.places is not None:
            if self.places.shape != shape or self.places.dtype != torch.bool:
                raise PassThroughError(f"{PLACES} is not of shape (B, L)")
            number = int(self.places.sum())
            if any(x.dim() != 2 or len(x) != number for x in self.features):
                raise PassThroughError(f"{FEATURES} do not fit {PLACES}")

    def _check_gradients(self, shape: torch.Size) -> None:
        if not torch.is_grad_enabled():
            return
        named = [*self.tensors.items(), *((FEATURES, x) for x in self.features)]
        for name, x in named:
            if gradient_is_wanted(x, shape):
                raise PassThroughError(f"the gradient of {name} itself is wanted")

    def contents(self) -> list[Tensor]:
        """(B, L) int64 each: equal where what the keywords hold is."""
        contents = [content_of(_flat(x)) for x in self.tensors.values()]
        if self.places is not None:
            contents.append(self.places.long())
            if self.features:
                spread = torch.zeros_like(contents[-1])
                spread[self.places] = checksums(self._feature_bits())
                contents.append(spread)
        return contents

    def check(self, packing: Packing) -> None:
        """Compares what every place holds with what its packed row does, bit for bit.

        Raises:
            PassThroughError: if different values were taken for one.
        """
        for name, x in self.tensors.items():
            check_content(_flat(x), packing, name)
        if self.places is None or not self.features:
            return
        # (N,) the feature of each place of a picture, and the one that its packed row takes.
        rows = packing.row_index[self.places]
        mine = torch.arange(len(rows), device=rows.device)[rows >= 0]
        taken = self._ranks()[packing.source_index[rows[rows >= 0]]]
        bits = self._feature_bits()
        if not bool((bits[mine] == bits[taken]).all()):
            raise PassThroughError(f"{FEATURES} differ where their checksums agree")

    def pack(self, packing: Packing) -> dict[str, Any]:
        """The keywords of the packed row, differentiable."""
        packed: dict[str, Any] = {
            name: packing.pack_features(x) for name, x in self.tensors.items()
        }
        if self.places is not None:
            packed[PLACES] = packing.pack(self.places)
            taken = self._ranks()[packing.source_index][packed[PLACES][0]]
            packed[FEATURES] = [x[taken] for x in self.features]
        return packed

    def _ranks(self) -> Tensor:
        """(B * L,) the number of each place of a picture among all of them."""
        assert self.places is not None
        return self.places.flatten().cumsum(0) - 1

    def _feature_bits(self) -> Tensor:
        return torch.cat([bits_of(x) for x in self.features], dim=1)


def _flat(x: Tensor) -> Tensor:
    """(B, L, ...) -> (B, L, H)."""
    return x.reshape(*x.shape[:2], -1)
