"""One training step of transformers models, with and without `enable`, on one core of a CPU.

Each family is a model of four layers with random weights in float32. Those with mixers have three
of them and one layer of attention. A batch is one group of eight completions: of much that is
shared, and of so little that `enable` just packs it. Both models take turns, and seconds are those
of the process. Memory is measured in a process of its own.

    python -m bench.models [FAMILY ...]
"""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import tables
from bench.micro import begin_peak, fresh_processes, peak_since
from prefix_attn.timing import Quantiles, interleaved, processor_seconds

GROUP, VOCABULARY, ROUNDS = 8, 512, 3
# Prefix and completions.
BATCHES = ((512, 64), (64, 256))
MIXED = ["linear_attention"] * 3 + ["full_attention"]
WINDOWED = ["sliding_attention", "full_attention"] * 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
WINDOW = {"sliding_window": 256}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 64, "layer_types": WINDOWED},
    "gpt_oss": {**WINDOW, **EXPERTS, "layer_types": WINDOWED},
    "qwen3_5_text": {
        "layer_types": MIXED,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "bamba": {
        "attn_layer_indices": [3],
        "mamba_n_heads": 16,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        "mamba_d_state": 32,
        "mamba_chunk_size": 64,
    },
    "lfm2": {"layer_types": ["conv"] * 3 + ["full_attention"]},
    "minimax": {**EXPERTS, "layer_types": MIXED},
}
HEADER = ("model", "P, S", "fewer tokens", "ordinary s", "enabled s", "ratio", "ordinary MiB",
          "enabled MiB")  # fmt: skip


class Step:
    """Training steps of one model."""

    def __init__(self, family: str, enabled: bool) -> None:
        import transformers

        import prefix_attn

        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
        self.model = transformers.AutoModelForCausalLM.from_config(config).train()
        if enabled:
            prefix_attn.enable(self.model, self_check=False)

    def __call__(self, prefix: int, suffix: int) -> Tensor:
        """Forward and backward over a group; the loss, which is that of its completions."""
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(3, VOCABULARY, (prefix,), generator=generator)
        ends = torch.randint(3, VOCABULARY, (GROUP, suffix), generator=generator)
        ids = torch.cat([prompt.expand(GROUP, -1), ends], 1)
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, prefix - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ends.flatten())
        loss.backward()
        return loss.detach()


def peak(family: str, enabled: bool, batch: tuple[int, int]) -> float:
    """MiB that a step takes beyond the model. For a process of its own."""
    step = Step(family, enabled)
    before = begin_peak()
    step(*batch)
    return peak_since(before) / 2**20


def measured(family: str, batch: tuple[int, int]) -> tuple[str, ...]:
    """A row of the table.

    Raises:
        AssertionError: if the two models have different losses.
    """
    steps = [Step(family, enabled) for enabled in (False, True)]
    losses = torch.stack([step(*batch) for step in steps])
    assert losses.diff().abs() < 1e-4, f"{family}: losses {losses.tolist()}"
    samples: dict[Step, list[float]] = {step: [] for step in steps}
    for _, step in interleaved(steps, range(ROUNDS)):
        samples[step].append(processor_seconds(partial(step, *batch)))
    times = [Quantiles.from_seconds(x) for x in samples.values()]
    with fresh_processes() as processes:
        peaks = [processes.apply(peak, (family, enabled, batch)) for enabled in (False, True)]
    prefix, suffix = batch
    tokens = GROUP * (prefix + suffix) / (prefix + GROUP * suffix)
    return (
        f"`{family}`",
        f"{prefix}, {suffix}",
        f"{tokens:.1f}x",
        *(f"{x.median / 1e3:.2f} ({x.p20 / 1e3:.2f}-{x.p80 / 1e3:.2f})" for x in times),
        f"{times[0].median / times[1].median:.2f}x",
        *(f"{x:.0f}" for x in peaks),
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints a table of all families, or of those that are named."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    families = parser.parse_args(arguments).families or list(FAMILIES)
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"unknown: {sorted(unknown)}; known: {', '.join(FAMILIES)}")
    if importlib.util.find_spec("transformers") is None:
        parser.error("it needs transformers: pip install 'prefix-attn[hf]'")
    print(tables.markdown(HEADER, [], "ll" + "r" * (len(HEADER) - 2)))
    for family in families:
        for batch in BATCHES:
            print(f"| {' | '.join(measured(family, batch))} |", flush=True)


if __name__ == "__main__":
    main()
