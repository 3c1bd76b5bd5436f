"""The GPU benchmark, tried on a CPU: every unit runs, interpreted, at tiny shapes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import gpu, gpu_report, gpu_tune, gpu_units
from bench.gpu import RECORDS, Records, read
from bench.gpu_units import Unit, UnsupportedError, WrongResultError

ROOT = Path(__file__).parents[1]
# Stand-ins for packages that only GPUs have: repeated attention as their users call it.
FLASH_PACKAGE = """
import torch.nn.functional as F

def flash_attn_func(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return {result}
"""


def run(folder, *arguments, path=(), script=("-m", "bench.gpu")):
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    command = [sys.executable, *script, "--dry-run", "--out", str(folder), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the two packages: one returns the output, the other more."""
    folder = tmp_path_factory.mktemp("packages")
    first, second = folder / "flash_attn_interface.py", folder / "flash_attn" / "cute"
    second.mkdir(parents=True)
    first.write_text(FLASH_PACKAGE.format(result="out.transpose(1, 2)"))
    (second / "__init__.py").write_text(FLASH_PACKAGE.format(result="(out.transpose(1, 2), None)"))
    return folder


def test_dry_run_tries_every_unit_and_goes_on_where_it_stopped(tmp_path, packages):
    first = run(tmp_path, path=[packages])
    assert first.returncode == 0, first.stdout + first.stderr
    records = read(tmp_path / RECORDS)
    ended = {r["key"]: r for r in records if r["status"] != "started"}
    assert {r["status"] for r in ended.values()} <= {"done", "unsupported"}
    refused = [key for key, r in ended.items() if r["status"] == "unsupported"]
    assert all(key.endswith(("/two calls", "/prefix-grouper")) for key in refused)
    rows = list(csv.DictReader((tmp_path / "bench.csv").open(newline="")))
    assert {"repeated FlashAttention-3", "FlexAttention", "prefix_attn"} <= {
        row["provider"] for row in rows
    }
    for row in rows:
        assert float(row["fwd_ms"]) > 0
        assert row["bwd_tflops"] or row["provider"] == "FlexAttention"
        assert row["torch"] == torch.__version__
    for name in ("check.csv", "ceiling.csv", "bench.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert json.loads((tmp_path / "results.json").read_text())["facts"]["commit"]

    # What a crash leaves: a line cut short, and a unit without an end.
    lines = (tmp_path / RECORDS).read_text().splitlines()
    last = json.loads(lines[-1])
    (tmp_path / RECORDS).write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    second = run(tmp_path, path=[packages])
    assert second.returncode == 0, second.stdout + second.stderr
    again = read(tmp_path / RECORDS)[len(lines) - 1 :]
    assert [(r["key"], r["status"]) for r in again] == [
        (last["key"], "started"),
        (last["key"], "done"),
    ]


def test_sweep_times_candidates(tmp_path):
    done = run(tmp_path, "--kernel", "backward")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "tune.csv").open(newline="")))
    assert [row["is_present"] for row in rows].count("True") == 1
    assert len(rows) == 2


# Runs `bench.gpu` with units of its own, in the workers that it starts, too.
SCRIPT = """
import os, sys
import torch
from bench import gpu
from bench.gpu_units import Unit, WrongResultError

def fail(error):
    raise error

gpu.COMMAND = [sys.executable, __file__]
gpu.units = lambda session: [
    Unit("time/dies", 0.0, os.abort),
    Unit("check/wrong", 0.0, lambda: fail(WrongResultError("not equal"))),
    Unit("time/large", 0.0, lambda: fail(torch.OutOfMemoryError("no memory left"))),
    Unit("time/late", 1e9, os.abort),
    Unit("ceiling/fine", 0.0, lambda: [{"what": "x", "unit": "y", "reached": 1.0}]),
]
sys.exit(gpu.main())
"""


def test_unit_that_kills_the_process_is_recorded_and_the_rest_goes_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "out"
    done = run(folder, script=(str(script),))
    outcomes = {r["key"]: (r["status"], r["reason"]) for r in read(folder / RECORDS)}
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes == {
        "time/dies": ("failed", "the process died, exit status -6"),
        "check/wrong": ("wrong", "not equal"),
        "time/large": ("failed", "out of memory: no memory left"),
        "ceiling/fine": ("done", ""),
    }
    assert "1 units did not fit into the time" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs a CUDA device" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "must be positive, got 0"),
        (["--case", "1,1,1,1,1,16"], "give --kernel"),
        (["--kernel", "forward", "--case", "1,2"], "six integers"),
        (["--kernel", "sideways"], "invalid choice"),
        (["--out", str(Path(__file__))], "is a file"),
    ],
)
def test_wrong_command_line_says_why(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert words in capsys.readouterr().err


FACTS = {"device": "d", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}


def test_units_are_finished_when_done_on_the_same_device_and_commit(tmp_path):
    records = Records(tmp_path, FACTS, "one")
    records.append("a", "done")
    records.append("b", "failed", "reason")
    records.append("c", "unsupported", "reason")
    records.append("d", "started")
    assert records.finished() == {"a", "b", "c"}
    assert Records(tmp_path, FACTS, "two").finished() == {"a", "c"}
    assert Records(tmp_path, FACTS | {"commit": "other"}, "one").finished() == set()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UnsupportedError("too large"), "unsupported", "too large"),
        (WrongResultError("dq"), "wrong", "dq"),
        (AssertionError("dq"), "wrong", "dq"),
        (torch.OutOfMemoryError("full"), "failed", "out of memory: full"),
        (RuntimeError("boom\nmore"), "failed", "RuntimeError: boom"),
    ],
)
def test_errors_of_a_unit_are_named(error, status, reason):
    def fail():
        raise error

    assert gpu.attempt(Unit("key", 0.0, fail)) == (status, reason, [])


def test_most_telling_cases_come_first_and_all_are_there():
    cases = gpu_units.cases(dry=False)
    assert len(cases) == len(set(cases))
    assert (cases[0].prefix, cases[0].head_dim, cases[0].heads_kv) == (2048, 128, 8)
    assert {(c.head_dim, c.heads_kv) for c in cases} == {(64, 8), (64, 32), (128, 8), (128, 32)}
    assert {(c.prefix, c.suffix, c.group) for c in cases} >= {
        (p, s, g) for p in (512, 2048, 8192, 32768) for s in (128, 512, 2048) for g in (4, 16, 64)
    }


def test_candidates_begin_with_the_present_configuration_and_differ():
    present = gpu_tune.select_config(90, 128, torch.bfloat16, 132)
    for kernel in ("forward", "backward"):
        found = gpu_tune.candidates(kernel, present, dry=False)
        assert found[0] == present
        assert len(found) == len(set(found)) > 20


def test_report_without_records_says_so(tmp_path, capsys):
    assert gpu_report.write(tmp_path, []) == 1
    assert "no records" in capsys.readouterr().out
