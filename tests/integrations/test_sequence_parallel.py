"""Sequence parallelism inside `enable`, on 2, 3, 4 and 8 gloo ranks, against one process."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import prefix_attn
from prefix_attn.integrations.transformers.sequence_parallel import INPUTS
from prefix_attn.losses import shard_rows
from prefix_attn.shards import WAYS
from tests.integrations.rows_of_ranks import (
    HEADS,
    ROUNDING,
    assert_exact,
    config_of,
    divisible,
    enabled,
    hidden_of,
    packed_inputs,
    padded,
    run_slices,
    run_whole,
    slice_of,
    weights_of,
)
from tests.integrations.tiny_models import (
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
from tests.integrations.tiny_pictures import vision_model
from tests.ranks import on_ranks

# ---- exactness --------------------------------------------------------------------------------


def uneven_rows() -> list[Tensor]:
    """Of 47 tokens, of which no number of ranks can run as many each."""
    rows = rows_that_share()
    return [*rows[:4], rows[4][:6], *rows[5:]]


BATCHES = {
    "padding on the right": lambda ranks: pad(uneven_rows()),
    "padding on the left": lambda ranks: padded(uneven_rows(), "left"),
    "row of several sequences": lambda ranks: as_row(uneven_rows()),
    "one sequence": lambda ranks: {"input_ids": uneven_rows()[0][None, :17]},
    "nothing shared": lambda ranks: pad([torch.arange(3 + i, 9 + 2 * i) for i in range(3)]),
    "fewer tokens than ranks": lambda ranks: {
        "input_ids": torch.tensor([[5, 6], [5, 7]] if ranks > 3 else [[5]])
    },
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("ranks", sorted(HEADS))
@on_ranks("ranks")
def test_logits_and_gradients_are_those_of_one_process(
    group: Any, ranks: int, inputs: str, batch: str
) -> None:
    """Both ways to attend take turns, so that each of them meets each batch."""
    turn = (list(BATCHES).index(batch) + INPUTS.index(inputs) + sorted(HEADS).index(ranks)) % 2
    assert_exact(
        config_of("qwen3", group), BATCHES[batch](ranks), group, inputs, ways=(WAYS[turn],)
    )


@on_ranks(4)
def test_window_and_fewer_kv_heads_than_ranks(group: Any) -> None:
    config = config_of("mistral", group, sliding_window=6)
    assert_exact(config, pad(rows_that_share(), "left"), group)


@on_ranks(4)
def test_heads_that_ranks_cannot_share(group: Any) -> None:
    config = tiny_config("llama", **HEADS[3])
    assert_exact(config, pad(rows_that_share()), group, "whole", ways=("auto",))
    assert_exact(config, as_row(rows_that_share()), group, "slices", ways=("keys",))


@on_ranks(2)
def test_sinks_over_a_row_of_several_sequences(group: Any) -> None:
    """Ordinary rows of gpt_oss mix their sequences, so the truth is the padded batch."""
    rows = rows_that_share()
    assert_exact(config_of("gpt_oss", group), as_row(rows), group, truth=pad(rows))


@on_ranks(3)
def test_slices_without_positions_have_those_of_the_whole_batch(group: Any) -> None:
    assert_exact(config_of("qwen3", group), pad(rows_that_share(), "left"), group, "slices")


@on_ranks(2)
def test_recomputation(group: Any) -> None:
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
def test_adapters(group: Any) -> None:
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


# ---- pictures ---------------------------------------------------------------------------------

# Positions of three kinds, features of inner layers, and pictures that see all of themselves: in
# every layer, or in those with a sliding window alone.
PICTURES = {"qwen2_5_vl": WAYS, "qwen3_vl": WAYS, "gemma3": ("heads",), "gemma4": ("heads",)}


@pytest.mark.parametrize("model_type", PICTURES)
@on_ranks(2)
def test_pictures_are_those_of_one_process(group: Any, model_type: str) -> None:
    """The tower's gradient too: each rank has the part that came through its own rows."""
    model, batch = vision_model(model_type, differ=True)
    with KeepDouble():
        expected = run(copy.deepcopy(model), batch)
    for way in PICTURES[model_type]:
        ours = enabled(copy.deepcopy(model), group, "whole", way, self_check=False)
        with KeepDouble():
            found = run_whole(ours, batch, group)
        counts = prefix_attn.stats(ours)
        assert (counts.calls, counts.packed_calls) == (1, 1)
        assert counts.pictures_run < counts.pictures_in
        assert deviation(found, expected) <= 1e-11


