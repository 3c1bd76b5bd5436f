"""The GRPO example: a few steps, with and without sharing, are the same training run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

import prefix_attn

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["grpo_example"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["grpo_example"]


SMALL = ["--steps", "2", "--prompts", "2", "--group", "3", "--length", "4", "--quiet"]


def run(grpo, tmp_path, *options):
    threads = str(torch.get_num_threads())
    arguments = [*SMALL, "--threads", threads, "--output", str(tmp_path / "grpo.png"), *options]
    return grpo.main(arguments)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--loss", "gspo"],
        ["--loss", "cispo"],
        ["--loss", "rebel", "--prune"],
        ["--advantages", "kalman", "--prune", "0.4"],
        ["--micro", "2", "--prune"],
    ],
    ids=" ".join,
)
def test_both_runs_are_the_same_training(grpo, tmp_path, capsys, options):
    """In float32, next to the same two runs in float64."""
    pairs = {}
    for dtype in ("float32", "float64"):
        pairs[dtype] = run(grpo, tmp_path, *options, "--dtype", dtype)
        ordinary, shared = pairs[dtype]
        assert grpo.first_other_sample(ordinary, shared) is None
        assert ordinary.rewards == shared.rewards
    exact = torch.tensor(pairs["float64"][0].losses, dtype=torch.float64)
    for pair in zip(*(pairs[d][0].completions for d in pairs), strict=True):
        assert torch.equal(*pair)
    ordinary, shared = (torch.tensor(r.losses, dtype=torch.float64) for r in pairs["float32"])
    # A loss is a mean of ratios times advantages, which cancel: rounding is that of its terms.
    band = 2 * torch.finfo(torch.float32).eps * shared.new_tensor(2.0)
    budget = 2 * (ordinary - exact).abs().max() + band
    assert (shared - exact).abs().max() <= budget
    assert len(shared) == 4  # two updates per step
    assert shared.abs().max() > 1e-4  # the second update of a step has a loss

    stats = prefix_attn.stats(pairs["float32"][1].model)
    parts = 1
    if "--micro" in options:  # three completions are left of six
        parts = 2
        assert stats.tokens_run < 4 * 600  # the instructions run once for each update
    assert stats.packed_calls == 4 * parts
    assert stats.tokens_in == pairs["float32"][0].tokens
    assert stats.ratio > 2
    assert (tmp_path / "grpo.png").stat().st_size > 10_000
    assert "sampled completions: the same in every step" in capsys.readouterr().out


def test_other_samples_are_reported(grpo, tmp_path, capsys):
    ordinary, shared = run(grpo, tmp_path)
    shared.completions[1] = (shared.completions[1] + 1) % 26
    assert grpo.first_other_sample(ordinary, shared) == 1
    args = grpo.parse([*SMALL, "--output", "a.png"])
    assert "different from step 1 on" in grpo.report(ordinary, shared, args)


def test_completions_that_pass_through_count_as_run(grpo, tmp_path, capsys):
    """One completion is left: nothing is shared, and all of it runs."""
    one = ["--prompts", "1", "--group", "2", "--length", "1", "--updates", "1", "--prune", "0.99"]
    ordinary, _ = run(grpo, tmp_path, "--steps", "1", *one)
    assert f"tokens in: {ordinary.tokens}, run: {ordinary.tokens} " in capsys.readouterr().out


def test_reward_is_the_share_of_following_letters(grpo):
    prompts = torch.tensor([grpo.encode(": c"), grpo.encode(": z"), grpo.encode(": a")])
    completions = torch.tensor([grpo.encode("defg"), grpo.encode("abzz"), grpo.encode("a. b")])
    assert grpo.reward_of(prompts, completions).tolist() == [1.0, 0.5, 0.0]


def test_pruning_leaves_ragged_groups(grpo):
    advantages = torch.tensor([0.1, -2.0, 0.0, 0.2, 0.3, 0.1, 1.0, 1.5, -3.0])
    rows = torch.arange(9)
    batch = grpo.Batch(rows[:, None], rows[:, None], rows.float(), advantages, [3, 3, 3])
    left = batch.without(0.5)
    assert left.rewards.tolist() == [1.0, 4.0, 6.0, 7.0, 8.0]
    assert left.group_sizes == [1, 1, 3]
    assert batch.without(0.6).group_sizes == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "1"], "--group must be at least 2, got 1"),
        (["--prompts", "27"], "--prompts must be at most 26, got 27"),
        (["--lr", "0"], "--lr must be positive and finite, got 0.0"),
        (["--prune", "1"], "--prune must be at least 0 and below 1, got 1.0"),
        (["--micro", "-1"], "--micro must be at least 0, got -1"),
        (["--micro", "2", "--loss", "rebel"], "--loss rebel compares all completions of a group"),
        (["--eta", "0"], "--eta must be positive and finite, got 0.0"),
        (["--entropy", "inf"], "--entropy must be at least 0 and finite, got inf"),
        (["--output", "a.txt"], "--output must end in .png, .svg or .pdf, got a.txt"),
    ],
)
def test_wrong_options_are_refused(grpo, capsys, options, message):
    with pytest.raises(SystemExit):
        grpo.parse(options)
    assert message in capsys.readouterr().err


def test_missing_matplotlib_is_named_before_the_run(grpo, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        grpo.parse([])
    assert "pip install matplotlib" in capsys.readouterr().err
