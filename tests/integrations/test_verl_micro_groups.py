"""verl's engine over a step: micro-batches cut by unique tokens, prompts run once for all."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils
from verl.utils import tensordict_utils

import prefix_attn
from prefix_attn import PrefixLayout, pack_bins
from prefix_attn.integrations.transformers.micro_groups import MicroGroups
from prefix_attn.integrations.verl import ENGINE, _announce, pack_alike
from prefix_attn.testing import assert_within_budget
from tests.integrations.test_verl import (  # noqa: F401
    OUTPUTS,
    assert_run_within_budget,
    in_float64,
    load_without_flash_attention,
    model_path,
    new_engine,
    process_group,
    save_adapter,
    save_model,
)
from tests.ranks import on_ranks

# Prompt and responses of each group. The second rank has one, and samples with nothing shared.
GROUPS = (
    ((70, (5, 8, 3, 6)), (66, (6, 2)), (9, (4, 2)), (64, (7, 5, 6, 3))),
    ((70, (5, 6, 3, 9)), *((30 + i, (7,)) for i in range(8))),
)
# Of the first rank, with every prompt repeated, and once.
TOKENS = sum(prompt + response for prompt, responses in GROUPS[0] for response in responses)
UNIQUE = sum(prompt + sum(responses) for prompt, responses in GROUPS[0])
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 90}
IN_THREES = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3}
AT_ONCE = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 12}
KINDS = ("actor", "LoRA", "critic")


def samples(rank: int = 0, *, torn: bool = False) -> list[tuple[Tensor, int]]:
    """Token ids of twelve samples and the length of each prompt; group by group, or torn apart."""
    generator = torch.Generator().manual_seed(rank)
    found = []
    for prompt_length, response_lengths in GROUPS[rank]:
        prompt = torch.randint(3, 97, (prompt_length,), generator=generator)
        prompt[0] = prompt_length  # so that prompts share nothing by chance, nor responses
        for length in response_lengths:
            response = torch.randint(3, 97, (length,), generator=generator)
            response[0] = 3 + len(found)
            found.append((torch.cat([prompt, response]), prompt_length))
    return found[::2] + found[1::2] if torn else found


def batch_of(parts: list[tuple[Tensor, int]], remove_padding: bool = True, **cut: Any) -> Any:
    """Samples as verl's workers receive them, and how to cut them into micro-batches."""

    def nested(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    return tensordict_utils.get_tensordict(
        {
            "input_ids": nested([ids for ids, _ in parts]),
            "position_ids": nested([torch.arange(len(ids)) for ids, _ in parts]),
            "loss_mask": nested([(torch.arange(len(ids)) >= n).float() for ids, n in parts]),
        },
        non_tensor_dict={
            "use_remove_padding": remove_padding,
            "temperature": 0.7,
            "calculate_entropy": True,
            "use_fused_kernels": False,
            "pad_token_id": 0,
            "return_model_output": True,
            **cut,
        },
    )


def loss_of(model_output: dict, data: Any, dp_group: Any) -> tuple[Tensor, dict]:
    """A sum over tokens, each with a weight of its own wherever it lies."""
    mask = torch.roll(data["loss_mask"].values(), -1)
    weights = torch.cos(data["input_ids"].values() + data["position_ids"].values())
    if "values" in model_output:
        values = model_output["values"].values()
        # Of one sign: the gradient of the head's bias is one sum, which must not cancel.
        return (mask * ((2 + weights) * values + 0.1 * values.square())).sum(), {}
    log_probs, entropy = (model_output[name].values() for name in ("log_probs", "entropy"))
    return (mask * (weights * log_probs + 0.1 * entropy)).sum(), {}


def predicted(x: Tensor) -> Tensor:
    """A nested output without the last token of each sample, which predicts nothing."""
    return torch.cat([part[:-1] for part in x.unbind()])


def train(engine: Any, batch: Any, before: Any = None) -> dict[str, Tensor]:
    """A batch's outputs in the order of its samples, and the gradients of all parameters."""
    engine.module.train()
    if before is not None:
        engine.forward_backward_batch(before, loss_of)
    output = engine.forward_backward_batch(batch, loss_of)["model_output"]
    results = {n: x.values() if n == "values" else predicted(x) for n, x in output.items()}
    whole: Any = nullcontext()
    if isinstance(engine.module, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(engine.module, with_grads=True)
    with whole:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
                results[name.replace("_fsdp_wrapped_module.", "")] = grad
    return results


def built(model_path: str, attention: str, **options: Any) -> Any:  # noqa: F811
    engine = new_engine(model_path, attention, **options)
    engine._build_model_optimizer()
    return engine


@pytest.fixture(scope="module")
def exact(model_path: str) -> dict[bool, dict[str, Tensor]]:  # noqa: F811
    """The step of the first rank in float64 and one micro-batch, for samples in order and torn."""
    with pytest.MonkeyPatch.context() as patch:
        return {
            torn: in_float64(model_path, patch, batch_of(samples(torn=torn), **AT_ONCE), train)
            for torn in (False, True)
        }


@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("cut", "torn"),
    [(DYNAMIC, False), (DYNAMIC, True), (IN_THREES, False)],
    ids=["dynamic", "dynamic, torn apart", "in threes"],
)
def test_step_runs_every_prompt_once_and_matches_ordinary_run(
    cut: dict[str, Any],
    torn: bool,
    remove_padding: bool,
    exact: dict[bool, dict[str, Tensor]],
    model_path: str,  # noqa: F811
) -> None:
    """Outputs too: micro-batches by unique tokens are put back in the order of the samples."""
    batches = [batch_of(samples(torn=torn), remove_padding, **cut) for _ in range(2)]
    ordinary = train(built(model_path, "sdpa"), batches[0])
    engine = built(model_path, "prefix_attn")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = train(engine, batches[1])
    assert_run_within_budget(found, exact[torn], ordinary)
    counts = prefix_attn.stats(engine.module)
    assert counts.calls == counts.packed_calls == 4
    # The prompt of nine tokens is too short for a pass: it runs again where its group is cut.
    assert counts.tokens_in == TOKENS
    assert counts.tokens_run in (UNIQUE, UNIQUE + 9)


@pytest.mark.parametrize("torn", [False, True], ids=["in order", "torn apart"])
def test_log_probs_match_ordinary_run(
    torn: bool,
    exact: dict[bool, dict[str, Tensor]],
    model_path: str,  # noqa: F811
) -> None:
    """Old and reference log-probs: groups stay together, and the order of samples comes back."""
    found = []
    for attention in ("sdpa", "prefix_attn"):
        engine = built(model_path, attention)
        engine.module.eval()
        output = engine.infer_batch(batch_of(samples(torn=torn), **DYNAMIC))
        found.append(predicted(output["model_output"]["log_probs"]))
    assert_within_budget("log_probs", found[1], exact[torn]["log_probs"], found[0])
    counts = prefix_attn.stats(engine.module)
    ids = [ids for ids, _ in samples(torn=torn)]
    cuts = pack_bins(ids, 90)
    assert counts.calls == counts.packed_calls == len(cuts)
    assert counts.tokens_in == TOKENS
    run = [PrefixLayout.from_sequences([ids[i] for i in cut])[0].num_tokens for cut in cuts]
    assert counts.tokens_run == sum(run) < 0.5 * TOKENS


def test_scattered_groups_are_named_and_run_in_each_micro_batch(
    exact: dict[bool, dict[str, Tensor]],
    model_path: str,  # noqa: F811
) -> None:
    """Every prompt would stay open from the first micro-batch to the last."""
    ordinary = train(built(model_path, "sdpa"), batch_of(samples(torn=True), **IN_THREES))
    engine = built(model_path, "prefix_attn")
    with pytest.warns(UserWarning, match="they lie scattered over the micro-batches"):
        found = train(engine, batch_of(samples(torn=True), **IN_THREES))
    assert_run_within_budget(found, exact[True], ordinary)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error", UserWarning)
        train(engine, batch_of(samples(torn=True), **IN_THREES))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("enable_activation_offload", "counts the passes of layers"),
        ("vision_config", "embeds pictures before its decoder"),
        ("rope", "rotary frequencies depend on the longest sequence"),
    ],
)
def test_what_micro_groups_cannot_serve_runs_in_each_micro_batch(
    change: str,
    reason: str,
    model_path: str,  # noqa: F811
) -> None:
    engine = built(model_path, "prefix_attn")
    if change == "enable_activation_offload":
        object.__setattr__(engine.model_config, change, True)  # frozen
    elif change == "vision_config":
        engine.model_config.hf_config.vision_config = {}
    else:
        engine.module.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.warns(UserWarning, match=reason):
        train(engine, batch_of(samples(), **IN_THREES))
    counts = prefix_attn.stats(engine.module)
    assert counts.calls == 4
    assert counts.tokens_run > UNIQUE


