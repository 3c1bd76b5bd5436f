"""Trains a small Qwen3.5, mostly linear attention, on completions that share prompts.

    python examples/hybrid.py

Three of its four layers keep a recurrent state instead of keys and values. `enable` lets that state
fork where completions do, so the prompt runs once in every layer. The same run without it shows the
same losses. Needs transformers 5.18 or later.
"""

from __future__ import annotations

import time

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import prefix_attn

STEPS, PROMPTS, GROUP, PROMPT, COMPLETION, VOCABULARY = 10, 2, 4, 256, 12, 64


def build_model() -> Qwen3_5ForCausalLM:
    """Four layers with random weights, the same in every run."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )
    return Qwen3_5ForCausalLM(config)


def batch_of(step: int) -> torch.Tensor:
    """(B, L) ids: each completion counts on from the end of its prompt, in steps of its own."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(PROMPTS):
        prompt = torch.randint(VOCABULARY, (PROMPT,), generator=generator)
        counts = torch.arange(1, COMPLETION + 1)
        for i in range(GROUP):
            rows.append(torch.cat([prompt, (prompt[-1] + (i + 1) * counts) % VOCABULARY]))
    return torch.stack(rows)


def train(model: Qwen3_5ForCausalLM) -> tuple[list[float], float]:
    """The loss of every step, and the CPU seconds of all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, started = [], time.process_time()
    for step in range(STEPS):
        ids = batch_of(step)
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT:-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, PROMPT + 1 :].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.process_time() - started


torch.set_num_threads(1)  # others would count as busy while they wait
ordinary, ordinary_seconds = train(build_model())
model = prefix_attn.enable(build_model())
shared, shared_seconds = train(model)

stats = prefix_attn.stats(model)
for name, how in stats.mixers.items():
    print(f"{name}: {how}")
print(f"loss {shared[0]:.3f} -> {shared[-1]:.3f}, tokens {stats.ratio:.2f}x fewer")
difference = max(abs(a - b) for a, b in zip(ordinary, shared, strict=True))
print(f"largest difference of losses: {difference:.1e}")
print(f"CPU seconds: {ordinary_seconds:.1f} ordinary, {shared_seconds:.1f} shared")
