"""A sharded head on two gloo ranks, against the whole head in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from prefix_attn import PrefixLayout
from prefix_attn.losses import packed_log_probs, token_log_probs
from tests.ranks import on_ranks

RANKS = 2
ROWS, WIDTH = 9, 6


def mesh_of(group: Any) -> DeviceMesh:
    return init_device_mesh("cpu", (group.size(),), mesh_dim_names=("tp",))


def inputs(vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = {
        "hidden": normal(ROWS, WIDTH),
        "weight": normal(vocabulary, WIDTH),
        "bias": normal(vocabulary),
    }
    x["bias"][0] = -torch.inf  # rank 0 may have no logit but this one
    return x | {"targets": torch.randint(1, vocabulary, (ROWS,), generator=generator)}


def total_of(log_probs: Tensor, entropy: Tensor) -> Tensor:
    weights = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)
    return (log_probs * weights).sum() + (entropy * weights.flip(0)).sum()


@pytest.mark.parametrize("vocabulary", [29, 30, 2, 3])
@on_ranks(RANKS)
def test_vocabulary_parallel_head(group: Any, vocabulary: int) -> None:
    """29 tokens make shards of 15 and 14, 3 of two and one."""
    mesh = mesh_of(group)
    x = inputs(vocabulary)
    names = ("hidden", "weight", "bias")
    options = {"temperature": 0.7, "softcap": 3.0, "return_entropy": True, "chunk_size": 4}
    whole = {name: x[name].clone().requires_grad_() for name in names}
    expected = token_log_probs(**whole, targets=x["targets"], **options)
    grads = torch.autograd.grad(total_of(*expected), list(whole.values()))

    places = {"hidden": Replicate(), "weight": Shard(0), "bias": Shard(0)}
    leaves = {n: distribute_tensor(x[n], mesh, [places[n]]).requires_grad_() for n in names}
    results = token_log_probs(**leaves, targets=x["targets"], **options)
    assert all(type(r) is DTensor and r.placements == (Replicate(),) for r in results)
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.to_local(), exact)
    total_of(*(r.to_local() for r in results)).backward()
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert leaf.grad.placements == (places[name],)
        torch.testing.assert_close(leaf.grad.full_tensor(), grad)


class Head(nn.Linear):
    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_log_probs(hidden, self.weight, targets)


@on_ranks(RANKS)
def test_fsdp_head(group: Any) -> None:
    """What the message says to do: each rank with rows of its own, gradients averaged."""
    mesh = mesh_of(group)
    x = inputs(29)
    head = Head(WIDTH, 29, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(x["weight"])
    fully_shard(head, mesh=mesh)
    register_fsdp_forward_method(head, "log_probs")
    mine = slice(0, 4) if mesh.get_rank() == 0 else slice(4, ROWS)
    head.log_probs(x["hidden"][mine], x["targets"][mine]).sum().backward()
    weight = x["weight"].requires_grad_()
    token_log_probs(x["hidden"], weight, x["targets"]).sum().backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), weight.grad / RANKS)
    with pytest.raises(ValueError, match="register_fsdp_forward_method"):
        token_log_probs(x["hidden"], head.weight, x["targets"])
    with torch.no_grad():
        gathered = token_log_probs(x["hidden"], head.weight.full_tensor(), x["targets"])
    torch.testing.assert_close(gathered, token_log_probs(x["hidden"], weight, x["targets"]))


@on_ranks(RANKS)
def test_other_placements_are_refused(group: Any) -> None:
    mesh = mesh_of(group)
    x = inputs(29)

    def placed(name: str, *placements: object) -> DTensor:
        return distribute_tensor(x[name], mesh, list(placements))

    right = {"hidden": placed("hidden", Replicate()), "weight": placed("weight", Shard(0))}
    right["targets"] = x["targets"]
    for change in (
        {"weight": placed("weight", Shard(1))},
        {"weight": placed("weight", Replicate())},
        {"hidden": placed("hidden", Shard(0)), "targets": placed("targets", Shard(0))},
        {"bias": x["bias"]},
        {"bias": placed("bias", Replicate())},
    ):
        with pytest.raises(ValueError, match=r"needs weight and bias with placements \[Shard\(0"):
            token_log_probs(**(right | change))
    with pytest.raises(ValueError, match=r"hidden is a DTensor .*, weight a plain tensor"):
        token_log_probs(**(right | {"weight": x["weight"]}))
    layout, ids = PrefixLayout.from_sequences([list(range(1, ROWS + 1))])
    with pytest.raises(ValueError, match="hidden must be a plain tensor, got a DTensor"):
        packed_log_probs(right["hidden"], right["weight"], ids, layout)
