"""Inputs and results of attention, held against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing.budget import Comparison, compare, rms
from prefix_attn.testing.repeated import repeated_attention

# Blocks of a tensor that are judged on their own hold this many (row, head) pairs or more: the root
# mean square of fewer errors says more about luck than about a kernel.
BLOCK_ROWS = 64


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
    # An output that has no graph, as that of no sequences, adds nothing to the gradients.
    reached = [
        (out, x.to(out.dtype)) for out, x in zip(outs, given, strict=True) if out.requires_grad
    ]
    grads: Sequence[Tensor] = [torch.zeros_like(x) for x in leaves.values()]
    if reached:
        with_graph, douts = zip(*reached, strict=True)
        grads = torch.autograd.grad(
            with_graph, list(leaves.values()), douts, allow_unused=True, materialize_grads=True
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
    q, k, v, dout = (rms(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    dtype = inputs.q.dtype
    d, dv = inputs.q.shape[2], inputs.v.shape[2]
    scores = max(1.0, abs(scale) * math.sqrt(d) * q * k)
    dp = math.sqrt(dv) * dout * v
    if inputs.dlse is not None:
        dp += rms(inputs.dlse)
    start, rows = layout.cu_seqlens[:-1], layout.num_queries
    keys = max(1, layout.max_length)
    starts = torch.repeat_interleave(start.long(), layout.cu_seqlens.diff().long())
    seen = max(1, min(rows, int((layout.subtree_end - starts).max()))) if len(starts) else 1

    def terms(size: float, number: int, factors: int, rounded: float = 0.0) -> dict[str, Any]:
        growth = scores * math.sqrt(number)
        return {"size": size, "growth": growth, "factors": factors, "rounded": rounded}

    delta = math.sqrt(dv) * dout * rms(out)

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
