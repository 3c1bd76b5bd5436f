"""Four completions of one prompt: attention computes the prompt once, forward and backward.

    python examples/minimal.py

Then it runs every sequence whole with PyTorch's own attention, and compares.
"""

from __future__ import annotations

import torch

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import repeated_attention

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# The packed axis: the prompt, then the completions end to end. T = 1024 + 128 + 96 + 160 + 64.
layout = PrefixLayout.from_lengths([1024], [[128, 96, 160, 64]], device=device)
print(layout)

# Ordinary inputs of attention, one row per packed token; two KV heads serve eight query heads.
q = torch.randn(layout.num_tokens, 8, 64, device=device, requires_grad=True)  # (T, Hq, D)
k = torch.randn(layout.num_tokens, 2, 64, device=device, requires_grad=True)  # (T, Hkv, D)
v = torch.randn(layout.num_tokens, 2, 64, device=device, requires_grad=True)  # (T, Hkv, DV)
gradient = torch.randn(layout.num_tokens, 8, 64, device=device)  # of some loss

shared = prefix_attention(q, k, v, layout)  # (T, Hq, DV)
shared_gradients = torch.autograd.grad(shared, (q, k, v), gradient)

repeated = repeated_attention(q, k, v, layout)  # the prompt four times
repeated_gradients = torch.autograd.grad(repeated, (q, k, v), gradient)

print(f"attention FLOPs: {layout.flop_ratio:.2f}x fewer")
print(f"largest difference of outputs: {(shared - repeated).abs().max().item():.1e}")
for name, ours, theirs in zip("qkv", shared_gradients, repeated_gradients, strict=True):
    print(f"largest difference of d{name}: {(ours - theirs).abs().max().item():.1e}")
