"""Sequence parallelism inside `enable`, on 2, 3, 4 and 8 gloo ranks, against one process.

This file is also the script of the ranks: eight processes start once and run every function named
`check_*`, each on the first few of them. Each of the tests below reports one of these.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import prefix_attn
import prefix_attn.integrations.transformers
from bench.sequence_parallel import Counted
from prefix_attn.losses import completion_log_probs, gspo_loss, packed_log_probs, shard_rows
from prefix_attn.shards import WAYS
from tests.docs_examples import run_examples
from tests.integrations.tiny_models import (
    SMALL,
    VOCAB,
    KeepDouble,
    as_row,
    build,
    deviation,
    loss_of,
    pad,
    rows_that_share,
    run,
    tiny_config,
)

RANKS = 8
LONGEST = 300  # seconds
# Two orders above the deviation of float64 runs whose norms compute in float32.
ROUNDING = 1e2 * torch.finfo(torch.float32).eps
HEADS = {  # that the ranks can share
    2: {},
    3: {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
    4: {},  # two KV heads: fewer than ranks
    8: {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128},
}
# What all processes have to make together.
GROUPS: dict[int, Any] = {}  # of the first ranks, by their number
MESHES: dict[Any, Any] = {}  # of twice 2 x 2 ranks
CHECKS: dict[str, tuple[int, Callable[[Any], None]]] = {}


def on_ranks(count: int) -> Callable[[Callable], Callable]:
    """Runs a check on the first ranks; it gets their group."""

    def register(check: Callable) -> Callable:
        CHECKS[check.__name__.removeprefix("check_")] = (count, check)
        return check

    return register


# ---- what is compared -------------------------------------------------------------------------


def config_of(name: str, group: Any, **changes: Any) -> Any:
    return tiny_config(name, **{**HEADS[group.size()], **changes})


def slice_of(batch: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """This rank's columns, which the batch has in a multiple of the ranks."""
    n, rank = batch["input_ids"].shape[1] // group.size(), group.rank()
    return {name: x[:, rank * n : (rank + 1) * n] for name, x in batch.items()}


