"""Enabled models on two processes: DDP, FSDP2 with checkpointing, tensor parallelism."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is missing")

import prefix_attn  # noqa: E402
from prefix_attn.integrations.transformers import attention as interface  # noqa: E402
from tests.integrations.tiny_hybrids import HYBRIDS  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    VOCAB,
    build,
    deviation,
    loss_of,
    pad,
    rows_that_share,
    tiny_config,
)
from tests.ranks import on_ranks  # noqa: E402

RANKS = 2
# Two orders above the deviation of float64 runs whose norms compute in float32.
ROUNDING = 1e2 * torch.finfo(torch.float32).eps


def batches():
    """One batch for each rank; the second shares nothing and is passed through."""
    rows = rows_that_share()
    return [pad(rows), pad([rows[1], rows[4], rows[2], rows[3][12:]])]


def ordinary_gradients(indices=range(RANKS)):
    """The mean over ranks of the gradients of ordinary batches."""
    model = build(tiny_config("qwen3"))
    for i in indices:
        batch = batches()[i]
        loss = loss_of(model(**batch, use_cache=False), batch["attention_mask"])
        (loss / len(indices)).backward()
    return {"logits": torch.ones(1)} | {n: p.grad for n, p in model.named_parameters()}


def gradients(model):
    found = {"logits": torch.ones(1)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.")] = grad
    return found


def step(model, rank):
    batch = batches()[rank]
    loss_of(model(**batch), batch["attention_mask"]).backward()
    counts = prefix_attn.stats(model)
    assert (counts.calls, counts.packed_calls) == (1, int(rank == 0)), counts


@on_ranks(RANKS)
def test_enabled_model_under_ddp(group):
    model = prefix_attn.enable(build(tiny_config("qwen3")), min_ratio=1.05)
    model = torch.nn.parallel.DistributedDataParallel(model)
    step(model, group.rank())
    assert deviation(gradients(model), ordinary_gradients()) <= ROUNDING


@on_ranks(RANKS)
def test_layout_arrives_through_ddp(group):
    """A layout as a keyword of the wrapped model arrives as it is."""
    seen, attend = [], interface.prefix_attention
    model = build(tiny_config("qwen3"), attn_implementation="prefix_attn")
    model = torch.nn.parallel.DistributedDataParallel(model)
    layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interface,
            "prefix_attention",
            lambda q, k, v, layout, **kw: seen.append(layout) or attend(q, k, v, layout, **kw),
        )
        model(
            input_ids=ids[None],
            position_ids=layout.position_ids[None],
            prefix_layout=layout,
            use_cache=False,
        ).logits.sum().backward()
    assert len(seen) == 2
    assert all(one is layout for one in seen)


@on_ranks(RANKS)
def test_enabled_model_under_fsdp2(group):
    """Sharded parameters, the self-check on, one rank that packs and one that does not."""
    model = build(tiny_config("qwen3"))
    model.gradient_checkpointing_enable()
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    prefix_attn.enable(model, min_ratio=1.05, self_check=True)
    step(model, group.rank())
    assert deviation(gradients(model), ordinary_gradients()) <= ROUNDING


def trees(rank):
    """Another tree on each rank: other lengths, segments and depths."""
    generator = torch.Generator().manual_seed(7 + rank)

    def draw(n):
        return torch.randint(3, VOCAB, (n,), generator=generator)

    prompt = draw(9 + rank)
    rows = [torch.cat([prompt, draw(n)]) for n in ((3, 5, 2) if rank else (4, 4))]
    return pad(rows + [torch.cat([rows[0], draw(n)]) for n in ((2, 3) if rank else ())])


@on_ranks(RANKS)
def test_enabled_mixers_under_fsdp2(group):
    """The projections of mixers are units of their own: each rank must gather them as often."""
    for model_type in ("qwen3_5_text", "minimax"):
        if model_type not in transformers.CONFIG_MAPPING:
            continue
        config = tiny_config(model_type, **HYBRIDS[model_type][1])
        want = build(config)
        for batch in map(trees, range(RANKS)):
            loss = loss_of(want(**batch, use_cache=False), batch["attention_mask"])
            (loss / RANKS).backward()
        model = build(config)
        for module in model.get_decoder().layers.modules():
            if isinstance(module, torch.nn.Linear):
                fully_shard(module)
        for layer in model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
        prefix_attn.enable(model, min_ratio=1.0)
        batch = trees(group.rank())
        loss_of(model(**batch, use_cache=False), batch["attention_mask"]).backward()
        counts = prefix_attn.stats(model)
        assert counts.packed_calls == 1
        assert counts.mixers
        assert deviation(gradients(model), gradients(want)) <= ROUNDING


@on_ranks(RANKS)
def test_enabled_model_under_tensor_parallelism(group):
    path = [tempfile.mkdtemp()] if group.rank() == 0 else [None]
    if group.rank() == 0:
        build(tiny_config("qwen3"), torch.float32).save_pretrained(path[0])
    dist.broadcast_object_list(path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    batch = batches()[0]
    mask = batch["attention_mask"].bool()
    want = load(path[0])(**batch).logits[mask]
    model = load(path[0], tp_plan="auto")
    ordinary = model(**batch).logits[mask]
    prefix_attn.enable(model, min_ratio=1.0)
    found = model(**batch).logits[mask]
    assert prefix_attn.stats(model).packed_calls == 1
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    weight = weight.to_local() if hasattr(weight, "to_local") else weight  # before DTensors
    assert weight.shape[0] == 32
    band = ROUNDING * want.abs().max()
    assert (ordinary - want).abs().max() <= band
    assert (found - want).abs().max() <= band
