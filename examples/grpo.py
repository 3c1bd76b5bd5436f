"""Trains a small transformer with GRPO twice from one seed, ordinarily and with shared prefixes.

The task: long instructions, the same for everyone, then a letter. The model, which starts from
random weights, writes the letters that follow it in the alphabet. The reward is the share of
written letters that follow the one before. Both runs take the same steps, so their curves coincide;
what differs is the time.

    python examples/grpo.py --steps 40 --output grpo.png

With `--micro 2` the run with shared prefixes takes two completions at a time: memory does not grow
with the group, and the instructions still run once for each update.

Needs `pip install prefix-attn[hf]`, matplotlib and tqdm. Runs on a CPU in a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import string
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import prefix_attn
from prefix_attn.losses import (
    cispo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    kalman_advantages,
    prune_completions,
    rebel_loss,
    token_log_probs,
)

LETTERS = string.ascii_lowercase
VOCABULARY = LETTERS + " .,:"
INSTRUCTIONS = (
    "you are a careful writer of the alphabet. below you are given one letter. write the letter "
    "that comes after it, then the letter that comes after that one, and so on, until you are "
    "stopped. after z comes a. do not skip a letter, do not repeat a letter, and do not write "
    "anything but letters. if you ever write a wrong letter, go on from the letter that you wrote. "
    "here is an example: a letter is given as f, you write g h i j k l m and so on. the letter: "
)


@dataclass
class Run:
    """One training run and what it recorded, one entry per step.

    Attributes:
        model: trained in place.
        optimizer: of its parameters.
        noise: source of its samples; both runs have the same.
        micro: completions that it runs at a time, in micro-groups; 0 for all at once.
        rewards: mean reward of the sampled completions.
        losses: of every update.
        seconds: time of the updates; sampling is left out.
        completions: what was sampled, (B, L).
        tokens: of the updates, padding left out.
    """

    model: Qwen3ForCausalLM
    optimizer: torch.optim.Optimizer
    noise: torch.Generator
    micro: int = 0
    rewards: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    completions: list[Tensor] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step trains on, one row per completion, groups next to one another.

    Attributes:
        prompts: (B, P).
        completions: (B, L).
        rewards: (B,).
        advantages: (B,).
        group_sizes: completions of each group that has any.
    """

    prompts: Tensor
    completions: Tensor
    rewards: Tensor
    advantages: Tensor
    group_sizes: list[int]

    def without(self, rate: float) -> Batch:
        """What CPPO leaves: completions with a small advantage teach little. Ragged groups."""
        kept = prune_completions(self.advantages, rate)
        group = torch.arange(len(self.group_sizes)).repeat_interleave(
            torch.tensor(self.group_sizes)
        )
        sizes = group[kept].bincount()
        parts = (self.prompts, self.completions, self.rewards, self.advantages)
        return Batch(*(x[kept] for x in parts), sizes[sizes > 0].tolist())

    def split(self, size: int) -> list[tuple[Tensor, ...]]:
        """Prompts, completions and advantages of so many completions at a time."""
        parts = (self.prompts, self.completions, self.advantages)
        return list(zip(*(x.split(size) for x in parts), strict=True))


def encode(text: str) -> list[int]:
    """One token per character."""
    return [VOCABULARY.index(character) for character in text]


def reward_of(prompts: Tensor, completions: Tensor) -> Tensor:
    """(B,) share of completion tokens that are the letter after the token before them."""
    before = torch.cat([prompts[:, -1:], completions[:, :-1]], dim=1)
    letters = len(LETTERS)
    right = (before < letters) & (completions == (before + 1) % letters)
    return right.float().mean(1)