def divisible(batch: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """Padded at its end; positions of padding start anew, as verl numbers them."""
    more = -batch["input_ids"].shape[1] % ranks
    padded = {name: torch.nn.functional.pad(x, (0, more)) for name, x in batch.items()}
    if "position_ids" in batch and more:
        padded["position_ids"][:, -more:] = torch.arange(more)
    return padded


def enabled(
    model: Any, group: Any, inputs: str = "whole", way: str = "auto", **options: Any
) -> Any:
    return prefix_attn.enable(
        model,
        sequence_parallel_group=group,
        sequence_parallel_inputs=inputs,
        sequence_parallel_way=way,
        **options,
    )


def summed(model: Any, group: Any, factor: float = 1.0) -> dict[str, Tensor]:
    """Every gradient, summed over the ranks, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.clone() * factor
            dist.all_reduce(grad, group=group)
            found[name] = grad
    return found


def weights_of(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)


def run_whole(model: Any, batch: dict[str, Tensor], group: Any, **options: Any) -> dict:
    """The same loss on every rank: the mean of the ranks' gradients is that of one process."""
    model.zero_grad(set_to_none=True)
    mask = batch.get("attention_mask")
    out = model(**batch, **{"use_cache": False, **options})
    loss_of(out, mask).backward()
    logits = out.logits.detach()
    found = {"logits": logits if mask is None else logits[mask.bool()]}
    return found | summed(model, group, 1 / group.size())


def run_slices(model: Any, batch: dict[str, Tensor], group: Any, **options: Any) -> dict:
    """A loss for each rank's own columns: the sum of the ranks' gradients is that of their sum."""
    model.zero_grad(set_to_none=True)
    length = batch["input_ids"].shape[1]
    whole = divisible(batch, group.size())
    own = slice_of(whole, group)
    out = model(**own, **{"use_cache": False, **options})
    mask = own.get("attention_mask", torch.ones_like(own["input_ids"])).bool()
    n = mask.shape[1]
    parts = [torch.empty_like(out.logits) for _ in range(group.size())]
    dist.all_gather(parts, out.logits.detach().contiguous(), group=group)
    logits = torch.cat(parts, 1)[:, :length]
    # The loss of `loss_of`, whose weights are drawn for the tokens of the whole batch.
    real = whole.get("attention_mask", torch.ones_like(whole["input_ids"])).bool()
    real[:, length:] = False
    weights = torch.zeros(*real.shape, VOCAB, dtype=logits.dtype)
    kept = logits[real[:, :length]]
    weights[real] = weights_of(kept if "attention_mask" in batch else logits).view_as(kept)
    weights = weights[:, group.rank() * n : (group.rank() + 1) * n]
    (torch.tanh(out.logits) * weights).sum().backward()
    return {"logits": kept if "attention_mask" in batch else logits} | summed(model, group)


def assert_exact(
    config: Any, batch: dict[str, Tensor], group: Any, inputs: str = "whole", **options: Any
) -> None:
    """Logits and gradients of the ranks together are those of one process, in both ways.

    A difference of two float64 runs is at most twice the error of one. The error of one is that of
    a float32 run, times the ratio of the epsilons.
    """
    truth, ways = options.pop("truth", batch), options.pop("ways", WAYS)
    with KeepDouble():
        expected = run(build(config).eval(), truth, **options)
    error = deviation(run(build(config, torch.float32).eval(), truth, **options), expected)
    allowed = 2 * error * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    runs = {"whole": run_whole, "slices": run_slices}
    for way in ways:
        with KeepDouble():
            model = enabled(build(config).eval(), group, inputs, way)
            found = runs[inputs](model, batch, group, **options)
        counts = prefix_attn.stats(model)
        assert (counts.calls, counts.packed_calls) == (1, 1)
        logits = expected["logits"].view_as(found["logits"])
        difference = deviation(found, expected | {"logits": logits})
        assert difference <= allowed, (way, difference, allowed)


# ---- exactness --------------------------------------------------------------------------------


@on_ranks(2)
def check_padding_on_the_right(group: Any) -> None:
    assert_exact(config_of("llama", group), pad(rows_that_share()), group)


@on_ranks(3)
def check_padding_on_the_left_on_three_ranks(group: Any) -> None:
    batch = pad(rows_that_share(), "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_exact(config_of("qwen3", group), batch, group)


@on_ranks(8)
def check_eight_ranks(group: Any) -> None:
    assert_exact(config_of("qwen3", group), pad(rows_that_share()), group)


@on_ranks(4)
def check_window_and_fewer_kv_heads_than_ranks(group: Any) -> None:
    config = config_of("mistral", group, sliding_window=6)
    assert_exact(config, pad(rows_that_share(), "left"), group)


@on_ranks(4)
def check_heads_that_ranks_cannot_share(group: Any) -> None:
    config = tiny_config("llama", **HEADS[3])
    assert_exact(config, pad(rows_that_share()), group, "whole", ways=("auto",))
    assert_exact(config, as_row(rows_that_share()), group, "slices", ways=("keys",))


@on_ranks(2)
def check_row_of_several_sequences(group: Any) -> None:
    """Sinks too. Ordinary rows of gpt_oss mix their sequences, so the truth is the padded batch."""
    rows = rows_that_share()
    whole = as_row(rows)
    assert_exact(config_of("gpt_oss", group), whole, group, truth=pad(rows))


@on_ranks(4)
def check_slices_of_a_row(group: Any) -> None:
    rows = rows_that_share()
    assert_exact(config_of("qwen3", group), as_row(rows), group, "slices")


@on_ranks(3)
def check_slices_of_padded_batches(group: Any) -> None:
    for side in ("right", "left"):
        batch = pad(rows_that_share(), side)
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert_exact(config_of("qwen3", group), batch, group, "slices")
    del batch["position_ids"]  # the numbers of the whole batch's columns
    assert_exact(config_of("qwen3", group), batch, group, "slices")


@on_ranks(4)
def check_fewer_tokens_than_ranks(group: Any) -> None:
    for ids in ([[5]], [[5, 6, 7]], [[5, 6, 7, 8, 9]], [[5, 6], [5, 6]]):
        batch = {"input_ids": torch.tensor(ids)}
        for inputs in ("whole", "slices"):
            assert_exact(config_of("llama", group), batch, group, inputs)


@on_ranks(2)
def check_nothing_shared(group: Any) -> None:
    rows = [torch.arange(3 + i, 9 + 2 * i) for i in range(3)]
    assert_exact(config_of("llama", group), pad(rows), group)


@on_ranks(2)
def check_recomputation(group: Any) -> None:
    batch, config = pad(rows_that_share()), config_of("qwen3", group)
    expected = run(build(config), batch)
    for reentrant, inputs, way in (
        (False, "whole", "keys"),
        (True, "whole", "heads"),
        (False, "slices", "heads"),
        (True, "slices", "keys"),
    ):
        model = enabled(build(config), group, inputs, way)
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if reentrant:
            model.enable_input_require_grads()
        found = (run_whole if inputs == "whole" else run_slices)(model, batch, group)
        assert deviation(found, expected) <= ROUNDING


@on_ranks(2)
def check_adapters(group: Any) -> None:
    """PEFT, with and without recomputation; the first layers have nothing to train."""
    peft = pytest.importorskip("peft")
    batch = pad(rows_that_share())
    for targets in (["q_proj"], ["v_proj", "down_proj"]):
        lora = peft.LoraConfig(
            r=4, target_modules=targets, layers_to_transform=[1], init_lora_weights=False
        )

        def adapted(lora: Any = lora) -> Any:
            torch.manual_seed(0)
            model = peft.get_peft_model(build(config_of("qwen3", group)), lora)
            return model.train()

        expected = run(adapted(), batch)
        model = enabled(adapted(), group)
        assert deviation(run_whole(model, batch, group), expected) <= ROUNDING
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert deviation(run_whole(model, batch, group), expected) <= ROUNDING


# ---- data x sequence --------------------------------------------------------------------------


def data_batches(ranks: int) -> list[dict[str, Tensor]]:
    """One batch for each rank of the data dimension, of one length."""
    rows = rows_that_share()
    batches = [pad(rows), pad([rows[1], rows[4], rows[2], rows[0], rows[0]])]
    return [divisible(batch, ranks) for batch in batches]


def mean_gradients(config: Any) -> dict[str, Tensor]:
    """Of one process: the mean of the losses of both batches."""
    model = build(config)
    for batch in data_batches(2):
        loss = loss_of(model(**batch, use_cache=False), batch["attention_mask"])
        (loss / 2).backward()
    return {"logits": torch.ones(1)} | {n: p.grad for n, p in model.named_parameters()}


def own_gradients(model: Any) -> dict[str, Tensor]:
    found = {"logits": torch.ones(1)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.")] = grad
    return found


def loss_of_slice(out: Any, batch: dict[str, Tensor], group: Any) -> Tensor:
    """This rank's part of the loss of the whole batch."""
    mask = batch["attention_mask"].bool()
    weights = torch.zeros(*mask.shape, VOCAB, dtype=out.logits.dtype)
    weights[mask] = weights_of(weights[mask])
    own = slice_of({"input_ids": mask, "weights": weights}, group)["weights"]
    return (torch.tanh(out.logits) * own).sum()


@on_ranks(4)
def check_fsdp2_over_data_and_sequence(group: Any) -> None:
    """Each way of averaging: whole losses are right as they are, partial ones need the factor."""
    mesh, both = MESHES["data", "sequence"], MESHES["both"]
    config = tiny_config("qwen3")
    expected = mean_gradients(config)
    batch = data_batches(2)[mesh.get_local_rank("data")]
    ranks = mesh["sequence"].get_group()
    for inputs in ("whole", "slices"):
        model = build(config)
        model.gradient_checkpointing_enable()
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=both)
        fully_shard(model, mesh=both)
        enabled(model, ranks, inputs, self_check=True)
        if inputs == "whole":
            loss = loss_of(model(**batch, use_cache=False), batch["attention_mask"])
        else:
            out = model(**slice_of(batch, ranks), use_cache=False)
            loss = loss_of_slice(out, batch, ranks) * ranks.size()
        loss.backward()
        assert deviation(own_gradients(model), expected) <= ROUNDING


@on_ranks(4)
def check_ddp_accumulates_without_sync(group: Any) -> None:
    """Both batches one after the other, in slices over all four ranks."""
    config = tiny_config("qwen3")
    model = enabled(build(config), group, "slices")
    model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    for last, batch in enumerate(data_batches(4)):
        with contextlib.nullcontext() if last else model.no_sync():
            out = model(**slice_of(batch, group), use_cache=False)
            (loss_of_slice(out, batch, group) * group.size() / 2).backward()
    assert deviation(own_gradients(model), mean_gradients(config)) <= ROUNDING


# ---- losses on own rows -----------------------------------------------------------------------


def packed_inputs() -> tuple[prefix_attn.PrefixLayout, Tensor, Tensor]:
    """The layout, packed ids, and a weight for each pair of predictor and target."""
    layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    generator = torch.Generator().manual_seed(5)
    count = len(layout.target_index)
    return layout, ids, torch.randn(count, generator=generator, dtype=torch.float64)


def hidden_of(model: Any, ids: Tensor, position_ids: Tensor, layout: Any) -> Tensor:
    return model.model(
        input_ids=ids[None],
        position_ids=position_ids[None],
        prefix_layout=layout,
        use_cache=False,
    ).last_hidden_state[0]


def whole_log_probs(config: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The model of one process, its log-probabilities and the gradients of their weighted sum."""
    layout, ids, weights = packed_inputs()
    model = build(config, attn_implementation="prefix_attn")
    hidden = hidden_of(model, ids, layout.position_ids, layout)
    log_probs = packed_log_probs(hidden, model.lm_head.weight, ids, layout)
    (log_probs * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return model, log_probs.detach(), {"logits": torch.ones(1)} | grads


@on_ranks(3)
def check_partial_losses_of_own_rows_add_up(group: Any) -> None:
    """No hidden state is sent. Averaged gradients need the factor, summed ones don't."""
    config = config_of("qwen3", group)
    layout, ids, weights = packed_inputs()
    _, expected, grads = whole_log_probs(config)
    model = build(config, attn_implementation="prefix_attn")
    for factor, averaged, way in ((1.0, False, "heads"), (3.0, True, "heads"), (3.0, True, "keys")):
        shard = shard_rows(layout, group, way=way)
        model.zero_grad()
        sent = Counted()
        with sent:
            hidden = hidden_of(model, ids[shard.rows], shard.position_ids, shard)
            log_probs = packed_log_probs(hidden, model.lm_head.weight, ids, shard)
        layers = len(model.model.layers)
        assert sent.calls == ({"heads": 4 * layers} if way == "heads" else {"rows": layers})
        torch.testing.assert_close(log_probs, expected[shard.pairs], rtol=1e-5, atol=1e-5)
        (factor * (log_probs * weights[shard.pairs]).sum()).backward()
        found = summed(model, group, 1 / 3 if averaged else 1.0)
        assert deviation({"logits": torch.ones(1)} | found, grads) <= ROUNDING
    counts = torch.tensor([len(shard.pairs)])
    dist.all_reduce(counts, group=group)
    assert int(counts) == len(layout.target_index)


@on_ranks(4)
def check_whole_losses_of_completions_are_averaged(group: Any) -> None:
    """GSPO needs all tokens of a completion; entropies travel as log-probabilities do."""
    config = config_of("qwen3", group)
    layout, ids, _ = packed_inputs()
    generator = torch.Generator().manual_seed(6)
    advantages = torch.randn(layout.num_sequences, generator=generator, dtype=torch.float64)
    results = []
    for rows in (layout, shard_rows(layout, group)):
        model = build(config, attn_implementation="prefix_attn")
        alone = rows is layout
        own = ids if alone else ids[rows.rows]
        hidden = hidden_of(model, own, rows.position_ids, rows)
        done = completion_log_probs(hidden, model.lm_head.weight, ids, rows, 2, return_entropy=True)
        old = (done.log_probs * 0.9).detach()
        loss = gspo_loss(done.log_probs, old, advantages, done.mask, clip_low=1.0, clip_high=9.0)
        (loss + done.entropy[done.mask].square().mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        grads = grads if alone else summed(model, group, 1 / group.size())
        results.append({"logits": done.log_probs.detach()} | grads)
    assert deviation(results[1], results[0]) <= ROUNDING


@on_ranks(8)
def check_ranks_without_own_rows_take_part(group: Any) -> None:
    """Five tokens on eight ranks: three ranks run padding alone."""
    layout, ids = prefix_attn.PrefixLayout.from_sequences([[5, 6, 7], [5, 8, 9]])
    for way in WAYS:
        shard = shard_rows(layout, group, way=way)
        assert shard.num_own <= 1
        model = build(config_of("llama", group), attn_implementation="prefix_attn")
        hidden = hidden_of(model, ids[shard.rows], shard.position_ids, shard)
        log_probs = packed_log_probs(hidden, model.lm_head.weight, ids, shard)
        log_probs.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@on_ranks(2)
def check_shards_are_checked(group: Any) -> None:
    layout, ids, _ = packed_inputs()
    shard = shard_rows(layout, group)
    model = build(config_of("qwen3", group), attn_implementation="prefix_attn")
    own, positions = ids[shard.rows][None], shard.position_ids[None]
    options = {"prefix_layout": shard, "use_cache": False}
    with pytest.raises(NotImplementedError, match="can't be paired with the rows of one rank"):
        model(input_ids=own, position_ids=positions, labels=own, **options)
    with pytest.raises(ValueError, match="must grow by one along every path"):
        model(input_ids=own, position_ids=positions * 2, **options)
    with pytest.raises(ValueError, match=rf"must have shape \(1, {shard.num_rows}\)"):
        model(input_ids=ids[None], position_ids=layout.position_ids[None], **options)
    hidden = torch.zeros(shard.num_rows + 1, 64)
    with pytest.raises(ValueError, match=rf"hidden must have shape \({shard.num_rows}, H\)"):
        packed_log_probs(hidden, model.lm_head.weight, ids, shard)
    with pytest.raises(TypeError, match="must be a PrefixLayout, got int"):
        shard_rows(3)
    with pytest.raises(ValueError, match=r"one of .'heads', 'keys'.*got 'auto'"):
        shard_rows(layout, group, way="auto")
    whole = prefix_attn.PrefixLayout.from_tree([3, 2], [-1, 0], bidirectional=[True, False])
    with pytest.raises(ValueError, match="see all of themselves can't be dealt"):
        shard_rows(whole, group, way="keys")
    with pytest.raises(ValueError, match="4 queries for 6 tokens"):
        shard_rows(prefix_attn.PrefixLayout.from_lengths([2], [[4]]).queries_for([1]), group)


@on_ranks(8)
def check_documentation(group: Any) -> None:
    """The page's script on 4 x 2 ranks, with the model that the tests of pages have."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL))
    names = {"__name__": "example", "model": model}
    names = run_examples("docs/pages/sequence-parallel.md", names, integrations=True)
    assert names["size"] == 2
    assert names["shard"].num_rows == -(-(37 + 4 * 5) // 2)


# ---- what is sent and kept --------------------------------------------------------------------


LONG, EACH, MEMBERS = 96, 16, 4  # T = 160


def long_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(n: int) -> Tensor:
        return torch.randint(3, VOCAB, (n,), generator=generator)

    prompt = draw(LONG)
    return pad([torch.cat([prompt, draw(EACH)]) for _ in range(MEMBERS)])


@on_ranks(4)
def check_bytes_are_those_of_the_formula(group: Any) -> None:
    config = config_of("llama", group)
    batch, tokens, size = long_batch(), LONG + EACH * MEMBERS, group.size()
    n, width = tokens // size, torch.float64.itemsize
    # Two KV heads are repeated for four ranks; q, k, v there and the output back.
    heads = 2 * config.num_attention_heads + 2 * max(config.num_key_value_heads, size)
    trades = (size - 1) * n * heads * config.head_dim * width // size
    for inputs in ("whole", "slices"):
        model, sent = enabled(build(config), group, inputs, "heads"), Counted()
        given = divisible(batch, size)
        given = given if inputs == "whole" else slice_of(given, group)
        with sent:
            model(**given, use_cache=False)
        assert sent.sent["heads"] == trades * config.num_hidden_layers
        row = config.hidden_size * width
        if inputs == "whole":
            rows = (size - 1) * n
        else:  # each rank sends what the columns of the others hold of its rows
            layout, _, index = prefix_attn.PrefixLayout.from_padded(
                *divisible(batch, size).values()
            )
            assert layout.num_tokens == tokens
            own = range(group.rank() * n, (group.rank() + 1) * n)
            columns = index.chunk(size, dim=1)
            others = [set(x.flatten().tolist()) for r, x in enumerate(columns) if r != group.rank()]
            rows = sum(len(held & set(own)) for held in others)
        assert sent.sent["rows"] == rows * row


@on_ranks(4)
def check_bytes_of_keys_are_those_of_other_ranks_paths(group: Any) -> None:
    """By the dense mask: which keys the queries of each rank see."""
    config, rank, size = tiny_config("llama"), group.rank(), group.size()
    layout, _, _ = prefix_attn.PrefixLayout.from_padded(*long_batch().values())
    shard = shard_rows(layout, group, way="keys")
    mask = layout.materialize()
    others = [r for r in range(size) if r != rank]
    rows = sum(int(mask[shard.held[r]][:, shard.held[rank]].any(0).sum()) for r in others)
    model, sent = build(config, attn_implementation="prefix_attn"), Counted()
    with sent:
        hidden_of(model, shard.rows % VOCAB, shard.position_ids, shard)
    of_row = 2 * config.num_key_value_heads * config.head_dim * torch.float64.itemsize
    assert rows
    assert sent.sent == {"rows": rows * of_row * config.num_hidden_layers}


@on_ranks(4)
def check_activations_fall_with_the_ranks(group: Any) -> None:
    """What each rank saves for the backward pass, parameters left out."""
    kept = {}
    for ranks in (1, 2, 4):
        config = tiny_config("llama", vocab_size=VOCAB)
        if group.rank() >= ranks:
            continue
        model = build(config)
        if ranks == 1:
            prefix_attn.enable(model)
        else:
            enabled(model, GROUPS[ranks], "slices", "heads")
        batch = divisible(long_batch(), 4)
        batch = batch if ranks == 1 else slice_of(batch, GROUPS[ranks])
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = getattr(x, "elem", x).untyped_storage()  # of what a collective returns
            saved[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model.base_model(**batch, use_cache=False)
        del out
        kept[ranks] = sum(size for place, size in saved.items() if place not in own)
    if group.rank() == 0:
        assert kept[2] < 0.6 * kept[1], kept
        assert kept[4] < 0.6 * kept[2], kept


# ---- guards -----------------------------------------------------------------------------------


@on_ranks(3)
def check_different_batches_are_refused_on_every_rank(group: Any) -> None:
    """Whichever rank and whichever part of its batch is the odd one."""
    config = config_of("llama", group)
    model = enabled(build(config), group)
    batch = pad(rows_that_share())
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    for odd in range(3):
        for name in batch:
            other = {n: x.clone() for n, x in batch.items()}
            if group.rank() == odd:
                other[name][4, 6] ^= 1  # the last token of its row
            with pytest.raises(ValueError, match=rf"the {name} of rank .* differs") as error:
                model(**other, use_cache=False)
            assert f"of rank {max(odd, 1)} differs from that of rank 0" in str(error.value)
    with (
        torch.set_grad_enabled(group.rank() != 1),
        pytest.raises(ValueError, match="the gradient mode of rank 1"),
    ):
        model(**batch, use_cache=False)
    with pytest.raises(ValueError, match="the shape of rank 1"):
        model(**{n: x[: group.rank() + 1] for n, x in batch.items()}, use_cache=False)
    with pytest.raises(ValueError, match="the output_hidden_states of rank 2"):
        model(**batch, use_cache=False, output_hidden_states=group.rank() == 2)
    sliced = enabled(build(config), group, "slices")
    with pytest.raises(ValueError, match="the shape of input_ids of rank 1"):
        sliced(input_ids=torch.ones(1, 3 + group.rank(), dtype=torch.long), use_cache=False)
    model(**batch, use_cache=False)  # and the ranks are still in step


@on_ranks(3)
def check_batches_that_cannot_be_packed_are_refused_on_every_rank(group: Any) -> None:
    model = enabled(build(config_of("llama", group)), group)
    batch = pad(rows_that_share())
    wrong = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].clone()}
    wrong["attention_mask"][0, 2] = 0
    given = wrong if group.rank() == 1 else batch
    with pytest.raises(NotImplementedError, match=r"rank 1 can't pack its batch.*has holes"):
        model(**given, use_cache=False)
    with pytest.raises(NotImplementedError, match=r"rank 0 can't pack.*output_attentions"):
        model(**batch, use_cache=False, output_attentions=True)
    layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    with pytest.raises(NotImplementedError, match=r"rank 0 can't pack.*passes a prefix_layout"):
        model(input_ids=ids[None], prefix_layout=layout, use_cache=False)
    sliced = enabled(build(config_of("llama", group)), group, "slices")
    embeds = sliced.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(NotImplementedError, match="slices of inputs_embeds"):
        sliced(inputs_embeds=embeds, use_cache=False)
    with pytest.raises(NotImplementedError, match="can't be generated from"):
        sliced(**batch, use_cache=True)


@on_ranks(3)
def check_embeddings_of_the_caller(group: Any) -> None:
    config, batch = config_of("llama", group), pad(rows_that_share())
    one, model = build(config), enabled(build(config), group)

    def embedded(model: Any) -> dict[str, Tensor]:
        hidden = model.get_input_embeddings()(batch["input_ids"])
        return {"inputs_embeds": hidden, "attention_mask": batch["attention_mask"]}

    expected, found = run(one, embedded(one)), None
    found = run_whole(model, embedded(model), group)
    assert deviation(found, expected) <= ROUNDING


@on_ranks(2)
def check_generation_runs_on_every_rank_by_itself(group: Any) -> None:
    batch = pad(rows_that_share(), "left")
    model = enabled(build(config_of("llama", group), torch.float32).eval(), group)
    found = model.generate(**batch, max_new_tokens=3, do_sample=False)
    one = build(config_of("llama", group), torch.float32).eval()
    assert found.equal(one.generate(**batch, max_new_tokens=3, do_sample=False))


@on_ranks(3)
def check_refusals_leave_the_model_as_it_was(group: Any) -> None:
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0,
    }
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    refused = {
        "largest position": config_of("phi3", group, rope_parameters=longrope),
        "rope_type .dynamic": config_of("llama", group, rope_parameters=dynamic),
        "4 query heads can't be shared by 3 ranks": tiny_config("llama"),
        "2 KV heads can't be shared by 3 ranks": tiny_config(
            "llama", num_attention_heads=6, hidden_size=96
        ),
    }
    for message, config in refused.items():
        for before in (False, True):
            model = build(config)
            if before:
                prefix_attn.enable(model, min_ratio=1.5)
            attention, keys = model.config._attn_implementation, set(vars(model.base_model))
            with pytest.raises(NotImplementedError, match=message):
                enabled(model, group, way="heads")
            assert model.config._attn_implementation == attention
            assert set(vars(model.base_model)) == keys
            assert not before or model.base_model._prefix_attn.ranks is None
    model = build(config_of("llama", group))
    with pytest.raises(TypeError, match="must be a ProcessGroup"):
        prefix_attn.enable(model, sequence_parallel_group=3)
    with pytest.raises(ValueError, match=r"one of .'whole', 'slices'.*got 'rows'"):
        enabled(model, group, "rows")
    with pytest.raises(ValueError, match=r"one of .'auto', 'heads', 'keys'.*got 'ring'"):
        enabled(model, group, way="ring")
    with pytest.raises(ValueError, match="needs a sequence_parallel_group"):
        prefix_attn.enable(model, sequence_parallel_inputs="slices")
    if group.rank() == 2:
        with pytest.raises(ValueError, match="rank 2 is not in the sequence_parallel_group"):
            enabled(model, GROUPS[2])


@on_ranks(2)
def check_recurrent_layers_are_refused_by_name(group: Any) -> None:
    config = transformers.Lfm2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    reason = r"can't run some rows .*: .*layers\.0\.conv .Lfm2ShortConv. reads a row in order"
    with pytest.raises(NotImplementedError, match=reason):
        enabled(model, group)
    layout, ids, _ = packed_inputs()
    shard = shard_rows(layout, group)
    own, positions = ids[shard.rows], shard.position_ids
    prefix_attn.enable(model)  # alone it is served, and a caller's shard is not
    with pytest.raises(NotImplementedError, match=reason):
        hidden_of(model, own, positions, shard)
    prefix_attn.disable(model).set_attn_implementation("prefix_attn")
    with pytest.raises(NotImplementedError, match=r"under a RowShard: its model has \['conv'\]"):
        hidden_of(model, own, positions, shard)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = config_of("llama", group, rope_parameters=rope)
    model = build(config, attn_implementation="prefix_attn")
    with pytest.raises(NotImplementedError, match=r"under a RowShard.*largest position"):
        hidden_of(model, own, positions, shard)


@on_ranks(2)
def check_copies_and_enabling_again(group: Any) -> None:
    batch = pad(rows_that_share())
    model = enabled(build(config_of("llama", group)), group)
    twin = copy.deepcopy(model)
    assert twin.base_model._prefix_attn.ranks.group is group
    prefix_attn.enable(model)
    assert model.base_model._prefix_attn.ranks is None
    expected = build(config_of("llama", group))(**batch, use_cache=False).logits
    for one in (model, twin, enabled(model, group)):
        found = one(**batch, use_cache=False).logits
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


@on_ranks(2)
def check_experts_with_their_loss(group: Any) -> None:
    """The auxiliary loss reads the router's logits of all tokens, which every rank gets back."""
    config = config_of("qwen3_moe", group)
    batch = pad(rows_that_share())
    assert_exact(config, batch, group, output_router_logits=True)


@on_ranks(2)
def check_hidden_states_of_all_layers(group: Any) -> None:
    config, batch = config_of("qwen3", group), pad(rows_that_share())
    options = {"use_cache": False, "output_hidden_states": True}
    model = enabled(build(config), group)
    found, expected = (m(**batch, **options) for m in (model, build(config)))
    mask = batch["attention_mask"].bool()
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)
        assert not ours[~mask].any()


# ---- the ranks as processes -------------------------------------------------------------------


def rank_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    results: dict[str, str | None] = {}
    options = {"world_size": RANKS, "rank": rank, "timeout": timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", **options)
    GROUPS.update({count: dist.new_group(list(range(count))) for count in HEADS})
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("half", "data", "sequence"))
    MESHES["data", "sequence"] = mesh["data", "sequence"]
    MESHES["both"] = mesh["data", "sequence"]._flatten("both")
    for name, (count, check) in CHECKS.items():
        if rank >= count:
            continue
        results[name] = None
        start = time.perf_counter()
        try:
            check(GROUPS[count])
        except Exception:
            results[name] = traceback.format_exc()
        if rank == 0:
            print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
        Path(folder, f"{rank}").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What went wrong in each check, rank by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    script = [sys.executable, "-m", "tests.integrations.test_sequence_parallel", str(folder)]
    done = subprocess.run(script, cwd=root, capture_output=True, text=True, check=False)
    files = [folder / f"{rank}" for rank in range(RANKS)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for rank, file in enumerate(files):
        for name, error in pickle.loads(file.read_bytes()).items():
            found.setdefault(name, []).append(f"rank {rank}: {error}" if error else "")
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(name: str, results: dict[str, list[str]]) -> None:
    assert len(results.get(name, [])) == CHECKS[name][0], "a rank did not come so far"
    assert not any(results[name]), "\n".join(results[name])


def main(folder: str) -> None:
    """Forks the ranks: one process imports everything, and has no threads yet."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_process, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    last = time.monotonic() + LONGEST
    for process in ranks:
        process.join(max(0.0, last - time.monotonic()))
        process.kill()


if __name__ == "__main__":
    main(sys.argv[1])
