"""The examples run as they stand, and what they show is so."""

from __future__ import annotations

import runpy

import torch
import torch.nn.functional as F

from prefix_attn.testing import assert_within_budget, repeated_attention
from tests.docs_examples import ROOT


def run(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_minimal_example_shows_equal_results(capsys):
    names = run("minimal.py")
    inputs = [names[x].detach().double().requires_grad_() for x in "qkv"]
    exact = repeated_attention(*inputs, names["layout"])
    gradients = torch.autograd.grad(exact, inputs, names["gradient"].double())
    assert_within_budget("out", names["shared"], exact, names["repeated"])
    for i, name in enumerate(("dq", "dk", "dv")):
        pair = names["shared_gradients"][i], names["repeated_gradients"][i]
        assert_within_budget(name, pair[0], gradients[i], pair[1])
    printed = capsys.readouterr().out
    assert printed.count("largest difference of") == 4
    assert "2.56x fewer" in printed


def test_tree_example_gives_each_rollout_its_own_log_probs(capsys):
    names = run("tree.py")
    for i, rollout in enumerate(names["rollouts"]):
        x = names["embedding"].weight[torch.tensor(rollout)].view(-1, 2, 32).transpose(0, 1)
        out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        hidden = out.transpose(0, 1).reshape(len(rollout), 64)
        log_p = torch.log_softmax(names["head"](hidden[:-1]), -1)
        expected = log_p.gather(1, torch.tensor(rollout[1:])[:, None])[3:, 0]
        row = names["log_probs"][i, names["mask"][i]]
        torch.testing.assert_close(row, expected)
    assert capsys.readouterr().out.count("log-probabilities:") == 3
