"""DeepSpeed's sequence-parallel slices, cut by its own adapter, on gloo ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp, ulysses_sp
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import prefix_attn
import prefix_attn.integrations.distributed  # before the ranks are forked
from prefix_attn.testing import assert_model_within_budget, assert_within_budget
from tests.integrations.rows_of_ranks import config_of, enabled, summed
from tests.integrations.tiny_models import KeepDouble, build, rows_that_share
from tests.ranks import on_ranks

IGNORED = -100
# DeepSpeed's own communication would compile an operator first.
ulysses_sp.dist = parallel_state_sp.dist = dist


def batch_of(rank: int) -> dict[str, Tensor]:
    """A padded batch as a collator makes it for DeepSpeed: positions and labels, and no mask."""
    rows = rows_that_share()
    rows = rows if rank % 2 else rows[::-1]
    ids, labels = torch.zeros(len(rows), 20, dtype=torch.long), torch.full((len(rows), 20), IGNORED)
    for i, row in enumerate(rows):
        row = (row + rank) % 97
        ids[i, : len(row)], labels[i, : len(row)] = row, row
    labels[:, :2] = IGNORED  # the prompts
    positions = torch.arange(20).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def one_process(dtype: torch.dtype, batch: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    model = build(config, dtype)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()[None]} | grads


@pytest.mark.parametrize("ranks", [2, 4])
@on_ranks("ranks")
def test_slices_of_deepspeed_match_one_process(group: Any, ranks: int) -> None:
    """The loss is put together as DeepSpeed's tutorial does: gathered, weighted by its tokens."""
    config = config_of("qwen3", group)
    model = enabled(build(config, torch.float32), group, "slices")
    slices = ulysses_sp.UlyssesSPDataLoaderAdapter(
        [batch_of(group.rank())], group.rank(), group, ranks, torch.device("cpu")
    )
    for number, own in enumerate(slices):  # the batch of each rank in turn, over all ranks
        assert own["input_ids"].shape[1] == 20 // ranks
        model.zero_grad()
        shift_labels = own.pop("shift_labels").contiguous()  # a copy where batches are on a GPU
        logits = model(**own, use_cache=False).logits
        count = (shift_labels != IGNORED).sum()
        loss = model.loss_function(
            logits=logits, labels=None, shift_labels=shift_labels, vocab_size=config.vocab_size
        )
        counts = gathered(count, ranks)
        parts = zip(all_gather(loss), counts, strict=True)
        total = sum(one * n for one, n in parts if n) / sum(counts)  # of none the mean is NaN
        total.backward()
        found = {"loss": total.detach()[None]} | summed(model, group, 1 / ranks)  # as ZeRO averages
        with KeepDouble():
            exact = one_process(torch.float64, batch_of(number), config)
        ordinary = one_process(torch.float32, batch_of(number), config)
        losses = [results.pop("loss") for results in (found, exact, ordinary)]
        assert_within_budget("loss", *losses, growth=math.sqrt(sum(counts)))
        assert_model_within_budget("gradients", found, exact, ordinary, tokens=sum(counts))
    told = prefix_attn.stats(model)
    assert told.calls == told.packed_calls == ranks
    assert told.tokens_run < 0.8 * told.tokens_in


def gathered(count: Tensor, ranks: int) -> list[Tensor]:
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count)
    return counts


@on_ranks(2)
def test_attention_of_deepspeed_is_refused_by_name(group: Any) -> None:
    """Its adapter is served, its attention would trade heads a second time."""
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    model = build(config_of("qwen3", group), torch.float32)
    try:
        ulysses_sp.UlyssesSPAttentionHF.register_with_transformers(
            model,
            core_attn_implementation="sdpa",
            sequence_parallel_size=2,
            micro_batch_size=1,
            seq_length=20,
            seq_length_is_variable=True,
        )
        with pytest.raises(NotImplementedError, match=r"comes from deepspeed.*which enable would"):
            enabled(model, group, "slices")
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._global_mapping.update(before)
