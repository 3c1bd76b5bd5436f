"""What `enable` packs, what it passes through or refuses, and what it survives."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from prefix_attn.integrations import OLDEST_TRANSFORMERS  # noqa: E402
from prefix_attn.integrations.packing import WARN_AFTER, PassThroughError  # noqa: E402
from prefix_attn.integrations.transformers.calls import find_packing  # noqa: E402
from tests.integrations.test_transformers_exact import EXACT  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
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

EPS = torch.finfo(torch.float64).eps
# Two orders above the largest deviation of test_transformers_exact, seven below a wrong token.
ROUNDING = 1e4 * EPS


@pytest.fixture
def model():
    return build(tiny_config("qwen3"))


@pytest.fixture
def batch():
    return pad(rows_that_share())


def assert_same_when_enabled(model, batch, packed=True, **options):
    """Runs a batch ordinarily and enabled; returns the statistics."""
    with KeepDouble():
        prefix_attn.disable(model)
        ordinary = run(model, batch, **options)
        prefix_attn.enable(model, min_ratio=1.0)
        found = run(model, batch, **options)
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == int(packed), counts
    assert deviation(found, ordinary) <= ROUNDING
    return counts


# ---- statistics and the threshold ---------------------------------------------------------------


def test_stats_count_tokens_in_and_run(model, batch):
    counts = assert_same_when_enabled(model, batch)
    assert counts.tokens_in == sum(len(row) for row in rows_that_share()) == 106
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    assert counts.tokens_run == layout.num_tokens
    assert counts.ratio == counts.tokens_in / counts.tokens_run


def test_below_the_threshold_nothing_is_packed(model, batch):
    prefix_attn.enable(model, min_ratio=1.0)
    model(**batch)
    ratio = prefix_attn.stats(model).ratio
    prefix_attn.enable(model, min_ratio=ratio * 1.01)
    model(**batch)
    counts = prefix_attn.stats(model)
    assert (counts.calls, counts.packed_calls) == (2, 1)
    assert "min_ratio" in next(iter(counts.passed_through))


def test_a_min_ratio_below_one_is_refused(model):
    with pytest.raises(ValueError, match=r"min_ratio must be at least 1, got 0\.5"):
        prefix_attn.enable(model, min_ratio=0.5)


@pytest.mark.parametrize("kind", ["batch", "single", "padded single", "embeddings"])
def test_always_packs_whatever_is_shared(kind, model, batch):
    """A batch of one, too: its attention then comes from the same kernel as that of a group."""
    if "single" in kind:
        batch = {name: x[:1] for name, x in batch.items()}
    if kind == "single":
        batch = {"input_ids": batch["input_ids"]}
    if kind == "embeddings":
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    mask = batch.get("attention_mask")
    with KeepDouble():
        want = model(**batch).logits
        prefix_attn.enable(model, min_ratio=100.0, always=True)
        found = model(**batch).logits
    assert prefix_attn.stats(model).packed_calls == 1
    keep = torch.ones(want.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert (found - want)[keep].abs().max() <= ROUNDING * want.abs().max()
    prefix_attn.enable(model, min_ratio=100.0)
    model(**batch)
    assert prefix_attn.stats(model).packed_calls == 1


def test_always_brings_a_sequence_alone_closer_to_its_group(batch):
    """In bfloat16 another attention kernel rounds other elements of its output another way."""
    model = build(tiny_config("qwen3"), torch.bfloat16)
    rows = rows_that_share()
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows)
    attended = []
    projection = model.get_decoder().layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: attended.append(args[0][0].clone()))

    def elements_that_differ(always):
        prefix_attn.enable(model, always=always)
        attended.clear()
        with torch.no_grad():
            model(**batch)
            for row in rows:
                model(row[None])
        group, *alone = attended
        return sum(
            int((group[layout.sequence_rows(i)] != out).sum()) for i, out in enumerate(alone)
        )

    assert elements_that_differ(True) < elements_that_differ(False)


def test_a_warning_says_once_why_nothing_was_packed(model, batch):
    prefix_attn.enable(model, min_ratio=100)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(WARN_AFTER + 5):
            model(**batch)
    texts = [str(w.message) for w in caught if "prefix_attn" in str(w.message)]
    assert len(texts) == 1
    assert f"none of {WARN_AFTER} calls" in texts[0]
    assert "min_ratio 100" in texts[0]


def test_generation_does_not_count_towards_the_warning(model, batch):
    prefix_attn.enable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**pad(rows_that_share(), "left"), max_new_tokens=WARN_AFTER + 5)
    passed = prefix_attn.stats(model).passed_through
    assert passed == {"past_key_values or use_cache=True": WARN_AFTER + 5}


def test_stats_of_a_model_that_is_not_enabled_are_refused(model):
    with pytest.raises(ValueError, match="not enabled"):
        prefix_attn.stats(model)


def test_enable_needs_a_transformers_model():
    with pytest.raises(TypeError, match="Linear"):
        prefix_attn.enable(torch.nn.Linear(2, 2))


def test_a_module_that_holds_several_models_is_refused(model):
    actor_critic = torch.nn.ModuleDict({"actor": model, "critic": copy.deepcopy(model)})
    actor_critic["backbone"] = actor_critic["critic"].get_decoder()  # no third one
    for function in (prefix_attn.enable, prefix_attn.stats, prefix_attn.disable):
        with pytest.raises(ValueError, match=r"several transformers models \(actor, critic\)"):
            function(actor_critic)
    prefix_attn.enable(actor_critic["critic"])
    prefix_attn.stats(actor_critic["critic"])


def test_without_transformers_enable_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import prefix_attn\n"
        "for name in ('enable', 'disable', 'stats'):\n"
        "    try: getattr(prefix_attn, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(f"pip install 'transformers>={OLDEST_TRANSFORMERS}'" in line for line in lines)


def test_older_transformers_is_refused_by_its_version():
    code = (
        "import transformers; transformers.__version__ = '5.5.2'\n"
        "import prefix_attn\n"
        "try: prefix_attn.enable\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs transformers {OLDEST_TRANSFORMERS} or newer (transformers 5.5.2" in done.stdout


def test_star_import_gives_what_needs_transformers():
    names: dict = {}
    exec("from prefix_attn import *", names)
    assert names["enable"] is prefix_attn.enable
    assert {"disable", "enable", "stats"} <= set(dir(prefix_attn))


# ---- on and off ---------------------------------------------------------------------------------


def test_disable_restores_the_model(model, batch):
    before = {k: v for k, v in model.get_decoder().__dict__.items() if not k.startswith("__")}
    implementation = model.config._attn_implementation
    want = run(model, batch)
    prefix_attn.enable(model)
    prefix_attn.disable(prefix_attn.disable(model))
    assert model.get_decoder().__dict__.keys() == before.keys()
    assert model.config._attn_implementation == implementation
    found = run(model, batch)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_disable_refuses_when_forward_was_replaced(model):
    prefix_attn.enable(model)
    decoder = model.get_decoder()
    decoder.forward = lambda **kwargs: None
    with pytest.raises(RuntimeError, match="replaced after enable"):
        prefix_attn.disable(model)


def test_an_instance_forward_is_kept(model, batch):
    """Patches of other libraries, set on the instance before enable, still run."""
    decoder = model.get_decoder()
    inner, seen = decoder.forward, []

    def patched(**kwargs):
        seen.append(kwargs["input_ids"].shape)
        return inner(**kwargs)

    decoder.forward = patched
    prefix_attn.enable(model, min_ratio=1.0)
    model(**batch)
    assert seen[0][0] == 1
    prefix_attn.disable(model)
    assert decoder.forward is patched


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_runs_its_own_weights(duplicate, model, batch):
    prefix_attn.enable(model, min_ratio=1.0)
    twin = duplicate(model)
    want = model(**batch).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch).logits, want)
    assert prefix_attn.stats(twin).packed_calls == 1
    assert prefix_attn.stats(model).packed_calls == 1
    prefix_attn.disable(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "prefix_attn"


def test_an_enabled_model_is_saved_as_an_ordinary_one(model, batch, tmp_path):
    want = model(**batch).logits
    prefix_attn.enable(model, min_ratio=1.0).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded.train()(**batch).logits, want)


def test_replicas_for_data_parallel_are_refused(model):
    """They are shallow copies, whose forward would be bound to the original."""
    prefix_attn.enable(model)
    with pytest.raises(NotImplementedError, match="Use DistributedDataParallel"):
        model.get_decoder()._replicate_for_data_parallel()
    prefix_attn.disable(model)
    model.get_decoder()._replicate_for_data_parallel()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_implementation_after_enable_passes_through(name, model, batch):
    """Whoever sets it wants it: the batch runs with its bits, and the statistics say so."""
    model.set_attn_implementation(name)
    want = model(**batch).logits
    prefix_attn.enable(model, min_ratio=1.0)
    model.set_attn_implementation(name)
    assert torch.equal(model(**batch).logits, want)
    model.generate(**batch, max_new_tokens=2)
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == 0
    assert counts.passed_through[f"attn_implementation is {name!r} since enable"] == 1
    assert_same_when_enabled(model, batch)
    prefix_attn.disable(model)
    assert model.config._attn_implementation == name


def test_a_layout_under_another_attention_implementation_is_refused(model):
    """It would run the packed row as one sequence."""
    layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    prefix_attn.enable(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"of Qwen3Model is 'sdpa'.*enable\(model\) again"):
        model(ids[None], prefix_layout=layout, use_cache=False)


def test_the_attention_weights_of_eager_come_back_on_demand(batch):
    """What transformers' own message asks for: set_attn_implementation("eager")."""
    model = build(tiny_config("qwen3"), attn_implementation="eager")
    want = model(**batch, output_attentions=True).attentions
    prefix_attn.enable(model, min_ratio=1.0)
    with pytest.raises(ValueError, match="set it to 'eager'"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    found = model(**batch).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_config_that_asks_for_attention_weights_is_refused():
    """Nothing would ever be packed, and transformers would not save the config."""
    model = build(tiny_config("qwen3", output_attentions=True), attn_implementation="eager")
    with pytest.raises(NotImplementedError, match=r"set config\.output_attentions to False"):
        prefix_attn.enable(model)
    model.config.output_attentions = False
    prefix_attn.enable(model)


def only_enabled(model, batch):
    prefix_attn.enable(model)


def trained(model, batch):
    prefix_attn.enable(model, min_ratio=1.0, self_check=True)
    model(**batch).logits.sum().backward()
    assert prefix_attn.stats(model).packed_calls == 1


def passed_through(model, batch):
    prefix_attn.enable(model, min_ratio=100.0)
    model(**batch).logits.sum().backward()


def generated(model, batch):
    prefix_attn.enable(model)
    model.generate(**batch, max_new_tokens=2)


def copied(model, batch):
    copy.deepcopy(prefix_attn.enable(model))


def disabled(model, batch):
    prefix_attn.disable(prefix_attn.enable(model))


@pytest.mark.parametrize(
    "use", [only_enabled, trained, passed_through, generated, copied, disabled]
)
def test_a_deleted_model_frees_its_memory_at_once(use, batch):
    """Without Python's collector, which may come late: the memory is that of a GPU."""
    model = build(tiny_config("qwen3"))
    gc.collect()
    gc.disable()
    try:
        use(model, batch)
        weight = weakref.ref(model.get_decoder().layers[0].mlp.up_proj.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_forward_whose_model_was_deleted_says_so(batch):
    forward = prefix_attn.enable(build(tiny_config("qwen3")).get_decoder()).forward
    with pytest.raises(ReferenceError, match="the enabled model was deleted"):
        forward(**batch)


def test_enable_again_takes_up_another_attention_implementation(model, batch):
    prefix_attn.enable(model, min_ratio=1.0)
    model.set_attn_implementation("eager")
    prefix_attn.enable(model, min_ratio=1.0)
    model(**batch)
    assert model.config._attn_implementation == "prefix_attn_eager"
    prefix_attn.disable(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("first", [0, 1])
def test_models_with_one_config_object_are_switched_one_by_one(first, batch):
    config = tiny_config("qwen3")
    models = [transformers.Qwen3ForCausalLM(config) for _ in range(2)]
    assert models[0].config is models[1].config
    want = [model(**batch).logits for model in models]
    for model in models:
        prefix_attn.enable(model, min_ratio=1.0)
    mask = batch["attention_mask"].bool()
    for off in (first, 1 - first):
        prefix_attn.disable(models[off])
        for model, right in zip(models, want, strict=True):
            distance = (model(**batch).logits - right)[mask].abs().max()
            assert distance <= 100 * torch.finfo(torch.float32).eps * right.abs().max()
    assert config._attn_implementation == "sdpa"


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_without_a_mask(model, side):
    batch = pad(rows_that_share(), side)
    del batch["attention_mask"]  # padding counts as tokens then
    assert_same_when_enabled(model, batch)


def test_position_ids_of_one_row_serve_all(model, batch):
    length = batch["input_ids"].shape[1]
    assert_same_when_enabled(model, {**batch, "position_ids": torch.arange(length)[None] + 3})


def test_equal_tokens_at_other_positions_are_not_shared(model):
    """Two equal rows, one shifted by padding, and rotary positions that count columns."""
    row = rows_that_share()[0]
    ids = torch.zeros(2, len(row) + 4, dtype=torch.long)
    mask = torch.zeros_like(ids)
    ids[0, : len(row)], mask[0, : len(row)] = row, 1
    ids[1, 4:], mask[1, 4:] = row, 1
    counts = assert_same_when_enabled(model, {"input_ids": ids, "attention_mask": mask})
    assert counts.tokens_run == counts.tokens_in
    depth = (mask.cumsum(1) - 1).clamp(min=0)
    counts = assert_same_when_enabled(
        model, {"input_ids": ids, "attention_mask": mask, "position_ids": depth}
    )
    assert counts.tokens_run == len(row)


def test_positions_between_integers_pass_through(model, batch):
    shifted = torch.arange(batch["input_ids"].shape[1]) + torch.rand(len(batch["input_ids"]), 1)
    counts = assert_same_when_enabled(model, {**batch, "position_ids": shifted}, packed=0)
    assert list(counts.passed_through) == ["position_ids of dtype torch.float32"]


def test_positions_that_restart_within_rows_split_them(model):
    """Two rows of two sequences each, no attention mask: four sequences."""
    a, b = rows_that_share()[0], rows_that_share()[2]
    rows = [torch.cat([a, b]), torch.cat([b, a])]
    positions = [
        torch.cat([torch.arange(len(x)), torch.arange(len(y))]) for x, y in ((a, b), (b, a))
    ]
    batch = {"input_ids": torch.stack(rows), "position_ids": torch.stack(positions)}
    counts = assert_same_when_enabled(model, batch)
    assert counts.tokens_run == len(a) + len(b) - 11


def test_a_row_without_sharing_still_runs_without_a_dense_mask(model):
    rows = [torch.arange(3, 9), torch.arange(20, 25)]
    counts = assert_same_when_enabled(model, as_row(rows))
    assert counts.tokens_run == counts.tokens_in == 11


def test_flash_attention_keywords_of_a_row_are_left_out(model):
    rows = rows_that_share()
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    extra = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 18}
    assert_same_when_enabled(model, {**as_row(rows), **extra})


def test_empty_rows_equal_rows_and_a_prefix_that_is_a_row(model):
    rows = rows_that_share()
    rows = [rows[0][:0], rows[0], rows[0], rows[0][:5], rows[0][:0]]
    counts = assert_same_when_enabled(model, pad(rows))
    assert counts.tokens_run == len(rows[1])


def assert_passes_through(model, batch, reason, **options):
    counts = assert_same_when_enabled(model, batch, packed=False, **options)
    assert list(counts.passed_through) == [reason]


def test_a_mask_with_holes_passes_through(model, batch):
    batch["attention_mask"][0, 3] = 0
    assert_passes_through(model, batch, "attention_mask has holes")


def test_a_mask_of_zeros_passes_through(model, batch):
    prefix_attn.enable(model, min_ratio=1.0)
    batch["attention_mask"].zero_()
    model(**batch)
    assert list(prefix_attn.stats(model).passed_through) == ["a single sequence"]


def test_a_four_dimensional_mask_passes_through(model, batch):
    length = batch["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    mask = mask.expand(len(batch["input_ids"]), -1, -1, -1)
    model.set_attn_implementation("sdpa")
    prefix_attn.enable(model, min_ratio=1.0)
    found = model(input_ids=batch["input_ids"], attention_mask=mask).logits
    assert list(prefix_attn.stats(model).passed_through) == [
        "attention_mask is not of shape (B, L)"
    ]
    prefix_attn.disable(model)
    assert torch.equal(found, model(input_ids=batch["input_ids"], attention_mask=mask).logits)


def test_a_single_sequence_passes_through(model):
    assert_passes_through(model, {"input_ids": rows_that_share()[0][None]}, "a single sequence")


def test_use_cache_passes_through(model, batch):
    reason = "past_key_values or use_cache=True"
    assert_passes_through(model, batch, reason, use_cache=True)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_passes_through(name, filled, use_cache, model, batch):
    """transformers 5.24 calls `cache` what was `past_key_values`, and knows both."""
    parameters = inspect.signature(type(model.get_decoder()).forward).parameters
    if name not in parameters and name == "cache":
        pytest.skip("not in this version of transformers")

    def logits_and_length():
        cache = transformers.DynamicCache(config=model.config)
        options = {name: cache, "use_cache": use_cache}
        ids = batch["input_ids"]
        if filled:
            model(ids[:, :3], **{name: cache})
            ids = ids[:, 3:]
        return model(ids, **options).logits, cache.get_seq_length()

    with torch.no_grad():
        want, length = logits_and_length()
        prefix_attn.enable(model, min_ratio=1.0)
        found, found_length = logits_and_length()
    assert found_length == length == batch["input_ids"].shape[1]
    assert torch.equal(found, want)
    assert list(prefix_attn.stats(model).passed_through) == ["past_key_values or use_cache=True"]


def cache_of(out):
    return out.cache if hasattr(out, "cache") else out.past_key_values


CACHE = (
    "cache"
    if hasattr(transformers.modeling_outputs.BaseModelOutputWithPast(), "cache")
    else ("past_key_values")
)
NO_CACHE = r"ran as a packed row\. Pass use_cache=True"


def test_the_cache_that_a_packed_call_did_not_fill_cannot_be_used(model, batch):
    """Taken for none at all, it would start a new context at the second call."""
    ids = batch["input_ids"]
    prefix_attn.enable(model, min_ratio=1.0)
    with torch.no_grad():
        cache = cache_of(model(ids))
        assert cache is not None
        with pytest.raises(ValueError, match=NO_CACHE):
            model(ids[:, :1], **{CACHE: cache})
        with pytest.raises(AttributeError, match=NO_CACHE):
            cache.get_seq_length()
        with pytest.raises(TypeError, match=NO_CACHE):
            cache[0]
        with pytest.raises((AttributeError, TypeError), match=NO_CACHE):
            model.generate(**batch, **{CACHE: cache}, max_new_tokens=2)
        cache = cache_of(model(ids[:, :-1], use_cache=True))
        found = model(ids[:, -1:], **{CACHE: cache}).logits
        want = model(ids, use_cache=False).logits[:, -1:]
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_unfilled_cache_is_where_the_ordinary_call_has_one(model, batch):
    def kinds(**options):
        outs = [model(**batch, **options), model.get_decoder()(**batch, **options)]
        outs += [model(**batch, **options, return_dict=False)]
        return [
            [isinstance(x, torch.Tensor) for x in out]
            if isinstance(out, tuple)
            else {name: isinstance(x, torch.Tensor) for name, x in out.items()}
            for out in outs
        ]

    def all_kinds():
        found = [kinds(), kinds(output_hidden_states=True), kinds(use_cache=False)]
        model.config.use_cache = False
        found.append(kinds())
        model.config.use_cache = True
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(kinds())
        model.gradient_checkpointing_disable()
        return found

    want = all_kinds()
    assert False in want[0][0].values()
    assert want[3] == want[4] == want[2]
    prefix_attn.enable(model, min_ratio=1.0)
    assert all_kinds() == want
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == counts.calls == 15


def test_an_unfilled_cache_survives_what_walks_through_outputs(model, batch):
    """Mixed precision, DDP, pickling and copies treat it as what it stands for."""
    from torch.nn.parallel.distributed import _find_tensors
    from torch.utils import _pytree as pytree

    prefix_attn.enable(model, min_ratio=1.0)
    out = model(**batch)
    cache = cache_of(out)
    assert not hasattr(cache, "dtype")
    assert all(x is out.logits for x in _find_tensors(out))
    assert pytree.tree_map(lambda x: x, out).keys() == out.keys()
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(ValueError, match=NO_CACHE):
            model(**batch, **{CACHE: twin})
    assert "use_cache=True" in repr(cache)
    accelerate = pytest.importorskip("accelerate")
    out.logits = out.logits.bfloat16()
    wide = accelerate.utils.convert_outputs_to_fp32(lambda: out)()
    assert wide.logits.dtype == torch.float32
    assert wide.keys() == accelerate.utils.send_to_device(out, "cpu").keys() == out.keys()


def test_attention_weights_pass_through(batch):
    model = build(tiny_config("qwen3"), attn_implementation="eager")
    want = model(**batch, output_attentions=True).attentions
    prefix_attn.enable(model, min_ratio=1.0)
    found = model(**batch, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert list(prefix_attn.stats(model).passed_through) == ["output_attentions"]


def test_unknown_tensors_pass_through(model, batch):
    extra = torch.zeros_like(batch["input_ids"])
    prefix_attn.enable(model, min_ratio=1.0)
    model(**batch, token_weights=extra)
    assert list(prefix_attn.stats(model).passed_through) == ["the keyword token_weights"]
    model(**batch, num_items_in_batch=torch.tensor(3))
    assert prefix_attn.stats(model).packed_calls == 1


def test_rotary_frequencies_that_depend_on_padding_pass_through(batch):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build(tiny_config("llama", rope_parameters=rope, max_position_embeddings=8))
    assert_passes_through(model, batch, "positions of padding change the rotary frequencies")
    tight = {name: x[:, : int(batch["attention_mask"].sum(1).max())] for name, x in batch.items()}
    assert_same_when_enabled(model, tight)


# ---- inputs_embeds ------------------------------------------------------------------------------


def test_equal_embeddings_are_shared(model, batch):
    embed = model.get_input_embeddings()
    ids = batch.pop("input_ids")

    def results():
        model.zero_grad()
        out = model(inputs_embeds=embed(ids), **batch).logits[batch["attention_mask"].bool()]
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        (out * weight).sum().backward()
        return {"logits": out.detach()} | {n: p.grad for n, p in model.named_parameters()}

    with KeepDouble():
        want = {name: x.clone() for name, x in results().items()}
        prefix_attn.enable(model, min_ratio=1.0)
        found = results()
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == 1
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    assert counts.tokens_run == layout.num_tokens
    assert deviation(found, want) <= ROUNDING


def test_embeddings_that_differ_in_one_bit_are_not_shared(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    embeds[0, 0, 0] = torch.nextafter(embeds[0, 0, 0], embeds.new_tensor(9.0))
    prefix_attn.enable(model, min_ratio=1.0)
    model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    counts = prefix_attn.stats(model)
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    assert counts.tokens_run == layout.num_tokens + 13  # what row 0 shared with others


def test_colliding_checksums_are_noticed(model, batch, monkeypatch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    module = sys.modules["prefix_attn.integrations.transformers.calls"]
    monkeypatch.setattr(module, "content_of", lambda x: torch.zeros(x.shape[:2], dtype=torch.long))
    prefix_attn.enable(model, min_ratio=1.0)
    model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert list(prefix_attn.stats(model).passed_through) == [
        "inputs_embeds differ where their checksums agree"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_that_differ_in_any_one_bit_have_other_checksums(dtype):
    from prefix_attn.integrations.packing import content_of

    x = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = 8 * x.element_size()
    flips = torch.stack([torch.tensor(1, dtype=kind) << i for i in range(bits)])
    changed = x.expand(bits, 5, 5).clone().view(kind)
    for element in range(5):
        changed[:, element, element] ^= flips
    found = content_of(changed.view(dtype)).unique()
    assert len(found) == 5 * bits
    assert content_of(x).item() not in found


def test_a_default_device_does_not_matter(model, batch):
    """Everything that packing makes is on the device of the batch, or on the host."""
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    prefix_attn.enable(model, min_ratio=1.0, self_check=True)
    for tokens in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        want = model(**tokens, **batch).logits
        with torch.device("meta"):
            found = model(**tokens, **batch).logits
        assert torch.equal(found, want)
    assert prefix_attn.stats(model).packed_calls == 4


def test_the_gradient_of_embeddings_themselves_passes_through(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    prefix_attn.enable(model, min_ratio=1.0)
    model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits.sum().backward()
    assert list(prefix_attn.stats(model).passed_through) == [
        "the gradient of inputs_embeds itself is wanted"
    ]


def zeros_that_want_a_gradient(embeds, seen):
    delta = embeds.new_zeros(embeds.numel()).requires_grad_()
    return embeds + delta.view_as(embeds), lambda: delta.grad


def a_parameter_for_each_place(embeds, seen):
    delta = torch.nn.Parameter(torch.zeros_like(embeds))
    return embeds * 1 + delta, lambda: delta.grad


def a_hook(embeds, seen):
    embeds = embeds * 1
    embeds.register_hook(seen.append)
    return embeds, lambda: seen[-1]


@pytest.mark.parametrize("how", [zeros_that_want_a_gradient, a_parameter_for_each_place, a_hook])
def test_a_gradient_for_each_place_passes_through(how, model, batch):
    def gradient():
        embeds, read = how(model.get_input_embeddings()(batch["input_ids"]), [])
        logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss_of(transformers.utils.ModelOutput(logits=logits), batch["attention_mask"]).backward()
        return read()

    want = gradient()
    prefix_attn.enable(model, min_ratio=1.0)
    assert torch.equal(gradient(), want)
    assert list(prefix_attn.stats(model).passed_through) == [
        "the gradient of inputs_embeds itself is wanted"
    ]


def test_embeddings_made_by_other_parameters_are_shared(model, batch):
    """A projection in front of the decoder, as of pictures; and a hook that is gone."""
    projection = torch.nn.Linear(64, 64).double()
    embed = model.get_input_embeddings()

    def gradient():
        projection.zero_grad()
        embeds = projection(embed(batch["input_ids"]))
        embeds.register_hook(lambda grad: None).remove()
        logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss_of(transformers.utils.ModelOutput(logits=logits), batch["attention_mask"]).backward()
        return projection.weight.grad.clone()

    with KeepDouble():
        want = gradient()
        prefix_attn.enable(model, min_ratio=1.0)
        found = gradient()
    assert prefix_attn.stats(model).packed_calls == 1
    assert (found - want).abs().max() <= ROUNDING * want.abs().max()


@pytest.mark.parametrize("kinds", [3, 4])
def test_mrope_positions_are_part_of_what_must_be_equal(kinds):
    """The decoder of Qwen2.5-VL: time, height and width, and (kinds 4) the text position first."""
    config = transformers.Qwen2_5_VLTextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLTextModel(config).double()
    batch = pad(rows_that_share())
    mask = batch["attention_mask"].bool()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    positions = torch.arange(mask.shape[1]).expand(kinds, *mask.shape).clone()
    positions[-1, 0, 2:] += 5  # row 0 has an image that is wider than those of the others
    call = {
        "inputs_embeds": embeds,
        "attention_mask": batch["attention_mask"],
        "position_ids": positions,
        "use_cache": False,
    }
    with KeepDouble():
        want = model(**call).last_hidden_state[mask]
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**call).last_hidden_state[mask]
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == 1
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    assert counts.tokens_run == layout.num_tokens + 11  # row 0 shares two tokens instead of 13
    assert (found - want).abs().max() <= ROUNDING * want.abs().max()


# ---- outer models that make the masks of their decoder ------------------------------------------


def vision_model(model_type):
    """Tiny, with pictures of four tokens."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    from tests.integrations.test_transformers_exact import EXACT

    text = tiny_config("gemma3_text", **EXACT["gemma3_text"]).to_diff_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    config = transformers.AutoConfig.for_model(
        model_type, text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    config.image_token_id = PICTURE
    torch.manual_seed(1)
    return transformers.AutoModelForImageTextToText.from_config(config).double().eval()


PICTURE = VOCAB - 1


def with_picture():
    """Three rows that share a prefix with a picture in it."""
    start = torch.tensor([7, 8, PICTURE, PICTURE, PICTURE, PICTURE, 9, 10])
    batch = pad([torch.cat([start, torch.tensor([11 + i, 12])]) for i in range(3)])
    picture = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(5)).double()
    batch["token_type_ids"] = (batch["input_ids"] == PICTURE).long()
    return {**batch, "pixel_values": picture.expand(3, -1, -1, -1)}


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("kind", ["right", "left", "row"])
def test_text_is_packed_where_the_outer_model_makes_the_masks(kind, types):
    """Gemma 3 with vision hands its decoder a mask for every type of layer."""
    if types and not hasattr(transformers.masking_utils, "blockwise_overlay"):
        pytest.skip("its rule for pictures can't be told from others in this version: not packed")
    model = vision_model("gemma3")
    rows = [row.clamp(max=PICTURE - 1) for row in rows_that_share()]
    batch = as_row(rows) if kind == "row" else pad(rows, kind)
    if types:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert_same_when_enabled(model, batch)


def test_pictures_are_refused_together_with_a_layout():
    """The layout has no rule for them, and no sign of the mask's but in its function."""
    model = vision_model("gemma3")
    model.set_attn_implementation("prefix_attn")
    batch = with_picture()
    layout, ids = prefix_attn.PrefixLayout.from_sequences(batch["input_ids"])
    call = {
        "input_ids": ids[None],
        "position_ids": layout.position_ids[None],
        "pixel_values": batch["pixel_values"][:1],
        "prefix_layout": layout,
        "use_cache": False,
    }
    model(**call)
    with pytest.raises(ValueError, match="rules of its own"):
        model(**call, token_type_ids=(ids == PICTURE).long()[None])


def test_a_mask_that_differs_between_layers_passes_through(model, batch):
    from prefix_attn.integrations.transformers.attention import LazyMask

    def lazy(mask):
        return LazyMask({"attention_mask": mask}, "sdpa", None)

    mask = batch["attention_mask"]
    masks = {"full_attention": lazy(mask), "sliding_attention": lazy(mask.roll(1))}
    prefix_attn.enable(model, min_ratio=1.0)
    with pytest.raises(PassThroughError, match="differs between layers"):
        find_packing(model.get_decoder(), {**batch, "attention_mask": masks}, 1.0)
    masks["sliding_attention"] = lazy(mask.clone())
    find_packing(model.get_decoder(), {**batch, "attention_mask": masks}, 1.0)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_that_reach_the_decoder_do_not_matter(name, model, batch):
    prefix_attn.enable(model, min_ratio=1.0)
    decoder = model.get_decoder()
    decoder(**batch, **{name: batch["input_ids"]})
    assert prefix_attn.stats(model).packed_calls == 1


# ---- outputs ------------------------------------------------------------------------------------


def test_hidden_states_come_back_in_the_layout_of_the_batch(model, batch):
    mask = batch["attention_mask"].bool()
    with KeepDouble():
        want = model(**batch, output_hidden_states=True).hidden_states
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch, output_hidden_states=True).hidden_states
    assert len(found) == len(want) == 3
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        assert (a - b)[mask].abs().max() <= ROUNDING * b.abs().max()
        assert not a[~mask].any()


def test_hidden_states_of_several_streams_come_back(batch):
    """Gemma 3n's layers have (K, B, L, H)."""
    model = build(tiny_config("gemma3n_text", **EXACT["gemma3n_text"])).eval()
    mask = batch["attention_mask"].bool()
    call = {**batch, "use_cache": False, "output_hidden_states": True}
    with KeepDouble():
        want = model(**call).hidden_states
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**call).hidden_states
    assert prefix_attn.stats(model).packed_calls == 1
    assert want[1].dim() == 4
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        assert (a - b)[..., mask, :].abs().max() <= ROUNDING * b.abs().max()
        assert not a[..., ~mask, :].any()


def test_layers_that_share_keys_match_without_use_cache_in_the_call(batch):
    model = build(tiny_config("gemma3n_text", **EXACT["gemma3n_text"])).eval()
    keep = batch["attention_mask"].bool()
    with KeepDouble():
        want = model(**batch).logits
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch).logits
    assert (found - want)[keep].abs().max() <= ROUNDING * want.abs().max()


def test_layers_that_share_keys_by_the_cache_pass_through(batch, monkeypatch):
    """Gemma 3n in transformers 5.5: its layers are given no keys but those of the cache."""
    model = build(tiny_config("gemma3n_text", **EXACT["gemma3n_text"])).eval()
    attention = type(model.get_decoder().layers[-1].self_attn)
    shared = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: shared(*args, **kwargs))
    prefix_attn.enable(model, min_ratio=1.0)
    model(**batch)
    stats = prefix_attn.stats(model)
    assert (stats.packed_calls, stats.passed_through.total()) == (0, 1)
    with pytest.raises(NotImplementedError, match="share keys by the cache"):
        prefix_attn.micro_groups(model, [batch])
    model(**batch, use_cache=False)
    assert prefix_attn.stats(model).packed_calls == 1


def test_a_tuple_comes_back_where_one_is_asked_for(model, batch):
    prefix_attn.enable(model, min_ratio=1.0)
    decoder = model.get_decoder()
    out = decoder(**batch, return_dict=False)
    assert isinstance(out, tuple)
    assert out[0].shape[:2] == batch["input_ids"].shape
    assert torch.equal(out[0], decoder(batch["input_ids"], batch["attention_mask"])[0])
    assert prefix_attn.stats(model).packed_calls == 2


@pytest.mark.parametrize("keep", [5, torch.tensor([2, 3, 9])], ids=["last", "index"])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma4_text"])
def test_logits_to_keep(model_type, keep, batch):
    """Gemma 4 hands the number to its decoder too, which would drop rows."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    from tests.integrations.test_transformers_exact import EXACT

    model = build(tiny_config(model_type, **EXACT[model_type])).eval()
    whole = torch.ones_like(batch["attention_mask"])
    with KeepDouble():
        want = model(batch["input_ids"], attention_mask=whole, use_cache=False).logits
        want = want[:, -keep:] if isinstance(keep, int) else want[:, keep]
        for ratio in (1.0, 100.0):  # packed, and passed through
            prefix_attn.enable(model, min_ratio=ratio)
            found = model(
                batch["input_ids"], attention_mask=whole, logits_to_keep=keep, use_cache=False
            ).logits
            assert found.shape == want.shape
            assert (found - want).abs().max() <= ROUNDING * want.abs().max()
    assert prefix_attn.stats(model).packed_calls == 1


def test_router_logits_come_back_for_every_token(batch):
    model = build(tiny_config("qwen3_moe"))
    mask = batch["attention_mask"].bool().flatten()
    with KeepDouble():
        want = model(**batch, output_router_logits=True)
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch, output_router_logits=True)
    assert abs(found.aux_loss - want.aux_loss) <= ROUNDING * want.aux_loss
    for a, b in zip(found.router_logits, want.router_logits, strict=True):
        assert a.shape == b.shape
        assert (a - b)[mask].abs().max() <= ROUNDING * b.abs().max()


def test_the_gradient_of_a_shared_row_is_summed_in_float32():
    """Bfloat16 would lose all but the first of many small gradients."""
    from prefix_attn.integrations.packing import HandBack

    packed = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = HandBack.apply(packed, torch.zeros(1, 513, dtype=torch.long))
    grad = torch.full((1, 513, 1), 2.0**-9, dtype=torch.bfloat16)
    grad[0, 0] = 1.0
    out.backward(grad)
    assert packed.grad.item() == 2.0


# ---- what it survives ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "mistral"])
def test_gradient_checkpointing(model_type, reentrant, batch):
    """Recomputation uses the same layout, so that not one bit changes."""
    model = prefix_attn.enable(build(tiny_config(model_type)), min_ratio=1.0)
    want = run(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method has a new name from 5.20 on
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = run(model, batch)
    assert prefix_attn.stats(model).packed_calls == 2
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("first", ["enable", "peft"])
def test_lora(first, model, batch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(copy.deepcopy(model), config)
    weights = {n: p for n, p in plain.named_parameters() if "lora" in n}
    if first == "enable":
        model = prefix_attn.enable(model, min_ratio=1.0)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    if first == "peft":
        prefix_attn.enable(adapted, min_ratio=1.0)
    with KeepDouble():
        want, found = run(plain, batch), run(adapted, batch)
    assert prefix_attn.stats(adapted).packed_calls == 1
    assert len(want) > 1
    assert deviation(found, want) <= ROUNDING


def config_with_interface(model_type):
    """Skips the test in versions of transformers whose model does not call the interface."""
    from tests.integrations.test_transformers_exact import EXACT

    config = tiny_config(model_type, **EXACT[model_type])
    if not build(config).get_decoder()._supports_attention_backend:
        pytest.skip(f"{model_type} has no interface in {transformers.__version__}")
    return config


@pytest.mark.parametrize("model_type", ["llama", "nemotron"])
@pytest.mark.parametrize("what", ["layers", "model"])
def test_compile(what, model_type, batch):
    """Three batches of different shapes; Nemotron drops the keyword that holds the layout."""
    torch.compiler.reset()
    model = build(config_with_interface(model_type), torch.float32)
    rows = rows_that_share()
    batches = [pad(rows), pad(rows[:6]), pad(rows[1:], "left")]
    want = [run(model, one) for one in batches]
    prefix_attn.enable(model, min_ratio=1.0)
    if what == "layers":
        for layer in model.get_decoder().layers:
            layer.compile(backend="aot_eager", dynamic=True, fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for one, right in zip(batches, want, strict=True):
        found = run(compiled, one, use_cache=None)
        found = {name.removeprefix("_orig_mod."): x for name, x in found.items()}
        assert deviation(found, right) <= ROUNDING * 2**29  # float32
    assert prefix_attn.stats(compiled).packed_calls == 3


def batches_of_many_shapes():
    """Ten: padded on both sides, without a mask, and as rows; two of them share nothing."""
    generator = torch.Generator().manual_seed(6)
    batches = []
    for n in range(10):
        shared = torch.randint(3, VOCAB, (9 + n,), generator=generator)
        rows = [
            torch.cat([shared, torch.randint(3, VOCAB, (2 + (n + i) % 4,), generator=generator)])
            for i in range(2 + n % 5)
        ]
        if n in (4, 7):
            rows = [row[-4:] for row in rows]
        batch = as_row(rows) if n % 4 == 3 else pad(rows, "left" if n % 4 == 2 else "right")
        if n % 4 == 1:
            del batch["attention_mask"]
        batches.append(batch)
    return batches


def graphs_of(model, what):
    """How many graphs are compiled for these batches."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = model
    if what == "layers":
        for layer in model.get_decoder().layers:
            layer.compile(backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter)
    for batch in batches_of_many_shapes():
        compiled(**batch, use_cache=False).logits.sum().backward()
    return counter.frame_count


@pytest.mark.parametrize("model_type", ["mistral", "nemotron"])  # the first has a window
@pytest.mark.parametrize("what", ["layers", "model"])
def test_compiling_takes_at_most_four_graphs_more(what, model_type):
    """Packed batches and those that pass through, whatever their shapes."""
    config = config_with_interface(model_type)
    ordinary = graphs_of(build(config, torch.float32), what)
    model = prefix_attn.enable(build(config, torch.float32))
    assert graphs_of(model, what) <= ordinary + 4
    counts = prefix_attn.stats(model)
    assert counts.packed_calls >= 7
    assert counts.passed_through.total() >= 1


def test_a_trace_holds_no_packing_of_the_batch_that_was_traced(model, batch):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask, use_cache=False).logits

    other = {name: x.flip(0) for name, x in batch.items()}
    with KeepDouble():
        try:
            torch.jit.trace(Logits(), tuple(batch.values()), check_trace=False)
        except IndexError:
            pytest.skip("this version of transformers can't be traced")
        prefix_attn.enable(model, min_ratio=1.0)
        traced = torch.jit.trace(Logits(), tuple(batch.values()), check_trace=False)
        assert prefix_attn.stats(model).packed_calls == 0
        found, want = traced(**other), model(**other, use_cache=False).logits
    keep = other["attention_mask"].bool()
    assert (found - want)[keep].abs().max() <= ROUNDING * want.abs().max()


def test_torch_func_gives_the_gradients_of_backward(model, batch):
    def loss(parameters):
        call = {**batch, "use_cache": False}
        return loss_of(torch.func.functional_call(model, parameters, (), call), keep)

    keep = batch["attention_mask"]
    parameters = dict(model.named_parameters())
    prefix_attn.enable(model, min_ratio=1.0)
    with KeepDouble():
        found = {n: x.detach() for n, x in torch.func.grad(loss)(parameters).items()}
        want = run(model, batch)
    assert deviation({**found, "logits": want["logits"]}, want) <= ROUNDING


def test_autocast_matches_ordinary_autocast(batch):
    """At most twice the error of the ordinary batch; QK norms give float32 q and k here."""
    with KeepDouble():
        exact = run(build(tiny_config("qwen3")), batch)["logits"]
    model = build(tiny_config("qwen3"), torch.float32)

    def error():
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            logits = model(**batch).logits[batch["attention_mask"].bool()]
        return (logits.double() - exact).abs().max()

    ordinary = error()
    prefix_attn.enable(model, min_ratio=1.0)
    assert error() <= 2 * ordinary
    assert prefix_attn.stats(model).packed_calls == 1


# ---- decoders with a head of their own ----------------------------------------------------------


def mllama():
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[],
        pad_token_id=0,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    torch.manual_seed(1)
    return transformers.MllamaForCausalLM(config).double()


def test_a_decoder_with_a_head_is_packed_below_it(batch):
    """It calls itself its decoder; its head cuts rows off and computes the loss."""
    model = mllama()
    assert model.get_decoder() is model
    assert_same_when_enabled(model, batch)
    prefix_attn.disable(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    options = {"labels": labels, "use_cache": False}
    with KeepDouble():
        want = model(**batch, **options).loss
        prefix_attn.enable(model, min_ratio=1.0)
        found = model(**batch, **options).loss
    assert abs(found - want) <= ROUNDING * want
    assert model(**batch, logits_to_keep=1).logits.shape[1] == 1
    assert prefix_attn.stats(model).packed_calls == 2


def test_a_head_in_one_module_with_the_layers_is_refused(model):
    decoder = model.get_decoder()
    decoder.get_output_embeddings = lambda: model.lm_head
    with pytest.raises(NotImplementedError, match="Qwen3Model: its layers and its head"):
        prefix_attn.enable(model)


# ---- refusals -----------------------------------------------------------------------------------

REFUSED = {
    "mamba": "neither a mask nor keywords",
    "falcon_mamba": "neither a mask nor keywords",
    "rwkv": "neither a mask nor keywords",
    "xlstm": "neither a mask nor keywords",
    "inkling_text": "position bias",
    "llama4_text": "temperature of its attention",
    "phi4_multimodal": "convolution",
    "deepseek_v32": "indexed_attention",
    "deepseek_v4": "compressed_attention",
    "opt": "positions from attention_mask",
    "bloom": "position bias",
    "mpt": "position bias",
    "doge": "masks depend on keys",
    "gpt_neo": r"h\.0\.attn\.attention \(GPTNeoSelfAttention\) does not call .* interface",
    "bert": "not causal",
    "bart": "not causal",
}


@pytest.mark.parametrize("model_type", list(REFUSED))
def test_models_that_would_be_wrong_are_refused_by_name(model_type):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    with pytest.raises(NotImplementedError, match=REFUSED[model_type]):
        prefix_attn.enable(model)
    assert decoder.config._attn_implementation == before
    assert "forward" not in decoder.__dict__


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma4_text", {"global_head_dim": 528}, r"self_attn \(Gemma4TextAttention\).*528.*512"),
        ("llama", {"head_dim": 520}, r"layers\.0\.self_attn .* head_dim 520, on meta 1 to 512"),
        ("deepseek_v3", {"v_head_dim": 768}, "v_head_dim 768"),
        ("deepseek_v3", {"qk_nope_head_dim": 512}, "qk_head_dim 528"),
    ],
)
def test_head_dimensions_that_no_backend_serves_are_refused(model_type, changes, message):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    from tests.integrations.test_transformers_exact import EXACT

    config = tiny_config(model_type, **{**EXACT[model_type], **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotImplementedError, match=message):
        prefix_attn.enable(model)


def test_head_dimensions_that_the_device_lacks_are_refused(monkeypatch):
    model = build(tiny_config("llama", head_dim=264))
    monkeypatch.setattr(transformers.LlamaModel, "device", torch.device("cuda"))
    with pytest.raises(NotImplementedError, match="head_dim 264, on cuda 1 to 256 are served"):
        prefix_attn.enable(model)


@pytest.mark.parametrize("head_dim", [2, 8, 512])
def test_small_and_large_heads_match_ordinary_batches(head_dim):
    model = build(tiny_config("llama", head_dim=head_dim))
    assert_same_when_enabled(model, pad(rows_that_share()))


def test_custom_attention_is_not_replaced(model):
    from transformers import AttentionInterface

    AttentionInterface.register("ulysses_test", lambda *args, **kwargs: None)
    model.set_attn_implementation("ulysses_test")
    with pytest.raises(NotImplementedError, match=r"ulysses_test.*sequence-parallel"):
        prefix_attn.enable(model)


def test_attention_dropout_is_refused_in_training_only(batch):
    model = build(tiny_config("llama", attention_dropout=0.1))
    prefix_attn.enable(model, min_ratio=1.0)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1 in training"):
        model(**batch)
    model.eval()(**batch)
    assert prefix_attn.stats(model).packed_calls == 2


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")]
)
def test_a_model_loaded_without_its_attention_dropout_is_packed(model_type, name, batch, tmp_path):
    build(tiny_config(model_type, **{name: 0.1})).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{name: 0.0}).train()
    assert_same_when_enabled(loaded, batch)


