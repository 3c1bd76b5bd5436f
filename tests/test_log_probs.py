"""Log-probabilities and entropies against dense logits in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_attn import PrefixLayout
from prefix_attn.losses import completion_log_probs, packed_log_probs, token_log_probs
from prefix_attn.testing import assert_within_budget

T, H, V = 13, 6, 29  # no chunk size below divides 29


def inputs(dtype: torch.dtype = torch.float64, rows: int = T, width: int = H) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(V, (rows,), generator=generator)
    x = {"hidden": normal(rows, width), "weight": normal(V, width), "bias": normal(V)}
    return x | {"targets": targets}


def dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: log-probabilities and entropies from all logits."""
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], entropy


def run(function, x: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """log-probabilities, entropies, and the gradients of a weighted sum of both."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in x.items() if k != "targets"}
    log_probs, entropy = function(**leaves, targets=x["targets"], **options)
    weights = torch.linspace(-1.0, 2.0, log_probs.numel(), dtype=torch.float64)
    total = (log_probs * weights.to(log_probs.dtype)).sum()
    total = total + (entropy * weights.flip(0).to(entropy.dtype)).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    results = {"log_probs": log_probs.detach(), "entropy": entropy.detach()}
    return results | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}


def chunked(**kwargs) -> tuple[Tensor, Tensor]:
    return token_log_probs(**kwargs, return_entropy=True)


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"temperature": 1.3, "softcap": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 7, 28, 29, 100, None])
def test_log_probs_match_dense_logits(chunk_size, options):
    x = inputs()
    expected = run(dense, x, **options)
    actual = run(chunked, x, chunk_size=chunk_size, **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_log_probs_pass_gradcheck(options):
    x = inputs(rows=4)
    leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def function(hidden, weight, bias):
        return token_log_probs(
            hidden, weight, x["targets"], bias=bias, return_entropy=True, chunk_size=10, **options
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["small logits", "large logits"])
def test_log_probs_float32_within_budget(scale):
    x = inputs(torch.float32, rows=500, width=64)  # many sums: the largest error is no accident
    x["hidden"] *= scale
    exact = run(dense, {k: v.double() if v.is_floating_point() else v for k, v in x.items()})
    pytorch = run(dense, x)
    actual = run(chunked, x, chunk_size=7)
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert_within_budget(name, value, exact[name], pytorch[name])


def test_log_probs_far_from_zero_within_budget():
    x = inputs(torch.float32, rows=500, width=64)
    x["bias"] += 1e4  # the sum is taken relative to the largest logit
    exact = run(dense, {k: v.double() if v.is_floating_point() else v for k, v in x.items()})
    pytorch = run(dense, x)
    for name, value in run(chunked, x, chunk_size=7).items():
        assert_within_budget(name, value, exact[name], pytorch[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_of_half_types_are_summed_in_float32(dtype):
    x = inputs(dtype)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    expected = run(chunked, wide, chunk_size=7)
    actual = run(chunked, x, chunk_size=7)
    for name in ("log_probs", "entropy"):
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected[name])
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], expected[name].to(dtype))


def test_log_probs_mixed_dtypes_and_autocast_keep_float32():
    x = inputs(torch.float32)
    half = x["hidden"].bfloat16()
    expected = token_log_probs(half.float(), x["weight"], x["targets"])
    with torch.autocast("cpu", torch.bfloat16):
        actual = token_log_probs(half, x["weight"], x["targets"])
    assert torch.equal(actual, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_probs_on_a_gpu_within_budget(dtype):
    x = {k: v.cuda() for k, v in inputs(dtype).items()}
    exact = run(dense, {k: v.double() if v.is_floating_point() else v for k, v in x.items()})
    pytorch = run(dense, x)
    for name, value in run(chunked, x, chunk_size=8).items():
        assert_within_budget(name, value, exact[name], pytorch[name])


def test_log_probs_of_any_row_shape_and_of_none():
    x = inputs(rows=12)
    flat = token_log_probs(x["hidden"], x["weight"], x["targets"])
    shaped = token_log_probs(
        x["hidden"].view(3, 4, H), x["weight"], x["targets"].view(3, 4).int(), chunk_size=5
    )
    torch.testing.assert_close(shaped, flat.view(3, 4))
    row = token_log_probs(x["hidden"][0], x["weight"], x["targets"][0])
    torch.testing.assert_close(row, flat[0])
    weight = x["weight"].requires_grad_()
    none, entropy = token_log_probs(x["hidden"][:0], weight, x["targets"][:0], return_entropy=True)
    assert none.shape == entropy.shape == (0,)
    (none.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32])
def test_log_probs_take_targets_of_any_integers(dtype):
    x = inputs()
    expected = token_log_probs(**x)
    assert torch.equal(token_log_probs(**(x | {"targets": x["targets"].to(dtype)})), expected)


def test_log_probs_of_a_vocabulary_of_one_are_certain():
    x = inputs()
    only = {"weight": x["weight"][:1], "bias": x["bias"][:1], "targets": x["targets"] * 0}
    assert not any(value.any() for value in run(chunked, x | only).values())


def test_log_probs_of_forbidden_tokens():
    """Logits of -inf: the first chunks, some others, a target; then a whole row."""
    x = inputs()
    x["bias"][:8] = -math.inf
    x["bias"][20] = -math.inf
    x["targets"][:3] = torch.tensor([20, 0, 9])
    expected, actual = run(dense, x), run(chunked, x, chunk_size=4)
    assert actual["log_probs"][:2].tolist() == [-math.inf, -math.inf]
    assert torch.isfinite(actual["log_probs"][2])
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)
    # The dense entropy's gradient at p = 0 is that of the limit, zero.
    torch.testing.assert_close(actual["d_hidden"], expected["d_hidden"], rtol=1e-10, atol=1e-10)
    x["bias"].fill_(-math.inf)
    nothing = run(chunked, x, chunk_size=4)
    assert nothing["log_probs"].isnan().all()
    assert nothing["entropy"].isnan().all()


def test_log_probs_carry_nan():
    x = inputs()
    x["hidden"][3] = math.nan
    log_probs, entropy = token_log_probs(
        x["hidden"], x["weight"], x["targets"], return_entropy=True, chunk_size=4
    )
    assert log_probs.isnan().nonzero().tolist() == [[3]]
    assert entropy.isnan().nonzero().tolist() == [[3]]


def test_log_probs_give_gradients_only_where_wanted():
    x = inputs()
    weight = x["weight"].requires_grad_()
    token_log_probs(x["hidden"], weight, x["targets"]).sum().backward()
    assert x["hidden"].grad is None
    assert weight.grad is not None
    hidden = inputs()["hidden"].requires_grad_()
    _, entropy = token_log_probs(
        hidden, weight.detach(), x["targets"], return_entropy=True, chunk_size=4
    )
    entropy.sum().backward()  # without the log-probabilities
    other = inputs()["hidden"].requires_grad_()
    dense(other, weight.detach(), x["targets"])[1].sum().backward()
    torch.testing.assert_close(hidden.grad, other.grad)


def test_log_probs_refuse_double_backward():
    """Also where the gradient of the result is a constant: nothing is lost in silence."""
    x = inputs()
    hidden = x["hidden"].requires_grad_()
    total = token_log_probs(hidden, x["weight"], x["targets"]).sum()
    (grad,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        (grad.square().sum() + total).backward()


class LargestTensor(TorchDispatchMode):
    """Records the most elements that an operator's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0) if sizes else self.elements
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_never_hold_the_logits(dtype):
    rows, width, vocabulary, chunk = 64, 4, 1000, 50
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    with LargestTensor() as chunks:
        log_probs, entropy = token_log_probs(
            hidden, weight, targets, return_entropy=True, chunk_size=chunk, softcap=3.0
        )
        (log_probs.sum() + entropy.sum()).backward()
    # The weight's gradient is the largest tensor that must exist.
    assert chunks.elements == max(vocabulary * width, rows * chunk)
    with LargestTensor() as whole:
        dense(hidden, weight, targets)
    assert whole.elements == rows * vocabulary


def test_log_probs_default_chunk_is_bounded(monkeypatch):
    monkeypatch.setattr("prefix_attn.losses.log_probs.CPU_CHUNK_ELEMENTS", 2**13)
    hidden, weight = torch.randn(32, 4), torch.randn(1000, 4)
    with LargestTensor() as chunks:
        token_log_probs(hidden, weight, torch.zeros(32, dtype=torch.int64))
    assert chunks.elements == 2**13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((T,), V)}, f"targets must be 0 to {V - 1}, got {V}"),
        ({"targets": torch.full((T,), -100)}, "got -100; leave out"),
        ({"targets": torch.zeros(T)}, "targets must be integers, got torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must have shape \(13,\)"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"temperature": 1e-320}, r"temperature must be 1e-154 to .* torch.float64, got 1e-320"),
        ({"softcap": 1e300}, r"softcap must be 1e-154 to 7e\+153 for values of .*, got 1e\+300"),
        ({"softcap": math.nan}, "softcap must be positive and finite, got nan"),
        ({"softcap": 0}, "softcap must be positive and finite, got 0"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer or None, got 0"),
        ({"chunk_size": 2.0}, "chunk_size must be a positive integer or None, got 2.0"),
        ({"hidden": torch.zeros(T, H + 1)}, r"hidden must have shape \(..., 6\).*got \(13, 7\)"),
        ({"hidden": torch.zeros(T, H, dtype=torch.int64)}, "hidden must be a floating-point"),
        ({"weight": torch.zeros(0, H)}, r"weight must have shape \(V, H\), got \(0, 6\)"),
        ({"weight": torch.zeros(H)}, r"weight must have shape \(V, H\), got \(6,\)"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(29,\), got \(3,\)"),
    ],
)
def test_log_probs_refuse_wrong_values(change, message):
    with pytest.raises(ValueError, match=message):
        token_log_probs(**(inputs() | change))


