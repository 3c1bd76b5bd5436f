"""An inner attention for torchtitan's decoders, and the hook that makes its layouts.

    for layer in config.layers:
        layer.attention.inner_attention = PrefixAttention.Config()
    model = serve_masks(config.build())
    model(ids[None], positions=layout.position_ids[None], attention_masks=layout)

torchtitan's trainer asks `model.get_attention_masks(positions)` for masks. Positions say the whole
tree of a packed row, so `serve_masks` answers with its layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchtitan.protocols.module import Module

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout

Decoder = TypeVar("Decoder", bound=torch.nn.Module)
WINDOWS = ("window_size", "sliding_window_size")  # of torchtitan's attention layers


class PrefixAttention(Module):
    """Attention over a packed row, in the place of torchtitan's FlexAttention."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Options of `prefix_attention`.

        Attributes:
            window_size: how many keys a query sees with its own, counted in positions, or None.
        """

        window_size: int | None = None

    def __init__(self, config: PrefixAttention.Config) -> None:
        super().__init__()
        self.window_size = config.window_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: PrefixLayout | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attention of one packed row.

        Args:
            q: (1, T, Hq, D).
            k: (1, T, Hkv, D).
            v: (1, T, Hkv, DV).
            attention_masks: the layout.
            scale: of the scores, D ** -0.5 by default.
            enable_gqa: not needed: heads say it.
            **options: refused by name, unless they are off.

        Returns:
            (1, T, Hq, DV).

        Raises:
            TypeError: if attention_masks is no layout.
            ValueError: if the batch holds several rows.
            NotImplementedError: for other options.
        """
        if not isinstance(attention_masks, PrefixLayout):
            raise TypeError(
                "PrefixAttention takes a PrefixLayout as attention_masks, got "
                f"{type(attention_masks).__name__}: call serve_masks(model), or pass the layout"
            )
        if q.shape[0] != 1:
            raise ValueError(f"q must have shape (1, T, Hq, D), got {tuple(q.shape)}")
        if options.pop("is_causal", True) is False:
            raise NotImplementedError("PrefixAttention is causal, got is_causal=False")
        on = [
            name
            for name, value in options.items()
            if isinstance(value, Tensor) or value not in (None, False)
        ]
        if on:
            raise NotImplementedError(f"PrefixAttention does not know {', '.join(on)}")
        out = prefix_attention(
            q[0], k[0], v[0], attention_masks, scale=scale, window_size=self.window_size
        )
        return out[None]


def serve_masks(model: Decoder) -> Decoder:
    """Makes `model.get_attention_masks(positions)` return the layout of the packed row.

    Raises:
        NotImplementedError: for layers with another window than their `PrefixAttention`, which
            torchtitan would put into the masks.
    """
    for name, module in model.named_modules():
        inner = getattr(module, "inner_attention", None)
        if not isinstance(inner, PrefixAttention):
            continue
        window = next((getattr(module, x) for x in WINDOWS if hasattr(module, x)), None)
        if window is not None and window != inner.window_size:
            raise NotImplementedError(
                f"{name} has a window of {window}, its PrefixAttention {inner.window_size}: set "
                f"PrefixAttention.Config(window_size={window}) there"
            )
    model.get_attention_masks = MethodType(_layout_of, model)  # type: ignore[assignment]
    return model


def _layout_of(model: torch.nn.Module, positions: Tensor) -> PrefixLayout:
    return layout_of_positions(positions)


def layout_of_positions(positions: Tensor) -> PrefixLayout:
    """The layout of a packed row, from the depth of each row along its path.

    Segments lie in depth-first order. Where positions do not count on by one, a segment begins, as
    a branch of the path so far: it continues the row whose position is one less.

    Args:
        positions: (1, T) integers, as `layout.position_ids[None]`.

    Returns:
        A layout of T rows on the device of positions. Each pair of rows may attend as in the layout
        that the positions are from; a segment that branches in its middle becomes two.

    Raises:
        ValueError: if the batch holds several rows, or a segment continues what is not there.
    """
    if positions.dim() != 2 or positions.shape[0] != 1:
        raise ValueError(f"positions must have shape (1, T), got {tuple(positions.shape)}")
    depths = positions[0].tolist()
    path: list[int] = []  # the rows above the next one
    parents = []  # of each row
    for row, depth in enumerate(depths):
        if not 0 <= depth <= len(path):
            raise ValueError(f"position {depth} of row {row} continues a path of {len(path)} rows")
        del path[depth:]
        parents.append(path[-1] if path else -1)
        path.append(row)
    children = [0] * len(depths)
    for parent in parents:
        if parent >= 0:
            children[parent] += 1
    # A segment goes on while each row has one child, which is the next row.
    lengths: list[int] = []
    above: list[int] = []
    segment_of: list[int] = []
    for row, parent in enumerate(parents):
        if row and parent == row - 1 and children[parent] == 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
            above.append(segment_of[parent] if parent >= 0 else -1)
        segment_of.append(len(lengths) - 1)
    return PrefixLayout.from_tree(lengths, above, device=positions.device)