def new_run(args: argparse.Namespace, *, shared: bool) -> Run:
    """A model of about half a million parameters with random weights, the same for every call."""
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, args.dtype))
    if shared:
        model = prefix_attn.enable(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    noise = torch.Generator().manual_seed(args.seed)
    return Run(model, optimizer, noise, micro=args.micro if shared else 0)


@torch.no_grad()
def sample(run: Run, prompts: Tensor, group: int, length: int) -> Tensor:
    """(B * group, length) completions of (B, P) prompts, `group` next to one another.

    The largest logit plus Gumbel noise is a sample of the softmax: equal logits and equal noise
    give equal samples.
    """
    run.model.eval()
    cache = DynamicCache(config=run.model.config)
    logits = run.model(prompts, past_key_values=cache, use_cache=True).logits[:, -1]
    cache.batch_repeat_interleave(group)
    logits = logits.repeat_interleave(group, dim=0)
    tokens: list[Tensor] = []
    for _ in range(length):
        if tokens:
            logits = run.model(tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1]
        uniform = torch.rand(logits.shape, generator=run.noise, dtype=torch.float64)
        gumbel = -(-uniform.clamp(min=1e-300).log()).log()
        tokens.append((logits.double() + gumbel).argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def inputs_of(prompts: Tensor, completions: Tensor) -> dict[str, Tensor]:
    """An ordinary batch of whole sequences."""
    ids = torch.cat([prompts, completions], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def log_probs_of(
    model: Qwen3ForCausalLM, prompts: Tensor, completions: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, L) log-probabilities and entropies of an ordinary batch, whether prefixes are shared."""
    hidden = model.model(**inputs_of(prompts, completions), use_cache=False)[0]
    rows = hidden[:, prompts.shape[1] - 1 : -1]
    return token_log_probs(rows, model.lm_head.weight, completions, return_entropy=True)


def loss_of(
    log_probs: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    batch: Batch,
    args: argparse.Namespace,
) -> Tensor:
    """The loss that `--loss` names, of some completions: it adds up over the parts of a batch."""
    mask = torch.ones_like(log_probs)
    dtype = log_probs.dtype
    if args.loss == "rebel":  # compares rewards itself, and needs the groups
        rewards = batch.rewards.to(dtype)
        return rebel_loss(log_probs, old, rewards, mask, batch.group_sizes, eta=args.eta)
    advantages = advantages.to(dtype)
    count, tokens = len(batch.completions), batch.completions.numel()
    if args.loss == "cispo":
        return cispo_loss(log_probs, old, advantages, mask, clip_high=4.0, denominator=tokens)
    loss_function = grpo_loss if args.loss == "grpo" else gspo_loss
    return loss_function(log_probs, old, advantages, mask, denominator=count)


def update(run: Run, batch: Batch, olds: list[Tensor], args: argparse.Namespace) -> None:
    """One optimiser step; the first one of a batch records its old log-probabilities."""
    parts = batch.split(run.micro or len(batch.completions))
    first = not olds
    total = 0.0
    run.optimizer.zero_grad()
    announced = [inputs_of(prompts, completions) for prompts, completions, _ in parts]
    with prefix_attn.micro_groups(run.model, announced) if run.micro else nullcontext():
        for i, (prompts, completions, advantages) in enumerate(parts):
            log_probs, entropy = log_probs_of(run.model, prompts, completions)
            loss = loss_of(log_probs, None if first else olds[i], advantages, batch, args)
            loss = loss - args.entropy * entropy.sum() / batch.completions.numel()
            loss.backward()
            total += float(loss.detach())
            if first:
                olds.append(log_probs.detach())
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.losses.append(total)
    run.tokens += batch.prompts.numel() + batch.completions.numel()


def take_step(run: Run, prompts: Tensor, args: argparse.Namespace) -> None:
    """Samples a group per prompt and takes `args.updates` optimiser steps on it."""
    completions = sample(run, prompts, args.group, args.length)
    prompts = prompts.repeat_interleave(args.group, dim=0)
    rewards = reward_of(prompts, completions)
    advantages_of = kalman_advantages if args.advantages == "kalman" else group_advantages
    advantages = advantages_of(rewards, args.group)
    batch = Batch(prompts, completions, rewards, advantages, [args.group] * args.prompts)
    run.rewards.append(float(rewards.mean()))
    run.completions.append(completions)

    start = time.perf_counter()
    if args.prune:
        batch = batch.without(args.prune)
    run.model.train()
    olds: list[Tensor] = []
    for _ in range(args.updates):
        update(run, batch, olds, args)
    run.seconds.append(time.perf_counter() - start)


def train(args: argparse.Namespace) -> tuple[Run, Run]:
    """Both runs, step by step in turn, so that both see the same load of the machine."""
    ordinary, shared = new_run(args, shared=False), new_run(args, shared=True)
    questions = torch.Generator().manual_seed(args.seed)
    instructions = torch.tensor(encode(INSTRUCTIONS)).expand(args.prompts, -1)
    with tqdm(range(args.steps), unit="step", disable=args.quiet) as bar:
        for _ in bar:
            letters = torch.randperm(len(LETTERS), generator=questions)[: args.prompts]
            prompts = torch.cat([instructions, letters[:, None]], dim=1)
            for run in (ordinary, shared):
                take_step(run, prompts, args)
            bar.set_postfix(
                reward=f"{shared.rewards[-1]:.3f}",
                ordinary=f"{ordinary.seconds[-1]:.2f}s",
                shared=f"{shared.seconds[-1]:.2f}s",
            )
    return ordinary, shared


def largest_difference(a: list[float], b: list[float]) -> float:
    """Over all steps."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def first_other_sample(a: Run, b: Run) -> int | None:
    """First step whose sampled completions differ between the runs."""
    for step, (x, y) in enumerate(zip(a.completions, b.completions, strict=True)):
        if not torch.equal(x, y):
            return step
    return None


def report(ordinary: Run, shared: Run, args: argparse.Namespace) -> str:
    """What was measured, as text."""
    other = first_other_sample(ordinary, shared)
    samples = "the same in every step" if other is None else f"different from step {other} on"
    stats = prefix_attn.stats(shared.model)
    tokens_run = shared.tokens - stats.tokens_in + stats.tokens_run  # with those passed through
    slow, fast = median(ordinary.seconds), median(shared.seconds)
    tail = max(1, args.steps // 10)
    return "\n".join(
        [
            f"reward: {sum(shared.rewards[:tail]) / tail:.3f} in the first {tail} steps, "
            f"{sum(shared.rewards[-tail:]) / tail:.3f} in the last {tail}",
            f"largest difference of rewards: "
            f"{largest_difference(ordinary.rewards, shared.rewards):.2e}",
            f"largest difference of losses: "
            f"{largest_difference(ordinary.losses, shared.losses):.2e}",
            f"sampled completions: {samples}",
            f"tokens in: {ordinary.tokens}, run: {tokens_run} "
            f"({ordinary.tokens / tokens_run:.1f}x fewer)",
            f"median time of a step's updates: {slow:.3f} s ordinary, {fast:.3f} s shared "
            f"({slow / fast:.1f}x)",
        ]
    )


def draw(ordinary: Run, shared: Run, args: argparse.Namespace) -> None:
    """Reward and loss of both runs, and the time of a step, on one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom, times) = plt.subplots(
        3, 1, sharex=True, figsize=(7, 7.5), height_ratios=[3, 3, 2], layout="constrained"
    )
    figure.set_facecolor("white")
    wide: dict[str, Any] = {"color": "#E69F00", "linewidth": 5, "label": "ordinary"}
    thin: dict[str, Any] = {"color": "#0072B2", "linewidth": 1.5, "label": "shared prefixes"}
    steps = range(1, args.steps + 1)
    for run, style in ((ordinary, wide), (shared, thin)):
        top.plot(steps, run.rewards, **style)
        updates = [1 + i / args.updates for i in range(len(run.losses))]
        bottom.plot(updates, run.losses, **style)
        label = f"{style['label']}, median {median(run.seconds):.2f} s"
        times.plot(steps, run.seconds, color=style["color"], linewidth=1.5, label=label)
    top.set_ylabel("reward")
    top.set_ylim(0, 1)
    top.legend(loc="upper left", frameon=False)
    bottom.set_ylabel(f"{args.loss.upper()} loss")
    difference = largest_difference(ordinary.losses, shared.losses)
    bottom.set_title(f"largest difference of losses {difference:.1e}", fontsize="medium")
    times.set_ylabel("seconds per step")
    times.set_xlabel("step")
    times.set_yscale("log")
    times.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=2, frameon=False)
    for axes in (top, bottom, times):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", choices=["grpo", "gspo", "cispo", "rebel"], default="grpo")
    parser.add_argument("--eta", type=float, default=1.0, help="nats per reward of --loss rebel")
    parser.add_argument(
        "--advantages", choices=["group", "kalman"], default="group", help="GRPO's or KRPO's"
    )
    parser.add_argument(
        "--prune",
        type=float,
        nargs="?",
        const=0.5,
        default=0.0,
        metavar="RATE",
        help="drop this share of the completions, those that teach least (CPPO); half by default",
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--length", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--updates", type=int, default=2, help="optimiser steps per sampling")
    parser.add_argument(
        "--micro",
        type=int,
        default=0,
        metavar="N",
        help="run N completions at a time with shared prefixes, in micro-groups",
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--entropy", type=float, default=0.0, help="weight of an entropy bonus")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("grpo.png"), help="picture to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    for name, least in {
        "steps": 1, "prompts": 1, "group": 2, "length": 1, "updates": 1, "threads": 1
    }.items():  # fmt: skip
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.micro < 0:
        parser.error(f"--micro must be at least 0, got {args.micro}")
    if args.micro and args.loss == "rebel":
        parser.error("--loss rebel compares all completions of a group: leave --micro out")
    if args.prompts > len(LETTERS):
        parser.error(f"--prompts must be at most {len(LETTERS)}, got {args.prompts}")
    if not 0 <= args.entropy < math.inf:
        parser.error(f"--entropy must be at least 0 and finite, got {args.entropy}")
    if not 0 <= args.prune < 1:
        parser.error(f"--prune must be at least 0 and below 1, got {args.prune}")
    if not 0 < args.eta < math.inf:
        parser.error(f"--eta must be positive and finite, got {args.eta}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr must be positive and finite, got {args.lr}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: pip install matplotlib")
    if args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--output must end in .png, .svg or .pdf, got {args.output}")
    return args


def main(arguments: list[str] | None = None) -> tuple[Run, Run]:
    """Trains, reports, draws."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    ordinary, shared = train(args)
    print(report(ordinary, shared, args))
    draw(ordinary, shared, args)
    print(f"wrote {args.output}")
    return ordinary, shared


if __name__ == "__main__":
    main()
