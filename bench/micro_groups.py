"""Measures what autograd holds for a group: whole, in micro-batches, and in micro-groups.

    python -m bench.micro_groups

The bytes are those of tensors saved for the backward pass, weights left out: the same on every
machine. Prints a table of Markdown. Needs transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import prefix_attn
from bench.tables import markdown

PROMPT, COMPLETION, AT_A_TIME = 512, 64, 4
MEMBERS = (8, 16, 32, 64)
VOCABULARY = 1000
HEADER = (
    "recomputation",
    "G",
    "whole group, MiB",
    f"micro-batches of {AT_A_TIME}, MiB",
    "micro-groups, MiB",
)


class SavedBytes:
    """The most bytes that autograd held at once.

    Attributes:
        peak: in bytes; storages that several saved tensors share count once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.peak = 0
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._users: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what is saved meanwhile."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield

    def _keep(self, x: Tensor) -> _Kept:
        key = x.untyped_storage().data_ptr()
        if key not in self._weights:
            self._users[key] += 1
            self._sizes[key] = x.untyped_storage().nbytes()
            self.peak = max(self.peak, sum(self._sizes.values()))
        return _Kept(self, x, key)

    def forget(self, key: int) -> None:
        """One saved tensor less lies in a storage."""
        self._users[key] -= 1
        if not self._users[key]:
            self._sizes.pop(key, None)


class _Kept:
    """A saved tensor, until its graph is gone."""

    def __init__(self, owner: SavedBytes, tensor: Tensor, key: int) -> None:
        self.owner, self.tensor, self.key = owner, tensor, key

    def __del__(self) -> None:
        self.owner.forget(self.key)


def tiny_model(*, checkpoints: bool) -> Any:
    """An enabled Qwen3 of four layers, with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = prefix_attn.enable(Qwen3ForCausalLM(config).train())
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def group_in(batches: int, members: int) -> list[dict[str, Tensor]]:
    """One group as micro-batches of equal size."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCABULARY, (PROMPT,), generator=generator)
    completions = torch.randint(VOCABULARY, (members, COMPLETION), generator=generator)
    ids = torch.cat([prompt.expand(members, -1), completions], dim=1)
    return [{"input_ids": part} for part in ids.chunk(batches)]


def peak_of(model: Any, batches: list[dict[str, Tensor]], *, in_micro_groups: bool) -> int:
    """Bytes that autograd holds at most in one step, of the decoder alone."""
    meter = SavedBytes(model)
    run = prefix_attn.micro_groups(model, batches) if in_micro_groups else nullcontext()
    with run, meter.measured():
        for batch in batches:
            model.model(**batch, use_cache=False).last_hidden_state.sum().backward()
    return meter.peak


def main() -> None:
    """Prints the table."""
    rows = []
    for checkpoints in (False, True):
        for members in MEMBERS:
            parts = members // AT_A_TIME
            peaks = [
                peak_of(
                    tiny_model(checkpoints=checkpoints),
                    group_in(batches, members),
                    in_micro_groups=ours,
                )
                for batches, ours in ((1, False), (parts, False), (parts, True))
            ]
            shown = [f"{peak / 2**20:.1f}" for peak in peaks]
            rows.append(["yes" if checkpoints else "no", str(members), *shown])
    print(markdown(HEADER, rows, "lrrrr"))


if __name__ == "__main__":
    main()
