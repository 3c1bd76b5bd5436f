"""`labels=` together with a `prefix_layout` of one's own."""

from __future__ import annotations

import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn.integrations.transformers  # noqa: E402
from prefix_attn import PrefixLayout  # noqa: E402
from tests.integrations.test_transformers_enable import ROUNDING  # noqa: E402
from tests.integrations.test_transformers_exact import EXACT  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    KeepDouble,
    build,
    rows_that_share,
    tiny_config,
)

IGNORED = -100


def call_with_labels():
    """Labels of the packed row, every third of them ignored, none where sequences fork."""
    layout, ids = PrefixLayout.from_sequences(rows_that_share())
    labels = ids.clone()
    labels[1::3] = IGNORED
    forks = layout.target_index[layout.predictor_index != layout.target_index - 1]
    assert len(forks) > 1
    assert (labels[forks] != IGNORED).all()
    return layout, {
        "input_ids": ids[None],
        "position_ids": layout.position_ids[None],
        "prefix_layout": layout,
        "labels": labels[None],
        "use_cache": False,
    }


def loss_of_sequences(model, layout, labels):
    """The mean over the labels of all sequences run alone, those that they share taken once."""
    losses = torch.zeros(layout.num_tokens, dtype=torch.float64)
    for i in range(layout.num_sequences):
        rows = layout.sequence_rows(i)
        ids = rows_that_share()[i]
        log_probs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        losses[rows[1:]] = -log_probs[:-1].gather(1, ids[1:, None])[:, 0]
    counted = labels != IGNORED
    counted[layout.cu_seqlens[:-1][layout.parents < 0].long()] = False  # nothing predicts them
    return losses[counted].mean(), int(counted.sum())


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3_moe", "granite", "olmo2"]
)
def test_labels_are_paired_by_the_layout(model_type):
    """The loss is that of the sequences alone, at the forks too."""
    model = build(tiny_config(model_type, **EXACT[model_type])).eval()
    layout, call = call_with_labels()
    with KeepDouble(), torch.no_grad():
        want, count = loss_of_sequences(model, layout, call["labels"][0])
        eager = model.config._attn_implementation == "eager"
        model.set_attn_implementation("prefix_attn_eager" if eager else "prefix_attn")
        found = model(**call).loss
        total = model(**call, num_items_in_batch=torch.tensor(4)).loss
    assert abs(found - want) <= ROUNDING * want
    assert abs(total - want * count / 4) <= ROUNDING * total


@pytest.mark.parametrize("how", ["enabled", "compiled"])
def test_labels_are_paired_by_the_layout_in_a_model_that_is(how):
    model = build(tiny_config("qwen3"), torch.float32, attn_implementation="prefix_attn")
    _layout, call = call_with_labels()
    want = model(**call).loss
    if how == "enabled":
        model.set_attn_implementation("sdpa")
        run = prefix_attn.enable(model)
    else:
        torch.compiler.reset()
        run = torch.compile(model, backend="aot_eager")
    found = run(**call).loss
    assert abs(found - want) <= 1e-5 * want


def test_labels_without_a_layout_have_the_ordinary_loss():
    _layout, call = call_with_labels()
    del call["prefix_layout"]
    model = build(tiny_config("qwen3"))
    want = model(**call).loss
    model.set_attn_implementation("prefix_attn")
    assert torch.equal(model(**call).loss, want)


def test_labels_that_the_caller_has_paired_are_taken_as_they_are():
    model = build(tiny_config("qwen3"), attn_implementation="prefix_attn")
    _layout, call = call_with_labels()
    labels = call.pop("labels")
    logits = model(**call).logits
    want = torch.nn.functional.cross_entropy(logits[0].float(), labels[0])
    found = model(**call, labels=labels, shift_labels=labels).loss
    assert torch.equal(found, want)


def test_a_loss_function_of_ones_own_gets_the_pairs():
    model = build(tiny_config("qwen3"), attn_implementation="prefix_attn")
    layout, call = call_with_labels()
    seen = {}

    def own(logits, labels, vocab_size, shift_labels=None, **kwargs):
        seen.update(logits=logits, labels=labels, shift_labels=shift_labels)
        return logits.sum()

    model.loss_function = own
    model(**call)
    assert seen["labels"] is None
    assert seen["logits"].shape[1] == len(layout.predictor_index)
    assert torch.equal(seen["shift_labels"], call["labels"][:, layout.target_index])


