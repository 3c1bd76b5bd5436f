"""Losses on the rows of each rank, and what ranks send and keep, on gloo ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import prefix_attn
from bench.sequence_parallel import Counted, saved_bytes
from prefix_attn.losses import completion_log_probs, gspo_loss, packed_log_probs, shard_rows
from prefix_attn.shards import WAYS
from tests.docs_examples import run_examples
from tests.integrations.rows_of_ranks import (
    EACH,
    LONG,
    MEMBERS,
    ROUNDING,
    config_of,
    divisible,
    enabled,
    hidden_of,
    long_batch,
    packed_inputs,
    slice_of,
    summed,
    whole_log_probs,
)
from tests.integrations.tiny_models import (
    SMALL,
    VOCAB,
    build,
    deviation,
    tiny_config,
)
from tests.ranks import on_ranks

# ---- losses on own rows -----------------------------------------------------------------------


@on_ranks(3)
def test_partial_losses_of_own_rows_add_up(group: Any) -> None:
    """No hidden state is sent. Averaged gradients need the factor, summed ones don't."""
    config = config_of("qwen3", group)
    layout, ids, weights = packed_inputs()
    expected, grads = whole_log_probs(config, layout, ids, weights)
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
def test_losses_over_large_groups_independent_sequences_and_blocks(group: Any) -> None:
    """Groups that are larger than half of a rank's rows, and segments that see all of themselves.

    Rows of four kinds of segments: prefixes, empty ones, suffixes, and pictures inside of both.
    """
    groups = prefix_attn.PrefixLayout.from_lengths([9, 0, 14], [[4] * 3, [5, 6, 7], [6, 6]])
    pictures = prefix_attn.PrefixLayout.from_tree(
        [5, 6, 2, 4, 3, 7, 4], [-1, 0, 1, 2, 1, 4, 5],
        bidirectional=[False, True, False, False, False, True, False],
    )  # fmt: skip
    config = config_of("qwen3", group)
    for layout, ways in ((groups, WAYS), (pictures, ("heads",))):
        layout, ids, weights = packed_inputs(layout)
        expected, grads = whole_log_probs(config, layout, ids, weights)
        for way in ways:
            shard = shard_rows(layout, group, way=way)
            model = build(config, attn_implementation="prefix_attn")
            hidden = hidden_of(model, ids[shard.rows], shard.position_ids, shard)
            log_probs = packed_log_probs(hidden, model.lm_head.weight, ids, shard)
            torch.testing.assert_close(log_probs, expected[shard.pairs], rtol=1e-5, atol=1e-5)
            (log_probs * weights[shard.pairs]).sum().backward()
            found = {"logits": torch.ones(1)} | summed(model, group)
            assert deviation(found, grads) <= ROUNDING


@on_ranks(4)
def test_whole_losses_of_completions_are_averaged(group: Any) -> None:
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
def test_ranks_without_own_rows_take_part(group: Any) -> None:
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
def test_shards_are_checked(group: Any) -> None:
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
def test_documentation(group: Any) -> None:
    """The page's script on 4 x 2 ranks, with the model that the tests of pages have."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL))
    names = {"__name__": "example", "model": model}
    names = run_examples("docs/pages/sequence-parallel.md", names, integrations=True)
    assert names["size"] == 2
    assert names["shard"].num_rows == -(-(37 + 4 * 5) // 2)


# ---- what is sent and kept --------------------------------------------------------------------


@on_ranks(4)
def test_bytes_are_those_of_the_formula(group: Any) -> None:
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
def test_bytes_of_keys_are_those_of_other_ranks_paths(group: Any) -> None:
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
def test_activations_fall_with_the_ranks(group: Any) -> None:
    """What each rank saves for the backward pass, parameters left out."""
    kept = {}
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (2, 4)}
    for ranks in (1, 2, 4):
        config = tiny_config("llama", vocab_size=VOCAB)
        if group.rank() >= ranks:
            continue
        model = build(config)
        if ranks == 1:
            prefix_attn.enable(model)
        else:
            enabled(model, groups[ranks], "slices", "heads")
        batch = divisible(long_batch(), 4)
        batch = batch if ranks == 1 else slice_of(batch, groups[ranks])
        kept[ranks] = saved_bytes(model, partial(model.base_model, **batch, use_cache=False))
    if group.rank() == 0:
        assert kept[2] < 0.6 * kept[1], kept
        assert kept[4] < 0.6 * kept[2], kept
