"""Tiny vision-language models, and batches whose prompts hold pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.integrations.tiny_hybrids import DELTA
from tests.integrations.tiny_models import VOCAB, pad, tiny_config

PICTURE, START, END, VIDEO, AUDIO = (VOCAB - i for i in range(1, 6))
MEMBERS = 3
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
MIXTURE = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
IDS = {
    "image_token_id": PICTURE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
}


def _draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _words(n: int, seed: int) -> Tensor:
    return torch.randint(3, AUDIO, (n,), generator=torch.Generator().manual_seed(seed))


def rows_of(prompts: list[list[list[int] | int]]) -> list[Tensor]:
    """Each prompt with completions; numbers are words to draw, lists are tokens."""
    rows = []
    for p, parts in enumerate(prompts):
        prompt = torch.cat(
            [
                _words(part, 31 + 7 * p + i) if isinstance(part, int) else torch.tensor(part)
                for i, part in enumerate(parts)
            ]
        )
        rows += [
            torch.cat([prompt, _words(3 + 2 * i + p, 100 + 10 * p + i)]) for i in range(MEMBERS)
        ]
    return rows


def seeds_of(pictures: list[int], *, differ: bool) -> list[int]:
    """A seed for each picture of a batch: `pictures` in each prompt, for each member of it.

    With `differ` the last member of each prompt has pictures of its own.
    """
    return [
        900 + 10 * p + k + (1000 if differ and i == MEMBERS - 1 else 0)
        for p, number in enumerate(pictures)
        for i in range(MEMBERS)
        for k in range(number)
    ]


def _grids(model_type: str, side: str, differ: bool, video: bool) -> tuple[Any, dict[str, Tensor]]:
    """Qwen-VL and GLM-V: patches of all pictures end to end, as their grid says."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    }
    tower: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": 64,
    }
    text = dict(TEXT)
    if model_type == "qwen2_5_vl":
        tower |= {"window_size": 16, "fullatt_block_indexes": [1]}
    elif model_type == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        del tower["out_hidden_size"], tower["intermediate_size"]
    elif model_type.startswith("qwen3_5"):
        tower["num_position_embeddings"] = 64
        text |= DELTA
        rope["partial_rotary_factor"] = 1.0
    elif model_type.startswith("qwen3"):
        tower |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    else:
        tower |= {"image_size": 32}
        rope["partial_rotary_factor"] = 1.0
    if model_type.endswith("moe"):
        text |= MIXTURE
    config = transformers.AutoConfig.for_model(
        model_type, text_config={**text, "rope_parameters": rope}, vision_config=tower, **IDS
    )
    token = VIDEO if video and not model_type.startswith("glm") else PICTURE
    rows = rows_of(
        [
            [4, [START], [token] * 4, [END], 3],
            [2, [START], [token] * 8, [END], 2, [START], [token] * 4, [END], 2],
        ]
    )
    grids = [(1, 4, 4)] * MEMBERS + [(1, 4, 8), (1, 4, 4)] * MEMBERS
    seeds = seeds_of([1, 2], differ=differ)
    pixels = [_draw(t * h * w, 96, seed=s) for (t, h, w), s in zip(grids, seeds, strict=True)]
    batch = pad(rows, side)
    names = (
        ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    )
    batch |= dict(zip(names, (torch.cat(pixels), torch.tensor(grids)), strict=True))
    batch["mm_token_type_ids"] = (batch["input_ids"] == token).int() * (2 if video else 1)
    return config, batch


def _stacked(model_type: str, side: str, differ: bool) -> tuple[Any, dict[str, Tensor]]:
    """Pictures of one size, one behind the other."""
    text: dict[str, Any] = dict(TEXT, model_type="qwen2")
    tower: dict[str, Any] = dict(TOWER, model_type="clip_vision_model")
    further: dict[str, Any] = {"image_token_id": PICTURE, "image_token_index": PICTURE}
    tokens = 16
    if model_type == "internvl":
        size = {"image_size": [56, 56], "patch_size": [14, 14]}
        tower |= {"model_type": "internvl_vision", **size}
        tokens = 4
    elif model_type == "mistral3":
        text["model_type"] = "mistral"
        tower |= {"model_type": "pixtral", "head_dim": 16}
        further |= {"spatial_merge_size": 2, "vision_feature_layer": -1}
        tokens = 4
    elif model_type == "vipllava":
        further["vision_feature_layers"] = [-1, -2]
        tower["num_hidden_layers"] = 2
    else:
        further |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    if model_type in ("llava_next", "llava_onevision"):  # a picture and its one tile
        further["image_grid_pinpoints"] = [[56, 56]]
        tokens = 16 + 16 + 4
    config = transformers.AutoConfig.for_model(
        model_type, text_config=text, vision_config=tower, **further
    )
    config.image_token_id = PICTURE
    batch = pad(
        rows_of([[4, [PICTURE] * tokens, 3], [2, [PICTURE] * tokens, 2, [PICTURE] * tokens, 2]]),
        side,
    )
    tiles = (2,) if tokens == 36 else ()
    seeds = seeds_of([1, 2], differ=differ)
    batch["pixel_values"] = torch.stack([_draw(*tiles, 3, 56, 56, seed=s) for s in seeds])
    if model_type in ("mistral3", "llava_next", "llava_onevision"):
        batch["image_sizes"] = torch.tensor([[56, 56]] * len(seeds))
    return config, batch


