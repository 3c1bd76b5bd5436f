"""What tests of exactness share: the error budget, its yardstick, inputs, results and forests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout

# Blocks of a tensor that are judged on their own hold this many (row, head) pairs or more: the root
# mean square of fewer errors says more about luck than about a kernel.
BLOCK_ROWS = 64

# ---- the budget ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How far a result is from float64, beside PyTorch's own distance.

    Attributes:
        name: what was compared.
        rows: those that were, where it was a part.
        error: root mean square of the errors.
        pytorch: the same of PyTorch.
        limit: what `error` may be.
        largest: largest absolute error.
        pytorch_largest: the same of PyTorch.
        largest_limit: what `largest` may be.
    """

    name: str
    rows: slice | None
    error: float
    pytorch: float
    limit: float
    largest: float
    pytorch_largest: float
    largest_limit: float

    @property
    def share(self) -> float:
        """The part of the budget that is used, above 1 where a limit is exceeded.

        It is infinite where an error is not finite, or PyTorch's, which then excuses nothing. A
        limit is zero where nothing may be wrong: in an empty tensor, or where all is zero.
        """
        used = 0.0
        for error, limit in ((self.error, self.limit), (self.largest, self.largest_limit)):
            if not math.isfinite(error) or not math.isfinite(limit) or error > limit == 0:
                return math.inf
            used = max(used, error / limit if limit else 0.0)
        return used

    @property
    def ok(self) -> bool:
        """Whether both errors are within their limits."""
        return self.share <= 1

    def summary(self) -> dict[str, Any]:
        """What is worth printing: name, error, PyTorch's error, limit, and whether it is ok."""
        names = ("name", "error", "pytorch", "limit", "ok")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        rows = f"[{self.rows.start}:{self.rows.stop}]" if self.rows else ""
        return (
            f"{self.name}{rows}: root mean square error {self.error:.2e} (limit {self.limit:.2e}, "
            f"PyTorch {self.pytorch:.2e}), largest {self.largest:.2e} "
            f"(limit {self.largest_limit:.2e}, PyTorch {self.pytorch_largest:.2e})"
        )


def compare(
    name: str,
    actual: Tensor,
    exact: Tensor,
    pytorch: Tensor,
    *,
    size: float = 0.0,
    growth: float = 1.0,
    factors: int = 1,
    rounded: float = 0.0,
    dtype: torch.dtype | None = None,
    rows: slice | None = None,
) -> Comparison:
    """Holds a result against float64: it may be twice as far from it as PyTorch is.

        rms(actual - exact) <= 2 rms(pytorch - exact) + (u / sqrt(rows) + a growth) size + u rounded
        max|actual - exact| <= 2 max|pytorch - exact| + (u + a growth) max(|exact|, peak size)

    The root mean square is the judge: it does not hang on one element, so it is the same on every
    processor, and it notices an error that is small and everywhere. The maximum, which is looser,
    notices an error in one place. What stands behind the first term covers what PyTorch's error
    can't tell:

    * one row that PyTorch gets right by luck, such as that of a single key, where softmax is 1. Its
      error is at most one rounding u of the result, and it is one of `rows`;
    * another order of summation. The rounding errors of n terms grow like sqrt(n) a (Higham and
      Mary, A new approach to probabilistic rounding error analysis, 2019): `growth` is that root;
    * elements larger than others: the largest of n products of m normal values is about
      `peak = (1 + 2/m ln n)^(m/2)` times their root mean square;
    * what only some kernels round: `rounded` is the size of it.

    Args:
        name: what is compared.
        actual: result under test; the last dimension of three or more belongs to one row.
        exact: the same in float64.
        pytorch: what PyTorch computes in the dtype under test, gathered in float64 or not.
        size: root mean square of the terms that are added up, where they cancel; at least that of
            `exact` is taken.
        growth: square root of the number of terms.
        factors: m, how many inputs are multiplied in the error of a term.
        rounded: root mean square of what the kernel rounds to the dtype, and PyTorch need not.
        dtype: of the values that are rounded, that of `actual` by default. Its unit roundoff is u;
            a is that of the accumulator, float32 or better.
        rows: only these are compared.
    """
    dtype = actual.dtype if dtype is None else dtype
    if rows is not None:
        actual, exact, pytorch = (x[rows] for x in (actual, exact, pytorch))
    unit = torch.finfo(dtype).eps / 2
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    exact = exact.detach().double()
    error, budget = (x.detach().double() - exact for x in (actual, pytorch))
    count = max(1, exact[..., 0].numel() if exact.dim() > 2 else exact.numel())
    size = max(size, _rms(exact))
    peak = (1 + 2 / factors * math.log(max(1, exact.numel()))) ** (factors / 2)
    rounding = accumulator * growth
    return Comparison(
        name=name,
        rows=rows,
        error=_rms(error),
        pytorch=_rms(budget),
        limit=2 * _rms(budget) + (unit / math.sqrt(count) + rounding) * size + unit * rounded,
        largest=_largest(error),
        pytorch_largest=_largest(budget),
        largest_limit=2 * _largest(budget) + (unit + rounding) * max(_largest(exact), peak * size),
    )


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, pytorch: Tensor, **terms: Any
) -> None:
    """Fails unless `actual` is about as near to float64 as PyTorch is: see `compare`.

    Raises:
        AssertionError: with errors and limits.
    """
    comparison = compare(name, actual, exact, pytorch, **terms)
    if not comparison.ok:
        raise AssertionError(f"{comparison} against float64")


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


