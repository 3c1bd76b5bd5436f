"""Callbacks for ms-swift: shared prefixes in the model that it trains.

A file for `--external_plugins` imports this module. Then `--callbacks prefix_attn` enables the
model when training begins. `serve_megatron()` does the same for Megatron-SWIFT.
"""

from __future__ import annotations

from typing import Any

import torch
from swift.callbacks import TrainerCallback, callbacks_map


class PrefixAttention(TrainerCallback):
    """Enables the model when training begins."""

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Calls `prefix_attn.enable`; the arguments are those of transformers' callbacks."""
        from prefix_attn.integrations.transformers import enable

        enable(self.trainer.model if model is None else model)


callbacks_map["prefix_attn"] = PrefixAttention


def serve_megatron() -> None:
    """Adds the same callback to those of Megatron-SWIFT."""
    from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map

    from prefix_attn.integrations.megatron import enable

    class MegatronPrefixAttention(MegatronCallback):
        def on_train_begin(self) -> None:
            enable(self.trainer.unwrapped_models)

    megatron_callbacks_map["prefix_attn"] = MegatronPrefixAttention
