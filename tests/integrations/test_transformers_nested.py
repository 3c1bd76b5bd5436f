"""Other models that run while an enabled model runs its packed row."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    as_row,
    build,
    pad,
    rows_that_share,
    run,
    tiny_config,
)


@pytest.fixture
def outer():
    return prefix_attn.enable(build(tiny_config("llama")), min_ratio=1.0)


def packed_length():
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    return layout.num_tokens


def same_config(outer):
    """`from_config` does not copy its config, so `enable` has changed it for both."""
    return transformers.LlamaForCausalLM(outer.config).double()


def enabled_but_not_packed(outer):
    return prefix_attn.enable(build(tiny_config("qwen3")))


def enabled_and_packed(outer):
    return prefix_attn.enable(build(tiny_config("qwen3")), always=True)


def same_attention(outer):
    return build(tiny_config("mistral"), attn_implementation="prefix_attn")


def eager_attention(outer):
    return build(tiny_config("gpt2"), attn_implementation="prefix_attn_eager")


class OwnMasks(torch.nn.Module):
    """Makes masks as transformers' models do, and is none of them."""

    def __init__(self, config):
        super().__init__()
        self.config = copy.deepcopy(config)
        self.inner = build(tiny_config("llama"), attn_implementation="prefix_attn")

    def forward(self, ids, **options):
        from transformers.masking_utils import create_causal_mask

        embeds = self.inner.get_input_embeddings()(ids)
        arguments = (self.config, embeds, None)
        try:
            mask = create_causal_mask(*arguments, past_key_values=None)
        except TypeError:  # before transformers 5
            columns = torch.arange(ids.shape[1])
            mask = create_causal_mask(*arguments, cache_position=columns, past_key_values=None)
        rotary = self.inner.model.rotary_emb(embeds, torch.arange(ids.shape[1])[None])
        layer = self.inner.model.layers[0]
        hidden = layer(embeds, attention_mask=mask, position_embeddings=rotary)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return transformers.utils.ModelOutput(logits=hidden)


def no_transformers_model(outer):
    return OwnMasks(outer.config)


NESTED = [
    same_config,
    enabled_but_not_packed,
    enabled_and_packed,
    same_attention,
    eager_attention,
    no_transformers_model,
]


def in_another_thread(function):
    out = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]


@pytest.mark.parametrize("start", [lambda f: f(), in_another_thread], ids=["same", "other"])
@pytest.mark.parametrize("make", NESTED)
@pytest.mark.parametrize("fits", [False, True], ids=["other length", "length of the row"])
def test_a_model_inside_a_packed_call_runs_as_outside(fits, make, start, outer):
    inner = make(outer).eval()
    ids = torch.randint(3, 97, (1, packed_length() if fits else 20))
    want = inner(ids, use_cache=False).logits
    batch = pad(rows_that_share())
    outside = run(outer, batch)
    found = []

    def hook(module, args, out):
        found.append(start(lambda: inner(ids, use_cache=False).logits))

    outer.model.layers[0].register_forward_hook(hook)
    around = run(outer, batch)
    assert len(found) == 1
    assert torch.equal(found[0], want)
    assert all(torch.equal(around[name], outside[name]) for name in outside)
    assert prefix_attn.stats(outer).packed_calls == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_inside_a_packed_call_is_recomputed_as_outside(reentrant, outer):
    """The nested model is part of what is differentiated, and runs again in the backward pass."""
    inner = same_config(outer)
    ids = torch.randint(3, 97, (1, packed_length()))
    seen = []

    def hook(module, args, out):
        hidden = inner.model(ids, use_cache=False).last_hidden_state
        seen.append(hidden.detach())
        if isinstance(out, tuple):
            return (out[0] + hidden, *out[1:])
        return out + hidden

    # On a part of the layer, so that it runs inside what is recomputed.
    outer.model.layers[0].self_attn.register_forward_hook(hook)
    batch = as_row(rows_that_share())
    want = run(outer, batch)
    alone = inner.model(ids, use_cache=False).last_hidden_state
    outer.gradient_checkpointing_enable({"use_reentrant": reentrant})
    outer.enable_input_require_grads()
    found = run(outer, batch)
    assert len(seen) == 3  # the first run, the second one and its recomputation
    assert all(torch.equal(hidden, alone) for hidden in seen)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert prefix_attn.stats(outer).packed_calls == 2


def test_a_call_of_the_same_model_inside_a_packed_one_packs_its_own_batch(outer):
    batch, other = pad(rows_that_share()), pad(rows_that_share()[:3], "left")
    want, other_want = outer(**batch).logits, outer(**other).logits
    found = []

    def hook(module, args, out):
        if not found:
            found.append(None)
            found[0] = outer(**other).logits

    outer.model.layers[0].register_forward_hook(hook)
    assert torch.equal(outer(**batch).logits, want)
    assert torch.equal(found[0], other_want)


def test_a_model_that_reads_its_attention_mask_is_told_so(outer):
    """A packed row has none."""
    decoder = outer.model
    prefix_attn.disable(outer)
    inner = decoder.forward
    decoder.forward = lambda attention_mask=None, **kwargs: inner(
        attention_mask=attention_mask.cumsum(1), **kwargs
    )
    prefix_attn.enable(outer, min_ratio=1.0)
    with pytest.raises(AttributeError, match="'cumsum' of its attention mask"):
        outer(**pad(rows_that_share()))
