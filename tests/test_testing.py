"""The error budget itself: it accepts what is right on every processor and rejects what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.testing import (
    Inputs,
    Results,
    assert_all,
    assert_model_within_budget,
    assert_within_budget,
    attention_results,
    check_attention,
    compare,
    compare_attention,
    repeated_attention,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
PREFIX = 64


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the CPU backend: its results, the exact ones, and those of the yardstick."""

    layout: PrefixLayout
    inputs: Inputs
    actual: Results
    exact: Results
    pytorch: Results

    @classmethod
    def run(cls, layout: PrefixLayout, dtype: torch.dtype) -> Call:
        inputs = Inputs.random(layout, dtype=dtype)
        wide = inputs.map(Tensor.double)
        return cls(
            layout,
            inputs,
            attention_results(on_cpu(layout), inputs),
            attention_results(partial(prefix_attention, layout=layout, backend="reference"), wide),
            attention_results(partial(repeated_attention, layout=layout, dtype=dtype), wide),
        )

    def shares(self, results: Results) -> dict[str, float]:
        """The part of the budget that each of other results uses."""
        comparisons = compare_attention(
            self.layout, self.inputs, results, exact=self.exact, pytorch=self.pytorch
        )
        return {c.name.partition("[")[0]: c.share for c in comparisons}


def on_cpu(layout: PrefixLayout) -> Callable[..., Tensor]:
    return partial(prefix_attention, layout=layout, backend="cpu")


