"""verl's real FSDP engine over data x sequence on gloo ranks, against the ordinary engine."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import verl  # noqa: F401  # conftest.py leaves this file out where it is missing
from torch import Tensor
from verl.utils.ulysses import set_ulysses_sequence_parallel_group

import prefix_attn
import prefix_attn.integrations.distributed  # before the ranks are forked
from tests.integrations.test_verl import (
    OUTPUTS,
    assert_run_within_budget,
    forward_and_backward,
    in_float64,
    micro_batch,
    new_engine,
    save_model,
)
from tests.ranks import on_ranks

MANY_RANKS = "MANY_RANKS"
# data x sequence: (ranks, those of a sequence)
MESHES = [
    pytest.param(4, 2, id="2 x 2"),
    pytest.param(4, 4, id="1 x 4, more ranks than KV heads"),
    pytest.param(8, 2, id="4 x 2"),
    pytest.param(
        16,
        4,
        id="4 x 4",
        marks=pytest.mark.skipif(
            MANY_RANKS not in os.environ,
            reason=f"sixteen processes, which run where {MANY_RANKS} is set",
        ),
    ),
]


def batch_of(data_rank: int, fused: bool = False) -> Any:
    """A micro-batch for each rank of the data dimension, with tokens of its own."""
    batch = micro_batch(True, fused)
    ids = batch["input_ids"]
    values = 3 + (ids.values() + data_rank) % 90
    batch["input_ids"] = torch.nested.nested_tensor_from_jagged(values, ids.offsets())
    return batch


def averaged(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as FSDP leaves them: the mean over all ranks."""
    for name, x in results.items():
        if name not in OUTPUTS:
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return results


def step(engine: Any, batch: Any, forward_only: bool) -> dict[str, Tensor]:
    if not forward_only:
        return forward_and_backward(engine, batch)
    engine.module.eval()
    with torch.no_grad():
        _, output = engine.forward_step(batch, None, forward_only=True)
    return {"log_probs": output["model_output"]["log_probs"].values()}


def assert_engines_match(sequence: int, *, fused: bool = False, forward_only: bool = False) -> None:
    """The ordinary engine on every rank by itself, and ours over the ranks of each sequence."""
    data_rank = dist.get_rank() // sequence
    found = {}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Without FSDP only the first rank of verl has weights, unless they are tied.
        save_model(folder, tie_word_embeddings=True)
        exact = averaged(in_float64(folder, patch, batch_of(data_rank)))
        model_class = transformers.Qwen3ForCausalLM
        for attention, ranks in (("sdpa", 1), ("prefix_attn", sequence)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(model_class, "forward", model_class.forward)  # verl's fused head
                engine = new_engine(folder, attention, fused, ulysses_sequence_parallel_size=ranks)
                if fused:  # verl's head would get a sharded weight on a CPU, with any attention
                    engine._build_fsdp_module = lambda module: module
                    engine._autocast_dtype = torch.float32
                engine._build_model_optimizer()
                set_ulysses_sequence_parallel_group(engine.ulysses_parallel_group)
                results = step(engine, batch_of(data_rank, fused), forward_only)
                set_ulysses_sequence_parallel_group(None)
            found[attention] = averaged(results) if fused else results
    expected = {name: exact[name] for name in found["sdpa"]}  # all, or the outputs alone
    assert_run_within_budget(found["prefix_attn"], expected, found["sdpa"])
    counts = prefix_attn.stats(engine.module)
    assert counts.packed_calls == counts.calls == 1
    assert counts.tokens_run < counts.tokens_in


@pytest.mark.parametrize(("ranks", "sequence"), MESHES)
@on_ranks("ranks")
def test_engine_over_ranks_matches_ordinary_engine(group: Any, ranks: int, sequence: int) -> None:
    assert_engines_match(sequence)


@on_ranks(4)
def test_fused_kernels_over_ranks_match_ordinary_ones(group: Any) -> None:
    assert_engines_match(2, fused=True)


@on_ranks(4)
def test_forward_only_over_ranks_matches_ordinary_engine(group: Any) -> None:
    assert_engines_match(2, forward_only=True)
