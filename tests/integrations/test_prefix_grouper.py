"""Our `PrefixGrouper` next to the published one: results and gradients in float64."""

from __future__ import annotations

import collections
import functools
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prefix_attn.integrations.prefix_grouper import PrefixGrouper

prefix_grouper = pytest.importorskip("prefix_grouper")
Theirs = prefix_grouper.PrefixGrouper

GROUPS = {
    "ragged": [[7, 3, 1, 5], [4, 2], [9, 6, 6]],
    "one group, one member": [[5, 4]],
    "an empty suffix": [[3, 0, 2], [6, 1, 4]],
    "an empty prefix": [[0, 3, 2], [4, 2, 2]],
    "prefixes of one": [[1, 2, 3], [1, 5, 1]],
}
NAMES = [
    "prefix_lens",
    "grouped_suffix_lens",
    "ungrouped_suffix_lens",
    "num_samples",
    "total_lens",
    "padding_mask",
    "grouped_prefix_mask",
    "grouped_suffix_mask",
    "ungrouped_prefix_mask",
    "ungrouped_suffix_mask",
    "prefix_attn_mask",
    "suffix_attn_mask",
    "grouped_prefix_indices",
    "grouped_suffix_indices",
    "ungrouped_prefix_indices",
    "ungrouped_suffix_indices",
]


def padding_modes(groups: list[list[int]]) -> list[str | Tensor]:
    """Both names, and a mask with holes: a column that nobody uses before every token."""
    longest = max(map(sum, groups))
    scattered = torch.zeros(len(groups), 2 * longest + 1, dtype=torch.bool)
    for row, lengths in zip(scattered, groups, strict=True):
        row[1 : 2 * sum(lengths) : 2] = True
    return ["right", "left", scattered]


