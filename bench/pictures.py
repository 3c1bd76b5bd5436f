"""Times updates of a small Qwen2.5-VL on a CPU: `python -m bench.pictures`.

One group over one picture: the ordinary model, packed, and packed with the tower run once. All take
turns. Seconds are those of the process on one thread, which other programs disturb little.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import transformers

import prefix_attn
from prefix_attn.timing import Quantiles, interleaved, processor_seconds

MEMBERS, COMPLETION, TEXT = 8, 64, 24
GRID = (1, 24, 24)  # patches of the picture; four of them are one token
ROUNDS = 5
PICTURE, START, END, VIDEO = 990, 991, 992, 993
WAYS = ("ordinary", "packed", "packed, tower once")


def make_model(way: str, *, frozen: bool) -> Any:
    """A model in float32: six layers of width 256, a tower of five layers of width 96."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 5,
            "hidden_size": 96,
            "num_heads": 2,
            "intermediate_size": 256,
            "out_hidden_size": 256,
            "window_size": 112,
            "fullatt_block_indexes": [2, 4],
        },
        image_token_id=PICTURE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).train()
    model.model.visual.requires_grad_(not frozen)
    if way != "ordinary":
        prefix_attn.enable(model, self_check=False, share_pictures=way.endswith("once"))
    return model


def make_batch() -> dict[str, Any]:
    """The rows of one group: text, the picture, text, and a completion each."""

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(3, PICTURE, shape)

    patches = math.prod(GRID)
    picture = torch.full((patches // 4,), PICTURE)
    marks = torch.tensor([START]), torch.tensor([END])
    prompt = torch.cat([words(TEXT), marks[0], picture, marks[1], words(TEXT)])
    ids = torch.cat([prompt.expand(MEMBERS, -1), words(MEMBERS, COMPLETION)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(patches, 1176).repeat(MEMBERS, 1),
        "image_grid_thw": torch.tensor([GRID] * MEMBERS),
        "mm_token_type_ids": (ids == PICTURE).int(),
    }


def update(model: Any, batch: dict[str, Any]) -> None:
    """One forward and backward pass."""
    logits = model(**batch, use_cache=False, logits_to_keep=COMPLETION + 1).logits
    chosen = batch["input_ids"][:, -COMPLETION:, None]
    logits[:, :-1].log_softmax(-1).gather(2, chosen).mean().backward()


def main() -> None:
    """Prints a line for each way, with a trained and with a frozen tower."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    batch = make_batch()
    tokens = batch["input_ids"].shape[1]
    print(f"{MEMBERS} rows of {tokens} tokens, median (p20-p80) of {ROUNDS} updates in ms")
    for frozen in (False, True):
        models = {way: make_model(way, frozen=frozen) for way in WAYS}
        samples: dict[str, list[float]] = {way: [] for way in WAYS}
        for model in models.values():
            update(model, batch)
        for _, way in interleaved(WAYS, range(ROUNDS)):
            samples[way].append(processor_seconds(partial(update, models[way], batch)))
        for way in WAYS:
            t = Quantiles.from_seconds(samples[way])
            tower = "frozen" if frozen else "trained"
            print(f"{tower} tower, {way}: {t.median:.0f} ({t.p20:.0f}-{t.p80:.0f})")


if __name__ == "__main__":
    main()
