"""micro_groups: the gradients of the ordinary micro-batches, with shared prefixes run once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import prefix_attn
from prefix_attn import micro_groups
from prefix_attn.losses import cispo_loss, dpo_loss, grpo_loss, gspo_loss
from prefix_attn.micro import Deposit, Recorded
from tests.integrations import tiny_models
from tests.integrations.test_transformers_exact import EXACT
from tests.integrations.tiny_models import VOCAB, as_row, deviation, pad, rows_that_share
from tests.saved_bytes import SavedBytes

EPS = torch.finfo(torch.float64).eps
ROUNDING = 1e4 * EPS  # of float64 gradients that were summed in another order

NARROW_ROUNDING = 1e2 * torch.finfo(torch.float32).eps  # where norms compute in float32


def build(model_type: str = "qwen3", enabled: bool = True, **changes: Any) -> Any:
    model = tiny_models.build(tiny_models.tiny_config(model_type, **changes))
    return prefix_attn.enable(model, self_check=False) if enabled else model


def draw(count: int, seed: int) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def group(members: int = 6, prompt: int = 11, seed: int = 0) -> list[Tensor]:
    """One prompt and its members, of 2 to 6 tokens."""
    head = draw(prompt, seed + 1)
    return [torch.cat([head, draw(2 + i % 5, seed + 10 + i)]) for i in range(members)]


def tree() -> list[Tensor]:
    """A system prompt, two questions, three branches with three leaves each; and leaves between."""
    system, rows = draw(3, 1), []
    for question, branches in ((draw(9, 2), (draw(3, 4), draw(4, 5))), (draw(7, 3), (draw(2, 6),))):
        for branch in branches:
            head = torch.cat([system, question, branch])
            rows += [torch.cat([head, draw(2 + i, 100 + len(rows) + i)]) for i in range(3)]
        rows.append(torch.cat([system, question, draw(4, 50 + len(rows))]))
    return rows


def cut(rows: list[Tensor], sizes: list[int], kind: str = "right") -> list[dict[str, Tensor]]:
    """Micro-batches of some sizes: padded on a side, or one row each."""
    assert sum(sizes) == len(rows)
    parts = [rows[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    if kind == "row":
        return [as_row(part) for part in parts]
    batches = [pad(part, kind) for part in parts]
    for batch in batches:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batches


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return tiny_models.loss_of(model(**batch, use_cache=False), batch.get("attention_mask"))


def gradients(model: Any, losses: list[float]) -> dict[str, Tensor]:
    """Every parameter's gradient, and the losses where `deviation` looks for logits."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": torch.tensor(losses, dtype=torch.float64), **found}


def ordinary(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(float(loss))
    return gradients(model, losses)


def in_micro_groups(
    model: Any, batches: list[dict[str, Tensor]], **options: Any
) -> dict[str, Tensor]:
    with micro_groups(model, batches, **{"min_tokens": 1, **options}):
        return ordinary(model, batches)


CASES = {
    "group in twos": (group(), [2, 2, 2]),
    "group of single rows": (group(4), [1] * 4),
    "uneven": (group(7), [3, 1, 2, 1]),
    "two prompts, interleaved": (
        [x for p in zip(group(4), group(4, 8, 50), strict=True) for x in p],
        [3, 2, 3],
    ),
    "tree in order": (tree(), [2, 2, 2, 2, 2, 1]),
    "tree cut elsewhere": (tree(), [1, 4, 1, 3, 2]),
    "tree interleaved": (tree()[::2] + tree()[1::2], [3, 2, 3, 3]),
    "repeats and rows of their own": (rows_that_share(), [3, 2, 3]),
    "whole prefixes and repeats": (
        [*group(3), group()[0][:11], group()[1][:5], *group(2)],
        [2, 1, 1, 1, 2],
    ),
}


@pytest.mark.parametrize("kind", ["right", "left", "row"])
@pytest.mark.parametrize("name", CASES)
def test_micro_groups_have_the_gradients_of_micro_batches(name, kind):
    rows, sizes = CASES[name]
    batches = cut(rows, sizes, kind)
    with tiny_models.KeepDouble():
        expected = ordinary(build(enabled=False), batches)
        found = in_micro_groups(build(), batches)
    assert deviation(found, expected) <= ROUNDING


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "diffllama", "gemma2", "gpt2", "gpt_oss", "hrm_text", "qwen3_moe"]
)
def test_micro_groups_serve_models_with(model_type):
    """MLA, two attentions in a layer, windows, positions in embeddings, sinks, loops, experts."""
    rows, sizes = CASES["tree cut elsewhere"]
    batches = cut(rows, sizes)
    with tiny_models.KeepDouble():
        expected = ordinary(build(model_type, enabled=False, **EXACT[model_type]), batches)
        found = in_micro_groups(build(model_type, **EXACT[model_type]), batches)
    assert deviation(found, expected) <= ROUNDING


