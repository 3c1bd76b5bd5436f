"""Calls of enabled models on several ranks, and how they are compared with one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import prefix_attn
import prefix_attn.integrations.distributed  # before the ranks are forked
import prefix_attn.integrations.transformers  # registers the attention
from prefix_attn.losses import packed_log_probs
from prefix_attn.shards import WAYS
from tests.integrations.tiny_models import (
    VOCAB,
    KeepDouble,
    allowed_rounding,
    build,
    deviation,
    pad,
    rows_that_share,
    run,
    tiny_config,
)

# Two orders above the deviation of float64 runs whose norms compute in float32.
ROUNDING = 1e2 * torch.finfo(torch.float32).eps
HEADS = {  # that the ranks can share
    2: {},
    3: {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
    4: {},  # two KV heads: fewer than ranks
    8: {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128},
}


def config_of(name: str, group: Any, **changes: Any) -> Any:
    return tiny_config(name, **{**HEADS[group.size()], **changes})


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """An ordinary batch with the positions that trainers hand over."""
    batch = pad(rows, side)
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def slice_of(batch: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """This rank's columns, which the batch has in a multiple of the ranks."""
    n, rank = batch["input_ids"].shape[1] // group.size(), group.rank()
    return {name: x[:, rank * n : (rank + 1) * n] for name, x in batch.items()}


def divisible(batch: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """Padded at its end; positions of padding start anew, as verl numbers them."""
    more = -batch["input_ids"].shape[1] % ranks
    padded = {name: torch.nn.functional.pad(x, (0, more)) for name, x in batch.items()}
    if "position_ids" in batch and more:
        padded["position_ids"][:, -more:] = torch.arange(more)
    return padded


def enabled(
    model: Any, group: Any, inputs: str = "whole", way: str = "auto", **options: Any
) -> Any:
    return prefix_attn.enable(
        model,
        sequence_parallel_group=group,
        sequence_parallel_inputs=inputs,
        sequence_parallel_way=way,
        **options,
    )


def summed(model: Any, group: Any, factor: float = 1.0) -> dict[str, Tensor]:
    """Every gradient, summed over the ranks, by name."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = torch.cat([grad.flatten() for grad in grads.values()]) * factor
    dist.all_reduce(whole, group=group)
    parts = whole.split([grad.numel() for grad in grads.values()])
    return {name: part.view_as(grads[name]) for name, part in zip(grads, parts, strict=True)}


def weights_of(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)


def run_whole(model: Any, batch: dict[str, Tensor], group: Any, **options: Any) -> dict:
    """The same loss on every rank: the mean of the ranks' gradients is that of one process."""
    logits = run(model, batch, **options)["logits"]
    return {"logits": logits} | summed(model, group, 1 / group.size())


def run_slices(model: Any, batch: dict[str, Tensor], group: Any, **options: Any) -> dict:
    """A loss for each rank's own columns: the sum of the ranks' gradients is that of their sum."""
    model.zero_grad(set_to_none=True)
    length = batch["input_ids"].shape[1]
    whole = divisible(batch, group.size())
    own = slice_of(whole, group)
    out = model(**own, **{"use_cache": False, **options})
    mask = own.get("attention_mask", torch.ones_like(own["input_ids"])).bool()
    n = mask.shape[1]
    parts = [torch.empty_like(out.logits) for _ in range(group.size())]
    dist.all_gather(parts, out.logits.detach().contiguous(), group=group)
    logits = torch.cat(parts, 1)[:, :length]
    # The loss of `loss_of`, whose weights are drawn for the tokens of the whole batch.
    real = whole.get("attention_mask", torch.ones_like(whole["input_ids"])).bool()
    real[:, length:] = False
    weights = torch.zeros(*real.shape, VOCAB, dtype=logits.dtype)
    kept = logits[real[:, :length]]
    weights[real] = weights_of(kept if "attention_mask" in batch else logits).view_as(kept)
    weights = weights[:, group.rank() * n : (group.rank() + 1) * n]
    (torch.tanh(out.logits) * weights).sum().backward()
    return {"logits": kept if "attention_mask" in batch else logits} | summed(model, group)


_truths: dict[str, tuple[dict[str, Tensor], float]] = {}


def _alone(
    config: Any, batch: dict[str, Tensor], options: dict[str, Any], group: Any
) -> tuple[dict[str, Tensor], float]:
    """What one process gets in float64, and by how much rounding may change that of the ranks.

    Rank 0 runs it for all of them, which have fewer cores than ranks.
    """
    key = f"{config.to_diff_dict()} {[(n, x.tolist()) for n, x in batch.items()]} {options}"
    if key not in _truths:
        told: list[Any] = [None]
        if group.rank() == 0:
            with KeepDouble():
                expected = run(build(config).eval(), batch, **options)
            # Besides the one process, each rank rounds its part by itself.
            runs = 1 + group.size()
            told = [(expected, allowed_rounding(config, batch, runs, **options))]
        dist.broadcast_object_list(told, group=group, group_src=0)
        _truths[key] = told[0]
    return _truths[key]


def assert_exact(
    config: Any, batch: dict[str, Tensor], group: Any, inputs: str = "whole", **options: Any
) -> None:
    """Logits and gradients of the ranks together are those of one process, in both ways."""
    truth, ways = options.pop("truth", batch), options.pop("ways", WAYS)
    expected, allowed = _alone(config, truth, options, group)
    runs = {"whole": run_whole, "slices": run_slices}
    for way in ways:
        with KeepDouble():
            model = enabled(build(config).eval(), group, inputs, way)
            found = runs[inputs](model, batch, group, **options)
        counts = prefix_attn.stats(model)
        assert (counts.calls, counts.packed_calls) == (1, 1)
        logits = expected["logits"].view_as(found["logits"])
        difference = deviation(found, expected | {"logits": logits})
        assert difference <= allowed, (way, difference, allowed)


def packed_inputs(
    layout: prefix_attn.PrefixLayout | None = None,
) -> tuple[prefix_attn.PrefixLayout, Tensor, Tensor]:
    """The layout, packed ids, and a weight for each pair of predictor and target."""
    generator = torch.Generator().manual_seed(5)
    if layout is None:
        layout, ids = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    else:
        ids = torch.randint(3, VOCAB, (layout.num_tokens,), generator=generator)
    count = len(layout.target_index)
    return layout, ids, torch.randn(count, generator=generator, dtype=torch.float64)


def hidden_of(model: Any, ids: Tensor, position_ids: Tensor, layout: Any) -> Tensor:
    return model.model(
        input_ids=ids[None],
        position_ids=position_ids[None],
        prefix_layout=layout,
        use_cache=False,
    ).last_hidden_state[0]


def whole_log_probs(
    config: Any, layout: prefix_attn.PrefixLayout, ids: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of one process, and the gradients of their weighted sum."""
    model = build(config, attn_implementation="prefix_attn")
    hidden = hidden_of(model, ids, layout.position_ids, layout)
    log_probs = packed_log_probs(hidden, model.lm_head.weight, ids, layout)
    (log_probs * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return log_probs.detach(), {"logits": torch.ones(1)} | grads


LONG, EACH, MEMBERS = 96, 16, 4  # T = 160


def long_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(n: int) -> Tensor:
        return torch.randint(3, VOCAB, (n,), generator=generator)

    prompt = draw(LONG)
    return pad([torch.cat([prompt, draw(EACH)]) for _ in range(MEMBERS)])
