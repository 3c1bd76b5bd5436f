"""micro_groups on two processes whose trees differ: DDP, FSDP2, FSDP, and what is refused there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is missing")

from prefix_attn import micro_groups  # noqa: E402
from tests.integrations.test_micro_groups import (  # noqa: E402
    NARROW_ROUNDING,
    build,
    cut,
    gradients,
    group,
    loss_of,
    ordinary,
    tree,
)
from tests.integrations.tiny_models import deviation  # noqa: E402
from tests.ranks import on_ranks  # noqa: E402

RANKS = 2


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """Five micro-batches: a tree, and a group of which one row is all prefix; both cut anywhere."""
    if rank == 0:
        return cut(tree(), [1, 4, 1, 3, 2])
    members = group(7)
    return cut([*members[:4], members[0][:11], *members[4:]], [2, 2, 1, 2, 1])


def expected() -> dict[str, torch.Tensor]:
    """The mean over ranks of the gradients of their ordinary micro-batches."""
    model = build(enabled=False)
    ordinary(model, [batch for rank in range(RANKS) for batch in batches(rank)])
    return {name: grad / RANKS for name, grad in gradients(model, [1.0]).items()}


def check(model: Any, wrapped: Any, rank: int, *, every: bool) -> None:
    """One step, with gradients synchronised in every backward or in the last one."""
    mine = batches(rank)
    with micro_groups(wrapped, mine, min_tokens=1) as run:
        assert run.num_prefixes
        for i, batch in enumerate(mine):
            last = every or i == len(mine) - 1
            quiet: Any = nullcontext()
            if hasattr(wrapped, "set_requires_gradient_sync"):
                wrapped.set_requires_gradient_sync(last)
            elif not last:
                quiet = wrapped.no_sync()
            with quiet:
                loss_of(wrapped, batch).backward()
    want = expected()
    found = {"logits": want["logits"]}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    assert deviation(found, want) <= NARROW_ROUNDING


@on_ranks(RANKS)
def test_micro_groups_under_ddp(group: Any) -> None:
    rank = group.rank()
    for every, reentrant, options in (
        (False, None, {}),
        (True, None, {}),
        (True, False, {}),
        (False, None, {"find_unused_parameters": True}),
    ):
        model = build()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        check(model, DistributedDataParallel(model, **options), rank, every=every)
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    wrapped = DistributedDataParallel(model)
    with pytest.raises(NotImplementedError, match="with reentrant checkpointing"):
        micro_groups(wrapped, batches(rank))
    # The wrapper may not be what micro_groups was given.
    with pytest.raises(NotImplementedError, match="with reentrant checkpointing"):
        refused_inside(model, wrapped, batches(rank))


def refused_inside(model: Any, wrapped: Any, mine: list[dict[str, torch.Tensor]]) -> None:
    with micro_groups(model, mine, min_tokens=1):
        loss_of(wrapped, mine[0])


@on_ranks(RANKS)
def test_micro_groups_under_fsdp2(group: Any) -> None:
    rank = group.rank()
    for every, reentrant, options in (
        (False, None, {}),
        (True, None, {"reshard_after_forward": False}),
        (True, False, {}),
        (True, True, {}),
    ):
        model = build()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for layer in model.get_decoder().layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        check(model, model, rank, every=every)
    fewer = batches(rank)[: 5 - rank]
    with pytest.raises(ValueError, match=f"announce 4 to 5 micro-batches, this one {5 - rank}"):
        micro_groups(model, fewer)
    holes = [*batches(rank)[:4], {**batches(rank)[4]}]
    if rank:
        holes[4]["attention_mask"] = torch.arange(holes[4]["input_ids"].numel()) % 2
        holes[4]["attention_mask"] = holes[4]["attention_mask"].view_as(holes[4]["input_ids"])
    here = "can't run micro-batch 4, which enable would pass through"
    with pytest.raises(ValueError, match=here if rank else "another rank .* can't run its micro"):
        micro_groups(model, holes)


@on_ranks(RANKS)
def test_micro_groups_under_fsdp1(group: Any) -> None:
    rank = group.rank()
    model = build()
    layers = {type(model.get_decoder().layers[0])}
    wrapped = FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy(layers),
    )
    mine = batches(rank)
    with micro_groups(wrapped, mine, min_tokens=1):
        for batch in mine:
            loss_of(wrapped, batch).backward()
    want = expected()
    found = {"logits": want["logits"]}
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        for name, parameter in wrapped.named_parameters():
            found[name.replace("_fsdp_wrapped_module.", "")] = parameter.grad.clone()
    assert deviation(found, want) <= NARROW_ROUNDING
    for originals in (True, False):
        model = build()
        model.get_decoder().layers[0].requires_grad_(False)
        wrapped = FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=originals,
            auto_wrap_policy=ModuleWrapPolicy(layers),
        )
        with pytest.raises(NotImplementedError, match="FSDP frees parameters that are not trained"):
            micro_groups(wrapped, mine)
