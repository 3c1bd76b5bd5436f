"""The doors to axolotl, ms-swift, SkyRL, OpenRLHF, NeMo-RL, prime-rl and AReaL.

axolotl's base class, SkyRL's model wrapper, OpenRLHF's actor and AReaL's tries are theirs.
Stand-ins take the place of ms-swift, and of what those modules import but do not need here. For
NeMo-RL and prime-rl the calls are written down as their code makes them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_callback import TrainerCallback

import prefix_attn
from bench import peers
from prefix_attn import PrefixLayout
from prefix_attn.integrations.areal import layout_of_trie

ROUNDING = 1e2 * torch.finfo(torch.float32).eps


def tiny_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return Qwen3ForCausalLM(config)


def package_folder(name):
    """Where a package is, without importing it."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return Path(next(iter(find_spec(name).submodule_search_locations)))


def stand_in(monkeypatch, name, folder=None, **contents):
    """A module that holds some contents, and finds its submodules in a folder if there is one."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = [] if folder is None else [str(folder)]
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return module


class Settings(dict):
    """axolotl's configuration: what is not set is None."""

    __getattr__ = dict.get


def plugin_of_axolotl():
    pytest.importorskip("axolotl.integrations.base")
    from axolotl.integrations.base import load_plugin

    return load_plugin("prefix_attn.integrations.axolotl.Plugin")


def test_model_of_axolotl_matches_its_ordinary_run():
    def enable(model):
        plugin_of_axolotl().post_model_load(Settings(), model)

    model, (ids, mask) = tiny_model(), group_of_three()
    check_both_ways_to_batch(model, called_by_trainer(model, ids, mask), mask, enable)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sample_packing": True}, "^sample_packing numbers the sequences"),
        ({"eval_sample_packing": True}, "^eval_sample_packing numbers the sequences"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2"),
    ],
)
def test_plugin_of_axolotl_refuses_by_name(setting, message):
    model = tiny_model()
    with pytest.raises(NotImplementedError, match=message):
        plugin_of_axolotl().post_model_load(Settings(setting), model)
    with pytest.raises(ValueError, match="is not enabled"):
        prefix_attn.stats(model)


@pytest.fixture
def swift(monkeypatch):
    """ms-swift's two tables of callbacks, and their base classes."""

    class SwiftCallback(TrainerCallback):
        def __init__(self, args, trainer):
            self.args, self.trainer = args, trainer

    class MegatronCallback:
        def __init__(self, trainer):
            self.trainer = trainer

    stand_in(monkeypatch, "swift")
    stand_in(monkeypatch, "swift.megatron")
    stand_in(
        monkeypatch,
        "swift.megatron.callbacks",
        MegatronCallback=MegatronCallback,
        megatron_callbacks_map={},
    )
    monkeypatch.delitem(sys.modules, "prefix_attn.integrations.swift", raising=False)
    return stand_in(monkeypatch, "swift.callbacks", TrainerCallback=SwiftCallback, callbacks_map={})


def test_model_of_swift_matches_its_ordinary_run(swift):
    importlib.import_module("prefix_attn.integrations.swift")

    def enable(model):
        trainer = types.SimpleNamespace(model=model)
        callback = swift.callbacks_map["prefix_attn"](None, trainer)
        callback.on_train_begin(None, None, None, model=model)

    model, (ids, mask) = tiny_model(), group_of_three()
    check_both_ways_to_batch(model, called_by_trainer(model, ids, mask), mask, enable)


