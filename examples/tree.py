"""A tree of rollouts: found in token lists, run as one row, with a log-probability for each token.

    python examples/tree.py

The model is a single layer of attention, to keep everything in sight.
"""

from __future__ import annotations

import torch

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.losses import completion_log_probs

torch.manual_seed(0)
prompt = [1, 2, 3, 4]
thought = [5, 6, 7]  # two of the rollouts branch after it
rollouts = [
    [*prompt, *thought, 8, 9],
    [*prompt, *thought, 10],
    [*prompt, 11, 12, 13],
]
layout, ids = PrefixLayout.from_sequences(rollouts)  # every shared token is one row
print(layout)  # who attends whom

embedding = torch.nn.Embedding(16, 64)
head = torch.nn.Linear(64, 16, bias=False)
x = embedding(ids).view(layout.num_tokens, 2, 32)  # (T, heads, D)
hidden = prefix_attention(x, x, x, layout).reshape(layout.num_tokens, 64)

# The last row of a segment predicts the first token of each of its branches.
log_probs, mask, _ = completion_log_probs(hidden, head.weight, ids, layout, len(prompt))
for row, kept in zip(log_probs.detach(), mask, strict=True):
    print("log-probabilities:", " ".join(f"{x:.2f}" for x in row[kept].tolist()))

(-log_probs.sum() / mask.sum()).backward()
print(f"gradient of the embedding: {tuple(embedding.weight.grad.shape)}")
