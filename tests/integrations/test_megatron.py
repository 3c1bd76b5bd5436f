"""An enabled Megatron-core GPTModel: outputs and gradients of ordinary calls, on one rank."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams

from prefix_attn.integrations import slime
from prefix_attn.integrations.megatron import disable, enable, moe, stats
from prefix_attn.integrations.megatron.refusals import SETTINGS
from prefix_attn.integrations.packing import WARN_AFTER
from tests.integrations.megatron_models import (
    EXACT,
    MOE,
    ROUNDING,
    VOCAB,
    build,
    config,
    deviation,
    padded_batch,
    parallel,
    row_of_sequences,
    rows_that_share,
    step,
)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """Megatron-core needs its process groups for a single process, too."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    with parallel():
        yield
    dist.destroy_process_group()


def pair(settings, **arguments):
    """An ordinary model, and an enabled one with the same parameters."""
    return build(settings, **arguments), enable(build(settings, **arguments))


def check(settings, batch, *, limit=EXACT, ordinary=None, **arguments):
    """One step of both models is the same, and the enabled one packed it."""
    ours_plain, ours = pair(settings, **arguments)
    expected = step(ours_plain, batch if ordinary is None else ordinary)
    found = step(ours, batch)
    counts = stats(ours)
    assert (counts.calls, counts.packed_calls) == (1, 1), counts
    assert counts.tokens_run < counts.tokens_in
    assert deviation(found, expected) < limit
    return ours


EQUAL = [row[:14] for row in rows_that_share()[:3]]  # a batch without padding