@pytest.fixture
def without_gpu(monkeypatch):
    """What trainers take from flash attention and DeepSpeed and that needs no GPU."""

    def take(x, indices):
        return x[indices]

    def unpad(hidden, attention_mask):
        indices = attention_mask.flatten().nonzero().flatten()
        lengths = attention_mask.sum(1)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return hidden.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths

    def pad(hidden, indices, batch, seqlen):
        out = hidden.new_zeros(batch * seqlen, *hidden.shape[1:])
        out[indices] = hidden
        return out.view(batch, seqlen, *hidden.shape[1:])

    padding = {"pad_input": pad, "unpad_input": unpad, "index_first_axis": take}
    stand_in(monkeypatch, "flash_attn")
    stand_in(
        monkeypatch, "flash_attn.bert_padding", rearrange=lambda x, _: x.flatten(0, 1), **padding
    )
    stand_in(monkeypatch, "flash_attn.utils")
    stand_in(monkeypatch, "flash_attn.utils.distributed", all_gather=None)
    stand_in(monkeypatch, "deepspeed")


def group_of_three():
    """Ids and mask, (3, 42): a prompt of 30 tokens, completions of up to 12."""
    torch.manual_seed(1)
    prompt = torch.randint(97, (30,))
    ids, mask = torch.zeros(2, 3, 42, dtype=torch.long)
    for row, keep, n in zip(ids, mask, (10, 7, 12), strict=True):
        row[: 30 + n] = torch.cat([prompt, torch.randint(97, (n,))])
        keep[: 30 + n] = 1
    return ids, mask


def called_by_trainer(model, ids, mask):
    """Log-probabilities of completions (3, 12) by calls such as those of transformers' Trainer."""

    def log_probs_of(packed):
        keep = mask.bool()
        if packed:
            positions = (mask.cumsum(1) - 1)[keep]
            row = model(ids[keep][None], position_ids=positions[None]).logits[0]
            logits = row.new_zeros(*mask.shape, row.shape[-1]).index_put((keep,), row)
        else:
            logits = model(ids, attention_mask=mask).logits
        return logits[:, -13:-1].log_softmax(-1).gather(2, ids[:, -12:, None])[..., 0]

    return log_probs_of


def check_both_ways_to_batch(model, log_probs_of, mask, enable=prefix_attn.enable):
    """Padded batches and rows without padding match the ordinary padded batch.

    Args:
        model: what is enabled. Trainers switch `use_cache` off in models that they load.
        log_probs_of: computes (3, 12) log-probabilities of completions, without padding or with.
        mask: (3, 42).
        enable: how the trainer does it.
    """
    model.config.use_cache = False

    def step(packed):
        model.zero_grad()
        log_probs = log_probs_of(packed) * mask[:, -12:]
        log_probs.sum().backward()
        return [log_probs.detach(), *(p.grad.clone() for p in model.parameters())]

    right = step(False)
    enable(model)
    for packed in (False, True):
        for a, b in zip(step(packed), right, strict=True):
            assert (a - b).norm() <= ROUNDING * b.norm(), packed
    counts = prefix_attn.stats(model)
    assert (counts.packed_calls, counts.tokens_in, counts.tokens_run) == (2, 2 * 119, 2 * 59)


def test_wrapper_of_skyrl_matches_its_ordinary_run(monkeypatch, without_gpu):
    root, train = package_folder("skyrl"), "skyrl.backends.skyrl_train"
    for name in (
        "skyrl",
        "skyrl.backends",
        *(train + x for x in ("", ".workers", ".distributed", ".distributed.megatron", ".utils")),
    ):
        stand_in(monkeypatch, name, root.joinpath(*name.split(".")[1:]))
    wrapper = importlib.import_module(f"{train}.workers.model_wrapper").HFModelWrapper
    model, (ids, mask) = tiny_model(), group_of_three()

    def log_probs_of(packed):
        options = {"use_flash_attention_2": packed, "remove_microbatch_padding": packed}
        return wrapper(model, bf16=False, **options)(ids, 12, attention_mask=mask)

    check_both_ways_to_batch(model, log_probs_of, mask)


