"""Models with recurrent, linear-attention and convolutional mixers: exact, and guarded."""

from __future__ import annotations

import copy
import pickle
import random
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from prefix_attn.integrations.transformers.mixers.find import (  # noqa: E402
    has_global_functions,
)
from tests.integrations.test_transformers_enable import ROUNDING  # noqa: E402
from tests.integrations.tiny_hybrids import HYBRIDS, WHOLE  # noqa: E402
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

FUNCTIONS = has_global_functions()
needs_functions = pytest.mark.skipif(
    not FUNCTIONS, reason="mixers run on whole sequences in this version of transformers"
)
# One of each kind; minimax and zaya on whole sequences, the keyword of jamba and zaya is dropped.
KINDS = ["qwen3_5_text", "kimi_linear", "bamba", "jamba", "lfm2", "minimax", "zaya"]


# Before transformers 5.18: other names of layers, and what is refused.
OLD_NAMES = {"granitemoehybrid": {"layer_types": ["mamba", "attention"]}}
OLD_REFUSED = {
    "nemotron_h": "its scan gives other results with other padding",
    "zamba2": "its scan gives other results with other padding",
    "recurrent_gemma": "RecurrentGemmaSdpaAttention.* does not call",
}


def hybrid(model_type, dtype=torch.float64):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"{model_type} is not in transformers {transformers.__version__}")
    changes = HYBRIDS[model_type][1] | ({} if FUNCTIONS else OLD_NAMES.get(model_type, {}))
    return build(tiny_config(model_type, **changes), dtype)


@pytest.mark.parametrize("model_type", list(HYBRIDS))
def test_hybrid_models_match_ordinary_batches(model_type):
    """Logits and all gradients in float64. A row is compared with its sequences as a batch.

    Ordinary models mix the sequences of a row, where no other package keeps them apart.
    """
    model = hybrid(model_type)
    if not FUNCTIONS and model_type in OLD_REFUSED:
        with pytest.raises(NotImplementedError, match=OLD_REFUSED[model_type]):
            prefix_attn.enable(model)
        return
    options = (
        {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    )
    rows = rows_that_share()
    right, left = pad(rows), pad(rows, "left")
    batches = {"right": right, "left": left, "row": as_row(rows)}
    with KeepDouble():
        ordinary = {
            name: run(model, x, **options) for name, x in (("right", right), ("left", left))
        }
        ordinary["row"] = ordinary["right"]
        prefix_attn.enable(model, min_ratio=1.0)
        packed = {name: run(model, batch, **options) for name, batch in batches.items()}
    counts = prefix_attn.stats(model)
    assert counts.mixers, "no mixer was found"
    how = HYBRIDS[model_type][0] if FUNCTIONS else WHOLE
    assert {text.partition(": ")[2] for text in counts.mixers.values()} == {how}
    # mamba2 knows no positions, and left padding is no padding to recurrent_gemma.
    aside = {"mamba2": "row", "recurrent_gemma": "left"}.get(model_type)
    assert counts.packed_calls == len(batches) - (aside is not None)
    assert counts.tokens_run < counts.tokens_in
    found = {name: deviation(packed[name], ordinary[name]) for name in batches if name != aside}
    if model_type == "minimax":  # its decays are float32: left padding alone costs 2e-7
        noise = deviation(ordinary["left"], ordinary["right"])
        assert found.pop("left") <= 2 * noise < 1e-6
    assert all(error <= ROUNDING for error in found.values()), found


BIASED = {
    "bamba": {"mamba_proj_bias": True},
    "jamba": {"mamba_proj_bias": True},
    "lfm2": {"conv_bias": True},
}


@pytest.mark.parametrize("model_type", list(BIASED))
def test_left_padding_in_front_of_biased_projections_is_passed_through(model_type):
    """Padding is zero in front of such a projection and not behind it: the ordinary call reads it.

    A row without a token is no left padding.
    """
    changes = HYBRIDS[model_type][1] | BIASED[model_type]
    model = build(tiny_config(model_type, **changes))
    rows = [*rows_that_share(), torch.empty(0, dtype=torch.long)]
    batches = [pad(rows), pad(rows, "left")]
    with KeepDouble():
        ordinary = [run(model, batch) for batch in batches]
        if FUNCTIONS or model_type != "jamba":  # which set padding to zero behind it, too
            assert deviation(*ordinary) > 1e-3
        prefix_attn.enable(model, min_ratio=1.0)
        for batch, want in zip(batches, ordinary, strict=True):
            assert deviation(run(model, batch), want) <= ROUNDING
    counts = prefix_attn.stats(model)
    reason = "left padding, which mixers read: their projections have a bias"
    assert (counts.packed_calls, list(counts.passed_through)) == (1, [reason])


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "bamba", "lfm2"])
def test_left_padding_of_one_row_is_packed_or_passed_through(model_type):
    """Before transformers 5.18 mixers set padding to zero in batches of several rows alone."""
    model = hybrid(model_type)
    batch = {name: x[:1] for name, x in pad(rows_that_share()[1:], "left").items()}
    assert not batch["attention_mask"][0, 0]
    with KeepDouble():
        want = run(model, batch)
        prefix_attn.enable(model, always=True)
        assert deviation(run(model, batch), want) <= ROUNDING
    counts = prefix_attn.stats(model)
    reason = "left padding of a single row, which mixers read as tokens"
    assert counts.packed_calls == (1 if FUNCTIONS else 0)
    assert list(counts.passed_through) == ([] if FUNCTIONS else [reason])