LEARNED = {"position_embedding_type": "learned_absolute"}
DENSE = {
    "4-d mask": (config(), padded_batch(), {}),
    "no mask": (config(), padded_batch(EQUAL, None), {}),
    "rows": (config(), row_of_sequences(), {}),
    "rows padded to 8": (config(), row_of_sequences(multiple=8), {}),
    "rows with other bounds of padding": (config(), row_of_sequences(multiple=8, named=False), {}),
    "rows with a tail": (config(), row_of_sequences(tail=5), {}),
    "a key head for each head": (config(num_query_groups=4), row_of_sequences(), {}),
    "one key head, norms, a scale": (
        config(num_query_groups=1, qk_layernorm=True, softmax_scale=0.3),
        row_of_sequences(),
        {},
    ),
    "learned positions": (
        config(),
        padded_batch(),
        {"position_embedding_type": "learned_absolute"},
    ),
    "half rotary, tied": (
        config(),
        row_of_sequences(),
        {"rotary_percent": 0.5, "share_embeddings_and_output_weights": True},
    ),
    "a window in one of two layers": (
        config(window_size=(4, 0), window_attn_skip_freq=2),
        padded_batch(EQUAL, None),
        {},
    ),
    "a layer without positions": (config(no_rope_freq=2), row_of_sequences(), {}),
    "all recomputed": (
        config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        row_of_sequences(),
        {},
    ),
    "one layer recomputed": (
        config(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
        padded_batch(),
        {},
    ),
    "attention recomputed": (config(recompute_granularity="selective"), row_of_sequences(), {}),
    "latent": (config(mla=True), row_of_sequences(), {}),
    "latent, padded": (config(mla=True), padded_batch(EQUAL, None), {}),
    "latent, no query rank": (config(mla=True, q_lora_rank=None), row_of_sequences(), {}),
    "latent, YaRN": (config(mla=True, rope_type="yarn"), row_of_sequences(), {}),
    "latent, all recomputed": (
        config(
            mla=True,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        ),
        row_of_sequences(),
        {},
    ),
    "latent, projections recomputed": (
        config(
            mla=True,
            recompute_granularity="selective",
            recompute_modules=["core_attn", "mla_up_proj"],
        ),
        row_of_sequences(),
        {},
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_enabled_model_matches_ordinary_one(name):
    settings, batch, arguments = DENSE[name]
    check(settings, batch, **arguments)


@pytest.mark.parametrize("mask", ["2d", "keys"])
def test_masks_that_only_some_attentions_read_say_what_padding_is(mask):
    """Causal attention on padding at the right is the same without them."""
    batch = padded_batch(mask=mask)
    ordinary = padded_batch(mask=None)
    check(config(), batch, ordinary=ordinary)


def test_sinks_and_windows_match():
    settings = config(softmax_type="learnable", window_size=(4, 0), window_attn_skip_freq=2)
    plain, ours = pair(settings)
    with torch.no_grad():
        for model in (plain, ours):
            torch.manual_seed(2)
            for layer in model.decoder.layers:
                layer.self_attention.core_attention.softmax_offset.copy_(torch.randn(4))
    batch = padded_batch(EQUAL, None)
    expected, found = step(plain, batch), step(ours, batch)
    assert expected["decoder.layers.0.self_attention.core_attention.softmax_offset"].norm() > 0
    assert stats(ours).packed_calls == 1
    assert deviation(found, expected) < EXACT


def test_a_gate_in_single_precision_matches():
    check(config(attention_output_gate=True), row_of_sequences(), limit=ROUNDING)


def test_losses_of_labels_match():
    batch = row_of_sequences()
    torch.manual_seed(5)
    batch["call"]["labels"] = torch.randint(0, VOCAB, batch["call"]["input_ids"].shape)
    check(config(), batch, limit=ROUNDING)


def test_multi_token_prediction_matches():
    settings = config(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    spec = get_gpt_layer_local_spec()
    mtp = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
    batch = padded_batch(EQUAL)
    batch["call"]["labels"] = batch["call"]["input_ids"]
    check(settings, batch, spec=spec, mtp_block_spec=mtp, limit=ROUNDING)


# ---- what could go wrong in silence -----------------------------------------------------------


def test_angles_of_pictures_are_part_of_what_is_compared():
    """A sequence whose rotary table differs from some place on shares no row from there on."""
    settings = config(mrope_section=[1, 1, 2])
    batch = padded_batch(EQUAL, None)
    ids = batch["call"]["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape).clone()
    positions[1, 2, 9:] += 3
    batch["call"]["position_ids"] = positions
    ours = check(settings, batch, position_embedding_type="mrope")
    assert stats(ours).tokens_run == 14 + 3 + (14 - 9)


def test_learned_positions_are_part_of_what_is_compared():
    batch = padded_batch(EQUAL, None)
    positions = batch["call"]["position_ids"].clone()
    positions[2, 9:] += 3
    batch["call"]["position_ids"] = positions
    ours = check(config(), batch, **LEARNED)
    assert stats(ours).tokens_run == 14 + 3 + (14 - 9)


def test_position_ids_that_nobody_reads_do_not_matter():
    """verl hands positions of another shape over, which rotary models ignore."""
    batch = row_of_sequences()
    batch["call"]["position_ids"] = torch.arange(5)[None]
    check(config(), batch)


def test_a_table_of_the_total_length_is_one_row_for_each_place():
    """Megatron then rotates by the column of the whole row, so that equal prefixes differ."""
    batch = row_of_sequences(total=True)
    plain, ours = pair(config())
    expected, found = step(plain, batch), step(ours, batch)
    assert stats(ours).packed_calls == 0
    assert deviation(found, expected) == 0


def test_a_table_for_each_place_is_packed_by_place(monkeypatch):
    """As mcore-bridge hands it over: the rows of the rotary table taken by position ids."""
    batch = row_of_sequences()
    lengths = batch["call"]["packed_seq_params"].cu_seqlens_q.diff().tolist()
    places = torch.cat([torch.arange(n) for n in lengths])
    forward = GPTModel._preprocess

    def by_place(self, *args, **kwargs):
        hidden, table, *rest = forward(self, *args, **kwargs)
        return hidden, table[places], *rest

    monkeypatch.setattr(GPTModel, "_preprocess", by_place)
    check(config(), batch)


def test_embeddings_that_differ_where_tokens_are_equal_are_not_shared():
    plain, ours = pair(config())
    batch = padded_batch(EQUAL, None)

    def add_noise(module, args, out):
        generator = torch.Generator().manual_seed(4)
        return out + torch.rand(out.shape, generator=generator, dtype=out.dtype)

    for model in (plain, ours):
        model.embedding.register_forward_hook(add_noise)
    expected, found = step(plain, batch), step(ours, batch)
    assert dict(stats(ours).passed_through) == {"embeddings differ where tokens are equal": 1}
    assert deviation(found, expected) == 0


def test_given_embeddings_are_compared_instead_of_ids():
    """The same placeholders can stand for different pictures."""
    plain, ours = pair(config())
    batch = padded_batch(EQUAL, None)
    embedding = torch.nn.Embedding(VOCAB, 32).double()
    torch.manual_seed(6)
    ids = batch["call"]["input_ids"].clone()
    ids[1, 4] = (ids[1, 4] + 1) % VOCAB
    found = {}
    for model in (plain, ours):
        batch["call"]["decoder_input"] = embedding(ids).transpose(0, 1)
        found[model] = step(model, batch)
    assert stats(ours).tokens_run == 14 + 10 + 3
    assert deviation(found[ours], found[plain]) < EXACT
    leaf = embedding(ids).transpose(0, 1).detach().requires_grad_()
    batch["call"]["decoder_input"] = leaf
    step(ours, batch)
    assert "the gradient of decoder_input itself is wanted" in stats(ours).passed_through


# ---- experts ----------------------------------------------------------------------------------

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {
    "balancing loss": {},
    "all recomputed": FULL,
    "experts recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "loss of all ranks": {"moe_router_load_balancing_type": "global_aux_loss"},
    "loss of each sequence": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "several losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [3.0, 2.0],
    },
    "z loss": {"moe_z_loss_coeff": 3.0},
    "losses per token": {"calculate_per_token_loss": True, "moe_z_loss_coeff": 3.0},
    "sigmoid, biases": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
    },
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    "shared expert": {"moe_shared_expert_intermediate_size": 16},
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("kind", ["rows", "padded"])
def test_experts_and_their_losses_match(name, kind):
    batch = row_of_sequences() if kind == "rows" else padded_batch(EQUAL, None)
    plain, ours = pair(config(**{**MOE, **EXPERTS[name]}))
    expected, found = step(plain, batch), step(ours, batch)
    assert stats(ours).packed_calls == 1
    assert deviation(found, expected) < ROUNDING
    for ordinary, enabled in zip(plain.decoder.layers, ours.decoder.layers, strict=True):
        for counts in ("local_tokens_per_expert", "global_tokens_per_expert"):
            right = getattr(ordinary.mlp.router, counts)
            assert right is None or right.equal(getattr(enabled.mlp.router, counts))


def test_routers_without_the_count_of_places_would_be_wrong(monkeypatch):
    """Logits alone do not show it."""
    monkeypatch.setattr(moe, "_needs_places", lambda router: False)
    batch = row_of_sequences()
    plain, ours = pair(config(**MOE))
    expected, found = step(plain, batch), step(ours, batch)
    assert deviation({"out": found["out"]}, {"out": expected["out"]}) < ROUNDING
    assert deviation(found, expected) > 1e2 * ROUNDING


def test_padding_is_no_token_to_routers():
    """An ordinary call says so with `padding_mask`, an enabled one sees it in the mask."""
    batch, ordinary = padded_batch(), padded_batch()
    ordinary["call"]["padding_mask"] = ~ordinary["read"]
    settings = config(**MOE, moe_z_loss_coeff=3.0)
    check(settings, batch, ordinary=ordinary, limit=ROUNDING)
    check(settings, ordinary, limit=ROUNDING)


def test_tokens_that_the_caller_hides_from_routers_stay_hidden():
    batch = row_of_sequences(multiple=4)
    batch["call"]["padding_mask"] = ~batch["read"]
    check(config(**MOE, moe_z_loss_coeff=3.0), batch, limit=ROUNDING)


# ---- calls that are not packed ------------------------------------------------------------------


def single():
    return row_of_sequences(rows_that_share()[:1])


def left_padded():
    batch = padded_batch()
    batch["call"]["attention_mask"] = batch["call"]["attention_mask"].flip(2, 3).transpose(2, 3)
    return batch


def not_causal():
    batch = padded_batch(EQUAL)
    batch["call"]["attention_mask"][0, 0, 5, 2] = True
    return batch


def odd_mask():
    batch = padded_batch(EQUAL)
    batch["call"]["attention_mask"] = batch["call"]["attention_mask"][:, :, :5]
    return batch


def holes():
    batch = padded_batch(EQUAL, "2d")
    batch["call"]["attention_mask"][1, 4] = False
    return batch


def several_rows():
    batch = padded_batch(EQUAL, None)
    batch["call"]["packed_seq_params"] = PackedSeqParams(
        qkv_format="sbhd", max_seqlen_q=14, max_seqlen_kv=14
    )
    return batch


def long_bounds():
    batch = row_of_sequences()
    batch["call"]["packed_seq_params"].cu_seqlens_q_padded[-1] += 7
    return batch


def unshared():
    return padded_batch([(row + i) % VOCAB for i, row in enumerate(EQUAL)], None)


def keyword():
    batch = padded_batch(EQUAL, None)
    batch["call"]["extra_block_kwargs"] = {"context": torch.ones(3, 2)}
    return batch


PASSED = {
    "a single sequence": single,
    "attention_mask hides the first place of a row": left_padded,
    "attention_mask is not causal with padding": not_causal,
    "attention_mask of shape (3, 1, 5, 14)": odd_mask,
    "attention_mask has holes": holes,
    "packed_seq_params of a batch (3, 14), sbhd": several_rows,
    "cu_seqlens do not fit a row of 70": long_bounds,
    "tokens in / tokens run below min_ratio 1.2": unshared,
    "the keyword context": keyword,
}


@pytest.mark.parametrize("reason", PASSED)
def test_calls_that_pass_through_say_why(reason, monkeypatch):
    model = enable(build(config()))
    ran = []
    original = partial(lambda hidden_states, **_: ran.append(1) or hidden_states)
    model.decoder.forward = partial(
        model.decoder.forward.func, model.decoder.forward.args[0], original
    )
    model(**PASSED[reason]()["call"])
    assert dict(stats(model).passed_through) == {reason: 1}
    assert ran == [1]


def test_a_decoder_called_from_outside_passes_through():
    model = enable(build(config()))
    model.decoder(hidden_states=torch.randn(5, 2, 32).double(), attention_mask=None)
    reason = "the decoder was called from outside of the model"
    assert dict(stats(model).passed_through) == {reason: 1}


def test_model_that_is_never_packed_warns_once():
    model = enable(build(config()))
    batch = unshared()["call"]
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2 * WARN_AFTER):
            model(**batch)
    ours = [str(x.message) for x in found if "prefix_attn" in str(x.message)]
    assert len(ours) == 1
    assert "none of 20 calls was packed: tokens in" in ours[0]


# ---- enable and disable -------------------------------------------------------------------------


def test_disable_restores_the_model():
    plain, ours = pair(config(**{**MOE, "recompute_granularity": "selective"}))
    names = list(ours.state_dict())
    assert list(plain.state_dict()) == names
    before = {n: set(m.__dict__) for n, m in plain.named_modules()}
    disable(ours)
    assert {n: set(m.__dict__) - {"_prefix_params"} for n, m in ours.named_modules()} == before
    assert not ours._forward_pre_hooks
    assert not ours._forward_hooks
    with pytest.raises(ValueError, match="is not enabled"):
        stats(ours)


def test_disable_keeps_a_forward_from_before_and_refuses_one_from_after():
    model = build(config())
    core = model.decoder.layers[0].self_attention.core_attention
    mine = core.forward
    enable(model)
    disable(model)
    assert core.forward is mine
    enable(model)
    core.forward = lambda *_: None
    with pytest.raises(RuntimeError, match="forward of DotProductAttention was replaced"):
        disable(model)


def test_wrappers_and_lists_are_opened():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    chunks = [Wrapper(Wrapper(build(config()))), Wrapper(build(config()))]
    assert enable(chunks, min_ratio=1.0) is chunks
    for chunk in chunks:
        with torch.no_grad():
            chunk(**row_of_sequences()["call"])
    assert (stats(chunks).calls, stats(chunks).packed_calls) == (2, 2)
    assert stats(chunks[0]).ratio == stats(chunks).ratio > 1.2
    enable(chunks[0], min_ratio=9.0)
    with torch.no_grad():
        chunks[0](**row_of_sequences()["call"])
    assert stats(chunks[0]).passed_through == {"tokens in / tokens run below min_ratio 9": 1}


def test_hooks_of_slime_enable_every_chunk():
    chunks = [build(config()), build(config())]
    slime.before_train_step(None, 0, 0, chunks, None, None)
    slime.before_log_prob(None, chunks, "ref_")
    with torch.no_grad():
        chunks[1](**row_of_sequences(tail=5)["call"])
    assert (stats(chunks[0]).calls, stats(chunks[1]).packed_calls) == (0, 1)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), 3, []])
