"""A plugin for axolotl: shared prefixes in the model that it trains.

plugins:
- prefix_attn.integrations.axolotl.Plugin
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import PreTrainedModel

from prefix_attn.integrations.transformers import enable


class Plugin(BasePlugin):
    """Enables the model once it is loaded, adapters included."""

    def post_model_load(self, cfg: Any, model: PreTrainedModel) -> None:
        """Calls `prefix_attn.enable`.

        Raises:
            NotImplementedError: for settings whose batches can't be packed, by name.
        """
        for name in ("sample_packing", "eval_sample_packing"):
            if getattr(cfg, name):
                raise NotImplementedError(
                    f"{name} numbers the sequences of a row in its attention mask, which "
                    "prefix_attn would take for one sequence: set it to false. The sequences of a "
                    "padded batch are packed, too"
                )
        size = cfg.context_parallel_size or cfg.sequence_parallel_degree or 1
        if size > 1:
            raise NotImplementedError(
                f"context_parallel_size is {size}, which slices sequences: set it to 1"
            )
        enable(model)