def forest(seed):
    """Rows of a random forest: depth up to 5, tokens that fork at once, rows inside of others."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows: list[torch.Tensor] = []

    def draw(n):
        return torch.randint(3, VOCAB, (n,), generator=generator)

    def grow(path, depth):
        here = torch.cat([path, draw(choose.choice([0, 1, 1, 2, 3, 7, 12]))])
        children = choose.choice([0, 0, 1, 2, 3]) if 0 < depth < 5 else 2 * (depth < 5)
        if not children or choose.random() < 0.2:
            rows.append(here)
        for _ in range(children):
            grow(here, depth + 1)

    for _ in range(choose.choice([1, 2, 3])):
        grow(draw(choose.choice([1, 2, 5, 9])), 0)
    choose.shuffle(rows)
    return rows[:12]


@pytest.mark.parametrize("model_type", KINDS)
def test_hybrid_models_match_on_random_forests(model_type):
    model = hybrid(model_type)
    forests = [rows for rows in map(forest, range(9)) if len(rows) > 1][:6]
    assert len(forests) == 6
    with KeepDouble():
        ordinary = [run(model, pad(rows)) for rows in forests]
        prefix_attn.enable(model, min_ratio=1.0, always=True)
        for i, (rows, want) in enumerate(zip(forests, ordinary, strict=True)):
            batch = pad(rows) if i % 2 else as_row(rows)
            assert deviation(run(model, batch), want) <= ROUNDING
    assert prefix_attn.stats(model).packed_calls == 6


# ---- wrappers, copies, neighbours ---------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", KINDS)
def test_checkpointing_keeps_the_tree_of_hybrid_models(model_type, reentrant):
    """Recomputation runs after the call has ended: the layout comes with the mixer's arguments."""
    model = hybrid(model_type, torch.float32)
    batch = pad(rows_that_share())
    prefix_attn.enable(model, min_ratio=1.0)
    runs = count_runs(model)
    want = run(model, batch)
    assert set(runs.values()) == {1}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = run(model, batch)
    assert set(runs.values()) == {3}
    assert prefix_attn.stats(model).packed_calls == 2
    assert deviation(found, want) <= 8 * torch.finfo(torch.float32).eps


