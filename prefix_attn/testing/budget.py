"""The error budget: how far from float64 a result may be, by how far PyTorch is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
      `peak` times their root mean square;
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

    Raises:
        ValueError: if the shapes differ.
    """
    if not actual.shape == exact.shape == pytorch.shape:
        raise ValueError(
            f"{name} must have one shape, got {tuple(actual.shape)} under test, "
            f"{tuple(exact.shape)} in float64 and {tuple(pytorch.shape)} of PyTorch"
        )
    dtype = actual.dtype if dtype is None else dtype
    if rows is not None:
        actual, exact, pytorch = (x[rows] for x in (actual, exact, pytorch))
    unit = torch.finfo(dtype).eps / 2
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    exact = exact.detach().double()
    error, budget = (x.detach().double() - exact for x in (actual, pytorch))
    count = max(1, exact[..., 0].numel() if exact.dim() > 2 else exact.numel())
    size = max(size, rms(exact))
    rounding = accumulator * growth
    return Comparison(
        name=name,
        rows=rows,
        error=rms(error),
        pytorch=rms(budget),
        limit=2 * rms(budget) + (unit / math.sqrt(count) + rounding) * size + unit * rounded,
        largest=_largest(error),
        pytorch_largest=_largest(budget),
        largest_limit=2 * _largest(budget)
        + (unit + rounding) * max(_largest(exact), peak(exact.numel(), factors) * size),
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


def assert_model_within_budget(
    name: str,
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    pytorch: Mapping[str, Tensor],
    *,
    tokens: int,
) -> None:
    """Holds the gradients of a model against float64 as one result, or others of its parameters.

    Every tensor is divided by the root mean square of its exact values; by that of all of them,
    where its own is no more than their rounding, such as that of a gradient that is zero. Alone, a
    small matrix is no judge: a few values in later layers decide all of its errors, and so does
    luck.

    Args:
        name: what is compared.
        actual: tensors under test, by parameter.
        exact: the same in float64.
        pytorch: what PyTorch computes in the dtype under test.
        tokens: how many tokens each gradient is a sum over, in an order that is not PyTorch's.

    Raises:
        AssertionError: with errors and limits; names the worst parameter.
        ValueError: if shapes differ; names the parameter.
    """
    assert actual.keys() == exact.keys(), sorted(actual.keys() ^ exact.keys())
    for key, x in exact.items():
        if not actual[key].shape == x.shape == pytorch[key].shape:
            shapes = (tuple(y[key].shape) for y in (actual, exact, pytorch))
            raise ValueError(f"{name} of {key} must have one shape, got {[*shapes]}")
    dtype = next(iter(actual.values())).dtype
    whole = rms(torch.cat([x.detach().double().flatten() for x in exact.values()]))
    own_sizes = {key: rms(x) for key, x in exact.items()}
    rounding = torch.finfo(dtype).eps * whole
    sizes = {key: size if size > rounding else whole or 1.0 for key, size in own_sizes.items()}

    def scaled(results: Mapping[str, Tensor]) -> list[Tensor]:
        return [results[key].detach().double().flatten() / size for key, size in sizes.items()]

    own, right, theirs = scaled(actual), scaled(exact), scaled(pytorch)
    whole_run = map(torch.cat, (own, right, theirs))
    comparison = compare(name, *whole_run, dtype=dtype, growth=math.sqrt(tokens))
    if not comparison.ok:
        errors = torch.tensor([rms(x - y) for x, y in zip(own, right, strict=True)])
        worst = list(sizes)[int(errors.argmax())]  # NaN is the largest
        raise AssertionError(f"{comparison} against float64; worst in {worst}")


def peak(count: int, factors: int = 1) -> float:
    """About how large the largest of n products of m normal values is, in their root mean squares.

    (1 + 2/m ln n)^(m/2).

    Args:
        count: n.
        factors: m.
    """
    return (1 + 2 / factors * math.log(max(1, count))) ** (factors / 2)


def rms(x: Tensor) -> float:
    """Root mean square of all elements, 0 where there are none."""
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