def test_what_is_no_gpt_is_refused(model):
    with pytest.raises(TypeError, match="expected a Megatron-core GPTModel, got"):
        enable(model)


def test_a_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match=r"min_ratio must be at least 1, got 0\.5"):
        enable(build(config()), min_ratio=0.5)


@pytest.mark.parametrize("name", [*SETTINGS, "context_parallel_size", "expert_model_parallel_size"])
def test_settings_that_packed_rows_break_are_refused_by_name(name):
    model = build(config())
    value = {"cuda_graph_impl": "local"}.get(name, 2)
    object.__setattr__(model.config, name, value)
    with pytest.raises(NotImplementedError, match=f"can't enable GPTModel: .*{name.split('_')[0]}"):
        enable(model)
    assert "_prefix_attn" not in model.__dict__
    assert "forward" not in model.decoder.__dict__


def test_layers_that_do_not_know_the_tree_are_refused():
    model = build(config())
    for layer in model.decoder.layers:
        layer.self_attention.attn_mask_type = type(layer.self_attention.attn_mask_type).no_mask
    with pytest.raises(NotImplementedError, match="attn_mask_type no_mask"):
        enable(model)
    model.config.window_size = (3, 2)
    with pytest.raises(NotImplementedError, match=r"window_size=\(3, 2\)"):
        enable(model)


def test_an_older_megatron_is_refused(monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", "0.15.3")
    with pytest.raises(
        NotImplementedError, match=r"megatron-core 0\.16 or newer, this is 0\.15\.3"
    ):
        enable(build(config()))


def test_inference_runs_as_it_is_and_without_gradients_packs():
    plain, ours = pair(config())
    batch = row_of_sequences()
    with torch.inference_mode():
        assert (plain(**batch["call"]) - ours(**batch["call"])).abs().max() < EXACT
    assert stats(ours).packed_calls == 1


def test_a_core_that_keeps_no_scale_gets_that_of_its_attention(monkeypatch):
    """Transformer Engine's attention takes the scale and does not show it."""
    plain, ours = pair(config(mla=True))
    for layer in ours.decoder.layers:
        del layer.self_attention.core_attention.softmax_scale
    batch = row_of_sequences()
    assert deviation(step(ours, batch), step(plain, batch)) < EXACT
    assert stats(ours).packed_calls == 1