def count_runs(model):
    """Counts, by hooks, how often each mixer runs."""
    runs = {}
    decoder = model.get_decoder()
    for name in prefix_attn.stats(model).mixers:
        runs[name] = 0

        def count(module, args, name=name):
            runs[name] += 1

        decoder.get_submodule(name).register_forward_pre_hook(count)
    return runs


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "minimax"])
def test_copies_of_hybrid_models_run_their_own_weights(model_type):
    model = hybrid(model_type, torch.float32)
    batch = pad(rows_that_share())
    prefix_attn.enable(model, min_ratio=1.0)
    want = run(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad(set_to_none=True)
        found = run(copied, batch)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
        prefix_attn.disable(copied)
        assert "forward" in model.get_decoder().__dict__


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "minimax"])
def test_enable_and_disable_of_hybrid_models_twice(model_type):
    model = hybrid(model_type, torch.float32)
    batch = pad(rows_that_share())
    before = run(model, batch)
    modules = [dict(module.__dict__) for module in model.get_decoder().modules()]
    for _ in range(2):
        prefix_attn.enable(model, min_ratio=1.0)
        prefix_attn.enable(model, min_ratio=1.0)
        run(model, batch)
        assert prefix_attn.stats(model).packed_calls == 1
        prefix_attn.disable(model)
        prefix_attn.disable(model)
        after = run(model, batch)
        assert all(torch.equal(after[name], before[name]) for name in before)
    for module, attributes in zip(model.get_decoder().modules(), modules, strict=True):
        assert module.__dict__.keys() == attributes.keys()


@pytest.mark.parametrize("model_type", KINDS)
def test_neighbours_and_generation_keep_their_bits(model_type):
    """The functions of a modeling file are shared: others see no difference."""
    model, other = hybrid(model_type, torch.float32), hybrid(model_type, torch.float32)
    batch = pad(rows_that_share())
    before = run(other, batch)
    prompt = rows_that_share()[0][None]
    options = {"max_new_tokens": 4, "do_sample": False}
    generated = model.eval().generate(prompt, **options)
    prefix_attn.enable(model.train(), min_ratio=1.0)
    run(model, batch)
    after = run(other, batch)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.eval().generate(prompt, **options), generated)
    assert prefix_attn.stats(model).packed_calls == 1


def test_a_neighbour_may_run_within_a_packed_row():
    """A hook inside one enabled model runs another one: neither takes the tree of the other."""
    model, other = hybrid("qwen3_5_text"), hybrid("qwen3_5_text")
    batch = pad(rows_that_share())
    with KeepDouble():
        ordinary = run(model, batch)
        want = other(**batch, use_cache=False).logits
        prefix_attn.enable(model, min_ratio=1.0)
        seen = []
        mixer = model.get_decoder().layers[0].linear_attn
        mixer.norm.register_forward_hook(
            lambda *_: seen.append(other(**batch, use_cache=False).logits)
        )
        found = run(model, batch)
    assert deviation(found, ordinary) <= ROUNDING
    assert len(seen) == 1
    assert torch.equal(seen[0], want)


def test_autocast_computes_hybrid_models_as_well_as_ordinary_batches():
    """The error of the packed row against float64 is at most twice that of the batch."""
    batch = pad(rows_that_share())
    exact, model = hybrid("qwen3_5_text"), hybrid("qwen3_5_text", torch.float32)
    with KeepDouble():
        want = run(exact, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ordinary = deviation(run(model, batch), want)
        prefix_attn.enable(model, min_ratio=1.0)
        packed = deviation(run(model, batch), want)
    assert prefix_attn.stats(model).packed_calls == 1
    assert packed <= 2 * ordinary


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "bamba"])
def test_lora_on_the_projections_of_mixers(model_type):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(5)
        config = peft.LoraConfig(
            r=4,
            target_modules=["in_proj_qkv", "in_proj", "out_proj", "q_proj"],
            init_lora_weights=False,
        )
        return peft.get_peft_model(hybrid(model_type), config).double()

    batch = pad(rows_that_share())
    with KeepDouble():
        ordinary = run(adapted(), batch)
        found = run(prefix_attn.enable(adapted(), min_ratio=1.0), batch)
    assert any("out_proj.lora_A" in name for name in found)
    assert deviation(found, ordinary) <= ROUNDING