@on_ranks(2)
def test_pictures_over_ranks_are_refused_by_name(group: Any) -> None:
    model, batch = vision_model("gemma3")
    ours = enabled(copy.deepcopy(model), group, way="keys", self_check=False)
    with pytest.raises(NotImplementedError, match='pass sequence_parallel_way="heads"'):
        ours(**batch, use_cache=False)
    ours = enabled(copy.deepcopy(model), group, "slices", self_check=False)
    text = slice_of(divisible(pad(rows_that_share()), 2), group)
    with pytest.raises(NotImplementedError, match=r"rank 0 can't pack its batch: slices of inputs"):
        ours(**text, use_cache=False)


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
def test_fsdp2_over_data_and_sequence(group: Any) -> None:
    """Each way of averaging: whole losses are right as they are, partial ones need the factor."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    both = mesh._flatten("both")
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
def test_ddp_accumulates_without_sync(group: Any) -> None:
    """Both batches one after the other, in slices over all four ranks."""
    config = tiny_config("qwen3")
    model = enabled(build(config), group, "slices")
    model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    for last, batch in enumerate(data_batches(4)):
        with contextlib.nullcontext() if last else model.no_sync():
            out = model(**slice_of(batch, group), use_cache=False)
            (loss_of_slice(out, batch, group) * group.size() / 2).backward()
    assert deviation(own_gradients(model), mean_gradients(config)) <= ROUNDING


# ---- guards -----------------------------------------------------------------------------------


@on_ranks(3)
def test_different_batches_are_refused_on_every_rank(group: Any) -> None:
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
def test_batches_that_cannot_be_packed_are_refused_on_every_rank(group: Any) -> None:
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
def test_embeddings_of_the_caller(group: Any) -> None:
    config, batch = config_of("llama", group), pad(rows_that_share())
    one, model = build(config), enabled(build(config), group)

    def embedded(model: Any) -> dict[str, Tensor]:
        hidden = model.get_input_embeddings()(batch["input_ids"])
        return {"inputs_embeds": hidden, "attention_mask": batch["attention_mask"]}

    expected, found = run(one, embedded(one)), None
    found = run_whole(model, embedded(model), group)
    assert deviation(found, expected) <= ROUNDING


@on_ranks(2)
def test_generation_runs_on_every_rank_by_itself(group: Any) -> None:
    batch = pad(rows_that_share(), "left")
    model = enabled(build(config_of("llama", group), torch.float32).eval(), group)
    found = model.generate(**batch, max_new_tokens=3, do_sample=False)
    one = build(config_of("llama", group), torch.float32).eval()
    assert found.equal(one.generate(**batch, max_new_tokens=3, do_sample=False))


@on_ranks(3)
def test_refusals_leave_the_model_as_it_was(group: Any) -> None:
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
    pair = dist.new_group([0, 1])
    if group.rank() == 2:
        with pytest.raises(ValueError, match="rank 2 is not in the sequence_parallel_group"):
            enabled(model, pair)


@on_ranks(2)
def test_recurrent_layers_are_refused_by_name(group: Any) -> None:
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
def test_copies_and_enabling_again(group: Any) -> None:
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
def test_experts_with_their_loss(group: Any) -> None:
    """The auxiliary loss reads the router's logits of all tokens, which every rank gets back."""
    config = config_of("qwen3_moe", group)
    batch = pad(rows_that_share())
    assert_exact(config, batch, group, output_router_logits=True)


@on_ranks(2)
def test_hidden_states_of_all_layers(group: Any) -> None:
    config, batch = config_of("qwen3", group), pad(rows_that_share())
    options = {"use_cache": False, "output_hidden_states": True}
    model = enabled(build(config), group)
    found, expected = (m(**batch, **options) for m in (model, build(config)))
    mask = batch["attention_mask"].bool()
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)
        assert not ours[~mask].any()