# ---- the self-check -----------------------------------------------------------------------------


class ShiftLayer(torch.nn.Module):
    """Mixes each token with the one before it in the row, which packing does not know."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        hidden = self.layer(hidden, *args, **kwargs)
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return hidden + 0.5 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_refuses_a_model_that_mixes_neighbours(dtype, batch):
    model = build(tiny_config("llama"), dtype)
    model.get_decoder().layers[0] = ShiftLayer(model.get_decoder().layers[0])
    prefix_attn.enable(model, min_ratio=1.0, self_check=True)
    with pytest.raises(RuntimeError, match="self-check failed on LlamaModel"):
        model(**batch)


def test_self_check_waits_for_a_batch_that_can_be_packed(batch):
    model = build(tiny_config("llama"))
    prefix_attn.enable(model, min_ratio=1.0, self_check=True)
    model.get_decoder().layers[0] = ShiftLayer(model.get_decoder().layers[0])
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out)
    model(**batch)
    hook.remove()
    with pytest.raises(RuntimeError, match="self-check failed on LlamaModel"):
        model(**batch)


def test_self_check_can_be_asked_for_of_an_enabled_model(batch):
    model = build(tiny_config("llama"))
    prefix_attn.enable(model, min_ratio=1.0)
    model.get_decoder().layers[0] = ShiftLayer(model.get_decoder().layers[0])
    model(**batch)
    prefix_attn.enable(model, min_ratio=1.0, self_check=True)
    with pytest.raises(RuntimeError, match="self-check failed on LlamaModel"):
        model(**batch)
    prefix_attn.enable(model, min_ratio=1.0, self_check=False)
    model(**batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma2", "qwen3_moe"])
def test_self_check_passes_models_that_are_right(model_type, dtype, batch):
    model = build(tiny_config(model_type), dtype)
    prefix_attn.enable(model, min_ratio=1.0, self_check=True)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with KeepDouble():
        model(**batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    counts = prefix_attn.stats(model)
    assert (counts.calls, counts.packed_calls) == (1, 1)


def test_self_check_runs_for_types_that_are_not_tested(batch):
    """A type of its own, with the same layers."""

    class OwnConfig(transformers.LlamaConfig):
        model_type = "own_llama"

    values = tiny_config("llama").to_diff_dict()
    values.pop("model_type")
    model = transformers.LlamaForCausalLM(OwnConfig(**values))
    model.get_decoder().layers[0] = ShiftLayer(model.get_decoder().layers[0])
    prefix_attn.enable(model)
    with pytest.raises(RuntimeError, match="own_llama"):
        model(**batch)
    prefix_attn.disable(model)
    prefix_attn.enable(model, self_check=False)
    model(**batch)