# ---- guards -------------------------------------------------------------------------------------


def enabled(model_type):
    return prefix_attn.enable(hybrid(model_type, torch.float32), min_ratio=1.0)


@needs_functions
def test_a_mixer_that_does_not_call_its_functions_is_noticed(monkeypatch):
    """As where a kernel takes the place of one of them, or of the mixer's inside."""
    module = sys.modules["transformers.models.qwen3_5.modeling_qwen3_5"]
    model = enabled("qwen3_5_text")
    watched = module.torch_chunk_gated_delta_rule
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", watched.prefix_attn_original)
    with pytest.raises(RuntimeError, match=r"layers\.0\.linear_attn .* did not call torch_chunk"):
        model(**pad(rows_that_share()))


def test_a_mixer_without_its_layout_is_noticed():
    """As where a layer of other code drops keywords and masks."""
    model = enabled("qwen3_5_text")
    mixer = model.get_decoder().layers[0].linear_attn
    forward = mixer.forward
    drop = {"prefix_layout", "attention_mask"}
    mixer.forward = lambda *args, **kw: forward(
        *args, **{name: value for name, value in kw.items() if name not in drop}
    )
    with pytest.raises(RuntimeError, match=r"linear_attn .* got no prefix_layout in a packed row"):
        model(**pad(rows_that_share()))


def test_a_mixer_whose_forward_was_replaced_is_noticed():
    """As by kernels of the hub for whole layers, applied after enable."""
    model = enabled("qwen3_5_text")
    mixer = model.get_decoder().layers[0].linear_attn
    mixer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match="did not follow the prefix tree: its forward was repl"):
        model(**pad(rows_that_share()))
    with pytest.raises(RuntimeError, match="Qwen3_5GatedDeltaNet was replaced after enable: undo"):
        prefix_attn.disable(model)


def test_wrappers_around_a_mixer_are_kept():
    """accelerate puts its hooks around a forward and calls it."""
    accelerate = pytest.importorskip("accelerate")
    model = hybrid("qwen3_5_text")
    batch = pad(rows_that_share())
    with KeepDouble():
        ordinary = run(model, batch)
        prefix_attn.enable(model, min_ratio=1.0)
        mixer = model.get_decoder().layers[0].linear_attn
        accelerate.hooks.add_hook_to_module(mixer, accelerate.hooks.ModelHook())
        assert deviation(run(model, batch), ordinary) <= ROUNDING


def test_a_layout_of_the_caller_reaches_the_mixers():
    model = hybrid("qwen3_5_text")
    layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    batch = pad(rows_that_share())
    with KeepDouble():
        want = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        prefix_attn.enable(model, min_ratio=1.0)
        out = model(ids[None], prefix_layout=layout, use_cache=False).logits[0]
    found = torch.cat([out[layout.sequence_rows(i)] for i in range(layout.num_sequences)])
    assert float((found - want).abs().max() / want.abs().max()) <= ROUNDING


def test_a_layout_that_mixers_do_not_know_of_is_refused():
    """The attention alone would follow it."""
    model = hybrid("qwen3_5_text", torch.float32)
    model.set_attn_implementation("prefix_attn")
    layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    row = {"position_ids": layout.position_ids[None], "prefix_layout": layout, "use_cache": False}
    with pytest.raises(NotImplementedError, match=r"with \['linear_attention'\] layers, which wou"):
        model(ids[None], **row)
    prefix_attn.enable(model)(ids[None], **row)


def test_micro_groups_of_hybrid_models_are_refused():
    model = enabled("qwen3_5_text")
    batch = pad(rows_that_share())
    with pytest.raises(NotImplementedError, match=r"layers\.0\.linear_attn .* not recorded"):
        prefix_attn.micro_groups(model, [batch, batch])


# ---- kernels ------------------------------------------------------------------------------------

QWEN = "transformers.models.qwen3_5.modeling_qwen3_5"
RULE = "torch_chunk_gated_delta_rule"


