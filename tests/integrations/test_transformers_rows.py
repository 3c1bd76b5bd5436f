"""Which sequences a row holds: as many as the model alone takes it for."""

from __future__ import annotations

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from prefix_attn.integrations.packing import SINGLE  # noqa: E402
from prefix_attn.integrations.transformers.calls import (  # noqa: E402
    JUMPS_IN_CACHE,
    JUMPS_UNREAD,
    MASKS_WITHOUT_POSITIONS,
)
from tests.integrations.test_transformers_enable import ROUNDING, vision_model  # noqa: E402
from tests.integrations.test_transformers_exact import EXACT  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    VOCAB,
    KeepDouble,
    as_row,
    build,
    deviation,
    pad,
    rows_that_share,
    run,
    tiny_config,
)


def batch_of(kind):
    """Batches whose positions jump: forwards as in PoSE, backwards where sequences start."""
    rows = rows_that_share()
    padded = pad(rows)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    gap = columns + 40 * (columns >= 6)
    several = torch.where(columns < 9, columns, columns - 9)
    return {
        "gap": {"input_ids": ids, "position_ids": gap},
        "gap in one row for all": {"input_ids": ids, "position_ids": gap[:1]},
        "gap in padded rows": {**padded, "position_ids": gap},
        "gap in left-padded rows": {**pad(rows, "left"), "position_ids": gap},
        "gap in rows without padding": {
            "input_ids": ids,
            "attention_mask": torch.ones_like(mask),
            "position_ids": gap,
        },
        "rows of two sequences": {"input_ids": ids, "position_ids": several},
        "one row of several": as_row(rows),
        "one row of several, with a mask": {
            **as_row(rows),
            "attention_mask": torch.ones(1, sum(len(row) for row in rows), dtype=torch.long),
        },
        "one row from 7": {"input_ids": rows[0][None], "position_ids": columns[:1, :18] + 7},
        "one row of several from 7": {
            "input_ids": as_row(rows)["input_ids"][:, 7:],
            "position_ids": as_row(rows)["position_ids"][:, 7:],
        },
    }[kind]


KINDS = [
    "gap",
    "gap in one row for all",
    "gap in padded rows",
    "gap in left-padded rows",
    "gap in rows without padding",
    "rows of two sequences",
    "one row of several",
    "one row of several, with a mask",
    "one row from 7",
    "one row of several from 7",
]


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def model(request):
    """Without a window, and with one shorter than the sequences."""
    return build(tiny_config(request.param))


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("always", [False, True])
def test_enable_takes_rows_as_the_model_alone_does(always, kind, use_cache, model):
    batch = batch_of(kind)
    with KeepDouble():
        prefix_attn.disable(model)
        alone = run(model, batch, use_cache=use_cache)
        prefix_attn.enable(model, min_ratio=1.0, always=always)
        found = run(model, batch, use_cache=use_cache)
    assert deviation(found, alone) <= ROUNDING
    counts = prefix_attn.stats(model)
    single = kind.startswith("one row") and (
        use_cache is None or "mask" in kind or kind == "one row from 7"
    )
    assert counts.packed_calls == int(use_cache is not True and (always or not single)), counts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("configured", [False, True])
