"""`python -m bench.peers`: every library that is installed agrees with float64, or is named."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from bench import peers
from bench.shapes import Problem, Shape

GROUP = Shape("group", (20, 7, 7, 7), (-1, 0, 0, 0), members=3)
TREE = Shape("tree", (9, 5, 3, 6, 8, 4), (-1, 0, 1, 1, 0, -1))  # and a sequence alone


def test_libraries_agree_with_float64_or_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "TREES", (GROUP, TREE))
    assert peers.main(["--rounds", "3", "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = {(row["tree"], row["library"]): row for row in csv.DictReader(file)}
    printed = capsys.readouterr().out
    for tree in (GROUP, TREE):
        for name, (_, distribution) in peers.LIBRARIES.items():
            is_there = (tree.name, name) in rows
            assert is_there == (f"{name} left out of {tree.name}: " not in printed)
            if not distribution or (name == "TRL" and importlib.util.find_spec("trl")):
                row = rows[tree.name, name]
                assert float(row["total_ms"]) > 0
                assert 0 < float(row["error_grad"]) < 1e-6
    assert "Prefix Grouper left out of tree: " in printed
    assert peers.markdown(list(rows.values())) in printed


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_wrong_libraries_are_named(
    factor: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scaled(problem: Problem) -> peers.Packed:
        right = peers.repeat(problem)
        return replace(right, attend=lambda *x: factor * right.attend(*x))

    def refused(problem: Problem) -> peers.Packed:
        raise NotImplementedError

    libraries = {
        "wrong": (scaled, ""),
        "silent": (refused, ""),
        peers.OURS: peers.LIBRARIES[peers.OURS],
    }
    monkeypatch.setattr(peers, "TREES", (GROUP,))
    monkeypatch.setattr(peers, "LIBRARIES", libraries)
    monkeypatch.setattr(peers, "draw", lambda *_: None)
    assert peers.main(["--rounds", "3", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "WRONG: group: wrong is off by" in printed.err
    assert "silent left out of group: NotImplementedError" in printed.out


def test_what_lies_twice_in_a_row_gets_its_gradient_once() -> None:
    """TRL's tries fork one token early: each branch holds the last token of its prefix."""
    problem = Problem(GROUP, GROUP.heads)
    packed = peers.repeat(problem)
    dout = packed.dout(problem.inputs.dout)
    summed = replace(packed, heads_first=False).summed(dout, problem.inputs.dout.double())
    assert summed.equal(problem.inputs.dout.double())
    assert dout[0].any()
    assert not dout[1:, :20].any()