CASES = [
    pytest.param(groups, mode, id=f"{name}, {mode if isinstance(mode, str) else 'mask'}")
    for name, groups in GROUPS.items()
    for mode in padding_modes(groups)
]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> Tensor:
    """Dense causal attention, aligned at the last key, with a (b, keys) padding mask."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    keep = causal & mask[:, None, None, :].bool()
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (p @ v).transpose(1, 2)


def qkv(shape: torch.Size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, length = shape
    sizes = [(batch, 4, length, 16), (batch, 2, length, 16), (batch, 2, length, 24)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


def both(groups: list[list[int]], mode: str | Tensor) -> tuple[PrefixGrouper, Theirs]:
    return PrefixGrouper(groups, padding_mode=mode), Theirs(groups, padding_mode=mode)


@pytest.mark.parametrize(("groups", "mode"), CASES)
def test_forward_matches_the_package(groups, mode):
    ours, theirs = both(groups, mode)
    x = qkv(theirs.x_shape)
    dout = torch.randn(*theirs.x_shape, 4, 24, dtype=torch.float64)
    results = []
    for grouper in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in x]
        out = grouper.forward(attention, *leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("groups", "mode"), CASES)
def test_masks_and_lengths_match_the_package(groups, mode):
    ours, theirs = both(groups, mode)
    for name in NAMES:
        actual, expected = getattr(ours, name), getattr(theirs, name)
        assert actual.dtype == expected.dtype, name
        assert torch.equal(actual, expected), name
    for name in ("x_shape", "prefix_x_shape", "suffix_x_shape"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for mine, other in zip(ours.group_info, theirs.group_info, strict=True):
        for name in ("prefix_len", "suffix_lens", "num_samples", "total_len"):
            assert getattr(mine, name) == getattr(other, name), name
        assert list(mine) == list(other)
        assert mine[1:] == other[1:]


@pytest.mark.parametrize("include_prefix_last", [0, 1, 3])
@pytest.mark.parametrize(("groups", "mode"), CASES)
def test_concat_and_split_match_the_package(groups, mode, include_prefix_last):
    generator = torch.Generator().manual_seed(0)
    # Prompts and completions padded at both ends, by a column more than they need.
    parts = []
    for lengths in ([g[0] for g in groups], [s for g in groups for s in g[1:]]):
        mask = torch.arange(max(lengths) + 2) - 1
        mask = (mask >= 0) & (mask < torch.tensor(lengths)[:, None])
        x = torch.randn(*mask.shape, 3, generator=generator, dtype=torch.float64)
        parts.append((x, mask.long()))
    sizes = [len(g) - 1 for g in groups]
    weights = None
    results = []
    for cls in (PrefixGrouper, Theirs):
        grouper = cls.from_ungrouped_masks(parts[0][1], parts[1][1], sizes, padding_mode=mode)
        leaves = [x.clone().requires_grad_() for x, _ in parts]
        joined = grouper.concat_input(leaves[0], parts[0][1], leaves[1], parts[1][1])
        split = grouper.split_output(joined, include_prefix_last=include_prefix_last)
        if weights is None:
            weights = [torch.randn(split[i].shape, dtype=torch.float64) for i in (0, 2)]
        total = (split[0] * weights[0]).sum() + (split[2] * weights[1]).sum()
        results.append([joined, *split, *torch.autograd.grad(total, leaves)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["right", "left", "mask"])
def test_convert_padding_matches_the_package(mode):
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]])
    if mode == "mask":
        mode = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    results = []
    for cls in (PrefixGrouper, Theirs):
        leaf = x.clone().requires_grad_()
        out = cls.convert_padding(leaf, mask, padding_mode=mode)
        weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaf)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    ids = torch.arange(15).view(3, 5)
    assert torch.equal(PrefixGrouper.convert_padding(ids, mask), Theirs.convert_padding(ids, mask))


def test_ungroup_and_group_match_the_package():
    ours, theirs = both(GROUPS["ragged"], "left")
    x = qkv(theirs.x_shape)
    for actual, expected in zip(ours.ungroup(*x), theirs.ungroup(*x), strict=True):
        assert torch.equal(actual, expected)
    prefix = torch.randn(*theirs.prefix_x_shape, 4, 24)
    suffix = torch.randn(*theirs.suffix_x_shape, 4, 24)
    assert torch.equal(ours.group(prefix, suffix), theirs.group(prefix, suffix))


@pytest.mark.parametrize(
    "sizes", [2, np.int64(2), torch.tensor(2), [2, 2], np.array([2, 2]), torch.tensor([2, 2])]
)
def test_group_sizes_may_be_any_integers(sizes):
    prompts, completions = torch.ones(2, 3), torch.ones(4, 2)
    grouper = PrefixGrouper.from_ungrouped_masks(prompts, completions, sizes)
    assert [list(g) for g in grouper.group_info] == [[3, 2, 2], [3, 2, 2]]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (3, ValueError, "group_sizes must divide 4 suffixes among 2 prefixes, got 3"),
        ([5, -1], ValueError, r"group_sizes must divide 4 suffixes .* got \[5, -1\]"),
        ([3, 1.0], TypeError, r"group_sizes\[1\] must be an integer, got float 1.0"),
        (2.0, TypeError, "group_sizes must be an integer or a sequence .* got float 2.0"),
    ],
)
def test_wrong_group_sizes_are_named(sizes, error, message):
    with pytest.raises(error, match=message):
        PrefixGrouper.from_ungrouped_masks(torch.ones(2, 3), torch.ones(4, 2), sizes)


def test_position_ids_are_depths_along_the_path():
    grouper = PrefixGrouper([[2, 2, 1], [1, 1]], padding_mode="left")
    assert grouper.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 1]]


def test_init_may_come_later():
    grouper = PrefixGrouper()
    assert not hasattr(grouper, "layout")
    grouper.init([[2, 1]], padding_mode="left")
    assert grouper.layout.num_tokens == 3


class Layer(nn.Module):
    """An attention layer as its users write it; only where the grouper comes from differs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.embed = nn.Embedding(11, 32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 11)

    def forward(self, ids: Tensor, grouper: PrefixGrouper | Theirs) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in self.qkv(self.embed(ids)).chunk(3, dim=-1)
        )

        def attn_func(q, k, v, attn_mask, *args, **kwargs):
            return attention(q, k, v, attn_mask, **kwargs)

        return self.out(grouper.forward(attn_func, q, k, v, scale=0.3).flatten(2))


def test_layer_trains_as_with_the_package():
    torch.manual_seed(0)
    layer = Layer().double()
    prompt_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    completion_mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    prompt_ids = torch.randint(1, 11, prompt_mask.shape) * prompt_mask
    completion_ids = torch.randint(1, 11, completion_mask.shape) * completion_mask
    results = []
    for cls in (PrefixGrouper, Theirs):
        grouper = cls.from_ungrouped_masks(prompt_mask, completion_mask, [2, 1])
        ids = grouper.concat_input(prompt_ids, prompt_mask, completion_ids, completion_mask)
        logits = layer(ids, grouper)
        _, _, suffix, mask = grouper.split_output(logits, include_prefix_last=1)
        targets = grouper.convert_padding(completion_ids, completion_mask)
        log_probs = torch.log_softmax(suffix[:, :-1], -1).gather(-1, targets[..., None])[..., 0]
        loss = -(log_probs * mask[:, 1:]).sum()
        layer.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- the attention function that is not called --------------------------------------------------


