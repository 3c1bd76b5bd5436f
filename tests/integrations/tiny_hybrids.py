"""Tiny models with recurrent, linear-attention and convolutional mixers."""

from __future__ import annotations

from typing import Any

BOTH = ["linear_attention", "full_attention"]
DELTA = {
    "layer_types": BOTH,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
KIMI = {
    "layer_types": BOTH,
    "mlp_layer_types": ["dense", "sparse"],
    "num_key_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}

GATED_DELTA = "causal_conv1d_fn, torch_chunk_gated_delta_rule along the tree"
KDA = "causal_conv1d_fn, chunk_kimi_delta_attention along the tree"
SCAN2 = "causal_conv1d_fn, mamba2_chunk_scan along the tree"
SCAN1 = "causal_conv1d_fn, mamba_selective_scan along the tree"
SHORT = "causal_conv1d_fn along the tree"
WHOLE = "whole sequences"

# How the mixers of each type are served from transformers 5.18 on, and what a tiny one needs.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid": (
        KDA,
        {
            **KIMI,
            "num_experts_per_token": 2,
            "num_expert_group": 1,
            "topk_group": 1,
            "qk_rope_head_dim": 8,
        },
    ),
    "bamba": (SCAN2, {**MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": (SCAN2, {**MAMBA2, "mamba_d_ssm": 128}),
    "granitemoehybrid": (SCAN2, {**MAMBA2, "layer_types": BOTH}),
    "jamba": (
        SCAN1,
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
    "kimi_linear": (KDA, {**KIMI, "num_experts_per_token": 2, "v_head_dim": 16, "head_dim": 8}),
    "lara_mini": (GATED_DELTA, DELTA),
    "lfm2": (SHORT, CONVOLUTION),
    "lfm2_moe": (SHORT, CONVOLUTION),
    "lfm3": (SHORT, CONVOLUTION),
    "mamba2": (
        SCAN2,
        {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    ),
    "minimax": (WHOLE, {"layer_types": BOTH, "block_size": 8}),
    "nemotron_h": (
        SCAN2,
        {
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 4,
        },
    ),
    "olmo_hybrid": (GATED_DELTA, DELTA),
    "qwen3_5_moe_text": (GATED_DELTA, {**DELTA, "shared_expert_intermediate_size": 16}),
    "qwen3_5_text": (GATED_DELTA, DELTA),
    "qwen3_next": (GATED_DELTA, {**DELTA, "shared_expert_intermediate_size": 16}),
    "recurrent_gemma": (
        WHOLE,
        {
            "num_hidden_layers": 3,
            "attention_window_size": 6,
            "lru_width": 64,
            "num_key_value_heads": 1,
        },
    ),
    "zamba2": (
        SCAN2,
        {
            "num_hidden_layers": 4,
            "hybrid_layer_ids": [1, 3],
            "layer_types": ["linear_attention", "hybrid"] * 2,
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "mamba_headdim": 16,
            "chunk_size": 4,
            "num_key_value_heads": 4,
            "num_mem_blocks": 1,
            "attention_head_dim": 32,
            "head_dim": 32,
            "attention_hidden_size": 128,
        },
    ),
    "zaya": (WHOLE, {"num_experts_per_tok": 1}),
}