def test_enable_knows_when_the_model_makes_a_cache(configured, checkpoints, gradients, training):
    """With one, transformers takes the row for one sequence; checkpointing switches it off."""
    model = build(tiny_config("qwen3")).train(training)
    model.config.use_cache = configured
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = as_row(rows_that_share())
    with KeepDouble(), torch.set_grad_enabled(gradients):
        alone = model(**batch).logits
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch).logits
    assert (found - alone).abs().max() <= ROUNDING * alone.abs().max()
    counts = prefix_attn.stats(model)
    cached = configured and not (checkpoints and training and gradients)
    assert counts.packed_calls == int(not cached)
    assert list(counts.passed_through) == ([JUMPS_IN_CACHE] if cached else [])


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("model_type", sorted({"gemma2", "gpt2", "olmo3", "phi3", "starcoder2"}))
def test_other_decoders_take_rows_as_alone(model_type, use_cache):
    model = build(tiny_config(model_type, **EXACT[model_type])).eval()
    batch = batch_of("gap")
    with KeepDouble(), torch.no_grad():
        alone = model(**batch, use_cache=use_cache).logits
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch, use_cache=use_cache).logits
    assert prefix_attn.stats(model).packed_calls == 1
    assert (found - alone).abs().max() <= ROUNDING * alone.abs().max()


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("model_type", sorted(MASKS_WITHOUT_POSITIONS))
def test_gaps_split_no_row_of_a_decoder_whose_masks_see_no_positions(model_type, use_cache):
    """Only restarts in a batch of one row do, as under flash attention: see the exact tests."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    model = build(tiny_config(model_type, **EXACT[model_type])).eval()
    for kind in ("gap", "rows of two sequences", "one row from 7"):
        batch = batch_of(kind)
        with KeepDouble(), torch.no_grad():
            prefix_attn.disable(model)
            alone = model(**batch, use_cache=use_cache).logits
            prefix_attn.enable(model, min_ratio=1.0, always=True)
            found = model(**batch, use_cache=use_cache).logits
        assert prefix_attn.stats(model).packed_calls == 1
        assert (found - alone).abs().max() <= ROUNDING * alone.abs().max()


@pytest.mark.parametrize("kinds", [2, 3, 4])
@pytest.mark.parametrize("name", ["Qwen2_5_VLText", "Qwen3VLText"])
def test_decoders_with_picture_positions_take_rows_as_alone(name, kinds):
    """(B, L) positions split rows in one of them; of (3, B, L) none is the place in the text."""
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip("not in this version of transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).double()
    batch = batch_of("rows of two sequences")
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    positions = batch["position_ids"]
    if kinds > 2:
        positions = positions.expand(kinds, -1, -1)
    call = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
    with KeepDouble():
        alone = model(**call).last_hidden_state
        prefix_attn.enable(model, min_ratio=1.0, self_check=False)
        found = model(**call).last_hidden_state
    assert prefix_attn.stats(model).packed_calls == 1
    assert (found - alone).abs().max() <= ROUNDING * alone.abs().max()


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("kind", ["gap", "one row of several"])
def test_masks_of_an_outer_model_tell_the_sequences(kind, use_cache):
    """Gemma 3 with vision makes them before its decoder makes a cache."""
    model = vision_model("gemma3")
    batch = batch_of(kind)
    batch["input_ids"] = batch["input_ids"].clamp(max=VOCAB - 2)
    with KeepDouble(), torch.no_grad():
        alone = model(**batch, use_cache=use_cache).logits
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch, use_cache=use_cache).logits
    assert prefix_attn.stats(model).packed_calls == 1
    assert (found - alone).abs().max() <= ROUNDING * alone.abs().max()


# ---- models that ran flash attention ------------------------------------------------------------


def enabled_from_flash(model):
    """As if it had been switched on where flash attention is installed."""
    decoder = model.get_decoder()
    decoder.config._attn_implementation_internal = "flash_attention_2"
    prefix_attn.enable(model, min_ratio=1.0)
    return model


def logits_of_each(model, ids, bounds, positions):
    """Each sequence on its own, as flash attention runs it."""
    parts = itertools.pairwise(bounds)
    return torch.cat(
        [
            model(ids[:, a:b], position_ids=positions[:, a:b], use_cache=False).logits[0]
            for a, b in parts
        ]
    )


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("first", [0, 7])
def test_rows_split_as_in_flash_attention(first, mask, use_cache):
    """With and without a cache, and under a mask of ones, where positions are the smallest."""
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    model = build(tiny_config("qwen3")).eval()
    batch = as_row(rows_that_share())
    batch["position_ids"] = batch["position_ids"] + first
    try:
        (bounds, _), _ = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    except RuntimeError:
        pytest.skip("in this version flash attention looks for positions of 0")
    with KeepDouble(), torch.no_grad():
        want = logits_of_each(model, batch["input_ids"], bounds.tolist(), batch["position_ids"])
        enabled_from_flash(model)
        if mask:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        found = model(**batch, use_cache=use_cache).logits[0]
    assert prefix_attn.stats(model).packed_calls == 1
    assert (found - want).abs().max() <= ROUNDING * want.abs().max()


@pytest.mark.parametrize("positions", [False, True])
def test_rows_split_at_the_bounds_given_to_flash_attention(positions):
    model = build(tiny_config("qwen3")).eval()
    rows = rows_that_share()
    ids = torch.cat(rows)[None]
    lengths = torch.tensor([len(row) for row in rows])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    columns = torch.arange(ids.shape[1])[None]
    call = {
        "input_ids": ids,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if positions:
        call["position_ids"] = as_row(rows)["position_ids"]
    with KeepDouble(), torch.no_grad():
        at = call.get("position_ids", columns)
        want = logits_of_each(model, ids, bounds.tolist(), at)
        enabled_from_flash(model)
        found = model(**call).logits[0]
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == 1
    assert (counts.tokens_run < counts.tokens_in) == positions  # equal tokens, other columns
    assert (found - want).abs().max() <= ROUNDING * want.abs().max()


def test_gaps_split_no_row_that_flash_attention_keeps_whole():
    model = build(tiny_config("qwen3")).eval()
    batch = batch_of("gap")
    with KeepDouble(), torch.no_grad():
        want = model(**batch, use_cache=True).logits
        enabled_from_flash(model)
        found = model(**batch, use_cache=False).logits
    assert prefix_attn.stats(model).packed_calls == 1
    assert (found - want).abs().max() <= ROUNDING * want.abs().max()


def test_slices_of_a_row_over_several_ranks_are_refused(monkeypatch):
    model = enabled_from_flash(build(tiny_config("qwen3")))
    batch = batch_of("one row of several from 7")
    model(**batch, use_cache=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"starts at position 7.*sequence-parallel"):
        model(**batch, use_cache=False)


def test_reasons_tell_a_single_sequence_from_a_row_with_a_cache():
    model = prefix_attn.enable(build(tiny_config("llama")))
    model(**as_row(rows_that_share()))
    model(**batch_of("one row from 7"))
    assert dict(prefix_attn.stats(model).passed_through) == {JUMPS_IN_CACHE: 1, SINGLE: 1}


def test_reasons_tell_a_model_that_alone_reads_one_sequence():
    places = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    config = tiny_config("qwen2_vl_text", rope_parameters=places)
    model = prefix_attn.enable(transformers.AutoModel.from_config(config))
    row = as_row(rows_that_share())
    model(**row, use_cache=False)
    model(**row)
    assert dict(prefix_attn.stats(model).passed_through) == {JUMPS_UNREAD: 1, JUMPS_IN_CACHE: 1}