def grouper_and_inputs() -> tuple[PrefixGrouper, list[Tensor]]:
    grouper = PrefixGrouper([[4, 2, 3], [3, 2, 4]])
    return grouper, qkv(grouper.x_shape)


def test_other_attention_is_noticed():
    grouper, x = grouper_and_inputs()
    scale = 0.1

    def scaled(q, k, v, mask):
        return attention(q, k, v, mask, scale=scale)

    def with_dropout(q, k, v, mask):
        return torch.dropout(attention(q, k, v, mask), 0.3, train=True)

    def bidirectional(q, k, v, mask):
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    for function in (
        scaled,
        with_dropout,
        bidirectional,
        functools.partial(attention, scale=0.1),
    ):
        for _ in range(2):  # not only the first time
            with pytest.raises(ValueError, match="attn_func computes something else"):
                grouper.forward(function, *x)
    expected = grouper.forward(None, *x, scale=0.1)
    torch.testing.assert_close(grouper.forward(scaled, *x, scale=0.1), expected)
    scale = x[0].shape[-1] ** -0.5  # the closure now holds what forward takes by default
    torch.testing.assert_close(grouper.forward(scaled, *x), grouper.forward(None, *x))


def test_other_shape_is_noticed():
    grouper, x = grouper_and_inputs()
    with pytest.raises(ValueError, match=r"here \(1, 3, 4, 24\), got \(1, 4, 3, 24\)"):
        grouper.forward(lambda *a: attention(*a).transpose(1, 2), *x)


def test_probe_leaves_random_numbers_alone_and_runs_once():
    grouper, x = grouper_and_inputs()
    calls = collections.deque()  # unlike a list, told apart by identity

    def counted(q, k, v, mask):
        calls.append(q.shape)
        return attention(q, k, v, mask)

    state = torch.get_rng_state()
    for _ in range(3):
        grouper.forward(counted, *x)
    assert len(calls) == 2  # prefix and suffix of one probe
    assert torch.equal(torch.get_rng_state(), state)


def by_default_argument(scale):
    return lambda q, k, v, mask, factor=scale: attention(q, k, v, mask, scale=factor)


def by_keyword_default(scale):
    def function(q, k, v, mask, *, factor=scale):
        return attention(q, k, v, mask, scale=factor)

    return function


SCALE = 0.25


def by_global(q, k, v, mask):
    return attention(q, k, v, mask, scale=SCALE)


def by_list(scale):
    options = [scale]
    return lambda q, k, v, mask: attention(q, k, v, mask, scale=options[0])


