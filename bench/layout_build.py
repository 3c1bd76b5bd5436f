"""Times building a layout of 128k tokens: `python -m bench.layout_build`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from prefix_attn import PrefixLayout
from prefix_attn.timing import Clock, Quantiles

TOKENS = 131072
GROUPS = 64
MEMBERS = 16
REPEATS = 11
VOCABULARY = 50000


def lengths_of(groups: int, members: int, tokens: int) -> tuple[list[int], list[list[int]]]:
    """Ragged prefixes and suffixes that add up to `tokens`, about a quarter of them prefixes."""
    generator = torch.Generator().manual_seed(0)
    per_group = tokens // groups
    prefixes, suffixes = [], []
    for _ in range(groups):
        cuts = torch.randint(per_group // 4, per_group, (members - 1,), generator=generator)
        prefix = per_group // 4
        ends = [prefix, *sorted(cuts.tolist()), per_group]
        prefixes.append(prefix)
        suffixes.append([b - a for a, b in pairwise(ends)])
    return prefixes, suffixes


def main() -> None:
    """Prints one line per constructor."""
    prefixes, suffixes = lengths_of(GROUPS, MEMBERS, TOKENS)
    layout = PrefixLayout.from_lengths(prefixes, suffixes)
    segment_lengths, parents, _ = layout.segments.tolist()
    # Every segment starts with a token of its own, so that exactly the prefixes are shared.
    ids = torch.randint(VOCABULARY, (TOKENS,))
    starts = layout.cu_seqlens[:-1].long()
    filled = layout.segments[0] > 0
    ids[starts[filled]] = VOCABULARY + torch.arange(layout.num_segments)[filled]
    tensors = layout.unpack(ids)
    sequences = [x.tolist() for x in tensors]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in tensors], True)

    builds: dict[str, Callable[[], object]] = {
        "from_lengths": lambda: PrefixLayout.from_lengths(prefixes, suffixes),
        "from_tree": lambda: PrefixLayout.from_tree(segment_lengths, parents),
        "from_sequences (lists)": lambda: PrefixLayout.from_sequences(sequences),
        "from_sequences (tensors)": lambda: PrefixLayout.from_sequences(tensors),
        "from_padded": lambda: PrefixLayout.from_padded(padded, mask),
    }
    print(
        f"{layout.num_tokens} packed tokens, {GROUPS} groups of {MEMBERS} "
        f"({layout.repeated_tokens} tokens repeated), median (p20-p80) of {REPEATS}"
    )
    clock = Clock(torch.device("cpu"))
    for name, build in builds.items():
        build()
        x = Quantiles.from_seconds([clock.seconds(build) for _ in range(REPEATS)])
        print(f"{name:26}{x.median:9.2f} ms   ({x.p20:.2f}-{x.p80:.2f})")


if __name__ == "__main__":
    main()
