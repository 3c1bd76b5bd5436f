"""Log-probabilities without logits, of ordinary rows and of the packed axis.

`token_log_probs` reads the language-model head in slices of the vocabulary and recomputes them in
the backward pass: the (T, V) logits never exist. `packed_log_probs` and `completion_log_probs` do
the same on the packed axis, with the label at the fork right for every member.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from prefix_attn.layout import PrefixLayout
from prefix_attn.losses.checks import (
    integers,
    is_integer,
    positive,
    tensors_on_one_device,
)
from prefix_attn.losses.pieces import right_padded
from prefix_attn.losses.sharded import VocabularyShard, is_dtensor, local, placed_like
from prefix_attn.shards import RowShard, sum_over_ranks

# Logits that are held at a time, unless `chunk_size` says otherwise: what the caches of a CPU hold,
# or 64 MiB of float32.
CPU_CHUNK_ELEMENTS = 2**20
CHUNK_ELEMENTS = 2**24
MIN_CHUNK_SIZE = 128


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
    `chunk_size`, forward and backward. A head whose vocabulary is sharded over ranks is read where
    it lies: hidden a DTensor with [Replicate()], weight (and bias) with [Shard(0)].

    Args:
        hidden: (..., H) hidden states, any number of rows.
        weight: (V, H) of the language-model head. May differ from `hidden` in dtype, as it does
            under autocast.
        targets: (...) integers, 0 to V - 1. Leave out rows without a target.
        bias: (V,), -inf for tokens that can't occur.
        temperature: what the logits are divided by, after the cap; 1e-19 to 9e18, in float64
            1e-154 to 7e153, so that quotients stay finite.
        softcap: raw logits z become `softcap * tanh(z / softcap)`; bounded like `temperature`.
        return_entropy: also return the entropy of each row's distribution, differentiable.
        chunk_size: columns of the vocabulary at a time; by default as many as make 2^20 logits on
            the CPU and 2^24 elsewhere, but at least 128.

    Returns:
        (...) float32 (float64 where hidden or weight is), natural logarithms; with
        `return_entropy` a pair of such tensors. Replicated DTensors where hidden is one.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a shape, dtype, device or value is wrong; it names the value.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> token_log_probs(hidden, weight, torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5])
    """
    _check_head(hidden, weight, targets, bias)
    given, shard = hidden, None
    if any(map(is_dtensor, (hidden, weight, targets, bias))):
        shard = VocabularyShard.from_head(hidden, weight, targets, bias)
        hidden, weight, targets = local(hidden), local(weight), local(targets)
        bias = None if bias is None else local(bias)
    dtype = _sum_dtype(hidden, weight)
    temperature = positive("temperature", temperature, dtype)
    softcap = None if softcap is None else positive("softcap", softcap, dtype)
    if chunk_size is None:
        limit = CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else CHUNK_ELEMENTS
        chunk_size = max(MIN_CHUNK_SIZE, limit // max(1, targets.numel()))
    elif not is_integer(chunk_size) or int(chunk_size) < 1:
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
    head = _Head(temperature, softcap, int(chunk_size), bool(return_entropy), shard)
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    log_probs, entropy, _, _ = _TokenLogProbs.apply(rows, weight, bias, ids, head)
    log_probs = placed_like(given, log_probs.reshape(targets.shape))
    if not return_entropy:
        return log_probs
    return log_probs, placed_like(given, entropy.reshape(targets.shape))


def packed_log_probs(
    hidden: Tensor, weight: Tensor, ids: Tensor, layout: PrefixLayout | RowShard, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every packed token that has a predecessor on its path.

    The last row of a prefix predicts the first token of each of its children.

    With a `RowShard` each rank of its group gets the log-probabilities that its own rows predict.
    A loss of these is then a PART of the whole loss, and gradients are those of the SUM of the
    parts: where DDP or FSDP averages gradients over the group's ranks, multiply the part by their
    number. Whatever the loss divides by must count the tokens of all ranks.

    Args:
        hidden: (T, H) hidden states on the packed axis; (n, H) those of `shard.rows`.
        weight: (V, H) of the language-model head.
        ids: (T,) packed token ids, all of them under a shard too.
        layout: of T tokens, or the `RowShard` of this rank.
        **options: those of `token_log_probs`.

    Returns:
        (M,), one value for each entry of `layout.target_index`; with `return_entropy` a pair: the
        entropies are those of the rows `layout.predictor_index`. Under a shard one value for each
        of `shard.pairs`, the numbers of these entries: `weights[shard.pairs]` are their weights.

    Example:
        >>> layout, ids = PrefixLayout.from_sequences([[5, 6, 7, 8], [5, 6, 9]])
        >>> hidden, weight = torch.randn(5, 8), torch.randn(10, 8)
        >>> packed_log_probs(hidden, weight, ids, layout).shape, layout.target_index.tolist()
        (torch.Size([4]), [1, 2, 3, 4])
    """
    _check_packed(hidden, ids, layout)
    if isinstance(layout, RowShard):
        whole, pairs = layout.layout, layout.pairs
        predictors = layout.places[whole.predictor_index[pairs]]
        targets = whole.target_index[pairs]
    else:
        predictors, targets = layout.predictor_index, layout.target_index
    return token_log_probs(hidden[predictors], weight, ids[targets], **options)


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
    layout: PrefixLayout | RowShard,
    prompt_lens: int | Sequence[int],
    **options: Any,
) -> Completions:
    """Log-probabilities of each sequence's completion: its tokens from `prompt_lens` on.

    The head runs once for each completion token of the layout, on the row that predicts it; where
    sequences share completion tokens their gradients add up.

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
    shard = layout if isinstance(layout, RowShard) else None
    layout = layout.layout if isinstance(layout, RowShard) else layout
    count, tokens = layout.num_sequences, layout.num_tokens
    starts = integers("prompt_lens", prompt_lens, count)
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
    index, mask = right_padded(rows, layout.device)
    wanted = index[mask].unique()
    predictor = torch.zeros(tokens, dtype=torch.int64, device=layout.device)
    predictor[layout.target_index] = layout.predictor_index
    if shard is None:
        result = token_log_probs(hidden[predictor[wanted]], weight, ids[wanted], **options)
    else:
        result = _of_all_ranks(hidden, weight, ids, shard, predictor[wanted], wanted, options)
    place = torch.zeros_like(predictor)
    place[wanted] = torch.arange(len(wanted), device=layout.device)

    def spread(x: Tensor) -> Tensor:
        if not len(wanted):
            return x.new_zeros(mask.shape) + x.sum()
        return x[place[index]].masked_fill(~mask, 0.0)

    if isinstance(result, tuple):
        return Completions(spread(result[0]), mask, spread(result[1]))
    return Completions(spread(result), mask, None)


def _of_all_ranks(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    shard: RowShard,
    predictors: Tensor,
    targets: Tensor,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, ...]:
    """What `token_log_probs` gives for some pairs, each from the rank that has its predictor.

    Args:
        hidden: (n, H) of the own rows.
        weight: (V, H).
        ids: (T,).
        shard: of this rank.
        predictors: (W,) packed rows.
        targets: (W,) packed rows that they predict.
        options: those of `token_log_probs`.
    """
    places = shard.places[predictors]
    own = (places >= 0).nonzero()[:, 0]
    found = token_log_probs(hidden[places[own]], weight, ids[targets[own]], **options)

    def spread(x: Tensor) -> Tensor:
        return sum_over_ranks(x.new_zeros(len(places)).index_put((own,), x), shard.group)

    return tuple(map(spread, found)) if isinstance(found, tuple) else spread(found)


# ---- log-probabilities in slices of the vocabulary ----------------------------------------------


@dataclass(frozen=True)
class _Head:
    """What turns raw logits into those of the softmax, and how they are cut."""

    temperature: float
    softcap: float | None
    chunk_size: int
    with_entropy: bool
    shard: VocabularyShard | None

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

    def places(self, targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Column of each target within a slice (T, 1), clamped, and whether it lies in it (T,)."""
        first = columns.start + (0 if self.shard is None else self.shard.first)
        place, width = targets - first, columns.stop - columns.start
        return place.clamp(0, width - 1)[:, None], (place >= 0) & (place < width)


class _TokenLogProbs(torch.autograd.Function):
    """The running maximum and sum of an online softmax, as in flash attention."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        with _no_autocast(hidden):
            hidden = _widened(hidden, weight)
            top = hidden.new_full(targets.shape, -math.inf, dtype=_sum_dtype(hidden, weight))
            total, moment = torch.zeros_like(top), torch.zeros_like(top)
            # Ranks that don't hold a target add nothing to its logit.
            chosen = top.clone() if head.shard is None else torch.zeros_like(top)
            for columns in head.slices(weight.shape[0]):
                z, _ = head.logits(hidden, weight, bias, columns)
                place, inside = head.places(targets, columns)
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
            if head.shard is not None:
                top, total, moment, chosen = head.shard.combine(top, total, moment, chosen)
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
                place, inside = head.places(targets, columns)
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
            if head.shard is not None:
                d_hidden = head.shard.sum(d_hidden)
            d_hidden = d_hidden.to(raw_hidden.dtype)
        return d_hidden, d_weight, d_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("token_log_probs can be differentiated once only")


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


# ---- checks -------------------------------------------------------------------------------------


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    tensors_on_one_device({"hidden": hidden, "weight": weight, "targets": targets}, {"bias": bias})
    for name, x in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must have shape (V, H), got {tuple(weight.shape)}; gather a head that "
            "FSDP1 or DeepSpeed has sharded"
        )
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
        least, most = torch.stack(local(targets).long().aminmax()).tolist()
        if least < 0 or most >= vocabulary:
            wrong = least if least < 0 else most
            raise ValueError(
                f"targets must be 0 to {vocabulary - 1}, got {wrong}; leave out the rows without a "
                f"target, such as hidden[mask] and targets[mask]"
            )


def _check_packed(hidden: Tensor, ids: Tensor, layout: PrefixLayout | RowShard) -> None:
    if not isinstance(layout, (PrefixLayout, RowShard)):
        raise TypeError(f"layout must be a PrefixLayout, got {type(layout).__name__}")
    for name, x in (("hidden", hidden), ("ids", ids)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if is_dtensor(x):
            raise ValueError(
                f"{name} must be a plain tensor, got a DTensor; for a sharded head call "
                "token_log_probs with rows of your own"
            )
        if x.device != layout.device:
            raise ValueError(f"the layout is on {layout.device}, {name} on {x.device}")
    rows = layout.num_rows if isinstance(layout, RowShard) else layout.num_tokens
    layout = layout.layout if isinstance(layout, RowShard) else layout
    tokens = layout.num_tokens
    if layout.num_queries != tokens:
        raise ValueError(
            f"the layout has queries for {layout.num_queries} of {tokens} tokens: the rows that "
            "predict are not all there; call token_log_probs with your own rows"
        )
    if hidden.dim() != 2 or len(hidden) != rows:
        raise ValueError(f"hidden must have shape ({rows}, H), got {tuple(hidden.shape)}")
    if ids.shape != (tokens,):
        raise ValueError(f"ids must have shape ({tokens},), got {tuple(ids.shape)}")