def test_labels_of_single_tokens_are_not_shifted():
    """In the classification of tokens row r has label r, whatever the layout is."""
    config = tiny_config("qwen3", num_labels=3)
    torch.manual_seed(0)
    model = transformers.AutoModelForTokenClassification.from_config(
        config, attn_implementation="prefix_attn"
    )
    layout, call = call_with_labels()
    call["labels"] = labels = torch.arange(layout.num_tokens)[None] % 3
    out = model.eval()(**call)
    want = torch.nn.functional.cross_entropy(out.logits[0].float(), labels[0])
    assert torch.equal(out.loss, want)


# ---- refusals -----------------------------------------------------------------------------------


def test_a_loss_function_that_takes_no_pairs_is_refused():
    model = build(tiny_config("qwen3"), attn_implementation="prefix_attn")

    def shifts_itself(logits, labels, vocab_size, **kwargs):
        return logits.sum()

    model.loss_function = shifts_itself
    _, call = call_with_labels()
    with pytest.raises(NotImplementedError, match=r"shifts_itself .*layout\.predictor_index"):
        model(**call)


class InlineLoss(transformers.LlamaForCausalLM):
    """As many models outside of transformers do."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), shifted)
        return transformers.utils.ModelOutput(loss=loss, logits=logits)


class FusedLoss(transformers.LlamaForCausalLM):
    """As kernels that never make logits do."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids, **kwargs)[0]
        if labels is None:
            return transformers.utils.ModelOutput(logits=self.lm_head(hidden))
        return transformers.utils.ModelOutput(loss=fused(hidden, labels=labels, **kwargs))


def fused(hidden, labels, **kwargs):
    return hidden.sum()


class DropsKeywords(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs)[0])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.utils.ModelOutput(loss=loss, logits=logits)


class KnowsLayouts(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, prefix_layout=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, prefix_layout=prefix_layout, **kwargs)[0])
        pairs = logits[0, prefix_layout.predictor_index], labels[0, prefix_layout.target_index]
        loss = torch.nn.functional.cross_entropy(*pairs)
        return transformers.utils.ModelOutput(loss=loss, logits=logits)


def own_model(cls, config=None):
    config = config or tiny_config("llama")
    config._attn_implementation = "prefix_attn"
    torch.manual_seed(0)
    return cls(config).double()


@pytest.mark.parametrize("cls", [InlineLoss, FusedLoss, DropsKeywords])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_models_whose_loss_does_not_get_the_layout_are_refused(checkpoints, cls):
    model = own_model(cls)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, call = call_with_labels()
    with pytest.raises(NotImplementedError, match=rf"{cls.__name__} computes its loss from labels"):
        model(**call)
    model(**{**call, "labels": None}).logits.sum().backward()


def test_a_model_that_names_the_layout_computes_its_own_loss():
    model = own_model(KnowsLayouts)
    _, call = call_with_labels()
    ours = own_model(transformers.LlamaForCausalLM)
    ours.load_state_dict(model.state_dict())
    assert abs(model(**call).loss - ours(**call).loss) <= 1e-6  # transformers' is in float32


def test_labels_of_another_model_around_it_do_not_matter():
    """A loss that runs the packed model on the way."""
    inner = own_model(transformers.LlamaForCausalLM)
    _, call = call_with_labels()
    labels = call.pop("labels")

    class Around(InlineLoss):
        def forward(self, input_ids=None, labels=None, **kwargs):
            inner(**call)
            return super().forward(input_ids, labels=labels, **kwargs)

    losses = [own_model(cls)(call["input_ids"], labels=labels).loss for cls in (Around, InlineLoss)]
    assert losses[0] == losses[1]


def test_labels_that_do_not_fit_the_layout_are_refused():
    model = build(tiny_config("qwen3"), attn_implementation="prefix_attn")
    layout, call = call_with_labels()
    shape = rf"\(1, {layout.num_tokens}\)"
    with pytest.raises(ValueError, match=rf"shape {shape} .*got \(1, 5\) and {shape}"):
        model(**{**call, "labels": call["labels"][:, :5]})
    with pytest.raises(ValueError, match=rf"got {shape} and \(1, 4\)"):
        model(**call, logits_to_keep=4)


def test_a_forward_without_source_is_refused():
    namespace = {}
    source = "def forward(self, input_ids=None, labels=None, **kwargs):\n"
    source += "    return self.model(input_ids, **kwargs)\n"
    exec(compile(source, "<made>", "exec"), namespace)
    cls = types.new_class("Made", (transformers.LlamaForCausalLM,))
    cls.forward = namespace["forward"]
    cls.__module__ = sys.modules[__name__].__name__
    _, call = call_with_labels()
    with pytest.raises(NotImplementedError, match="Made computes its loss"):
        own_model(cls)(**call)