def _prompts(tokens: int) -> list[list[list[int] | int]]:
    picture = [PICTURE] * tokens
    return [[4, picture, 3], [2, picture, 2, picture, 2]]


def _padded(model_type: str, side: str, differ: bool) -> tuple[Any, dict[str, Tensor]]:
    """Idefics 3 and SmolVLM: as many pictures in every row, some of them zeros."""
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config=dict(TEXT, model_type="llama"),
        vision_config=TOWER,
        image_token_id=PICTURE,
        scale_factor=2,
    )
    batch = pad(rows_of(_prompts(4)), side)
    seeds = iter(seeds_of([1, 2], differ=differ))
    pixels = torch.zeros(2 * MEMBERS, 2, 3, 56, 56, dtype=torch.float64)
    for row, number in enumerate([1] * MEMBERS + [2] * MEMBERS):
        for k in range(number):
            pixels[row, k] = _draw(3, 56, 56, seed=next(seeds))
    return config, {**batch, "pixel_values": pixels}


def _gemma3(model_type: str, side: str, differ: bool, **text: Any) -> tuple[Any, dict[str, Tensor]]:
    if model_type == "paligemma":
        config = transformers.AutoConfig.for_model(
            model_type,
            text_config=dict(TEXT, model_type="gemma"),
            vision_config=dict(TOWER, model_type="siglip_vision_model", projection_dim=64),
            projection_dim=64,
        )
        tokens = 16
    else:
        layers = {"layer_types": ["sliding_attention", "full_attention"], **text}
        inner = tiny_config("gemma3_text", **layers).to_diff_dict()
        config = transformers.AutoConfig.for_model(
            model_type, text_config=inner, vision_config=TOWER, mm_tokens_per_image=4
        )
        tokens = 4
    config.image_token_id = PICTURE
    prompts = [
        [4, [START], [PICTURE] * tokens, [END], 3],
        [2, [START], [PICTURE] * tokens, [END], 2, [START], [PICTURE] * tokens, [END], 2],
    ]
    batch = pad(rows_of(prompts), side)
    seeds = seeds_of([1, 2], differ=differ)
    batch["pixel_values"] = torch.stack([_draw(3, 56, 56, seed=s) for s in seeds])
    if model_type == "paligemma":  # the prompt sees all of itself, the completion is causal
        written = batch["attention_mask"].flip(1).cumsum(1).flip(1)
        lengths = [3 + 2 * i + p for p in range(2) for i in range(MEMBERS)]
        batch["token_type_ids"] = (written <= torch.tensor(lengths)[:, None]).long()
        batch["token_type_ids"] *= batch["attention_mask"]
    else:
        batch["token_type_ids"] = (batch["input_ids"] == PICTURE).long()
    return config, batch


def _gemma4(
    model_type: str,
    side: str,
    differ: bool,
    video: bool,
    head_dim: int = 32,
    bidirectional: str | None = "vision",
    per_layer: int = 8,
) -> tuple[Any, dict[str, Tensor]]:
    text = {
        **TEXT,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "global_head_dim": head_dim,
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0,
        "use_bidirectional_attention": bidirectional,
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    config = transformers.AutoConfig.for_model(
        model_type, text_config=text, vision_config=tower, audio_config=None
    )
    config.image_token_id, config.video_token_id, config.audio_token_id = PICTURE, VIDEO, AUDIO
    token = VIDEO if video else PICTURE
    # The second picture is half as large: the patches that it lacks are padding.
    prompts: list[list[list[int] | int]] = [
        [4, [START], [token] * 4, [END], 3],
        [2, [START], [token] * 2, [END], 2, [START], [token] * 4, [END], 2],
    ]
    batch = pad(rows_of(prompts), side)
    seeds = seeds_of([1, 2], differ=differ)
    square = torch.stack(
        torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1
    ).reshape(16, 2)
    half = square.masked_fill(torch.arange(16)[:, None] >= 8, -1)
    places = torch.stack([square] * MEMBERS + [half, square] * MEMBERS)
    pixels = torch.stack([_draw(16, 48, seed=s) for s in seeds])
    kind = "video" if video else "image"
    batch |= {
        "pixel_values_videos" if video else "pixel_values": pixels,
        f"{kind}_position_ids": places,
        "mm_token_type_ids": (batch["input_ids"] == token).int() * (2 if video else 1),
    }
    if video:
        batch["num_frames_per_video"] = torch.ones(len(seeds), dtype=torch.long)
    return config, batch


def vision_model(
    model_type: str,
    side: str = "right",
    *,
    differ: bool = False,
    video: bool = False,
    **changes: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """A model in float64 and a batch of two groups; the second prompt has two pictures.

    Args:
        model_type: of transformers.
        side: of the padding.
        differ: the last member of each group has other pictures behind equal ids.
        video: videos instead of pictures.
        **changes: of the configuration, for Gemma.
    """
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    if model_type.startswith(("qwen", "glm")):
        config, batch = _grids(model_type, side, differ, video)
    elif model_type in ("idefics3", "smolvlm"):
        config, batch = _padded(model_type, side, differ)
    elif model_type == "gemma4":
        config, batch = _gemma4(model_type, side, differ, video, **changes)
    elif model_type in ("gemma3", "paligemma"):
        config, batch = _gemma3(model_type, side, differ, **changes)
    else:
        config, batch = _stacked(model_type, side, differ)
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.05
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    if getattr(type(model), "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")
    if side == "left" and not model_type.startswith(("qwen", "glm")):  # these count by themselves
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model.double().train(), batch