def test_an_error_in_a_step_ends_its_block(model_path: str) -> None:  # noqa: F811
    engine = built(model_path, "prefix_attn")

    def fail(model_output: dict, data: Any, dp_group: Any) -> tuple[Tensor, dict]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.forward_backward_batch(batch_of(samples(), **IN_THREES), fail)
    engine.optimizer_zero_grad()
    found = train(engine, batch_of(samples(), **IN_THREES))
    expected = train(built(model_path, "prefix_attn"), batch_of(samples(), **IN_THREES))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pairs_and_pictures_keep_the_cut_of_verl(model_path: str) -> None:  # noqa: F811
    """Samples that must stay together, and tokens that look alike and are not."""
    engine = built(model_path, "prefix_attn")
    engine.module.eval()
    cut = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 160}
    pairs = batch_of(samples(), **cut, force_group_size=2)
    from verl.workers.engine.utils import prepare_micro_batches  # once the platform is set

    expected = prepare_micro_batches(data=pairs)[1]
    assert pack_bins([ids for ids, _ in samples()], 160) != expected
    engine.infer_batch(pairs)
    assert prefix_attn.stats(engine.module).calls == len(expected)


def test_bins_are_as_many_on_every_rank(process_group: None) -> None:  # noqa: F811
    parts = [ids for ids, _ in samples()]
    alone = pack_bins(parts, 90)
    assert pack_alike(parts, 90, None) == pack_alike(parts, 90, dist.group.WORLD) == alone
    with pytest.raises(ValueError, match=r"a sequence has 78 tokens, .* max_token_len=77"):
        pack_alike(parts, 77, None)


