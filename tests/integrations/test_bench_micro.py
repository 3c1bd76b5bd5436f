"""`python -m bench --micro`: all providers measured, and wrong gradients named."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from bench import micro
from bench.__main__ import Lines, parse
from prefix_attn.micro import Recorded
from tests.docs_examples import ROOT


class Here:
    """In place of processes of their own, which load transformers anew."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def apply(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(micro, "fresh_processes", Here)
    options = ["--width", "64", "--group", "8", "--rounds", "3", "--out", str(tmp_path)]
    return parse(["--micro", "--device", "cpu", *options])


def test_bench_micro_measures_every_provider(args, capsys):
    assert micro.main(args, Lines()) == 0
    with (args.out / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [(row["recomputation"], row["provider"]) for row in rows]
    assert measured == [*product(("False", "True"), micro.NAMES)]
    assert all(float(row["ms"]) > 0 and float(row["peak_mib"]) >= 0 for row in rows)
    assert (args.out / "bench.png").exists() == bool(find_spec("matplotlib"))
    out = capsys.readouterr().out
    assert "| no | 8 |" in out
    assert "| yes | 8 |" in out


def test_bench_micro_names_wrong_gradients(args, capsys, monkeypatch):
    monkeypatch.setattr(Recorded, "add", lambda self, grad, start: None)  # of readers
    assert micro.gate(micro.Point(micro.REPEATED, 8, False, 64, "float32"), args.device) is None
    monkeypatch.setattr(micro, "times", lambda points, *_: {})
    monkeypatch.setattr(micro, "peak", lambda *_: 0)
    wrong = micro.run(args, Here(), Lines())[1]
    assert len(wrong) == 2
    assert all(text.startswith("micro-groups, G 8") for text in wrong)
    assert all("root mean square error" in text for text in wrong)


def test_bench_micro_measures_the_most_that_is_resident():
    """Half of it is given back before the end."""
    code = (
        "import torch\n"
        "from bench.micro import begin_peak, peak_since\n"
        "torch.ones(2**18)\n"
        "before = begin_peak()\n"
        "kept = [torch.ones(2**21) for _ in range(4)]\n"  # 8 MiB each
        "del kept[2:]\n"
        "print(peak_since(before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert 30 * 2**20 < int(done.stdout) < 40 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "8,8,2,1,1,16"], "--micro excludes --case and --full"),
        (["--full"], "--micro excludes --case and --full"),
        (["--width", "100"], "--width must be a multiple of 64, got 100"),
        (["--group", "6"], "--group must be a multiple of 4, got [6]"),
    ],
)
def test_bench_micro_refuses_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(["--micro", *options])
    assert message in capsys.readouterr().err