def test_actor_of_openrlhf_matches_its_ordinary_run(monkeypatch, without_gpu):
    """Its log-probabilities and entropies at a temperature, which it divides logits by in place."""
    root = package_folder("openrlhf")
    for name in ("openrlhf", "openrlhf.models"):
        stand_in(monkeypatch, name, root.joinpath(*name.split(".")[1:]))
    load = importlib.import_module("openrlhf.models.actor").Actor
    actor = load(tiny_model(), temperature=0.7)
    ids, mask = group_of_three()
    wanted = {"return_output": True, "return_entropy": True}

    def log_probs_of(packed):
        actor.packing_samples = packed
        with torch.compiler.set_stance("force_eager"):
            log_probs, output = actor(ids, mask[:, -12:], attention_mask=mask, **wanted)
        return log_probs + 0.1 * output.entropy[:, -12:]

    check_both_ways_to_batch(actor.model, log_probs_of, mask)


@dataclass
class FlashAttentionKwargs:
    """What NeMo-RL hands to a transformers model for a row of several sequences."""

    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int


@pytest.mark.parametrize(("keyword", "packed"), [("flash_attn_kwargs", True), ("seq_lens", False)])
def test_rows_of_nemo_rl_are_packed_and_those_of_prime_rl_pass_through(keyword, packed):
    """prime-rl names lengths in a keyword of its own, which could hold anything for each token."""
    torch.manual_seed(1)
    prompt = torch.randint(97, (30,))
    rows = [torch.cat([prompt, torch.randint(97, (n,))]) for n in (10, 7, 12)]
    lengths = torch.tensor([len(row) for row in rows])
    batch = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "use_cache": False,
    }
    model = tiny_model()

    def step(**more):
        model.zero_grad()
        logits = model(**batch, **more).logits
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    right = step()
    prefix_attn.enable(model)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    values = {"flash_attn_kwargs": FlashAttentionKwargs(bounds, 42), "seq_lens": lengths}
    for a, b in zip(step(**{keyword: values[keyword]}), right, strict=True):
        assert (a - b).norm() <= ROUNDING * b.norm()
    counts = prefix_attn.stats(model)
    assert counts.packed_calls == packed
    assert dict(counts.passed_through) == ({} if packed else {"the keyword seq_lens": 1})


@pytest.fixture
def trees_of_areal():
    """AReaL's module of tries."""
    package_folder("areal")
    return peers.areal_module("tree")


def test_trie_of_areal_allows_the_same_pairs(trees_of_areal):
    torch.manual_seed(0)
    prompt, thought = torch.randint(50, (12,)), torch.randint(50, (5,))
    draw = torch.randint
    rows = [
        torch.cat([prompt, draw(50, (4,))]),
        torch.cat([prompt, thought, draw(50, (3,))]),
        torch.cat([prompt, thought, draw(50, (6,))]),
        draw(50, (7,)),
        prompt[:5],
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones(len(row)) for row in rows], batch_first=True),
    }
    tries, _ = trees_of_areal._greedy_build_tries(batch, 128)
    for trie in tries:
        tokens = trie.num_tokens
        theirs = trees_of_areal.build_attention_mask_from_trie(trie, 64, torch.device("cpu"))
        layout = layout_of_trie(trie, num_rows=64)
        assert layout.num_tokens == 64
        assert layout.materialize()[:tokens, :tokens].equal(theirs[:tokens, :tokens].bool())
        assert layout_of_trie(trie).num_tokens == tokens
        with pytest.raises(ValueError, match=f"num_rows is 3, but the trie holds {tokens} tokens"):
            layout_of_trie(trie, num_rows=3)
        with pytest.raises(ValueError, match="expected the root of a trie"):
            layout_of_trie(trie.nodes[0])


def test_layout_of_trie_refuses_gaps():
    node = types.SimpleNamespace(start_idx=2, end_idx=4, ancestors=[])
    trie = types.SimpleNamespace(is_root=True, nodes=[node])
    with pytest.raises(ValueError, match="leave a gap: 0 to 2"):
        layout_of_trie(trie)
    assert isinstance(layout_of_trie(types.SimpleNamespace(is_root=True, nodes=[])), PrefixLayout)
