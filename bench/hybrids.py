"""One training step of hybrid transformers models, with and without `enable`, on a CPU.

Each family is a model of four layers with random weights in float32: three with its mixer and one
with attention. The batch is one group: a prefix of 1024 tokens and 8 completions of 128. Every step
runs in a process of its own, so that its peak memory is its own.

    python -m bench.hybrids
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

PREFIX, SUFFIX, GROUP = 1024, 128, 8
VOCABULARY = 512
STEPS = 3
MIXED = ["linear_attention"] * 3 + ["full_attention"]
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
FAMILIES: dict[str, dict[str, Any]] = {
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
    "minimax": {"layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def measure(family: str, enabled: bool) -> dict[str, float]:
    """The fastest of a few steps: CPU seconds, MiB above the model, and the loss."""
    import transformers

    import prefix_attn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if enabled:
        prefix_attn.enable(model, self_check=False)
    prompt = torch.randint(3, VOCABULARY, (PREFIX,))
    ids = torch.stack(
        [torch.cat([prompt, torch.randint(3, VOCABULARY, (SUFFIX,))]) for _ in range(GROUP)]
    )
    seconds, loss = [], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        started = time.process_time()
        logits = model(input_ids=ids, use_cache=False).logits[:, PREFIX - 1 : -1]
        targets = ids[:, PREFIX:].flatten()
        step_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        step_loss.backward()
        seconds.append(time.process_time() - started)
        loss = float(step_loss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "mib": (peak - before) / 1024, "loss": loss}


def main() -> None:
    """Prints a table of all families, or one measurement as JSON for the process that asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--enabled", action="store_true")
    arguments = parser.parse_args()
    if arguments.family:
        print(json.dumps(measure(arguments.family, arguments.enabled)))
        return
    tokens = GROUP * (PREFIX + SUFFIX) / (PREFIX + GROUP * SUFFIX)
    print(f"| model | ordinary | enabled | ratio (of tokens {tokens:.1f}) | memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for family in FAMILIES:
        found = []
        for options in ([], ["--enabled"]):
            command = [sys.executable, "-m", "bench.hybrids", "--family", family, *options]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(run.stdout.splitlines()[-1]))
        ordinary, enabled = found
        assert abs(ordinary["loss"] - enabled["loss"]) < 1e-4, (family, found)
        print(
            f"| `{family}` | {ordinary['seconds']:.2f} s | {enabled['seconds']:.2f} s "
            f"| {ordinary['seconds'] / enabled['seconds']:.1f} "
            f"| {ordinary['mib']:.0f} MiB -> {enabled['mib']:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
