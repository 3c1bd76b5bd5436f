"""Prints the values of ATEN_CPU_CAPABILITY below the one that PyTorch takes here by itself."""

import torch

LEVELS = ["default", "avx2", "avx512"]

own = torch.backends.cpu.get_cpu_capability().lower()
below = LEVELS[: LEVELS.index(own)] if own in LEVELS else LEVELS[:1]
print(*below, sep="\n")