@pytest.mark.parametrize("members", [3, 12, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_accepts_ours_and_rejects_a_prefix_that_is_off(dtype, members):
    """Every row of the prefix is off by some of PyTorch's largest errors: none is an outlier."""
    call = Call.run(PrefixLayout.from_lengths([PREFIX], [[16] * members]), dtype)
    assert max(call.shares(call.actual).values()) <= 1
    rounded = {name: x.to(dtype) for name, x in call.exact.items()}
    assert max(call.shares(rounded).values()) <= 1
    factor = 6 if dtype.itemsize == 2 else 25
    signs = torch.randint(0, 2, (PREFIX, 1, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, x in call.exact.items():
        off = factor * (call.pytorch[name] - x)[:PREFIX].abs().max()
        wrong = x.clone()
        wrong[:PREFIX] += off * signs
        used = call.shares({**rounded, name: wrong.to(dtype)})
        assert used.pop(name) > 1
        assert max(used.values()) <= 1


def without_a_member(results: Results, inputs: Inputs) -> None:
    """The prefix lacks what one of 48 members adds to the gradient of its values."""
    few = PrefixLayout.from_lengths([PREFIX], [[16] * 47])
    fewer = attention_results(on_cpu(few), inputs.map(lambda x: x[: few.num_tokens]))
    results["dv"][:PREFIX] = fewer["dv"][:PREFIX]


def with_the_row_of_a_neighbour(results: Results, inputs: Inputs) -> None:
    """The first row of the last member is that of the member before it."""
    results["out"][-16] = results["out"][-32]


def with_a_factor_of_low_precision(results: Results, inputs: Inputs) -> None:
    """All of dQ is too large by a thousandth."""
    results["dq"].mul_(1.001)


@pytest.mark.parametrize(
    "broken",
    [without_a_member, with_the_row_of_a_neighbour, with_a_factor_of_low_precision],
)
def test_budget_rejects_results(broken):
    call = Call.run(PrefixLayout.from_lengths([PREFIX], [[16] * 48]), torch.float32)
    results = {name: x.clone() for name, x in call.actual.items()}
    broken(results, call.inputs)
    assert max(call.shares(results).values()) > 1


def test_budget_judges_each_segment():
    """A suffix of 16 rows whose error drowns in the thousand rows of the whole tensor."""
    call = Call.run(PrefixLayout.from_lengths([1000], [[32, 16, 16]]), torch.bfloat16)
    wrong = call.actual["dq"].clone()
    wrong[1032:1048] *= 1.03
    assert compare("dq", wrong, call.exact["dq"], call.pytorch["dq"]).ok
    with pytest.raises(AssertionError, match=r"^dq\[1032:1048\]: root mean square error"):
        assert_all(compare_attention(call.layout, call.inputs, {**call.actual, "dq": wrong}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_budget_rejects_what_is_not_finite(value):
    exact = torch.ones(4)
    broken = torch.tensor([1, 1, value, 1])
    with pytest.raises(AssertionError, match=f"out: root mean square error {value}"):
        assert_within_budget("out", broken, exact, exact)
    assert not compare("out", exact, exact, broken).ok


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("broken", ["matrix", "frozen", "cancelled"])
def test_budget_of_a_model_forgives_luck_and_names_a_wrong_parameter(broken, scale):
    """PyTorch's error of the small matrix is ten times smaller than that of the others.

    A gradient that cancels, as that of the bias of keys does, is rounding alone, in float64 too.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (64, 32), "matrix": (32, 4), "bias": (32,), "frozen": (4,)}
    exact = {name: torch.randn(x, generator=generator).double() for name, x in shapes.items()}
    exact = {name: scale * x for name, x in exact.items()}
    exact["frozen"].zero_()
    exact["cancelled"] = 1e-15 * exact["bias"]

    def rounded(share):
        noise = {n: torch.randn(x.shape, generator=generator) for n, x in exact.items()}
        found = {
            name: (x * (1 + 1e-6 * noise[name] * (share if name == "matrix" else 1))).float()
            for name, x in exact.items()
        }
        return found | {"cancelled": (1e-8 * scale * noise["cancelled"]).float()}

    ours, pytorch = rounded(1.0), rounded(0.1)
    assert not compare("matrix", ours["matrix"], exact["matrix"], pytorch["matrix"]).ok
    assert_model_within_budget("gradients", ours, exact, pytorch, tokens=16)
    ours[broken] = ours[broken] + 1e-4 * scale
    with pytest.raises(AssertionError, match=f"^gradients: .* worst in {broken}$"):
        assert_model_within_budget("gradients", ours, exact, pytorch, tokens=16)


def test_budget_takes_empty_tensors():
    empty = torch.empty(0, 2, 16)
    assert compare("out", empty, empty, empty).share == 0


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_check_attention_takes_layouts_without_tokens(lengths):
    layout = PrefixLayout.from_tree(lengths, [-1] * len(lengths))
    results = check_attention(layout, Inputs.random(layout, lse=True, sinks=True))
    assert results["dq"].shape == (0, 4, 32)
    assert results["dsinks"].tolist() == [0.0] * 4


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("shape", [(1,), (6, 1), (3, 2)])
def test_budget_refuses_other_shapes(place, shape):
    """Zeros, which broadcast, or have as many elements."""
    tensors = [torch.zeros(shape if i == place else (2, 3)) for i in range(3)]
    with pytest.raises(ValueError, match="out must have one shape"):
        assert_within_budget("out", *tensors)
    with pytest.raises(ValueError, match="out of weight must have one shape"):
        assert_model_within_budget("out", *({"weight": x} for x in tensors), tokens=1)


@pytest.mark.parametrize("lse", [False, True])
def test_yardstick_is_exact_in_float64_and_sums_members_there(lse):
    """With another dtype the gradients of float64 leaves have that of one sequence's rounding."""
    layout = PrefixLayout.from_lengths([9, 0], [[3, 0, 4], [5]])
    inputs = Inputs.random(layout, dtype=torch.float64, lse=lse)
    exact = attention_results(partial(prefix_attention, layout=layout, backend="reference"), inputs)
    whole = attention_results(partial(repeated_attention, layout=layout), inputs)
    rounded = attention_results(
        partial(repeated_attention, layout=layout, dtype=torch.bfloat16), inputs
    )
    for name, x in exact.items():
        torch.testing.assert_close(whole[name], x, rtol=1e-13, atol=1e-13)
        assert rounded[name].dtype == torch.float64
        assert 1e-4 < (rounded[name] - x).norm() / x.norm() < 3e-2


def test_yardstick_without_a_kernel_is_the_written_formula(monkeypatch):
    """As where PyTorch's bfloat16 kernel raises on a processor."""
    layout = PrefixLayout.from_lengths([9], [[3, 4]])
    inputs = Inputs.random(layout, dtype=torch.bfloat16)
    by_kernel = attention_results(partial(repeated_attention, layout=layout), inputs)

    def raises(*arguments, **named):
        raise RuntimeError("pack_vnni2 is only supported when avx512 is supported")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", raises)
    by_formula = attention_results(partial(repeated_attention, layout=layout), inputs)
    for name, x in by_kernel.items():
        torch.testing.assert_close(by_formula[name], x, rtol=2e-2, atol=5e-2)