def pairs_loss(log_probs, old, advantages, mask, denominator):
    """DPO of neighbours, the chosen completion first."""
    policy, reference = (x.mul(mask).sum(1).view(-1, 2) for x in (log_probs, old))
    return dpo_loss(*policy.unbind(1), *reference.unbind(1), denominator=denominator / 2)


@pytest.mark.parametrize(
    ("loss_function", "per_token", "sizes"),
    [
        (grpo_loss, False, [3, 3, 2]),
        (partial(grpo_loss, aggregation="dapo"), True, [3, 3, 2]),
        (gspo_loss, False, [3, 3, 2]),
        (partial(cispo_loss, clip_high=0.3), True, [3, 3, 2]),
        (pairs_loss, False, [2, 4, 2]),
    ],
    ids=["GRPO", "DAPO", "GSPO", "CISPO", "DPO"],
)
def test_micro_groups_have_the_gradients_of_the_whole_group(loss_function, per_token, sizes):
    rows, prompt = group(8), 11
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(8, 7, generator=generator, dtype=torch.float64)
    count = sum(len(row) - prompt for row in rows) if per_token else 8

    def loss(model: Any, batch: dict[str, Tensor], at: int) -> Tensor:
        logits = model(**batch, use_cache=False).logits[:, prompt - 1 : -1]
        targets, mask = batch["input_ids"][:, prompt:], batch["attention_mask"][:, prompt:]
        found = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        members = slice(at, at + len(found))
        old = found.detach() + noise[members, : found.shape[1]]
        return loss_function(found, old, advantages[members], mask, denominator=count)

    with tiny_models.KeepDouble():
        model = build(enabled=False)
        loss(model, cut(rows, [8])[0], 0).backward()
        whole = gradients(model, [1.0])
        model, batches = build(), cut(rows, sizes)
        with micro_groups(model, batches, min_tokens=1):
            for batch, end in zip(batches, accumulate(sizes), strict=True):
                loss(model, batch, end - len(batch["input_ids"])).backward()
    assert deviation(gradients(model, [1.0]), whole) <= ROUNDING


def test_micro_groups_count_what_will_run():
    batches = cut(group(6), [2, 2, 2])  # 11 tokens, and members of 2, 3, 4, 5, 6 and 2
    model = build()
    run = micro_groups(model, batches, min_tokens=1)
    assert (run.num_prefixes, run.tokens_run, run.tokens_held) == (1, 11 + 22, 11 + 9)
    assert run.tokens_apart == 11 + 9
    with run as entered:
        ordinary(model, batches)
    assert entered is run
    counts = prefix_attn.stats(model)
    assert (counts.packed_calls, counts.tokens_in, counts.tokens_run) == (3, 6 * 11 + 22, 33)
    apart = micro_groups(model, batches, min_tokens=12)  # the prompt is too short for a pass
    assert (apart.num_prefixes, apart.tokens_run, apart.tokens_held) == (0, 3 * 11 + 22, 11 + 9)
    assert micro_groups(model, batches).num_prefixes == 0
    torn = micro_groups(model, cut([*group(2), *group(2, 8, 50)][::2] * 2, [1] * 4), min_tokens=1)
    assert (torn.tokens_held, torn.tokens_apart) == (13 + 10, 13)  # both are open at once
    deep = micro_groups(model, cut(tree(), [1] * 11), min_tokens=9)
    # 9 tokens of a question and 3 above it; shorter branches run again
    assert deep.num_prefixes == 2


def test_micro_groups_without_a_prefix_that_is_worth_a_pass_are_exact():
    rows, sizes = CASES["tree cut elsewhere"]
    batches = cut(rows, sizes)
    with tiny_models.KeepDouble():
        expected = ordinary(build(enabled=False), batches)
        for min_tokens in (4, 9, 100):
            found = in_micro_groups(build(), batches, min_tokens=min_tokens)
            assert deviation(found, expected) <= ROUNDING