# ---- the yardstick ------------------------------------------------------------------------------


def repeated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs every sequence whole, as PyTorch does: what sharing must reproduce.

    Without options each sequence is a call of `scaled_dot_product_attention`. With options, and
    where PyTorch has no fused kernel (D other than DV, a scale that is not positive, a dtype that
    this processor can't run), it is the formula that models write out. Its products have the dtype;
    they add up in float32 or better.

    Sequences are computed in `dtype`, gathered and summed in the dtype of q: with float64 tensors
    and another `dtype` the errors are those of one sequence, not of the sum over members. A shared
    row of the output is that of the first sequence that has it, and so is its gradient.

    Args:
        q: (Tq, Hq, D) on the packed axis.
        k: (T, Hkv, D).
        v: (T, Hkv, DV).
        layout: of T tokens.
        dtype: of the computation, that of q by default.
        scale: factor of the scores, `D ** -0.5` by default.
        window_size: a query sees this many keys back on its path, itself included.
        softcap: scores s become `softcap * tanh(s / softcap)`.
        sinks: (Hq,), one more logit per query head.
        prefix_causal: False lets the rows of a segment that others continue see all of it.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        (Tq, Hq, DV) in the dtype of q; with `return_lse` also (Hq, Tq), in float32 or better.
    """
    dtype = q.dtype if dtype is None else dtype
    scale = q.shape[2] ** -0.5 if scale is None else scale
    segments = torch.arange(layout.num_segments, device=q.device)
    sees_itself = layout.bidirectional.to(q.device)
    if not prefix_causal:
        sees_itself = sees_itself | torch.isin(segments, layout.parents)
    plain = window_size is None and softcap is None and sinks is None and not sees_itself.any()
    plain = plain and not return_lse and q.shape[2] == v.shape[2] and _sdpa_runs(dtype, q.device)
    # PyTorch's causal kernels multiply the scores that they hide, -inf, by the scale.
    plain = plain and scale >= torch.finfo(torch.float32).tiny
    query_of = torch.full((layout.num_tokens,), -1, device=q.device)
    query_of[layout.query_rows] = torch.arange(layout.num_queries, device=q.device)
    segment_of = segments.repeat_interleave(layout.cu_seqlens.diff().long())
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(layout.num_queries, q.shape[1], v.shape[2])
    lse = torch.zeros(layout.num_queries, q.shape[1], dtype=wide, device=q.device)
    for i in range(layout.num_sequences):
        rows = layout.sequence_rows(i)
        queries = query_of[rows]
        new = queries >= 0
        query_of[rows] = -1  # later sequences share these rows
        keys, values = (x[rows].to(dtype) for x in (k, v))
        # Rows that are no queries of this sequence run as zeros and are dropped.
        one = torch.zeros(len(rows), *q.shape[1:], dtype=dtype, device=q.device)
        one = one.index_put((new,), q[queries[new]].to(dtype))
        if plain:
            one, keys, values = (x.transpose(0, 1)[None] for x in (one, keys, values))
            whole = torch.nn.functional.scaled_dot_product_attention(
                one, keys, values, is_causal=True, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)
        else:
            at = torch.arange(len(rows), device=q.device)
            segment = segment_of[rows]
            keep = at[None, :] <= at[:, None]
            keep |= (segment[:, None] == segment[None, :]) & sees_itself[segment]
            if window_size is not None:
                keep &= at[:, None] - at[None, :] < window_size
            whole, whole_lse = _eager(one, keys, values, keep, scale, softcap, sinks)
            lse = lse.index_put((queries[new],), whole_lse[new].to(wide))
        out = out.index_put((queries[new],), whole[new].to(q.dtype))
    return (out, lse.t()) if return_lse else out


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence: (L, Hq, DV) in the dtype of q, and its lse (L, Hq).

    As PyTorch's products, those here return the dtype of q, and so do their gradients.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (torch.einsum("mhd,nhd->hmn", q.to(wide), k) * scale).to(dtype).to(wide)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[:, None])
    weights = (scores - lse[..., None]).exp().to(dtype)
    return torch.einsum("hmn,nhd->mhd", weights.to(wide), v).to(dtype), lse.t()


def _sdpa_runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's attention runs: its bfloat16 kernel raises on some processors.

    Those with AMX whose ATEN_CPU_CAPABILITY is below avx512 are such.
    """
    x = torch.zeros(1, 1, 2, 16, dtype=dtype, device=device)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False
    return True


# ---- attention: inputs, results, comparison -----------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a call of attention takes, and the gradients of what it returns.

    Attributes:
        q: (Tq, Hq, D).
        k: (T, Hkv, D).
        v: (T, Hkv, DV).
        dout: (Tq, Hq, DV), gradient of the output.
        dlse: (Hq, Tq), gradient of the log-sum-exp, or None where it is not asked for.
        sinks: (Hq,) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    sinks: Tensor | None = None

    @classmethod
    def random(
        cls,
        layout: PrefixLayout,
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (32, 32),
        dtype: torch.dtype = torch.float32,
        *,
        lse: bool = False,
        sinks: bool = False,
        seed: int = 0,
    ) -> Inputs:
        """Standard normal values.

        Args:
            layout: on whose device they are.
            heads: Hq and Hkv.
            dims: D and DV.
            dtype: of all but dlse, which is in float32 or better.
            lse: with a gradient of the log-sum-exp.
            sinks: with sinks.
            seed: of the generator.
        """
        generator = torch.Generator(layout.device).manual_seed(seed)
        (hq, hkv), (d, dv) = heads, dims
        queries, tokens = layout.num_queries, layout.num_tokens

        def normal(*shape: int) -> Tensor:
            return torch.randn(
                shape, generator=generator, device=layout.device, dtype=torch.float64
            ).to(dtype)

        q, k, v = normal(queries, hq, d), normal(tokens, hkv, d), normal(tokens, hkv, dv)
        dout, dlse = normal(queries, hq, dv), normal(hq, queries)
        return cls(
            *(q, k, v, dout),
            dlse=dlse.to(torch.promote_types(dtype, torch.float32)) if lse else None,
            sinks=normal(hq) if sinks else None,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with `function` applied to every tensor."""
        return replace(self, **{n: function(x) for n, x in vars(self).items() if x is not None})


Results = dict[str, Tensor]


def attention_results(attention: Callable[..., Any], inputs: Inputs) -> Results:
    """Output and gradients: out, lse, dq, dk, dv, dsinks, without those that `inputs` lack.

    Args:
        attention: called as `attention(q, k, v)`, with `sinks=` and `return_lse=True` where
            `inputs` have sinks and a dlse.
        inputs: as they are; gradients are those of these tensors.
    """
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in vars(inputs).items()
        if name in ("q", "k", "v", "sinks") and x is not None
    }
    named: dict[str, Any] = {"sinks": leaves["sinks"]} if "sinks" in leaves else {}
    if inputs.dlse is not None:
        named["return_lse"] = True
    found = attention(leaves["q"], leaves["k"], leaves["v"], **named)
    outs = [found] if inputs.dlse is None else list(found)
    given = [inputs.dout] if inputs.dlse is None else [inputs.dout, inputs.dlse]
    douts = [x.to(out.dtype) for x, out in zip(given, outs, strict=True)]
    grads = torch.autograd.grad(
        outs, list(leaves.values()), douts, allow_unused=True, materialize_grads=True
    )
    results = {name: x.detach() for name, x in zip(("out", "lse"), outs, strict=False)}
    return results | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}


def compare_attention(
    layout: PrefixLayout,
    inputs: Inputs,
    actual: Results,
    *,
    scale: float | None = None,
    exact: Results | None = None,
    pytorch: Results | None = None,
    **options: Any,
) -> list[Comparison]:
    """Holds results of attention against the dense reference in float64, within `compare`'s budget.

    Every tensor is judged as a whole and segment by segment; short segments are judged together.

    Args:
        layout: of the call.
        inputs: of the call, in the dtype under test.
        actual: what `attention_results` returned.
        scale: of the call.
        exact: other results in float64 than those of the reference.
        pytorch: other results of the yardstick than those of `repeated_attention`.
        options: of the call, but sinks.

    Returns:
        For each result the comparison that uses the largest part of its budget.
    """
    scale = inputs.q.shape[2] ** -0.5 if scale is None else scale
    options = {"scale": scale, **options}
    wide = inputs.map(Tensor.double)
    if exact is None:
        reference = partial(prefix_attention, layout=layout, backend="reference", **options)
        exact = attention_results(reference, wide)
    if pytorch is None:
        repeated = partial(repeated_attention, layout=layout, dtype=inputs.q.dtype, **options)
        pytorch = attention_results(repeated, wide)
    terms = _terms(layout, inputs, scale, exact["out"])
    comparisons = []
    for name, value in actual.items():
        # lse is (Hq, T): rows first, like the others.
        a, e, p = (x.t() if name == "lse" else x for x in (value, exact[name], pytorch[name]))
        if a.shape != e.shape:
            raise AssertionError(
                f"{name} has shape {tuple(value.shape)}, not {tuple(exact[name].shape)}"
            )
        blocks: list[slice | None] = [None]
        if name != "dsinks":
            queries = None if name in ("dk", "dv") else layout.query_rows
            blocks += _blocks(layout, queries, BLOCK_ROWS // a.shape[1])
        found = [compare(name, a, e, p, rows=rows, **terms[name]) for rows in blocks]
        comparisons.append(max(found, key=lambda comparison: comparison.share))
    return comparisons


def check_attention(
    layout: PrefixLayout,
    inputs: Inputs,
    *,
    attention: Callable[..., Any] = prefix_attention,
    backend: str = "auto",
    deterministic: bool | None = None,
    **options: Any,
) -> Results:
    """Runs attention, forward and backward, and fails unless all of it is within the budget.

    Args:
        layout: of the call.
        inputs: of the call.
        attention: what is called; it takes the arguments of `prefix_attention`.
        backend: as `prefix_attention` takes it.
        deterministic: as `prefix_attention` takes it.
        options: of the call, but sinks.

    Returns:
        The results under test.
    """
    call = partial(
        attention, layout=layout, backend=backend, deterministic=deterministic, **options
    )
    actual = attention_results(call, inputs)
    for name, x in actual.items():
        expected = inputs.q.dtype if name != "lse" else torch.promote_types(x.dtype, torch.float32)
        assert x.dtype == expected, f"{name} is {x.dtype}"
    assert_all(compare_attention(layout, inputs, actual, **options))
    return actual


def assert_all(comparisons: list[Comparison]) -> None:
    """Fails with every comparison that is beyond its budget."""
    wrong = [str(comparison) for comparison in comparisons if not comparison.ok]
    if wrong:
        raise AssertionError("; ".join(wrong))


def _terms(
    layout: PrefixLayout, inputs: Inputs, scale: float, out: Tensor
) -> dict[str, dict[str, Any]]:
    """Size and number of the terms of each result, for `compare`.

    With S = scale Q K^T, dP = dO V^T and dS = P (dP - delta): an element of O is a weighted mean of
    those of V, one of dV a weighted sum of those of dO, one of dQ of those of dS K. An error of S
    stands in an exponent: it multiplies the others, and brings the two factors of S. A flash kernel
    takes delta from the rounded output; the formula that models write out does not.
    """
    q, k, v, dout = (_rms(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    dtype = inputs.q.dtype
    d, dv = inputs.q.shape[2], inputs.v.shape[2]
    scores = max(1.0, abs(scale) * math.sqrt(d) * q * k)
    dp = math.sqrt(dv) * dout * v
    if inputs.dlse is not None:
        dp += _rms(inputs.dlse)
    start, rows = layout.cu_seqlens[:-1], layout.num_queries
    keys = max(1, layout.max_length)
    starts = torch.repeat_interleave(start.long(), layout.cu_seqlens.diff().long())
    seen = max(1, min(rows, int((layout.subtree_end - starts).max()))) if len(starts) else 1

    def terms(size: float, number: int, factors: int, rounded: float = 0.0) -> dict[str, Any]:
        growth = scores * math.sqrt(number)
        return {"size": size, "growth": growth, "factors": factors, "rounded": rounded}

    delta = math.sqrt(dv) * dout * _rms(out)

    return {
        "out": terms(v, keys + d, 3),
        "lse": terms(scores, keys + d, 2),
        "dq": terms(abs(scale) * dp * k, keys + d + dv, 5, abs(scale) * delta * k),
        "dk": terms(abs(scale) * dp * q, seen + d + dv, 5, abs(scale) * delta * q),
        "dv": terms(dout, seen + d, 3),
        "dsinks": terms(dp, rows + d + dv, 4, delta) | {"dtype": dtype},
    }


def _blocks(layout: PrefixLayout, rows: Tensor | None, least: int) -> Iterator[slice]:
    """Ranges of rows that end where segments end and hold `least` rows or more."""
    ends = layout.cu_seqlens[1:].cpu()
    if rows is not None:
        ends = torch.searchsorted(rows.cpu(), ends)
    start, last = 0, int(ends[-1]) if len(ends) else 0
    for end in ends.tolist():
        if end - start >= least and last - end >= least:
            yield slice(start, end)
            start = end
    if start:
        yield slice(start, last)


# ---- forests ------------------------------------------------------------------------------------


def forests(
    max_segments: int = 7,
    max_length: int = 45,
    *,
    min_segments: int = 1,
    min_length: int = 0,
    lengths: list[int] | None = None,
) -> Any:
    """A hypothesis strategy of `(lengths, parents)` in depth-first order.

    Args:
        max_segments: segments at most.
        max_length: tokens in a segment at most.
        min_segments: segments at least.
        min_length: tokens in a segment at least; there are empty ones by default.
        lengths: or the only lengths that segments have.
    """
    from hypothesis import strategies as st

    length = st.integers(min_length, max_length) if lengths is None else st.sampled_from(lengths)

    @st.composite
    def draw_forest(draw: Any) -> tuple[list[int], list[int]]:
        count = draw(st.integers(min_segments, max_segments))
        parents: list[int] = []
        path: list[int] = []
        for i in range(count):
            path = path[: draw(st.integers(0, len(path)))]
            parents.append(path[-1] if path else -1)
            path.append(i)
        return draw(st.lists(length, min_size=count, max_size=count)), parents

    return draw_forest()


# ---- Triton's interpreter -----------------------------------------------------------------------


def fix_interpreter() -> None:
    """Makes bfloat16 right under TRITON_INTERPRET=1 (Triton 3.6 to 3.9).

    There `tl.dot` multiplies the bit patterns of bfloat16 and casts to it truncate. Calling this
    again does nothing.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "prefix_attn_fixed", False):
        return
    convert, dot = interpreter._convert_float, builder.create_dot

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, rounding)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest_even).astype(np.uint16)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.prefix_attn_fixed = True