def test_log_probs_take_numbers_of_numpy():
    x = inputs()
    numpy = {"temperature": np.float32(0.5), "softcap": np.int64(2), "chunk_size": np.int32(7)}
    actual = token_log_probs(**x, **numpy)
    assert torch.equal(actual, token_log_probs(**x, temperature=0.5, softcap=2, chunk_size=7))


@pytest.mark.parametrize("option", ["temperature", "softcap"])
@pytest.mark.parametrize(("end", "beyond"), [(1.1e-19, 1e-19), (9e18, 1e19)])
def test_log_probs_are_finite_at_the_ends_of_the_options(option, end, beyond):
    x = run(chunked, inputs(torch.float32), **{option: end})
    assert all(value.isfinite().all() for value in x.values())
    with pytest.raises(ValueError, match=f"{option} must be 1e-19 to 9e.18 for values of"):
        chunked(**inputs(torch.float32), **{option: beyond})


def test_log_probs_refuse_wrong_types():
    with pytest.raises(TypeError, match="temperature must be a number, got str 'hot'"):
        token_log_probs(**inputs(), temperature="hot")
    with pytest.raises(TypeError, match="targets must be a tensor, got list"):
        token_log_probs(**(inputs() | {"targets": [1, 2]}))


# ---- the packed axis ----------------------------------------------------------------------------

