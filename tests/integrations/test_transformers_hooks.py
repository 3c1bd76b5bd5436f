"""Hooks that see the rows of a batch: on the embedding, and those of PEFT's adapters."""

from __future__ import annotations

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from prefix_attn.integrations.transformers.calls import GENERATION  # noqa: E402
from tests.integrations.test_transformers_enable import (  # noqa: E402
    assert_passes_through,
    assert_same_when_enabled,
)
from tests.integrations.tiny_models import (  # noqa: E402
    VOCAB,
    build,
    pad,
    rows_that_share,
    tiny_config,
)


@pytest.fixture
def model():
    return build(tiny_config("qwen3"))


@pytest.fixture
def batch():
    return pad(rows_that_share())


# ---- on the embedding ---------------------------------------------------------------------------


def by_length(module, args, out):
    """Reads how long the rows are."""
    return out / out.shape[1]


def by_place(module, args, out):
    """Reads where in its row a token lies."""
    return out * torch.linspace(0.5, 1, out.shape[1], dtype=out.dtype)[:, None]


def of_ids(module, args):
    """Reads the ids of a row: each becomes the sum of those before it."""
    return (args[0].cumsum(1) % VOCAB,)


class Hook:
    def __call__(self, module, args, out):
        return by_length(module, args, out)


def replaced(embedding, function):
    inner = embedding.forward
    embedding.forward = lambda ids: function(embedding, (ids,), inner(ids))


EMBEDDING_HOOKS = {
    "by_length": lambda e: e.register_forward_hook(by_length),
    "by_place": lambda e: e.register_forward_hook(functools.partial(by_place)),
    "of_ids": lambda e: e.register_forward_pre_hook(of_ids),
    "Hook": lambda e: e.register_forward_hook(Hook()),
    "<lambda>": lambda e: replaced(e, by_length),
}


@pytest.mark.parametrize("name", list(EMBEDDING_HOOKS))
def test_hooks_on_the_embedding_pass_through(name, model, batch):
    handle = EMBEDDING_HOOKS[name](model.get_input_embeddings())
    assert_passes_through(model, batch, f"a hook on the embedding: {name}")
    if handle is not None:
        handle.remove()
        assert_same_when_enabled(model, batch)


def test_hooks_on_all_modules_pass_through(model, batch):
    def only_embeddings(module, args, out):
        return by_length(module, args, out) if isinstance(module, torch.nn.Embedding) else None

    handle = torch.nn.modules.module.register_module_forward_hook(only_embeddings)
    try:
        assert_passes_through(model, batch, "a hook on the embedding: only_embeddings")
    finally:
        handle.remove()


def test_hooks_on_embeddings_of_places_pass_through(batch):
    model = build(tiny_config("gpt2"))
    model.transformer.wpe.register_forward_hook(by_length)
    assert_passes_through(model, batch, "a hook on the embedding: by_length")


def test_hooks_on_an_embedding_that_the_caller_runs_do_not_matter(model, batch):
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(by_length)
    embeds = embedding(batch.pop("input_ids")).detach()
    assert_same_when_enabled(model, {**batch, "inputs_embeds": embeds})


def test_hooks_that_treat_each_token_alike_are_packed(model, batch):
    model.enable_input_require_grads()
    assert_same_when_enabled(model, batch)


def test_hooks_of_accelerate_are_packed(model, batch):
    hooks = pytest.importorskip("accelerate.hooks")
    device = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hooks.add_hook_to_module(model.get_input_embeddings(), device)
    assert_same_when_enabled(model, batch)


@pytest.mark.parametrize("training", [False, True])
def test_neftune_has_the_noise_of_the_ordinary_batch(training, model, batch):
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding = model.train(training).get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)

    def logits():
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**batch).logits

    want = logits()
    prefix_attn.enable(model, min_ratio=1.0)
    found = logits()
    counts = prefix_attn.stats(model)
    if training:
        assert torch.equal(found, want)
        reason = "a hook on the embedding: neftune_post_forward_hook"
        assert list(counts.passed_through) == [reason]
    else:
        assert counts.packed_calls == 1


# ---- adapters of PEFT ---------------------------------------------------------------------------


def lora(base, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        **options,
    )
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("self_check", [False, True])
def test_adapters_by_row_pass_through(self_check, model, batch):
    model = lora(model).eval()
    names = ["default", "__base__"] * (len(batch["input_ids"]) // 2)
    with torch.no_grad():
        want = model(**batch, adapter_names=names).logits
        prefix_attn.enable(model, min_ratio=1.0, self_check=self_check)
        found = model(**batch, adapter_names=names).logits
        assert torch.equal(found, want)
        counts = prefix_attn.stats(model)
        assert list(counts.passed_through) == ["PEFT's adapters see rows: adapter_names"]
        model(**batch)
    assert counts.packed_calls == 1


@pytest.mark.parametrize("checkpoints", [False, True])
def test_adapters_from_a_token_on_pass_through(checkpoints, model, batch):
    """aLoRA: the adapter acts from the place on where a row invokes it."""
    invocation = batch["input_ids"][0, 9:11].tolist()  # in the prefix of three rows
    model = lora(model, alora_invocation_tokens=invocation)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def results():
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits
        logits[batch["attention_mask"].bool()].sin().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    want = [x.clone() for x in results()]
    prefix_attn.enable(model, min_ratio=1.0)
    found = results()
    assert len(want) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    reason = "PEFT's adapters see rows: alora_offsets"
    assert list(prefix_attn.stats(model).passed_through) == [reason]


def test_generation_with_adapters_by_row_is_generation(model, batch):
    model = lora(model).eval()
    names = ["default"] * len(batch["input_ids"])
    prefix_attn.enable(model)
    model.generate(**pad(rows_that_share(), "left"), adapter_names=names, max_new_tokens=2)
    assert list(prefix_attn.stats(model).passed_through) == [GENERATION]