class Scaled:
    """An attention function with its scale in an attribute."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, q, k, v, mask):
        return attention(q, k, v, mask, scale=self.scale)

    def method(self, q, k, v, mask):
        return self(q, k, v, mask)

    def closure(self):
        return lambda q, k, v, mask: attention(q, k, v, mask, scale=self.scale)


class Boxed:
    """With its scale where only its identity tells."""

    def __init__(self, scale):
        self.options = [scale]

    def __call__(self, q, k, v, mask):
        return attention(q, k, v, mask, scale=self.options[0])


def test_an_object_in_the_place_of_an_old_one_is_probed():
    grouper, x = grouper_and_inputs()
    old = Boxed(0.25)
    place = id(old)
    grouper.forward(old, *x, scale=0.25)
    del old
    others = [Boxed(1.0) for _ in range(10_000)]
    (new,) = (one for one in others if id(one) == place)
    with pytest.raises(ValueError, match="attn_func computes something else"):
        grouper.forward(new, *x, scale=0.25)


MAKERS = [by_default_argument, by_keyword_default, by_list, Scaled]


@pytest.mark.parametrize("make", MAKERS)
def test_another_scale_in_the_same_code_is_noticed(make):
    grouper, x = grouper_and_inputs()
    grouper.forward(make(0.25), *x, scale=0.25)
    with pytest.raises(ValueError, match="attn_func computes something else"):
        grouper.forward(make(1.0), *x, scale=0.25)


@pytest.mark.parametrize("kind", ["__call__", "method", "closure"])
def test_a_changed_attribute_is_noticed(kind):
    grouper, x = grouper_and_inputs()
    holder = Scaled(0.25)
    function = {"__call__": holder, "method": holder.method, "closure": holder.closure()}[kind]
    grouper.forward(function, *x, scale=0.25)
    holder.scale = 1.0
    with pytest.raises(ValueError, match="attn_func computes something else"):
        grouper.forward(function, *x, scale=0.25)


def test_a_changed_global_is_noticed(monkeypatch):
    grouper, x = grouper_and_inputs()
    grouper.forward(by_global, *x, scale=0.25)
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    with pytest.raises(ValueError, match="attn_func computes something else"):
        grouper.forward(by_global, *x, scale=0.25)


def test_what_has_no_weak_reference_is_probed_every_time():
    grouper, x = grouper_and_inputs()
    calls = []

    class Slotted:
        __slots__ = ("scale",)

        def __call__(self, q, k, v, mask):
            calls.append(q.shape)
            return attention(q, k, v, mask, scale=self.scale)

    function = Slotted()
    function.scale = 0.25
    for _ in range(2):
        grouper.forward(function, *x, scale=0.25)
    assert len(calls) == 4


def test_function_that_cannot_be_probed_warns():
    grouper, x = grouper_and_inputs()

    def of_one_length(q, k, v, mask):
        raise RuntimeError("needs 1024 tokens")

    with pytest.warns(UserWarning, match="RuntimeError: needs 1024 tokens"):
        out = grouper.forward(of_one_length, *x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(grouper.forward(None, *x), out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "forward has no dropout, got dropout=0.1"),
        ({"dropout_p": 0.5}, "got dropout_p=0.5"),
        ({"is_causal": False}, "forward is causal, got is_causal=False"),
        ({"position_bias": 3}, "forward can't serve position_bias=3"),
        ({"scale": 1.0, "scaling": 2.0}, r"several scales: \[1.0, 2.0\]"),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(options, message):
    grouper, x = grouper_and_inputs()
    with pytest.raises(TypeError, match=message):
        grouper.forward(attention, *x, **options)


def test_positional_extras_are_refused():
    grouper, x = grouper_and_inputs()
    with pytest.raises(TypeError, match="got 1 more positional"):
        grouper.forward(attention, *x, None)


def test_options_reach_attention():
    grouper, x = grouper_and_inputs()
    plain = grouper.forward(None, *x)
    same = grouper.forward(None, *x, dropout=0.0, is_causal=True, softcap=None, scaling=0.25)
    assert torch.equal(plain, same)
    for options in ({"sliding_window": 2}, {"softcap": 0.5}, {"s_aux": torch.ones(4).double()}):
        assert not torch.allclose(grouper.forward(None, *x, **options), plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixGrouper([]), "at least one group"),
        (lambda: PrefixGrouper([[3]]), r"group_info\[0\] must hold .* got \[3\]"),
        (lambda: PrefixGrouper([[3, -1]]), r"suffix_lens\[0\]\[0\] must be at least 0, got -1"),
        (lambda: PrefixGrouper([[3, 1]], padding_mode="middle"), "or a mask, got 'middle'"),
        (lambda: PrefixGrouper([[3, 1]], padding_mode=torch.ones(1, 3)), r"\[4\] tokens .* \[3\]"),
        (
            lambda: PrefixGrouper.from_ungrouped_masks(torch.ones(2, 3), torch.ones(3, 2), 2),
            "3 suffixes among 2 prefixes, got 2",
        ),
        (
            lambda: PrefixGrouper([[3, 1]]).forward(None, *[torch.zeros(1, 2, 3, 16)] * 3),
            r"q must have shape \(1, H, 4, D\), got \(1, 2, 3, 16\)",
        ),
        (
            lambda: PrefixGrouper([[3, 1]]).concat_input(
                torch.zeros(1, 3), torch.tensor([[1, 1, 0]]), torch.zeros(1, 1), torch.ones(1, 1)
            ),
            r"prefix_mask must have \[3\] tokens, as group_info, got \[2\]",
        ),
        (
            lambda: PrefixGrouper([[3, 1]]).split_output(torch.zeros(1, 5)),
            r"output must have shape \(1, 4, '...'\), got \(1, 5\)",
        ),
        (
            lambda: PrefixGrouper([[3, 1]]).split_output(torch.zeros(1, 4), -1),
            "include_prefix_last must be an integer of at least 0, got -1",
        ),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