def torch_rule():
    """Transformers' own code, without dispatchers in front of it."""
    function = getattr(sys.modules[QWEN], RULE)
    return getattr(function, "prefix_attn_original", function)


def with_bounds(q, k, v, g, beta, initial_state=None, cu_seqlens=None, **options):
    """Stands in for a kernel that takes the bounds of sequences in one row."""
    rule, rows = torch_rule.rule, []
    if cu_seqlens is None:
        return rule(q, k, v, g=g, beta=beta, initial_state=initial_state, **options)
    assert initial_state is None or initial_state.dtype in (torch.float32, torch.float64)
    calls.append(len(cu_seqlens) - 1)
    for i, (a, b) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        state = None if initial_state is None else initial_state[i : i + 1]
        cut = [x[:, a:b] for x in (q, k, v, g, beta)]
        rows.append(rule(*cut[:3], g=cut[3], beta=cut[4], initial_state=state, **options))
    outs, finals = zip(*rows, strict=True)
    return torch.cat(outs, 1), torch.cat(finals)


def without_bounds(q, k, v, **options):
    """Stands in for a kernel that takes padded batches."""
    calls.append(len(q))
    return torch_rule.rule(q, k, v, **options)


def detached(q, k, v, initial_state=None, **options):
    """Stands in for a kernel whose backward pass gives no gradient of its initial state."""
    state = None if initial_state is None else initial_state.detach()
    return torch_rule.rule(q, k, v, initial_state=state, **options)


def forgetful(q, k, v, initial_state=None, **options):
    """Stands in for a kernel that takes no initial state."""
    return torch_rule.rule(q, k, v, **options)


calls: list[int] = []


@pytest.fixture
def stand_in(monkeypatch):
    def put(kernel):
        torch_rule.rule = torch_rule()
        monkeypatch.setattr(sys.modules[QWEN], RULE, kernel)
        calls.clear()

    transformers.Qwen3_5ForCausalLM  # noqa: B018  loads the modeling file
    return put


@needs_functions
@pytest.mark.parametrize("kernel", [with_bounds, without_bounds])
def test_kernels_behind_the_functions_follow_the_tree(kernel, stand_in):
    """In place of transformers' own code, where their package is installed."""
    stand_in(kernel)
    model = hybrid("qwen3_5_text")
    batch = pad(rows_that_share())
    with KeepDouble():
        ordinary = run(model, batch)
        calls.clear()
        prefix_attn.enable(model, min_ratio=1.0)
        assert deviation(run(model, batch), ordinary) <= ROUNDING
    segments = sum(calls)
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    model.bfloat16()(**batch)  # the check of a kernel takes the rounding of 16 bits
    if kernel is with_bounds:  # a row for each depth, no padding
        assert segments == len([n for n in layout.cu_seqlens.diff().tolist() if n])


@needs_functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (detached, "kernel detached can't follow a prefix tree: it returns no gradient"),
        (forgetful, "kernel forgetful can't follow a prefix tree: its values depend on more"),
    ],
)
def test_kernels_that_lose_states_are_refused_by_name(kernel, reason, dtype, stand_in):
    stand_in(kernel)
    model = prefix_attn.enable(hybrid("qwen3_5_text", dtype), min_ratio=1.0)
    with pytest.raises(NotImplementedError, match=reason):
        model(**pad(rows_that_share()))


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "minimax"])
def test_compiled_hybrid_models_match(model_type):
    """Where the ordinary model compiles, the enabled one does."""
    model = hybrid(model_type, torch.float32)
    batch = pad(rows_that_share())
    ordinary = run(model, batch)
    prefix_attn.enable(model, min_ratio=1.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    out = compiled(**batch, use_cache=False)
    loss_of(out, batch["attention_mask"]).backward()
    found = {"logits": out.logits.detach()[batch["attention_mask"].bool()]}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert prefix_attn.stats(model).packed_calls == 1
    assert deviation(found, ordinary) <= 1e4 * torch.finfo(torch.float32).eps
