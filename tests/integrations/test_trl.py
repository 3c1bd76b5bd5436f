"""TRL's own trainers on tiny models: shared prefixes against ordinary runs.

Needs TRL 1.16; `make test-hf` has an environment for it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3
from trl.experimental.async_grpo import packing
from trl.trainer import dpo_trainer, grpo_trainer, rloo_trainer
from trl.trainer.utils import FusedCausalLMOutput

import prefix_attn
from prefix_attn.integrations import trl as integration
from prefix_attn.integrations.trl import (
    KeepGroupsMixin,
    serve_tree_attention,
    shuffle_groups,
    tree_attention,
    tree_layout,
)
from prefix_attn.testing import assert_model_within_budget, assert_within_budget

WORDS = [f"w{i}" for i in range(94)]
GENERATIONS = 4


class KeepGroupsGRPO(KeepGroupsMixin, trl.GRPOTrainer):
    pass


class KeepGroupsRLOO(KeepGroupsMixin, trl.RLOOTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sentence(generator: torch.Generator, low: int, high: int) -> str:
    length = int(torch.randint(low, high, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(0, 94, (length,), generator=generator))


def prompts() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    return Dataset.from_dict({"prompt": [sentence(generator, 15, 30) for _ in range(16)]})


def preferences() -> Dataset:
    generator = torch.Generator().manual_seed(2)
    columns = {"prompt": (15, 30), "chosen": (3, 9), "rejected": (3, 9)}
    return Dataset.from_dict(
        {name: [sentence(generator, *span) for _ in range(8)] for name, span in columns.items()}
    )


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [sum(int(word[1:]) for word in text.split()) / 100 for text in completions]


def rollouts() -> Callable[..., Tensor]:
    """A `generate` that draws from a seed, so that runs in different dtypes see the same text."""
    generator = torch.Generator().manual_seed(4)

    def generate(self: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
        drawn = torch.randint(3, 97, (len(input_ids), 10), generator=generator)
        ends = torch.randint(3, 11, (len(input_ids), 1), generator=generator)
        drawn = drawn.masked_fill(torch.arange(10) >= ends, 2)
        return torch.cat([input_ids, drawn], dim=1)

    return generate


def exact_norm(self: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm that stays in the dtype of x; transformers' computes in float32."""
    mean_of_squares = x.square().mean(-1, keepdim=True)
    return self.weight * x * torch.rsqrt(mean_of_squares + self.variance_epsilon)


def plain_head(model: Any, temperature: float = 1.0, **options: Any) -> None:
    """Stands in for TRL's fused head, which computes in float32."""
    original = model.forward

    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        logits = self.lm_head(hidden) / temperature
        log_probs = logits.log_softmax(-1)
        labels = labels[:, 1:]
        keep = labels != -100
        chosen = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return FusedCausalLMOutput(
            log_probs=chosen * keep,
            entropy=-(log_probs.exp() * log_probs).sum(-1) * keep,
            mean_logits=logits.mean(-1) * keep,
            is_top1=logits.argmax(-1) == labels,
        )

    model.forward = types.MethodType(forward, model)


