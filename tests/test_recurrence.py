"""Recurrences and convolutions along a prefix forest, against each path on its own."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from prefix_attn import PrefixLayout, recurrence
from prefix_attn.recurrence import convolve, fork_states, whole_sequences

SIZES = [0, 0, 1, 1, 2, 3, 5, 9, 17]  # empty segments, single tokens, and some that need padding
WIDTH = 4


def forest(seed: int) -> PrefixLayout:
    """Up to 14 segments of any depth; some have no tokens, roots included."""
    choose = random.Random(seed)
    lengths, parents, path = [], [], []
    for i in range(choose.randint(1, 14)):
        path = path[: choose.randint(0, len(path))]
        parents.append(path[-1] if path else -1)
        lengths.append(choose.choice(SIZES))
        path.append(i)
    return PrefixLayout.from_tree([*lengths, 1], [*parents, -1])


def scan(x: torch.Tensor, state: torch.Tensor, lengths: torch.Tensor):
    """A recurrence that zeros do not leave alone: (n, L, C) -> outputs, states at `lengths`."""
    outs, states = [], [state]
    for t in range(x.shape[1]):
        states.append((0.7 * states[-1] + x[:, t]).sin())
        outs.append(states[-1].square())
    return torch.stack(outs, 1), torch.stack(states)[lengths, torch.arange(len(lengths))]


def step(parts, states, lengths):
    x = parts[0] * parts[1]
    return scan(x, torch.zeros_like(x[:, 0]) if states is None else states, lengths)


def step_end_to_end(parts, states, bounds):
    """The same for segments that lie end to end, as kernels with bounds take them."""
    outs, finals, lengths = [], [], bounds.diff()
    for i, cut in enumerate(zip(*(x.split(lengths.tolist()) for x in parts), strict=True)):
        given = None if states is None else states[i : i + 1]
        out, final = step([x[None] for x in cut], given, lengths[i : i + 1])
        outs.append(out[0])
        finals.append(final)
    return torch.cat(outs), torch.cat(finals)


def whole(parts):
    x = parts[0] * parts[1]
    return scan(x, torch.zeros_like(x[:, 0]), torch.ones(len(x), dtype=torch.long))[0]


def convolution(x: torch.Tensor) -> torch.Tensor:
    """(M, C) -> (M, C), from each row and the three before it."""
    weight = torch.linspace(0.5, 2, WIDTH, dtype=x.dtype)
    rows = [F.pad(x, (0, 0, j, 0))[: len(x)] for j in range(WIDTH)]
    return sum(w * row for w, row in zip(weight, rows, strict=True))


def along_paths(function, inputs, layout):
    """What `function` gives for the rows of every segment at the end of its path alone."""
    forest = layout.forest
    out = torch.zeros(layout.num_tokens, 3, dtype=torch.float64)
    for segment in range(layout.num_segments):
        path = torch.from_numpy(forest.path_rows(segment))
        own = slice(int(forest.starts[segment]), int(forest.ends[segment]))
        if own.stop > own.start:
            of_path = function([x[path] for x in inputs])
            out = out.index_put(
                (torch.arange(own.start, own.stop),), of_path[-(own.stop - own.start) :]
            )
    return out


def with_gradients(function, inputs):
    out = function(inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that segments of unequal lengths run in several batches."""
    monkeypatch.setattr(recurrence, "CHUNK", 2)


FUNCTIONS = {
    "fork_states": (
        lambda xs, layout: fork_states(step, xs, layout),
        lambda parts: whole([x[None] for x in parts])[0],
    ),
    "fork_states, end to end": (
        lambda xs, layout: fork_states(step_end_to_end, xs, layout, padded=False),
        lambda parts: whole([x[None] for x in parts])[0],
    ),
    "whole_sequences": (
        lambda xs, layout: whole_sequences(whole, xs, layout),
        lambda parts: whole([x[None] for x in parts])[0],
    ),
    "convolve": (
        lambda xs, layout: convolve(convolution, xs[0] * xs[1], layout, WIDTH - 1),
        lambda parts: convolution(parts[0] * parts[1]),
    ),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_of_sequences_match_each_path_alone(name):
    """Values and gradients in float64, on random forests."""
    packed, alone = FUNCTIONS[name]
    for seed in range(12):
        layout = forest(seed)
        generator = torch.Generator().manual_seed(seed)
        inputs = [
            torch.randn(layout.num_tokens, 3, generator=generator, dtype=torch.float64)
            for _ in range(2)
        ]
        inputs = [x.requires_grad_() for x in inputs]
        got = with_gradients(partial(packed, layout=layout), inputs)
        want = with_gradients(partial(along_paths, alone, layout=layout), inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_fork_states_pads_no_segment_to_more_than_twice_its_length():
    lengths = [1, 30, 2, 5, 64, 100, 3]
    layout = PrefixLayout.from_tree([7, *lengths], [-1, *[0] * len(lengths)])
    shapes = []

    def record(parts, states, lengths):
        shapes.append(tuple(parts[0].shape))
        assert (parts[0].shape[1] <= 2 * lengths.clamp(min=recurrence.CHUNK)).all()
        return parts[0], parts[0].sum(1)

    fork_states(record, [torch.ones(layout.num_tokens)], layout)
    assert shapes == [(1, 7), (2, 100), (1, 30), (2, 5), (2, 2)]


def test_fork_states_runs_one_call_per_depth_where_bounds_are_known():
    layout = PrefixLayout.from_tree([4, 2, 1, 3, 5], [-1, 0, 1, 1, 0])
    calls, tables = [], []

    def record(parts, states, bounds):
        calls.append((bounds.tolist(), None if states is None else states.tolist()))
        tables.append(bounds)
        return parts[0], parts[0][bounds[1:] - 1]

    rows = torch.arange(layout.num_tokens)
    for _ in range(2):  # layers: kernels know bounds again by the tensor itself
        fork_states(record, [rows], layout, padded=False)
    assert calls == 2 * [([0, 4], None), ([0, 2, 7], [3, 3]), ([0, 1, 4], [5, 5])]
    assert {x.dtype for x in tables} == {torch.int32}
    assert all(a is b for a, b in zip(tables[:3], tables[3:], strict=True))


def test_whole_sequences_hands_back_tuples():
    layout = PrefixLayout.from_lengths([2], [[1, 3]])
    x = torch.arange(6.0)
    first, second = whole_sequences(lambda parts: (parts[0], 2 * parts[0]), [x], layout)
    assert torch.equal(first, x)
    assert torch.equal(second, 2 * x)


def test_functions_of_sequences_refuse_inputs_of_another_length():
    layout = PrefixLayout.from_lengths([2], [[1, 3]])
    for run in (
        lambda x: fork_states(step, [x, x], layout),
        lambda x: convolve(convolution, x, layout, 3),
        lambda x: whole_sequences(whole, [x, x], layout),
    ):
        with pytest.raises(ValueError, match=r"\(6, \.\.\.\) on the packed axis, got \(5, 3\)"):
            run(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="history must not be negative, got -1"):
        convolve(convolution, torch.zeros(6, 3), layout, -1)


def test_fork_states_refuses_a_step_without_states():
    layout = PrefixLayout.from_lengths([2], [[1, 3]])
    with pytest.raises(ValueError, match="must return the final states"):
        fork_states(lambda parts, states, lengths: (parts[0], None), [torch.zeros(6)], layout)
