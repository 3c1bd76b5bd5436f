"""Compares packed and ordinary hidden states of models that the tests do not cover."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Types of decoders for which the tests compare every logit and gradient in float64.
TESTED_MODEL_TYPES = frozenset(
    {
        "afmoe",
        "apertus",
        "apertus1p5_text",
        "arcee",
        "aria_text",
        "axk1",
        "bailing_hybrid",
        "bamba",
        "beam",
        "bitnet",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "dory",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone",
        "exaone4",
        "exaone_moe",
        "falcon_h1",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "helium",
        "hrm_text",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jamba",
        "jetmoe",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lara_mini",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "llama",
        "longcat_flash",
        "mamba2",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minimax",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert-decoder",
        "nanochat",
        "nemotron",
        "nemotron_h",
        "olmo",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "recurrent_gemma",
        "sarvam_mla",
        "sarvam_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "starcoder2",
        "vaultgemma",
        "youtu",
        "zamba2",
        "zaya",
    }
)

PREFIX, SUFFIXES, OTHER = 6, (3, 5), 4
DRAWS = 3  # of tokens for these rows
LONGEST_WINDOW = 64  # sliding windows up to this one are exercised

Run = Callable[[dict[str, Any]], Tensor]


def self_check(
    backbone: PreTrainedModel, tokens: Tensor, run: Run, run_packed: Callable[..., Tensor | None]
) -> None:
    """Runs a small batch, made of tokens of the first call, both ways.

    The batch has a few tokens and its shape does not depend on data, so that with sharded
    parameters every rank runs the same number of forward passes.

    Rounding may cost half of the digits that the dtype holds (the square root of its epsilon), and
    twice what padding alone changes: the ordinary batch against each row on its own. A token that
    sees the wrong context is wrong in its first digit, whatever the tokens are. Now and then
    rounding also sends a token to another expert: so each row is drawn several times, and a place
    in it is wrong if it is wrong in every draw.

    Args:
        backbone: the decoder.
        tokens: (B, L) ids or (B, L, H) embeddings of the call.
        run: hidden states of an ordinary call.
        run_packed: the same for a packed call, None if the batch is passed through.

    Raises:
        RuntimeError: if packed and ordinary hidden states differ by more than rounding.
    """
    rows = _rows(tokens, getattr(backbone.config, "sliding_window", None))
    lengths = [len(row) for row in rows]
    name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
    positions = [torch.arange(n, device=tokens.device) for n in lengths]
    with torch.no_grad(), _evaluating(backbone):
        # Rows of one length need no padding.
        kinds_of_rows = len(rows) // DRAWS
        same = [run({name: torch.stack(rows[i::kinds_of_rows])}) for i in range(kinds_of_rows)]
        alone = torch.cat([same[i][draw] for draw in range(DRAWS) for i in range(kinds_of_rows)])
        right, mask = _pad(rows, left=False)
        right_hidden = run({name: right, "attention_mask": mask})[mask.bool()]
        noise = _distance(right_hidden, alone)
        allowed = 2 * noise + _epsilon(alone) ** 0.5
        left, left_mask = _pad(rows, left=True)
        depth = (left_mask.cumsum(1) - 1).clamp(min=0)
        kinds = {
            "right padding": {name: right, "attention_mask": mask},
            "left padding": {name: left, "attention_mask": left_mask},
            "left padding with position_ids": {
                name: left,
                "attention_mask": left_mask,
                "position_ids": depth,
            },
        }
        for kind, batch in kinds.items():
            keep = batch["attention_mask"].bool()
            packed = run_packed(dict(batch))
            if packed is not None:
                _compare(backbone, kind, packed[keep], run(dict(batch))[keep], allowed)
        row = {name: torch.cat(rows)[None], "position_ids": torch.cat(positions)[None]}
        packed = run_packed(row)
        if packed is not None:
            _compare(backbone, "a row of several sequences", packed[0], alone, allowed)


def _compare(
    backbone: PreTrainedModel, kind: str, packed: Tensor, ordinary: Tensor, allowed: float
) -> None:
    distance = _distance(packed, ordinary)
    if not distance <= allowed:
        raise RuntimeError(
            f"prefix_attn's self-check failed on {type(backbone).__name__} (model type "
            f"{backbone.config.model_type!r}, {kind}): hidden states of the packed row are "
            f"{distance:.1e} away from those of the batch, relative to their size; rounding "
            f"explains {allowed:.1e}. Packing would be wrong: call prefix_attn.disable(model)"
        )


def _rows(tokens: Tensor, window: int | None) -> list[Tensor]:
    """Three rows, two of which share a prefix, of tokens from all over the batch; and so on."""
    prefix = PREFIX + min(window or 0, LONGEST_WINDOW)
    sizes = [prefix, *SUFFIXES, OTHER]
    flat = tokens.flatten(0, 1)
    at = torch.linspace(0, flat.shape[0] - 1, DRAWS * sum(sizes), device=flat.device).long()
    rows = []
    for drawn in flat[at].detach().chunk(DRAWS):
        shared, *suffixes, other = drawn.split(sizes)
        rows += [*(torch.cat([shared, suffix]) for suffix in suffixes), other]
    return rows


def _pad(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    batch = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=batch.device)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        batch[i, at], mask[i, at] = row, 1
    return batch, mask


def _distance(a: Tensor, b: Tensor) -> float:
    """(T, H) twice -> the largest difference of a place, relative to the root mean square of b.

    A place counts with the draw in which it differs least.
    """
    difference = (a.double() - b.double()).square().mean(-1).unflatten(0, (DRAWS, -1)).amin(0)
    return float((difference.max() / b.double().square().mean()).sqrt())


def _epsilon(hidden: Tensor) -> float:
    """Of the coarsest dtype in which the model computes."""
    eps = torch.finfo(hidden.dtype).eps
    if torch.is_autocast_enabled(hidden.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(hidden.device.type)).eps)
    return eps


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and noise; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