def test_micro_groups_hand_back_hidden_states_and_the_loss_of_routers():
    batches = cut(group(6), [2, 2, 2])
    options = {"output_hidden_states": True, "output_router_logits": True}

    def step(model: Any) -> dict[str, Tensor]:
        kept = []
        for batch in batches:
            out = model(**batch, use_cache=False, **options)
            mask = batch["attention_mask"].bool()
            states = torch.stack(out.hidden_states)[:, mask]
            (states.tanh().sum() + tiny_models.loss_of(out, mask)).backward()
            kept += [states.detach().flatten(), out.aux_loss.detach()[None]]
        return {**gradients(model, []), "logits": torch.cat(kept)}

    with tiny_models.KeepDouble():
        expected = step(build("qwen3_moe", enabled=False))
        model = build("qwen3_moe")
        with micro_groups(model, batches, min_tokens=1):
            found = step(model)
    assert deviation(found, expected) <= ROUNDING


def test_micro_groups_hold_the_backward_of_prefixes_behind_a_barrier():
    """One device's queue keeps the order without it; several devices have a queue each."""
    batches = cut(tree(), [4, 4, 3])
    model = build()
    found = 0
    with micro_groups(model, batches, min_tokens=1):
        for batch in batches:
            loss = loss_of(model, batch)
            nodes, seen = [loss.grad_fn], set()
            while nodes:
                node = nodes.pop()
                seen.add(node)
                for below, _ in node.next_functions:
                    recorded = getattr(below, "recorded", None)
                    if recorded is not None and recorded.dim == 0:  # an output of a block
                        assert type(node).__name__ == "BarrierBackward"
                        found += 1
                    if below is not None and below not in seen:
                        nodes.append(below)
            loss.backward()
    assert found


# ---- memory -------------------------------------------------------------------------------------


def saved_bytes(members: int) -> int:
    model = build()
    batches = cut(group(members, 40), [2] * (members // 2))
    meter = SavedBytes(model)
    with micro_groups(model, batches, min_tokens=10), meter.measured():  # no chance forks
        ordinary(model, batches)
    return meter.peak


def test_micro_groups_save_no_more_for_larger_groups():
    assert saved_bytes(40) <= 1.01 * saved_bytes(10)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_micro_groups_offload_the_same_bits(checkpoints):
    rows, sizes = CASES["tree cut elsewhere"]
    batches = cut(rows, sizes)
    results = []
    for offload in (False, True):
        model = build()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(in_micro_groups(model, batches, offload=offload))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_micro_groups_sum_gradients_in_float32():
    """Bfloat16 would lose all but the first of many small gradients."""
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    recorded = Recorded(x, 0, offload=False)
    out = Deposit.apply(x, recorded)
    recorded.add(torch.ones(1, 1, dtype=torch.bfloat16), 0)
    for _ in range(511):
        recorded.add(torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16), 0)
    out.backward(torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16))
    assert x.grad.item() == 2.0


# ---- what it survives ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["diffllama", "qwen3"])
def test_micro_groups_recompute_the_same_bits(model_type, reentrant):
    rows, sizes = CASES["tree cut elsewhere"]
    batches = cut(rows, sizes)
    expected = in_micro_groups(build(model_type), batches)
    model = build(model_type)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = in_micro_groups(model, batches)
    if reentrant:  # which adds what each layer finds to `grad` in turn
        assert deviation(found, expected) <= NARROW_ROUNDING
    else:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"]])
def test_micro_groups_with_lora(targets, reentrant):
    peft = pytest.importorskip("peft")
    rows, sizes = CASES["tree cut elsewhere"]
    batches = cut(rows, sizes)

    def adapted(enabled: bool) -> Any:
        model = build(enabled=enabled)
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config).double()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        return model

    expected = ordinary(adapted(False), batches)
    found = in_micro_groups(adapted(True), batches)
    assert len(found) > 1
    assert deviation(found, expected) <= NARROW_ROUNDING


def test_micro_groups_leave_calls_without_gradients_alone():
    batches = cut(group(4), [2, 2])
    with tiny_models.KeepDouble():
        expected = ordinary(build(enabled=False), batches)
        model = build()
        losses = []
        with micro_groups(model, batches, min_tokens=1):
            for batch in batches:
                with torch.no_grad():
                    model(**batches[0])
                loss = loss_of(model, batch)
                loss.backward()
                losses.append(float(loss))
    assert deviation(gradients(model, losses), expected) <= ROUNDING


