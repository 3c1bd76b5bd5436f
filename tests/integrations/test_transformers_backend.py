"""`attn_implementation="prefix_attn"` with a layout, and without one."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn.integrations.transformers  # noqa: E402
from prefix_attn import PrefixLayout  # noqa: E402
from prefix_attn.integrations.transformers.attention import LazyMask  # noqa: E402
from tests.integrations.test_transformers_enable import ROUNDING  # noqa: E402
from tests.integrations.test_transformers_exact import MIXED  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    KeepDouble,
    build,
    pad,
    rows_that_share,
    tiny_config,
)


def packed_call():
    """What a caller passes who packs on its own."""
    layout, ids = PrefixLayout.from_sequences(rows_that_share())
    return layout, {
        "input_ids": ids[None],
        "position_ids": layout.position_ids[None],
        "prefix_layout": layout,
        "use_cache": False,
    }


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_layout_gives_the_logits_of_every_sequence(model_type):
    from tests.integrations.test_transformers_exact import EXACT

    config = tiny_config(model_type, **EXACT[model_type])
    model = build(config).eval()
    layout, call = packed_call()
    with KeepDouble(), torch.no_grad():
        want = [model(row[None], use_cache=False).logits[0] for row in rows_that_share()]
        model.set_attn_implementation("prefix_attn")
        found = layout.unpack(model(**call).logits[0])
    scale = max(float(x.abs().max()) for x in want)
    for a, b in zip(found, want, strict=True):
        assert (a - b).abs().max() <= ROUNDING * scale


def test_no_dense_mask_is_built_for_a_packed_row(monkeypatch):
    model = build(tiny_config("mistral"), attn_implementation="prefix_attn")
    monkeypatch.setattr(LazyMask, "build", lambda _: pytest.fail("a mask was built"))
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda **kw: pytest.fail("a mask was built"))
    _, call = packed_call()
    assert model(**call).logits.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("model_type", "fallback", "name"),
    [
        ("llama", "sdpa", "prefix_attn"),
        ("mistral", "sdpa", "prefix_attn"),
        ("gemma3_text", "sdpa", "prefix_attn"),
        ("gemma2", "eager", "prefix_attn_eager"),
        ("gpt_oss", "eager", "prefix_attn_eager"),
    ],
)
def test_generation_has_the_bits_of_the_fallback(model_type, fallback, name, cache):
    changes = MIXED if model_type != "llama" else {}
    if model_type == "mistral":
        changes = {}
    model = build(tiny_config(model_type, **changes), torch.float32).eval()
    batch = pad(rows_that_share(), "left")
    results = []
    for implementation in (fallback, name):
        model.set_attn_implementation(implementation)
        results.append(
            model.generate(
                **batch,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation=None if cache == "dynamic" else "static",
                disable_compile=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    for a, b in zip(results[0].logits, results[1].logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["mask", "no mask", "row"])
def test_calls_without_a_layout_have_the_bits_of_the_fallback(model_type, kind):
    model = build(tiny_config(model_type), torch.float32)
    batch = pad(rows_that_share())
    if kind == "no mask":
        del batch["attention_mask"]
    if kind == "row":
        row = torch.cat(rows_that_share())
        positions = torch.cat([torch.arange(len(r)) for r in rows_that_share()])
        batch = {"input_ids": row[None], "position_ids": positions[None]}
    eager = model.config._attn_implementation == "eager"
    want = model(**batch).logits
    model.set_attn_implementation("prefix_attn_eager" if eager else "prefix_attn")
    assert torch.equal(model(**batch).logits, want)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def llama():
    return build(tiny_config("llama"), attn_implementation="prefix_attn")


def test_a_mask_together_with_a_layout_is_refused(llama):
    _, call = packed_call()
    for mask in (torch.ones_like(call["input_ids"]), torch.ones(1, 1, 9, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match="pass attention_mask=None"):
            llama(**call, attention_mask=mask)


def test_a_layout_that_does_not_fit_the_row_is_refused(llama):
    layout, call = packed_call()
    call["input_ids"] = call["input_ids"][:, :-2]
    call["position_ids"] = call["position_ids"][:, :-2]
    with pytest.raises(ValueError, match=rf"{layout.num_tokens} tokens.*sequence parallelism"):
        llama(**call)


def test_a_layout_with_several_rows_is_refused(llama):
    layout, call = packed_call()
    call["input_ids"] = call["input_ids"].expand(2, -1)
    with pytest.raises(ValueError, match=rf"shape \(1, {layout.num_tokens}\)"):
        llama(**call)


def test_a_layout_of_another_type_is_refused(llama):
    _, call = packed_call()
    call["prefix_layout"] = [1, 2]
    with pytest.raises(TypeError, match="prefix_layout must be a PrefixLayout, got list"):
        llama(**call)


def test_positions_that_do_not_follow_the_layout_are_refused(llama):
    _, call = packed_call()
    del call["position_ids"]
    with pytest.raises(ValueError, match=r"position_ids=layout\.position_ids\[None\]"):
        llama(**call)


def test_an_enabled_model_fills_in_the_positions_of_a_layout():
    model = build(tiny_config("llama"))
    _, call = packed_call()
    prefix_attn.enable(model)
    want = model(**call).logits
    del call["position_ids"]
    assert torch.equal(model(**call).logits, want)
    assert list(prefix_attn.stats(model).passed_through) == ["the caller passes a prefix_layout"]


def test_attention_dropout_is_refused_in_training():
    config = tiny_config("llama", attention_dropout=0.1)
    model = build(config, attn_implementation="prefix_attn")
    _, call = packed_call()
    with pytest.raises(ValueError, match=r"dropout 0\.1 in training"):
        model(**call)


def test_chunked_attention_is_refused():
    config = tiny_config("llama4_text", attention_chunk_size=4, num_local_experts=2)
    model = build(config, attn_implementation="prefix_attn")
    _, call = packed_call()
    with pytest.raises(ValueError, match="chunked attention is not supported"):
        model(**call)


def test_bidirectional_attention_is_refused():
    model = build(tiny_config("gemma3_text", use_bidirectional_attention=True))
    model.set_attn_implementation("prefix_attn")
    _, call = packed_call()
    with pytest.raises((ValueError, NotImplementedError), match=r"not causal|bidirectional|rules"):
        model(**call)


def layer_call(mask=None, **options):
    from prefix_attn.integrations.transformers.attention import _attend

    layout = PrefixLayout.from_lengths([3], [[2, 1]])
    q = torch.randn(1, 4, 6, 16)
    return _attend(
        torch.nn.Identity(), q, q, q, mask, fallback="sdpa", prefix_layout=layout, **options
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("position_bias", torch.zeros(4, 6, 6), "position bias"),
        ("is_causal", False, "not causal"),
        ("output_attentions", True, "attention weights"),
        ("top_indices", torch.arange(6), "'top_indices'"),
    ],
)
def test_options_that_change_attention_are_refused(option, value, message):
    assert layer_call()[0].shape == (1, 6, 4, 16)
    with pytest.raises(NotImplementedError, match=message):
        layer_call(**{option: value})


def test_is_causal_means_nothing_beside_a_mask():
    """As in sdpa."""
    from prefix_attn.integrations.transformers.attention import _attend

    layout = PrefixLayout.from_lengths([3], [[2, 1]])
    q = torch.randn(1, 4, 6, 16)
    mask = LazyMask({"q_length": 6, "kv_length": 6}, "sdpa", layout)
    found = _attend(torch.nn.Identity(), q, q, q, mask, fallback="sdpa", is_causal=False)[0]
    want = _attend(torch.nn.Identity(), q, q, q, None, fallback="sdpa", prefix_layout=layout)[0]
    assert torch.equal(found, want)


def test_the_mask_decides_about_a_window_that_a_layer_names():
    """As in sdpa; under flash attention the layer would."""
    layout = PrefixLayout.from_lengths([3], [[2, 1]])
    mask = LazyMask({"q_length": 6, "kv_length": 6}, "sdpa", layout)
    torch.manual_seed(0)
    found = layer_call(mask, sliding_window=2)[0]
    torch.manual_seed(0)
    assert torch.equal(found, layer_call(mask)[0])


def test_sinks_without_a_layout_need_eager():
    model = build(tiny_config("gpt_oss"), attn_implementation="prefix_attn")
    with pytest.raises(NotImplementedError, match="attn_implementation='prefix_attn_eager'"):
        model(**pad(rows_that_share()))


def test_softcap_under_sdpa_is_refused():
    """Older transformers compute it without the softcap, without a word."""
    model = build(tiny_config("gemma2"), attn_implementation="prefix_attn")
    with pytest.raises(NotImplementedError, match="softcap, which sdpa does not compute"):
        model(**pad(rows_that_share()))
    model.get_decoder().config._attn_implementation_internal = "sdpa"
    with pytest.raises(NotImplementedError, match="sdpa drops its softcap"):
        prefix_attn.enable(model)
