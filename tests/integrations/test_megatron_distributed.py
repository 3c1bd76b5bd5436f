"""An enabled Megatron-core GPTModel on two ranks: tensor, sequence and pipeline parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from prefix_attn.integrations.megatron import enable, stats
from tests.integrations.megatron_models import (
    EXACT,
    MOE,
    ROUNDING,
    build,
    config,
    deviation,
    gradients,
    padded_batch,
    parallel,
    row_of_sequences,
    rows_that_share,
    step,
)
from tests.ranks import on_ranks

RANKS = 2
EVEN = [row[: len(row) // 2 * 2] for row in rows_that_share()]
EQUAL = [row[:14] for row in rows_that_share()[:3]]
# Without sequence parallelism, with it, and with experts, whose losses see the places of each rank.
TENSOR = {
    "rows": ({}, row_of_sequences(EVEN), EXACT),
    "padded": ({}, padded_batch(), EXACT),
    "rows, sequence parallel": ({"sequence_parallel": True}, row_of_sequences(EVEN), EXACT),
    "padded, sequence parallel": (
        {"sequence_parallel": True},
        padded_batch([*EQUAL, EVEN[0][:9]]),
        EXACT,
    ),
    "latent, recomputed": (
        {
            "mla": True,
            "sequence_parallel": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        row_of_sequences(EVEN),
        EXACT,
    ),
    "experts": (
        {
            **MOE,
            "sequence_parallel": True,
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
            "moe_aux_loss_coeff": [3.0, 2.0, 1.0],
            "moe_z_loss_coeff": 3.0,
        },
        row_of_sequences(EVEN),
        ROUNDING,
    ),
    "experts, padded": (
        {**MOE, "sequence_parallel": True, "moe_router_load_balancing_type": "seq_aux_loss"},
        padded_batch(EQUAL, None),
        ROUNDING,
    ),
    "experts recomputed": (
        {
            **MOE,
            "sequence_parallel": True,
            "recompute_granularity": "selective",
            "recompute_modules": ["moe"],
        },
        row_of_sequences(EVEN),
        ROUNDING,
    ),
}


@pytest.mark.parametrize("name", TENSOR)
@on_ranks(RANKS)
def test_tensor_parallel_ranks_match_their_ordinary_run(group: Any, name: str) -> None:
    """Every rank has half of the heads; with sequence parallelism half of the rows as well."""
    settings, batch, limit = TENSOR[name]
    settings = config(tensor_model_parallel_size=RANKS, **settings)
    with parallel(tp=RANKS):
        plain, ours = build(settings), enable(build(settings))
        expected, found = (summed(model, step(model, batch)) for model in (plain, ours))
    assert stats(ours).packed_calls == 1, stats(ours)
    assert deviation(found, expected) < limit


def summed(model: torch.nn.Module, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds up what Megatron adds up over the ranks of a sequence after the backward pass."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(found[name], group=parallel_state.get_tensor_model_parallel_group())
    return found


@on_ranks(RANKS)
def test_pipeline_ranks_match_their_ordinary_run(group: Any) -> None:
    """Three micro-batches on Megatron's own schedule; only the first stage sees token ids."""
    settings = config(
        num_layers=4,
        pipeline_model_parallel_size=RANKS,
        pipeline_dtype=torch.float64,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
    )
    batches = [row_of_sequences([row[i:] for row in EVEN]) for i in range(3)]
    batches[1] = row_of_sequences([row.roll(i) for i, row in enumerate(EVEN[:3])])  # unshared
    with parallel(pp=RANKS):
        stages = {
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
        }
        plain, ours = build(settings, **stages), enable(build(settings, **stages))
        expected, found = (run_pipeline(model, batches, **stages) for model in (plain, ours))
    counts = stats(ours)
    assert (counts.calls, counts.packed_calls) == (3, 2), counts
    assert deviation(found, expected) < EXACT


def run_pipeline(
    model: torch.nn.Module, batches: list[dict[str, Any]], *, pre_process: bool, post_process: bool
) -> dict[str, torch.Tensor]:
    outs = {}

    def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        call = dict(next(iterator)["call"])
        if not pre_process:
            call["input_ids"] = None

        def loss(out: torch.Tensor) -> Any:
            outs[f"out {len(outs)}"] = out.detach()
            weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(3))
            return (out * weights).sum(), {}

        return model(**call), loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=64,
        micro_batch_size=1,
        forward_only=False,
    )
    assert len(outs) == (len(batches) if post_process else 0)
    return outs | gradients(model)