# ---- two ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "cut"), [("fsdp2", DYNAMIC), ("fsdp", IN_THREES)], ids=["fsdp2", "fsdp"]
)
@on_ranks(2)
def test_steps_of_two_ranks_with_other_trees(
    group: Any, kind: str, strategy: str, cut: dict[str, Any]
) -> None:
    """Every prompt of both runs once, and gradients are the mean of theirs."""
    rank = group.rank()
    options = {"kind": kind, "strategy": strategy, "use_orig_params": strategy == "fsdp"}
    is_refused = (kind, strategy) == ("LoRA", "fsdp")
    refusal = pytest.warns(UserWarning, match="FSDP frees parameters that are not trained")
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        load_without_flash_attention(patch)
        # Without FSDP only the first rank of verl has weights, unless they are tied.
        save_model(folder, tie_word_embeddings=True)
        save_adapter(f"{folder}/adapter", folder)
        own, other = (batch_of(samples(r), **AT_ONCE) for r in (rank, 1 - rank))
        exact = in_float64(folder, patch, own, partial(train, before=other), kind)
        # FSDP would ask for a GPU
        patch.setattr(_init_utils, "_check_module_states_for_sync_module_states", bool)
        if strategy == "fsdp":
            patch.setattr(
                sys.modules[ENGINE], "get_init_weight_context_manager", lambda **_: nullcontext
            )
        ordinary = train(built(folder, "sdpa", **options), batch_of(samples(rank), **cut))
        engine = built(folder, "prefix_attn", **options)
        with refusal if is_refused else nullcontext():
            found = train(engine, batch_of(samples(rank), **cut))
    # Outputs are those of its own samples; gradients are a mean.
    expected = {x: value.detach() / (1 if x in OUTPUTS else 2) for x, value in exact.items()}
    assert_run_within_budget(found, expected, ordinary)
    counts = prefix_attn.stats(engine.module)
    told: list[Any] = [None, None]
    dist.all_gather_object(told, (counts.calls, counts.packed_calls, counts.passed_through))
    assert told[0] == told[1]
    unique = sum(prompt + sum(responses) for prompt, responses in GROUPS[rank])
    if is_refused:  # shared inside each micro-batch
        assert unique + 9 < counts.tokens_run < counts.tokens_in
        return
    # A token for company in each pass that only the other rank needs, and the prompt of nine.
    assert unique <= counts.tokens_run <= unique + 9 + 4


@on_ranks(2)
def test_ranks_refuse_alike(group: Any) -> None:
    parts = [ids for ids, _ in samples(group.rank())]
    with pytest.raises(ValueError, match="a sequence has 79 tokens"):  # of the second rank
        pack_alike(parts, 78, group)
    with pytest.raises(ValueError, match=r"a rank needs \d+ micro-batches .* another has only 2"):
        pack_alike(parts[: 2 if group.rank() == 0 else 12], 79, group)


@on_ranks(2)
def test_ranks_announce_alike(group: Any) -> None:
    """Where one rank can't share a step, no rank does, whoever shares parameters with it."""

    def plan(module: Any, calls: Any) -> Any:
        if group.rank() == 1:
            raise ValueError("not on this rank")
        return SimpleNamespace(tokens_held=1, tokens_apart=1)

    settings = SimpleNamespace(enable_activation_offload=False, hf_config=None)
    engine = SimpleNamespace(model_config=settings, module=None, prepare_model_inputs=lambda x: [x])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[MicroGroups.__module__], "micro_groups", plan)
        assert _announce(engine, [{}, {}], group) == "not on this rank"