class KeepGradients(transformers.TrainerCallback):
    """Copies the gradients before the first optimizer step."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.grads:
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.requires_grad:
                    self.grads[name] = parameter.grad.clone()


TRAINERS = {
    trl.GRPOTrainer: trl.GRPOConfig,
    trl.RLOOTrainer: trl.RLOOConfig,
    trl.DPOTrainer: trl.DPOConfig,
    KeepGroupsGRPO: trl.GRPOConfig,
    KeepGroupsRLOO: trl.RLOOConfig,
}


def make_trainer(
    cls: type,
    model_path: str,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    peft_config: Any = None,
    **options: Any,
) -> Any:
    """A trainer of two micro-batches of 8 samples for each step, with a reference model."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4 if cls is trl.DPOTrainer else 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "beta": 0.05,
        "seed": 7,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": True,
    }
    if cls is not trl.DPOTrainer:
        settings |= {"num_generations": GENERATIONS, "max_completion_length": 10}
    settings |= options
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    functions = {} if cls is trl.DPOTrainer else {"reward_funcs": reward}
    trainer = cls(
        model=model,
        args=TRAINERS[cls](**settings),
        train_dataset=preferences() if cls is trl.DPOTrainer else prompts(),
        processing_class=tokenizer,
        callbacks=[KeepGradients()],
        peft_config=peft_config,
        **functions,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.to(dtype)
    return trainer


def enable_both(trainer: Any) -> None:
    prefix_attn.enable(trainer.model)
    if trainer.ref_model is not None:
        prefix_attn.enable(trainer.ref_model)


def run(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Trains; the gradients of the first step and the parameters after the last."""
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Qwen3ForCausalLM, "generate", rollouts())
        trainer.train()
    (kept,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, KeepGradients))
    results = {f"gradient of {name}": grad for name, grad in kept.grads.items()}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return results | {name: p.detach().clone() for name, p in model.named_parameters()}


def run_in_float64(
    cls: type,
    model_path: str,
    tokenizer: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> dict[str, Tensor]:
    """The ordinary run with nothing rounded to float32."""
    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
        for module in (dpo_trainer, grpo_trainer, rloo_trainer):
            patch.setattr(module, "add_fused_lm_head", plain_head)
        trainer = make_trainer(cls, model_path, tokenizer, folder, torch.float64, **options)
        return run(trainer, patch)


# ---- enable alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [trl.GRPOTrainer, trl.RLOOTrainer, trl.DPOTrainer])
def test_training_step_matches_ordinary_run(
    cls: type, model_path: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run_in_float64(cls, model_path, tokenizer, tmp_path, monkeypatch)
    ordinary = run(make_trainer(cls, model_path, tokenizer, tmp_path), monkeypatch)
    trainer = make_trainer(cls, model_path, tokenizer, tmp_path)
    enable_both(trainer)
    shared = run(trainer, monkeypatch)
    tokens = prefix_attn.stats(trainer.model).tokens_in
    results = (shared, exact, ordinary)
    assert_model_within_budget("gradients and parameters", *results, tokens=tokens)
    for model in (trainer.model, trainer.ref_model):
        counts = prefix_attn.stats(model)
        assert counts.packed_calls == counts.calls >= 2
        assert counts.tokens_run < counts.tokens_in


def test_adapters_match_ordinary_run(
    model_path: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRA the reference is the same model with its adapters off."""
    lora = {"peft_config": peft.LoraConfig(r=4, init_lora_weights=False)}
    arguments = (trl.GRPOTrainer, model_path, tokenizer, tmp_path)
    exact = run_in_float64(*arguments, monkeypatch, **lora)
    ordinary = run(make_trainer(*arguments, **lora), monkeypatch)
    trainer = make_trainer(*arguments, **lora)
    assert trainer.ref_model is None
    enable_both(trainer)
    shared = run(trainer, monkeypatch)
    assert any("lora_A" in name for name in exact)
    tokens = prefix_attn.stats(trainer.model).tokens_in
    results = (shared, exact, ordinary)
    assert_model_within_budget("gradients and parameters", *results, tokens=tokens)
    counts = prefix_attn.stats(trainer.model)
    assert counts.packed_calls == counts.calls >= 4


@pytest.mark.parametrize("cls", [trl.GRPOTrainer, trl.RLOOTrainer])
def test_own_generation_and_rewards_are_those_of_ordinary_run(
    cls: type, model_path: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Nothing is stubbed here: the first rollouts come from the model's own cached decoding."""
    logs = []
    for enabled in (False, True):
        trainer = make_trainer(cls, model_path, tokenizer, tmp_path, logging_steps=1)
        if enabled:
            enable_both(trainer)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("reward", "completions/mean_length", "completions/max_length"):
        assert logs[0][name] == logs[1][name]
    assert prefix_attn.stats(trainer.model).packed_calls >= 2


# ---- KeepGroupsMixin --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stock", "keeping"),
    [(trl.GRPOTrainer, KeepGroupsGRPO), (trl.RLOOTrainer, KeepGroupsRLOO)],
)
def test_keeping_groups_shares_every_prompt_once(
    stock: type,
    keeping: type,
    model_path: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient of the step is that of TRL's own order; only the token counts differ."""
    exact = run_in_float64(stock, model_path, tokenizer, tmp_path, monkeypatch)
    results, counts = [], []
    for cls in (stock, keeping):
        trainer = make_trainer(cls, model_path, tokenizer, tmp_path)
        enable_both(trainer)
        results.append(run(trainer, monkeypatch))
        counts.append(prefix_attn.stats(trainer.model))
    scattered, kept = counts
    runs = (results[1], exact, results[0])
    assert_model_within_budget("gradients and parameters", *runs, tokens=kept.tokens_in)
    assert kept.tokens_in == scattered.tokens_in
    assert kept.tokens_run < scattered.tokens_run
    # A micro-batch of 8 holds two whole groups, so 4 of 16 prompts are run.
    batches = trainer._buffered_inputs
    groups = [batch["prompt_mask"][::GENERATIONS].sum() for batch in batches]
    completions = [batch["completion_mask"].sum() for batch in batches]
    passes = kept.calls // len(batches)  # RLOO computes the old log-probs too
    everything = passes * int(sum(groups) + sum(completions))
    shared_starts = everything - kept.tokens_run  # completions that start with the same token
    assert 0 <= shared_starts <= 3 * passes
    for batch in batches:
        for group in batch["prompt_ids"].split(GENERATIONS):
            assert bool((group == group[0]).all())


def test_keeping_groups_deals_whole_groups_to_steps(
    model_path: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several optimizer steps and epochs from one generation, with less than a group in a batch."""
    trainer = make_trainer(
        KeepGroupsGRPO,
        model_path,
        tokenizer,
        tmp_path,
        per_device_train_batch_size=2,
        steps_per_generation=8,
        num_iterations=2,
        max_steps=4,
    )
    enable_both(trainer)
    run(trainer, monkeypatch)
    assert len(trainer._buffered_inputs) == 8
    for batch in trainer._buffered_inputs:
        assert bool((batch["prompt_ids"][0] == batch["prompt_ids"][1]).all())
    assert grpo_trainer.shuffle_sequence_dict is trl.trainer.utils.shuffle_sequence_dict


def test_groups_that_would_be_cut_are_refused(
    model_path: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="batch_size 6 is neither a multiple nor a divisor of"):
        make_trainer(KeepGroupsGRPO, model_path, tokenizer, tmp_path, per_device_train_batch_size=6)


def test_trainers_that_shuffle_otherwise_are_refused_by_name() -> None:
    class Unknown:
        def __init__(self) -> None:
            self.args = types.SimpleNamespace(per_device_train_batch_size=8)
            self.num_generations = 4

        def _prepare_inputs(self, batch: Any) -> Any:
            return batch

    class Trainer(KeepGroupsMixin, Unknown):
        pass

    with pytest.raises(NotImplementedError, match=r"Unknown\._prepare_inputs of TRL 1\."):
        Trainer()


def test_shuffle_groups_moves_runs_of_one_prompt() -> None:
    prompts = torch.tensor([[1, 2], [1, 2], [0, 2], [0, 2], [3, 4], [0, 2], [0, 2]])
    mask = (prompts > 0).long()
    mask[5:] = 1  # the same ids with another mask are another prompt
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": mask,
        "number": torch.arange(7),
        "names": list("abcdefg"),
        "scalar": torch.tensor(5),
        "nothing": None,
    }
    torch.manual_seed(0)
    orders = set()
    for _ in range(50):
        shuffled = shuffle_groups(batch)
        order = shuffled["number"].tolist()
        orders.add(tuple(order))
        assert sorted(order) == list(range(7))
        for run in ((0, 1), (2, 3), (4,), (5, 6)):
            place = order.index(run[0])
            assert tuple(order[place : place + len(run)]) == run
        assert shuffled["names"] == ["abcdefg"[i] for i in order]
        assert torch.equal(shuffled["prompt_ids"], prompts[order])
        assert shuffled["scalar"] == 5
        assert shuffled["nothing"] is None
    assert len(orders) > 12  # of 24


def test_batches_without_prompts_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no prompt_mask among"):
        shuffle_groups({"prompt_ids": torch.zeros(2, 3)})


# ---- prefix tries of AsyncGRPO ----------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    theirs = packing.tree_attention
    serve_tree_attention()
    yield
    packing.tree_attention = theirs
    packing.register_tree_attention()


def samples() -> list[dict[str, Any]]:
    """Two prompts, a fork in a turn, a sample that ends inside another, and a repeated one."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> Tensor:
        return torch.randint(3, 97, (count,), generator=generator)

    first, second, turn = draw(12), draw(5), draw(6)
    texts = [
        (first, draw(4)),
        (first, torch.cat([turn, draw(3)])),
        (first, torch.cat([turn, draw(5)])),
        (first, turn),
        (second, draw(7)),
        (second, draw(1)),
    ]
    texts.append(texts[-2])
    return [
        {
            "input_ids": torch.cat([prompt, completion]),
            "completion_mask": torch.cat(
                [torch.zeros(len(prompt)), torch.ones(len(completion))]
            ).long(),
            "old_log_probs": torch.zeros(len(prompt) + len(completion)),
            "advantage": 1.0 - i,
            "group_id": 0,
        }
        for i, (prompt, completion) in enumerate(texts)
    ]


def packed_row() -> dict[str, Tensor]:
    row = packing.TreeRow()
    for sample in samples():
        row.add(sample)
    return row.pack()


def tree_arguments(row: dict[str, Tensor]) -> dict[str, Any]:
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    longest = row["tree_max_seqlens"].tolist()
    return {name: row[name] for name in names} | {
        "tree_max_seqlen_q": longest[0],
        "tree_max_seqlen_k": longest[1],
    }


def path_attention(
    q: Tensor, k: Tensor, v: Tensor, row: dict[str, Tensor], window: int | None = None
) -> Tensor:
    """What TRL's function computes: the keys and values of every path gathered, (1, T, Hq, D)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    offsets, ends = row["tree_cu_seqlens_q"].tolist(), row["tree_cu_seqlens_k"].tolist()
    pieces = []
    for s in range(len(offsets) - 1):
        path = row["tree_kv_index"][ends[s] : ends[s + 1]]
        keys, own = torch.arange(len(path)), slice(offsets[s], offsets[s + 1])
        queries = keys[len(path) - (own.stop - own.start) :]
        keep = keys <= queries[:, None]
        if window is not None:
            keep &= keys > queries[:, None] - window
        pieces.append(
            nn.functional.scaled_dot_product_attention(
                q[:, :, own], k[:, :, path], v[:, :, path], attn_mask=keep, scale=0.3
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
def test_tree_attention_matches_gathered_paths(window: int | None) -> None:
    row = packed_row()
    generator = torch.Generator().manual_seed(0)
    tokens = len(row["input_ids"])
    shapes = [(1, heads, tokens, 16) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    weight = torch.randn(1, tokens, 4, 16, generator=generator)

    def results(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        if ours:
            layer = nn.Module()
            options = {"scaling": 0.3, "sliding_window": window}
            out, _ = tree_attention(layer, *leaves, None, **tree_arguments(row), **options)
        else:
            out = path_attention(*leaves, row, window)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    exact, pytorch = results(torch.float64, False), results(torch.float32, False)
    shared = results(torch.float32, True)
    for name, a, e, p in zip(("out", "dq", "dk", "dv"), shared, exact, pytorch, strict=True):
        assert_within_budget(name, a, e, p)


@pytest.mark.usefixtures("served")
def test_model_on_trie_matches_samples_alone(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention that TRL's trainer selects by name, under checkpointing."""
    packing.register_tree_attention()  # as the trainer does
    row = packed_row()
    made: list[int] = []
    layout_of_paths = integration._layout_of_paths
    monkeypatch.setattr(
        integration, "_layout_of_paths", lambda *args: made.append(1) or layout_of_paths(*args)
    )

    def results(dtype: torch.dtype, attention: str) -> dict[str, Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, attn_implementation=attention
        ).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if attention == packing.TREE_ATTENTION:
            ids, positions = row["input_ids"][None], row["position_ids"][None]
            arguments = tree_arguments(row)
            logits = model(ids, position_ids=positions, use_cache=False, **arguments).logits[0]
            logits = logits[row["token_index"]]
        else:
            alone = [model(s["input_ids"][None], use_cache=False).logits[0] for s in samples()]
            logits = torch.cat(
                [
                    logits[:-1][sample["completion_mask"][1:] > 0]
                    for logits, sample in zip(alone, samples(), strict=True)
                ]
            )
        targets = torch.cat([s["input_ids"][s["completion_mask"] > 0] for s in samples()])
        log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        (log_probs * row["advantages"].to(dtype)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return {"log_probs": log_probs.detach()} | grads

    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
        exact = results(torch.float64, "sdpa")
    pytorch = results(torch.float32, "sdpa")
    shared = results(torch.float32, packing.TREE_ATTENTION)
    log_probs = [results.pop("log_probs") for results in (shared, exact, pytorch)]
    assert_within_budget("log_probs", *log_probs)
    tokens = sum(len(sample["input_ids"]) for sample in samples())
    assert_model_within_budget("gradients", shared, exact, pytorch, tokens=tokens)
    assert len(made) == 1  # for two layers, forward and recomputed


def segments_of(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """What later versions of TRL hand on besides: parents and depths, padded to more segments."""
    layout = tree_layout(*(row[f"tree_{x}"] for x in ("kv_index", "cu_seqlens_q", "cu_seqlens_k")))
    depths: list[int] = []
    for parent in layout.parents.tolist():
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return {
        "tree_segment_parents": torch.tensor([*layout.parents.tolist(), 0, 0]),
        "tree_segment_depths": torch.tensor([*depths, 0, 0]),
    }


def test_tree_layout_takes_the_tree_from_parents() -> None:
    row = packed_row()
    names = ("kv_index", "cu_seqlens_q", "cu_seqlens_k")
    paths = [row[f"tree_{name}"] for name in names]
    parents, depths = segments_of(row).values()
    want = tree_layout(*paths)
    for given in ([*paths, parents, depths], [None, paths[1], None, parents]):
        layout = tree_layout(*given)
        assert torch.equal(layout.segments, want.segments)
        assert tree_layout(*given) is layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"depths": [0, 1, 2]},
            r"depths\[2\] must be 1, one more than that of its parent 0, got 2",
        ),
        ({"depths": [0, 1]}, "an entry for each of the 3 segments, got 3 and 2"),
        ({"parents": [-1, 0]}, "an entry for each of the 3 segments, got 2"),
        ({"cu_seqlens_k": [0, 2, 5, 10]}, "path of segment 2 must hold 4 rows, as its parent 0"),
        ({"parents": None}, "both tree_kv_index and tree_cu_seqlens_k; got cu_seqlens_q, cu_seql"),
    ],
)
def test_tree_layout_refuses_parents_that_disagree(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "kv_index": None,
        "cu_seqlens_q": [0, 2, 3, 5],
        "cu_seqlens_k": [0, 2, 5, 9],
        "parents": [-1, 0, 0],
        "depths": None,
    }
    values = {n: None if x is None else torch.tensor(x) for n, x in (given | changes).items()}
    values["cu_seqlens_k"] = torch.tensor(changes.get("cu_seqlens_k", [0, 2, 5, 9]))
    with pytest.raises(ValueError, match=message):
        tree_layout(**values)


@pytest.fixture
def hybrid() -> nn.Module:
    """Qwen3.5 with the attention that TRL's trainer selects by name."""
    from tests.integrations.tiny_hybrids import HYBRIDS
    from tests.integrations.tiny_models import build, tiny_config

    if "qwen3_5_text" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"qwen3_5_text is not in transformers {transformers.__version__}")
    model = build(tiny_config("qwen3_5_text", **HYBRIDS["qwen3_5_text"][1]))
    model.set_attn_implementation(packing.TREE_ATTENTION)
    return model


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("segments", [False, True])
def test_hybrid_model_on_trie_matches_samples_alone(hybrid: nn.Module, segments: bool) -> None:
    """Logits and gradients in float64; the tree from paths, or from parents and depths."""
    from tests.integrations.test_transformers_enable import ROUNDING
    from tests.integrations.tiny_models import KeepDouble, deviation

    row = packed_row()
    arguments = tree_arguments(row) | (segments_of(row) if segments else {})

    def results(trie: bool) -> dict[str, Tensor]:
        hybrid.zero_grad(set_to_none=True)
        if trie:
            serve_tree_attention(hybrid)
            ids, positions = row["input_ids"][None], row["position_ids"][None]
            logits = hybrid(ids, position_ids=positions, use_cache=False, **arguments).logits[0]
            logits = logits[row["token_index"]]
        else:
            alone = [hybrid(s["input_ids"][None], use_cache=False).logits[0] for s in samples()]
            pairs = zip(alone, samples(), strict=True)
            logits = torch.cat([x[:-1][s["completion_mask"][1:] > 0] for x, s in pairs])
        (logits.tanh() * row["advantages"].to(logits)[:, None]).sum().backward()
        grads = {name: p.grad for name, p in hybrid.named_parameters()}
        return {"logits": logits.detach()} | grads

    with KeepDouble():
        hybrid.set_attn_implementation("sdpa")
        want = results(False)
        hybrid.set_attn_implementation(packing.TREE_ATTENTION)
        assert deviation(results(True), want) <= ROUNDING


@pytest.mark.usefixtures("served")
def test_hybrid_models_that_nobody_serves_are_refused(hybrid: nn.Module) -> None:
    row = packed_row()
    ids, positions = row["input_ids"][None], row["position_ids"][None]
    call = {"position_ids": positions, "use_cache": False, **tree_arguments(row)}
    with pytest.raises(NotImplementedError, match=r"mix the samples of a trie: call serve_tree_"):
        hybrid(ids, **call)
    serve_tree_attention(mixers_follow=True)
    hybrid.set_attn_implementation(packing.TREE_ATTENTION)
    hybrid(ids, **{**call, "tree_kv_index": row["tree_kv_index"].clone()})


@pytest.mark.usefixtures("served")
def test_enabled_models_are_not_served_as_tries(
    hybrid: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid.set_attn_implementation("sdpa")
    prefix_attn.enable(hybrid)
    refused = partial(pytest.fail, "TRL was changed before the model was refused")
    message = "Qwen3_5TextModel is enabled, but AsyncGRPO packs rows"
    with monkeypatch.context() as patch:
        patch.setattr(packing, "register_tree_attention", refused)
        with pytest.raises(ValueError, match=message):
            serve_tree_attention(hybrid)


def test_tree_layout_is_that_of_the_samples() -> None:
    row = packed_row()
    layout = tree_layout(*(tree_arguments(row)[name] for name in list(tree_arguments(row))[:3]))
    assert torch.equal(layout.position_ids, row["position_ids"])
    paths = {tuple(row["input_ids"][layout.sequence_rows(i)].tolist()) for i in range(5)}
    whole = {tuple(sample["input_ids"].tolist()) for sample in samples()}
    assert paths < whole  # one sample is part of another, one is a repetition
    assert layout.repeated_tokens > layout.num_tokens


def test_tree_layout_follows_its_tensors() -> None:
    kv_index = torch.tensor([0, 1, 0, 1, 2, 0, 1, 3])
    offsets, ends = torch.tensor([0, 2, 3, 4]), torch.tensor([0, 2, 5, 8])
    layout = tree_layout(kv_index, offsets, ends)
    assert tree_layout(kv_index, offsets, ends) is layout
    assert layout.parents.tolist() == [-1, 0, 0]
    kv_index[4:] = torch.tensor([2, 0, 1, 3])
    assert tree_layout(kv_index, offsets, ends) is not layout
    chain = torch.tensor([0, 1, 0, 1, 2, 0, 1, 2, 3])
    kept = tree_layout(kv_index, offsets, ends)
    assert tree_layout(chain, offsets, torch.tensor([0, 2, 5, 9])).parents.tolist() == [-1, 0, 1]
    assert tree_layout(kv_index, offsets, ends) is kept


@pytest.mark.parametrize(
    ("kv_index", "ends", "message"),
    [
        (
            [0, 1, 0, 2, 0, 1, 3],
            [0, 2, 4, 7],
            "path of segment 1",
        ),  # a row of the parent is left out
        ([0, 1, 0, 1, 2, 0, 1, 2], [0, 2, 5, 8], "path of segment 2"),  # not its own rows
        ([0, 1, 0, 1, 3, 2, 0, 1, 3], [0, 2, 6, 9], "path of segment 1"),  # below a later one
        ([0, 1, 0, 1, 9, 2, 0, 1, 3], [0, 2, 6, 9], "path of segment 1"),  # below nothing
        ([0, 1, 2, 3], [0, 4], "got 4 and 2 entries"),
    ],
)
def test_impossible_tries_are_refused(kv_index: list, ends: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_layout(torch.tensor(kv_index), torch.tensor([0, 2, 3, 4]), torch.tensor(ends))


def test_unknown_packing_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "tree_attention", lambda module, query, key, value: None)
    with pytest.raises(NotImplementedError, match=r"does not know TRL 1\..*tree_kv_index"):
        serve_tree_attention()