SEQUENCES = [
    [1, 2, 3, 4, 5, 6],
    [1, 2, 3, 4, 7],
    [1, 2, 3, 4, 5, 8, 9],  # shares completion token 5 with the first
    [10, 11, 12],
    [10, 11],  # an empty completion after a prompt of two
]
PROMPTS = [4, 4, 4, 2, 2]


def packed_inputs() -> tuple[PrefixLayout, Tensor, Tensor, Tensor]:
    layout, ids = PrefixLayout.from_sequences(SEQUENCES)
    x = inputs(rows=layout.num_tokens)
    return layout, ids, x["hidden"].requires_grad_(), x["weight"].requires_grad_()


def test_packed_log_probs_match_each_sequence_alone():
    layout, ids, hidden, weight = packed_inputs()
    packed = packed_log_probs(hidden, weight, ids, layout, chunk_size=5)
    assert packed.shape == layout.target_index.shape
    on_axis = torch.zeros(layout.num_tokens, dtype=packed.dtype)
    on_axis[layout.target_index] = packed.detach()
    for i, sequence in enumerate(SEQUENCES):
        rows = layout.sequence_rows(i)
        log_p = torch.log_softmax(hidden[rows[:-1]] @ weight.t(), -1)
        expected = log_p.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
        torch.testing.assert_close(on_axis[rows[1:]], expected.detach())


