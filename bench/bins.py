"""Compares `pack_bins` with first-fit by length, on lengths drawn like those of training runs.

    python -m bench.bins

First-fit by length is what trainers do that cut micro-batches by tokens: the longest sequence
first, each to the first bin with room for all of it. Both run on an enabled model, so a bin runs
its unique tokens. Prints a table of Markdown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.tables import markdown
from prefix_attn import PrefixLayout, pack_bins

HEADER = (
    "rollouts",
    "sequences",
    "tokens",
    "first-fit: bins",
    "tokens run",
    "`pack_bins`: bins",
    "tokens run",
    "seconds",
)


@dataclass(frozen=True)
class Rollouts:
    """How the rollouts of a training step are drawn.

    Attributes:
        name: what the table calls them.
        prompts: how many there are.
        prompt: median tokens of a prompt.
        members: responses to a prompt, or to a branch of it.
        response: median tokens of a response; lengths are log-normal.
        spread: standard deviation of the logarithm of a response's length.
        max_tokens: that a bin holds, and a response at most with its prompt.
        branches: of each prompt, as long as a response; 0 for groups.
    """

    name: str
    prompts: int
    prompt: int
    members: int
    response: int
    spread: float
    max_tokens: int
    branches: int = 0

    def draw(self, rng: np.random.Generator) -> list[Tensor]:
        """Token ids, in a random order."""
        sequences = []
        for _ in range(self.prompts):
            prompt = _tokens(rng, self.prompt, 0.5, self.max_tokens // 2)
            heads = [prompt]
            if self.branches:
                room = self.max_tokens // 4
                parts = [_tokens(rng, self.response, 0.3, room) for _ in range(self.branches)]
                heads = [np.concatenate([prompt, part]) for part in parts]
            for head in heads:
                room = self.max_tokens - len(head)
                for _ in range(self.members):
                    response = _tokens(rng, self.response, self.spread, room)
                    sequences.append(np.concatenate([head, response]))
        return [torch.from_numpy(sequences[i]) for i in rng.permutation(len(sequences))]


STEPS = (
    Rollouts("short prompts, long answers", 64, 150, 16, 3000, 0.8, 32768),
    Rollouts("prompts as long as answers", 64, 1000, 8, 1000, 0.6, 16384),
    Rollouts("long prompts, short answers", 32, 6000, 8, 400, 0.6, 16384),
    Rollouts("trees: 4 branches, 4 answers each", 32, 1000, 4, 600, 0.5, 16384, branches=4),
)


def _tokens(rng: np.random.Generator, median: int, spread: float, most: int) -> np.ndarray:
    length = int(np.clip(rng.lognormal(np.log(median), spread), 1, most))
    return rng.integers(0, 100_000, length)


def first_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Bins of sequences, the longest first, each charged all of its tokens."""
    bins: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((k for k, room in enumerate(left) if room >= lengths[i]), len(bins))
        if place == len(bins):
            bins.append([])
            left.append(max_tokens)
        bins[place].append(i)
        left[place] -= lengths[i]
    return bins


def unique_tokens(sequences: list[Tensor], bins: list[list[int]]) -> int:
    """Tokens that an enabled model runs for some bins."""
    return sum(PrefixLayout.from_sequences([sequences[i] for i in b])[0].num_tokens for b in bins)


def main() -> None:
    """Prints the table."""
    rows = []
    for step in STEPS:
        sequences = step.draw(np.random.default_rng(0))
        lengths = [len(x) for x in sequences]
        by_length = first_fit(lengths, step.max_tokens)
        start = time.perf_counter()
        packed = pack_bins(sequences, step.max_tokens)
        seconds = time.perf_counter() - start
        counts = (len(sequences), sum(lengths))
        costs = [(len(bins), unique_tokens(sequences, bins)) for bins in (by_length, packed)]
        cells = [f"{n:,}" for pair in (counts, *costs) for n in pair]
        rows.append([step.name, *cells, f"{seconds:.2f}"])
    print(markdown(HEADER, rows, "l" + "r" * 7))


if __name__ == "__main__":
    main()
