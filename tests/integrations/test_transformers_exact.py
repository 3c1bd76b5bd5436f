"""Logits and all gradients of enabled models against ordinary batches, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from tests.integrations.tiny_hybrids import HYBRIDS  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    KeepDouble,
    allowed_rounding,
    as_row,
    build,
    deviation,
    pad,
    rows_that_share,
    run,
    tiny_config,
)

MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
KV_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}
MLA = {"num_key_value_heads": 4}  # DeepSeek's latent attention: D is not DV

# Windows are 6, less than the sequences; changes that a tiny configuration needs.
EXACT: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {},
    "aria_text": {},
    "axk1": {**MLA, "n_group": 1, "topk_group": 1},
    "beam": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 16},
    "cohere": {},
    "cohere2": MIXED,
    "cohere2_moe": MIXED,
    "cwm": {},
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "diffllama": {},
    "dory": {},
    "dots1": {
        **MIXED,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_k": 2},
    "exaone": {},
    "exaone4": MIXED,
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {**MIXED, "attn_logit_softcapping": 5.0},
    "gemma3_text": MIXED,
    "gemma3n_text": {
        **KV_SHARED,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": 48,
    },
    "gemma4_text": {**KV_SHARED, "global_head_dim": 32},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": MIXED,
    "gptj": {"rotary_dim": 16},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v3": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jetmoe": {},
    "kolibri1": {},
    "laguna": {},
    "llama": {},
    "longcat_flash": {
        **MLA,
        "num_layers": 1,
        "ffn_hidden_size": 48,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mellum": MIXED,
    "mimo_v2_flash": {},
    "minicpm3": MLA,
    "minimax_m2": {},
    "ministral": {**MIXED, "head_dim": 16},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "nanochat": {},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"sliding_window": 6},
    "qwen2": {**MIXED, "use_sliding_window": True, "sliding_window": 6},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 6},
    "qwen3": {},
    "qwen3_moe": {},
    "sarvam_mla": MLA,
    "sarvam_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "starcoder2": {},
    "vaultgemma": MIXED,
    "youtu": MLA,
}


def known(model_type: str) -> bool:
    return model_type in transformers.CONFIG_MAPPING


@pytest.fixture(params=list(EXACT))
def case(request):
    """A model type and the options with which it is called."""
    if not known(request.param):
        pytest.skip(f"{request.param} is not in transformers {transformers.__version__}")
    config = tiny_config(request.param, **EXACT[request.param])
    options = {"output_router_logits": True} if hasattr(config, "output_router_logits") else {}
    return config, options


def test_logits_and_gradients_match_ordinary_batches(case):
    config, options = case
    model = build(config).eval()  # some routers draw random numbers in training
    if not type(model.base_model)._supports_attention_backend:
        pytest.skip(f"{config.model_type} has no interface in {transformers.__version__}")
    rows = rows_that_share()
    right, left = pad(rows), pad(rows, "left")
    depth = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batches = {
        "right": right,
        "left": left,
        "left with position_ids": {**left, "position_ids": depth},
        "row": as_row(rows),
    }
    with KeepDouble():
        ordinary = {
            # Some models mix the sequences of a row unless flash attention runs it: a row is
            # compared with the same sequences as a batch.
            name: run(model, right if name == "row" else batch, **options)
            for name, batch in batches.items()
        }
        prefix_attn.enable(model, min_ratio=1.0)
        packed = {name: run(model, batch, **options) for name, batch in batches.items()}
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == counts.calls == len(batches)
    assert counts.tokens_run < counts.tokens_in

    allowed = allowed_rounding(config, right, runs=2, **options)
    found = {name: deviation(packed[name], ordinary[name]) for name in batches}
    assert all(error <= allowed for error in found.values()), (found, allowed)


def test_the_comparison_notices_one_wrong_token():
    """Another token in a shared prefix changes the results beyond what the comparison allows."""
    model = build(tiny_config("llama"))
    right = pad(rows_that_share())
    wrong = {**right, "input_ids": right["input_ids"].clone()}
    wrong["input_ids"][0, 3] += 1
    assert deviation(run(model, wrong), run(model, right)) > 1e-3


def test_every_tested_type_skips_the_self_check():
    from prefix_attn.integrations.transformers.self_check import TESTED_MODEL_TYPES

    assert {*EXACT, *HYBRIDS} == TESTED_MODEL_TYPES


def test_the_documentation_names_every_tested_type():
    page = (Path(__file__).parents[2] / "docs" / "pages" / "transformers.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| exact |")]
    assert set(re.findall("`(.*?)`", line)) == {*EXACT, *HYBRIDS}