def test_micro_groups_take_one_backward_of_all_losses_and_two_of_each():
    batches = cut(group(4), [2, 2])
    with tiny_models.KeepDouble():
        expected = ordinary(build(enabled=False), batches)
        model = build()
        with micro_groups(model, batches, min_tokens=1):
            losses = [loss_of(model, batch) for batch in batches]
            sum(losses).backward()
        assert deviation(gradients(model, [float(x) for x in losses]), expected) <= ROUNDING
        model.zero_grad()
        with micro_groups(model, batches, min_tokens=1):
            for batch in batches:
                loss = loss_of(model, batch) / 2
                loss.backward(retain_graph=True)
                loss.backward()
        assert deviation(gradients(model, [float(x) for x in losses]), expected) <= ROUNDING


def test_micro_groups_take_a_loss_of_zero():
    batches = cut(group(6), [2, 2, 2])
    with tiny_models.KeepDouble():
        expected = ordinary(build(enabled=False), batches[:2])
        model = build()
        losses = []
        with micro_groups(model, batches, min_tokens=1):
            for batch, factor in zip(batches, (1, 1, 0), strict=True):
                losses.append(loss_of(model, batch) * factor)
                losses[-1].backward()
    found = gradients(model, [float(loss) for loss in losses[:2]])
    assert deviation(found, expected) <= ROUNDING


def test_micro_groups_take_another_step_after_an_error():
    batches = cut(group(4), [2, 2])
    model = build()
    before = in_micro_groups(model, batches)

    def fail() -> None:
        with micro_groups(model, batches, min_tokens=1):
            loss_of(model, batches[0]).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    model.zero_grad()
    after = in_micro_groups(model, batches)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert prefix_attn.disable(model) is model


def test_micro_groups_let_optimizers_step_between_closed_prefixes():
    batches = cut([*group(4), *group(4, 8, 50)], [2, 2, 2, 2])
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with micro_groups(model, batches, min_tokens=1) as run:
        for i, batch in enumerate(batches):
            loss_of(model, batch).backward()
            other.step()
            if i == 1:
                optimizer.step()
    assert run.num_prefixes == 2  # one is closed by batch 1, one opened by batch 2


def test_micro_groups_take_batches_from_a_buffer_that_is_filled_again():
    batches = [pad([row]) for row in group(4)]
    width = max(batch["input_ids"].shape[1] for batch in batches)
    buffer = {name: torch.zeros(1, width, dtype=torch.int64) for name in batches[0]}

    def filled() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            for name, x in buffer.items():
                x.zero_()[:, : batch[name].shape[1]] = batch[name]
            yield buffer

    model = build()
    with micro_groups(model, filled(), min_tokens=np.int64(1)) as run:
        for batch in filled():
            loss_of(model, batch).backward()
    assert run.num_prefixes == 1
    found = gradients(model, [])
    model.zero_grad()
    with micro_groups(model, batches, min_tokens=1):
        for batch in batches:
            loss_of(model, batch).backward()
    assert deviation(found, gradients(model, [])) <= NARROW_ROUNDING


# ---- errors -------------------------------------------------------------------------------------


def test_micro_groups_refuse_an_optimizer_step_while_prefixes_are_open():
    batches = cut(group(4), [2, 2])
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.lm_head.weight.clone()

    def step() -> None:
        with micro_groups(model, batches, min_tokens=1):
            loss_of(model, batches[0]).backward()
            optimizer.step()

    with pytest.raises(
        RuntimeError, match=r"SGD.step\(\) while prefixes are open, .* micro-batch 1"
    ):
        step()
    assert torch.equal(model.lm_head.weight, before)
    optimizer.step()  # outside of the block nothing is in the way


@pytest.mark.parametrize("way", ["torch.autograd.grad", "inputs"])
def test_micro_groups_refuse_gradients_of_some_tensors_alone(way):
    """They would lack what the members leave at the rows of the prefix."""
    batches = cut(group(4), [2, 2])
    model = build()
    weights = list(model.parameters())

    def step() -> None:
        with micro_groups(model, batches, min_tokens=1):
            for batch in batches:
                loss = loss_of(model, batch)
                if way == "inputs":
                    loss.backward(inputs=weights)
                else:
                    torch.autograd.grad(loss, weights)

    with pytest.raises(RuntimeError, match=r"autograd.grad and backward\(inputs=...\) leave out"):
        step()


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([1], "micro-batch 0 is not the one that was announced"),
        ([0, 0], "micro-batch 1 is not the one that was announced"),
        ([0, 1, 2, 0], "3 micro-batches were announced, this call is one more"),
        ([0, 1], "2 of 3 announced micro-batches ran: gradients .* are lost"),
        ([], "0 of 3 announced micro-batches ran"),
        ([0, 1, -2], r"backward\(\) of micro-batch 2 did not run inside micro_groups"),
    ],
)
def test_micro_groups_name_wrong_calls(calls, message):
    batches = cut(group(6), [2, 2, 2])
    model = build()

    def step() -> None:
        with micro_groups(model, batches, min_tokens=1):
            for i in calls:
                loss = loss_of(model, batches[abs(i)])
                if i >= 0:
                    loss.backward()

    with pytest.raises((ValueError, RuntimeError), match=message):
        step()


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_micro_groups_refuse_another_mask_and_other_positions(name):
    batches = cut(group(4), [2, 2])
    changed = {**batches[0], name: batches[0][name].clone()}
    changed[name][0, 0] = 1 - changed[name][0, 0]
    with (
        pytest.raises(ValueError, match="micro-batch 0 is not the one that was announced"),
        micro_groups(model := build(), batches, min_tokens=1),
    ):
        loss_of(model, changed).backward()