def test_completion_log_probs_match_each_sequence_alone():
    layout, ids, hidden, weight = packed_inputs()
    result = completion_log_probs(
        hidden, weight, ids, layout, PROMPTS, return_entropy=True, chunk_size=5
    )
    assert result.mask.sum(1).tolist() == [2, 1, 3, 1, 0]
    coefficients = torch.linspace(1.0, 2.0, result.mask.numel(), dtype=torch.float64)
    coefficients = coefficients.view(result.mask.shape)
    total = (coefficients * (result.log_probs + 0.3 * result.entropy)).sum()
    grads = torch.autograd.grad(total, (hidden, weight))

    expected = torch.zeros((), dtype=torch.float64)
    for i, (sequence, start) in enumerate(zip(SEQUENCES, PROMPTS, strict=True)):
        rows = layout.sequence_rows(i)[start - 1 : -1]
        targets = torch.tensor(sequence[start:], dtype=torch.int64)
        log_probs, entropy = dense(hidden[rows], weight, targets)
        torch.testing.assert_close(result.log_probs[i, : len(rows)], log_probs)
        torch.testing.assert_close(result.entropy[i, : len(rows)], entropy)
        assert not result.log_probs[i, len(rows) :].any()
        assert not result.mask[i, len(rows) :].any()
        expected = expected + (coefficients[i, : len(rows)] * (log_probs + 0.3 * entropy)).sum()
    for actual, exact in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(actual, exact)


def test_completion_log_probs_run_the_head_on_completions_only():
    layout = PrefixLayout.from_lengths([500], [[3, 2]])
    hidden, weight = torch.randn(505, 4), torch.randn(100, 4)
    ids = torch.randint(100, (505,))
    with LargestTensor() as largest:
        completion_log_probs(hidden, weight, ids, layout, 500)
    assert largest.elements <= max(505 * 2, 5 * 100)


def test_completion_log_probs_of_a_pruned_group_are_those_of_the_rest():
    layout, ids, hidden, weight = packed_inputs()
    whole = completion_log_probs(hidden, weight, ids, layout, PROMPTS)
    left = [0, 1, 3]
    pruned, pruned_ids = PrefixLayout.from_sequences([SEQUENCES[i] for i in left])
    rows = torch.empty(pruned.num_tokens, dtype=torch.int64)
    for new, old in enumerate(left):
        rows[pruned.sequence_rows(new)] = layout.sequence_rows(old)
    result = completion_log_probs(hidden[rows], weight, pruned_ids, pruned, [4, 4, 2])
    torch.testing.assert_close(result.log_probs, whole.log_probs[left][:, :2])


def test_completion_log_probs_without_completions():
    layout, ids, hidden, weight = packed_inputs()
    result = completion_log_probs(hidden, weight, ids, layout, [len(s) for s in SEQUENCES])
    assert result.log_probs.shape == result.mask.shape == (5, 0)
    result.log_probs.sum().backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize(
    ("prompt_lens", "message"),
    [
        (0, "got 0 for sequence 0 of 6 tokens"),
        (3, "got 3 for sequence 4 of 2 tokens"),
        ([1, 2], "prompt_lens must have one entry per sequence, 5, got 2"),
    ],
)
def test_completion_log_probs_refuse_wrong_prompts(prompt_lens, message):
    layout, ids, hidden, weight = packed_inputs()
    with pytest.raises(ValueError, match=message):
        completion_log_probs(hidden, weight, ids, layout, prompt_lens)


@pytest.mark.parametrize("prompts", [np.array(PROMPTS), torch.tensor(PROMPTS), tuple(PROMPTS)])
def test_completion_log_probs_take_any_integers(prompts):
    layout, ids, hidden, weight = packed_inputs()
    expected = completion_log_probs(hidden, weight, ids, layout, PROMPTS)
    actual = completion_log_probs(hidden, weight, ids, layout, prompts)
    assert torch.equal(actual.log_probs, expected.log_probs)
    one = completion_log_probs(hidden, weight, ids, layout, np.int64(1))
    assert one.mask.sum(1).tolist() == [5, 4, 6, 2, 1]
    with pytest.raises(TypeError, match=r"prompt_lens\[1\] must be an integer, got float 4.5"):
        completion_log_probs(hidden, weight, ids, layout, [4, 4.5, 4, 2, 2])


def test_packed_log_probs_refuse_what_does_not_fit():
    layout, ids, hidden, weight = packed_inputs()
    with pytest.raises(ValueError, match=r"hidden must have shape \(12, H\)"):
        packed_log_probs(hidden[1:], weight, ids, layout)
    with pytest.raises(ValueError, match=r"ids must have shape \(12,\)"):
        packed_log_probs(hidden, weight, ids[None], layout)
    with pytest.raises(ValueError, match="the layout has queries for 5 of 12 tokens"):
        packed_log_probs(hidden, weight, ids, layout.queries_for([0, 1]))
    with pytest.raises(TypeError, match="layout must be a PrefixLayout, got NoneType"):
        packed_log_probs(hidden, weight, ids, None)
