"""What a layout's `segments` say, read once per layout instead of once per layer.

The operators are given that tensor alone. It is kept by the tensor, and for other tensors of the
same content for as long as it is among the last that were used.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from prefix_attn.forest import CACHED_LAYOUTS, Forest, forest_of


class Content:
    """The content of `PrefixLayout.segments`.

    Attributes:
        key: its bytes, which name it.
        num_tokens: T.
        num_queries: Tq.
        kept: what backends derived from it, by what they derived it for.
    """

    def __init__(self, key: bytes) -> None:
        """Reads the bytes of (3, S) int32."""
        forest = forest_of(key)
        self.key = key
        self.num_tokens, self.num_queries = forest.num_tokens, len(forest.query_rows)
        self.kept: dict[Hashable, Any] = {}

    def forest(self, window_size: int | None, prefix_causal: bool) -> Forest:
        """The forest under the options that change who attends to whom."""
        return forest_of(self.key, window_size, prefix_causal)


def content_of(segments: Tensor) -> Content:
    """The content of `segments`, (3, S) int32 on the CPU."""
    if segments.is_inference():  # which counts no changes
        return _content(segments.numpy().tobytes())
    version, content = _by_tensor.get(segments, (-1, None))
    if content is None or version != segments._version:
        content = _content(segments.numpy().tobytes())
        _by_tensor[segments] = segments._version, content
    return content


_content = lru_cache(CACHED_LAYOUTS)(Content)
_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()