def test_micro_groups_name_a_backward_that_came_too_late():
    batches = cut(group(6), [2, 2, 2])
    model = build()

    def step() -> None:
        with micro_groups(model, batches, min_tokens=1):
            losses = [loss_of(model, batch) for batch in batches]
            losses[2].backward()
            losses[0].backward()

    with pytest.raises(RuntimeError, match="of a micro-batch came after that of micro-batch 2"):
        step()


def test_micro_groups_refuse_rows_that_would_run_as_one_sequence():
    batches = cut(group(4), [2, 2], "row")
    with (
        pytest.raises(ValueError, match="announced with 2 sequences, its call takes it for 1"),
        micro_groups(model := build(), batches, min_tokens=1),
    ):
        model(**batches[0])


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "micro_groups needs at least one micro-batch"),
        ([torch.zeros(1)], {}, "micro-batch 0 must be a dict .* got Tensor"),
        ({"input_ids": 1}, {}, "micro_batches must be a list of batches, got dict"),
        ([{"inputs_embeds": torch.zeros(1, 2, 3)}], {}, "micro-batch 0 has no input_ids"),
        (cut(group(2), [1, 1]), {"min_tokens": -1}, "min_tokens must be a number .* got -1"),
        (
            [{**pad(group(2)), "attention_mask": torch.arange(30).view(2, 15) % 2}, pad(group(2))],
            {},
            "micro_groups can't run micro-batch 0, .*: attention_mask",
        ),
    ],
)
def test_micro_groups_name_what_is_wrong_with_arguments(batches, options, message):
    with pytest.raises(ValueError, match=message):
        micro_groups(build(), batches, **options)


def test_micro_groups_refuse_models_by_name():
    batches = cut(group(4), [2, 2])
    with pytest.raises(ValueError, match="is not enabled: call"):
        micro_groups(build(enabled=False), batches)
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(NotImplementedError, match="rotary frequencies depend on the longest"):
        micro_groups(build("llama", rope_parameters=stretched), batches)
    with pytest.raises(NotImplementedError, match="is compiled"):
        micro_groups(torch.compile(build()), batches)
    mixed = build()
    mixed.model.layers[0].mixer = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 2))
    with pytest.raises(
        NotImplementedError, match=r"the states of layers.0.mixer \(Sequential\) are not"
    ):
        micro_groups(mixed, batches)
    model = build()
    with micro_groups(model, batches, min_tokens=1) as run:
        with pytest.raises(RuntimeError, match="is inside micro_groups already"):
            micro_groups(model, batches).__enter__()
        ordinary(model, batches)
    with pytest.raises(RuntimeError, match="announce micro-batches anew"):
        run.__enter__()


def test_micro_groups_refuse_looped_layers_that_are_recomputed():
    model = build("hrm_text", **EXACT["hrm_text"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = cut(group(4), [2, 2])
    with (
        pytest.raises(NotImplementedError, match="runs its layers in a loop and recomputes them"),
        micro_groups(model, batches, min_tokens=1),
    ):
        loss_of(model, batches[0])


def test_micro_groups_refuse_embeddings_from_outside():
    batches = cut(group(4), [2, 2])
    model = build()
    embeddings = model.get_input_embeddings()(batches[0]["input_ids"]).detach()
    with (
        pytest.raises(NotImplementedError, match="can't serve inputs_embeds"),
        micro_groups(model, batches, min_tokens=1),
    ):
        model(inputs_embeds=embeddings, attention_mask=batches[0]["attention_mask"])
