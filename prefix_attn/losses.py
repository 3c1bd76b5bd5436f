"""Log-probabilities without logits, and the losses of policy optimisation on top of them.

`token_log_probs` reads the language-model head in slices of the vocabulary and recomputes them in
the backward pass: the (T, V) logits never exist. `packed_log_probs` and `completion_log_probs` do
the same on the packed axis, with the label at the fork right for every member; `grpo_loss`,
`gspo_loss` and `dpo_loss` take what they return.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_attn.layout import PrefixLayout

# Logits that are held at a time, unless `chunk_size` says otherwise: what the caches of a CPU hold,
# or 64 MiB of float32.
CPU_CHUNK_ELEMENTS = 2**20
CHUNK_ELEMENTS = 2**24
MIN_CHUNK_SIZE = 128
AGGREGATIONS = ("grpo", "dapo", "dr_grpo")


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    return_entropy: Literal[True],
    chunk_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[targets] with z = softcap(hidden @ weight.T + bias) / temperature.

    Differentiable in hidden, weight and bias. Never holds more logits than rows times
    `chunk_size`, forward and backward.

    Args:
        hidden: (..., H) hidden states, any number of rows.
        weight: (V, H) of the language-model head. May differ from `hidden` in dtype, as it does
            under autocast.
        targets: (...) integers, 0 to V - 1. Leave out rows without a target.
        bias: (V,), -inf for tokens that can't occur.
        temperature: what the logits are divided by, after the cap.
        softcap: raw logits z become `softcap * tanh(z / softcap)`.
        return_entropy: also return the entropy of each row's distribution, differentiable.
        chunk_size: columns of the vocabulary at a time; by default as many as make 2^20 logits on
            the CPU and 2^24 elsewhere, but at least 128.

    Returns:
        (...) float32 (float64 where hidden or weight is), natural logarithms; with
        `return_entropy` a pair of such tensors.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, dtype, device or value is wrong; it names the value.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> token_log_probs(hidden, weight, torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5])
    """
    _check_head(hidden, weight, targets, bias)
    temperature = _positive("temperature", temperature)
    softcap = None if softcap is None else _positive("softcap", softcap)
    if chunk_size is None:
        limit = CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else CHUNK_ELEMENTS
        chunk_size = max(MIN_CHUNK_SIZE, limit // max(1, targets.numel()))
    elif type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
    head = _Head(temperature, softcap, chunk_size, bool(return_entropy))
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    log_probs, entropy, _, _ = _TokenLogProbs.apply(rows, weight, bias, ids, head)
    log_probs = log_probs.reshape(targets.shape)
    return (log_probs, entropy.reshape(targets.shape)) if return_entropy else log_probs


def packed_log_probs(
    hidden: Tensor, weight: Tensor, ids: Tensor, layout: PrefixLayout, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every packed token that has a predecessor on its path.

    The last row of a prefix predicts the first token of each of its children.

    Args:
        hidden: (T, H) hidden states on the packed axis.
        weight: (V, H) of the language-model head.
        ids: (T,) packed token ids.
        layout: of T tokens.
        **options: those of `token_log_probs`.

    Returns:
        (M,), one value for each entry of `layout.target_index`; with `return_entropy` a pair: the
        entropies are those of the rows `layout.predictor_index`.

    Example:
        >>> layout, ids = PrefixLayout.from_sequences([[5, 6, 7, 8], [5, 6, 9]])
        >>> hidden, weight = torch.randn(5, 8), torch.randn(10, 8)
        >>> packed_log_probs(hidden, weight, ids, layout).shape, layout.target_index.tolist()
        (torch.Size([4]), [1, 2, 3, 4])
    """
    _check_packed(hidden, ids, layout)
    targets = ids[layout.target_index]
    return token_log_probs(hidden[layout.predictor_index], weight, targets, **options)


class Completions(NamedTuple):
    """What `completion_log_probs` returns: one right-padded row per sequence.

    Attributes:
        log_probs: (N, L), zero at padding.
        mask: (N, L) bool, True at tokens.
        entropy: (N, L) or None, of the distribution that each token was drawn from.
    """

    log_probs: Tensor
    mask: Tensor
    entropy: Tensor | None


def completion_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    layout: PrefixLayout,
    prompt_lens: int | Sequence[int],
    **options: Any,
) -> Completions:
    """Log-probabilities of each sequence's completion: its tokens from `prompt_lens` on.

    The head runs only on the rows that predict a completion token, once each; where sequences
    share completion tokens their gradients add up.

    Args:
        hidden: (T, H) hidden states on the packed axis.
        weight: (V, H) of the language-model head.
        ids: (T,) packed token ids.
        layout: of T tokens and N sequences; pruned completions are simply not in it.
        prompt_lens: tokens of the prompt, one number for all or one per sequence, at least 1. With
            1 the rows are whole sequences but for their first token.
        **options: those of `token_log_probs`.

    Returns:
        `Completions`, L the longest completion.

    Example:
        >>> layout, ids = PrefixLayout.from_sequences([[5, 6, 7, 8], [5, 6, 9]])
        >>> hidden, weight = torch.randn(5, 8), torch.randn(10, 8)
        >>> completion_log_probs(hidden, weight, ids, layout, prompt_lens=2).mask.tolist()
        [[True, True], [True, False]]
    """
    _check_packed(hidden, ids, layout)
    count, tokens = layout.num_sequences, layout.num_tokens
    starts = [prompt_lens] * count if isinstance(prompt_lens, int) else list(prompt_lens)
    if len(starts) != count:
        raise ValueError(
            f"prompt_lens must have one entry per sequence, {count}, got {len(starts)}"
        )
    paths = layout.unpack(torch.arange(tokens, device=layout.device))
    for i, (start, path) in enumerate(zip(starts, paths, strict=True)):
        if not 1 <= start <= len(path):
            raise ValueError(
                f"prompt_lens must be 1 to the length of the sequence, got {start} for sequence "
                f"{i} of {len(path)} tokens"
            )
    rows = [path[start:] for start, path in zip(starts, paths, strict=True)]
    index, mask = _right_padded(rows, layout.device)
    wanted = index[mask].unique()
    predictor = torch.zeros(tokens, dtype=torch.int64, device=layout.device)
    predictor[layout.target_index] = layout.predictor_index
    result = token_log_probs(hidden[predictor[wanted]], weight, ids[wanted], **options)
    place = torch.zeros_like(predictor)
    place[wanted] = torch.arange(len(wanted), device=layout.device)

    def spread(x: Tensor) -> Tensor:
        if not len(wanted):
            return x.new_zeros(mask.shape) + x.sum()
        return x[place[index]].masked_fill(~mask, 0.0)

    if isinstance(result, tuple):
        return Completions(spread(result[0]), mask, spread(result[1]))
    return Completions(spread(result), mask, None)


def group_advantages(
    rewards: Tensor, group_sizes: int | Sequence[int], *, normalize: bool = True, eps: float = 1e-4
) -> Tensor:
    """(reward - mean of its group) / (standard deviation of its group + eps).

    Args:
        rewards: (B,), the members of a group next to one another.
        group_sizes: members of each group: one number for all groups, or one per group.
        normalize: False leaves the division out, as Dr. GRPO does.
        eps: added to the standard deviation, that of a sample (n - 1).

    Returns:
        (B,) in the dtype of `rewards`. The only member of a group gets zero.

    Example:
        >>> group_advantages(torch.tensor([0.0, 1.0, 5.0]), [2, 1], normalize=False).tolist()
        [-0.5, 0.5, 0.0]
    """
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be a floating-point tensor of shape (B,), got {rewards.dtype} "
            f"{tuple(rewards.shape)}"
        )
    if isinstance(group_sizes, int):
        if group_sizes < 1 or len(rewards) % group_sizes:
            raise ValueError(f"{len(rewards)} rewards don't make groups of {group_sizes}")
        sizes = [group_sizes] * (len(rewards) // group_sizes)
    else:
        sizes = list(group_sizes)
        if sum(sizes) != len(rewards) or min(sizes, default=1) < 1:
            raise ValueError(f"group_sizes {sizes} must be positive and sum to {len(rewards)}")
    advantages = []
    for group in rewards.split(sizes):
        centred = group - group.mean()
        scale = group.std() + eps if normalize and len(group) > 1 else 1.0
        advantages.append(centred / scale)
    return torch.cat(advantages) if advantages else rewards


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    aggregation: str = "grpo",
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL, token by token.

    r is the ratio of the token's probability to the old one, and KL the estimate
    `exp(d) - d - 1` with d the log-ratio of reference to policy, which is never negative.

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,) or (B, L).
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term.
        aggregation: "grpo" takes the mean over each completion's tokens, then over completions;
            "dapo" the mean over all tokens; "dr_grpo" divides by B times `max_length`.
        max_length: longest completion that sampling allows, for "dr_grpo".
        denominator: what the sum is divided by instead of what this batch holds, for batches
            that are run in parts: all completions ("grpo"), all tokens ("dapo"), all completions
            times `max_length` ("dr_grpo").

    Returns:
        Scalar.

    Example:
        >>> log_probs, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> grpo_loss(log_probs, None, torch.tensor([1.0, -1.0]), mask).item()
        0.0
    """
    mask = _check_policy(log_probs, old_log_probs, reference_log_probs, advantages, mask, beta)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {list(AGGREGATIONS)}, got {aggregation!r}")
    if aggregation == "dr_grpo" and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"aggregation 'dr_grpo' needs a positive max_length, got {max_length!r}")
    log_ratio = _log_ratio(log_probs, old_log_probs, mask)
    loss = _clipped(log_ratio.exp(), advantages, clip_low, clip_high)
    loss = loss + beta * _kl(log_probs, reference_log_probs, mask) if beta else loss
    loss = loss.masked_fill(~mask, 0.0)
    if aggregation == "grpo":
        return _over((loss.sum(1) / _lengths(mask)).sum(), denominator, len(mask))
    if aggregation == "dapo":
        return _over(loss.sum(), denominator, mask.sum().clamp(min=1))
    return _over(loss.sum(), denominator, len(mask) * (max_length or 1))


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean over completions of -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + beta KL.

    s is the ratio of the completion's probabilities to the power of one over its length: the
    geometric mean of the token ratios.

    Args:
        log_probs: (B, L) of the policy, one row per completion that is left.
        old_log_probs: (B, L) of the policy that sampled, or None where that is this one.
        advantages: (B,), one per completion.
        mask: (B, L), non-zero at completion tokens. Values elsewhere have no influence.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        reference_log_probs: (B, L) of the reference policy; needed where beta is not 0.
        beta: weight of the KL term, the mean over a completion's tokens.
        denominator: number of completions of a batch that is run in parts.

    Returns:
        Scalar.

    Example:
        >>> log_probs, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
        >>> gspo_loss(log_probs, None, torch.tensor([1.0, 2.0]), mask).item()
        -1.5
    """
    mask = _check_policy(log_probs, old_log_probs, reference_log_probs, advantages, mask, beta)
    if advantages.dim() != 1:
        raise ValueError(
            f"advantages must have shape ({len(mask)},), one per completion, got "
            f"{tuple(advantages.shape)}"
        )
    lengths = _lengths(mask)
    log_ratio = _log_ratio(log_probs, old_log_probs, mask).sum(1) / lengths
    loss = _clipped(log_ratio.exp(), advantages, clip_low, clip_high)
    if beta:
        loss = loss + beta * _kl(log_probs, reference_log_probs, mask).sum(1) / lengths
    # A completion without tokens has no probability to change.
    loss = loss.masked_fill(~mask.any(1), 0.0)
    return _over(loss.sum(), denominator, len(mask))


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    reference_chosen_log_probs: Tensor,
    reference_rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of -log sigmoid(beta (chosen - rejected)), log-ratios to the reference policy.

    Args:
        chosen_log_probs: (B,) of whole completions: `completion_log_probs(...).log_probs.sum(1)`.
        rejected_log_probs: (B,).
        reference_chosen_log_probs: (B,) of the reference policy.
        reference_rejected_log_probs: (B,).
        beta: how far the policy may move from the reference; larger is less.
        label_smoothing: how often the labels are taken to be the wrong way round, 0 to 0.5.

    Returns:
        Scalar.

    Example:
        >>> pair = torch.zeros(1)
        >>> round(dpo_loss(pair, pair, pair, pair).item(), 4)
        0.6931
    """
    tensors = {
        "chosen_log_probs": chosen_log_probs,
        "rejected_log_probs": rejected_log_probs,
        "reference_chosen_log_probs": reference_chosen_log_probs,
        "reference_rejected_log_probs": reference_rejected_log_probs,
    }
    for name, x in tensors.items():
        if x.dim() != 1 or x.shape != chosen_log_probs.shape or not len(x):
            raise ValueError(
                f"{name} must have shape (B,) with B at least 1, as chosen_log_probs "
                f"{tuple(chosen_log_probs.shape)}, got {tuple(x.shape)}"
            )
        if name.startswith("reference") and x.requires_grad:
            raise ValueError(f"{name} must not require gradients; detach it")
    beta = _positive("beta", beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be 0 to 0.5, got {label_smoothing}")
    margin = beta * (
        (chosen_log_probs - reference_chosen_log_probs)
        - (rejected_log_probs - reference_rejected_log_probs)
    )
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()


# ---- log-probabilities in slices of the vocabulary ----------------------------------------------


@dataclass(frozen=True)
class _Head:
    """What turns raw logits into those of the softmax, and how they are cut."""

    temperature: float
    softcap: float | None
    chunk_size: int
    with_entropy: bool

    def slices(self, vocabulary: int) -> Iterator[slice]:
        for start in range(0, vocabulary, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, vocabulary))

    def logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Logits z of some columns, and tanh(raw / softcap) where there is a cap."""
        z = _matmul(hidden, weight[columns].t())
        if bias is not None:
            z += bias[columns]
        capped = None
        if self.softcap is not None:
            capped = z.div_(self.softcap).tanh_()
            z = capped * self.softcap
        return (z if self.temperature == 1 else z.div_(self.temperature)), capped


class _TokenLogProbs(torch.autograd.Function):
    """The running maximum and sum of an online softmax, as in flash attention."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        with _no_autocast(hidden):
            hidden = _widened(hidden, weight)
            top = hidden.new_full(targets.shape, -math.inf, dtype=_sum_dtype(hidden, weight))
            total, moment, chosen = torch.zeros_like(top), torch.zeros_like(top), top.clone()
            for columns in head.slices(weight.shape[0]):
                z, _ = head.logits(hidden, weight, bias, columns)
                place, inside = _places(targets, columns)
                chosen = torch.where(inside, z.gather(1, place)[:, 0], chosen)
                new_top = torch.maximum(top, z.amax(1))
                # A row whose logits are all -inf so far stays at a total of zero.
                zero = new_top.masked_fill(new_top == -math.inf, 0.0)
                shift = (top - zero).masked_fill(top == -math.inf, 0.0)
                z -= zero[:, None]
                weights = z.exp()
                if head.with_entropy:
                    # sum of exp(z - top) (z - top), a term of -inf being a limit of zero
                    z.masked_fill_(weights == 0, 0.0)
                    moment = shift.exp() * (moment + shift * total) + (weights * z).sum(1)
                total = shift.exp() * total + weights.sum(1)
                top = new_top
            log_total = total.log()
            log_probs = (chosen - top) - log_total
            entropy = log_total - moment / total if head.with_entropy else None
        return log_probs, entropy, top, log_total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, targets, ctx.head = inputs
        _, entropy, top, log_total = output
        ctx.mark_non_differentiable(top, log_total)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, top, log_total)

    @staticmethod
    def backward(
        ctx: Any, d_log_probs: Tensor | None, d_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        grads = _TokenLogProbsBackward.apply(
            d_log_probs, d_entropy, *ctx.saved_tensors, ctx.head, ctx.needs_input_grad[:3]
        )
        return (*grads, None, None)


class _TokenLogProbsBackward(torch.autograd.Function):
    """The gradients, slice by slice; their own derivative is an error.

    `once_differentiable` alone would drop the second derivative in silence where the gradient of
    the result is a constant.
    """

    @staticmethod
    def forward(
        d_log_probs: Tensor | None,
        d_entropy: Tensor | None,
        raw_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        entropy: Tensor,
        top: Tensor,
        log_total: Tensor,
        head: _Head,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if d_log_probs is None:
            d_log_probs = torch.zeros_like(top)
        with _no_autocast(raw_hidden):
            hidden = _widened(raw_hidden, weight)
            d_hidden = hidden.new_zeros(hidden.shape, dtype=top.dtype) if needs[0] else None
            d_weight = torch.empty_like(weight) if needs[1] else None
            d_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
            for columns in head.slices(weight.shape[0]):
                z, capped = head.logits(hidden, weight, bias, columns)
                log_p = z.sub_(top[:, None]).sub_(log_total[:, None])
                p = log_p.exp()
                # d log p[target] / dz = (z is the target's) - p
                dz = p * -d_log_probs[:, None]
                place, inside = _places(targets, columns)
                hit = torch.where(inside, d_log_probs, 0.0)[:, None]
                dz.scatter_(1, place, dz.gather(1, place) + hit)
                if d_entropy is not None:
                    # d entropy / dz = -p (log p + entropy)
                    log_p.add_(entropy[:, None]).mul_(p).masked_fill_(p == 0, 0.0)
                    dz.addcmul_(log_p, d_entropy[:, None], value=-1.0)
                if head.temperature != 1:
                    dz.div_(head.temperature)
                if capped is not None:
                    dz.mul_(capped.square_().neg_().add_(1.0))
                if d_bias is not None:
                    d_bias[columns] = dz.sum(0)
                dz = dz.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden += _matmul(dz, weight[columns])
                if d_weight is not None:
                    d_weight[columns] = _matmul(dz.t(), hidden)
        if d_hidden is not None:
            d_hidden = d_hidden.to(raw_hidden.dtype)
        return d_hidden, d_weight, d_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("token_log_probs can be differentiated once only")


def _places(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target within a slice (T, 1), clamped, and whether it lies in it (T,)."""
    place = targets - columns.start
    width = columns.stop - columns.start
    return place.clamp(0, width - 1)[:, None], (place >= 0) & (place < width)


def _sum_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _widened(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden in the dtype of the sums; as it is where the GPU multiplies half types into it."""
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.element_size() == 2:
        return hidden
    return hidden.to(_sum_dtype(hidden, weight))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in the dtype of its sums."""
    dtype = _sum_dtype(a, b)
    if a.dtype == b.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _no_autocast(x: Tensor) -> Any:
    """Autocast would round the slices of logits to a half type."""
    return torch.autocast(x.device.type, enabled=False)


# ---- pieces of the losses -----------------------------------------------------------------------


def _right_padded(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged rows as (N, L), padded with zeros, and the mask of what is not padding."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    longest = max((len(row) for row in rows), default=0)
    index = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row
    return index, torch.arange(longest, device=device) < lengths[:, None]


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor | None, mask: Tensor) -> Tensor:
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    # Chosen before the difference: what stands at padding may be infinite.
    return torch.where(mask, log_probs, 0.0) - torch.where(mask, old, 0.0)


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be 0 to 1, got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _kl(log_probs: Tensor, reference_log_probs: Tensor | None, mask: Tensor) -> Tensor:
    """exp(d) - d - 1, the "k3" estimate of KL(policy, reference): zero at padding."""
    d = -_log_ratio(log_probs, reference_log_probs, mask)
    return torch.expm1(d) - d


def _lengths(mask: Tensor) -> Tensor:
    """Tokens of each completion, at least 1 so as to divide by."""
    return mask.sum(1).clamp(min=1)


def _over(total: Tensor, denominator: float | Tensor | None, default: float | Tensor) -> Tensor:
    if denominator is None:
        denominator = default
        if isinstance(default, (int, float)) and default <= 0:
            raise ValueError("the batch has no completions to take the mean of: pass denominator")
    elif not isinstance(denominator, Tensor):
        denominator = _positive("denominator", denominator)
    return total / denominator


# ---- checks -------------------------------------------------------------------------------------


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        tensors["bias"] = bias
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device}, {name} on {x.device}")
        if name != "targets" and not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (V, H), got {tuple(weight.shape)}")
    vocabulary, width = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden must have shape (..., {width}), as the weight, got {tuple(hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have shape {tuple(hidden.shape[:-1])}, one per row of hidden, got "
            f"{tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias must have shape ({vocabulary},), got {tuple(bias.shape)}")
    if targets.numel():
        least, most = torch.stack(targets.aminmax()).tolist()
        if least < 0 or most >= vocabulary:
            wrong = least if least < 0 else most
            raise ValueError(
                f"targets must be 0 to {vocabulary - 1}, got {wrong}; leave out the rows without a "
                f"target, such as hidden[mask] and targets[mask]"
            )


def _check_packed(hidden: Tensor, ids: Tensor, layout: PrefixLayout) -> None:
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"layout must be a PrefixLayout, got {type(layout).__name__}")
    for name, x in (("hidden", hidden), ("ids", ids)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.device != layout.device:
            raise ValueError(f"the layout is on {layout.device}, {name} on {x.device}")
    tokens = layout.num_tokens
    if layout.num_queries != tokens:
        raise ValueError(
            f"the layout has queries for {layout.num_queries} of {tokens} tokens: the rows that "
            "predict are not all there; call token_log_probs with your own rows"
        )
    if hidden.dim() != 2 or len(hidden) != tokens:
        raise ValueError(f"hidden must have shape ({tokens}, H), got {tuple(hidden.shape)}")
    if ids.shape != (tokens,):
        raise ValueError(f"ids must have shape ({tokens},), got {tuple(ids.shape)}")


def _check_policy(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    reference_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    beta: float,
) -> Tensor:
    """Refuses what does not fit together; returns the mask as bool."""
    if log_probs.dim() != 2 or not log_probs.is_floating_point():
        raise ValueError(
            f"log_probs must be a floating-point tensor of shape (B, L), got {log_probs.dtype} "
            f"{tuple(log_probs.shape)}"
        )
    shape = tuple(log_probs.shape)
    constants = {
        "old_log_probs": old_log_probs,
        "reference_log_probs": reference_log_probs,
        "mask": mask,
    }
    for name, x in constants.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, as log_probs, got {tuple(x.shape)}")
    if tuple(advantages.shape) not in (shape, shape[:1]):
        raise ValueError(
            f"advantages must have shape {shape[:1]} or {shape}, got {tuple(advantages.shape)}"
        )
    for name, x in {**constants, "advantages": advantages}.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} must not require gradients; detach it")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a number of at least 0, got {beta!r}")
    if beta and reference_log_probs is None:
        raise ValueError(f"beta is {beta}: reference_log_probs are needed")
    return mask.bool()


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)
