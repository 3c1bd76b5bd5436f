"""One training step of transformers models, with and without `enable`, on one core of a CPU.

Each family is a model of four layers with random weights in float32. Those with mixers have three
of them and one layer of attention. A batch is one group of eight completions: of much that is
shared, and of so little that `enable` just packs it. Both models take turns, and seconds are those
of the process. Memory is measured in a process of its own.

`--narrow` times small batches of narrow models instead, packed whatever `min_ratio` is: where
packing costs more than it saves.

    python -m bench.models [--narrow] [FAMILY ...]
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable
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
WIDTH = 256
# The same of small batches, and the widths and samples for them.
SMALL_BATCHES = ((8, 56), (16, 56), (24, 8), (40, 24), (40, 90), (64, 256))
NARROW_WIDTHS, NARROW_ROUNDS = (64, 128, 256), 9
MIXED = ["linear_attention"] * 3 + ["full_attention"]
WINDOWED = ["sliding_attention", "full_attention"] * 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
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
        "mamba_n_groups": 1,
        "mamba_d_state": 32,
        "mamba_chunk_size": 64,
    },
    "lfm2": {"layer_types": ["conv"] * 3 + ["full_attention"]},
    "minimax": {**EXPERTS, "layer_types": MIXED},
}
HEADER = ("model", "P, S", "fewer tokens", "ordinary s", "enabled s", "ratio", "ordinary MiB",
          "enabled MiB")  # fmt: skip


def sizes(width: int) -> dict[str, Any]:
    """What a configuration says of a model's size, with a query head for 64 of its width."""
    return {
        **SIZES,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "mamba_d_head": width // 8,  # the 16 heads have twice the width together
    }


class Step:
    """Training steps of one model."""

    def __init__(self, family: str, enabled: bool, width: int = WIDTH, **options: Any) -> None:
        import transformers

        import prefix_attn

        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes(width), **FAMILIES[family])
        self.model = transformers.AutoModelForCausalLM.from_config(config).train()
        if enabled:
            prefix_attn.enable(self.model, self_check=False, **options)

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


def times(steps: list[Step], batch: tuple[int, int], rounds: int) -> list[Quantiles]:
    """Of each step.

    Raises:
        AssertionError: if the models have different losses.
    """
    losses = torch.stack([step(*batch) for step in steps])
    assert losses.diff().abs() < 1e-4, f"{batch}: losses {losses.tolist()}"
    samples: dict[Step, list[float]] = {step: [] for step in steps}
    for _, step in interleaved(steps, range(rounds)):
        samples[step].append(processor_seconds(partial(step, *batch)))
    return [Quantiles.from_seconds(x) for x in samples.values()]


def counts(batch: tuple[int, int]) -> tuple[int, int]:
    """Tokens of a batch, and those of its packed row."""
    prefix, suffix = batch
    return GROUP * (prefix + suffix), prefix + GROUP * suffix


def measured(family: str, batch: tuple[int, int]) -> tuple[str, ...]:
    """A row of the table."""
    found = times([Step(family, enabled) for enabled in (False, True)], batch, ROUNDS)
    with fresh_processes() as processes:
        peaks = [processes.apply(peak, (family, enabled, batch)) for enabled in (False, True)]
    tokens, run = counts(batch)
    return (
        f"`{family}`",
        f"{batch[0]}, {batch[1]}",
        f"{tokens / run:.1f}x",
        *(f"{x.median / 1e3:.2f} ({x.p20 / 1e3:.2f}-{x.p80 / 1e3:.2f})" for x in found),
        f"{found[0].median / found[1].median:.2f}x",
        *(f"{x:.0f}" for x in peaks),
    )


def narrow_header() -> tuple[str, ...]:
    """Of the table of narrow models: a column for each batch, with the tokens that it saves."""
    batches = []
    for prefix, suffix in SMALL_BATCHES:
        tokens, run = counts((prefix, suffix))
        batches.append(f"{prefix}, {suffix}: {tokens - run} of {tokens}")
    return ("model", "width", *batches)


def measured_narrow(family: str, width: int) -> tuple[str, ...]:
    """A row of it: ratios, and times of the ordinary model."""
    steps = [Step(family, enabled, width, min_ratio=1.0) for enabled in (False, True)]
    cells = []
    for batch in SMALL_BATCHES:
        ordinary, enabled = times(steps, batch, NARROW_ROUNDS)
        cells.append(f"{ordinary.median / enabled.median:.2f}x ({ordinary.median:.0f})")
    return (f"`{family}`", f"{width}", *cells)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table of all families, or of those that are named."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--narrow", action="store_true", help="small batches of narrow models")
    args = parser.parse_args(arguments)
    families = args.families or list(FAMILIES)
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"unknown: {sorted(unknown)}; known: {', '.join(FAMILIES)}")
    if importlib.util.find_spec("transformers") is None:
        parser.error("it needs transformers: pip install 'prefix-attn[hf]'")
    header = narrow_header() if args.narrow else HEADER
    print(tables.markdown(header, [], "ll" + "r" * (len(header) - 2)))
    for family in families:
        rows: Iterable[tuple[str, ...]] = (measured(family, batch) for batch in BATCHES)
        if args.narrow:
            rows = (measured_narrow(family, width) for width in NARROW_WIDTHS)
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
